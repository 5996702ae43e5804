"""Writes the table of all methods, `docs/methods.md`, from the registry.

  python -m experiments.studies.catalogue

Memory is measured on shapes, without computing anything: the state of each method around
plain SGD, for a large float32 matrix, in units of its parameters (gradients, activations and the
state of the inner optimizer are not counted). Cost follows from which weights a step multiplies with
and which gradients its rule reads.
"""

import argparse
import pathlib
import sys

import jax
import jax.numpy as jnp
import optax

import jaxsparse
from experiments.studies import catalogue_besides
from jaxsparse.analysis.memory import training_memory

_PARAMS = {"kernel": jax.ShapeDtypeStruct((1024, 1024), jnp.float32)}
_DEFAULTS = {"sparsity": 0.875, "total_steps": 10_000}

HEAD = """# All methods

One line per method of `jaxsparse.METHODS`, written by `python -m experiments.studies.catalogue`.

- **structure**: "any" stands for unstructured, N:M, blocks, channels and constant fan-in.
- **starts**: dense or sparse by default.
- **memory**: what a step keeps besides the inner optimizer's state, in units of the parameters: the
  weights themselves, raw weights, counters, masks (a byte per weight; in brackets with
  `pack_masks=True`, a bit). Weights and gradients are stored dense.
- **cost**: the products of one training step relative to dense ones, d the density, if every zero
  that the method leaves were skipped: forward and input gradient cost d each, the gradient of
  the weights d or, where the rule reads all of them, 1 (b: the density of Top-KAST's backward set).
  After "1, then" stands the cost when the sparsity asked for is reached. Masks alone skip nothing:
  this is what kernels could save, not what masking saves.

| method | what it is | structure | starts | memory | cost per step | reference |
|---|---|---|---|---|---|---|
"""


def memory(method: jaxsparse.Method, packed: bool) -> float:
    """State and weights over weights."""
    options = {k: v for k, v in _DEFAULTS.items() if k in method.options}
    if method.structures == "n:m" or (
        not method.controls_sparsity and "structure" in method.options
    ):
        options["structure"] = jaxsparse.structures.NM(2, 4)
        options.pop("sparsity", None)
    elif "structure" in method.options and method.name in ("sr_ste", "bdwp", "bi_mask", "slope"):
        options.pop("sparsity", None)
    if packed and "pack_masks" in method.options:
        options["pack_masks"] = True
    inner = optax.sgd(0.1, momentum=0.9) if method.needs_momentum else optax.sgd(0.1)
    tx = method.fn(inner, **options)
    found = training_memory(_PARAMS, jax.eval_shape(tx.init, _PARAMS))
    own = sum(size for purpose, size in found.items() if purpose != "inner optimizer")
    return own / found["weights"]


def cost(method: jaxsparse.Method) -> str:
    """The products of a step relative to dense ones."""
    if method.dynamics == "none":
        return "1"
    if method.name == "top_kast":
        return "(2d + b)/3"
    sparse = {
        "kept": "d",
        "updates": "d, at updates (2d + 1)/3",
        "all": "(2d + 1)/3",
    }[method.gradients]
    return f"1, then {sparse}" if method.starts_dense else sparse


def what(method: jaxsparse.Method) -> str:
    """One sentence: that of the file, where it holds one method only, or of the function."""
    home = method.fn.__module__
    alone = sum(m.fn.__module__ == home for m in jaxsparse.METHODS.values()) == 1
    page = (sys.modules[home].__doc__ or "").splitlines()[0] if alone else method.summary
    return page.split(". ")[0].rstrip(".:,")


def row(method: jaxsparse.Method) -> str:
    """One line of the table."""
    plain, packed = memory(method, False), memory(method, True)
    size = f"{plain:.2f}" + (f" ({packed:.2f})" if round(packed, 2) != round(plain, 2) else "")
    first = what(method).replace("|", "\\|")
    cells = (
        f"`{method.name}`",
        first,
        method.structures,
        "dense" if method.starts_dense else "sparse",
        size,
        cost(method),
        method.reference or "-",
    )
    return "| " + " | ".join(cells) + " |"


def table() -> str:
    """The whole page."""
    rows = "\n".join(row(m) for _, m in sorted(jaxsparse.METHODS.items())) + "\n"
    return HEAD + rows + catalogue_besides.section()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("docs/methods.md"))
    parser.parse_args(argv).out.write_text(table())


if __name__ == "__main__":
    main()
