r"""Atoms on the unit sphere after every update, and dead latents that start anew.

Three public training loops normalise before the optimizer's step and save atoms that are off the sphere
by O(lr). Here the update itself ends on it: $u = \operatorname{normalise}(W + u_0) - W$.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array

from jaxsparse.sae.scaffold import SAE
from jaxsparse.targets import path_name


def unit_norm_decoder(
    inner: optax.GradientTransformation, *, name: str = "W_dec"
) -> optax.GradientTransformationExtraArgs:
    r"""Wraps an optimizer so that every row of the decoder has norm 1 after every update.

    1. $g_i \leftarrow g_i - \langle g_i, \hat d_i\rangle \hat d_i$, the tangent part of the gradient.
    2. The inner optimizer steps, to $W + u_0$.
    3. $u = \operatorname{normalise}(W + u_0) - W$.

    The second step is not tangent in general (Adam scales entries apart), so that the third is
    needed. Weight decay pulls atoms towards 0 along themselves, which the third step undoes.

    Change this code

        tx = optax.adam(3e-4)

    to that code

        tx = sae.unit_norm_decoder(optax.adam(3e-4))

    Args:
      inner: any optax optimizer; clipping and decay belong inside.
      name: the last part of the path of the leaves to constrain, `[F, D]` with an atom a row.

    Returns:
      A transformation with the state of `inner`.

    Raises:
      ValueError: no leaf has this name, or it has less than two axes; `update` without params.

    >>> tx = unit_norm_decoder(optax.adam(0.1))
    >>> params = {"W_dec": jnp.eye(2)}
    >>> updates, _ = tx.update({"W_dec": jnp.ones((2, 2))}, tx.init(params), params)
    >>> norms = jnp.linalg.norm(optax.apply_updates(params, updates)["W_dec"], axis=1)
    >>> norms.round(5).tolist()
    [1.0, 1.0]
    """
    extended = optax.with_extra_args_support(inner)

    def over(f: Callable[..., Array], tree, *others):
        """f at the decoders, the first tree's leaves elsewhere."""
        found = []

        def at(path, leaf, *rest):
            if path_name(path).split("/")[-1] not in (name, f"{name}.value"):
                return leaf
            found.append(path)
            if jnp.ndim(leaf) < 2:
                raise ValueError(f"{path_name(path)}: shape {jnp.shape(leaf)}; give [F, D]")
            return f(leaf, *rest)

        tree = jax.tree_util.tree_map_with_path(at, tree, *others)
        if not found:
            raise ValueError(f"name={name!r}: no leaf of the parameters is called so")
        return tree

    def tangent(g: Array, w: Array) -> Array:
        d = _normalise(w)
        return g - jnp.sum(g * d, axis=-1, keepdims=True) * d

    def init(params):
        over(lambda w: w, params)
        return extended.init(params)

    def update(updates, state, params=None, **extra):
        if params is None:
            raise ValueError("params=None: unit_norm_decoder needs tx.update(grads, state, params)")
        updates = over(tangent, updates, params)
        updates, state = extended.update(updates, state, params, **extra)
        land = lambda u, w: (_normalise(w + u) - w).astype(u.dtype)
        return over(land, updates, params), state

    return optax.GradientTransformationExtraArgs(init, update)


def _normalise(w: Array) -> Array:
    """Rows of norm 1; a row of zeros stays."""
    norms = jnp.linalg.norm(w, axis=-1, keepdims=True)
    return jnp.where(norms > 0, w / jnp.where(norms > 0, norms, 1.0), w)


def resample(
    model: SAE,
    opt_state: optax.OptState,
    tx: optax.GradientTransformation,
    x: Array,
    *,
    key: Array,
    dead: Array | None = None,
    size: float = 0.2,
) -> tuple[SAE, optax.OptState]:
    r"""Dead latents start anew at inputs that are badly reconstructed: drop and grow of whole latents.

    For each dead latent an input is drawn with a probability proportional to its squared error. Its
    direction is the new atom, `size` times the mean norm of the living encoder columns times it the new
    column; the bias is 0, and the counter. The optimizer's slots of exactly these entries become 0.

    Args:
      model: any autoencoder that reconstructs its input. It is not changed.
      opt_state: of `tx`, for `nnx.state(model, nnx.Param)`.
      tx: the optimizer; its state's leaves are found by optax's `tree_map_params`.
      x: a batch `[tokens, d_model]`.
      key: of the draw.
      dead: bool `[F]`; None: `model.dead`.
      size: of encoder columns.

    Returns:
      A new model and state.

    Raises:
      ValueError: a transcoder, whose atoms are not inputs; a tied autoencoder has no columns of its own,
        and its atoms alone start anew.
    """
    if model.transcodes:
        raise ValueError("model: atoms of a transcoder are not inputs; resample is not for it")
    model = nnx.clone(model)
    dead = model.dead if dead is None else dead
    errors = jnp.sum((x - model(x)) ** 2, axis=-1)
    chosen = jax.random.categorical(key, jnp.log(errors + 1e-30), shape=(model.d_sae,))
    atoms = _normalise(x[chosen] - model.b_dec[...])
    norms = jnp.linalg.norm(model.encoder(), axis=0)
    alive = jnp.sum(jnp.where(dead, 0.0, norms)) / jnp.maximum(jnp.sum(~dead), 1)
    alive = jnp.where(jnp.any(~dead), alive, 1.0)
    model.W_dec[...] = jnp.where(dead[:, None], atoms, model.W_dec[...])
    if hasattr(model, "W_enc"):
        model.W_enc[...] = jnp.where(dead, size * alive * atoms.T, model.W_enc[...])
    model.b_enc[...] = jnp.where(dead, 0.0, model.b_enc[...])
    model.since_fired[...] = jnp.where(dead, 0, model.since_fired[...])
    params = nnx.state(model, nnx.Param)
    axes = {"W_dec": 0, "W_enc": 1, "b_enc": 0}

    def start_anew(path, leaf):
        axis = axes.get(path_name(path).split("/")[0])
        if axis is None:
            return jnp.zeros((), bool)
        return dead[:, None] if (axis == 0 and leaf.ndim == 2) else dead

    anew = jax.tree_util.tree_map_with_path(start_anew, params)
    zero = lambda slot, where: jnp.where(where, jnp.zeros_like(slot), slot)
    return model, optax.tree_map_params(tx, zero, opt_state, anew)
