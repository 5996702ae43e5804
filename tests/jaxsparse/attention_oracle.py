"""Attention and choices of blocks in NumPy, from the definitions: what the tests of the room compare with."""

import numpy as np


def probabilities(q, k, causal=True):
    """[batch, heads, q_len, kv_len] in float64; grouped heads share keys, ends are aligned."""
    q, k = np.asarray(q, np.float64), np.asarray(k, np.float64)
    k = np.repeat(k, q.shape[1] // k.shape[1], 1)
    s = np.einsum("bhqd,bhkd->bhqk", q, k) / np.sqrt(q.shape[-1])
    if causal:
        n, m = s.shape[-2:]
        s = np.where(np.arange(m) <= np.arange(n)[:, None] + m - n, s, -np.inf)
    w = np.exp(s - s.max(-1, keepdims=True))
    return w / w.sum(-1, keepdims=True)


def exact(q, k, v, seen=None, causal=True):
    """Dense attention, or that over the seen pairs [batch, heads, q_len, kv_len]."""
    p = probabilities(q, k, causal)
    if seen is not None:
        p = p * np.repeat(np.asarray(seen), p.shape[1] // seen.shape[1], 1)
        p = p / p.sum(-1, keepdims=True)
    v = np.repeat(np.asarray(v, np.float64), p.shape[1] // v.shape[1], 1)
    return p @ v


def tiles(x, bq, bk, reduce):
    """A function of every block of the last two axes."""
    n, m = x.shape[-2:]
    out = np.zeros((*x.shape[:-2], -(-n // bq), -(-m // bk)))
    for i in range(out.shape[-2]):
        for j in range(out.shape[-1]):
            out[..., i, j] = reduce(x[..., i * bq : (i + 1) * bq, j * bk : (j + 1) * bk])
    return out


def block_mass(q, k, bq, bk, causal=True):
    p = probabilities(q, k, causal)
    return tiles(p, bq, bk, lambda t: t.sum((-1, -2)) / t.shape[-2])


def best(row, number, forced):
    """Indices kept: forced ones, then the largest, ties at the lower index."""
    order = sorted(range(len(row)), key=lambda j: (not forced[j], -row[j], j))
    return sorted(j for j in order[:number] if np.isfinite(row[j]) or forced[j])


def kept(mask):
    """Blocks of a BlockMask as integers."""
    return (np.asarray(mask.codes) != 0).astype(int)
