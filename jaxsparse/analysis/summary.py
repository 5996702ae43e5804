"""A table of what is sparse: per leaf and in total."""

from __future__ import annotations

import dataclasses
import html
from typing import Any

import jax
import numpy as np

from jaxsparse import masking
from jaxsparse.state import find_states, get_masks
from jaxsparse.targets import named_leaves, select

_LEFT = (0, 1, 7)  # columns of words


@dataclasses.dataclass(frozen=True)
class Row:
    """One leaf: `sparsity` is the fraction of exact zeros, `mask_sparsity` that of the mask (None
    at dense leaves), `bytes` the size of the array, `note` why the leaf is dense ("bias or scale",
    "vector", ...; "left out" where `targets=`, given masks or another method decided it), that
    its mask keeps nothing or, while others do not, everything (ERK does so with small layers), or that weights outside its mask are not 0 (see `jaxsparse.check`)."""

    path: str
    shape: tuple[int, ...]
    size: int
    nonzeros: int
    masked: int | None
    bytes: int
    note: str = ""

    @property
    def sparsity(self) -> float:
        """The fraction of entries that are exactly 0."""
        return 1.0 - self.nonzeros / self.size if self.size else 0.0

    @property
    def mask_sparsity(self) -> float | None:
        """The fraction of entries that the mask removes."""
        return None if self.masked is None or not self.size else self.masked / self.size


@dataclasses.dataclass(frozen=True)
class Summary:
    """The rows of `summarize`; prints as a table in a terminal and in a notebook."""

    rows: tuple[Row, ...]

    def _total(self, rows, name: str) -> Row:
        masked = [r.masked for r in rows if r.masked is not None]
        return Row(
            name,
            (),
            sum(r.size for r in rows),
            sum(r.nonzeros for r in rows),
            sum(masked) if masked else None,
            sum(r.bytes for r in rows),
        )

    @property
    def total(self) -> Row:
        """All leaves together."""
        return self._total(self.rows, "total")

    @property
    def sparse(self) -> Row:
        """The leaves that have a mask (all of them, if none has), together."""
        rows = [r for r in self.rows if r.masked is not None]
        return self._total(rows or self.rows, "sparse leaves")

    @property
    def sparsity(self) -> float:
        """The sparsity of the leaves that have a mask (of all, if none has)."""
        return self.sparse.sparsity

    def _table(self) -> list[tuple[str, ...]]:
        some, notes = self._masked, any(r.note for r in self.rows)
        totals = ([self.sparse] if some else []) + [self.total]
        body = []
        for r in (*self.rows, *totals):
            mask = "-" if r.mask_sparsity is None else f"{r.mask_sparsity:.2%}"
            shape = "x".join(map(str, r.shape)) if r.shape else ("" if r in totals else "scalar")
            body.append(
                (
                    r.path,
                    shape,
                    f"{r.size:,}",
                    f"{r.nonzeros:,}",
                    f"{r.sparsity:.2%}",
                    mask,
                    _bytes(r.bytes),
                    *([r.note] if notes else []),
                )
            )
        head = ("leaf", "shape", "size", "nonzero", "sparsity", "mask", "bytes")
        return [(*head, "note") if notes else head, *body]

    @property
    def _masked(self) -> bool:
        return any(r.masked is not None for r in self.rows)

    def __str__(self) -> str:
        table = self._table()
        widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
        lines = [
            "  ".join(
                c.ljust(w) if i in _LEFT else c.rjust(w)
                for i, (c, w) in enumerate(zip(row, widths))
            ).rstrip()
            for row in table
        ]
        rule = "-" * max(map(len, lines))
        totals = 2 if self._masked else 1
        return "\n".join([lines[0], rule, *lines[1:-totals], rule, *lines[-totals:]])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        head, *body = self._table()
        bold = {"sparse leaves", "total"}

        def cells(row, tag):
            align = ["left" if i in _LEFT else "right" for i in range(len(row))]
            return "".join(
                f'<{tag} style="text-align:{a};padding:2px 10px">{html.escape(c)}</{tag}>'
                for c, a in zip(row, align)
            )

        rows = "".join(f"<tr>{cells(r, 'th' if r[0] in bold else 'td')}</tr>" for r in body)
        return f"<table><thead><tr>{cells(head, 'th')}</tr></thead><tbody>{rows}</tbody></table>"

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers for logs: `sparsity`, `nonzeros`, `size`, `bytes`, and `leaves`, a dict of
        the same (and `mask_sparsity`) by path."""

        def of(r: Row) -> dict[str, Any]:
            return {
                "shape": list(r.shape),
                "size": r.size,
                "nonzeros": r.nonzeros,
                "sparsity": r.sparsity,
                "mask_sparsity": r.mask_sparsity,
                "bytes": r.bytes,
                "note": r.note,
            }

        total = self.total
        return {
            "sparsity": self.sparsity,
            "nonzeros": total.nonzeros,
            "size": total.size,
            "bytes": total.bytes,
            "leaves": {r.path: of(r) for r in self.rows},
        }


def _bytes(n: int) -> str:
    value, unit = float(n), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


def summarize(params, opt_state=None) -> Summary:
    """Shape, nonzeros, sparsity, sparsity of the mask and bytes, per leaf and in total; and of leaves
    that are left dense the reason.

    Args:
      params: any pytree of concrete arrays, or an `nnx.Module`.
      opt_state: the optimizer state, or an `nnx.Optimizer`, to show the masks as well.

    A matrix that is stored as blocks or weight by weight (`values`, `due` and so on, see `jaxsparse.stored`)
    is one row: the matrix that it stands for, of the outputs that are stored, with the bytes that are.

    >>> import jax.numpy as jnp
    >>> print(summarize({"kernel": jnp.eye(4)}))
    leaf    shape  size  nonzero  sparsity  mask  bytes
    ---------------------------------------------------
    kernel  4x4      16        4    75.00%     -   64 B
    ---------------------------------------------------
    total            16        4    75.00%     -   64 B
    """
    tree = masking.plain(params)
    leaves, by_default = named_leaves(tree), select(tree)
    masks = [None] * len(leaves)
    if opt_state is not None and find_states(opt_state):
        masks = masking.at_leaves(get_masks(opt_state), tree)
    updated = any(int(np.max(s.count)) > 0 for s in find_states(opt_state))
    pruned = any(m is not None and not bool(np.all(m)) for m in masks)
    left_out = "left out" if any(m is not None for m in masks) else ""
    rows = []
    for (path, leaf), chosen, mask in zip(leaves, by_default, masks):
        x, removed, note = np.asarray(jax.device_get(leaf)), None, chosen.why or left_out
        if mask is not None:
            removed = int(x.size - np.count_nonzero(np.asarray(mask)))
            note = "empty mask" if removed == x.size > 0 else ""
            note = "kept whole by its budget" if removed == 0 and pruned else note
            leaked = int(np.count_nonzero(x[~np.asarray(mask)]))
            note = f"{leaked:,} nonzero outside the mask" if leaked and updated else note
        rows.append(Row(path, x.shape, x.size, int(np.count_nonzero(x)), removed, x.nbytes, note))
    return Summary(tuple(_joined(rows, dict(leaves))))


PARTS = ("values", "places", "rows", "outputs", "scores", "due")
"""The leaves of a matrix that is stored, see `jaxsparse.stored`."""


def _joined(rows: list[Row], leaves: dict[str, Any]) -> list[Row]:
    """The rows, with one for the parts of each matrix that is stored."""
    by_path, joined = {r.path: r for r in rows}, {}
    for path in by_path:
        parent, _, name = path.rpartition("/")
        parts = {n: f"{parent}/{n}".lstrip("/") for n in PARTS}
        parts = {n: by_path[p] for n, p in parts.items() if p in by_path}
        needed = {"places": {"scores"}, "rows": {"outputs"}}.get(name)
        if needed is None or not needed | {"values", "due"} <= set(parts):
            continue
        values, *lead, high = parts["values"], *parts["due"].shape
        places, (tall, wide) = np.asarray(leaves[path]), values.shape[-2:]
        if name == "places":
            shape = (*lead, high * tall, parts["scores"].shape[-1] * wide)
            used = int(np.count_nonzero(places[..., 0, :] < high)) * tall * wide
        else:
            shape, used = (*lead, high, tall), int(np.count_nonzero(places < high))
        size, stored = int(np.prod(shape)), sum(p.bytes for p in parts.values())
        kernel = f"{parent}/kernel".lstrip("/")
        note = "stored blocks" if name == "places" else "stored weights"
        row = Row(kernel, shape, size, values.nonzeros, size - used, stored, note)
        joined |= {p.path: None for p in parts.values()} | {values.path: row}
    return [r for r in (joined.get(r.path, r) for r in rows) if r is not None]
