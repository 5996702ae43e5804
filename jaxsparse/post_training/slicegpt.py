r"""SliceGPT (Ashkboos et al., SliceGPT: compress large language models by deleting rows and columns, ICLR 2024).

A residual network without scales in its norms,

    x = e(tokens);   x <- x + f(x / rms(x))  for each branch;   logits = h(x / rms(x)),

computes the same when its stream is rotated: what writes to it is multiplied with an orthogonal Q, what
reads from it with Qᵀ, since rotations leave rms alone. Each branch takes its own Q, the principal
directions of its stream, and the last coordinates are deleted; between two bases the stream passes a
small matrix, x Qᵀ_before Q_after. All matrices are smaller and dense. Only what the dropped directions
held is lost.

What is taken apart here is a list of branches that know nothing of each other (`Branch`); a network of
one's own is brought into that form by folding the scales of its norms into what reads them (`fold_scale`),
and those with means taken (LayerNorm) by subtracting the mean from what writes (`center`).
Norms divide by the original width whatever is left of it: `rms_norm`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxsparse import _counts
from jaxsparse.post_training._layer import damped, matmul

Function = Callable[[Mapping[str, Array], Array], Array]


@dataclasses.dataclass(frozen=True)
class Branch:
    """One branch of a residual stream.

    Attributes:
      function: `function(params, z)`: what it adds to the stream, for the normalized stream `[..., width]`;
        it must take any width.
      params: arrays by name.
      readers: names of kernels `[width, ...]` that read the stream.
      writers: names of kernels `[..., width]` that write to it, and of biases `[width]`.
    """

    function: Function
    params: Mapping[str, Array]
    readers: tuple[str, ...]
    writers: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Sliced:
    """A network on narrow streams.

    Attributes:
      embedding: `[vocabulary, kept]`.
      branches: with their parameters cut.
      shortcuts: `[kept, kept]` for each branch, `[kept, width]` for the last: what the stream passes before
        the branch is added.
      head: `[width, outputs]`: the stream is whole again where it is read.
      width: the original width, which norms divide by.
      dropped: of the stream before each branch and at the end, the share of its energy that was deleted.
      epsilon: of the norms.
    """

    embedding: Array
    branches: tuple[Branch, ...]
    shortcuts: tuple[Array, ...]
    head: Array
    width: int
    dropped: tuple[float, ...]
    epsilon: float = 1e-5

    def __call__(self, tokens: Array) -> Array:
        """The outputs of the narrow network."""
        x = self.embedding[tokens]
        for branch, shortcut in zip(self.branches, self.shortcuts):
            added = branch.function(branch.params, rms_norm(x, self.width, self.epsilon))
            x = matmul(x, shortcut) + added
        return matmul(rms_norm(x, self.width, self.epsilon), self.head)

    def parameters(self) -> int:
        """All of them, shortcuts included."""
        arrays = [self.embedding, self.head, *self.shortcuts]
        return sum(x.size for x in arrays) + sum(
            x.size for b in self.branches for x in b.params.values()
        )


def rms_norm(x: Array, width: int, epsilon: float = 1e-5) -> Array:
    """x / sqrt(sum of x² / width + epsilon), `width` that of the network before it was cut."""
    return x / jnp.sqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) / width + epsilon)


def fold_scale(scale: Array, kernel: Array) -> Array:
    """A kernel `[width, ...]` that reads a normalized stream, with the scale of the norm in it."""
    return scale.reshape(-1, *[1] * (kernel.ndim - 1)) * kernel


def center(kernel: Array) -> Array:
    """What writes to a stream `[..., width]` without its mean: a LayerNorm then is an RMSNorm."""
    return kernel - jnp.mean(kernel, axis=-1, keepdims=True)


def principal(gram: Array, damping: float = 0.01) -> tuple[Array, Array]:
    """The principal directions of a stream, from its Gram matrix `[width, width]`: eigenvectors as
    columns and their eigenvalues, both falling."""
    exact = np.asarray(
        damped(gram, damping), np.float64
    )  # on the host: float32 loses small directions
    values, vectors = np.linalg.eigh((exact + exact.T) / 2)
    return jnp.asarray(vectors[:, ::-1], jnp.float32), jnp.asarray(values[::-1], jnp.float32)


def slice_stream(
    embedding: Array,
    branches: Sequence[Branch],
    head: Array,
    batches: Sequence[Any],
    sparsity: float,
    *,
    round_to: int = 8,
    epsilon: float = 1e-5,
    damping: float = 0.01,
) -> Sliced:
    """Rotates every part of a residual stream into its principal directions and deletes the last.

    Args:
      embedding: `[vocabulary, width]`.
      branches: in their order.
      head: `[width, outputs]`, that reads the normalized stream.
      batches: of tokens.
      sparsity: the share of the width that goes, in [0, 1); parameters shrink by less, for the shortcuts.
      round_to: the new width is a multiple of this.
      epsilon: of the norms.
      damping: added to the diagonals of Gram matrices, as a fraction of their means.

    Returns:
      The narrow network.

    Raises:
      ValueError: a sparsity out of range or one that leaves less than `round_to`; no batch.
    """
    width = embedding.shape[1]
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity={sparsity}: must be in [0, 1)")
    kept = int(_counts.kept_count(width, sparsity))
    kept = kept // round_to * round_to if sparsity else width
    if kept < 1:
        raise ValueError(f"sparsity={sparsity}: leaves less than round_to={round_to} of {width}")
    if not batches:
        raise ValueError("batches: there are none; give at least one batch of tokens")

    def basis(streams: Sequence[Array]) -> tuple[Array, float]:
        gram = functools.reduce(jnp.add, map(_gram, streams))
        q = principal(gram, damping)[0][:, :kept]
        return q, float(1 - jnp.trace(matmul(q.T, matmul(gram, q))) / jnp.trace(gram))

    streams = [embedding[tokens] for tokens in batches]
    q, lost = basis(streams)
    first, dropped = q, [lost]
    streams = [matmul(x, q) for x in streams]
    cut, shortcuts = [], []
    for i, branch in enumerate(branches):
        read = {**branch.params, **{n: _read(q, branch.params[n]) for n in branch.readers}}
        # In the coordinates of the dense network, until the next basis is known.
        streams = [
            matmul(x, q.T) + branch.function(read, rms_norm(x, width, epsilon)) for x in streams
        ]
        after, lost = basis(streams) if i + 1 < len(branches) else (jnp.eye(width), 0.0)
        written = {n: matmul(branch.params[n], after) for n in branch.writers}
        cut.append(dataclasses.replace(branch, params={**read, **written}))
        shortcuts.append(matmul(q.T, after))
        dropped.append(lost)
        streams, q = [matmul(x, after) for x in streams], after
    parts = matmul(embedding, first), tuple(cut), tuple(shortcuts), _read(q, head)
    return Sliced(*parts, width, tuple(dropped), epsilon)


def _gram(x: Array) -> Array:
    rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    return matmul(rows.T, rows)


def _read(basis: Array, kernel: Array) -> Array:
    """A kernel `[width, ...]` that reads the coordinates of a basis `[width, kept]`."""
    return matmul(basis.T, kernel.reshape(kernel.shape[0], -1)).reshape(-1, *kernel.shape[1:])
