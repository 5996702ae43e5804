"""The rules of `stored`: what is dropped, what grows and when, and which options a rule reads."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, cast

import jax.numpy as jnp
from jax import Array, lax

from jaxsparse import allocations, schedules, scores, selection, structures
from jaxsparse._control import is_concrete
from jaxsparse.choose import check_sparsity, unit_budgets
from jaxsparse.engines import Step, drop_and_grow, swap
from jaxsparse.engines.drop_and_grow import GROWTH
from jaxsparse.leaves import Leaf
from jaxsparse.methods.pruning import start_of_ramp
from jaxsparse.methods.timing import REWIRING, Timing
from jaxsparse.nn._stored_tree import Matrix, StoredTree
from jaxsparse.schedules import Schedule, Updates

CANDIDATES = 0x2545F491  # what the seed of a leaf is mixed with, where candidates are drawn
BlockRule = Callable[[Step], list[Array]]
TIMES = ("update_every", "begin_step", "end_step")
READS = {
    "rigl": (*TIMES, "drop_fraction"),
    "set": (*TIMES, "drop_fraction"),
    "momentum": (*TIMES, "drop_fraction", "decay"),
    "magnitude": (*TIMES, "sparsity", "initial_sparsity"),
    "static": (),
}
"""The options of each rule; a function of a Step has `TIMES`."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The rule of grids of blocks, that of outputs which store weights one by one, when they run, whether
    they read scores, whether they take the place of the step, and how fast the momentum forgets that is read in
    place of scores (None: there is none), the sparsity that a rule which only drops ends at, and the part that one
    which grows replaces."""

    rule: BlockRule | None
    in_columns: BlockRule | None = None
    at: Updates | None = None
    scored: bool = False
    replaces: bool = False
    first: int = 0  # no update before this step
    seed: Any = 0
    decay: Any = None
    sparsity: Any = None
    fraction: Schedule | None = None

    def fires(self, count) -> Array:
        """Whether the pattern moves at this step (bool scalar)."""
        if self.rule is None or self.at is None:
            return jnp.zeros((), bool)
        return self.at.fires(count) & (jnp.asarray(count) >= self.first)

    def due(self, count) -> Array:
        """Whether the layers have to compute scores at this step (bool scalar)."""
        return self.fires(count) if self.scored else jnp.zeros((), bool)

    def probes(self, tree: StoredTree) -> list[int]:
        """The numbers of the leaves whose gradients the rule reads."""
        found = [m.scores for m in tree.matrices] if self.scored else []
        found += [m.sketch for m in tree.matrices] if self.decay is not None else []
        return [i for i in found if i is not None]

    def flags(self, m: Matrix, count) -> Array:
        """What `due` of a matrix is at this step: its candidates are drawn anew at each update."""
        return m.drawn(self.due(count), m.leaf.salt(self.seed, count) ^ jnp.uint32(CANDIDATES))


def recipe_of(rule: Any, *, total_steps: Any = None, seed: Any = 0, **options: Any) -> Recipe:
    """The recipe that the arguments of `stored` stand for, checked; None stands for an option's default."""
    if not callable(rule) and rule not in tuple(READS):
        raise ValueError(
            f"rule={rule!r}: give {', '.join(map(repr, READS))}, or a function of a Step"
        )
    given = {name: value for name, value in options.items() if value is not None}
    for name, value in given.items():
        if name not in (TIMES if callable(rule) else READS[rule]):
            readers = " and ".join(repr(r) for r, names in READS.items() if name in names)
            raise ValueError(
                f"{name}={value}: rule={rule!r} does not read it, {readers} would; leave it out"
            )
    if rule == "static":
        return Recipe(None)
    if total_steps is None:
        raise ValueError(f"total_steps=None: rule={rule!r} needs the length of the run, in steps")
    every = given.get("update_every", 100)
    times = total_steps, given.get("begin_step"), given.get("end_step"), every
    if rule == "magnitude":
        if "sparsity" not in given:
            raise ValueError(
                "sparsity=None: rule='magnitude' needs the sparsity that it ends at, a number in [0, 1)"
            )
        sparsity = check_sparsity(given["sparsity"])
        at = Timing().updates(*times)
        start = start_of_ramp(given.get("initial_sparsity", 0.0), sparsity)
        ramp = schedules.cubic(at.begin, at.end, initial=start)
        in_columns = _keep_largest_in_columns(sparsity, ramp)
        return Recipe(_keep_largest(sparsity, ramp), in_columns, at, sparsity=sparsity)
    at = REWIRING.updates(*times)
    if callable(rule):
        own: Any = rule
        return Recipe(own, own, at, scored=scores.needs_gradient(own), first=1, seed=seed)
    fraction = schedules.drop_fraction(given.get("drop_fraction", 0.3), at.end)
    grow = scores.random if rule == "set" else scores.gradient
    both = (
        drop_and_grow(scores.magnitude, grow, fraction, seed=seed),
        _swap_in_columns(fraction, seed),
    )
    by_gradient = rule == "rigl"
    if rule == "momentum":
        decay = given.get("decay", 0.9)
        if is_concrete(decay) and not 0 <= decay < 1:
            raise ValueError(f"decay={decay}: must be at least 0 and less than 1")
        return Recipe(both[0], None, at, first=1, seed=seed, decay=decay, fraction=fraction)
    return Recipe(
        *both,
        at,
        scored=by_gradient,
        replaces=by_gradient,
        first=1,
        seed=seed,
        fraction=fraction,
    )


def _swap_in_columns(fraction: Schedule, seed: Any) -> BlockRule:
    """`drop_and_grow` of some outputs of a matrix, each by itself: by the gradient where there is one, and
    what has none of its own at random, in the order of the whole matrix."""

    def rule(step: Step) -> list[Array]:
        (view,), (salt,) = step.views, step.salts(seed)
        number = selection.hash_at(view.stats, salt ^ jnp.uint32(GROWTH))
        promise = lax.bitcast_convert_type(number >> 1, jnp.int32) + jnp.iinfo(jnp.int32).min
        if view.g is not None:  # positive numbers are ordered like their bits
            size = lax.bitcast_convert_type(jnp.abs(view.g).astype(jnp.float32), jnp.int32)
            promise = jnp.where(size > 0, size, promise)
        drop = [scores.magnitude(view)]
        return swap(step.leaves, step.masks, drop, [promise], fraction(step.count), salts=[salt])

    return rule


def _keep_largest_in_columns(sparsity: Any, ramp: Schedule) -> BlockRule:
    """Of the stored weights of some outputs keep the largest of each, as many as the masked method."""

    def rule(step: Step) -> list[Array]:
        view, fraction = step.views[0], cast(Any, ramp(step.count))
        (n,) = unit_budgets([step.aux], allocations.Uniform(), sparsity, fraction)
        return [view.leaf.best(scores.magnitude(view), n, where=view.m)]

    return rule


def _keep_largest(sparsity: Any, ramp: Schedule) -> BlockRule:
    """Of the stored blocks keep those of largest norm, as many as the masked method keeps."""

    def rule(step: Step) -> list[Array]:
        matrices = [matrix_of(x, block) for x, block in zip(step.leaves, step.aux)]
        fraction: Any = ramp(step.count)
        budgets = unit_budgets(matrices, allocations.Uniform(), sparsity, fraction)
        rows = zip(step.leaves, budgets)
        kept = selection.topk_masks(
            [v.leaf.pool(v.w) for v in step.views],
            [n if leaf.slices == 1 else n // leaf.slices for leaf, n in rows],
            where=[v.leaf.units(v.m) for v in step.views],
            axis=[leaf.axes for leaf in step.leaves],
        )
        return [leaf.expand(k) for leaf, k in zip(step.leaves, kept)]

    return rule


def matrix_of(grid: Leaf, block: tuple[int, int]) -> Leaf:
    """The matrix, or the stack of them, whose blocks the grid holds, as a masked method sees it."""
    (gr, gc), (bh, bw) = grid.layer_shape, block
    shape = (*grid.stack_shape, gr * bh, gc * bw)
    return Leaf(grid.index, grid.path, shape, grid.lead, structures.Block(bh, bw))
