r"""Depth compression: which activations go and which consecutive convolutions merge, under a budget of time.

A network of L layers, each followed by an activation. Layers i+1 .. j merge into one convolution where all
activations strictly between them are gone. `time[i][j]` is the time of that one, `value[i][j][a][b]` what it does to
the accuracy to remove the activations within, with (1) or without (0) the activations at its two ends. Two dynamic
programs find the best choice exactly, for values that add up.

Source: Kim et al., "Efficient latency-aware CNN depth compression via two-stage dynamic programming", 2023.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
from jax import Array, lax


@dataclasses.dataclass(frozen=True)
class Plan:
    """What stays.

    Attributes:
      activations: the layers after which an activation stays, in 1 .. L - 1.
      borders: where merged convolutions end, in 1 .. L - 1; activations are among them.
      value: the sum of the values.
      time: the sum of the times, in units of the precision.
    """

    activations: tuple[int, ...]
    borders: tuple[int, ...]
    value: float
    time: int


def compress(
    time: np.ndarray, value: np.ndarray, budget: float, *, precision: float = 100.0
) -> Plan:
    """The plan of greatest value within a budget of time; of equal value the faster one.

    Args:
      time: `[L + 1, L + 1]`, of merged layers i+1 .. j at [i, j], i < j; inf where they cannot merge.
      value: `[L + 1, L + 1, 2, 2]`, -inf where impossible.
      budget: in the unit of `time`.
      precision: times are rounded up to multiples of 1/precision, so that the budget holds.

    Returns:
      The plan.

    Raises:
      ValueError: tables of another shape, a budget that no plan meets.

    >>> time = np.array([[0, 1.0, 1.2], [0, 0, 1.0], [0, 0, 0]])
    >>> value = np.zeros((3, 3, 2, 2))
    >>> value[0, 2] = value[..., 0, :] = value[..., 0] = -0.5
    >>> compress(time, value, 2.0).activations, compress(time, value, 1.5).activations
    ((1,), ())
    """
    layers = len(time) - 1
    if time.shape != (layers + 1, layers + 1) or value.shape != (layers + 1, layers + 1, 2, 2):
        raise ValueError(
            f"time {time.shape} and value {value.shape}: give [L + 1, L + 1] and [L + 1, L + 1, 2, 2]"
        )
    fastest, split = _fastest(np.ceil(np.round(time * precision, 6)))
    best = _best_values(value)
    total = int(np.floor(round(budget * precision, 6)))
    # found[m][b]: for every end m, with (1) or without an activation there, time used -> (value, from)
    table: list[list[dict[int, tuple[float, int, int, int]]]] = [
        [{}, {}] for _ in range(layers + 1)
    ]
    table[0][1] = {0: (0.0, -1, -1, 0)}
    for m in range(1, layers + 1):
        for b in (0, 1):
            here = table[m][b]
            for i in range(m):
                if not np.isfinite(fastest[i, m]):
                    continue
                for a in (0, 1):
                    gain = best[i, m, a, b]
                    if gain == -np.inf:
                        continue
                    for used, (worth, *_) in table[i][a].items():
                        now = used + int(fastest[i, m])
                        if now <= total and worth + gain > here.get(now, (-np.inf,))[0]:
                            here[now] = (worth + gain, i, a, used)
    ends = [(v[0], -used, used) for used, v in table[layers][1].items()]
    if not ends:
        raise ValueError(
            f"budget={budget}: no plan is as fast; the fastest takes {fastest[0, layers] / precision:g}"
        )
    worth, _, used = max(ends)
    kept: list[int] = []
    borders: list[int] = []
    m, b, at = layers, 1, used
    while m:
        _, i, a, before = table[m][b][at]
        borders += _borders(split, i, m)
        if i:
            borders.append(i)
            kept += [i] if a else []
        m, b, at = i, a, before
    return Plan(tuple(sorted(set(kept))), tuple(sorted(set(borders))), float(worth), used)


def _fastest(time: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The least time of layers i+1 .. j without activations within, merged or in several pieces; and where it
    is split (-1: merged whole)."""
    n = len(time)
    best, split = np.array(time, np.float64), np.full((n, n), -1)
    for length in range(2, n):
        for i in range(n - length):
            j = i + length
            for k in range(i + 1, j):
                if best[i, k] + time[k, j] < best[i, j]:
                    best[i, j], split[i, j] = best[i, k] + time[k, j], k
    return best, split


def _best_values(value: np.ndarray) -> np.ndarray:
    """The greatest value of i .. j without activations within, taken as one piece or as several."""
    n, best = len(value), np.array(value, np.float64)
    for length in range(2, n):
        for i in range(n - length):
            j = i + length
            for k in range(i + 1, j):
                pieces = best[i, k, :, :1] + value[k, j, :1, :]
                best[i, j] = np.maximum(best[i, j], pieces)
    return best


def _borders(split: np.ndarray, i: int, j: int) -> list[int]:
    k = int(split[i, j])
    return [] if k < 0 else [*_borders(split, i, k), k]


def merge_convolutions(
    first: Array,
    second: Array,
    first_bias: Array | None = None,
    second_bias: Array | None = None,
    *,
    stride: tuple[int, ...] | None = None,
) -> tuple[Array, Array | None]:
    """The convolution that two consecutive ones without an activation between them are.

    Exact where the second has no padding ("VALID"). Padding of both must be moved in front of the first: borders
    differ where each layer pads for itself.

    Args:
      first: `[*window, in, middle]`.
      second: `[*window, middle, out]`.
      first_bias, second_bias: `[middle]`, `[out]`, or None.
      stride: of the first; the second then reads every stride-th position. Its own stride stays that of the
        merged one times this.

    Returns:
      A kernel `[*window, in, out]` of window `k1 + (k2 - 1) * stride`, and its bias.

    Raises:
      ValueError: channels or windows that do not fit, or grouped convolutions.

    >>> a, b = jnp.ones((3, 1, 2)), jnp.ones((3, 2, 1))
    >>> merge_convolutions(a, b)[0][:, 0, 0].tolist()
    [2.0, 4.0, 6.0, 4.0, 2.0]
    """
    space = first.ndim - 2
    if second.ndim != first.ndim or first.shape[-1] != second.shape[-2]:
        raise ValueError(
            f"first {first.shape} makes {first.shape[-1]} channels, second {second.shape} reads "
            f"{second.shape[-2]} of a window of {second.ndim - 2} axes; depthwise ones: dense_kernel first"
        )
    stride = (1,) * space if stride is None else tuple(stride)
    # Every position j of the second places the first at j * stride: a full correlation, dilated.
    window = tuple(k + (m - 1) * s for k, m, s in zip(first.shape, second.shape, stride))
    merged = jnp.zeros((*window, first.shape[-2], second.shape[-1]), jnp.result_type(first, second))
    for at in np.ndindex(*second.shape[:space]):
        start = [a * s for a, s in zip(at, stride)]
        piece = jnp.matmul(first, second[at], precision=lax.Precision.HIGHEST)
        where = tuple(slice(b, b + k) for b, k in zip(start, first.shape))
        merged = merged.at[where].add(piece)
    if first_bias is None and second_bias is None:
        return merged, None
    bias = jnp.zeros(second.shape[-1], merged.dtype) if second_bias is None else second_bias
    if first_bias is not None:
        total = second.reshape(-1, *second.shape[-2:]).sum(0)
        bias = bias + jnp.matmul(first_bias, total, precision=lax.Precision.HIGHEST)
    return merged, bias


def add_identity(kernel: Array) -> Array:
    """The kernel of `x + conv(x)`: a residual branch of one convolution, odd window, stride 1.

    Raises:
      ValueError: an even window, other numbers of inputs and outputs.
    """
    window = kernel.shape[:-2]
    if kernel.shape[-1] != kernel.shape[-2] or any(k % 2 == 0 for k in window):
        raise ValueError(
            f"kernel {kernel.shape}: an identity needs an odd window and as many outputs as inputs"
        )
    centre = tuple(k // 2 for k in window)
    return kernel.at[centre].add(jnp.eye(kernel.shape[-1], dtype=kernel.dtype))


def dense_kernel(kernel: Array, groups: int) -> Array:
    """A grouped kernel `[*window, in / groups, out]` as `[*window, in, out]`, zeros between the groups: how
    depthwise convolutions are merged, at the price of their sparsity.

    Raises:
      ValueError: outputs that the groups do not divide.
    """
    each, out = kernel.shape[-2:]
    if out % groups:
        raise ValueError(f"groups={groups} does not divide {out} outputs")
    whole = jnp.zeros((*kernel.shape[:-2], each * groups, out), kernel.dtype)
    size = out // groups
    for g in range(groups):
        columns = slice(g * size, (g + 1) * size)
        whole = whole.at[..., g * each : (g + 1) * each, columns].set(kernel[..., columns])
    return whole


def fold_batch_norm(
    kernel: Array,
    bias: Array | None,
    *,
    scale: Array | None,
    shift: Array | None,
    mean: Array,
    variance: Array,
    epsilon: float = 1e-5,
) -> tuple[Array, Array]:
    """A convolution or matrix product with the batch norm after it, as one with a bias.

    >>> kernel, bias = fold_batch_norm(jnp.ones((2, 1)), None, scale=None, shift=None,
    ...                                mean=jnp.ones(1), variance=jnp.full(1, 4.0), epsilon=0.0)
    >>> kernel.tolist(), bias.tolist()
    ([[0.5], [0.5]], [-0.5])
    """
    factor = (1.0 if scale is None else scale) * lax.rsqrt(variance + epsilon)
    moved = (0.0 if bias is None else bias) - mean
    return kernel * factor, moved * factor + (0.0 if shift is None else shift)
