"""Arithmetic with scalars of which some are not known."""

from __future__ import annotations

from typing import Any


class Unknown:
    """Absorbs arithmetic; as a bool it reads True and is counted."""

    hits = 0

    def _u(self, *_):
        return self

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = _u
    __lshift__ = __rlshift__ = __rshift__ = __rrshift__ = __xor__ = __rxor__ = _u
    __lt__ = __le__ = __gt__ = __ge__ = _u
    __eq__ = __ne__ = _u  # pyright: ignore[reportAssignmentType]
    __neg__ = __floordiv__ = __rfloordiv__ = __mod__ = __rmod__ = _u
    __hash__ = object.__hash__

    def __and__(self, o):
        return o if (o is False or (o == 0 and o is not self)) else self

    __rand__ = __and__

    def __or__(self, o):
        return True if o is True else self

    __ror__ = __or__

    def __bool__(self):
        Unknown.hits += 1
        return True

    def __repr__(self):
        return "?"


U = Unknown()


def negate(p: Any) -> Any:
    """`not p` of a predicate."""
    return p if p is U else (not p)


def select(p: Any, a: Any, b: Any) -> Any:
    """`a if p else b`; unknown if p is, unless both are equal."""
    if p is U:
        return a if (a is not U and b is not U and a == b) else U
    return a if p else b


def unsigned(x: Any) -> Any:
    """The 32 bits of x as an unsigned integer."""
    return x if x is U else x & 0xFFFFFFFF


def signed(x: Any) -> Any:
    """The 32 bits of x as a signed integer."""
    if x is U:
        return x
    x &= 0xFFFFFFFF
    return x - (1 << 32) if x & 0x80000000 else x
