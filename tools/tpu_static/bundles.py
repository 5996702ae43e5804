"""The compiler's final schedule of a kernel, a bundle of instructions per cycle."""

from __future__ import annotations

import re
from typing import NamedTuple


class Op(NamedTuple):
    """One instruction: `(guard) dest = opcode args`. `reg` is the register in `dest`; the guard is a
    predicate register, negated if its first entry is "!"."""

    dest: str
    reg: str | None
    opcode: str
    guard: tuple[str, str] | None
    args: str
    raw: str
    note: str


class Bundle(NamedTuple):
    """The instructions of one cycle."""

    addr: int
    ops: list[Op]


HEAD = re.compile(r"^ *(0x[0-9a-f]+|0) +(?:([A-Z]{2}) *)?: *((?:> *)*)\{", re.M)
_OP = re.compile(r"%(\w+) = ([a-zA-Z][\w.\-]*)\s*(.*)$", re.S)
NAMED = re.compile(r"/\*(size_in_granules|dst_syncflagno)=\*/\s*(\S+?)(?=[,\s]|$)")


def _strip_comments(s: str) -> tuple[str, str]:
    """Remove /* ... */, which nest in these listings.  Returns text, comments."""
    out, notes, depth, i, start = [], [], 0, 0, 0
    for m in re.finditer(r"/\*|\*/", s):
        if m.group() == "/*":
            if depth == 0:
                out.append(s[i : m.start()])
                start = m.end()
            depth += 1
        elif depth:
            depth -= 1
            if depth == 0:
                notes.append(s[start : m.start()])
                i = m.end()
    if depth == 0:
        out.append(s[i:])
    return "".join(out), " ".join(notes)


def parse_bundles(text: str) -> list[Bundle]:
    """The bundles of a listing, in order."""
    k = text.find("= control target key end")
    text = text[k + len("= control target key end") :] if k >= 0 else text
    heads = list(HEAD.finditer(text))
    out = []
    for i, h in enumerate(heads):
        body = text[h.end() : heads[i + 1].start() if i + 1 < len(heads) else len(text)]
        b = Bundle(int(h.group(1), 16), [])
        for raw in _split_ops(body):
            txt, note = _strip_comments(raw)
            m = _OP.match(txt.strip())
            if not m:
                continue
            dest, opcode, rest = m.groups()
            r = re.search(r"_((?:s|p|v|vm)\d+)$", dest)
            rest = re.sub(r"^\[thread:\$?\d+\]\s*", "", rest.strip())
            g = re.match(r"\((!?)%\w*?_?(p\d+)(?:,\s*[^()]*)?\)\s*,?\s*", rest)
            guard = (g.group(1), g.group(2)) if g else None
            if g:
                rest = rest[g.end() :]
            elif opcode == "sld":  # loads carry their predicate last
                g = re.search(r"\s*\((!?)%\w*?_?(p\d+)\)\s*$", rest)
                if g:
                    guard, rest = (g.group(1), g.group(2)), rest[: g.start()]
            reg = r.group(1) if r else None
            b.ops.append(Op(dest, reg, opcode, guard, rest, raw, note))
        out.append(b)
    return out


def _split_ops(body: str) -> list[str]:
    """Cut a bundle's text at top-level ';;', dropping what follows its '}'."""
    parts, depth, brace, last = [], 0, 0, 0
    for m in re.finditer(r"/\*|\*/|;;|\{|\}", body):
        t = m.group()
        if t == "/*":
            depth += 1
        elif t == "*/":
            depth = max(0, depth - 1)
        elif depth:
            continue
        elif t == ";;":
            parts.append(body[last : m.start()])
            last = m.end()
        elif t == "{":
            brace += 1
        elif brace:
            brace -= 1
        else:
            parts.append(body[last : m.start()])
            return parts
    parts.append(body[last:])
    return parts
