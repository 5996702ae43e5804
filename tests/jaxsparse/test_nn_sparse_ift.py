"""Sparse-IFT: larger sparse layers at the cost of the dense one."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxsparse
from jaxsparse.analysis import flops
from jaxsparse.nn.sparse_ift import (
    SparseDoped,
    SparseFactorized,
    SparseParallel,
    SparseWide,
    branches,
    doped_rank,
    factorized_rank,
    folded_decay,
    widened,
)

FAMILIES = {
    "wide": SparseWide,
    "parallel": lambda *a, **k: SparseParallel(*a, norm=None, **k),
    "factorized": SparseFactorized,
    "doped": SparseDoped,
}


def test_the_published_example_of_64_channels_and_a_3x3_window():
    assert doped_rank(9 * 64, 64, 0.5) == 28
    assert factorized_rank(9 * 64, 64, 0.5) == 116
    assert factorized_rank(9 * 64, 64, 0.5, sparse="first") == -(-9 * 64 * 64 * 2 // (9 * 64 + 128))
    assert widened(64, 0.75) == 128
    assert [branches(s) for s in (0, 0.5, 0.75, 0.9, 0.99)] == [1, 2, 4, 10, 100]


@pytest.mark.parametrize(
    ("family", "sparsity", "window"),
    itertools.product(FAMILIES, (0.5, 0.75, 0.9), ((), (3, 3))),
)
def test_every_family_costs_what_the_dense_layer_costs(family, sparsity, window):
    layer = nnx.eval_shape(
        lambda: FAMILIES[family](64, 96, sparsity=sparsity, window=window, rngs=nnx.Rngs(0))
    )
    # One unit of rank, or one rounded width, is what rounding may cost.
    fan_in = 64 * (9 if window else 1)
    unit = (fan_in + 96) / (fan_in * 96)
    assert layer.flops_ratio == pytest.approx(1.0, abs=max(unit, 0.02))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_ratio_is_what_counting_the_operations_of_the_network_gives(family):
    side = 4
    make = lambda: FAMILIES[family](8, 12, sparsity=0.75, window=(3, 3), rngs=nnx.Rngs(0))
    layer = nnx.eval_shape(make)
    graphdef, params = nnx.split(layer)
    features = layer.layer.kernel.shape[2] if isinstance(layer, SparseWide) else 8
    x = jax.ShapeDtypeStruct((1, side, side, features), jnp.float32)
    counted = flops.forward_flops(lambda p, x: nnx.merge(graphdef, p)(x), params, x)
    dense = {name: 1.0 for name in counted if family == "doped" and "sparse" not in name}
    density = {name: dense.get(name, 0.25) for name in counted}
    total = flops.sparse_flops(counted, density)
    assert total / (2 * side**2 * 9 * 8 * 12) == pytest.approx(layer.flops_ratio)


def test_one_branch_is_the_dense_block():
    one = SparseParallel(8, 4, sparsity=0.0, norm=None, rngs=nnx.Rngs(0))
    dense = nnx.Linear(8, 4, rngs=nnx.Rngs(0))
    x = jnp.arange(16.0).reshape(2, 8)
    np.testing.assert_array_equal(one(x), dense(x))


def test_branches_are_normalised_one_by_one_and_summed():
    layer = SparseParallel(8, 4, sparsity=0.5, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (64, 8))
    parts = [nnx.BatchNorm(4, rngs=nnx.Rngs(0))(branch(x)) for branch in layer.branches]
    y = layer(x)
    np.testing.assert_allclose(y, parts[0] + parts[1], atol=1e-5)


def test_what_stands_between_the_factors_is_applied():
    linear = SparseFactorized(8, 4, sparsity=0.5, rngs=nnx.Rngs(0))
    bent = SparseFactorized(8, 4, sparsity=0.5, between=nnx.relu, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (5, 8))
    np.testing.assert_allclose(bent(x), linear.up(nnx.relu(linear.down(x))), atol=1e-6)
    np.testing.assert_allclose(linear(x), linear.up(linear.down(x)), atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_strided_convolution_has_the_outputs_of_the_dense_one(family):
    make = lambda: FAMILIES[family](4, 8, sparsity=0.75, window=(3, 3), strides=2, rngs=nnx.Rngs(0))
    features = 8 if family == "wide" else 4
    expected = 16 if family == "wide" else 8
    y = nnx.eval_shape(lambda: make()(jnp.ones((2, 6, 6, features))))
    assert y.shape == (2, 3, 3, expected)


def test_rigl_makes_the_doped_layer_sparse_where_it_should_be():
    layer = SparseDoped(16, 16, sparsity=0.75, rngs=nnx.Rngs(0))
    params = nnx.to_pure_dict(nnx.state(layer, nnx.Param))
    tx = jaxsparse.rigl(
        optax.sgd(0.1),
        0.75,
        total_steps=1000,
        allocation="uniform",
        targets=[("(down|up)/kernel", False)],
    )
    masks = jaxsparse.get_masks(tx.init(params))
    assert masks["down"]["kernel"] is None and masks["up"]["kernel"] is None
    assert int(masks["sparse"]["kernel"].sum()) == 64


@pytest.mark.slow
def test_decay_of_the_folded_product_is_that_of_the_matrix_it_stands_for():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.linear = SparseFactorized(12, 8, sparsity=0.5, rngs=rngs)
            self.conv = SparseDoped(8, 8, sparsity=0.75, window=(3, 3), rngs=rngs)
            self.bent = SparseFactorized(8, 8, sparsity=0.5, between=nnx.relu, rngs=rngs)

    net = Net(nnx.Rngs(0))
    fold = lambda layer: jnp.tensordot(layer.down.kernel[...], jnp.squeeze(layer.up.kernel[...]), 1)
    want = 0.5 * sum(jnp.sum(fold(layer) ** 2) for layer in (net.linear, net.conv))
    np.testing.assert_allclose(folded_decay(net), want, rtol=1e-5)
    grads = nnx.grad(folded_decay)(net)
    matrix = fold(net.linear)
    np.testing.assert_allclose(
        grads["linear"]["down"]["kernel"][...], matrix @ net.linear.up.kernel[...].T, rtol=1e-4
    )
    assert not np.any(grads["bent"]["down"]["kernel"][...])


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"sparsity=1.0: must be in \[0, 1\)"):
        widened(64, 1.0)
    with pytest.raises(ValueError, match="sparse='second'"):
        factorized_rank(8, 8, 0.5, sparse="second")
    with pytest.raises(ValueError, match="pays for no rank"):
        SparseDoped(4, 4, sparsity=0.1, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="in_features=0"):
        SparseWide(0, 4, sparsity=0.5, rngs=nnx.Rngs(0))
