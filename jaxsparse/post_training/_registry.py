"""The methods by name. A new one is a file with its core, and an entry here; or a `Method` of one's own,
handed to `prune`."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any, Literal

from jax import Array

from jaxsparse.post_training._layer import Pruned
from jaxsparse.post_training.alps import alps_core
from jaxsparse.post_training.chita import chita_core
from jaxsparse.post_training.dsnot import dsnot_core
from jaxsparse.post_training.exact_obs import exact_obs_core
from jaxsparse.post_training.fisher import obd_core, woodfisher_core
from jaxsparse.post_training.gqsa import gqsa_core
from jaxsparse.post_training.magnitude import magnitude_core
from jaxsparse.post_training.net_trim import net_trim_core
from jaxsparse.post_training.ria import ria_core
from jaxsparse.post_training.sparsegpt import sparsegpt_core
from jaxsparse.post_training.statistics import Inputs
from jaxsparse.post_training.wanda import wanda_core
from jaxsparse.post_training.wanda_plus_plus import tune_block, wanda_plus_plus_core


@dataclasses.dataclass(frozen=True)
class Method:
    """A method of pruning one layer.

    Attributes:
      name: how it is called.
      core: `core(w, *what, sparsity, structure=..., **options) -> Pruned`.
      what: the arguments of the core that come from the inputs, `[in, ...]`.
      gram: whether it needs the Gram matrix of the inputs, not norms alone.
      rows: whether it needs the inputs themselves, `Inputs.rows`.
      gradients: whether it needs gradients of samples, `Inputs.gradients`: of the loss, or of the norm of
        what the block gives ("region").
      tune: what changes the parameters of a block before it is pruned, as `wanda_plus_plus.tune_block`.

    >>> from jaxsparse import post_training as pt
    >>> def first(w, squares, sparsity, *, structure=None):  # a method of one's own
    ...     return pt.wanda_core(w, squares[::-1], sparsity, structure=structure)
    >>> Method("first", first, lambda x: (x.squares,)).options
    ()
    """

    name: str
    core: Callable[..., Pruned]
    what: Callable[[Inputs], tuple[Array | None, ...]]
    gram: bool = False
    rows: bool = False
    gradients: Literal["", "loss", "region"] = ""
    tune: Callable[..., list[Any]] | None = None

    @property
    def options(self) -> tuple[str, ...]:
        """The keywords of the core besides `structure`, and those of `tune`."""
        return (*_keywords(self.core), *self.tune_options)

    @property
    def tune_options(self) -> tuple[str, ...]:
        """The keywords of `tune`."""
        return () if self.tune is None else _keywords(self.tune)


def _keywords(function: Callable[..., Any]) -> tuple[str, ...]:
    parameters = inspect.signature(function).parameters.values()
    return tuple(p.name for p in parameters if p.kind == p.KEYWORD_ONLY and p.name != "structure")


def _moments(x: Inputs) -> tuple[Array, Array]:
    count = x.count.clip(1.0)
    return x.sum / count, x.squares / count


def _gradients(x: Inputs) -> tuple[Array | None, ...]:
    return (x.gradients,)


METHODS: dict[str, Method] = {
    m.name: m
    for m in (
        Method("magnitude", magnitude_core, lambda x: ()),
        Method("wanda", wanda_core, lambda x: (x.squares,)),
        Method("ria", ria_core, lambda x: (x.squares,)),
        Method("dsnot", dsnot_core, _moments),
        Method("sparsegpt", sparsegpt_core, lambda x: (x.gram,), gram=True),
        Method("exact_obs", exact_obs_core, lambda x: (x.gram,), gram=True),
        Method("alps", alps_core, lambda x: (x.gram,), gram=True),
        Method("gqsa", gqsa_core, lambda x: (x.gram,), gram=True),
        Method("net_trim", net_trim_core, lambda x: (x.rows,), rows=True),
        Method("obd", obd_core, _gradients, gradients="loss"),
        Method("woodfisher", woodfisher_core, _gradients, gradients="loss"),
        Method(
            "mfac",
            functools.partial(woodfisher_core, block=None, steps=16),
            _gradients,
            gradients="loss",
        ),
        Method("chita", chita_core, _gradients, gradients="loss"),
        Method(
            "wanda_plus_plus",
            wanda_plus_plus_core,
            lambda x: (x.squares, x.gradients),
            gradients="region",
            tune=tune_block,
        ),
    )
}


def resolve(method: str | Method) -> Method:
    """A method by its name, or the method itself.

    Raises:
      ValueError: an unknown name.
    """
    if isinstance(method, Method):
        return method
    if method not in METHODS:
        raise ValueError(
            f"method={method!r}: give one of {sorted(METHODS)}, or a post_training.Method"
        )
    return METHODS[method]
