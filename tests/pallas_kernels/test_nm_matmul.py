"""NMSparse and nm_matmul: what is kept, how it is packed, and the products."""

import functools
import itertools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pallas_kernels import NMSparse, nm_matmul
from pallas_kernels.nm_matmul import xla
from pallas_kernels.nm_matmul.format import code_bits

# n, m, share; rows of x; dtype. Examples of one of them share their compiled code.
CASES = [
    ((2, 4, 1), (2, 2), jnp.float32),
    ((3, 3, 1), (3,), jnp.bfloat16),
    ((2, 4, 32), (2, 2), jnp.float32),
    ((4, 8, 32), (3,), jnp.bfloat16),
]


def dense(rows, cols, dtype=jnp.float32, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(-16, 17, (rows, cols)) / 8, dtype)


@pytest.mark.parametrize("n, m", [(1, 2), (2, 4), (2, 5)])
def test_every_pattern_of_a_group_survives_packing(n, m):
    patterns = [p for k in range(n + 1) for p in itertools.combinations(range(m), k)]
    mask = np.zeros((m, len(patterns)), bool)
    for column, pattern in enumerate(patterns):
        mask[list(pattern), column] = True
    w = NMSparse.from_mask(jnp.where(mask, dense(*mask.shape) + 3.5, 0.0), mask, n, m)
    np.testing.assert_array_equal(w.to_dense() != 0, mask)


def test_from_dense_is_the_nearest_matrix_of_its_kind():
    a = np.asarray(dense(4, 50, seed=3))
    kept = np.asarray(NMSparse.from_dense(a, 2, 4).to_dense())
    errors = [
        ((a * np.isin(np.arange(4), p)[:, None] - a) ** 2).sum(0)
        for p in itertools.combinations(range(4), 2)
    ]
    np.testing.assert_allclose(((kept - a) ** 2).sum(0), np.min(errors, 0))


def test_ties_keep_the_first_of_a_group():
    w = NMSparse.from_dense(jnp.ones((8, 3)), 2, 4)
    np.testing.assert_array_equal(w.to_dense()[:, 0], [1, 1, 0, 0, 1, 1, 0, 0])


def test_shared_outputs_have_one_pattern():
    w = NMSparse.from_dense(dense(16, 64), 1, 4, share=32)
    nonzero = np.asarray(w.to_dense()).reshape(16, 2, 32) != 0
    assert w.places.shape == (1, 4, 2)
    for s in range(2):
        assert all((nonzero[4 * g : 4 * g + 4, s].any(1)).sum() <= 1 for g in range(4))


def test_bytes_of_two_in_four_are_nine_sixteenths_of_dense():
    w = NMSparse.from_dense(dense(4096, 256, jnp.bfloat16), 2, 4)
    assert (w.values.nbytes + w.codes.nbytes) / (4096 * 256 * 2) == 0.5625
    assert code_bits(4) == 2 and code_bits(16) == 4 and code_bits(17) == 8


@functools.partial(jax.jit, static_argnums=3)
def forward_and_gradients(x, w, dy, implementation):
    """One function for all examples: equal shapes are compiled once."""
    f = lambda x, v: nm_matmul(x, w.with_values(v), implementation=implementation)
    y, pull = jax.vjp(f, x, w.values)
    return y, *pull(dy)


@given(
    case=st.sampled_from(CASES),
    implementation=st.sampled_from(["xla", "reference"]),
    seed=st.integers(0, 9),
)
def test_products_and_gradients_agree_with_dense(case, implementation, seed):
    (n, m, share), rows, dtype = case
    w = NMSparse.from_dense(dense(4 * m, 64, dtype, seed), n, m, share=share)
    x, dy = (
        dense(int(np.prod(rows)), width, dtype, seed + 1).reshape(*rows, width)
        for width in (4 * m, 64)
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(xla, "_TOKENS", 2)  # several tiles of tokens, the last one ragged
        y, dx, dv = forward_and_gradients(x, w, dy, implementation)
    xf, dyf, wf = (np.asarray(a, np.float32) for a in (x, dy, w.to_dense()))
    tol = dict(rtol=2e-2, atol=0.1) if dtype == jnp.bfloat16 else dict(rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(np.asarray(y, "f"), xf @ wf, **tol)
    np.testing.assert_allclose(np.asarray(dx, "f"), dyf @ wf.T, **tol)
    full = np.tensordot(xf, dyf, (range(len(rows)), range(len(rows))))
    kept = np.asarray(w.with_values(jnp.ones_like(w.values)).to_dense(), bool)
    placed = np.asarray(w.with_values(dv).to_dense(), "f")
    np.testing.assert_allclose(placed, full * kept, **tol)
    assert dx.dtype == x.dtype and dv.dtype == w.dtype


@pytest.mark.parametrize("n, m", [(2, 4), (4, 8), (1, 2)])
def test_tpu_kernel_agrees_with_dense(n, m):
    rows = 20 if n == 2 else 1
    shape = (8 * 32 // code_bits(m)) * m, 384
    w = NMSparse.from_dense(dense(*shape, jnp.bfloat16), n, m)
    x = dense(rows, shape[0], jnp.bfloat16, 1)
    y = nm_matmul(x, w, implementation="tpu", interpret=True, out_dtype=jnp.float32)
    np.testing.assert_allclose(y, np.asarray(x, "f") @ np.asarray(w.to_dense(), "f"), rtol=1e-5)


def test_the_element_wise_form_runs_dense_and_the_shared_one_does_not():
    assert xla._dense_is_faster(NMSparse.from_dense(dense(8, 64), 2, 4))
    assert not xla._dense_is_faster(NMSparse.from_dense(dense(8, 64), 2, 4, share=32))
    assert xla._dense_is_faster(NMSparse.from_dense(dense(8, 64), 4, 4, share=32))


def test_nan_in_a_row_of_x_stays_in_that_row():
    w = NMSparse.from_dense(dense(16, 64), 2, 4, share=32)
    x = dense(4, 16, seed=1)
    y, clean = nm_matmul(x.at[2].set(jnp.nan), w), nm_matmul(x, w)
    np.testing.assert_array_equal(np.delete(y, 2, 0), np.delete(clean, 2, 0))


def test_orbax_export_jit_and_vmap_carry_it(tmp_path):
    w = NMSparse.from_dense(dense(16, 64), 2, 4, share=32)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "w", w)
        checkpointer.wait_until_finished()
        back = checkpointer.restore(tmp_path / "w", jax.tree.map(jnp.zeros_like, w))
    np.testing.assert_array_equal(back.to_dense(), w.to_dense())
    x = dense(3, 16, seed=1)
    exported = jax.export.export(jax.jit(nm_matmul))(x, w)
    y = jax.export.deserialize(exported.serialize()).call(x, w)
    np.testing.assert_allclose(y, x @ w.to_dense(), rtol=1e-5)
    stack = jax.tree.map(lambda a: jnp.stack([a, a]), w)
    np.testing.assert_allclose(jax.vmap(nm_matmul, (None, 0))(x, stack)[1], y, rtol=1e-5)


@pytest.mark.parametrize("axis", ["columns", "rows"])
def test_shard_map_over_split_weights_gives_the_whole_product(axis):
    mesh = jax.make_mesh((4,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    P = jax.sharding.PartitionSpec
    w = NMSparse.from_dense(dense(48, 128), 2, 4, share=32)
    x = dense(5, 48, seed=1)

    def local(x, part):
        y = nm_matmul(x, jax.tree.map(lambda a: a[0], part))
        return y if axis == "columns" else jax.lax.psum(y, "model")

    x_spec, y_spec = (P(), P(None, "model")) if axis == "columns" else (P(None, "model"), P())
    run = jax.shard_map(local, mesh=mesh, in_specs=(x_spec, P("model")), out_specs=y_spec)
    y = jax.jit(run)(x, w.split(4, axis))
    np.testing.assert_allclose(y, x @ w.to_dense(), rtol=1e-5, atol=1e-5)


W = NMSparse.from_dense(jnp.eye(8), 2, 4)
REFUSED = [
    (lambda: NMSparse.from_dense(jnp.ones((6, 4)), 2, 4), "m=4 must divide the 6 rows"),
    (lambda: NMSparse.from_dense(jnp.ones((8, 4)), 5, 4), "n=5, m=4 must satisfy"),
    (
        lambda: NMSparse.from_dense(jnp.ones((8, 4)), 2, 4, share=3),
        "share=3 must divide the 4 columns",
    ),
    (lambda: NMSparse.from_dense(jnp.ones(8), 2, 4), r"dense.shape=\(8,\) must have two"),
    (
        lambda: NMSparse.from_mask(jnp.ones((8, 4)), jnp.ones((8, 4)), 2, 4),
        "mask keeps 4 of a group of m=4 rows; at most n=2",
    ),
    (
        lambda: NMSparse.from_mask(jnp.ones((8, 4)), jnp.ones((4, 4)), 2, 4),
        r"mask.shape=\(4, 4\) must equal",
    ),
    (lambda: W.with_values(jnp.ones((2, 2, 4))), r"values.shape=\(2, 2, 4\) must be \(2, 2, 8\)"),
    (lambda: W.split(4, "rows"), "parts=4 must divide the 2 groups of 4 rows"),
    (lambda: W.split(3), "parts=3 must divide the 8 groups of 1 columns"),
    (lambda: W.split(2, "both"), "axis='both' must be 'columns' or 'rows'"),
    (lambda: nm_matmul(jnp.ones((2, 4)), W), r"x.shape=\(2, 4\) must end in 8"),
    (lambda: nm_matmul(jnp.ones((2, 8), int), W), "x.dtype=int32 must be"),
    (lambda: nm_matmul(jnp.ones((2, 8)), jnp.eye(8)), "w must be an NMSparse"),
    (lambda: nm_matmul(jnp.ones((2, 8)), W, implementation="tpu"), "runs on TPU, not on cpu"),
    (
        lambda: nm_matmul(jnp.ones((2, 8)), W, implementation="tpu", interpret=True),
        "it takes bfloat16, not float32",
    ),
    (
        lambda: nm_matmul(
            jnp.ones((2, 8), jnp.bfloat16),
            W.astype(jnp.bfloat16),
            implementation="tpu",
            interpret=True,
        ),
        "multiple of 512 rows and 128 columns",
    ),
    (
        lambda: nm_matmul(
            jnp.ones((99, 8), jnp.bfloat16),
            W.astype(jnp.bfloat16),
            implementation="tpu",
            interpret=True,
        ),
        "up to 64 rows of x, not 99",
    ),
]


@pytest.mark.parametrize("call, message", REFUSED, ids=[m[:40] for _, m in REFUSED])
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
