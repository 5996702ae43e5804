"""Data sets are prepared once per session, and configs are small."""

import pytest

from experiments.configs import base


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    return str(tmp_path_factory.mktemp("tfds"))


@pytest.fixture
def config(data_dir):
    """RigL at 80 % on the digits, 40 steps: a second."""
    c = base.get_config()
    c.data_dir = data_dir
    c.dataset, c.model = "digits", "mlp"
    c.model_options.hidden = (32,)
    c.sparsity, c.options.update_every = 0.8, 5
    c.batch_size, c.steps, c.warmup_steps = 32, 40, 5
    c.log_every, c.eval_every, c.checkpoint_every = 10, 20, 10
    return c
