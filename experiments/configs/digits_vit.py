"""RigL at 80 % on scikit-learn's 8x8 digits with a tiny Vision Transformer."""

from experiments.configs import base


def get_config():
    c = base.get_config()
    c.dataset, c.model = "digits", "vit"
    c.model_options.patch = 2
    c.model_options.dim = 64
    c.sparsity = 0.8
    c.steps = 2000
    return c
