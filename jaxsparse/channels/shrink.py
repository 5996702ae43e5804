"""`shrink`: a narrower model of the same class."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxsparse._control import is_concrete
from jaxsparse.channels.adapt import Adapted, adapt
from jaxsparse.channels.cut import cut_opt_state, cut_params, kept_positions, zero_params
from jaxsparse.channels.edit import Edit, candidates, known_edits
from jaxsparse.channels.groups import Groups
from jaxsparse.channels.keep import Keep, alive, as_given, rounded
from jaxsparse.channels.verify import difference, mismatch


@dataclasses.dataclass(frozen=True)
class Report:
    """What became of the groups.

    Attributes:
      before, after: the widths of all groups, by name.
      parameters, flops: before and after; operations are those on the example input.
      difference: the largest difference of the outputs of the model that was given and of the narrower one, on
        the example input, relative to the largest output if that is above 1. None where the narrower model could
        not be run: a Linen module must be built again first, a function may hold a width as a number.
      zeroed: the same between the model with zeros in place of the channels and the narrower one.
      edits: the attributes that were changed, in words.
      left: what stays whole and why, in words.
      unrun: why the narrower model could not be run, if it could not.
    """

    before: Mapping[str, int]
    after: Mapping[str, int]
    parameters: tuple[int, int]
    flops: tuple[int, int]
    difference: float | None
    zeroed: float | None
    edits: tuple[str, ...]
    left: tuple[str, ...]
    unrun: str = ""

    def __str__(self) -> str:
        def change(pair):
            return f"{pair[0]} -> {pair[1]} ({pair[1] / max(pair[0], 1):.1%})"

        lines = [f"parameters {change(self.parameters)}", f"operations {change(self.flops)}"]
        if self.difference is None:
            lines.append(f"not run: {self.unrun}")
        else:
            lines.append(
                f"outputs differ by {self.difference:.1e} from the model's, by {self.zeroed:.1e} from those "
                "with zeros in place of the channels"
            )
        lines += [f"  {name}: {n} -> {self.after[name]}" for name, n in self.before.items()]
        lines += [f"  {edit}" for edit in self.edits]
        return "\n".join(
            [*lines, *(["left as they are:"] if self.left else []), *(f"  {x}" for x in self.left)]
        )


@dataclasses.dataclass(frozen=True)
class Shrunk:
    """A narrower model.

    Attributes:
      model: of the same class as the one given; for functions and Linen modules, what was given.
      params: its arrays, in the tree that `find` was given (for NNX the state).
      opt_state: the optimizer's state without the slots of what is gone, if one was given.
      kept: by group, the indices of the channels that stayed, in the old numbering.
      sizes: by path, the new shape of every leaf that changed.
      report: widths, parameters and operations before and after; print it.
    """

    model: object
    params: chex.ArrayTree
    opt_state: chex.ArrayTree | None
    kept: Mapping[str, np.ndarray]
    sizes: Mapping[str, tuple[int, ...]]
    report: Report


def shrink(
    model: object,
    groups: Groups,
    opt_state: chex.ArrayTree | None = None,
    *,
    params: chex.ArrayTree | None = None,
    keep: Keep | None = None,
    exact: bool = True,
    round_to: int = 1,
    edit: Callable[[object], object] | None = None,
) -> Shrunk:
    """Removes channels from a model: the result is dense, narrower, and of the same class.

    Which channels go is read from `keep`, or from the masks in `opt_state`, or from what is exactly zero in the
    model. Parameters, statistics and the slots of the optimizer are cut; attributes that name a width (`features`,
    `num_heads`, `feature_group_count`, ...) are set in the layers of Flax NNX and Equinox, and found by trial in
    modules of one's own. The narrower model is traced and compared with the wide one, equation by equation.

    Args:
      model: what `find` was given: a module, or the function or Linen module.
      groups: the channels that may go, from `find`, or some of them (`groups.without("stem")`).
      opt_state: an optimizer's state or an `nnx.Optimizer`; returned with the slots of what is left.
      params: for functions and Linen modules the parameters now; by default those that `find` saw.
      keep: by group, a mask of the channels or the indices of those that stay. Groups without one stay whole.
      exact: refuse to change what the model computes on the example input.
      round_to: widths are multiples of this where the old width allows: removed channels of the largest weights
        stay. 8 suits most devices, 128 a TPU. At least one channel stays.
      edit: for modules of one's own: changes attributes of the narrower model (in place, or it returns the
        model), before it is traced. For a Linen module or a function it returns the one that is built for the new
        widths, which is then run and compared as any other.

    Returns:
      The model, its parameters and optimizer state, the indices of what was kept, and a report.

    Raises:
      ValueError: `groups` of another model, an unknown group, a choice that leaves nothing, an optimizer state of
        another model; outputs that change by more than rounding while `exact`, or of which that cannot be said; a
        model that does not run when it is narrower, with what to do.

    >>> import optax
    >>> from jaxsparse import channels
    >>> model = nnx.Sequential(nnx.Linear(4, 6, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(6, 3, rngs=nnx.Rngs(1)))
    >>> groups = channels.find(model, jnp.ones((2, 4)))
    >>> small = channels.shrink(model, groups, keep={"layers/0/kernel:1": [0, 2, 5]}, exact=False)
    >>> small.model.layers[0].kernel.shape, small.model.layers[2].in_features
    ((4, 3), 3)
    """
    if keep is not None and not isinstance(keep, Mapping):
        raise ValueError(
            "keep: give masks or indices by the name of the group, {'layers/0/kernel:1': [0, 2]}"
        )
    wide = _same(model, groups, params)
    kept = alive(groups, wide, opt_state) if keep is None else as_given(groups, keep)
    kept = rounded(groups, kept, wide, round_to)
    cut = cut_params(groups, wide.params, kept)
    small, edits, unrun = _rebuild(groups, wide, cut, kept, edit)
    changed = zeroed = None
    if small is not None:
        inputs = _inputs(wide.args)
        ran = _output(small, small.params, inputs)
        changed = difference(_output(wide, wide.params, inputs), ran)
        zeroed = difference(_output(wide, zero_params(groups, wide.params, kept), inputs), ran)
        if exact and not changed <= _tolerance(wide):
            raise ValueError(
                f"exact: removing these channels changes the outputs by {changed:.1e} (relative to the largest), "
                f"and what zeros in their place give by {zeroed:.1e}; {_blame(groups, kept)}give exact=False to "
                "remove them nevertheless"
            )
    elif exact:
        _check_zeros(groups, wide, kept, unrun)
    counts = {name: int(mask.sum()) for name, mask in kept.items()}
    places = kept_positions(groups, kept)
    shapes = {path: tuple(int(axis.sum()) for axis in axes) for path, axes in places.items()}
    report = Report(
        groups.widths,
        counts,
        (groups.parameters(), groups.parameters(counts)),
        (groups.flops(), groups.flops(counts)),
        changed,
        zeroed,
        edits,
        tuple(map(str, groups.reported())),
        unrun,
    )
    return Shrunk(
        model if small is None else small.model,
        cut,
        None if opt_state is None else _cut_optimizer(groups, opt_state, kept),
        {name: np.flatnonzero(mask) for name, mask in kept.items()},
        {path: shape for path, shape in shapes.items() if shape != groups.shapes[path]},
        report,
    )


def zero(
    model: object, groups: Groups, keep: Keep, *, params: chex.ArrayTree | None = None
) -> object:
    """The model with zeros in place of the channels that are not kept: what training with masks leaves.

    Args:
      model, groups, params: as for `shrink`.
      keep: by group, a mask of the channels or the indices of those that stay.

    Returns:
      A module of the same class and size, or the parameters, where `model` is a function.

    Raises:
      ValueError: as `shrink` does.
    """
    wide = _same(model, groups, params)
    return _with(wide, zero_params(groups, wide.params, as_given(groups, keep)))


def zero_invariance(
    model: object, groups: Groups, *, params: chex.ArrayTree | None = None
) -> dict[str, float | None]:
    """By group, how far a model with half of the channels zeroed is from one without them.

    Args:
      model, groups, params: as for `shrink`.

    Returns:
      The largest difference of the outputs on the example input, relative to the largest output if that is above
      1: rounding where zeros may be removed; None where the narrower model cannot be run.

    Raises:
      ValueError: as `shrink` does.
    """
    found = {}
    for name, group in groups.items():
        half = np.arange(group.width) % 2 == 0
        keep = {other: half for other in (name, *group.tied)}
        small = shrink(model, groups, params=params, keep=keep, exact=False)
        found[name] = small.report.zeroed
    return found


def _same(model: object, groups: Groups, params: chex.ArrayTree | None) -> Adapted:
    if not isinstance(groups, Groups):
        raise ValueError(f"groups: give what channels.find returned, not {type(groups).__name__}")
    kinds = ("function", "linen")
    if params is None and groups.model.kind in kinds and not isinstance(model, nnx.Module):
        params = groups.model.params
    adapted = adapt(model, groups.model.args, params)
    if adapted.kind != groups.model.kind:
        raise ValueError(
            f"groups: they were found in a model of kind {groups.model.kind!r}, and this one is of kind "
            f"{adapted.kind!r}; give the model that find was given"
        )
    if not is_concrete(*(leaf for _, leaf in adapted.named())):
        raise ValueError(
            "model: its arrays are traced; call it outside of jit, the new shapes depend on values"
        )
    shapes = {path: tuple(leaf.shape) for path, leaf in adapted.named()}
    if shapes != groups.shapes:
        wrong = next(p for p in (*groups.shapes, *shapes) if shapes.get(p) != groups.shapes.get(p))
        raise ValueError(
            f"groups: the model has changed since find: {wrong!r} had shape {groups.shapes.get(wrong)} and has "
            f"{shapes.get(wrong)}; call find again"
        )
    return adapted


def _rebuild(
    groups: Groups,
    wide: Adapted,
    params: chex.ArrayTree,
    kept: Mapping[str, np.ndarray],
    edit: Callable[[object], object] | None,
) -> tuple[Adapted | None, tuple[str, ...], str]:
    """The narrower model, and the edits that made it run in words; None for a module that must be built again, or a
    function that holds a width, and why."""
    counts = {groups[name].atom: int(mask.sum()) for name, mask in kept.items()}
    wrong = ""
    for trial in _trials(groups, wide, params, counts):
        model, edits = trial
        if edit is not None:
            edited = edit(model)
            model = model if edited is None else edited
        given = params if wide.kind in ("function", "linen") else None
        small = adapt(model, wide.args, given)
        found = mismatch(groups, small, kept)
        if not found:
            words = (f"{type(e.module).__name__}.{e.attribute} = {e.value}" for e in edits)
            return small, tuple(words), ""
        if edit is None and wide.kind == "linen":
            return None, (), "build the module again with the new sizes"
        if edit is None and wide.kind == "function":
            return None, (), f"the function holds a width: {found}"
        wrong = wrong or found
    raise ValueError(
        f"model: the narrower model is not what is left of it: {wrong}. Change its attributes with edit=, or leave "
        "groups out with groups.without(pattern)"
    )


def _check_zeros(groups: Groups, wide: Adapted, kept: Mapping[str, np.ndarray], unrun: str) -> None:
    """Refuses what changes the outputs of a model whose narrower form cannot be run: zeros say so, if no statistic
    is taken over the channels that go."""
    inputs = _inputs(wide.args)
    zeros = _output(wide, zero_params(groups, wide.params, kept), inputs)
    changed = difference(_output(wide, wide.params, inputs), zeros)
    if not changed <= _tolerance(wide):
        raise ValueError(
            f"exact: zeros in place of these channels change the outputs by {changed:.1e} (relative to the largest); "
            "give exact=False to remove them nevertheless"
        )
    if blame := _blame(groups, kept):
        raise ValueError(
            f"exact: {blame}what that changes is not known, since the narrower model was not run ({unrun}). Give it "
            "as edit=lambda model: ..., or exact=False"
        )


def _trials(
    groups: Groups, wide: Adapted, params: chex.ArrayTree, counts: Mapping[int, int]
) -> Iterator[tuple[object, list[Edit]]]:
    """Narrower models to try: with the layers that are known, then with attributes of others besides."""
    if wide.kind in ("function", "linen"):
        yield wide.model, []
        return
    extra: Iterator[list[Edit]] = iter(())
    number = 0
    while True:
        model = _with(wide, params)
        edits = known_edits(model, groups.axes, counts)
        if number:
            # Modules are new in every trial: the number of the trial finds the same edits again.
            extra = candidates(model, groups.axes, counts)
            more = next((e for i, e in enumerate(extra, 1) if i == number), None)
            if more is None:
                return
            edits += more
        for e in edits:
            object.__setattr__(e.module, e.attribute, e.value)
        yield model, edits
        number += 1


def _with(adapted: Adapted, params: chex.ArrayTree) -> object:
    """The model with other arrays."""
    if adapted.kind != "nnx":
        return params
    model = nnx.clone(adapted.model)
    nnx.update(model, params)
    return model


def _inputs(args: tuple[object, ...]) -> tuple[object, ...]:
    """The example inputs; where only shapes were given, normal random numbers and zeros of integers."""

    def one(i: int, x):
        if not isinstance(x, jax.ShapeDtypeStruct):
            return x
        if jnp.issubdtype(x.dtype, jnp.floating):
            return jax.random.normal(jax.random.key(i), x.shape, x.dtype)
        return jnp.zeros(x.shape, x.dtype)

    leaves, structure = jax.tree.flatten(args)
    return structure.unflatten([one(i, x) for i, x in enumerate(leaves)])


def _output(
    adapted: Adapted, params: chex.ArrayTree, inputs: tuple[object, ...]
) -> list[jax.Array]:
    return dataclasses.replace(adapted, params=params, args=inputs).output()


def _tolerance(adapted: Adapted) -> float:
    """What rounding may change: about the eighth part of the digits of the narrowest type."""
    types = [leaf.dtype for _, leaf in adapted.named() if jnp.issubdtype(leaf.dtype, jnp.floating)]
    return max((100 * float(jnp.finfo(dtype).eps) for dtype in types), default=1e-5)


def _blame(groups: Groups, kept: Mapping[str, np.ndarray]) -> str:
    summed = [f"{n} ({g.summed[0]})" for n, g in groups.items() if g.summed and not kept[n].all()]
    return f"statistics are taken over {', '.join(summed)}; " if summed else ""


def _cut_optimizer(
    groups: Groups, opt_state: chex.ArrayTree, kept: Mapping[str, np.ndarray]
) -> chex.ArrayTree:
    if isinstance(opt_state, nnx.Optimizer):
        optimizer = nnx.clone(opt_state)
        nnx.update(optimizer, cut_opt_state(groups, nnx.state(optimizer), kept))
        return optimizer
    return cut_opt_state(groups, opt_state, kept)
