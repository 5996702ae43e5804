"""Codes of many signals at once, against scikit-learn's loop over signals, on the CPU.

    python -m experiments.benchmarks.coding [--signals=1000] [--rows=256] [--atoms=1024] [--k=16]

Prints a Markdown table. Both sides reach the same LASSO objective: for every signal within 1e-6 of the optimum, which
scikit-learn finds in float64 with a tolerance of 1e-9. The number of FISTA steps is the smallest power of two (times 25)
that does, and scikit-learn has the loosest tolerance of 1e-2, 1e-3, ... that does. It gets the Gram matrix, its fastest way.
Working sets hold two and a half times k atoms; the number of rounds is the smallest that does.
"""

from __future__ import annotations

import argparse

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.linear_model import Lasso, orthogonal_mp_gram

from experiments.benchmarks.timing import machine, medians
from jaxsparse import coding

STRENGTH = 0.1  # lambda, for codes whose entries are about 1
ACCURACY = 1e-6


def planted(signals: int, rows: int, atoms: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """A dictionary `[rows, atoms]` of unit norm and noisy signals of k atoms each, float32."""
    rng = np.random.default_rng(0)
    a = rng.normal(size=(rows, atoms))
    a /= np.linalg.norm(a, axis=0)
    x = np.zeros((signals, atoms))
    for row in x:
        row[rng.choice(atoms, k, replace=False)] = rng.normal(size=k)
    y = x @ a.T + 0.01 * rng.normal(size=(signals, rows))
    return a.astype(np.float32), y.astype(np.float32)


def objectives(a: np.ndarray, y: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """The LASSO objective of each signal, in float64."""
    with jax.enable_x64(True):
        a64, y64, x64 = (jnp.asarray(v, jnp.float64) for v in (a, y, codes))
        return np.asarray(coding.lasso_objective(a64, y64, x64, STRENGTH))


def lasso(a: np.ndarray, y: np.ndarray, gram: np.ndarray, tolerance: float) -> np.ndarray:
    """scikit-learn's codes, in the dtype of the arrays."""
    model = Lasso(STRENGTH / len(a), fit_intercept=False, tol=tolerance, max_iter=100_000)
    return model.set_params(precompute=gram).fit(a, y.T).coef_


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--signals", type=int, default=1000)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--atoms", type=int, default=1024)
    parser.add_argument("--k", type=int, default=16)
    args = parser.parse_args()
    a, y = planted(args.signals, args.rows, args.atoms, args.k)
    gram = np.ascontiguousarray(a.T @ a)

    op = coding.dense(jnp.asarray(a))
    fista = jax.jit(lambda y, steps: coding.fista(op, y, STRENGTH, steps=steps))
    a64, y64 = a.astype(np.float64), y.astype(np.float64)
    optimum = objectives(a, y, lasso(a64, y64, a64.T @ a64, 1e-9))
    excess = lambda codes: float(np.max(objectives(a, y, codes) / optimum - 1))
    steps, tolerance = 25, 1e-2
    while excess(np.asarray(fista(y, steps))) > ACCURACY and steps < 6400:
        steps *= 2
    while excess(lasso(a, y, gram, tolerance)) > ACCURACY and tolerance > 1e-8:
        tolerance /= 10

    sets = jax.jit(
        lambda y, rounds: coding.working_set(op, y, STRENGTH, size=5 * args.k // 2, rounds=rounds)
    )
    rounds = 1
    while excess(np.asarray(sets(y, rounds).codes)) > ACCURACY and rounds < 20:
        rounds += 1

    omp = jax.jit(lambda y: coding.omp(op, y, args.k))
    greedy = lambda: np.asarray(orthogonal_mp_gram(gram, a.T @ y.T, n_nonzero_coefs=args.k)).T
    ours, theirs = np.asarray(omp(y)), greedy()
    same = np.mean(((ours != 0) == (theirs != 0)).all(-1))

    seconds = medians(
        {
            "fista": lambda: fista(y, steps),
            "sets": lambda: sets(y, rounds),
            "lasso": lambda: lasso(a, y, gram, tolerance),
            "omp": lambda: omp(y),
            "greedy": greedy,
        },
        rounds=3,
    )
    print(f"{machine()}; {args.signals} signals of {args.rows} in {args.atoms} atoms, float32\n")
    print("| | seconds | scikit-learn | ratio | |\n|---|---|---|---|---|")
    loose = excess(lasso(a, y, gram, tolerance))
    for key, name, codes in (
        ("fista", f"`fista`, {steps} steps", fista(y, steps)),
        ("sets", f"`working_set`, {5 * args.k // 2} atoms, {rounds} rounds", sets(y, rounds).codes),
    ):
        print(
            f"| LASSO: {name}; `Lasso`, tol {tolerance:.0e} | {seconds[key]:.2f} | {seconds['lasso']:.2f} | "
            f"{seconds['lasso'] / seconds[key]:.1f} | at most {excess(np.asarray(codes)):.0e} and {loose:.0e} over "
            "the optimum |"
        )
    print(
        f"| `omp`, {args.k} atoms; `orthogonal_mp_gram` | {seconds['omp']:.2f} | "
        f"{seconds['greedy']:.2f} | {seconds['greedy'] / seconds['omp']:.1f} | the same support for "
        f"{same:.1%} of the signals |"
    )


if __name__ == "__main__":
    main()
