"""Gradients of samples, for methods that read them: of a loss of the whole model, or of one block.

A sample is a batch: the gradient of a mean over examples says less than those of the examples, so give
batches of one example (or of few) to methods that read gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxsparse.post_training.calibration import Stream

Loss = Callable[[Any, Any], Array]
"""`loss(outputs of the model, batch)`, a number."""


class LossGradients:
    """Gradients of a loss with respect to the kernels of a block; compiled once for all blocks."""

    def __init__(self, stream: Stream, loss: Loss):
        self.stream = stream
        self.leaves = sorted({k.view.leaf for k in stream.kernels})
        model, tree = stream.model, jax.tree.structure(stream.model.params)

        def value(mine: list[Any], params: list[Any], batch: Any) -> Array:
            params = list(params)
            for leaf, x in zip(self.leaves, mine):
                params[leaf] = x
            found = loss(model.function(tree.unflatten(params), batch), batch)
            if jnp.shape(found) != ():
                raise ValueError(
                    f"loss: returned shape {jnp.shape(found)}; return one number, such as a mean over the batch"
                )
            return found

        self.value = jax.jit(value)
        self._gradient = jax.jit(jax.grad(value))

    def __call__(self, at: int, params: Sequence[Any]) -> dict[str, Array]:
        """By kernel of segment `at`, float32 `[stack, samples, in, out]`."""
        found: dict[str, list[Array]] = {}
        for batch in self.stream.batches:
            slopes = self._gradient([params[i] for i in self.leaves], list(params), batch)
            by_leaf = dict(zip(self.leaves, slopes))
            for k in self.stream.segments[at].kernels:
                slope = k.take(by_leaf[k.view.leaf]).astype(jnp.float32)
                found.setdefault(k.name, []).append(slope)
        return {name: jnp.stack(rows, axis=1) for name, rows in found.items()}

    def at_once(self, params: Sequence[Any]) -> dict[str, np.ndarray]:
        """The same of all kernels, from one backward pass of each batch; on the host."""
        found: dict[str, list[np.ndarray]] = {}
        for batch in self.stream.batches:
            slopes = self._gradient([params[i] for i in self.leaves], list(params), batch)
            by_leaf = dict(zip(self.leaves, slopes))
            for k in self.stream.kernels:
                slope = k.take(by_leaf[k.view.leaf]).astype(jnp.float32)
                found.setdefault(k.name, []).append(jax.device_get(slope))
        return {name: np.stack(rows, axis=1) for name, rows in found.items()}

    def losses(self, params: Sequence[Any]) -> list[float]:
        """The loss of each batch."""
        mine = [params[i] for i in self.leaves]
        return [float(self.value(mine, list(params), b)) for b in self.stream.batches]


def regional(stream: Stream, at: int, params: Sequence[Any]) -> dict[str, Array]:
    """Gradients of the norm of what a block gives, for each batch, as those of `LossGradients`."""
    found: dict[str, list[Array]] = {}
    for i in range(len(stream.batches)):
        slopes = stream.slopes(at, i, params, norm)
        for k in stream.runs[i][1][at].kernels:
            slope = k.take(slopes[k.view.leaf]).astype(jnp.float32)
            found.setdefault(k.name, []).append(slope)
    return {name: jnp.stack(rows, axis=1) for name, rows in found.items()}


def norm(values: Sequence[Any]) -> Array:
    """The norm of all floating-point values together."""
    squares = [jnp.sum(jnp.square(x.astype(jnp.float32))) for x in _floating(values)]
    return jnp.sqrt(jnp.maximum(sum(squares), 1e-30))


def distance(values: Sequence[Any], wanted: Sequence[Any]) -> Array:
    """The sum of squared differences of all floating-point values."""
    pairs = zip(_floating(values), _floating(wanted))
    return jnp.asarray(
        sum(jnp.sum(jnp.square(a.astype(jnp.float32) - b.astype(jnp.float32))) for a, b in pairs)
    )


def _floating(values: Sequence[Any]) -> list[Array]:
    return [x for x in values if jnp.issubdtype(jnp.result_type(x), jnp.floating)]
