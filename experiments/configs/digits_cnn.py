"""RigL at 90 % on scikit-learn's 8x8 digits with a convolutional network."""

from experiments.configs import base


def get_config():
    c = base.get_config()
    c.dataset, c.model = "digits", "cnn"
    c.model_options.features = (32, 64)
    c.model_options.kernel = 3
    c.steps = 2000
    return c
