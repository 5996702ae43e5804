"""`stored`: training in which parameters, gradients and slots are those of stored blocks only."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array

from jaxsparse import allocations
from jaxsparse._control import is_concrete, when
from jaxsparse.choose import unit_budgets
from jaxsparse.engines import Step, View, check_inner, is_placeholder
from jaxsparse.engines._checks import compiled_once
from jaxsparse.engines._slots import restart, stand_still
from jaxsparse.engines.drop_and_grow import warn_of_idle
from jaxsparse.engines.step import any_nan
from jaxsparse.nn._stored_rules import BlockRule, Recipe, matrix_of, recipe_of
from jaxsparse.nn._stored_tree import Blocks, Columns, StoredTree, check_patterns, find
from jaxsparse.typing import Scalar, ScalarOrSchedule, Seed, StepCount

FAULTS = (
    "",
    "places were changed by something else than `stored`: an average, noise or decay outside of it; put "
    "it inside, around the optimizer of the values. After a model was restored without its optimizer's "
    "state, or its pattern moved by hand, make the state anew by `init`",
    "the rule asked for more than a layer stores; give the layer a larger density",
)


class StoredState(NamedTuple):
    """The state of `stored`.

    Attributes:
      count: int32 scalar, updates done.
      places: the places of every matrix, as the last update left them.
      fault: int32 scalar, 0, or the number of what went wrong; the values are NaN from then on.
      skipped: int32 scalar, updates of the pattern that did not take place, as gradients or weights were NaN.
      inner: the state of the inner optimizer: slots of stored values and of dense leaves.
      momentum: of rule="momentum": the average over past steps of the sketch of every matrix's gradient, float32; else
        empty.
    """

    count: Array
    places: Any
    fault: Array
    skipped: Array
    inner: Any
    momentum: tuple[Array, ...] = ()


def stored(
    inner: optax.GradientTransformation,
    *,
    rule: Literal["rigl", "set", "momentum", "magnitude", "static"] | BlockRule = "rigl",
    total_steps: StepCount | None = None,
    update_every: StepCount | None = None,
    begin_step: StepCount | None = None,
    end_step: StepCount | None = None,
    drop_fraction: ScalarOrSchedule | None = None,
    sparsity: Scalar | None = None,
    initial_sparsity: Scalar | None = None,
    decay: Scalar | None = None,
    groups: int = 1,
    seed: Seed = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Trains layers that store blocks (`BlockSparseLinear`) or single weights (`CondensedLinear`), and moves
    their pattern on a schedule: parameters, gradients and all slots of the inner optimizer are those of
    what is stored.

    The step and the result are those of the masked method of the same name with
    `structure=Block(bh, bw)`, `sparsity` that of the layers and the same `seed`, to rounding: with
    $|B|_1$ the sum of the magnitudes in a block, at each update "rigl" drops the part $f$ of the stored
    blocks of smallest $|W_B|_1$ and grows as many of largest $|(x^T dy)_B|_1$; "set" grows at random;
    "magnitude" only drops, along the cubic curve; "static" does nothing. "momentum" grows by the average of gradients
    over past steps, $M' = \beta M + (1 - \beta) \, x^T dy$, as sparse momentum does, without moving budgets between layers: of M
    a sketch of a few numbers for each block is kept (`BlockSparseLinear(sketch=)`, `pallas_kernels.sketch_blocks`), whose
    Frobenius norm stands for $|M_B|_F$. Single weights are those of the
    masked method with `structure=FanIn()`: each output drops and grows for itself and keeps its number
    of weights, so that any unstructured pattern can be had, of even outputs or not. A rule is shown some
    outputs at a time, and no array of the size of the matrix is made.

    Places are integers in the tree of parameters. The inner optimizer never sees them: it is run on the
    trained leaves alone, with `optax.MaskedNode` elsewhere, and `stored` returns integer updates, new
    places minus old ones, which `optax.apply_updates` adds exactly. What stays keeps its number
    in the arrays, and so its slots; what is new takes the number of what goes, starts at 0, with slots
    as at `init`. The norms of absent blocks come as the gradient of the layer's `scores`, computed in
    panels in the backward pass of those steps only that the flags `due` of the layer announce, which
    `stored` sets one step ahead (`pallas_kernels.score_blocks`); those of single weights as the gradient
    itself (`pallas_kernels.score_inputs`). A layer with fewer `candidates` has only so many block rows, or
    inputs, scored, which the seed draws anew for each update; what is no candidate grows where they do
    not suffice, at random.

    What averages, decays or adds noise belongs inside, around the optimizer of the values. From the
    outside it is refused: places that something else has changed raise `ValueError` outside of `jit`; in
    a compiled step the values become NaN, and `check_stored` says why. Clip by the norm of all gradients inside,
    too: outside it is also that of scores and sketches.

    Args:
      inner: the optimizer of the values and of all dense leaves.
      rule: a name, or a function of a `Step` that returns the new mask of each grid of blocks, in which a
        weight of a view stands for a block: `w` is its norm, 0 where it is absent, `g` that of its
        gradient if the function is marked by `scores.declare(needs_gradient=True)`, else None. Of single weights
        a view is some outputs `[inputs, few]` of one matrix at a time, `stats` the positions of its weights in the
        whole; the new mask must not depend on which outputs are seen together.
      total_steps: the length of the run, in steps; not needed by "static".
      update_every: steps between two updates, 100 by default.
      begin_step: the first update; after `update_every` steps by default ("magnitude": 0).
      end_step: no update after it; 75 % of the run by default.
      drop_fraction: of "rigl", "set" and "momentum": the part that the first update replaces, 0.3 by default,
        which falls along a cosine to 0 at `end_step`; or a schedule of it.
      sparsity: of "magnitude": the share of each matrix that is not stored in the end, at least that of the
        start. The arrays keep their size, until `refit` takes what is not used away.
      initial_sparsity: of "magnitude": that of the cubic curve's start, 0 by default.
      decay: of "momentum": $\beta$ in [0, 1), 0.9 by default.
      groups: groups of neighbouring block columns that keep their numbers of blocks. With as many as
        devices that share the blocks, each device drops and grows its own.
      seed: of random growth and of ties, an integer. It and `total_steps` are those of a run and go with any rule;
        other options go with the rules that read them.

    Returns:
      A transformation of trees of which each stored matrix is siblings: `values`, `places`, `scores`,
      `due`, and `sketch` where there is one; or `values`, `rows`, `outputs`, `due` and, with candidates, `scores`. Gradients of integers may be `float0`, zeros, or missing (see `full_gradients`).

    Raises:
      ValueError: an unknown rule, missing or contradictory arguments, options that the rule does not read; at
        `init` parameters without stored matrices, with a pattern that is none, or that store less than "magnitude"
        is to end at; at `update` gradients that are missing, or the state of another rule or model.

    With gradients averaged by `pmean` the score of a block is the mean of the norms over the replicas, unless the
    layers know their `axis_name`, and over microbatches it is the mean of theirs; the masked methods take the
    norm of the mean, and so do single weights here. Slots of another shape than the values (factored moments) belong to no block and stay.

    Sources: Evci et al., Rigging the lottery, 2020; Mocanu et al., Scalable training of artificial neural
    networks with adaptive sparse connectivity, 2018; Dettmers & Zettlemoyer, Sparse networks from scratch, 2019; Zhu & Gupta, To prune, or not to prune, 2017. Stored
    values instead of masks: Nikdan et al., SparseProp, 2023; Wesselink et al., Nerva, 2024. Candidates at
    random: Heddes et al., Always-sparse training by growing connections with guided stochastic
    exploration, 2024.

    >>> import jaxsparse
    >>> from jaxsparse.nn import BlockSparseLinear, Trained
    >>> layer = BlockSparseLinear(64, 64, block_shape=(16, 16), density=0.25, rngs=nnx.Rngs(0))
    >>> tx = jaxsparse.stored(optax.adamw(1e-3), rule="rigl", total_steps=1000, update_every=100)
    >>> optimizer = nnx.Optimizer(layer, tx, wrt=Trained)
    >>> loss = lambda layer: (layer(jnp.ones((2, 64))) ** 2).mean()
    >>> grads = nnx.grad(loss, argnums=nnx.DiffState(0, Trained), allow_int=True)(layer)
    >>> _ = optimizer.update(layer, grads)
    """
    inner = check_inner(inner)
    if not isinstance(groups, int) or groups < 1:
        raise ValueError(f"groups={groups!r}: give a number of groups of block columns, 1 or more")
    recipe = recipe_of(
        rule,
        total_steps=total_steps,
        update_every=update_every,
        begin_step=begin_step,
        end_step=end_step,
        drop_fraction=drop_fraction,
        sparsity=sparsity,
        initial_sparsity=initial_sparsity,
        decay=decay,
        seed=seed,
    )

    def init_fn(params):
        if is_placeholder(params):
            return StoredState(jnp.int32(0), 0, jnp.int32(0), jnp.int32(0), inner.init(params))
        params = nnx.as_pure(params)
        tree, leaves = find(params, groups), jax.tree.leaves(params)
        _check_rule(tree, recipe)
        check_patterns(tree, leaves, groups)
        _check_end(recipe, tree, leaves)
        return StoredState(
            count=jnp.zeros((), jnp.int32),
            places=tuple(jnp.array(leaves[m.places], copy=True) for m in tree.matrices),
            fault=jnp.zeros((), jnp.int32),
            skipped=jnp.zeros((), jnp.int32),
            inner=inner.init(tree.visible(leaves)),
            momentum=tuple(
                jnp.zeros(jnp.shape(leaves[cast(int, m.sketch)]), jnp.float32)
                for m in (tree.matrices if recipe.decay is not None else ())
            ),
        )

    def step(grads, state, params, **extra):
        tree, leaves = find(params, groups), jax.tree.leaves(params)
        values = [leaves[m.values] for m in tree.matrices]
        places = [leaves[m.places] for m in tree.matrices]
        changed = [jnp.any(p != q) for p, q in zip(places, state.places)]
        if recipe.scored:  # the flags, too, are as the last update left them
            told = recipe.due(state.count)
            for m in tree.matrices:
                due = leaves[m.due]
                wrong = jnp.where(told, ~m.is_due(due), jnp.any(due != 0))
                changed.append((state.count > 0) & wrong)
        fault = jnp.where(jnp.any(jnp.stack(changed)), 1, state.fault)
        kept = [jnp.ones(m.used(p).shape, bool) for m, p in zip(tree.matrices, places)]
        fires, skipped = recipe.fires(state.count), state.skipped
        momentum = [
            _average(recipe.decay, old, grads[m.sketch])
            for m, old in zip(tree.matrices, state.momentum)
        ]
        if recipe.rule is not None:
            probes = [grads[i] for i in recipe.probes(tree)]
            worth = momentum or probes or None
            if recipe.scored:  # computed where the layers were told that they are due
                fires &= jnp.all(jnp.stack([m.is_due(leaves[m.due]) for m in tree.matrices]))
            due = [leaves[m.due] for m in tree.matrices]

            def run(carry, count, values, worth, due, probes):
                chosen = *_choose(recipe, tree, carry, count, values, worth, due), True
                return optax.tree.where(any_nan(probes, values), carry, chosen)

            carry, told = (places, kept, fault, jnp.zeros((), bool)), fires
            found = when(told, run, carry, state.count, values, worth, due, probes)
            places, kept, fault, fires = found
            skipped = skipped + (told & ~fires)

        live = [k & m.used(p) for m, k, p in zip(tree.matrices, kept, places)]
        whole = [jnp.broadcast_to(k, v.shape) for k, v in zip(live, values)]
        visible = tree.visible(leaves)
        before = restart(inner, state.inner, whole, tree, visible)
        seen = list(grads)
        for m, k in zip(tree.matrices, live):
            seen[m.values] = jnp.where(k, seen[m.values], jnp.zeros((), seen[m.values].dtype))
        deltas, slots = inner.update(tree.visible(seen), before, visible, **extra)
        if recipe.replaces:
            deltas, slots = stand_still(fires, inner, before, visible, deltas, slots)

        found = tree.leaves_of(deltas)
        out = [jnp.zeros_like(x) if d is None else d for x, d in zip(leaves, found)]
        for m, k, p, v in zip(tree.matrices, live, places, values):
            move = jnp.where(k, out[m.values].astype(v.dtype), -v)
            out[m.values] = jnp.where(fault != 0, jnp.full((), jnp.nan, v.dtype), move)
            flags = recipe.flags(m, state.count + 1).astype(leaves[m.due].dtype)
            change = {m.places: p - leaves[m.places], m.due: flags - leaves[m.due]}
            for i in m.integers:
                exact = grads[i] is None or max(m.capacity, *m.grid) >= 1 << 24
                x = change.get(i, out[i])
                out[i] = x if exact else x.astype(grads[i].dtype)
        new = StoredState(
            jnp.asarray(optax.safe_increment(state.count)),
            tuple(places),
            fault,
            skipped,
            slots,
            tuple(momentum),
        )
        return tree.treedef.unflatten(out), new

    compiled = compiled_once(step)

    def update_fn(updates, state, params=None, **extra):
        if params is None:
            raise ValueError(
                "update needs the parameters: call tx.update(grads, opt_state, params)"
            )
        if not isinstance(state, StoredState):
            raise ValueError(
                f"opt_state: {type(state).__name__} is not the state that `stored(...).init` returns"
            )
        tree, leaves = find(params, groups), jax.tree.leaves(params)
        _check_rule(tree, recipe)
        _check_state(tree, leaves, state, recipe)
        grads = tree.gradients(updates, leaves, recipe.probes(tree))
        out, new = compiled(grads, state, params, **extra)
        if is_concrete(new.fault) and int(jnp.max(new.fault)):
            raise ValueError(f"params: {FAULTS[int(jnp.max(new.fault))]}")
        return out, new

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _average(decay: Any, old: Array, new: Array) -> Array:
    """The momentum after one more step; gradients that are not finite leave it as it was."""
    decay = jnp.asarray(decay, jnp.float32)
    found = decay * old + (1 - decay) * new.astype(jnp.float32)
    return jnp.where(jnp.all(jnp.isfinite(found)), found, old)


def _choose(recipe: Recipe, tree: StoredTree, carry, count: Array, values, worth, due):
    """The pattern that the rule chooses: new places, which values stay, and whether there is a fault."""
    places, kept, fault = list(carry[0]), list(carry[1]), carry[2]
    fits, views, blocks = [], [], []
    for i, (m, v, p) in enumerate(zip(tree.matrices, values, places)):
        g = None if worth is None else worth[i]
        if isinstance(m, Columns):
            places[i], kept[i], fit = m.rewired(recipe.in_columns, count, v, p, g, due[i])
            fits.append(fit)
        elif isinstance(m, Blocks):
            norms = jnp.sum(jnp.abs(v), (-2, -1), dtype=jnp.promote_types(v.dtype, jnp.float32))
            if g is not None:  # a sketch of the momentum, or scores of the candidates
                norm = lambda x: jnp.sqrt(jnp.sum(jnp.square(x), (-3, -1)))
                g = m.on_grid(g, due[i]) if recipe.decay is None else norm(g)
            views.append(View(m.leaf, m.spread(norms, p), g, m.mask(p)))
            blocks.append((i, m))
    masks = []
    if recipe.rule is not None and blocks:
        masks = recipe.rule(Step(count, views, aux=[m.block_shape for _, m in blocks]))
    for (i, m), mask in zip(blocks, masks):
        places[i], kept[i] = m.rewired(places[i], mask)
        fits.append(jnp.all(jnp.sum(mask, (-2, -1), dtype=jnp.int32) <= m.capacity))
    return places, kept, jnp.where(jnp.all(jnp.stack(fits)), fault, jnp.int32(2))


def _check_rule(tree: StoredTree, recipe: Recipe) -> None:
    """Raises `ValueError` for matrices that the rule is not for."""
    for m in tree.matrices:
        if isinstance(m, Columns) and recipe.decay is not None:
            raise ValueError(
                f"rule='momentum': {m.path!r} stores weights one by one, of which no sketch is kept; give "
                "'rigl', 'set', 'magnitude', 'static', or a function of a Step"
            )
        if recipe.decay is not None and m.sketch is None:
            raise ValueError(
                f"params: {m.path!r} keeps no sketch for growth by momentum; give its layer sketch=(r, c)"
            )
        if recipe.scored and m.scores is None:
            raise ValueError(
                f"params: {m.path!r} keeps no candidates for growth by gradient; give its layer "
                "candidates="
            )


def _check_end(recipe: Recipe, tree: StoredTree, leaves: list[Any]) -> None:
    """Checks that the rule has something to do.

    Raises:
      ValueError: less is stored than a rule that only drops is to end at.
    """
    stored = [_in_a_slice(m, leaves[m.places]) for m in tree.matrices]
    if recipe.fraction is not None and recipe.at is not None:
        with jax.ensure_compile_time_eval():  # known while `init` is traced, too
            first = recipe.fraction(recipe.at.begin)
        warn_of_idle([(m.leaf.path, n) for m, n in zip(tree.matrices, stored)], first, stacklevel=5)
    if recipe.sparsity is None:
        return
    for m, most in zip(tree.matrices, stored):
        matrix, parts, of = m.leaf, 1, "weights of an output"
        if isinstance(m, Blocks):
            matrix, parts, of = matrix_of(m.leaf, m.block_shape), m.leaf.slices, "blocks"
        (final,) = unit_budgets([matrix], allocations.Uniform(), recipe.sparsity)
        if isinstance(final, int) and most * parts < final:
            whole = parts * m.leaf.layer_size // m.leaf.slices
            raise ValueError(
                f"sparsity={recipe.sparsity}: {m.path!r} stores {most * parts} of {whole} {of}, and "
                f"rule='magnitude' only drops, down to {final}; give more than "
                f"{1 - most * parts / whole:.3g}, or the layer a larger density"
            )


def _in_a_slice(m: Blocks | Columns, places: Any) -> int:
    """How much is stored in the fullest slice (a group of columns, an output) of the emptiest layer of a stack; as
    much as there is room for where only shapes are known."""
    slices = m.leaf.slices
    room = m.capacity // slices if isinstance(m, Blocks) else m.capacity
    if isinstance(places, jax.ShapeDtypeStruct) or not is_concrete(places):
        return room
    host: Any = np.asarray(places)
    used: Any = m.used(host).reshape(m.leaf.layers, slices, room)
    return int(used.sum(-1).max(-1).min())


def _check_state(tree: StoredTree, leaves: list[Any], state: StoredState, recipe: Recipe) -> None:
    """Raises `ValueError` for the state of another model or rule, or of other capacities."""
    if len(state.places) != len(tree.matrices):
        raise ValueError(
            f"opt_state: the state of another model: it has {len(state.places)} stored matrices, the "
            f"parameters {len(tree.matrices)}"
        )
    kept = len(state.momentum), 0 if recipe.decay is None else len(tree.matrices)
    if kept[0] != kept[1]:
        raise ValueError(
            f"opt_state: the state of another rule: it keeps {kept[0]} averages of sketches, and this "
            f"rule {kept[1]}; make it anew by `init`"
        )
    for m, average in zip(tree.matrices, state.momentum):
        shape = jnp.shape(leaves[cast(int, m.sketch)])
        if jnp.shape(average) != shape:
            raise ValueError(
                f"opt_state: the sketch of {m.path!r} has shape {shape}, its average in the state "
                f"{jnp.shape(average)}; give the layer the sketch= of that run, or make the state anew "
                "by `init`"
            )
    for m, places in zip(tree.matrices, state.places):
        if (n := jnp.shape(places)[-1]) != m.capacity:
            what = "blocks" if isinstance(m, Blocks) else "weights of an output"
            raise ValueError(
                f"opt_state: {m.path!r} has room for {m.capacity} {what}, its state for {n}; restore "
                "both from one checkpoint"
            )


def check_stored(opt_state) -> None:
    """Checks that a run with `stored` is sound.

    Args:
      opt_state: the optimizer state, or the `nnx.Optimizer`, however deeply the state is wrapped.

    Raises:
      ValueError: it holds no state of `stored`; or something went wrong, and what: places that something
        else has changed, a rule that wanted too much, updates that NaN prevented.

    >>> from jaxsparse.nn import BlockSparseLinear, Trained
    >>> layer = BlockSparseLinear(8, 8, block_shape=(4, 4), density=0.5, rngs=nnx.Rngs(0))
    >>> check_stored(stored(optax.sgd(0.1), rule="static").init(nnx.state(layer, Trained)))
    """
    found = stored_states(opt_state)
    if not found:
        raise ValueError(
            "opt_state holds no state of `stored`; pass what stored(...).init returned"
        )
    for state in found:
        if fault := int(jnp.max(state.fault)):
            raise ValueError(f"params: {FAULTS[fault]}")
        if skipped := int(jnp.max(state.skipped)):
            raise ValueError(
                f"updates: {skipped} updates of the pattern did not take place, as gradients or weights were "
                "NaN; find the first such step (optax.apply_if_finite around `stored` leaves such steps out)"
            )


def stored_blocks(params) -> dict[str, Array]:
    """Which blocks the stored matrices of a tree hold: a mask of its grid by the path of each matrix; of one
    that stores single weights a mask of the matrix itself, of its stored outputs.

    >>> from jaxsparse.nn import BlockSparseLinear, Trained
    >>> layer = BlockSparseLinear(8, 8, block_shape=(4, 4), density=0.5, rngs=nnx.Rngs(0))
    >>> {path: mask.shape for path, mask in stored_blocks(nnx.state(layer, Trained)).items()}
    {'kernel': (2, 2)}

    Raises:
      ValueError: there are no stored matrices.
    """
    params = nnx.as_pure(params)
    leaves = jax.tree.leaves(params)
    return {m.leaf.path: m.mask(leaves[m.places]) for m in find(params, 1).matrices}


def stored_states(opt_state) -> list[StoredState]:
    """Every `StoredState` inside an optimizer state."""
    tree = nnx.as_pure(getattr(opt_state, "opt_state", opt_state))
    is_one = lambda x: isinstance(x, StoredState)
    return [x for x in jax.tree.leaves(tree, is_leaf=is_one) if is_one(x)]


def full_gradients(grads):
    """Gradients with float32 zeros in place of `float0`, the gradients of integers: for what calculates
    with whole trees before `stored` sees them (`optax.MultiSteps`, clipping, sums over devices).

    >>> grads = jax.grad(lambda p: p["a"], allow_int=True)({"a": 1.0, "n": jnp.int32(3)})
    >>> float(full_gradients(grads)["n"])
    0.0
    """

    def one(g):
        return jnp.zeros(g.shape, jnp.float32) if g.dtype == jax.dtypes.float0 else g

    return jax.tree.map(one, grads)
