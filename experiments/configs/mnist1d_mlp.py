"""RigL at 90 % on MNIST-1D with a small MLP: the default run, about a minute on two cores."""

from experiments.configs import base


def get_config():
    c = base.get_config()
    c.dataset, c.model = "mnist1d", "mlp"
    c.model_options.hidden = (256, 256)
    c.steps = 6000
    c.learning_rate = 2e-3
    return c
