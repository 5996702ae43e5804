r"""Graphs: networks whose connections follow a graph, and graphs whose edges are pruned.

`layered` turns a directed acyclic graph into layers and the masks between them, skips included: the prior of
a sparse network (`jaxsparse.nn.GraphNetwork`). `edge_scores` and `keep_edges` are TEDDY's: which edges a graph
network can do without, from degrees alone.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Layered(NamedTuple):
    """A graph in layers: the nodes of each, and masks `[nodes of i, nodes of j]` of the edges from layer i to
    layer j > i, by `(i, j)`; pairs without an edge have none."""

    nodes: tuple[np.ndarray, ...]
    masks: dict[tuple[int, int], np.ndarray]


def layered(adjacency: np.ndarray) -> Layered:
    """The layers of a directed acyclic graph: a node stands one after its last predecessor.

    Args:
      adjacency: bool `[n, n]`, True at (u, v) for an edge from u to v.

    Returns:
      Layers and masks; the masks hold every edge once.

    (Stier & Granitzer, deepstruct; Stier et al., Experiments on properties of hidden structures of sparse
    neural networks, 2021.)

    >>> found = layered(np.array([[0, 1, 1], [0, 0, 1], [0, 0, 0]], bool))  # 0 -> 1 -> 2, and 0 -> 2
    >>> [n.tolist() for n in found.nodes], sorted(found.masks)
    ([[0], [1], [2]], [(0, 1), (0, 2), (1, 2)])

    Raises:
      ValueError: not a square matrix; a cycle.
    """
    edges = np.asarray(adjacency, bool)
    if edges.ndim != 2 or edges.shape[0] != edges.shape[1]:
        raise ValueError(f"adjacency: the shape is {edges.shape}; it must be [n, n]")
    depth, left = np.zeros(len(edges), int), np.ones(len(edges), bool)
    while left.any():
        ready = left & ~(edges & left[:, None]).any(axis=0)
        if not ready.any():
            raise ValueError(f"adjacency: nodes {np.flatnonzero(left).tolist()[:8]} are on a cycle")
        for v in np.flatnonzero(ready):
            before = depth[edges[:, v]]
            depth[v] = before.max() + 1 if before.size else 0
        left &= ~ready
    nodes = tuple(np.flatnonzero(depth == d) for d in range(depth.max(initial=-1) + 1))
    masks = {}
    for i, first in enumerate(nodes):
        for j in range(i + 1, len(nodes)):
            mask = edges[np.ix_(first, nodes[j])]
            if mask.any():
                masks[i, j] = mask
    return Layered(nodes, masks)


def small_world(n: int, neighbours: int, chance: float, *, seed: int = 0) -> np.ndarray:
    """The adjacency of a small world (Watts & Strogatz, 1998), each edge from the lower number to the higher,
    so that it has no cycle.

    A ring in which every node knows its `neighbours` nearest ones (an even number); each edge is moved to
    another end with the given chance.

    >>> int(small_world(8, 4, 0.5).sum())
    16

    Raises:
      ValueError: an odd number of neighbours, or as many as there are nodes; a chance out of [0, 1].
    """
    if neighbours % 2 or not 0 < neighbours < n:
        raise ValueError(f"neighbours={neighbours}: must be even, and in 2..{n - 1}")
    if not 0 <= chance <= 1:
        raise ValueError(f"chance={chance}: must be in [0, 1]")
    rng = np.random.default_rng(seed)
    both = np.zeros((n, n), bool)
    ring = [(u, (u + d) % n) for d in range(1, neighbours // 2 + 1) for u in range(n)]
    for u, v in ring:
        both[u, v] = both[v, u] = True
    for u, v in ring:
        free = np.flatnonzero(~both[u] & (np.arange(n) != u))
        if free.size and rng.random() < chance:
            w = rng.choice(free)
            both[u, v] = both[v, u] = False
            both[u, w] = both[w, u] = True
    return np.triu(both, 1)


def edge_scores(edges: np.ndarray, nodes: int) -> np.ndarray:
    r"""TEDDY's worth of edges: $\frac{n_u}{deg_u} \frac{n_v}{deg_v}$ with
    $n_v = \frac{1}{deg_v} \sum_{k \in N(v)} deg_k^{-1/2}$. Edges between nodes that have many others go first;
    self-loops have the highest score.

    Args:
      edges: `[2, E]`, both directions of each edge, self-loops at will.
      nodes: their number.

    Returns:
      float64 `[E]`; the same for both directions.

    (Seo, Yun & Yang, TEDDY: trimming edges with degree-based discrimination strategy, 2024.)

    >>> path = np.array([[0, 1, 1, 2, 2, 3], [1, 0, 2, 1, 3, 2]])
    >>> edge_scores(path, 4).round(5).tolist()[::2]
    [0.30178, 0.18214, 0.30178]

    Raises:
      ValueError: another shape, nodes out of range, an edge without its other direction.
    """
    edges = np.asarray(edges)
    if edges.ndim != 2 or edges.shape[0] != 2:
        raise ValueError(f"edges: the shape is {edges.shape}; it must be [2, E]")
    if edges.size and not (edges.min() >= 0 and edges.max() < nodes):
        raise ValueError(f"edges: nodes must be in 0..{nodes - 1}")
    known = set(map(tuple, edges.T.tolist()))
    if alone := [e for e in known if e[::-1] not in known]:
        raise ValueError(f"edges: {alone[0]} stands without its other direction")
    u, v = edges
    loop = u == v
    degree = np.bincount(u[~loop], minlength=nodes).astype(np.float64)
    safe = np.maximum(degree, 1)
    reach = np.bincount(u[~loop], weights=safe[v[~loop]] ** -0.5, minlength=nodes) / safe
    scores = (reach / safe)[u] * (reach / safe)[v]
    scores[loop] = scores.max(initial=1.0) + 1
    return scores


def keep_edges(edges: np.ndarray, nodes: int, sparsity: float) -> np.ndarray:
    r"""The mask of the edges that TEDDY keeps: of E undirected ones the $\lfloor E p \rfloor$ of least score go,
    both directions together; self-loops stay, and are not counted.

    Args:
      edges: as for `edge_scores`.
      nodes: their number.
      sparsity: p, in [0, 1).

    Returns:
      bool, of the edges.

    >>> path = np.array([[0, 1, 1, 2, 2, 3], [1, 0, 2, 1, 3, 2]])
    >>> keep_edges(path, 4, 0.34).tolist()
    [True, True, False, False, True, True]

    Raises:
      ValueError: a sparsity out of range; as `edge_scores`.
    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity={sparsity}: must be in [0, 1)")
    edges = np.asarray(edges)
    scores = edge_scores(edges, nodes)
    first = np.flatnonzero(edges[0] < edges[1])
    drop = first[np.argsort(scores[first], kind="stable")[: int(first.size * sparsity + 1e-9)]]
    gone = set(map(tuple, edges[:, drop].T.tolist()))
    gone |= {e[::-1] for e in gone}
    return np.array([tuple(e) not in gone for e in edges.T.tolist()], bool)
