"""compact: what it replaces, what it leaves and why, and that the network stays the same."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxsparse
from jaxsparse.nn import BlockSparseLinear, CondensedLinear, NMLinear, compact
from jaxsparse.nn.compact import _sparse_layer
from jaxsparse.structures import NM, Block, FanIn

WHY_NOT = "2:4, but 32 outputs alike, which is not faster on cpu"


class MLP(nnx.Module):
    """64 -> 64 -> 64 -> 32."""

    def __init__(self, rngs):
        self.first = nnx.Linear(64, 64, rngs=rngs)
        self.hidden = nnx.List([nnx.Linear(64, 64, rngs=rngs)])
        self.norm = nnx.LayerNorm(64, rngs=rngs)
        self.out = nnx.Linear(64, 32, rngs=rngs)

    def __call__(self, x):
        x = jax.nn.relu(self.first(x))
        return self.out(jax.nn.relu(self.norm(self.hidden[0](x))))


def trained(tx, steps=30):
    """The model after some steps on a fixed regression problem, and its optimizer."""
    model = MLP(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    x = jax.random.normal(jax.random.key(0), (128, 64))
    y = jnp.tanh(x[:, :32] - x[:, 32:])

    @nnx.jit
    def step(model, optimizer):
        loss, grads = nnx.value_and_grad(lambda m: ((m(x) - y) ** 2).mean())(model)
        optimizer.update(model, grads)
        return loss

    losses = [float(step(model, optimizer)) for _ in range(steps)]
    return model, optimizer, x, losses


def test_a_block_rigl_run_trains_compacts_and_serves_the_same_outputs():
    tx = jaxsparse.rigl(
        optax.adam(3e-3),
        sparsity=0.75,
        total_steps=40,
        update_every=10,
        structure=Block(16, 16),
    )
    model, optimizer, x, losses = trained(tx, 40)
    assert losses[-1] < 0.7 * losses[0]
    sparse, report = compact(model, optimizer)
    np.testing.assert_allclose(sparse(x), model(x), rtol=1e-4, atol=1e-5)
    replaced = {r.path: r for r in report if r.replaced}
    assert set(replaced) >= {"first", "hidden.0"}
    assert all("16 x 16" in r.why for r in replaced.values())
    assert isinstance(sparse.hidden[0], BlockSparseLinear)
    assert isinstance(model.hidden[0], nnx.Linear)  # the model itself is untouched
    stored = sparse.first.values[...].size
    assert stored == int((np.asarray(model.first.kernel[...]) != 0).sum())


def test_the_compacted_network_can_be_trained_on():
    tx = jaxsparse.static(optax.sgd(0.1), sparsity=0.75, structure=Block(16, 16))
    model, optimizer, x, _ = trained(tx, 2)
    sparse, _ = compact(model, optimizer.opt_state)
    grads = nnx.grad(lambda m: (m(x) ** 2).sum())(sparse)
    dense = nnx.grad(lambda m: (m(x) ** 2).sum())(model)
    w = sparse.first.weight
    np.testing.assert_allclose(
        w.with_values(grads["first"]["values"][...]).to_dense(),
        dense["first"]["kernel"][...] * np.kron(w.block_mask, np.ones((16, 16))),
        rtol=1e-3,
        atol=1e-3,
    )


def test_two_of_four_becomes_nm_on_tpu_and_stays_dense_on_cpu():
    tx = jaxsparse.static(optax.sgd(0.1), structure=NM(2, 4))
    model, optimizer, x, _ = trained(tx, 2)
    left, report = compact(model, optimizer, platform="cpu")
    assert not any(r.replaced for r in report)
    assert "not faster on cpu" in report[0].why
    np.testing.assert_array_equal(left(x), model(x))
    sparse, report = compact(model, optimizer, platform="tpu")
    assert isinstance(sparse.first, NMLinear)
    np.testing.assert_allclose(sparse(x), model(x), rtol=1e-4, atol=1e-5)


def test_unstructured_masks_are_left_on_tpu_and_the_report_says_why():
    tx = jaxsparse.static(optax.sgd(0.1), sparsity=0.9)
    model, optimizer, x, _ = trained(tx, 2)
    sparse, report = compact(model, optimizer, platform="tpu")
    masked = [r for r in report if r.density < 1]
    assert masked and not any(r.replaced for r in report)
    assert all("no structure that pays" in r.why for r in masked)
    assert str(masked[0]).startswith("first: left as Linear (its mask has no structure that pays;")


@pytest.mark.parametrize("n, replaced", [(1, True), (2, False)])
def test_patterns_that_outputs_share_pay_on_cpu_from_one_in_four(n, replaced):
    model = nnx.Linear(64, 64, rngs=nnx.Rngs(0))
    mask = np.tile(np.arange(64)[:, None] % 4 < n, (1, 64))
    mask[:, 32:] = np.roll(mask[:, 32:], 1, 0)
    layer, why = _sparse_layer(model, mask, [], "cpu")
    assert isinstance(layer, NMLinear) == replaced
    assert why == ("1:4 shared by 32 outputs" if replaced else WHY_NOT)


def test_few_inputs_of_every_output_are_condensed_on_cpu():
    tx = jaxsparse.static(optax.sgd(0.1), sparsity=0.9, structure=FanIn(), allocation="uniform")
    model, optimizer, x, _ = trained(tx, 2)
    sparse, report = compact(model, optimizer, platform="cpu")
    assert isinstance(sparse.first, CondensedLinear)
    assert sparse.first.values[...].shape == (64, 6)
    assert report[0].why == "at most 6 inputs of an output"
    np.testing.assert_allclose(sparse(x), model(x), rtol=1e-4, atol=1e-5)


def test_the_model_itself_may_be_the_layer():
    model = nnx.Linear(64, 64, rngs=nnx.Rngs(0))
    tx = jaxsparse.static(optax.sgd(0.1), sparsity=0.75, structure=Block(16, 16))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    optimizer.update(model, nnx.grad(lambda m: m(jnp.ones((1, 64))).sum())(model))
    sparse, _ = compact(model, optimizer)
    assert isinstance(sparse, BlockSparseLinear)
    np.testing.assert_allclose(sparse(jnp.eye(64)), model(jnp.eye(64)), rtol=1e-5, atol=1e-6)


class Stack(nnx.Module):
    """Three layers in one kernel [3, 32, 32], and a layer of another class."""

    def __init__(self, rngs):
        make = nnx.vmap(lambda rngs: nnx.Linear(32, 32, rngs=rngs), in_axes=0, out_axes=0)
        self.layers = make(rngs.fork(split=3))
        self.conv = nnx.Conv(4, 4, (3,), rngs=rngs)


def test_layers_without_a_sparse_counterpart_are_named_and_left():
    model = Stack(nnx.Rngs(0))
    tx = jaxsparse.static(optax.sgd(0.1), sparsity=0.5)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    _, report = compact(model, optimizer)
    why = {r.path: r.why for r in report}
    assert why["layers"] == "a kernel of shape (3, 32, 32) has no sparse counterpart"
    assert why["conv"] == "a kernel of shape (3, 4, 4) has no sparse counterpart"


def test_bad_input_is_refused():
    model = MLP(nnx.Rngs(0))
    with pytest.raises(ValueError, match="model must be a flax.nnx.Module, not dict"):
        compact({}, None)
    with pytest.raises(ValueError, match="no state of a jaxsparse method"):
        compact(model, optax.sgd(0.1).init(nnx.state(model, nnx.Param)))
