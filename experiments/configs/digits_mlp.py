"""RigL at 90 % on scikit-learn's 8x8 digits with a small MLP."""

from experiments.configs import base


def get_config():
    c = base.get_config()
    c.dataset, c.model = "digits", "mlp"
    c.steps = 1000
    c.learning_rate = 2e-3
    c.eval_every = c.checkpoint_every = 250
    return c
