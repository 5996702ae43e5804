"""Losses on features that shape channels: feature flow, and attention maps of a teacher."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array


def feature_flow(
    features: Sequence[Array], gradient: float = 1e-8, curvature: float = 1e-8
) -> Array:
    r"""How much features change with depth, and how fast that changes:

    $$\frac{k_1}{n} \sum_l \|h_{l+1} - h_l\|_1 + \frac{k_2}{n} \sum_l \|h_{l+1} - 2 h_l + h_{l-1}\|_1.$$

    Of a residual block $h_{l+1} = h_l + F_l(h_l)$ the first is $\|F_l\|_1$: whole branches may vanish, and filters
    become sparse without a penalty on weights. Cut afterwards, by `jaxsparse.ssl` or `channels.prune`.

    Args:
      features: $h_0 \dots h_L$, each `[batch, ...]`. Neighbours of another shape are matched: space is averaged
        over windows, missing channels are zeros (so do stages of a network, and plain networks).
      gradient: $k_1$.
      curvature: $k_2$.

    Returns:
      A float32 scalar; n is the batch size.

    Raises:
      ValueError: fewer than two features, sizes in space that do not divide.

    Source: Wu et al., "Feature flow regularization: improving structured sparsity in deep neural networks",
    2021 (the scaling is ours).

    >>> h = jnp.ones((2, 3))
    >>> float(feature_flow([h, h, h], 1.0, 1.0)), float(feature_flow([h, 2 * h, 3 * h], 1.0, 1.0))
    (0.0, 6.0)
    """
    if len(features) < 2:
        raise ValueError(f"features: {len(features)} given; the flow needs two or more")
    size = lambda x: jnp.sum(jnp.abs(x), dtype=jnp.float32)
    total = jnp.zeros((), jnp.float32)
    for a, b in zip(features, features[1:]):
        total += gradient * size(b - matched(a, b.shape))
    for a, b, c in zip(features, features[1:], features[2:]):
        total += curvature * size(c - 2 * matched(b, c.shape) + matched(a, c.shape))
    return total / features[0].shape[0]


def matched(x: Array, shape: Sequence[int]) -> Array:
    """Features `[batch, *space, channels]` in another shape: averages over windows in space, zeros for channels
    that there are more of, the first of those that there are fewer of.

    Raises:
      ValueError: other ranks, sizes in space that do not divide.
    """
    if x.ndim != len(shape):
        raise ValueError(f"features: shapes {x.shape} and {tuple(shape)} differ in rank")
    for axis in range(1, x.ndim - 1):
        if x.shape[axis] % shape[axis]:
            raise ValueError(
                f"features: {shape[axis]} does not divide {x.shape[axis]}, of {x.shape} and {tuple(shape)}"
            )
        split = (*x.shape[:axis], shape[axis], -1, *x.shape[axis + 1 :])
        x = x.reshape(split).mean(axis + 1)
    more = shape[-1] - x.shape[-1]
    x = x[..., : shape[-1]]
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, max(more, 0))])


def attention_transfer(student: Array, teacher: Array) -> Array:
    r"""The mean squared distance of attention maps, $at(F) = \bar{F^2} / \|\bar{F^2}\|$, the mean over channels: what
    group channel pruning recovers accuracy with. The two may differ in channels.

    Args:
      student: `[batch, *space, channels]`.
      teacher: the same in space.

    Returns:
      A float32 scalar.

    Raises:
      ValueError: other sizes in space.

    Source: Chu et al., "Group channel pruning and spatial attention distilling for object detection", 2022.

    >>> f = jnp.arange(8.0).reshape(1, 2, 2, 2)
    >>> float(attention_transfer(3 * f, f)) < 1e-12
    True
    """
    if student.shape[:-1] != teacher.shape[:-1]:
        raise ValueError(
            f"student: {student.shape} and teacher {teacher.shape} differ in batch or space; resize one of them"
        )

    def attention(x: Array) -> Array:
        flat = jnp.mean(x.astype(jnp.float32) ** 2, axis=-1).reshape(x.shape[0], -1)
        return flat / jnp.maximum(jnp.linalg.norm(flat, axis=1, keepdims=True), 1e-12)

    return jnp.mean((attention(student) - attention(teacher)) ** 2)
