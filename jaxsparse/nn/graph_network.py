"""A network whose hidden connections are the edges of a graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array


class GraphNetwork(nnx.Module):
    r"""$h_j = \phi(\sum_{i<j} h_i (M_{ij} \odot W_{ij}) + b_j)$: a hidden layer for each layer of a graph, with a
    masked kernel for every pair of layers between which there are edges. Nodes of layer 0 read all inputs, all
    nodes without a successor are read by the outputs.

    The masks are part of the module and applied in its forward pass, so that any optimizer trains it: the
    gradient of a weight without an edge is 0. Masks multiply dense products; the speed is that of dense layers.

    Args:
      in_features: inputs.
      out_features: outputs.
      graph: `jaxsparse.tickets.layered(adjacency)`, or what has its `nodes` and `masks`.
      activation: of the nodes.
      rngs: of the kernels, whose variance counts the edges that enter a node.

    Source: Stier et al., "Experiments on properties of hidden structures of sparse neural networks", 2021.

    >>> from jaxsparse import tickets
    >>> graph = tickets.layered(tickets.small_world(12, 4, 0.3))
    >>> model = GraphNetwork(5, 3, graph, rngs=nnx.Rngs(0))
    >>> model(jnp.ones((2, 5))).shape
    (2, 3)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        graph: Any,
        *,
        activation: Callable[[Array], Array] = nnx.relu,
        rngs: nnx.Rngs,
    ):
        sizes = [len(n) for n in graph.nodes]
        if not sizes:
            raise ValueError("graph: it has no nodes")
        self.activation, self.pairs = activation, tuple(sorted(graph.masks))
        arriving = [np.zeros(n) for n in sizes]
        leaving = [np.zeros(n) for n in sizes]
        for (i, j), mask in graph.masks.items():
            arriving[j] += mask.sum(axis=0)
            leaving[i] += mask.sum(axis=1)
        self.entry = nnx.Linear(in_features, sizes[0], rngs=rngs)
        kernels, masks = [], []
        for i, j in self.pairs:
            scale = 1 / np.sqrt(np.maximum(arriving[j], 1))
            kernel = jax.random.normal(rngs.params(), (sizes[i], sizes[j])) * scale * np.sqrt(2)
            mask = jnp.asarray(graph.masks[i, j])
            kernels.append(nnx.Param(jnp.where(mask, kernel, 0.0)))
            masks.append(nnx.Variable(mask))
        self.kernels, self.masks = nnx.List(kernels), nnx.List(masks)
        self.biases = nnx.List([nnx.Param(jnp.zeros(n)) for n in sizes])
        self.ends = nnx.Variable(jnp.asarray(np.concatenate(leaving) == 0))
        self.exit = nnx.Linear(sum(sizes), out_features, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """`[batch, in_features]` to `[batch, out_features]`."""
        sums: list[Array] = [
            jnp.broadcast_to(b[...], (x.shape[0], b[...].size)) for b in self.biases
        ]
        sums[0] = sums[0] + self.entry(x)
        held: list[Array] = []
        for j in range(len(sums)):
            for n, (i, k) in enumerate(self.pairs):
                if k == j:
                    w = jnp.where(self.masks[n][...], self.kernels[n][...], 0.0)
                    sums[j] = sums[j] + held[i] @ w
            held.append(self.activation(sums[j]))
        nodes = jnp.concatenate(held, axis=1)
        return self.exit(jnp.where(self.ends[...], nodes, 0.0))
