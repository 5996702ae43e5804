"""Two hundred seeded random cases of choosing masks, each through a public door, and their digests.

    python tests/jaxsparse/golden_masks.py      # writes golden_masks.json: only for new cases

Weights and gradients are integers divided by eight: many tie, and no sum of them is rounded, so that
the masks do not depend on how a compiler orders additions.
"""

import functools
import hashlib
import json
import pathlib
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxsparse
from jaxsparse import allocations, selection
from jaxsparse.structures import NM, Block, Channel, FanIn
from jaxsparse.targets import stacked

FILE = pathlib.Path(__file__).with_suffix(".json")
DTYPES = ("float32", "bfloat16")


def eighths(rng, shape, dtype="float32", top=None):
    """Multiples of 1/8, up to `top` eighths: at 5 almost everything ties, at 120 little does."""
    top = top or rng.choice([5, 40, 120])
    return jnp.asarray(rng.integers(-top, top + 1, shape) / 8, jnp.float32).astype(dtype)


def network(rng, dtype, skip=()):
    """A matrix, a convolution, three stacked layers, a bias."""
    shapes = {"dense": (16, 24), "conv": (3, 3, 4, 8), "stack": (3, 8, 16)}
    kernels = {
        name: {"kernel": eighths(rng, shape, dtype)}
        for name, shape in shapes.items()
        if name not in skip
    }
    return {**kernels, "bias": jnp.ones((8,), dtype)}


STACKED = [("stack", stacked(1))]
STRUCTURES = {
    "unstructured": None,
    "2:4": NM(2, 4, axis=-1),
    "1:4 strided": NM(1, 4, axis=-1, strided=True),
    "block": Block(2, 4),
    "channel": Channel(),
    "fan-in": FanIn(),
}
ALLOCATIONS = {
    "uniform": "uniform",
    "er": "er",
    "erk": "erk",
    "explicit": {"dense": 0.75, "conv": 0.4},
    "global": "global",
    "lamp": "lamp",
    "global with a minimum": allocations.Global(minimum=20),
}
SCORES = ("magnitude", "random", "gradient", "saliency")


def pruned(form, rng, i):
    """One-shot pruning: every structure, allocation and score."""
    structure = list(STRUCTURES)[i % len(STRUCTURES)]
    named = list(ALLOCATIONS) if structure == "unstructured" else ["uniform", "erk", "global"]
    if structure in ("fan-in", "channel"):
        named = ["uniform"]
    allocation = named[(i // len(STRUCTURES)) % len(named)]
    # Of eight channels, or eight inputs, one must stay.
    highest = 0.75 if structure in ("channel", "fan-in") else 0.9
    sparsity = float(rng.choice([0.1, 0.5, 0.6, highest]))
    if ":" in structure:
        sparsity, allocation = None, "uniform"
    dtype = DTYPES[int(form.integers(2))]
    params, grads = network(rng, dtype), network(rng, dtype)
    _, masks = jaxsparse.prune(
        params,
        sparsity,
        score=SCORES[int(form.integers(4))],
        grads=grads,
        structure=STRUCTURES[structure],
        allocation=ALLOCATIONS[allocation],
        targets=STACKED,
        seed=int(rng.integers(100)),
    )
    return masks


SHAPES = ((40, 50), (3, 20, 33), (8, 24))
AXES = {2: (None, 0, 1, -1), 3: (None, 0, (1, 2), (0, 2), -1)}


def eligible(form, rng, shape):
    """None, or most entries."""
    return jnp.asarray(rng.random(shape) < 0.7) if form.integers(2) else None


def budget(form, rng, shape, axis):
    """One number for all slices, or one for each."""
    axes = range(len(shape)) if axis is None else {a % len(shape) for a in np.atleast_1d(axis)}
    ranked = int(np.prod([shape[a] for a in axes]))
    kept = tuple(n for a, n in enumerate(shape) if a not in axes)
    k = rng.integers(0, ranked + 1, kept if form.integers(2) else ())
    return jnp.asarray(k, jnp.int32) if rng.integers(2) or k.ndim else int(k)


def one_array(form, rng, i):
    """One array: axes, ties, `where`, budgets of slices, dtypes; some arrays are large."""
    shape = SHAPES[form.integers(3)] if form.integers(8) else (400, 600)
    axis = AXES[len(shape)][int(form.integers(len(AXES[len(shape)])))]
    dtype = [*DTYPES, "int32", "float16"][int(form.integers(4))]
    x = eighths(rng, shape) * 8 if dtype == "int32" else eighths(rng, shape)
    return selection.topk_mask(
        x.astype(dtype),
        budget(form, rng, shape, axis),
        where=eligible(form, rng, shape),
        ties=["position", "hash"][int(form.integers(2))],
        seed=int(rng.integers(1000)),
        axis=axis,
    )


def arrays_apart(form, rng, i):
    """Several arrays, each ranked by itself."""
    shapes = SHAPES + ((7, 8, 9), (5,))
    axes = [AXES[len(s)][int(form.integers(4))] if len(s) > 1 else None for s in shapes]
    if i % 2:  # the last axes, as in most models
        axes = [None if len(s) != 3 else (1, 2) for s in shapes]
    return selection.topk_masks(
        [eighths(rng, s, DTYPES[i % 2]) for s in shapes],
        [budget(form, rng, s, a) for s, a in zip(shapes, axes)],
        where=[eligible(form, rng, s) for s in shapes],
        ties=["position", "hash"][(i // 2) % 2],
        seed=[int(rng.integers(1000)) for _ in shapes],
        axis=axes,
    )


def arrays_together(form, rng, i):
    """Several arrays in one ranking, with and without minima."""
    shapes = (*SHAPES, (60,)) if form.integers(4) else ((300, 500), (60,))
    dtypes = DTYPES if form.integers(2) else DTYPES[:1]
    leaves = [eighths(rng, s, dtypes[j % len(dtypes)]) for j, s in enumerate(shapes)]
    minimum = [int(rng.integers(0, 30)) for _ in shapes]
    k = int(rng.integers(sum(minimum), sum(x.size for x in leaves) + 1))
    return selection.topk_masks(
        leaves,
        jnp.int32(k) if rng.integers(2) else k,
        where=[eligible(form, rng, s) for s in shapes],
        ties=["position", "hash"][i % 2],
        seed=int(rng.integers(1000)),
        minimum=minimum if form.integers(2) else None,
        together=True,
    )


METHODS = ("rigl", "set", "granet", "magnitude", "srigl")


@functools.cache
def method(i: int):
    """A method and its compiled update."""
    name = METHODS[i % len(METHODS)]
    options = dict(total_steps=9, begin_step=1, end_step=6, update_every=1, targets=STACKED)
    if name == "srigl":
        options["allocation"] = "uniform"
    elif name == "granet":
        options["allocation"] = ["global", "uniform"][i // len(METHODS)]
    else:
        structure = [None, FanIn() if name == "set" else Block(2, 4)][i // len(METHODS)]
        options["structure"] = structure
        options["allocation"] = "erk" if structure is None else "uniform"
    if name != "magnitude":
        options["seed"] = i
    sparsity = [0.5, 0.75, 0.625][i % 3]
    tx = jaxsparse.make(name, optax.sgd(0.5), sparsity=sparsity, **options)
    return tx, jax.jit(tx.update)


def trained(form, rng, i):
    """The masks of three updates of a method, one at every step."""
    tx, update = method(i % 10)
    params, found = network(rng, "float32", skip=("conv",)), []
    state = tx.init(params)
    for _ in range(4):
        updates, state = update(network(rng, "float32", skip=("conv",)), state, params)
        params = optax.apply_updates(params, updates)
        found.append(jaxsparse.get_masks(state))
    return found[1:]


# The cases of a family: their number, and how many of them differ in more than their numbers, so
# that they are compiled apart.
FAMILIES: dict[str, tuple[Callable, int, int]] = {
    "prune": (pruned, 72, 18),
    "one array": (one_array, 60, 20),
    "arrays apart": (arrays_apart, 16, 4),
    "arrays together": (arrays_together, 22, 6),
    "methods": (trained, 30, 10),
}


def digest(masks) -> list:
    """The number of entries that each mask keeps, and a hash of all of them."""
    found = [np.asarray(m) for m in jax.tree.leaves(masks)]
    packed = b"".join(str(m.shape).encode() + np.packbits(m).tobytes() for m in found)
    return [[int(m.sum()) for m in found], hashlib.sha256(packed).hexdigest()[:24]]


def digests(family: str, every: int = 1) -> list:
    """The digest of each case of a family, by number; of one in so many of its forms."""
    case, number, forms = FAMILIES[family]
    first = 1000 * list(FAMILIES).index(family)
    generator = lambda i: np.random.default_rng(first + i)
    return [
        (i, digest(case(generator(500 + i % forms), generator(i), i % forms)))
        for i in range(number)
        if i % forms % every == 0
    ]


if __name__ == "__main__":
    rows = {}
    for name in FAMILIES:
        rows[name] = [found for _, found in digests(name)]
        print(f"{name}: {time.process_time():.0f} s")
    lines = [
        f'"{name}": [\n' + ",\n".join(map(json.dumps, found)) + "\n]"
        for name, found in rows.items()
    ]
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")
