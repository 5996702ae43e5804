"""Flax NNX models by name.

Every model maps `x` [batch, *shape] to logits; `create` fills in what the data set decides. A module
with batch normalisation takes `axis_name`, the name of the device axis under `jax.pmap`; deep ones take
`rows`, the sharding of the batch where parameters are sharded too. One whose layers are stacked says so in
`stacked`.
"""

import difflib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding

from experiments.models.cnn import CNN
from experiments.models.mlp import MLP
from experiments.models.resnet import ResNet
from experiments.models.transformer import Transformer
from experiments.models.vit import ViT

MODELS: Mapping[str, Callable[..., nnx.Module]] = {
    "mlp": MLP,
    "cnn": CNN,
    "resnet": ResNet,
    "vit": ViT,
    "transformer": Transformer,
}

# What the data and the devices decide.
_GIVEN = ("self", "shape", "num_classes", "rngs", "axis_name", "rows")


def create(
    name: str,
    shape: tuple[int, ...],
    num_classes: int,
    *,
    rngs: nnx.Rngs,
    axis_name: str | None = None,
    rows: NamedSharding | None = None,
    **options: Any,
) -> nnx.Module:
    """Builds a model for inputs of `shape` (without the batch axis).

    `options` are the model's own; `dtype` may be the name of the type to compute in.

    Raises:
      ValueError: if there is no such model, or it has no such option.
    """
    if name not in MODELS:
        close = difflib.get_close_matches(name, MODELS, cutoff=0.4) or MODELS
        raise ValueError(f"model={name!r} is not known; close matches: {', '.join(close)}")
    model, known = MODELS[name], options_of(name)
    takes = inspect.signature(model.__init__).parameters
    for option in options:
        if option not in known:
            raise ValueError(f"model={name!r} has no option {option!r}; it has: {', '.join(known)}")
    if isinstance(options.get("dtype"), str):
        options["dtype"] = jnp.dtype(options["dtype"])
    placed = {"axis_name": axis_name, "rows": rows}
    options |= {name: value for name, value in placed.items() if name in takes}
    return model(shape, num_classes, rngs=rngs, **options)


def options_of(name: str) -> list[str]:
    """The names of the options that a model has of its own.

    >>> options_of("mlp")
    ['hidden', 'dtype', 'two_view']
    """
    return [p for p in inspect.signature(MODELS[name].__init__).parameters if p not in _GIVEN]


def stacked(model: nnx.Module) -> Mapping[str, int]:
    """Which parameters of a model stack layers: the number of their leading axes that do, by pattern
    of the path. A model says so in its attribute `stacked`; without it there are none."""
    return getattr(model, "stacked", None) or {}
