"""`store`: a masked run that goes on as stored."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxsparse
from jaxsparse.nn import BlockSparseLinear, CondensedLinear, Trained, check_stored, store
from pallas_kernels import BlockSparse

X = jax.random.normal(jax.random.key(0), (16, 16))
Y = jnp.sin(X @ jax.random.normal(jax.random.key(1), (16, 16)))
INNER = optax.adamw(optax.cosine_decay_schedule(1e-2, 60), weight_decay=0.01)
OPTIONS = dict(total_steps=60, update_every=10, seed=2, drop_fraction=0.5)


class Model(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.layers = nnx.List([nnx.Linear(16, 32, rngs=rngs), nnx.Linear(32, 16, rngs=rngs)])

    def __call__(self, x):
        return self.layers[1](nnx.relu(self.layers[0](x)))


def loss(model):
    return ((model(X) - Y) ** 2).mean()


@nnx.jit
def step(model, optimizer):
    wrt = optimizer.wrt
    grads = nnx.grad(loss, argnums=nnx.DiffState(0, wrt), allow_int=True)(model)
    optimizer.update(model, grads)


def check_goes_on(method, structure, rule, stop, read, **options):
    """A masked run that is stored at step `stop` and the masked run itself hold the same weights and masks 15 steps later;
    `read(layer)` is the stored layer's matrix and mask."""
    model = Model()
    tx = method(INNER, 0.5, structure=structure, allocation="uniform", **OPTIONS)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    for _ in range(stop):
        step(model, optimizer)
    sparse, stored_tx, state = store(model, optimizer, INNER, rule=rule, **options, **OPTIONS)
    other = nnx.Optimizer(sparse, stored_tx, wrt=Trained)
    nnx.update(other.opt_state, nnx.state(state))
    start = jaxsparse.get_masks(optimizer)
    for _ in range(15):
        step(model, optimizer)
        step(sparse, other)
    masks = jaxsparse.get_masks(optimizer)
    for i in range(2):
        matrix, held = read(sparse.layers[i])
        mask = np.asarray(masks["layers"][i]["kernel"])
        np.testing.assert_allclose(matrix, model.layers[i].kernel[...], atol=1e-5)
        np.testing.assert_array_equal(held, mask)
        assert (mask != np.asarray(start["layers"][i]["kernel"])).any()


# At a step that moves blocks, and between two.
@pytest.mark.parametrize("stop", [20, pytest.param(23, marks=pytest.mark.slow)])
def test_a_masked_run_goes_on_as_stored_along_the_same_trajectory(stop):
    def read(layer):
        assert isinstance(layer, BlockSparseLinear)
        return layer.weight.to_dense(), np.kron(layer.weight.block_mask, np.ones((4, 4)))

    check_goes_on(jaxsparse.rigl, "block:4x4", "rigl", stop, read, block_shape=(4, 4))


@pytest.mark.parametrize("rule", ["rigl", pytest.param("set", marks=pytest.mark.slow)])
def test_so_it_does_with_weights_that_are_stored_one_by_one(rule):
    def read(layer):
        assert isinstance(layer, CondensedLinear)
        assert layer.values.shape[1] * 2 == layer.weight.shape[0]
        held = layer.weight.with_values(jnp.ones_like(layer.values[...])).to_dense()
        return layer.weight.to_dense(), held != 0

    method = {"rigl": jaxsparse.rigl, "set": jaxsparse.set_}[rule]
    check_goes_on(method, "fan_in", rule, 20, read)


def test_a_masked_run_goes_on_by_momentum():
    model = Model()
    tx = jaxsparse.rigl(INNER, 0.5, structure="block:4x4", allocation="uniform", **OPTIONS)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    options = dict(rule="momentum", block_shape=(4, 4), sketch=(2, 2))
    sparse, tx, state = store(model, optimizer, INNER, **options, **OPTIONS)
    other = nnx.Optimizer(sparse, tx, wrt=Trained)
    nnx.update(other.opt_state, nnx.state(state))
    before, places = loss(sparse), jnp.copy(sparse.layers[0].places[...])
    for _ in range(12):
        step(sparse, other)
    check_stored(other)
    assert loss(sparse) < before and (sparse.layers[0].places[...] != places).any()


def test_slots_are_those_of_the_stored_blocks():
    model = Model()
    tx = jaxsparse.static(optax.adam(1e-2), 0.5, structure="block:4x4")
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    for _ in range(3):
        step(model, optimizer)
    sparse, _, state = store(model, optimizer, optax.adam(1e-2), block_shape=(4, 4), rule="static")
    mu = optax.tree.get(state, "mu")["layers"][0]
    places = sparse.layers[0].places[...]
    dense = BlockSparse(mu["values"], places, (16, 32), (4, 4)).to_dense()
    want = nnx.as_pure(optax.tree.get(nnx.as_pure(optimizer.opt_state), "mu"))["layers"][0]
    np.testing.assert_array_equal(dense, want["kernel"])
    np.testing.assert_array_equal(mu["bias"], want["bias"])
    assert int(state.count) == 3


def test_what_cannot_be_stored_is_named():
    model = Model()
    tx = jaxsparse.static(INNER, 0.5, structure="block:4x4")
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    with pytest.raises(
        ValueError, match=r"block_shape=\(8, 8\): the mask of 'layers/0/kernel' is no"
    ):
        store(model, optimizer, INNER, block_shape=(8, 8), rule="static")
    with pytest.raises(ValueError, match=r"block_shape=\(5, 4\) does not tile"):
        store(model, optimizer, INNER, block_shape=(5, 4), rule="static")
    with pytest.raises(ValueError, match=r"sketch=\(2, 2\): rule='rigl' does not read it"):
        store(model, optimizer, INNER, block_shape=(4, 4), sketch=(2, 2), total_steps=60)
    with pytest.raises(ValueError, match="states of 0 methods"):
        store(model, INNER.init({"w": X}), INNER, block_shape=(4, 4), rule="static")
    conv = nnx.Conv(4, 4, (1,), rngs=nnx.Rngs(0))
    state = jaxsparse.static(INNER, 0.5).init(nnx.state(conv, nnx.Param))
    with pytest.raises(
        ValueError, match="'kernel' has a mask and is not the kernel of an nnx.Linear"
    ):
        store(conv, state, INNER, block_shape=(1, 1), rule="static")
