r"""Sparse iso-FLOP transformations: a dense layer becomes a larger sparse one of equal cost.

With window $k \times k$, $f_{in}$ inputs, $f_{out}$ outputs and sparsity s,

| family     | layer                                                | hyper-parameter                |
|------------|------------------------------------------------------|--------------------------------|
| wide       | all widths times $\sqrt{1/(1-s)}$                    | `widened`                      |
| parallel   | n sparse branches, each with its own normalisation, summed | $n = round(1/(1-s))$     |
| factorized | $k \times k$ to r, then $1 \times 1$ to $f_{out}$, both sparse | $r = \lceil k^2 f_{in} f_{out} / ((1-s)(k^2 f_{in} + f_{out})) \rceil$ |
| doped      | one sparse layer plus a dense product of rank r      | $r = \lfloor s k^2 f_{in} f_{out} / (k^2 f_{in} + f_{out}) \rfloor$ |

The layers are ordinary Flax modules with ordinary kernels; the zeros come from a method of this
library, such as `jaxsparse.rigl` with `allocation="uniform"` at the sparsity that they were made
for. Leaves of `SparseDoped` named `down` and `up` are to stay dense: `targets=[("(down|up)/kernel",
False)]`. `flops_ratio` of each is its cost at that density relative to the dense layer.
(Thangarasa et al., Sparse-IFT: sparse iso-FLOP transformations for maximizing training efficiency,
2024.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction

import jax.numpy as jnp
from flax import nnx
from jax import Array


def _exact(sparsity: float) -> Fraction:
    """The sparsity as the decimal that it stands for, checked."""
    if isinstance(sparsity, bool) or not 0.0 <= sparsity < 1.0:
        raise ValueError(f"sparsity={sparsity}: must be in [0, 1)")
    return Fraction(sparsity).limit_denominator(10**9)


def widened(features: int, sparsity: float) -> int:
    r"""The width of the wide family, $features \sqrt{1/(1 - s)}$, rounded. The input of the first
    layer and the output of the last keep theirs.

    >>> widened(64, 0.75), widened(64, 0.0)
    (128, 64)

    Raises:
      ValueError: a sparsity not in [0, 1).
    """
    return round(features / math.sqrt(1 - _exact(sparsity)))


def branches(sparsity: float) -> int:
    """The branches of the parallel family, round(1 / (1 - s)).

    >>> [branches(s) for s in (0.0, 0.5, 0.75, 0.9, 0.99)]
    [1, 2, 4, 10, 100]

    Raises:
      ValueError: a sparsity not in [0, 1).
    """
    return round(1 / (1 - _exact(sparsity)))


def factorized_rank(fan_in: int, fan_out: int, sparsity: float, *, sparse: str = "both") -> int:
    """r of the factorized family; `fan_in` is $k^2 f_{in}$.

    `sparse` is "both" factors or only the "first".

    >>> factorized_rank(9 * 64, 64, 0.5)
    116

    Raises:
      ValueError: a sparsity not in [0, 1), another word for `sparse`.
    """
    density = 1 - _exact(sparsity)
    if sparse not in ("both", "first"):
        raise ValueError(f"sparse={sparse!r}: give 'both' or 'first'")
    cost = density * fan_in + (density if sparse == "both" else 1) * fan_out
    return math.ceil(fan_in * fan_out / cost)


def doped_rank(fan_in: int, fan_out: int, sparsity: float) -> int:
    """r of the doped family; `fan_in` is $k^2 f_{in}$.

    >>> doped_rank(9 * 64, 64, 0.5)
    28

    Raises:
      ValueError: a sparsity not in [0, 1).
    """
    return math.floor(_exact(sparsity) * fan_in * fan_out / (fan_in + fan_out))


def _layer(features_in: int, features_out: int, window: Sequence[int], strides, use_bias, rngs):
    """A linear layer (no window), or a convolution."""
    if not window:
        return nnx.Linear(features_in, features_out, use_bias=use_bias, rngs=rngs)
    return nnx.Conv(
        features_in, features_out, tuple(window), strides=strides, use_bias=use_bias, rngs=rngs
    )


class _Transformed(nnx.Module):
    """What the families share: the shape of the dense layer that they stand for."""

    sparsity: float
    fan_in: int
    fan_out: int

    def __init__(self, in_features: int, out_features: int, sparsity: float, window: Sequence[int]):
        if in_features < 1 or out_features < 1:
            raise ValueError(f"in_features={in_features}, out_features={out_features}: at least 1")
        self.sparsity = float(_exact(sparsity))
        self.fan_in, self.fan_out = math.prod(window) * in_features, out_features

    def _ratio(self, weights: float) -> float:
        return weights / (self.fan_in * self.fan_out)


class SparseWide(_Transformed):
    r"""One layer with both widths multiplied by $\sqrt{1/(1 - s)}$.

    Args:
      in_features, out_features: those of the dense layer.
      sparsity: s, at which the layer is to be trained.
      window: the kernel size of a convolution; () is a linear layer.
      widen_in, widen_out: False for the first and the last layer of a network, whose outer side
        keeps its width (they then cost a factor $\sqrt{1 - s}$ of the dense one).

    >>> layer = SparseWide(64, 64, sparsity=0.75, rngs=nnx.Rngs(0))
    >>> layer.layer.kernel.shape, layer.flops_ratio
    ((128, 128), 1.0)

    Raises:
      ValueError: a sparsity not in [0, 1), a width below 1.
    """

    layer: nnx.Linear | nnx.Conv

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        sparsity: float,
        window: Sequence[int] = (),
        strides: int = 1,
        widen_in: bool = True,
        widen_out: bool = True,
        use_bias: bool = True,
        rngs: nnx.Rngs,
    ):
        super().__init__(in_features, out_features, sparsity, window)
        features_in = widened(in_features, sparsity) if widen_in else in_features
        features_out = widened(out_features, sparsity) if widen_out else out_features
        self.layer = _layer(features_in, features_out, window, strides, use_bias, rngs)

    def __call__(self, x: Array) -> Array:
        return self.layer(x)

    @property
    def flops_ratio(self) -> float:
        """Operations at density 1 - s relative to the dense layer."""
        return self._ratio((1 - self.sparsity) * self.layer.kernel.size)


class SparseParallel(_Transformed):
    r"""$\sum_{j=1}^{n} norm_j(layer_j(x))$ with n = round(1/(1 - s)); the nonlinearity comes after
    the sum.

    Args:
      in_features, out_features, sparsity, window: as for `SparseWide`.
      norm: makes the normalisation of a branch, `norm(out_features, rngs=rngs)`; None: none.

    >>> layer = SparseParallel(8, 4, sparsity=0.75, norm=None, rngs=nnx.Rngs(0))
    >>> len(layer.branches), layer.flops_ratio
    (4, 1.0)

    Raises:
      ValueError: a sparsity not in [0, 1), a width below 1.
    """

    branches: nnx.List
    norms: nnx.List

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        sparsity: float,
        window: Sequence[int] = (),
        strides: int = 1,
        norm: Callable[..., nnx.Module] | None = nnx.BatchNorm,
        use_bias: bool = True,
        rngs: nnx.Rngs,
    ):
        super().__init__(in_features, out_features, sparsity, window)
        n = branches(sparsity)
        self.branches = nnx.List(
            [_layer(in_features, out_features, window, strides, use_bias, rngs) for _ in range(n)]
        )
        self.norms = nnx.List(
            [] if norm is None else [norm(out_features, rngs=rngs) for _ in range(n)]
        )

    def __call__(self, x: Array) -> Array:
        ys = [layer(x) for layer in self.branches]
        if self.norms:
            ys = [norm(y) for norm, y in zip(self.norms, ys)]
        return sum(ys[1:], ys[0])

    @property
    def flops_ratio(self) -> float:
        """Operations at density 1 - s relative to the dense layer, without normalisation."""
        return self._ratio((1 - self.sparsity) * sum(b.kernel.size for b in self.branches))


class SparseFactorized(_Transformed):
    """`up(between(down(x)))`: `down` is k x k to r channels, `up` 1 x 1 to the outputs.

    Args:
      in_features, out_features, sparsity, window: as for `SparseWide`.
      sparse: "both" factors are sparse, or only the "first" (`down`).
      between: what stands between the factors, such as normalisation and ReLU; None: nothing.

    >>> layer = SparseFactorized(64, 64, sparsity=0.5, window=(3, 3), rngs=nnx.Rngs(0))
    >>> layer.down.kernel.shape, layer.up.kernel.shape
    ((3, 3, 64, 116), (1, 1, 116, 64))

    Raises:
      ValueError: a sparsity not in [0, 1), a width below 1, another word for `sparse`.
    """

    sparse: str
    between: Callable[[Array], Array] | None
    down: nnx.Linear | nnx.Conv
    up: nnx.Linear | nnx.Conv

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        sparsity: float,
        window: Sequence[int] = (),
        strides: int = 1,
        sparse: str = "both",
        between: Callable[[Array], Array] | None = None,
        use_bias: bool = True,
        rngs: nnx.Rngs,
    ):
        super().__init__(in_features, out_features, sparsity, window)
        rank = factorized_rank(self.fan_in, self.fan_out, sparsity, sparse=sparse)
        self.sparse, self.between = sparse, between
        self.down = _layer(in_features, rank, window, strides, False, rngs)
        self.up = _layer(rank, out_features, (1,) * len(window), 1, use_bias, rngs)

    def __call__(self, x: Array) -> Array:
        h = self.down(x)
        return self.up(h if self.between is None else self.between(h))

    @property
    def flops_ratio(self) -> float:
        """Operations relative to the dense layer (of unit stride)."""
        density = 1 - self.sparsity
        last = density if self.sparse == "both" else 1.0
        return self._ratio(density * self.down.kernel.size + last * self.up.kernel.size)


class SparseDoped(_Transformed):
    """`sparse(x) + up(down(x))`: a sparse layer of the original shape, and a dense product of
    rank r that takes what the zeros leave over.

    Args:
      in_features, out_features, sparsity, window: as for `SparseWide`.

    >>> layer = SparseDoped(64, 64, sparsity=0.5, window=(3, 3), rngs=nnx.Rngs(0))
    >>> layer.down.kernel.shape, round(layer.flops_ratio, 3)
    ((3, 3, 64, 28), 0.986)

    Raises:
      ValueError: a sparsity not in [0, 1), or so small that no rank is left; a width below 1.
    """

    sparse: nnx.Linear | nnx.Conv
    down: nnx.Linear | nnx.Conv
    up: nnx.Linear | nnx.Conv

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        sparsity: float,
        window: Sequence[int] = (),
        strides: int = 1,
        use_bias: bool = True,
        rngs: nnx.Rngs,
    ):
        super().__init__(in_features, out_features, sparsity, window)
        rank = doped_rank(self.fan_in, self.fan_out, sparsity)
        if rank < 1:
            raise ValueError(
                f"sparsity={sparsity} of {self.fan_in} x {self.fan_out} weights pays for no rank; "
                "use a higher sparsity, or the dense layer"
            )
        self.sparse = _layer(in_features, out_features, window, strides, use_bias, rngs)
        self.down = _layer(in_features, rank, window, strides, False, rngs)
        self.up = _layer(rank, out_features, (1,) * len(window), 1, False, rngs)

    def __call__(self, x: Array) -> Array:
        return self.sparse(x) + self.up(self.down(x))

    @property
    def flops_ratio(self) -> float:
        """Operations relative to the dense layer."""
        dense = self.down.kernel.size + self.up.kernel.size
        return self._ratio((1 - self.sparsity) * self.sparse.kernel.size + dense)


def folded_decay(model: nnx.Module) -> Array:
    r"""$\tfrac12 \sum \|U V\|^2$ over the low-rank products of a model that are linear (nothing stands
    between the factors): with a factor in the loss, the weight decay of the matrix that a product
    stands for. Leave its factors out of the optimizer's decay.

    >>> layer = SparseDoped(8, 4, sparsity=0.75, rngs=nnx.Rngs(0))
    >>> u, v = layer.down.kernel[...], layer.up.kernel[...]
    >>> bool(jnp.allclose(folded_decay(layer), 0.5 * jnp.sum((u @ v) ** 2), rtol=1e-5))
    True
    """
    total = jnp.zeros(())
    for _, module in nnx.iter_modules(model):
        bent = isinstance(module, SparseFactorized) and module.between is not None
        if isinstance(module, SparseFactorized | SparseDoped) and not bent:
            u = module.down.kernel[...].reshape(module.fan_in, -1)
            v = module.up.kernel[...].reshape(-1, module.fan_out)
            # Two r x r matrices instead of the folded one.
            total += 0.5 * jnp.sum((u.T @ u) * (v @ v.T))
    return total
