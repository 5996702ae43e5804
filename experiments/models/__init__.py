"""Flax NNX models by name.

Every model maps `x` [batch, *shape] to logits; `create` fills in what the data set decides. A module
with batch normalisation takes `axis_name`, the name of the device axis under `jax.pmap`; deep ones take
`rows`, the sharding of the batch where parameters are sharded too.
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

_FROM_DATA = ("self", "shape", "num_classes", "rngs", "axis_name", "rows")


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
    model = MODELS[name]
    takes = inspect.signature(model.__init__).parameters
    known = [p for p in takes if p not in _FROM_DATA]
    for option in options:
        if option not in known:
            raise ValueError(f"model={name!r} has no option {option!r}; it has: {', '.join(known)}")
    if isinstance(options.get("dtype"), str):
        options["dtype"] = jnp.dtype(options["dtype"])
    placed = {"axis_name": axis_name, "rows": rows}
    options |= {name: value for name, value in placed.items() if name in takes}
    return model(shape, num_classes, rngs=rngs, **options)
