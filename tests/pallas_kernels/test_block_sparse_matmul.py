"""block_sparse_matmul: every implementation against the dense product, forward and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bases import INTERPRETED
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import BlockSparse, block_sparse_matmul
from pallas_kernels.block_sparse_matmul import tpu, xla

PATTERNS = [
    "random",
    "none",
    "one",
    "all",
    "empty rows",
    "empty columns",
    "full row",
    "full column",
]


def block_mask(pattern, grid, seed=0):
    mask = np.random.default_rng(seed).random(grid) < 0.4
    match pattern:
        case "none":
            mask[:] = False
        case "one":
            mask[:] = False
            mask[-1, 0] = True
        case "all":
            mask[:] = True
        case "empty rows":
            mask[::2] = False
        case "empty columns":
            mask[:, ::2] = False
        case "full row":
            mask[0] = True
        case "full column":
            mask[:, -1] = True
    return mask


def problem(rows, shape, block_shape, pattern, dtype, capacity=None, seed=0):
    """x, w, and a cotangent dy, reproducible; small integers over 8, exact in bfloat16."""
    rng = np.random.default_rng(seed)
    grid = -(-shape[0] // block_shape[0]), -(-shape[1] // block_shape[1])
    mask = block_mask(pattern, grid, seed)
    draw = lambda *s: jnp.asarray(rng.integers(-8, 9, s) / 8, dtype)
    w = BlockSparse.from_block_mask(draw(*shape), mask, block_shape, num_blocks=capacity, pad=True)
    return draw(*rows, shape[0]), w, draw(*rows, shape[1])


@functools.partial(jax.jit, static_argnames=("implementation", "interpret", "settings"))
def forward_and_gradients(x, w, dy, implementation, interpret, settings):
    """One function for all tests, so that equal shapes are compiled once. `settings`: what a test
    has patched in the modules, as the compiled code depends on it."""

    def loss(x, values):
        w_here = w.with_values(values)
        y = block_sparse_matmul(x, w_here, implementation=implementation, interpret=interpret)
        return (y.astype(jnp.float32) * dy.astype(jnp.float32)).sum(), y

    (dx, dw), y = jax.grad(loss, (0, 1), has_aux=True)(x, w.values)
    return y, dx, dw


def check(x, w, dy, implementation, settings=None):
    """Forward and both gradients against the dense product in float32."""
    interpret = INTERPRETED.get(implementation, False)
    y, dx, dw = forward_and_gradients(x, w, dy, implementation, interpret, settings)
    xf, dyf, wf = (np.asarray(a, np.float32) for a in (x, dy, w.to_dense()))
    coarse = {jnp.bfloat16: 2e-2, jnp.float16: 2e-3}.get(x.dtype.type, 2e-5)
    same = lambda a, b: np.testing.assert_allclose(
        np.asarray(a, np.float32), b, rtol=coarse, atol=coarse * max(1.0, np.abs(b).max())
    )
    same(y, xf @ wf)
    same(dx, dyf @ wf.T)
    full = np.tensordot(xf, dyf, (range(xf.ndim - 1), range(xf.ndim - 1)))
    stored = np.kron(w.block_mask, np.ones(w.block_shape))[: w.shape[0], : w.shape[1]]
    same(w.with_values(dw).to_dense(), full * stored)
    assert dx.dtype == x.dtype and dw.dtype == w.dtype
    assert not np.any(np.asarray(dw, np.float32)[~np.asarray(w.used)])


# Few shapes, one capacity, many patterns: examples of one shape share their compiled code.
@given(
    shapes=st.sampled_from(
        [((2, 17), (45, 31), (8, 16)), ((1,), (29, 40), (8, 8)), ((), (45, 31), (8, 16))]
    ),
    pattern=st.sampled_from(PATTERNS),
    dtype=st.sampled_from([jnp.float32, jnp.bfloat16]),
    implementation=st.sampled_from(["xla", "reference"]),
    seed=st.integers(0, 3),
)
def test_xla_and_reference_agree_with_dense(shapes, pattern, dtype, implementation, seed):
    x, w, dy = problem(*shapes, pattern, dtype, capacity=22, seed=seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(xla, "_DENSE_FROM", float("inf"))
        rows = int(np.prod(shapes[0]))
        patch.setattr(xla, "_CACHE", 4 * rows * sum(w.block_shape) * 4)  # four blocks at a time
        check(x, w, dy, implementation, "four blocks at a time")


@pytest.mark.parametrize("pattern", ["none", "all"])
def test_no_blocks_and_dense_ones_are_products_too(pattern):
    check(*problem((5,), (16, 24), (8, 8), pattern, jnp.float32), "xla")


# The kernels in the interpreter. Panels, slices and flushes are made small, so that small matrices
# have several of each; the patterns cover columns and groups of columns without blocks.
@given(
    rows=st.sampled_from([1, 40, 50]),
    grid=st.sampled_from([(1, 1), (3, 5), (2, 4)]),
    block_shape=st.sampled_from([(128, 128), (128, 256), (256, 128)]),
    pattern=st.sampled_from(PATTERNS[2:]),
    dtype=st.sampled_from([jnp.float32, jnp.bfloat16]),
    spare=st.sampled_from([0, 1]),
    panel=st.sampled_from([16, 32]),
    flush=st.sampled_from([128, 256]),
)
@settings(max_examples=10)
@pytest.mark.slow
def test_tpu_kernels_agree_with_dense(rows, grid, block_shape, pattern, dtype, spare, panel, flush):
    shape = grid[0] * block_shape[0] - 5, grid[1] * block_shape[1] - 9
    capacity = grid[0] * grid[1] + spare
    x, w, dy = problem((rows,), shape, block_shape, pattern, dtype, capacity)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tpu, "_PANEL", panel)
        patch.setattr(tpu, "_TOKENS", panel)
        patch.setattr(tpu, "_FLUSH", flush)
        patch.setattr(tpu, "_CHUNK", (8, 10))
        patch.setattr(tpu, "_PART", 4)
        check(x, w, dy, "tpu", (panel, flush))


def test_tpu_kernels_write_columns_without_blocks():
    mask = np.zeros((2, 9), bool)
    mask[0, 1], mask[:, 6] = True, True  # whole groups of columns are empty, first and last too
    w = BlockSparse.from_block_mask(jnp.ones((256, 9 * 128)), mask)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tpu, "_FLUSH", 384)
        patch.setattr(tpu, "_PANEL", 8)
        patch.setattr(tpu, "_PART", 2)
        y = block_sparse_matmul(jnp.ones((24, 256)), w, implementation="tpu", interpret=True)
    np.testing.assert_array_equal(y, np.ones((24, 256)) @ np.kron(mask, np.ones((128, 128))))


def test_tpu_weight_gradient_in_several_lots(monkeypatch):
    monkeypatch.setattr(tpu, "chip", lambda: tpu.Chip(cores=2, vmem=6 << 20))
    monkeypatch.setattr(tpu, "_TOKENS", 16)
    x, w, dy = problem((40,), (384, 384), (128, 128), "all", jnp.bfloat16)
    values = tpu.weight_gradient(x, dy, w, interpret=True)
    full = np.asarray(x, np.float32).T @ np.asarray(dy, np.float32)
    np.testing.assert_allclose(
        w.with_values(values).to_dense().astype("f"), full, rtol=2e-2, atol=0.3
    )


def test_tpu_panels_are_shared_by_the_cores(monkeypatch):
    monkeypatch.setattr(tpu, "chip", lambda: tpu.Chip(cores=2))
    monkeypatch.setattr(tpu, "_PANEL", 16)
    x, w, _ = problem((70,), (256, 384), (128, 128), "random", jnp.float32)
    y = tpu.matmul(x, w, interpret=True)
    np.testing.assert_allclose(y, x @ w.to_dense(), rtol=1e-5, atol=1e-5)


KERNELS = [pytest.param(name, marks=pytest.mark.slow) for name in INTERPRETED]


@functools.partial(jax.jit, static_argnums=(2, 3))
def product(x, w, implementation, out_dtype=None):
    interpret = INTERPRETED.get(implementation, False)
    return block_sparse_matmul(
        x, w, implementation=implementation, interpret=interpret, out_dtype=out_dtype
    )


@pytest.mark.parametrize(
    "implementation", ["reference", "xla", "tpu", pytest.param("gpu", marks=pytest.mark.slow)]
)
def test_nan_in_a_row_of_x_stays_in_that_row(implementation):
    x, w, _ = problem((20,), (256, 768), (128, 128), "empty columns", jnp.float32, capacity=6)
    y, clean = (product(a, w, implementation) for a in (x.at[3].set(jnp.nan), x))
    rows = np.arange(20) != 3
    np.testing.assert_array_equal(y[rows], clean[rows])
    if implementation != "reference":  # and does not touch columns without blocks
        np.testing.assert_array_equal(y[:, :128], 0)


@pytest.mark.parametrize(
    "implementation", ["reference", "xla", "tpu", pytest.param("gpu", marks=pytest.mark.slow)]
)
def test_bfloat16_is_summed_in_float32(implementation):
    x = jnp.ones((16, 512), jnp.bfloat16)
    dense = jnp.full((512, 512), 1 / 256, jnp.bfloat16).at[:, 128:].set(0).at[0, 0].set(256)
    w = BlockSparse.from_dense(dense, (128, 128))
    y = product(x, w, implementation, jnp.float32)
    assert y.dtype == jnp.float32
    np.testing.assert_array_equal(y[:, 0], 256 + 511 / 256)  # in bfloat16 256 would stay 256


@pytest.mark.parametrize("implementation", ["xla", *KERNELS])
def test_vmap_over_x_and_over_w(implementation):
    x, w, _ = problem((3, 16), (256, 256), (128, 128), "random", jnp.float32)
    f = lambda x, w: product(x, w, implementation)
    stack = jax.tree.map(lambda a: jnp.stack([a, a]), w)
    expected = np.asarray(x @ w.to_dense())
    np.testing.assert_allclose(jax.vmap(f, (0, None))(x, w), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(jax.vmap(f)(x[:2], stack), expected[:2], rtol=1e-5, atol=1e-5)
    of_values = lambda x, values: f(x, w.with_values(values)).sum()
    per_example = jax.vmap(jax.grad(of_values, 1), (0, None))(x, w.values)
    assert per_example.shape == (3, *w.values.shape)
    one = jax.grad(of_values, 1)(x[1], w.values)
    np.testing.assert_allclose(per_example[1], one, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("axis", ["columns", "rows"])
@pytest.mark.parametrize("implementation", ["reference", "xla", *KERNELS])
def test_shard_map_over_split_weights_gives_the_whole_product_and_gradients(axis, implementation):
    mesh = jax.make_mesh((2,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    P = jax.sharding.PartitionSpec
    x, w, dy = problem((16,), (256, 256), (128, 128), "one", jnp.float32)
    parts = w.split(2, axis)

    def local(x, part):
        part = jax.tree.map(lambda a: a[0], part)
        y = product(x, part, implementation)
        return y if axis == "columns" else jax.lax.psum(y, "model")

    x_spec, y_spec = (P(), P(None, "model")) if axis == "columns" else (P(None, "model"), P())
    run = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(x_spec, P("model")),
        out_specs=y_spec,
        check_vma=implementation
        not in INTERPRETED,  # the interpreter does not know it; the compiler does
    )
    y, pull = jax.vjp(jax.jit(run), x, parts)
    dx, dparts = pull(dy)
    dense = w.to_dense()
    np.testing.assert_allclose(y, x @ dense, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dx, dy @ dense.T, rtol=1e-5, atol=1e-5)
    full = np.asarray(x.T @ dy).reshape(2, 128, 2, 128)[1, :, 0]  # of the one block there is
    filled = np.asarray(dparts.values)[np.asarray(parts.used)]
    np.testing.assert_allclose(filled[0], full, rtol=1e-5, atol=1e-4)


def test_mixed_dtypes_are_promoted():
    x, w, _ = problem((4,), (8, 8), (2, 2), "random", jnp.bfloat16)
    assert block_sparse_matmul(x.astype(jnp.float32), w).dtype == jnp.float32
    loss = lambda values: block_sparse_matmul(x.astype("f"), w.with_values(values)).sum()
    assert jax.grad(loss)(w.values).dtype == jnp.bfloat16


SMALL = BlockSparse.from_dense(jnp.eye(6), (2, 3))
INTEGERS = BlockSparse.from_dense(jnp.eye(6, dtype=jnp.int32), (2, 3))
LARGE = BlockSparse.from_dense(jnp.eye(256), (128, 128))
REFUSED = [
    (lambda: block_sparse_matmul(jnp.ones((2, 5)), SMALL), r"x.shape=\(2, 5\) must end in 6"),
    (lambda: block_sparse_matmul(jnp.ones((2, 6)), jnp.eye(6)), "w must be a BlockSparse"),
    (lambda: block_sparse_matmul(jnp.ones((2, 6), int), SMALL), "x.dtype=int32 must be"),
    (lambda: block_sparse_matmul(jnp.ones((2, 6)), INTEGERS), "w.dtype=int32 must be"),
    (
        lambda: block_sparse_matmul(jnp.ones((2, 6)), SMALL, implementation="cuda"),
        "implementation='cuda' is unknown",
    ),
    (
        lambda: block_sparse_matmul(jnp.ones((2, 256)), LARGE, implementation="tpu"),
        "runs on TPU, not on cpu",
    ),
    (
        lambda: block_sparse_matmul(jnp.ones((2, 6)), SMALL, implementation="tpu", interpret=True),
        r"multiples of 128, not \(2, 3\)",
    ),
    (
        lambda: block_sparse_matmul(
            jnp.ones((2, 256), jnp.float16),
            LARGE.astype(jnp.float16),
            implementation="tpu",
            interpret=True,
        ),
        "bfloat16 and float32, not float16",
    ),
    (
        lambda: block_sparse_matmul(jnp.ones((2, 256)), LARGE, implementation="gpu"),
        "runs on GPU, not on cpu",
    ),
    (
        lambda: block_sparse_matmul(jnp.ones((2, 6)), SMALL, implementation="gpu", interpret=True),
        r"multiples of 16, not \(2, 3\)",
    ),
    (
        lambda: block_sparse_matmul(
            jnp.ones((2, 256)), LARGE, implementation="xla", interpret=True
        ),
        "interpret=True is about the Pallas",
    ),
]


@pytest.mark.parametrize("call, message", REFUSED, ids=[m[:40] for _, m in REFUSED])
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
