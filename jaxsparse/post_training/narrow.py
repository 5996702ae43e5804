r"""FLAP, Wanda-sp and CFSP: hidden channels that go as a whole, chosen from one pass over data.

A channel of a group (`jaxsparse.channels`) is made by some kernels (up, gate) and read by one (down, rows
d_j, input x_j). What it is worth:

    "wanda_sp"   mean over outputs of |d_ij| |x_j|, standardized over the layer, ranked over all layers
    "flap"       Var(x_j) |d_j|², standardized, ranked over all layers; what the channels that go gave on
                 average becomes a bias: b += Σ over them of mean(x_j) d_j
                 (An et al., Fluctuation-based adaptive structured pruning, AAAI 2024)
    "cfsp"       ranked within its layer: mean over kernels and their outer units i of A_ij / Σ_j A_ij, times
                 |x_j|, with A = |d| |x| for the reader and |w| for makers; layers keep more the more their
                 block turns its input (Wang et al., CFSP: an efficient structured pruning framework for LLMs
                 with coarse-to-fine activation information, 2024)

The narrower model is dense and of the same class.

CFSP differs from the authors' code: 1. there the shares are taken within each channel, by which their mean
is the same number for all channels and |x_j| alone decides; 2. how far a block turns its input is a mean
over tokens, and the slope of the sigmoid is `slope`, where the sum over tokens is divided by 10,000.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxsparse import _counts, channels, selection
from jaxsparse.channels import Group, Groups, Shrunk
from jaxsparse.post_training import models, program
from jaxsparse.post_training.calibration import Stream, TokenMask, finite
from jaxsparse.post_training.program import Kernel
from jaxsparse.post_training.statistics import Inputs, Norms

Criterion = Literal["flap", "wanda_sp", "cfsp"]


def narrow(
    model: Any,
    batches: Iterable[Any],
    criterion: Criterion = "flap",
    *,
    sparsity: float,
    groups: Groups | None = None,
    mask: TokenMask | None = None,
    bias: bool | None = None,
    slope: float = 10.0,
    round_to: int = 1,
) -> Shrunk:
    """Removes hidden channels of a trained model with calibration data.

    Args:
      model: an `nnx.Module`, or `(function, params)`. It is not changed.
      batches: of calibration data: what the model is called with, an array or a tuple of them.
      criterion: see above.
      sparsity: the fraction of the channels of all groups together that goes, in [0, 1).
      groups: the channels that may go, from `channels.find`; by default those that one kernel reads and
        nothing sums over: hidden units of multilayer perceptrons.
      mask: a function of a batch that says which tokens count.
      bias: whether the mean of what goes becomes a bias of the reader; by default for "flap". A layer of
        NNX without a bias gets one.
      slope: of CFSP: how much blocks differ; 0 keeps the same share of all.
      round_to: widths are multiples of this, where the old width allows.

    Returns:
      What `channels.shrink` returns: the narrower model, the channels that stayed, a report.

    Raises:
      ValueError: an unknown criterion, a sparsity out of range, no group, a reader that has no bias and is no
        layer of NNX while `bias` is asked for.
    """
    if criterion not in ("flap", "wanda_sp", "cfsp"):
        raise ValueError(f"criterion={criterion!r}: use 'flap', 'wanda_sp' or 'cfsp'")
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity={sparsity}: must be in [0, 1)")
    batches = list(batches)
    if not batches:
        raise ValueError("batches: there are none; give at least one batch of calibration data")
    whole = models.of(model)
    inputs = batches[0] if isinstance(batches[0], tuple) else (batches[0],)
    if groups is None:
        given = (model,) if isinstance(model, nnx.Module) else tuple(model)
        found = channels.find(*given, *inputs)
        groups = found.only([name for name, g in found.items() if _hidden(g)])
    if not groups:
        raise ValueError("groups: the model has no channels that one kernel reads; give groups=")
    params = jax.tree.leaves(whole.params)
    readers = {name: _reader(g) for name, g in groups.items()}
    # Kernels that make channels are read for their weights alone, but every kernel gives a statistic.
    names = sorted({p for g in groups.values() for p in (_reader(g), *_makers(g))})
    targets = [(f"^{p}$", True) for p in names] + [(".*", False)]
    stream = Stream(whole, batches, targets, mask, None)
    seen, turned = _watch(stream, params)
    kernels = {k.path: k for k in stream.kernels}
    layers = {}
    for name, path in readers.items():
        finite(path, seen[path])
        layers[name] = _layer(groups[name], path, kernels, params, seen[path])
    worth = {name: _worth(layer, criterion) for name, layer in layers.items()}
    blocks = {name: program.block_of(kernels[path], None) for name, path in readers.items()}
    keep = _keep(worth, criterion, sparsity, [turned.get(b) for b in blocks.values()], slope)
    own: Any = model
    function = None if isinstance(model, nnx.Module) else whole.params
    small = channels.shrink(
        own if function is None else own[0], groups, params=function, keep=keep, exact=False,
        round_to=round_to,
    )  # fmt: skip
    if bias is None:
        bias = criterion == "flap"
    return _with_biases(small, layers, readers) if bias else small


@dataclasses.dataclass(frozen=True)
class _Layer:
    """A group as matrices: `down` `[width, out]` (rows of several inputs summed up by channel are a
    property of `channel`), statistics of its inputs, and the kernels that make it `[in, width]`."""

    down: np.ndarray
    channel: np.ndarray
    squares: np.ndarray
    mean: np.ndarray
    variance: np.ndarray
    makers: tuple[tuple[np.ndarray, np.ndarray], ...]
    width: int

    def by_channel(self, x: np.ndarray) -> np.ndarray:
        """Numbers of inputs, summed over those of a channel."""
        return np.bincount(self.channel, x, minlength=self.width)


def _hidden(group: Group) -> bool:
    """Whether these are hidden units of a perceptron: one reader, and one entry for each; of a head there are many."""
    single = all(np.bincount(m.channel[m.channel >= 0]).max(initial=0) <= 1 for m in group.members)
    readers = {m.path for m in group.members if m.side == "in"}
    makers = {m.path for m in group.members if m.side == "out"}
    alone = len(readers) == 1 and bool(makers - readers)
    return single and alone and not group.summed and not group.tied


def _reader(group: Group) -> str:
    readers = dict.fromkeys(m.path for m in group.members if m.side == "in")
    if len(readers) != 1:
        raise ValueError(
            f"groups: {group.name!r} is read by {', '.join(readers) or 'nothing'}; channels are judged by the one "
            "kernel that reads them, leave it out with groups.without"
        )
    return next(iter(readers))


def _makers(group: Group) -> list[str]:
    return list(dict.fromkeys(m.path for m in group.members if m.side == "out"))


def _layer(
    group: Group, path: str, kernels: Mapping[str, Kernel], params: Sequence[Any], x: Inputs
) -> _Layer:
    def channel(kernel: Kernel, side: str) -> np.ndarray:
        """The channel of every entry of a kernel as a matrix; -1 for none."""
        leaf = params[kernel.view.leaf]
        at = np.full(leaf.shape, -1.0, np.float32)
        for m in (m for m in group.members if m.path == kernel.path and m.side == side):
            shape = [-1 if d == m.axis else 1 for d in range(leaf.ndim)]
            at = np.maximum(at, np.asarray(m.channel, np.float32).reshape(shape))
        return np.asarray(kernel.take(jnp.asarray(at)))[0].astype(int)

    matrix = lambda k: np.asarray(k.take(params[k.view.leaf]), np.float64)[0]
    count = max(float(x.count[0]), 1.0)
    squares, mean = np.asarray(x.squares, np.float64)[0], np.asarray(x.sum, np.float64)[0] / count
    makers = [(matrix(kernels[p]), channel(kernels[p], "out")[0]) for p in _makers(group)]
    reader = kernels[path]
    return _Layer(
        matrix(reader), channel(reader, "in")[:, 0], squares, mean,
        np.maximum(squares / count - mean**2, 0.0), tuple(makers), group.width,
    )  # fmt: skip


def _worth(layer: _Layer, criterion: Criterion) -> np.ndarray:
    """The score of every channel."""
    size = np.sqrt(layer.squares)
    if criterion == "flap":
        return layer.by_channel(layer.variance * np.sum(layer.down**2, 1))
    if criterion == "wanda_sp":
        return layer.by_channel(np.mean(np.abs(layer.down), 1) * size)
    share = lambda a: a / np.maximum(np.sum(a, axis=0, keepdims=True), 1e-30)
    total = layer.by_channel(np.mean(share(np.abs(layer.down) * size[:, None]), 1))
    for w, channel in layer.makers:
        total = total + np.bincount(channel, np.mean(share(np.abs(w).T), 1), layer.width)
    return total * np.sqrt(layer.by_channel(layer.squares))


def _keep(
    worth: Mapping[str, np.ndarray],
    criterion: Criterion,
    sparsity: float,
    turned: Sequence[float | None],
    slope: float,
) -> dict[str, np.ndarray]:
    widths = [len(x) for x in worth.values()]
    if criterion != "cfsp":
        standard = [(x - x.mean()) / max(x.std(), 1e-30) for x in worth.values()]
        budget = int(_counts.kept_count(sum(widths), sparsity))
        masks = selection.topk_masks(
            [jnp.asarray(x, jnp.float32) for x in standard],
            max(budget, len(widths)), together=True, minimum=[1] * len(widths),
        )  # fmt: skip
        return {name: np.asarray(m) for name, m in zip(worth, masks)}
    known = [0.0 if t is None else t for t in turned]
    counts = [max(1, round(d * n)) for d, n in zip(densities(known, sparsity, slope), widths)]
    return {
        name: np.asarray(selection.topk_mask(jnp.asarray(x, jnp.float32), n))
        for (name, x), n in zip(worth.items(), counts)
    }


def densities(turned: Sequence[float], sparsity: float, slope: float) -> list[float]:
    """What CFSP keeps of each block: a sigmoid of how far it turns its input, scaled to the mean asked for.

    >>> densities([0.1, 0.1], 0.2, 10.0)
    [0.8, 0.8]
    """
    x = np.asarray(turned, np.float64)
    v = 1 / (1 + np.exp(-slope * (x - x.mean())))
    density = 1 - sparsity
    if v.max() / v.mean() * density >= 1 and v.max() > v.mean():
        shrink = v.mean() * (1 / density - 1) / (v.max() - v.mean()) / 1.05
        v = v.mean() + min(shrink, 1.0) * (v - v.mean())
    return [float(d) for d in v / v.mean() * density]


def _watch(stream: Stream, params: Sequence[Any]) -> tuple[dict[str, Inputs], dict[str, float]]:
    """What enters the kernels, and by block the mean angle (in half turns) between what enters the block
    and what leaves it, where that is one array of one shape."""
    seen: dict[str, Inputs] = {}
    turned: dict[str, float] = {}
    for at, segment in enumerate(stream.segments):
        before = [_one_array(alive) for alive in stream.alive]
        stats, gave = stream.statistics(at, params, Norms())
        seen |= stats
        stream.advance(at, gave)
        after = [_one_array(alive) for alive in stream.alive]
        angles = [
            _angles(x, y)
            for x, y in zip(before, after)
            if x is not None and y is not None and x.shape == y.shape
        ]
        for kernel in segment.kernels if angles else ():
            turned[program.block_of(kernel, None)] = float(np.mean(np.concatenate(angles)))
    return seen, turned


def _one_array(alive: Mapping[int, Any]) -> np.ndarray | None:
    arrays = [x[0] if isinstance(x, tuple) else x for x in alive.values()]
    arrays = [
        x for x in arrays if jnp.issubdtype(jnp.result_type(x), jnp.floating) and np.ndim(x) > 1
    ]
    return np.asarray(arrays[0], np.float64) if len(arrays) == 1 else None


def _angles(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    x, y = (a.reshape(-1, a.shape[-1]) for a in (x, y))
    size = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
    cos = np.sum(x * y, axis=1) / np.maximum(size, 1e-30)
    return np.arccos(np.clip(cos, -1, 1)) / np.pi


def _with_biases(small: Shrunk, layers: Mapping[str, _Layer], readers: Mapping[str, str]) -> Shrunk:
    """The narrower model with what is gone, on average, in the biases of the readers."""
    added = {}
    for name, layer in layers.items():
        gone = ~np.isin(layer.channel, small.kept[name])
        added[readers[name]] = (gone * layer.mean) @ layer.down
    if isinstance(small.model, nnx.Module):
        for path, b in added.items():
            _add_to_layer(small.model, path, jnp.asarray(b, jnp.float32))
        return dataclasses.replace(small, params=nnx.state(small.model))
    from jaxsparse.targets import named_leaves

    named = dict(named_leaves(small.params))
    for path, b in added.items():
        place = f"{path.rpartition('/')[0]}/bias".lstrip("/")
        if place not in named:
            raise ValueError(
                f"bias=True: {path!r} has no bias beside it to take the mean of what is gone; give bias=False"
            )
        named[place] = named[place] + jnp.asarray(b, named[place].dtype).reshape(named[place].shape)
    return dataclasses.replace(
        small, params=jax.tree.structure(small.params).unflatten(list(named.values()))
    )


def _add_to_layer(model: nnx.Module, path: str, b: Any) -> None:
    *keys, _ = path.split("/")
    module: Any = model
    for key in keys:
        module = module[int(key)] if key.isdigit() else getattr(module, key)
    bias = getattr(module, "bias", None)
    if bias is not None:
        bias[...] = bias[...] + b.reshape(bias.shape).astype(bias.dtype)
    elif isinstance(module, nnx.Linear):
        module.bias, module.use_bias = nnx.Param(b.astype(module.kernel.dtype)), True
    else:
        raise ValueError(
            f"bias=True: {path!r} is of {type(module).__name__}, which has no bias; give bias=False"
        )
