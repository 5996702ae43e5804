"""What every solver of sparse coding takes and refuses: NumPy arrays, wrong types, shapes, counts and steps."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsparse import coding

M, N, B = 6, 8, 3
SOLVERS = {
    "ista": lambda a, y: coding.ista(a, y, 0.1, steps=3),
    "fista": lambda a, y: coding.fista(a, y, 0.1, steps=3),
    "iht": lambda a, y: coding.iht(a, y, 2, steps=3),
    "admm": lambda a, y: coding.admm(a, y, 0.1, steps=3),
    "omp": lambda a, y: coding.omp(a, y, 2),
    "gradient_pursuit": lambda a, y: coding.gradient_pursuit(a, y, 2),
    "working_set": lambda a, y: coding.working_set(a, y, 0.1, size=4).codes,
    "sbl": lambda a, y: coding.sbl(a, y, 0.1, steps=3).mean,
    "ksvd": lambda a, y: coding.ksvd(y, a, 2, steps=1).codes,
}


def problem():
    """A dictionary of unit norm and signals, NumPy float32."""
    rng = np.random.default_rng(0)
    a = rng.normal(size=(M, N))
    return tuple(
        v.astype(np.float32) for v in (a / np.linalg.norm(a, axis=0), rng.normal(size=(B, M)))
    )


@pytest.mark.parametrize("name", SOLVERS)
def test_numpy_arrays_are_taken_as_those_of_jax_without_a_warning(name):
    a, y = problem()
    expected = SOLVERS[name](jnp.asarray(a), jnp.asarray(y))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_allclose(SOLVERS[name](a, y), expected, atol=1e-5)
        wide = SOLVERS[name](a.astype(np.float64), y.astype(np.float64))
    assert wide.dtype == np.float32
    np.testing.assert_allclose(wide, expected, atol=1e-5)


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize(
    "change, message",
    [
        (lambda a, y: (a[:, :0], y), "at least one atom"),
        (lambda a, y: (a[0], y), r"dictionary has shape \(8,\)"),
        (lambda a, y: (a.tolist(), y), "dictionary is of type list: give a matrix"),
        (lambda a, y: (np.ones_like(a, int), y), "dictionary has dtype int64: cast it"),
        (lambda a, y: (a * np.nan, y), "dictionary has NaN"),
        (lambda a, y: (a, y.tolist()), "signals are of type list"),
        (lambda a, y: (a, np.ones_like(y, int)), "signals have dtype int64: cast them"),
        (lambda a, y: (a, y[:, :4]), "the dictionary 6 rows"),
        (lambda a, y: (a, y[0, 0]), r"signals have shape \(\)"),
        (lambda a, y: (a, y / 0), "signals have NaN or infinite"),
    ],
    ids=["atoms", "vector", "list", "int", "nan", "y list", "y int", "width", "number", "inf"],
)
@pytest.mark.filterwarnings("ignore:divide by zero")
def test_arrays_that_no_solver_takes_are_named(name, change, message):
    with pytest.raises(ValueError, match=message):
        SOLVERS[name](*change(*problem()))


OPERATOR = coding.Operator(lambda x: x, lambda r: r, 1.0, M, M)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda a, y: coding.fista(a, y, 0.1, steps=-1), "steps=-1: give an integer of at least 0"),
        (
            lambda a, y: coding.ista(a, y, 0.1, steps=1.5),
            "steps=1.5: give an integer of at least 0",
        ),
        (lambda a, y: coding.iht(a, y, 2, steps=-1), "steps=-1"),
        (lambda a, y: coding.admm(a, y, 0.1, steps=-1), "steps=-1"),
        (lambda a, y: coding.sbl(a, y, 0.1, steps=-1), "steps=-1"),
        (lambda a, y: coding.ksvd(y, a, 2, steps=-1), "steps=-1"),
        (lambda a, y: coding.ksvd(y, a, 2, powers=-1), "powers=-1"),
        (lambda a, y: coding.ksvd(y[:0], a, 2), r"signals have shape \(0, 6\)"),
        (lambda a, y: coding.working_set(a, y, 0.1, rounds=-1), "rounds=-1"),
        (lambda a, y: coding.working_set(a, y, 0.1, sweeps=-1), "sweeps=-1"),
        (lambda a, y: coding.working_set(a, y, 0.1, size=1.5), "size=1.5"),
        (lambda a, y: coding.fista(a, y, np.nan), "strength=nan"),
        (lambda a, y: coding.fista(a, y, jnp.ones(3)), r"strength has shape \(3,\).*\(3, 1\)"),
        (lambda a, y: coding.fista(a, y, jnp.ones((2, 1))), r"strength has shape \(2, 1\)"),
        (lambda a, y: coding.admm(a, y, jnp.ones(3)), r"strength has shape \(3,\)"),
        (lambda a, y: coding.working_set(a, y, jnp.ones(8)), r"strength has shape \(8,\)"),
        (lambda a, y: coding.fista(a, y, 0.1, init=[0.0]), r"init has shape \(1,\)"),
        (lambda a, y: coding.admm(a, y, 0.1, relaxation=3.0), "relaxation=3.0"),
        (lambda a, y: coding.admm(coding.dense(a), y, 0.1), "dictionary is of type Dense"),
        (lambda a, y: coding.sbl(OPERATOR, y, 0.1), "dictionary is of type Operator"),
        (lambda a, y: coding.omp(a, y, 2.0), "k=2.0: give an integer from 1 to 6"),
        (lambda a, y: coding.omp(a, y, True), "k=True"),
        (lambda a, y: coding.gradient_pursuit(a, y, 2.0), "k=2.0"),
        (lambda a, y: coding.ksvd(y, a, 0), "k=0"),
        (lambda a, y: coding.omp(a, y, 2, norms=jnp.ones(3)), r"norms have shape \(3,\)"),
        (lambda a, y: coding.lasso_objective(a, y, y, 0.1), r"codes have shape \(3, 6\)"),
        (lambda a, y: coding.duality_gap(a, y, y @ a, -1.0), "strength=-1.0"),
        (lambda a, y: coding.duality_gap(a, y, y @ a, jnp.ones(3)), r"strength has shape \(3,\)"),
        (lambda a, y: coding.masked_loss(a, y, 1, jnp.ones(5, bool)), r"kept has shape \(5,\)"),
    ],
)
def test_numbers_that_cannot_be_meant_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(*problem())


def test_no_steps_give_the_start_and_counts_may_be_numpys():
    a, y = problem()
    start = np.ones((B, N), np.float32)
    np.testing.assert_array_equal(coding.fista(a, y, 0.1, steps=0, init=start), start)
    np.testing.assert_array_equal(coding.omp(a, y, np.int64(2)), coding.omp(a, y, 2))


def test_objective_and_gap_take_the_strengths_that_solvers_take():
    a, y = problem()
    strengths = np.array([[0.1], [0.2], [0.4]], np.float32)
    codes = coding.fista(a, y, strengths, steps=20)
    for measure in (coding.lasso_objective, coding.duality_gap):
        together = measure(a, y, codes, strengths)
        apart = [measure(a, s, x, float(t)) for s, x, t in zip(y, codes, strengths[:, 0])]
        np.testing.assert_allclose(together, apart, atol=1e-5)


def test_traced_counts_of_steps_are_not_looked_at():
    a, y = problem()
    traced = jax.jit(lambda n: coding.fista(a, y, 0.1, steps=n))
    np.testing.assert_allclose(traced(3), coding.fista(a, y, 0.1, steps=3), atol=1e-6)
