"""`CondensedLinear`: a linear layer that stores a few weights of each output, wherever they are."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from jaxsparse.nn._linear import Pattern, Scores, SparseLinear, count_candidates, split_linear
from pallas_kernels import Condensed, condensed_matmul, score_inputs


class CondensedLinear(SparseLinear):
    r"""$y = x W + b$ with W `[in, out]` unstructured or of constant fan-in, stored per output.

    The weights are parameters (`nnx.Param`), their rows are not (`Pattern`). To move them while they train,
    give the optimizer to `jaxsparse.stored`: each output keeps its number of weights. From a trained
    layer it is made by `from_dense` or `jaxsparse.compact`: outputs that are switched off store nothing,
    the others as many weights as the fullest of them. On CPU with a C++ compiler a training step is
    faster than dense from about 75 % sparsity; without one the forward product is from about 90 %, and
    gradients cost what dense ones do.

    Attributes:
      values: the stored weights, `[stored outputs, fan_in]`.
      rows, outputs: their places, int32 (see `pallas_kernels.Condensed`).
      scores: float32 `[candidates, stored outputs]`, not read; where some are due, its gradient is that of
        W at the inputs that are, stored or not (`pallas_kernels.score_inputs`). None without candidates.
      due: int32 `[in]`, 1 in the steps whose gradients a rule is to read, at the candidates.

    Args:
      in_features: size of the last axis of x.
      out_features: size of the last axis of y.
      density: share of the weights that is stored, as many of each output, at random inputs.
      weight: W, in place of a random one (then without `density` and `rngs`).
      use_bias: add a bias, zero at first.
      candidates: how many inputs are scored for growth by gradient, drawn anew in each update: a share of
        all (float), or a number (int); None: as many as an output stores; 0: none, for layers whose
        pattern does not move by gradient. The scores take the memory of as many weights of each output.
      dtype: of the computation; default: that of x and the parameters, promoted.
      param_dtype: of the parameters.
      precision: of dense products, as in `jax.lax.dot_general`.
      implementation: see `pallas_kernels.condensed_matmul`.
      rngs: key for places and values (`params`).

    Raises:
      ValueError: if not exactly one of `density` with `rngs` and `weight` is given, the weight has
        another shape, a density stores nothing, or there are not so many candidates.

    Candidates at random, as many as are stored: Heddes et al., Always-sparse training by growing connections
    with guided stochastic exploration, 2024.

    >>> layer = CondensedLinear(64, 32, density=0.125, rngs=nnx.Rngs(0))
    >>> layer(jnp.ones((3, 64))).shape, layer.values[...].shape
    ((3, 32), (32, 8))
    """

    product = staticmethod(condensed_matmul)

    rows: Pattern
    outputs: Pattern
    scores: Scores | None
    due: Pattern

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        density: float | None = None,
        weight: Condensed | None = None,
        use_bias: bool = True,
        candidates: float | int | None = None,
        dtype: jax.typing.DTypeLike | None = None,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        precision: lax.PrecisionLike = None,
        implementation: str | None = None,
        rngs: nnx.Rngs | None = None,
    ):
        shape = in_features, out_features
        if weight is None:
            if density is None or rngs is None:
                raise ValueError("density=None or rngs=None: give both, or a weight")
            if not 0.0 < density <= 1.0 or round(density * in_features) < 1:
                raise ValueError(
                    f"density={density} stores none of the {in_features} inputs of an output, or more than "
                    f"there are; give {1 / in_features:.3g} to 1"
                )
            fan_in = round(density * in_features)
            weight = Condensed.random(rngs.params(), shape, fan_in=fan_in, dtype=param_dtype)
        elif density is not None:
            raise ValueError(f"density={density} and a weight are given; give one of them")
        if weight.shape != shape:
            raise ValueError(f"weight has shape={weight.shape}; it must be {shape}")
        bias = jnp.zeros(out_features, param_dtype) if use_bias else None
        super().__init__(
            weight, bias, dtype=dtype, precision=precision, implementation=implementation
        )
        self.rows, self.outputs = Pattern(weight.rows), Pattern(weight.outputs)
        self.due = Pattern(jnp.zeros(in_features, jnp.int32))
        self.scores = None if candidates == 0 else _scores(weight, candidates)

    @classmethod
    def from_dense(
        cls,
        linear: nnx.Linear,
        mask: jax.Array | None = None,
        *,
        candidates: float | int | None = None,
        implementation: str | None = None,
    ) -> "CondensedLinear":
        """The layer that computes what `linear` does with its kernel masked.

        Args:
          linear: the dense layer.
          mask: bool `[in, out]`, what to keep; default: what is not zero.
          candidates: as of the layer.
          implementation: see `pallas_kernels.condensed_matmul`.

        Raises:
          ValueError: if linear is not an `nnx.Linear` or the mask has another shape.

        >>> dense = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
        >>> CondensedLinear.from_dense(dense, jnp.eye(4) > 0).values[...].shape
        (4, 1)
        """
        kernel, mask, bias = split_linear(linear, mask)
        layer = cls(
            *kernel.shape,
            weight=Condensed.from_mask(kernel, mask),
            use_bias=bias is not None,
            candidates=candidates,
            dtype=linear.dtype,
            param_dtype=kernel.dtype,
            precision=linear.precision,
            implementation=implementation,
        )
        if bias is not None and layer.bias is not None:
            layer.bias[...] = bias
        return layer

    def _multiply(self, x: jax.Array, w: Condensed) -> jax.Array:
        y = super()._multiply(x, w)
        if self.scores is None:
            return y
        due, outputs = self.due[...], self.outputs[...]
        return score_inputs(x, y, self.scores[...], due, outputs, precision=self.precision)

    @property
    def weight(self) -> Condensed:
        """W as `Condensed`."""
        return Condensed(self.values[...], self.rows[...], self.outputs[...], self.shape)


def _scores(w: Condensed, candidates: float | int | None) -> Scores:
    number = max(1, w.fan_in) if candidates is None else candidates
    number = count_candidates(number, w.shape[0], "inputs")
    return Scores(jnp.zeros((number, w.values.shape[0]), jnp.float32))


def condense(kernel: jax.Array, mask: jax.Array | np.ndarray | None = None) -> Condensed:
    """A kernel `[..., in, out]` as SRigL leaves it, condensed; leading axes of a convolution are
    merged with its inputs. (Lasby et al., Dynamic sparse training with structured sparsity, 2024.)

    Args:
      kernel: concrete weights.
      mask: its mask; where the weights are not 0 if None.

    Returns:
      For `pallas_kernels.condensed_matmul`; outputs that are switched off are left out.

    Raises:
      ValueError: outputs with different numbers of inputs.

    >>> w = condense(jnp.array([[1.0, 0.0, 3.0], [0.0, 0.0, 4.0], [2.0, 0.0, 0.0]]))
    >>> w.values.tolist(), w.rows.tolist(), w.outputs.tolist()
    ([[1.0, 2.0], [3.0, 4.0]], [[0, 2], [0, 1]], [0, 2])
    """
    matrix = jnp.reshape(kernel, (-1, kernel.shape[-1]))
    kept = np.asarray(kernel if mask is None else mask).reshape(matrix.shape) != 0
    counts = kept.sum(0)
    least, most = counts[counts > 0].min(initial=kept.shape[0]), counts.max(initial=0)
    if least < most:
        raise ValueError(
            f"kernel: active outputs have from {least} to {most} inputs; "
            "give one with constant fan-in, as srigl or structure=FanIn() make it"
        )
    return Condensed.from_mask(matrix, kept)
