"""What every field of a config may be, in one place: type, range, and relation to other fields.

`check` is called before a run does anything else. A wrong value is an error that names its field, its value
and what would do; without it a gradient clipped to a negative norm would train uphill, and a run that keeps no
checkpoint would end without one. What depends on the machine (its devices) or on the data is checked where it
is known: `parallel.create`, `datasets.load`.
"""

import difflib
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

import jaxsparse
from experiments import models, optimizer, parallel, storage

# What is wrong with a value, or None.
Rule = Callable[[Any], str | None]

# Seeds are 32 bits wide: larger ones would repeat smaller ones.
SEEDS = 2**32


def integer(least: int, most: int | None = None) -> Rule:
    """A whole number of at least `least` and at most `most`."""

    def rule(value):
        right = isinstance(value, int | np.integer) and not isinstance(value, bool)
        if right and value >= least and (most is None or value <= most):
            return None
        between = f"of at least {least}" if most is None else f"from {least} to {most}"
        return f"must be a whole number {between}"

    return rule


def number(
    least: float | None = None,
    *,
    above: float | None = None,
    below: float | None = None,
    most: float | None = None,
    infinite: bool = False,
) -> Rule:
    """A number in a range, finite unless `infinite`."""
    limits = {"at least": least, "above": above, "below": below, "at most": most}
    words = " and ".join(f"{name} {x:g}" for name, x in limits.items() if x is not None)

    def rule(value):
        right = isinstance(value, int | float | np.integer | np.floating) and not isinstance(
            value, bool
        )
        if (
            right
            and (math.isfinite(value) or (infinite and not math.isnan(value)))
            and (least is None or value >= least)
            and (above is None or value > above)
            and (below is None or value < below)
            and (most is None or value <= most)
        ):
            return None
        return f"must be a {'' if infinite else 'finite '}number {words}"

    return rule


def one_of(names: Iterable[str]) -> Rule:
    """One of these texts; a wrong one is told its neighbours."""
    names = list(names)

    def rule(value):
        if isinstance(value, str) and value in names:
            return None
        close = difflib.get_close_matches(str(value), names, cutoff=0.6)
        hint = f"did you mean {' or '.join(map(repr, close))}? " if close else ""
        return f"{hint}choose from {', '.join(names)}"

    return rule


def text(value: Any) -> str | None:
    """A text that is not empty."""
    return None if isinstance(value, str) and value else "must be a text that is not empty"


def read_by(read: Callable[[str], Any]) -> Rule:
    """A text that `read` takes without an error."""

    def rule(value):
        if not isinstance(value, str):
            return "must be a text"
        try:
            read(value)
        except (ValueError, re.error) as error:
            return str(error)
        return None

    return rule


def yes_or_no(value: Any) -> str | None:
    """`True` or `False`."""
    return None if isinstance(value, bool) else "must be True or False"


def optional(rule: Rule) -> Rule:
    """As `rule`, or `None`."""

    def or_none(value):
        if value is None:
            return None
        wrong = rule(value)
        return wrong and f"{wrong}, or None"

    return or_none


FIELDS: Mapping[str, Rule] = {
    "method": one_of(jaxsparse.METHODS),
    "sparsity": number(0.0, below=1.0),
    "storage": one_of(storage.STORAGES),
    "sketch": optional(integer(1)),
    "structure": optional(read_by(jaxsparse.structures.parse)),
    "options.update_every": optional(integer(1)),
    "options.begin_step": optional(integer(0)),
    "options.end_step": optional(integer(0)),
    "options.initial_sparsity": optional(number(0.0, below=1.0)),
    "options.drop_fraction": optional(number(0.0, most=1.0)),
    "options.allocation": optional(read_by(jaxsparse.allocations.resolve)),
    "options.targets": optional(read_by(re.compile)),
    "options.seed": optional(integer(0, SEEDS - 1)),
    "options.pack_masks": optional(yes_or_no),
    "dataset": text,
    "data_dir": optional(text),
    "image_size": optional(integer(1)),
    "length": integer(1, 256),
    "reader_threads": integer(0),
    "reader_processes": integer(0),
    "model": one_of(models.MODELS),
    "seed": integer(0, SEEDS - 1),
    "batch_size": integer(1),
    "steps": integer(1),
    "optimizer": one_of(optimizer.INNER),
    "learning_rate": number(above=0.0),
    "decay": one_of(optimizer.DECAYS),
    "warmup_steps": integer(0),
    "cycles": integer(1),
    "weight_decay": number(0.0),
    "momentum": number(0.0, below=1.0),
    "label_smoothing": number(0.0, below=1.0),
    "clip_norm": optional(number(above=0.0)),
    "parallel": one_of(parallel.STRATEGIES),
    "tensor": integer(1),
    "microbatches": integer(0),
    "log_every": integer(1),
    "eval_every": integer(1),
    "checkpoint_every": integer(1),
    "keep_checkpoints": integer(1),
    "max_loss": number(above=0.0, infinite=True),
}


def check(config: Any) -> None:
    """Refuses a config that cannot be run as it says.

    Args:
      config: as `configs.base.get_config` makes it.

    Raises:
      ValueError: names every field with a wrong value, and says what would do.
    """
    check_by(config, FIELDS, free=("options", "model_options"), relations=_of_relations)


def check_by(
    config: Any,
    rules: Mapping[str, Rule],
    *,
    free: Collection[str] = (),
    relations: Callable[[Mapping[str, Any]], Iterable[tuple[str, str]]] = lambda values: (),
) -> None:
    """Refuses a config by the rules of its job.

    Args:
      config: a `ConfigDict`.
      rules: of every field, by dotted name.
      free: fields whose parts may be absent, or others than there are rules for.
      relations: what is wrong with fields that are right by themselves, as (name, what).

    Raises:
      ValueError: names every field with a wrong value, and says what would do.
    """
    values = flatten(config.to_dict())
    wrong = list(_of_fields(values, rules, free)) or list(relations(values))
    if wrong:
        raise ValueError(
            "; ".join(f"config.{name}={values.get(name)!r}: {what}" for name, what in wrong)
        )


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The fields by dotted name.

    >>> flatten({"seed": 0, "options": {"update_every": 5}, "model_options": {}})
    {'seed': 0, 'options.update_every': 5}
    """
    flat: dict[str, Any] = {}
    for name, value in values.items():
        inner = flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else None
        flat |= {prefix + name: value} if inner is None else inner
    return flat


def _of_fields(
    values: Mapping[str, Any], rules: Mapping[str, Rule], free: Collection[str]
) -> Iterator[tuple[str, str]]:
    """Fields with a value that is wrong whatever the others are."""
    for name, rule in rules.items():
        # Options may be gone from a config; what is left out has the method's default.
        if name not in values and name.partition(".")[0] not in free:
            yield name, "is missing"
        elif (wrong := rule(values.get(name))) is not None:
            yield name, wrong
    for name in values:
        # Of these the method and the model know more than the config lists.
        if name not in rules and name.partition(".")[0] not in free:
            close = difflib.get_close_matches(name, rules)
            yield name, "is no field" + (f"; did you mean {close[0]}?" if close else "")


def _of_relations(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Fields whose value contradicts that of another one."""
    v = values
    method = jaxsparse.METHODS[v["method"]]
    options = {
        name.removeprefix("options."): value
        for name, value in v.items()
        if name.startswith("options.") and value is not None
    }
    for name in options.keys() - method.options:
        yield (
            f"options.{name}",
            f"{method.name} has no such option; its are {_listed(method.options)}",
        )
    if v["structure"] is not None and "structure" not in method.options:
        yield "structure", f"{method.name} has no structure to choose"
    yield from storage.of_relations(v)
    takes = models.options_of(v["model"])
    for name in v:
        if name.startswith("model_options.") and name.split(".")[1] not in takes:
            yield name, f"{v['model']} has no such option; its are {_listed(takes)}"

    begin, end = options.get("begin_step", 0), options.get("end_step", v["steps"] - 1)
    for name in ("begin_step", "end_step"):
        if options.get(name, 0) >= v["steps"]:
            yield f"options.{name}", f"must be below steps={v['steps']}"
    if begin > end:
        yield "options.begin_step", f"must not be above options.end_step={end}"

    cycle = v["steps"] // v["cycles"]
    if not cycle:
        yield "cycles", f"must not be above steps={v['steps']}"
    elif v["warmup_steps"] >= cycle:
        of = f"steps={v['steps']}" + (f" over cycles={v['cycles']}" if v["cycles"] > 1 else "")
        yield (
            "warmup_steps",
            f"must be below {of}, for the learning rate to reach its peak and fall again; "
            f"{cycle // 10} would do",
        )

    pieces = v["microbatches"]
    if pieces & (pieces - 1) or (pieces and v["batch_size"] % pieces):
        yield (
            "microbatches",
            f"must be a power of two that divides batch_size={v['batch_size']}, or 0",
        )
    if v["tensor"] > 1 and v["parallel"] != "fsdp":
        yield "tensor", f"needs parallel='fsdp', not {v['parallel']!r}"
    if v["tensor"] > 1 and pieces:
        yield (
            "microbatches",
            f"not with tensor={v['tensor']}, whose devices add parts of one product in an order of "
            "their own",
        )


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))
