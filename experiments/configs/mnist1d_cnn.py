"""RigL at 90 % on MNIST-1D with a convolutional network."""

from experiments.configs import base


def get_config():
    c = base.get_config()
    c.dataset, c.model = "mnist1d", "cnn"
    c.model_options.features = (64, 64, 64)
    c.steps = 4000
    c.learning_rate = 3e-3
    return c
