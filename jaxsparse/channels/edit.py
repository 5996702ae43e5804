"""The attributes of modules that name a width: `features`, `num_heads`, and what users call their own.

Layers of Flax NNX and Equinox are known by name. Of any other module, numbers that equal a width of the leaves
below it are candidates; `shrink` tries them until the narrower model's trace is what is left of the wide one's.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from flax import nnx

from jaxsparse.channels.union import Expr

MAX_TRIALS = 64


class Edit(NamedTuple):
    """`setattr(module, attribute, value)`."""

    module: object
    attribute: str
    value: object


@dataclasses.dataclass(frozen=True)
class Widths:
    """The leaves of one module, their axes before, and how many positions of the atoms stay."""

    axes: Mapping[str, tuple[Expr, ...]]
    counts: Mapping[int, int]

    def shape(self, leaf: str) -> tuple[int, ...]:
        """The shape that is left of a leaf."""
        return tuple(axis.width(self.counts) for axis in self.axes[leaf])

    def leading(self, axis: Expr, size: int) -> int:
        """What is left of the leading factors of an axis that had `size` positions together."""
        parts, total = axis.parts if axis.kind == "product" else (axis,), 1
        left = 1
        for part in parts:
            if total == size:
                break
            total, left = total * part.size, left * part.width(self.counts)
        return left if total == size else size


def modules_of(model: object) -> Iterator[tuple[str, object]]:
    """Every module of a model with its path, the deepest first."""
    if isinstance(model, nnx.Module):
        for path, module in nnx.iter_modules(model):
            yield "/".join(map(str, path)), module
        return
    yield from _walk(model, ())


def _walk(node: object, path: tuple[str, ...]) -> Iterator[tuple[str, object]]:
    if dataclasses.is_dataclass(node) and not isinstance(node, type):
        below = [(f.name, getattr(node, f.name, None)) for f in dataclasses.fields(node)]
    elif isinstance(node, list | tuple):
        below = [(str(i), x) for i, x in enumerate(node)]
    elif isinstance(node, dict):
        below = [(str(k), x) for k, x in node.items()]
    else:
        return
    for name, child in below:
        yield from _walk(child, (*path, name))
    if dataclasses.is_dataclass(node):
        yield "/".join(path), node


def below(path: str, axes: Mapping[str, tuple[Expr, ...]]) -> dict[str, tuple[Expr, ...]]:
    """The leaves of the module at `path`, by their path from there."""
    start = f"{path}/" if path else ""
    return {leaf.removeprefix(start): form for leaf, form in axes.items() if leaf.startswith(start)}


def known_edits(
    model: object, axes: Mapping[str, tuple[Expr, ...]], counts: Mapping[int, int]
) -> list[Edit]:
    """The edits of layers that are known by name."""
    found = []
    for path, module in modules_of(model):
        widths = Widths(below(path, axes), counts)
        for base in type(module).__mro__:
            library = base.__module__.split(".")[0]
            if (rule := _LAYERS.get((library, base.__name__))) is not None:
                found += [
                    Edit(module, name, value)
                    for name, value in rule(module, widths).items()
                    if hasattr(module, name) and getattr(module, name) != value
                ]
                break
    return found


def candidates(
    model: object, axes: Mapping[str, tuple[Expr, ...]], counts: Mapping[int, int]
) -> Iterator[list[Edit]]:
    """Sets of edits of modules that are not known, the smallest first, at most `MAX_TRIALS`.

    An edit is made of all modules of one class in the same way: attribute `heads` of every `Attention` becomes
    what is left of one axis, or of one factor of it, of the same leaf of each.
    """
    rules: dict[tuple[type, str], dict[tuple, list[Edit]]] = {}
    for path, module in modules_of(model):
        known = any(
            (b.__module__.split(".")[0], b.__name__) in _LAYERS for b in type(module).__mro__
        )
        sources = {} if known else _sources(below(path, axes), counts)
        for name, value in vars(module).items():
            places = rules.setdefault((type(module), name), {})
            numbers = value if type(value) is tuple else (value,)
            for i, number in enumerate(numbers):
                if type(number) is not int:
                    continue
                for source, (before, after) in sources.items():
                    if before == number and after != before:
                        new = (
                            after
                            if type(value) is int
                            else (*numbers[:i], after, *numbers[i + 1 :])
                        )
                        places.setdefault((i, source), []).append(Edit(module, name, new))
    choices = []
    for places in rules.values():
        different = {
            tuple((id(e.module), e.value) for e in edits): edits for edits in places.values()
        }
        # What reaches more modules of the class comes first.
        ordered = list(different.values())
        longest = max(map(len, ordered), default=0)
        choices += (
            [[e for n in range(longest, 0, -1) for e in ordered if len(e) == n]] if ordered else []
        )
    trials = (
        list(itertools.chain.from_iterable(picked))
        for number in range(1, len(choices) + 1)
        for some in itertools.combinations(choices, number)
        for picked in itertools.product(*some)
    )
    yield from itertools.islice(trials, MAX_TRIALS)


def _sources(
    axes: Mapping[str, tuple[Expr, ...]], counts: Mapping[int, int]
) -> dict[tuple, tuple[int, int]]:
    """What is left of every axis, and of every part of one, by leaf, axis and place in it."""
    found = {}
    for leaf, form in axes.items():
        for d, axis in enumerate(form):
            todo = [((leaf, d), axis)]
            while todo:
                place, part = todo.pop(0)
                found[place] = (part.size, part.width(counts))
                todo += [((*place, i), inner) for i, inner in enumerate(part.parts)]
                if part.kind == "product":  # heads, where an axis is groups of heads x heads x size
                    for i, j in itertools.combinations(range(len(part.parts) + 1), 2):
                        run = part.parts[i:j]
                        sizes = (
                            math.prod(p.size for p in run),
                            math.prod(p.width(counts) for p in run),
                        )
                        found[(*place, i, "to", j)] = sizes
    return found


def _linear(m, w: Widths) -> dict[str, object]:
    return {"in_features": w.shape("kernel")[-2], "out_features": w.shape("kernel")[-1]}


def _linear_general(m, w: Widths) -> dict[str, object]:
    ins, outs, shape = len(m.in_features), len(m.out_features), w.shape("kernel")
    first = len(shape) - ins - outs
    return {"in_features": shape[first : first + ins], "out_features": shape[first + ins :]}


def _conv(m, w: Widths) -> dict[str, object]:
    shape = w.shape("kernel")[-len(m.kernel_shape) :]
    groups = w.leading(w.axes["kernel"][-1], m.feature_group_count)
    return {
        "in_features": shape[-2] * groups,
        "out_features": shape[-1],
        "feature_group_count": groups,
        "kernel_shape": shape,
    }


def _conv_transpose(m, w: Widths) -> dict[str, object]:
    shape = w.shape("kernel")[-len(m.kernel_shape) :]
    ins, outs = (-1, -2) if getattr(m, "transpose_kernel", False) else (-2, -1)
    return {"in_features": shape[ins], "out_features": shape[outs], "kernel_shape": shape}


def _norm(m, w: Widths) -> dict[str, object]:
    for leaf in ("scale", "bias", "mean"):
        if leaf in w.axes:
            return {"num_features": w.shape(leaf)[-1]}
    return {}


def _group_norm(m, w: Widths) -> dict[str, object]:
    leaf = next((name for name in ("scale", "bias") if name in w.axes), None)
    if leaf is None:
        return {}
    groups = w.leading(w.axes[leaf][-1], m.num_groups)
    return {"num_groups": groups, "group_size": w.shape(leaf)[-1] // groups}


def _embed(m, w: Widths) -> dict[str, object]:
    return {"num_embeddings": w.shape("embedding")[-2], "features": w.shape("embedding")[-1]}


def _einsum(m, w: Widths) -> dict[str, object]:
    shapes: dict[str, object] = {"kernel_shape": w.shape("kernel")}
    return shapes | ({"bias_shape": w.shape("bias")} if "bias" in w.axes else {})


def _attention(m, w: Widths) -> dict[str, object]:
    query, key, out = (w.shape(f"{name}/kernel") for name in ("query", "key", "out"))
    return {
        "num_heads": query[-2],
        "num_kv_heads": key[-2],
        "head_dim": query[-1],
        "in_features": query[-3],
        "in_kv_features": key[-3],
        "qkv_features": query[-2] * query[-1],
        "out_features": out[-1],
    }


def _lora(m, w: Widths) -> dict[str, object]:
    return {"in_features": w.shape("lora_a")[-2], "out_features": w.shape("lora_b")[-1]}


def _cell(m, w: Widths) -> dict[str, object]:
    return {"in_features": w.shape("ii/kernel")[-2], "hidden_features": w.shape("hi/kernel")[-1]}


def _eqx_linear(m, w: Widths) -> dict[str, object]:
    scalar = {name for name in ("in_features", "out_features") if getattr(m, name) == "scalar"}
    new = {"in_features": w.shape("weight")[-1], "out_features": w.shape("weight")[-2]}
    return {name: value for name, value in new.items() if name not in scalar}


def _eqx_conv(m, w: Widths) -> dict[str, object]:
    shape = w.shape("weight")
    groups = w.leading(w.axes["weight"][0], m.groups)
    return {"in_channels": shape[1] * groups, "out_channels": shape[0], "groups": groups}


def _eqx_norm(m, w: Widths) -> dict[str, object]:
    return {"shape": w.shape("weight")} if "weight" in w.axes else {}


def _eqx_embedding(m, w: Widths) -> dict[str, object]:
    return {"num_embeddings": w.shape("weight")[0], "embedding_size": w.shape("weight")[1]}


_LAYERS: dict[tuple[str, str], Callable[[object, Widths], dict[str, object]]] = {
    ("flax", "Linear"): _linear,
    ("flax", "LinearGeneral"): _linear_general,
    ("flax", "Conv"): _conv,
    ("flax", "ConvTranspose"): _conv_transpose,
    ("flax", "BatchNorm"): _norm,
    ("flax", "LayerNorm"): _norm,
    ("flax", "RMSNorm"): _norm,
    ("flax", "InstanceNorm"): _norm,
    ("flax", "GroupNorm"): _group_norm,
    ("flax", "Embed"): _embed,
    ("flax", "Einsum"): _einsum,
    ("flax", "MultiHeadAttention"): _attention,
    ("flax", "LoRA"): _lora,
    ("flax", "LSTMCell"): _cell,
    ("equinox", "Linear"): _eqx_linear,
    ("equinox", "Conv"): _eqx_conv,
    ("equinox", "LayerNorm"): _eqx_norm,
    ("equinox", "RMSNorm"): _eqx_norm,
    ("equinox", "Embedding"): _eqx_embedding,
}
