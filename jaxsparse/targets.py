"""Which leaves are sparsified: rules on the path and the leaf.

By default floating-point leaves with two or more dimensions whose path names neither an embedding
nor a normalisation nor a bias. A path is the keys from the root joined by "/", as in
`encoder/layers/0/attention/query/kernel`.

`targets=` of every method takes

- `None`: the default;
- a string: a regular expression (`re.search`); only leaves whose path matches;
- a sequence of `(regular expression, value)`: the first that matches decides; where none does, the
  default. A value is `True`, `False`, or `stacked(k)`: sparsify, and the `k` leading axes of the
  leaf stack independent layers (as `nn.scan` and `nnx.vmap` make them), each with its own budget;
- a function `(path, leaf) -> bool`.

A rule that matches no leaf is an error: a misspelt pattern must not go unnoticed.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
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
Targets = None | str | Sequence[Rule] | Callable[[str, Any], bool]

_EXCLUDED = re.compile(r"embed|norm|(^|/)(bias|scale|offset|gamma|beta)$", re.IGNORECASE)


class Selected(NamedTuple):
    """What a rule said of one leaf: sparsified or not, and how many leading axes are stacked."""

    path: str
    selected: bool
    lead: int


def path_name(path) -> str:
    """The path of a leaf as one string; wrappers of Flax variables do not show.

    >>> tree = {"layers": [{"kernel": 1.0}]}
    >>> [path_name(p) for p, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]
    ['layers/0/kernel']
    """
    parts = [jax.tree_util.keystr((key,), simple=True) for key in path]
    while len(parts) > 1 and parts[-1] in ("value", "raw_value", "box"):
        parts.pop()
    return "/".join(parts)


def is_kernel(path: str, leaf) -> bool:
    """The default rule: a floating-point leaf of two or more dimensions that is not an embedding,
    a normalisation or a bias."""
    floating = jnp.issubdtype(
        jnp.asarray(leaf).dtype if not hasattr(leaf, "dtype") else leaf.dtype, jnp.floating
    )
    return bool(floating and jnp.ndim(leaf) >= 2 and not _EXCLUDED.search(path))


def select(params, targets: Targets = None) -> list[Selected]:
    """Applies `targets` to every leaf of `params`, in the order of `jax.tree.leaves`.

    Raises:
      ValueError: a pattern is not a regular expression, matches no leaf, or selects a leaf that is
        not floating point or has too few dimensions for its stacking.
    """
    named = [(path_name(p), leaf) for p, leaf in jax.tree_util.tree_flatten_with_path(params)[0]]
    if not named:
        return []
    if callable(targets):
        answers: list[bool | stacked] = [targets(path, leaf) for path, leaf in named]
    else:
        rules = _compile(targets)
        matched = [False] * len(rules)
        answers = []
        for path, leaf in named:
            answer: bool | stacked = (
                is_kernel(path, leaf) if not isinstance(targets, str) else False
            )
            hits = [i for i, (pattern, _) in enumerate(rules) if pattern.search(path)]
            for i in hits:
                matched[i] = True
            if hits:
                answer = rules[hits[0]][1]
            answers.append(answer)
        unmatched = [rules[i][0].pattern for i, hit in enumerate(matched) if not hit]
        if unmatched:
            raise ValueError(unmatched_message("targets", unmatched, [path for path, _ in named]))
    return [_check(path, leaf, answer) for (path, leaf), answer in zip(named, answers)]


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
    lead = answer.axes if isinstance(answer, stacked) else 0
    chosen = bool(answer) if isinstance(answer, bool) else True
    if chosen:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(
                f"targets: {path!r} has dtype {leaf.dtype}; only floating-point leaves can be sparse"
            )
        if jnp.ndim(leaf) <= lead:
            raise ValueError(
                f"targets: {path!r} has shape {jnp.shape(leaf)}, too few dimensions for "
                f"stacked({lead}) and a layer"
            )
    return Selected(path, chosen, lead)
