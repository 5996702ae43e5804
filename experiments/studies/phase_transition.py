"""When sparse codes are found: success over the number of measurements and of nonzeros, for three solvers.

  python -m experiments.studies.phase_transition [--columns=100] [--trials=20] [--out=docs/results]

Gaussian dictionaries `[measurements, columns]` with columns of norm 1, exact codes with standard normal entries, no
noise. A code is found if it is within 1 % of the true one. OMP is told the number of nonzeros; FISTA solves the LASSO with
a small strength; sparse Bayesian learning is told nothing. The line is the weak threshold of the l1 minimum for
many columns (Donoho, Tanner, Counting faces of randomly projected polytopes when the projection radically lowers
dimension, 2009), from the statistical dimension of its descent cone (Amelunxen, Lotz, McCoy, Tropp, Living on the
edge: phase transitions in convex programs with random data, 2014).
"""

from __future__ import annotations

import argparse
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from scipy.stats import norm

from jaxsparse import coding

SOLVERS = ("omp", "fista", "sbl")
NEAR = 0.01


def threshold(nonzeros: float) -> float:
    """Measurements over columns at which the l1 minimum begins to succeed, for this share of nonzeros."""

    def dimension(t):
        tail = (1 + t * t) * 2 * norm.sf(t) - 2 * t * norm.pdf(t)  # E max(|g| - t, 0)^2
        return nonzeros * (1 + t * t) + (1 - nonzeros) * tail

    grid = np.linspace(0, 10, 2001)
    return float(dimension(grid).min())


@functools.partial(jax.jit, static_argnames=("rows", "columns", "k", "trials"))
def successes(key: Array, *, rows: int, columns: int, k: int, trials: int) -> Array:
    """The share of trials in which each solver finds the code, `[solvers]`."""

    def trial(key):
        keys = jax.random.split(key, 3)
        a = coding.unit_atoms(jax.random.normal(keys[0], (rows, columns)))
        x = jax.random.normal(keys[1], (columns,)) * (jnp.arange(columns) < k)
        y = a @ x
        op = coding.dense(a)
        strength = 1e-4 * jnp.abs(op.adjoint(y)).max()
        found = (
            coding.omp(a, y, min(k, rows)),
            coding.fista(op, y, strength, steps=4000),
            coding.sbl(a, y, 1e-8, steps=150, rule="fixed_point", prune=1e-8).mean,
        )
        error = lambda z: jnp.linalg.norm(z - x) / jnp.linalg.norm(x)
        return jnp.stack([error(z) < NEAR for z in found])

    return jax.lax.map(trial, jax.random.split(key, trials)).mean(0)


def study(columns: int, trials: int, steps: int) -> dict[str, object]:
    """Shares of success `[measurements, nonzeros]` for each solver; nonzeros are shares of the measurements."""
    delta = np.linspace(1 / steps, 1 - 1 / steps, steps - 1)
    rho = np.linspace(1 / steps, 1 - 1 / steps, steps - 1)
    found = np.zeros((len(SOLVERS), len(delta), len(rho)))
    for i, d in enumerate(delta):
        for j, r in enumerate(rho):
            rows = round(d * columns)
            k = max(1, round(r * rows))
            key = jax.random.key(1000 * i + j)
            found[:, i, j] = successes(key, rows=rows, columns=columns, k=k, trials=trials)
        print(f"{d:.2f} of {columns} measurements done", flush=True)
    named = dict(zip(SOLVERS, found.tolist()))
    return dict(columns=columns, trials=trials, delta=delta.tolist(), rho=rho.tolist(), found=named)


def plot(result: dict, path: pathlib.Path) -> None:
    """One map for each solver, with the threshold of the l1 minimum."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(
        1, len(SOLVERS), figsize=(11, 3.6), sharey=True, layout="constrained"
    )
    # k / columns = rho * delta; the threshold gives delta for each share of nonzeros.
    shares = np.linspace(0.002, 0.9, 300)
    delta = np.array([threshold(s) for s in shares])
    titles = dict(omp="OMP", fista="LASSO by FISTA", sbl="sparse Bayesian learning")
    image = None
    for axis, name in zip(axes, SOLVERS):
        image = axis.pcolormesh(
            result["delta"],
            result["rho"],
            np.array(result["found"][name]).T,
            vmin=0,
            vmax=1,
            cmap="viridis",
        )
        axis.plot(delta, shares / delta, "w--", linewidth=1.5)
        axis.set(title=titles[name], xlabel="measurements / columns", xlim=(0, 1), ylim=(0, 1))
    axes[0].set_ylabel("nonzeros / measurements")
    assert image is not None
    figure.colorbar(image, ax=axes, label="share of codes found")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--columns", type=int, default=100)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--steps", type=int, default=10, help="of the grid, in each direction")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("docs/results"))
    options = parser.parse_args(argv)
    jax.config.update("jax_enable_x64", True)  # noise of 1e-8 is beyond float32
    result = study(options.columns, options.trials, options.steps)
    (options.out / "phase_transition.json").write_text(json.dumps(result) + "\n")
    plot(result, options.out / "phase_transition.png")


if __name__ == "__main__":
    main()
