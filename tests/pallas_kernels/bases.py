"""What every implementation of an operation must do: one base of tests for each operation.

An implementation is tested by a class that names it:

    class TestXLA(AttentionBase):
        implementation = "xla"

Oracles are dense and share no code with the library. TPU kernels run in the interpreter.
"""

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import (
    BlockMask,
    BlockSparse,
    Condensed,
    Grid,
    NMSparse,
    block_sparse_attention,
    block_sparse_matmul,
    condensed_matmul,
    nm_matmul,
)

# Tests compile much and run little.
quick = functools.partial(
    jax.jit,
    compiler_options={"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False},
)


# Kernels run on their device where there is one (`make test-gpu`), else in the interpreter.
INTERPRETED = {"tpu": True, "gpu": jax.default_backend() != "gpu"}


def close(got, want, tolerance):
    for name, a, b in zip(("y", "dx", "dw", "dv"), got, want):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        atol = tolerance * max(1.0, np.abs(b).max(initial=0.0))
        np.testing.assert_allclose(a, b, atol=atol, rtol=0, err_msg=name)


class Base:
    implementation: ClassVar[str]

    @property
    def options(self):
        interpret = INTERPRETED.get(self.implementation, False)
        return dict(implementation=self.implementation, interpret=interpret)


class ProductBase(Base):
    """`y = x w`; the gradients of x and of the stored values."""

    def check(self, multiply, w, rows=20, tolerance=2e-5, **options):
        rng = np.random.default_rng(1)
        x, dy = (jnp.asarray(rng.integers(-8, 9, (rows, n)) / 8, w.dtype) for n in w.shape)

        @quick
        def run(x, values, dy):
            f = lambda x, values: multiply(x, w.with_values(values), **options)
            y, pull = jax.vjp(f, x, values)
            return y, *pull(dy)

        y, dx, dvalues = run(x, w.values, dy)
        dense, kept = w.to_dense(), w.with_values(jnp.ones_like(w.values)).to_dense() != 0
        x, dy, dense = (np.asarray(a, np.float64) for a in (x, dy, dense))
        placed = w.with_values(dvalues).to_dense()
        want = x @ dense, dy @ dense.T, x.T @ dy * np.asarray(kept)
        close((y, dx, placed), want, tolerance)


class BlockSparseMatmulBase(ProductBase):
    def weight(self, shape, block_shape, mask, dtype=jnp.float32):
        dense = np.random.default_rng(0).integers(-8, 9, shape) / 8
        return BlockSparse.from_block_mask(jnp.asarray(dense, dtype), mask, block_shape, pad=True)

    @pytest.mark.parametrize("kind", ["uneven", "empty column", "full"])
    def test_it_equals_the_dense_product_with_ragged_edges(self, kind):
        mask = np.array([[1, 0, 0], [1, 1, 0]], bool)
        mask = dict(uneven=mask | (np.arange(3) == 2), full=mask | True).get(kind, mask)
        w = self.weight((250, 380), (128, 128), mask)
        self.check(block_sparse_matmul, w, **self.options)

    def test_bfloat16(self):
        w = self.weight((256, 256), (128, 128), np.eye(2) > 0, jnp.bfloat16)
        self.check(block_sparse_matmul, w, tolerance=2e-2, **self.options)

    def test_a_pattern_with_more_blocks_in_a_column_than_the_first_one(self):
        run = quick(functools.partial(block_sparse_matmul, **self.options))
        x = jnp.ones((8, 384))
        first = self.weight((384, 384), (128, 128), np.eye(3) > 0)
        for mask in (np.eye(3), np.arange(9).reshape(3, 3) % 3 == 1, np.tri(3)[::-1] * np.eye(3)):
            w = first.with_pattern(np.asarray(mask) > 0)
            w = w.with_values(jnp.ones_like(w.values))
            np.testing.assert_allclose(run(x, w), x @ w.to_dense(), rtol=1e-6)


class NMMatmulBase(ProductBase):
    n_of_m: ClassVar[list[tuple[int, int]]] = [(2, 4), (1, 4)]

    @pytest.mark.parametrize("kind", [0, 1])
    def test_it_equals_the_dense_product(self, kind):
        n, m = self.n_of_m[kind]
        rows = 512 if m == 4 else 256
        dense = np.random.default_rng(0).integers(-8, 9, (rows, 128)) / 8
        w = NMSparse.from_dense(jnp.asarray(dense, jnp.bfloat16), n, m)
        self.check(nm_matmul, w, rows=5, tolerance=2e-2, **self.options)


class CondensedMatmulBase(ProductBase):
    @pytest.mark.parametrize("rows", [3, 20])
    @pytest.mark.parametrize("density", [0.05, 0.6])
    def test_it_equals_the_dense_product(self, rows, density):
        rng = np.random.default_rng(0)
        dense = rng.normal(size=(90, 70)) * (rng.random((90, 70)) < density)
        w = Condensed.from_dense(jnp.asarray(dense, jnp.float32))
        w = w.with_values(jnp.where(w.filled, 7.0, w.values))  # what fills up counts as zero,
        order = rng.permutation(w.fan_in)  # wherever it is in a column
        w = dataclasses.replace(w, values=w.values[:, order], rows=w.rows[:, order])
        rng = np.random.default_rng(1)
        x, dy = (jnp.asarray(rng.normal(size=(rows, n)), jnp.float32) for n in w.shape)
        f = lambda x, values: condensed_matmul(
            x, w.with_values(values), implementation=self.implementation
        )
        y, pull = jax.vjp(f, x, w.values)
        dx, dvalues = pull(dy)
        at = np.asarray(w.rows), np.asarray(w.outputs)[:, None]
        full = np.pad(np.asarray(x).T @ np.asarray(dy), ((0, 1), (0, 0)))[at]
        close((y, dx, dvalues), (x @ dense, dy @ dense.T, full), 1e-4)


def dense_attention(q, k, v, seen):
    """Softmax attention over the pairs that see each other, all in one matrix of scores."""
    groups = q.shape[1] // k.shape[1]
    k, v = (jnp.repeat(x, groups, 1) for x in (k, v))
    scores = jnp.einsum("bhqd,bhkd->bhqk", q, k, precision="highest") * q.shape[-1] ** -0.5
    weights = jax.nn.softmax(scores, -1, where=seen)
    return jnp.einsum("bhqk,bhkd->bhqd", weights, v, precision="highest")


class AttentionBase(Base):
    block: ClassVar[int] = 8

    def check(self, mask, seen, *, ids=None, dim=64, v_dim=64, heads=2, tolerance=3e-5):
        grid, rng = mask.grid, np.random.default_rng(0)
        shapes = (heads, grid.q_len, dim), (1, grid.kv_len, dim), (1, grid.kv_len, v_dim)
        qkv = [jnp.asarray(rng.normal(size=(1, *s)), jnp.float32) for s in shapes]
        dout = jnp.asarray(rng.normal(size=(1, heads, grid.q_len, v_dim)), jnp.float32)

        def of(attend):
            out, pull = jax.vjp(attend, *qkv)
            return out, *pull(dout)

        ours = lambda *x: block_sparse_attention(*x, mask, segment_ids=ids, **self.options)
        theirs = lambda *x: dense_attention(*x, jnp.asarray(seen))
        close(quick(lambda: of(ours))(), quick(lambda: of(theirs))(), tolerance)

    def sizes(self, q_blocks, kv_blocks, cut=3):
        """A grid whose last blocks are `cut` positions short."""
        b = self.block
        return Grid(q_blocks * b - cut, kv_blocks * b - cut, b, b)

    def test_causal_gradients_at_64_dimensions_and_an_odd_length(self):
        grid = self.sizes(3, 3)
        n = np.arange(grid.q_len)
        self.check(BlockMask.causal(grid), n[:, None] >= n)

    def test_chosen_blocks_gradients_at_odd_shapes_and_dimensions(self):
        grid = self.sizes(2, 3, cut=5)
        keep = np.array([[True, False, True], [False, True, True]])
        seen = np.kron(keep, np.ones((self.block, self.block), bool))
        mask = BlockMask.from_dense(keep, grid)
        self.check(mask, seen[: grid.q_len, : grid.kv_len], dim=40, v_dim=24, heads=3)

    def test_documents_that_are_no_multiples_of_a_block(self):
        grid = self.sizes(3, 3, cut=1)
        n = np.arange(grid.q_len)
        ids = np.searchsorted([self.block // 2 + 1, self.block * 2 - 3], n, side="right")
        seen = (n[:, None] >= n) & (ids[:, None] == ids)
        self.check(BlockMask.causal(grid), seen, ids=jnp.asarray(ids, jnp.int32)[None])

    def test_a_mask_with_more_blocks_than_the_first_one(self):
        b, rng = self.block, np.random.default_rng(0)
        q, k, v = (jnp.asarray(rng.normal(size=(1, 1, 3 * b, 16)), jnp.float32) for _ in range(3))
        run = quick(functools.partial(block_sparse_attention, **self.options))
        for keep in (np.eye(3), np.tri(3), np.ones((3, 3))):
            mask = BlockMask.from_dense(keep > 0, (b, b))
            seen = jnp.asarray(np.kron(keep, np.ones((b, b))) > 0)
            np.testing.assert_allclose(
                run(q, k, v, mask), dense_attention(q, k, v, seen), atol=3e-5
            )
