"""Condensed and condensed_matmul: unstructured weights on CPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import Condensed, condensed_matmul
from pallas_kernels.condensed_matmul import xla


def sparse(rows, cols, density, seed):
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(rows, cols)) * (rng.random((rows, cols)) < density)).astype("f")


@given(
    shape=st.sampled_from([(40, 30), (33, 265)]),
    density=st.sampled_from([0.0, 0.1, 1.0]),
    implementation=st.sampled_from(["xla", "reference"]),
    seed=st.integers(0, 2),
)
@settings(max_examples=10)
def test_product_and_gradients_agree_with_dense(shape, density, implementation, seed):
    dense = sparse(*shape, density, seed)
    w = Condensed.from_dense(dense, fan_in=shape[0])
    np.testing.assert_array_equal(w.to_dense(), dense)
    x = np.random.default_rng(9).normal(size=(2, 10, shape[0])).astype("f")
    dy = np.random.default_rng(8).normal(size=(2, 10, shape[1])).astype("f")

    @jax.jit
    def run(x, w):
        f = lambda x, v: condensed_matmul(x, w.with_values(v), implementation=implementation)
        y, pull = jax.vjp(f, x, w.values)
        return y, *pull(dy)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(xla, "_DENSE_FROM", float("inf"))
        y, dx, dv = run(x, w)
    tol = dict(rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(y, x @ dense, **tol)
    np.testing.assert_allclose(dx, dy @ dense.T, **tol)
    full = np.tensordot(x, dy, ((0, 1), (0, 1)))
    np.testing.assert_allclose(dv, full[w.rows, np.arange(shape[1])[:, None]], **tol)


def test_constant_fan_in_stores_nothing_else():
    mask = np.stack([np.random.default_rng(j).permutation(20) < 3 for j in range(8)], 1)
    w = Condensed.from_mask(np.ones((20, 8), "f"), mask)
    assert w.fan_in == 3 and bool((w.values == 1).all())


def test_dense_runs_where_it_is_faster():
    x = jnp.ones((32, 100))
    assert xla.dense_is_faster(x, Condensed.from_dense(sparse(100, 50, 0.5, 0)))
    assert not xla.dense_is_faster(x, Condensed.from_dense(sparse(100, 50, 0.02, 0)))
    assert xla.dense_is_faster(x[:1], Condensed.from_dense(sparse(100, 50, 0.02, 0)))


def test_nan_in_a_row_of_x_stays_in_that_row():
    w = Condensed.from_dense(sparse(100, 30, 0.05, 0))
    x = np.ones((12, 100), "f")
    clean = condensed_matmul(x, w, implementation="xla")
    x[4] = np.nan
    y = condensed_matmul(x, w, implementation="xla")
    np.testing.assert_array_equal(np.delete(y, 4, 0), np.delete(clean, 4, 0))


W = Condensed.from_dense(np.eye(4, dtype="f"))
REFUSED = [
    (lambda: Condensed.from_dense(np.ones((4, 2)), fan_in=3), "fan_in=3 must be at least 4"),
    (lambda: Condensed.from_mask(np.ones((4, 2)), np.ones((2, 4))), r"mask.shape=\(2, 4\) must equal"),
    (lambda: jax.jit(Condensed.from_dense)(np.ones((4, 2))), "fan_in=None must be a number"),
    (lambda: W.with_values(np.ones((4, 2))), r"values.shape=\(4, 2\) must be \(4, 1\)"),
    (lambda: condensed_matmul(np.ones((2, 3), "f"), W), r"x.shape=\(2, 3\) must end in 4"),
    (lambda: condensed_matmul(np.ones((2, 4), int), W), "x.dtype=int32 must be"),
    (lambda: condensed_matmul(np.ones((2, 4), "f"), np.eye(4)), "w must be a Condensed"),
    (lambda: condensed_matmul(np.ones((2, 4), "f"), W, implementation="tpu"), "implementation='tpu' is unknown"),
]  # fmt: skip


@pytest.mark.parametrize("call, message", REFUSED, ids=[m[:40] for _, m in REFUSED])
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
