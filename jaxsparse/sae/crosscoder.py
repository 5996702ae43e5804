r"""Crosscoders: one sparse code for several layers or models.

    f = relu(sum_m x_m W_enc[m] + b),   x_hat_m = f W_dec[:, m] + b_dec[m]

with the penalty $\lambda\,\mathrm{mean}_b \sum_i f_i \sum_m \|W_\mathrm{dec}[i, m]\|$: a sum of norms, so
that latents may belong to one model only. Source: Lindsey et al. 2024 and its public replication.
"""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jax import Array

from jaxsparse.sae.relu import ReLU


class Crosscoder(ReLU):
    """ReLU + L1 on inputs `[tokens, sources, d_model]`, given and returned as `[tokens, sources * d_model]`.

    `flat(x)` makes the one of the other. With one source it is the April variant of `ReLU`, but for
    b_dec, which is not subtracted from the input.

    Args:
      d_model: width of each source.
      d_sae: latents.
      sources: layers or models.
      l1: the weight of the penalty.
      dead_after, rngs: as of `SAE`.

    >>> model = Crosscoder(4, 16, sources=2, rngs=nnx.Rngs(0))
    >>> model(Crosscoder.flat(jnp.ones((3, 2, 4)))).shape
    (3, 8)
    """

    def __init__(
        self,
        d_model: int,
        d_sae: int,
        *,
        sources: int,
        l1: float = 2.0,
        dead_after: int = 10_000_000,
        rngs: nnx.Rngs,
    ):
        if sources < 1:
            raise ValueError(f"sources={sources}: give at least 1")
        width = sources * d_model
        super().__init__(
            width, d_sae, l1=l1, variant="april", d_out=width, dead_after=dead_after, rngs=rngs
        )
        self.sources = sources
        atoms = self.W_dec[...].reshape(d_sae, sources, d_model)
        atoms = 0.08 * atoms / jnp.linalg.norm(atoms, axis=-1, keepdims=True)
        self.W_dec[...] = atoms.reshape(d_sae, width)
        self.W_enc[...] = self.W_dec[...].T

    @staticmethod
    def flat(x: Array) -> Array:
        """`[tokens, sources, d_model]` as `[tokens, sources * d_model]`."""
        return x.reshape(x.shape[0], -1)

    def source_sizes(self) -> Array:
        """The norm of each latent's atom in each source `[F, sources]`."""
        return jnp.linalg.norm(self.W_dec[...].reshape(self.d_sae, self.sources, -1), axis=-1)

    def atom_sizes(self) -> Array:
        return jnp.sum(self.source_sizes(), axis=-1)

    def loss(
        self, x: Array, target: Array | None = None, *, warmup: Array | float = 1.0
    ) -> tuple[Array, dict[str, Array]]:
        return super().loss(x, x if target is None else target, warmup=warmup)

    def shares(self) -> Array:
        r"""$\rho_{i,m} = \|d_{i,m}\| / \sum_n \|d_{i,n}\|$ for each source `[F, sources]`: near 0 or 1 is
        exclusive, near 1 / sources shared. L1 can fake exclusive latents by shrinking one norm to 0."""
        sizes = self.source_sizes()
        return sizes / jnp.maximum(jnp.sum(sizes, axis=-1, keepdims=True), 1e-30)
