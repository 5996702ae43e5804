"""What users do without reading the manual."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import jaxsparse


class Net(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(8, 16, rngs=rngs)
        self.norm = nnx.BatchNorm(16, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.last = nnx.Linear(16, 4, rngs=rngs)


@pytest.fixture
def net_and_optimizer():
    net = Net(nnx.Rngs(0))
    tx = jaxsparse.static(optax.adam(1e-3), sparsity=0.75, allocation="uniform")
    return net, nnx.Optimizer(net, tx, wrt=nnx.Param)


def test_importing_jaxsparse_imports_nothing_heavy():
    code = (
        "import sys, jaxsparse; heavy = {'matplotlib', 'orbax', 'tensorflow', 'tensorflow_datasets', "
        "'tensorboardX', 'sklearn', 'pallas_kernels', 'experiments', 'jax.experimental.pallas'}; "
        "new = heavy & set(sys.modules); bare = set(sys.argv[1].split(',')); print(sorted(new - bare))"
    )
    peers = (
        "import sys, jax, optax, chex, flax.nnx; print(','.join(sorted(set(sys.modules) & {'orbax', "
        "'tensorflow', 'jax.experimental.pallas'})))"
    )
    run = lambda *args: subprocess.run(
        [sys.executable, "-c", *args], check=True, capture_output=True, text=True
    ).stdout.strip()
    assert run(code, run(peers)) == "[]"


def test_the_package_says_that_it_is_typed():
    import importlib.resources

    assert importlib.resources.files("jaxsparse").joinpath("py.typed").is_file()


def test_an_nnx_module_and_its_optimizer_can_be_summarized(net_and_optimizer):
    summary = jaxsparse.summarize(*net_and_optimizer)
    masked = {r.path for r in summary.rows if r.masked is not None}
    assert masked == {"first/kernel", "last/kernel"}
    assert {r.path for r in summary.rows} == masked | {
        "first/bias", "last/bias", "norm/scale", "norm/bias"
    }  # fmt: skip


def test_the_state_of_an_nnx_module_can_be_masked_before_the_first_step(net_and_optimizer):
    net, optimizer = net_and_optimizer
    nnx.update(net, jaxsparse.apply_masks(nnx.state(net, nnx.Param), optimizer))
    masks = jaxsparse.get_masks(optimizer)
    np.testing.assert_array_equal(net.first.kernel[...] != 0, masks["first"]["kernel"])
    assert jaxsparse.summarize(net, optimizer).sparsity == 0.75


def test_masks_apply_to_trees_with_and_without_nnx_variables(net_and_optimizer):
    net, optimizer = net_and_optimizer
    masks = jaxsparse.get_masks(optimizer)
    wrapped = jaxsparse.masking.apply(nnx.state(net, nnx.Param), masks)
    pure = jaxsparse.masking.apply(nnx.as_pure(nnx.state(net, nnx.Param)), masks)
    assert jax.tree.leaves(pure)[1].sum() == jax.tree.leaves(wrapped)[1].sum()
    assert isinstance(wrapped["first"]["kernel"], nnx.Param)


def test_the_pruned_state_of_a_trained_module_keeps_its_masks_in_fine_tuning():
    net = Net(nnx.Rngs(0))
    state, masks = jaxsparse.prune(nnx.state(net, nnx.Param), 0.5)
    nnx.update(net, state)
    tx = jaxsparse.static(optax.sgd(0.1), masks="from_params")
    optimizer = nnx.Optimizer(net, tx, wrt=nnx.Param)
    found = jaxsparse.get_masks(optimizer)
    for a, b in zip(jax.tree.leaves(masks), jax.tree.leaves(found)):
        np.testing.assert_array_equal(a, b)


def test_a_linen_train_state_gives_its_masks():
    params = {"dense": {"kernel": jnp.ones((8, 4)), "bias": jnp.zeros(4)}}
    tx = jaxsparse.magnitude(optax.adam(1e-3), sparsity=0.5, total_steps=10)
    state = TrainState.create(apply_fn=lambda *_: None, params=params, tx=tx)
    masks = jaxsparse.get_masks(state)
    assert masks["dense"]["bias"] is None
    assert masks["dense"]["kernel"].shape == (8, 4)
