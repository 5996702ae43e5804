"""Decoding that costs k rows, not F: a code of k entries times a dictionary, forward and backward.

A code that has k of F entries is stored as k values and their places. The product with a dictionary
`[F, D]` then reads k rows for each token, and so do both of its gradients; nothing of size `[tokens, F]`
is made. On CPU a loop over the k slots keeps one `[tokens, D]` array in cache.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxsparse.selection import topk_indices


@jax.custom_vjp
def sparse_decode(values: Array, indices: Array, dictionary: Array) -> Array:
    r"""The product $\hat x_b = \sum_j v_{bj}\, d_{i_{bj}}$ of sparse codes and a dictionary.

    Args:
      values: `[tokens, k]`.
      indices: integer `[tokens, k]`, the rows of the dictionary; out of range is not allowed.
      dictionary: `[F, D]`, one atom a row.

    Returns:
      `[tokens, D]`. Gradients go to `values` and to the rows that were read: others get zeros.

    >>> sparse_decode(jnp.array([[2.0, 1.0]]), jnp.array([[1, 0]]), jnp.eye(2)).tolist()
    [[1.0, 2.0]]
    """
    slots = values.shape[-1]
    start = jnp.zeros((values.shape[0], dictionary.shape[1]), jnp.result_type(values, dictionary))

    def add(j: Array, total: Array) -> Array:
        return total + values[:, j, None] * dictionary[indices[:, j]]

    return lax.fori_loop(0, slots, add, start)


def _forward(values, indices, dictionary):
    return sparse_decode(values, indices, dictionary), (values, indices, dictionary)


def _backward(saved, g):
    values, indices, dictionary = saved
    return (
        sparse_project(g, indices, dictionary).astype(values.dtype),
        None,
        scatter_outer(values, indices, g, dictionary.shape[0]).astype(dictionary.dtype),
    )


sparse_decode.defvjp(_forward, _backward)


def sparse_project(x: Array, indices: Array, dictionary: Array) -> Array:
    """Inner products of `x [tokens, D]` with the rows `indices [tokens, k]` of `dictionary [F, D]`.

    >>> sparse_project(jnp.array([[3.0, 4.0]]), jnp.array([[1]]), jnp.eye(2)).tolist()
    [[4.0]]
    """
    columns = lax.map(
        lambda column: jnp.sum(x * dictionary[column], axis=-1), jnp.moveaxis(indices, -1, 0)
    )
    return jnp.moveaxis(columns, 0, -1)


def scatter_outer(values: Array, indices: Array, g: Array, rows: int) -> Array:
    """The sum of outer products `values[b, j] g[b]` into row `indices[b, j]` of `[rows, D]`: the
    gradient of a dictionary. Slots are added one after the other, so that sums have one order."""

    def add(j: Array, total: Array) -> Array:
        return total.at[indices[:, j]].add(values[:, j, None] * g)

    start = jnp.zeros((rows, g.shape[-1]), jnp.result_type(values, g))
    return lax.fori_loop(0, values.shape[-1], add, start)


def topk_encode(x: Array, weight: Array, bias: Array, k: int) -> tuple[Array, Array]:
    r"""The k largest of $x W + b$ in each row, with gradients that cost k columns of W.

    Indices are constants; gradients flow through the k selected pre-activations only.

    Args:
      x: `[tokens, D]`.
      weight: `[D, F]`.
      bias: `[F]`.
      k: how many, at most F.

    Returns:
      values `[tokens, k]`, which may be negative, and indices int32 `[tokens, k]`.

    >>> values, indices = topk_encode(jnp.array([[3.0, 4.0]]), jnp.eye(2), jnp.zeros(2), 1)
    >>> values.tolist(), indices.tolist()
    ([[4.0]], [[1]])
    """
    values, indices = _topk_encode(x, weight, bias, k)
    return values, indices


def _encode(x, weight, bias, k):
    z = x @ weight + bias
    indices, _ = topk_indices(z, k)
    return jnp.take_along_axis(z, indices, axis=-1), indices


_topk_encode = jax.custom_vjp(_encode, nondiff_argnums=(3,))


def _encode_forward(x, weight, bias, k):
    values, indices = _encode(x, weight, bias, k)
    return (values, indices), (x, weight, bias, indices)


def _encode_backward(k, saved, cotangents):
    x, weight, bias, indices = saved
    g = cotangents[0]
    rows = weight.shape[1]
    d_weight = scatter_outer(g, indices, x, rows).T
    d_bias = jnp.zeros((rows,), g.dtype).at[indices].add(g)
    d_x = sparse_decode(g, indices, weight.T)
    return d_x.astype(x.dtype), d_weight.astype(weight.dtype), d_bias.astype(bias.dtype)


_topk_encode.defvjp(_encode_forward, _encode_backward)
