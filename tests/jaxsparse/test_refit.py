"""`refit`: stored runs that go on with arrays of another capacity."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxsparse
from jaxsparse.nn import (
    BlockSparseLinear,
    CondensedLinear,
    Trained,
    check_stored,
    full_gradients,
    refit,
)
from pallas_kernels import BlockSparse

X = jax.random.normal(jax.random.key(0), (16, 16))


class Model(nnx.Module):
    def __init__(self, groups):
        rngs = nnx.Rngs(0)
        options = dict(block_shape=(4, 4), density=0.75, balanced=groups > 1)
        self.up = BlockSparseLinear(16, 32, rngs=rngs, **options)
        self.down = CondensedLinear(32, 16, density=0.5, rngs=rngs)

    def __call__(self, x):
        return self.down(nnx.relu(self.up(x)))


def setup(tx, groups=1):
    graph, params, rest = nnx.split(Model(groups), Trained, ...)
    params = nnx.to_pure_dict(params)

    @jax.jit
    def step(params, state):
        loss = lambda p: ((nnx.merge(graph, p, rest)(X) - jnp.sin(X)) ** 2).mean()
        value, g = jax.value_and_grad(loss, allow_int=True)(params)
        updates, state = tx.update(full_gradients(g), state, params)
        return optax.apply_updates(params, updates), state, value

    return step, params, tx.init(params)


def dense(params):
    blocks, single = params["up"], params["down"]
    first = BlockSparse(blocks["values"], blocks["places"], (16, 32), (4, 4)).to_dense()
    return first, jnp.zeros((33, 16)).at[single["rows"], jnp.arange(16)[:, None]].add(
        single["values"]
    )


def check_goes_on_as(step, one, other, steps):
    """Two runs `(params, state)` of different capacity, step by step."""
    for _ in range(steps):
        *one, a = step(*one)
        *other, b = step(*other)
        np.testing.assert_allclose(a, b, atol=1e-5)
    check_stored(other[1])
    for a, b in zip(dense(one[0]), dense(other[0])):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_a_run_that_is_pruned_goes_on_in_less_room_as_it_would_have():
    rule = dict(rule="magnitude", sparsity=0.75, total_steps=24, update_every=2, end_step=16)
    tx = optax.MultiSteps(jaxsparse.stored(optax.adamw(1e-2), **rule), 2).gradient_transformation()
    step, params, state = setup(tx)
    for _ in range(25):  # in the middle of an average over two
        params, state, _ = step(params, state)
    small, state_of, report = refit(params, state)
    assert [(r.path, r.before) for r in report] == [("down/values", 16), ("up/values", 24)]
    assert all(r.after == r.used < r.before for r in report)
    assert "down/values: room for 16, now for" in str(report[0])
    assert small["up"]["values"].shape == (report[1].after, 4, 4)
    size = lambda tree: sum(x.nbytes for x in jax.tree.leaves(tree))
    assert size(optax.tree.get(state_of, "mu")) < 0.7 * size(optax.tree.get(state, "mu"))
    check_goes_on_as(step, (params, state), (small, state_of), 15)


@pytest.mark.slow
@pytest.mark.parametrize("groups", [1, 2])
def test_a_checkpoint_of_less_capacity_has_more_room_and_goes_on(groups):
    options = dict(rule="set", total_steps=30, update_every=2, drop_fraction=lambda _: 0.3)
    step, params, state = setup(
        jaxsparse.stored(optax.adam(1e-2), groups=groups, **options), groups
    )
    for _ in range(3):
        params, state, _ = step(params, state)
    more, state_of, report = refit(params, state, 1.25, groups=groups)
    assert [r.after for r in report] == [20, 30]
    check_goes_on_as(step, (params, state), (more, state_of), 5)


def test_an_nnx_optimizer_goes_on():
    model = Model(1)
    tx = jaxsparse.stored(optax.adam(1e-2), rule="static")
    optimizer = nnx.Optimizer(model, tx, wrt=Trained)
    params, state, _ = refit(nnx.to_pure_dict(nnx.state(model, Trained)), optimizer, 2.0)
    nnx.update(model, params)
    nnx.update(optimizer.opt_state, nnx.state(state))
    loss = lambda model: (model(X) ** 2).mean()
    grads = nnx.grad(loss, argnums=nnx.DiffState(0, Trained), allow_int=True)(model)
    optimizer.update(model, grads)
    assert model.up.values.shape == (48, 4, 4) and model.down.values.shape == (16, 32)


def test_too_little_room_is_refused_with_the_numbers():
    _, params, state = setup(jaxsparse.stored(optax.sgd(0.1), rule="static"))
    with pytest.raises(
        ValueError, match="capacity=8: 'down/values' uses 16 of the 16 .* give 16 or"
    ):
        refit(params, state, 8)
    for capacity in (0, 0.5, True, float("nan")):
        with pytest.raises(ValueError, match=f"capacity={capacity}: give a number from 1"):
            refit(params, state, capacity)
