"""Which leaves are sparsified: rules on the path and the leaf.

By default floating-point kernels: leaves of two or more dimensions that are neither an embedding nor
a normalisation nor a bias by the whole words of their last two keys (`norm1/weight`, `LayerNorm_0`,
but not `normalizing_flow/dense/kernel`), and that are no stack of vectors beside a stack of kernels.
A path is the keys from the root joined by "/", as in `encoder/layers/0/attention/query/kernel`;
where keys that contain "/" would give two leaves one path, these two are called by `keystr`.

`targets=` of every method takes

- `None`: the default;
- a string: a regular expression (`re.search`); only leaves whose path matches;
- a sequence of `(regular expression, value)`: the first that matches decides; where none does, the
  default. A value is `True`, `False`, or `stacked(k)`: sparsify, and the `k` leading axes of the
  leaf stack independent layers (as `nn.scan` and `nnx.vmap` make them), each with its own budget;
  leaves whose layers are vectors (gains and biases of a stack) then stay dense;
- a function `(path, leaf) -> bool | stacked`.

Leaves without any element stay dense whatever is asked.

A rule that matches no leaf is an error: a misspelt pattern must not go unnoticed.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class stacked:
    """The leaf is sparsified; its `axes` leading axes stack independent layers."""

    axes: int = 1

    def __post_init__(self):
        if self.axes < 1:
            raise ValueError(f"stacked(axes={self.axes}): give at least one leading axis")


Rule = tuple[str, "bool | stacked"]
Targets = None | str | Sequence[Rule] | Callable[[str, Any], "bool | stacked"]

_EMBEDDINGS = {"embed", "embeds", "embedding", "embeddings"}
_NORMS = {
    *("norm", "norms", "ln", "bn", "gn", "normalization", "normalisation"),
    *("layernorm", "batchnorm", "groupnorm", "rmsnorm", "instancenorm"),
}
_VECTORS = {"bias", "biases", "scale", "scales", "offset", "gain", "gamma", "beta"}
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")


class Selected(NamedTuple):
    """What a rule said of one leaf: sparsified or not, how many leading axes are stacked, and, of a
    dense leaf, why it is."""

    path: str
    selected: bool
    lead: int
    why: str = ""


def path_name(path) -> str:
    """The path of a leaf as one string; `named_leaves` gives those of a whole tree.

    Without the tree, an attribute `value`, `raw_value` or `box` at the end is taken for that of a
    wrapper of Flax, which does not show. Keys of dictionaries always do.

    >>> tree = {"layers": [{"kernel": 1.0, "value": 2.0}]}
    >>> [path_name(p) for p, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]
    ['layers/0/kernel', 'layers/0/value']
    """
    keys = list(path)
    while len(keys) > 1 and _is_attribute_of_a_box(keys[-1]):
        keys.pop()
    return _joined(keys)


def _is_attribute_of_a_box(key) -> bool:
    attribute = isinstance(key, jax.tree_util.GetAttrKey)
    return attribute and key.name in ("value", "raw_value", "box")


def _joined(keys) -> str:
    return "/".join(jax.tree_util.keystr((key,), simple=True) for key in keys)


def named_leaves(tree, is_leaf: Callable[[Any], bool] | None = None) -> list[tuple[str, Any]]:
    """The path and the value of every leaf, in the order of `jax.tree.leaves`. No two leaves share a
    path. Variables of NNX and boxes of Linen do not show.

    >>> [path for path, _ in named_leaves({"a": {"value": 1, "box": 2}, "b": [3]})]
    ['a/box', 'a/value', 'b/0']
    >>> [path for path, _ in named_leaves({"a": {"b": 1}, "a/b": 2})]
    ["['a']['b']", "['a/b']"]
    """
    boxes = _boxes()
    stop = lambda x: isinstance(x, boxes) or (is_leaf is not None and is_leaf(x))
    found = []
    for path, node in jax.tree_util.tree_flatten_with_path(tree, is_leaf=stop)[0]:
        inner = [((), node)]
        if isinstance(node, boxes):
            inner = jax.tree_util.tree_flatten_with_path(node, is_leaf=is_leaf)[0]
        found += [(path if len(inner) == 1 else (*path, *below), leaf) for below, leaf in inner]
    names = [_joined(keys) for keys, _ in found]
    times = Counter(names)
    rows = zip(names, found)
    named = [(n if times[n] == 1 else jax.tree_util.keystr(k), x) for n, (k, x) in rows]
    if len({name for name, _ in named}) < len(named):
        raise ValueError(
            f"params: several leaves are called {times.most_common(1)[0][0]!r}; give the keys of "
            "every node of the tree names of their own"
        )
    return named


def _boxes() -> tuple[type, ...]:
    """The wrappers of Flax. Where its modules are not imported there are none."""
    types = [("flax.nnx", "Variable"), ("flax.core.meta", "AxisMetadata")]
    return tuple(getattr(sys.modules[m], name) for m, name in types if m in sys.modules)


def is_kernel(path: str, leaf) -> bool:
    """The default rule of one leaf: floating point, two or more dimensions, and neither an embedding
    nor a normalisation nor a bias by the whole words of its last two keys.

    >>> is_kernel("normalizing_flow/dense/kernel", jnp.ones((2, 2)))
    True
    >>> is_kernel("block/norm1/weight", jnp.ones((3, 2)))
    False
    """
    return not _why_dense(path, leaf)


def _why_dense(path: str, leaf) -> str:
    """Why the default rule leaves this leaf dense; empty if it does not."""
    dtype = leaf.dtype if hasattr(leaf, "dtype") else jnp.asarray(leaf).dtype
    if not jnp.issubdtype(dtype, jnp.floating):
        return f"{dtype}"
    if jnp.ndim(leaf) < 2:
        return "vector" if jnp.ndim(leaf) else "scalar"
    if 0 in jnp.shape(leaf):
        return "no elements"
    keys = [_words(key) for key in path.split("/") if not key.isdigit()][-2:] or [set()]
    for kind, words in (("embedding", _EMBEDDINGS), ("normalisation", _NORMS)):
        if any(key & words for key in keys):
            return kind
    return "bias or scale" if keys[-1] & _VECTORS else ""


def _words(key: str) -> set[str]:
    """The words of a key in lower case: `LayerNorm_0` has "layer" and "norm"."""
    return {word.lower() for word in _WORD.findall(key)}


def _stacked_vectors(named) -> set[str]:
    """Leaves [layers, n] beside a kernel [layers, ..., n] in the same module: a stack of vectors."""
    module = lambda path: path.rpartition("/")[0]
    kernels = {
        (module(path), jnp.shape(x)[0], jnp.shape(x)[-1]) for path, x in named if jnp.ndim(x) > 2
    }
    return {
        path for path, x in named if jnp.ndim(x) == 2 and (module(path), *jnp.shape(x)) in kernels
    }


def select(params, targets: Targets = None) -> list[Selected]:
    """Applies `targets` to every leaf of `params`, in the order of `jax.tree.leaves`.

    Raises:
      ValueError: a pattern is not a regular expression, matches no leaf, or selects a leaf that is
        not floating point; a stack whose leaves all have too few dimensions for it.
    """
    named = named_leaves(params)
    if not named:
        return []
    if callable(targets):
        return [_check(path, leaf, targets(path, leaf)) for path, leaf in named]
    rules, vectors = _compile(targets), _stacked_vectors(named)
    hits = [[i for i, (p, _) in enumerate(rules) if p.search(path)] for path, _ in named]
    unmatched = [p.pattern for i, (p, _) in enumerate(rules) if not any(i in h for h in hits)]
    if unmatched:
        raise ValueError(unmatched_message("targets", unmatched, [path for path, _ in named]))
    # Of a stacked module the vectors stay dense, unless the rule means nothing but vectors.
    deep = {h[0] for h, (_, x) in zip(hits, named) if h and jnp.ndim(x) - _lead(rules[h[0]][1]) > 1}
    found = []
    for (path, leaf), hit in zip(named, hits):
        if not hit:
            why = _why_dense(path, leaf) or ("stacked vectors" if path in vectors else "")
            why = why if not isinstance(targets, str) else "not in targets"
            found.append(Selected(path, not why, 0, why))
            continue
        answer = rules[hit[0]][1]
        shallow = isinstance(answer, stacked) and jnp.ndim(leaf) - answer.axes < 2
        if shallow and hit[0] in deep:
            found.append(Selected(path, False, 0, "stacked vectors"))
        else:
            found.append(_check(path, leaf, answer))
    return found


def _lead(answer: bool | stacked) -> int:
    return answer.axes if isinstance(answer, stacked) else 0


def check_matched(argument: str, patterns: Iterable[str], paths: Sequence[str]) -> None:
    """Raises `ValueError` if one of the patterns matches none of the paths."""
    unmatched = [p for p in patterns if not any(re.search(p, path) for path in paths)]
    if unmatched:
        raise ValueError(unmatched_message(argument, unmatched, paths))


def unmatched_message(argument: str, patterns: Sequence[str], paths: Sequence[str]) -> str:
    """The error text for patterns that no path matches, with the closest paths."""
    words = [re.sub(r"[^\w/]+", " ", p).strip() for p in patterns]
    close = [c for w in words for c in difflib.get_close_matches(w, paths, n=3, cutoff=0.3)]
    shown = list(dict.fromkeys(close)) or list(paths[:8])
    return (
        f"{argument}: no leaf matches {', '.join(map(repr, patterns))}; paths look like "
        f"{', '.join(map(repr, shown))} ({len(paths)} leaves in all)"
    )


def _compile(targets) -> list[tuple[re.Pattern, bool | stacked]]:
    if targets is None:
        return []
    rules = [(targets, True)] if isinstance(targets, str) else list(targets)
    compiled = []
    for rule in rules:
        if not (isinstance(rule, tuple | list) and len(rule) == 2):
            raise ValueError(
                f"targets: expected pairs (pattern, True | False | stacked(k)), got {rule!r}"
            )
        pattern, value = rule
        if not isinstance(value, bool | stacked):
            raise ValueError(
                f"targets: {pattern!r} has the value {value!r}; use True, False or stacked(k)"
            )
        try:
            compiled.append((re.compile(pattern), value))
        except re.error as error:
            raise ValueError(f"targets: {pattern!r} is not a regular expression: {error}") from None
    return compiled


def _check(path: str, leaf, answer: bool | stacked) -> Selected:
    lead = _lead(answer)
    if answer is False or not (lead or answer):
        return Selected(path, False, 0, "not in targets")
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        raise ValueError(
            f"targets: {path!r} has dtype {leaf.dtype}; only floating-point leaves can be sparse"
        )
    if jnp.ndim(leaf) <= lead:
        raise ValueError(
            f"targets: {path!r} has shape {jnp.shape(leaf)}, too few dimensions for "
            f"stacked({lead}) and a layer"
        )
    if 0 in jnp.shape(leaf):
        return Selected(path, False, lead, "no elements")
    return Selected(path, True, lead)
