"""Options that a study is given on the command line, and the commands that it notes in its pages."""

import ast
from collections.abc import Iterable, Mapping
from typing import Any


def read_options(texts: Iterable[str]) -> dict[str, Any]:
    """`name=value` texts, values as Python literals where they are ones.

    >>> read_options(["allocation=erk", "soft=False", "threshold=0.03"])
    {'allocation': 'erk', 'soft': False, 'threshold': 0.03}

    Raises:
      ValueError: a text without a name or a value.
    """
    options: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not (name and equals and value):
            raise ValueError(f"options: {text!r} is not of the form name=value")
        try:
            options[name] = ast.literal_eval(value)
        except (SyntaxError, ValueError):
            options[name] = value
    return options


def commands_block(points: Iterable[Mapping[str, Any]]) -> str:
    """The commands that trained these points, in order, as a block of a page."""
    commands = dict.fromkeys(p["command"] for p in points if p.get("command"))
    return "```\n" + "\n".join(commands) + "\n```"
