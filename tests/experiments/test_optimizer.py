"""The optimizer of a run, from its config."""

import jax.numpy as jnp
import pytest

import jaxsparse
from experiments.configs import base
from experiments.optimizer import make_optimizer


@pytest.mark.parametrize("method", sorted(set(jaxsparse.METHODS)))
def test_every_method_can_be_the_method_of_a_model_with_stacked_layers(method):
    """Also those that choose no leaves, such as `dense`."""
    config = base.get_config()
    config.method, config.steps, config.warmup_steps, config.options = method, 1000, 10, {}
    needed = jaxsparse.METHODS[method].options
    if "groups" in needed:
        pytest.skip("it is given the channels of a model")
    tx = make_optimizer(config, stacked={"layers": 1}, sparsity=0.5)
    params = {"layers": {"kernel": jnp.ones((2, 16, 16))}, "bias": jnp.ones(3)}
    assert tx.init(params) is not None
