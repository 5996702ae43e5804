"""BlockSparseLinear, NMLinear, CondensedLinear: the dense layer they stand for, training, saving, Linen."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from flax.nnx import bridge
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxsparse.nn import BlockSparseLinear, BlockSparsePointwise, CondensedLinear, NMLinear
from jaxsparse.nn._linear import Pattern

BLOCKS = np.kron(np.random.default_rng(0).random((4, 3)) < 0.5, np.ones((16, 16))) > 0
FEW = np.random.default_rng(1).random((64, 48)) < 0.1
TWO_OF_FOUR = np.tile(np.array([1, 0, 0, 1], bool), 16)[:, None] & np.ones((64, 48), bool)


def layers(**kwargs):
    dense = nnx.Linear(64, 48, rngs=nnx.Rngs(1), **kwargs)
    if dense.bias is not None:
        dense.bias[...] = jnp.arange(48.0)
    yield dense, BLOCKS, BlockSparseLinear.from_dense(dense, BLOCKS, block_shape=(16, 16))
    yield dense, TWO_OF_FOUR, NMLinear.from_dense(dense, TWO_OF_FOUR, n=2, m=4, share=16)
    yield dense, FEW, CondensedLinear.from_dense(dense, FEW)


@pytest.mark.parametrize("use_bias", [True, False])
def test_from_dense_computes_what_the_masked_layer_does(use_bias):
    x = jax.random.normal(jax.random.key(0), (2, 5, 64))
    for dense, mask, layer in layers(use_bias=use_bias):
        bias = 0 if dense.bias is None else dense.bias[...]
        expected = x @ (dense.kernel[...] * mask) + bias
        np.testing.assert_allclose(layer(x), expected, rtol=1e-5, atol=1e-5)


def test_dtype_is_that_of_the_computation():
    for _, _, layer in layers(dtype=jnp.bfloat16):
        assert layer(jnp.ones((2, 64))).dtype == jnp.bfloat16
        assert layer.values[...].dtype == jnp.float32


def test_training_moves_values_and_bias_and_leaves_the_pattern():
    x = jax.random.normal(jax.random.key(0), (32, 64))
    target = jax.random.normal(jax.random.key(1), (32, 48)) + jnp.arange(48)
    for _, _, layer in layers():
        fixed = nnx.state(nnx.clone(layer), Pattern)
        optimizer = nnx.Optimizer(layer, optax.adamw(1e-2), wrt=nnx.Param)

        @nnx.jit
        def step(layer, optimizer):
            loss = lambda layer: ((layer(x) - target) ** 2).mean()
            value, grads = nnx.value_and_grad(loss)(layer)
            optimizer.update(layer, grads)
            return value

        losses = [float(step(layer, optimizer)) for _ in range(20)]
        assert losses[-1] < 0.9 * losses[0]
        jax.tree.map(np.testing.assert_array_equal, nnx.state(layer, Pattern), fixed)


def test_a_new_pattern_keeps_shared_blocks():
    layer = next(layers())[2]
    before = layer.weight
    layer.set_weight(before.with_pattern(np.roll(before.block_mask, 1, 0)))
    np.testing.assert_array_equal(layer.weight.block_mask, np.roll(before.block_mask, 1, 0))
    with pytest.raises(ValueError, match=r"they must stay \(64, 48\), \(16, 16\)"):
        layer.set_weight(before.T)


def test_averaging_layers_needs_one_pattern_and_takes_the_parameters():
    _, _, layer = next(layers())
    other = nnx.clone(layer)
    other.set_weight(layer.weight.with_pattern(np.roll(layer.weight.block_mask, 1, 0)))
    whole = [nnx.state(x) for x in (layer, other)]
    mixed = nnx.merge(nnx.graphdef(layer), jax.tree.map(lambda a, b: (a + b) / 2, *whole))
    with pytest.raises(ValueError, match="places.dtype=float32 must be an integer type"):
        mixed(jnp.ones((1, 64)))
    params = nnx.state(layer, nnx.Param)
    nnx.update(layer, jax.tree.map(lambda a: 3 * a / 2, params))
    assert layer(jnp.ones((1, 64))).shape == (1, 48)


def test_rows_are_split_by_the_layer_or_around_it():
    make = lambda **o: BlockSparseLinear(
        8, 8, block_shape=(4, 4), density=0.5, rngs=nnx.Rngs(0), **o
    )
    mesh = Mesh(np.asarray(jax.devices()[:1]), ("data",))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    assert make(rows=rows)(jnp.ones((2, 8))).shape == (2, 8)
    with pytest.raises(ValueError, match="axis_name='data' are given: with rows the layer calls"):
        make(rows=rows, axis_name="data")
    for wrong in (
        PartitionSpec("data"), NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec(None, "data")),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="must be a NamedSharding whose first entry names mesh axes"):  # fmt: skip
            make(rows=wrong)


def test_a_layer_is_made_of_a_weight_or_of_a_density():
    w = next(layers())[2].weight
    layer = BlockSparseLinear(64, 48, block_shape=(16, 16), weight=w)
    np.testing.assert_array_equal(layer.weight.to_dense(), w.to_dense())
    with pytest.raises(ValueError, match="density=0.5 and a weight are given"):
        BlockSparseLinear(64, 48, block_shape=(16, 16), weight=w, density=0.5)
    with pytest.raises(ValueError, match="density=None or rngs=None: give both, or a weight"):
        BlockSparseLinear(64, 48, block_shape=(16, 16), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"weight has shape=\(64, 48\)"):
        BlockSparseLinear(64, 32, block_shape=(16, 16), weight=w)
    with pytest.raises(ValueError, match="rngs=None: give a key, or a weight"):
        NMLinear(8, 8, n=2, m=4)
    with pytest.raises(ValueError, match=r"weight has \(shape, n, m, share\)"):
        NMLinear(8, 8, n=1, m=4, weight=NMLinear(8, 8, n=2, m=4, rngs=nnx.Rngs(0)).weight)


@pytest.mark.parametrize(
    "layer, options",
    [
        (BlockSparseLinear, dict(block_shape=(16, 16), density=0.5)),
        (NMLinear, dict(n=2, m=4, share=16)),
    ],
)
def test_linen_can_use_them(layer, options):
    linen = bridge.to_linen(layer, 64, 32, use_bias=False, **options)
    variables = linen.init(jax.random.key(0), jnp.ones((1, 64)))
    y, grads = jax.value_and_grad(
        lambda p: linen.apply({**variables, "params": p}, jnp.ones((1, 64))).sum()
    )(variables["params"])
    assert np.isfinite(y) and jax.tree.leaves(grads)[0].size == 64 * 32 // 2


def test_precision_of_the_dense_layer_is_kept():
    for dense, _, layer in layers(precision="highest"):
        assert layer.precision == dense.precision


def test_orbax_restores_a_layer_with_its_pattern(tmp_path):
    x = jax.random.normal(jax.random.key(0), (3, 64))
    for _, _, layer in layers():
        graph, state = nnx.split(layer)
        path = tmp_path / type(layer).__name__
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(path, state)
            checkpointer.wait_until_finished()
            back = checkpointer.restore(path, jax.tree.map(jnp.zeros_like, state))
        np.testing.assert_array_equal(nnx.merge(graph, back)(x), layer(x))


def test_stacked_kernels_are_refused():
    make = nnx.vmap(lambda rngs: nnx.Linear(8, 8, rngs=rngs), in_axes=0, out_axes=0)
    with pytest.raises(ValueError, match=r"linear.kernel.shape=\(3, 8, 8\) must be \[in, out\]"):
        CondensedLinear.from_dense(make(nnx.Rngs(0).fork(split=3)))


def test_bad_input_is_refused():
    dense = nnx.Linear(64, 48, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="linear must be a flax.nnx.Linear, not Dropout"):
        BlockSparseLinear.from_dense(nnx.Dropout(0.1), block_shape=(16, 16))
    with pytest.raises(ValueError, match=r"mask.shape=\(3, 3\) must be that of the kernel"):
        BlockSparseLinear.from_dense(dense, np.ones((3, 3)), block_shape=(16, 16))
    with pytest.raises(ValueError, match="mask keeps 4 of a group of m=4 rows"):
        NMLinear.from_dense(dense, np.ones((64, 48)), n=2, m=4)


@pytest.mark.parametrize("strides", [(1, 1), (2, 3)])
def test_a_pointwise_layer_is_the_1x1_convolution(strides):
    options = dict(block_shape=(4, 4), density=0.5, rngs=nnx.Rngs(0))
    layer = BlockSparsePointwise(8, 12, strides=strides, **options)
    conv = nnx.Conv(8, 12, (1, 1), strides=strides, rngs=nnx.Rngs(1))
    conv.kernel[...] = layer.weight.to_dense()[None, None]
    x = jax.random.normal(jax.random.key(0), (2, 7, 6, 8))
    np.testing.assert_allclose(layer(x), conv(x), atol=1e-5)
