"""Condensed and condensed_matmul: unstructured weights on CPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pallas_kernels import Condensed, condensed_matmul
from pallas_kernels.condensed_matmul import xla


def sparse(rows, cols, density, seed):
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(rows, cols)) * (rng.random((rows, cols)) < density)).astype("f")


@functools.partial(jax.jit, static_argnums=3)
def forward_and_gradients(x, w, dy, implementation):
    """One function for all examples: equal shapes are compiled once."""
    f = lambda x, v: condensed_matmul(x, w.with_values(v), implementation=implementation)
    y, pull = jax.vjp(f, x, w.values)
    return y, *pull(dy)


@given(
    shape=st.sampled_from([(40, 30), (33, 265)]),
    density=st.sampled_from([0.0, 0.1, 1.0]),
    implementation=st.sampled_from(["xla", "reference"]),
    rows=st.sampled_from([(2, 10), (3,)]),
    seed=st.integers(0, 2),
)
def test_product_and_gradients_agree_with_dense(shape, density, implementation, rows, seed):
    dense = sparse(*shape, density, seed)
    make = jax.jit(Condensed.from_dense, static_argnames="fan_in")  # stores empty outputs, too
    w = make(dense, fan_in=shape[0])
    np.testing.assert_array_equal(w.to_dense(), dense)
    rng = np.random.default_rng(9)
    x, dy = (rng.normal(size=(*rows, width)).astype("f") for width in shape)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(xla, "_DENSE_FROM", float("inf"))
        y, dx, dv = forward_and_gradients(x, w, dy, implementation)
    tol = dict(rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(y, x @ dense, **tol)
    np.testing.assert_allclose(dx, dy @ dense.T, **tol)
    full = np.tensordot(x, dy, (range(len(rows)), range(len(rows))))
    full = np.pad(full, ((0, 1), (0, 0)))  # what fills up has the row beyond the last
    stored = full[w.rows, w.outputs[:, None]]
    np.testing.assert_allclose(dv, stored, **tol)


def test_training_leaves_what_fills_up_an_output_alone():
    """A pattern of uneven columns does not grow into row 0."""
    dense = np.zeros((6, 3), "f")
    dense[1:5, 0], dense[2, 1], dense[0, 2] = 1, 1, 1
    w = Condensed.from_dense(dense)
    loss = lambda v: (condensed_matmul(jnp.ones((2, 6)), w.with_values(v)) ** 2).sum()
    new = w.with_values(w.values - jax.grad(loss)(w.values))
    np.testing.assert_array_equal(np.asarray(new.to_dense()) != 0, dense != 0)
    noisy = w.with_values(w.values + 1)
    np.testing.assert_array_equal(np.asarray(noisy.to_dense()) != 0, dense != 0)


def test_constant_fan_in_stores_nothing_else():
    mask = np.stack([np.random.default_rng(j).permutation(20) < 3 for j in range(8)], 1)
    w = Condensed.from_mask(np.ones((20, 8), "f"), mask)
    assert w.fan_in == 3 and bool((w.values == 1).all())


def test_outputs_that_are_switched_off_store_nothing():
    mask = np.ones((20, 8), bool)
    mask[3:, :5] = mask[:, 5:] = False
    w = Condensed.from_mask(np.ones((20, 8), "f"), mask)
    assert w.values.shape == (5, 3) and w.outputs.tolist() == [0, 1, 2, 3, 4]
    x = np.random.default_rng(0).normal(size=(9, 20)).astype("f")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(xla, "_DENSE_FROM", float("inf"))
        y = condensed_matmul(x, w, implementation="xla")
    np.testing.assert_allclose(y, x @ mask, rtol=1e-5, atol=1e-5)


def test_it_can_be_made_under_jit_where_the_fan_in_is_given():
    dense = sparse(12, 6, 0.3, 0)
    w = jax.jit(lambda d: Condensed.from_dense(d, fan_in=12))(dense)
    np.testing.assert_array_equal(w.to_dense(), dense)


def test_dense_runs_where_it_is_faster():
    assert xla.dense_is_faster(Condensed.from_dense(sparse(100, 50, 0.5, 0)))
    assert not xla.dense_is_faster(Condensed.from_dense(sparse(100, 50, 0.02, 0)))


def test_nan_in_a_row_of_x_stays_in_that_row():
    w = Condensed.from_dense(sparse(100, 30, 0.05, 0))
    x = np.ones((12, 100), "f")
    clean = condensed_matmul(x, w, implementation="xla")
    x[4] = np.nan
    y = condensed_matmul(x, w, implementation="xla")
    np.testing.assert_array_equal(np.delete(y, 4, 0), np.delete(clean, 4, 0))


@pytest.mark.parametrize("shape", [(0, 5), (0, 0), (4, 0)])
def test_matrices_without_rows_or_columns(shape):
    w = Condensed.from_dense(jnp.zeros(shape))
    assert condensed_matmul(jnp.ones((2, shape[0])), w).tolist() == np.zeros((2, shape[1])).tolist()
    assert w.to_dense().shape == shape


W = Condensed.from_dense(np.eye(4, dtype="f"))
REFUSED = [
    (lambda: Condensed.from_dense(np.ones((4, 2)), fan_in=3), "fan_in=3 must be at least 4"),
    (
        lambda: Condensed.from_mask(np.ones((4, 2)), np.ones((2, 4))),
        r"mask.shape=\(2, 4\) must equal",
    ),
    (lambda: jax.jit(Condensed.from_dense)(np.ones((4, 2))), "fan_in=None must be a number"),
    (lambda: W.with_values(np.ones((4, 2))), r"values.shape=\(4, 2\) must be \(4, 1\)"),
    (lambda: condensed_matmul(np.ones((2, 3), "f"), W), r"x.shape=\(2, 3\) must end in 4"),
    (lambda: condensed_matmul(np.ones((2, 4), int), W), "x.dtype=int32 must be"),
    (lambda: condensed_matmul(np.ones((2, 4), "f"), np.eye(4)), "w must be a Condensed"),
    (
        lambda: condensed_matmul(np.ones((2, 4), "f"), W, implementation="tpu"),
        "implementation='tpu' is unknown",
    ),
]


@pytest.mark.parametrize("call, message", REFUSED, ids=[m[:40] for _, m in REFUSED])
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
