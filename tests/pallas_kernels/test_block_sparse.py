"""The BlockSparse format: what it stores, what it refuses, where it goes unharmed."""

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pallas_kernels import BlockSparse, block_sparse_matmul

DENSE = jnp.array(
    [[1, 2, 0, 0], [3, 4, 0, 0], [0, 0, 0, 5], [0, 0, 0, 0], [6, 0, 7, 0], [0] * 4], "f"
)


# A handful of shapes, so that most examples find their code compiled.
SHAPES = [((6, 4), (2, 2)), ((7, 5), (3, 2)), ((4, 9), (4, 3)), ((5, 1), (1, 1))]


@st.composite
def matrices(draw):
    """A dense matrix with zero blocks, its block shape and block mask."""
    (rows, cols), (bh, bw) = draw(st.sampled_from(SHAPES))
    grid = -(-rows // bh), -(-cols // bw)
    bits = draw(st.lists(st.booleans(), min_size=grid[0] * grid[1], max_size=grid[0] * grid[1]))
    mask = np.array(bits, bool).reshape(grid)
    full = np.repeat(np.repeat(mask, bh, 0), bw, 1)[:rows, :cols]
    values = np.random.default_rng(0).normal(size=(rows, cols)).astype(np.float32)
    return jnp.asarray(values * full), (bh, bw), mask


@given(matrices())
def test_every_constructor_holds_the_same_matrix(matrix):
    dense, block_shape, mask = matrix
    full = np.repeat(np.repeat(mask, block_shape[0], 0), block_shape[1], 1)
    full = full[: dense.shape[0], : dense.shape[1]]
    built = [
        BlockSparse.from_dense(dense, block_shape, pad=True),
        BlockSparse.from_mask(dense, full, block_shape, pad=True),
        BlockSparse.from_block_mask(dense, mask, block_shape, pad=True),
        BlockSparse.from_block_mask(dense, mask, block_shape, num_blocks=mask.sum() + 3, pad=True),
    ]
    for w in built:
        np.testing.assert_array_equal(w.to_dense(), dense)
        np.testing.assert_array_equal(w.block_mask, mask)
        assert int(w.used.sum()) == mask.sum()


@given(matrices(), st.randoms(use_true_random=False))
def test_coordinates_may_come_in_any_order(matrix, random):
    dense, block_shape, _ = matrix
    w = BlockSparse.from_dense(dense, block_shape, pad=True)
    shuffled = list(range(w.num_blocks))
    random.shuffle(shuffled)
    p = np.array(shuffled, int)
    again = BlockSparse.from_coordinates(
        w.values[p], w.block_rows[p], w.block_cols[p], w.shape, pad=True
    )
    np.testing.assert_array_equal(again.values, w.values)
    np.testing.assert_array_equal(again.places, w.places)


@given(matrices(), st.integers(0, 3))
def test_order_lists_the_stored_blocks_by_block_row(matrix, spare):
    dense, block_shape, mask = matrix
    w = BlockSparse.from_block_mask(
        dense, mask, block_shape, num_blocks=int(mask.sum()) + spare, pad=True
    )
    assert sorted(w.order.tolist()) == list(range(w.num_blocks))
    visited = list(zip(w.block_rows[w.order].tolist(), w.block_cols[w.order].tolist()))
    used = visited[: int(mask.sum())]
    assert used == sorted(zip(*map(np.ndarray.tolist, np.nonzero(mask))))


@given(matrices())
def test_transposing_twice_gives_the_matrix_back(matrix):
    dense, block_shape, _ = matrix
    w = BlockSparse.from_dense(dense, block_shape, pad=True)
    np.testing.assert_array_equal(w.T.to_dense(), dense.T)
    np.testing.assert_array_equal(w.T.T.values, w.values)
    np.testing.assert_array_equal(w.T.T.places, w.places)
    assert (np.diff(w.T.block_cols) >= 0).all()


def test_with_pattern_keeps_shared_blocks_and_zeroes_new_ones():
    w = BlockSparse.from_dense(DENSE, (2, 2), num_blocks=4)
    new = w.with_pattern(np.array([[True, True], [False, False], [False, True]]))
    expected = np.array(DENSE)
    expected[2:4] = 0
    expected[4:, :2] = 0
    np.testing.assert_array_equal(new.to_dense(), expected)
    np.testing.assert_array_equal(new.block_mask, [[True, True], [False, False], [False, True]])
    assert jax.tree.structure(new) == jax.tree.structure(w)


def test_a_new_pattern_of_as_many_blocks_compiles_nothing_anew():
    traces = []

    @jax.jit
    def run(x, w):
        traces.append(1)
        return block_sparse_matmul(x, w)

    w = BlockSparse.random(jax.random.key(0), (8, 8), (2, 2), density=0.5)
    for seed in range(3):
        new = BlockSparse.random(jax.random.key(seed), (8, 8), (2, 2), density=0.5)
        np.testing.assert_allclose(
            run(jnp.eye(8), new), new.to_dense(), rtol=1e-6, err_msg=str(seed)
        )
    run(jnp.eye(8), w.with_pattern(jnp.eye(4, dtype=bool)))
    assert len(traces) == 1


def test_the_pattern_can_be_made_under_jit():
    @jax.jit
    def build(dense):
        return BlockSparse.from_dense(dense, (2, 2), num_blocks=5)

    np.testing.assert_array_equal(build(DENSE).to_dense(), DENSE)


def test_random_has_the_asked_density_and_balance():
    w = BlockSparse.random(jax.random.key(1), (64, 48), (4, 4), density=0.25, balanced=True)
    np.testing.assert_array_equal(w.block_mask.sum(0), 4)
    assert BlockSparse.random(jax.random.key(1), (64, 48), (4, 4), density=0.25).num_blocks == 48
    a, b = (BlockSparse.random(jax.random.key(k), (64, 48), (4, 4), density=0.25) for k in (1, 2))
    assert not np.array_equal(a.block_mask, b.block_mask)


def loss(values, w):
    return (block_sparse_matmul(jnp.eye(6), w.with_values(values)) ** 2).sum()


def test_the_gradient_of_values_is_that_of_the_stored_blocks():
    w = BlockSparse.from_dense(DENSE, (2, 2))
    g = jax.grad(lambda values: loss(values, w))(w.values)
    np.testing.assert_array_equal(w.with_values(g).to_dense(), 2 * DENSE)


def test_a_whole_format_is_no_argument_of_grad_and_the_error_says_what_to_write():
    w = BlockSparse.from_dense(DENSE, (2, 2))
    whole = lambda w: loss(w.values, w)
    with pytest.raises(TypeError, match="requires real- or complex-valued inputs.*int32"):
        jax.grad(whole)(w)
    g = jax.grad(whole, allow_int=True)(w)  # as that error proposes
    np.testing.assert_array_equal(w.with_values(g.values).to_dense(), 2 * DENSE)
    for use in (g.to_dense, lambda: g.T, lambda: block_sparse_matmul(jnp.eye(6), g)):
        with pytest.raises(
            ValueError, match=r"a gradient has no places.*jax.grad\(lambda values: "
        ):
            use()


WRITE = r"places.dtype=float32 must be an integer type.*dataclasses.replace\(w, values=values\)"


def test_noise_and_complete_decay_of_the_values_leave_every_block_where_it_is():
    w = BlockSparse.from_dense(DENSE, (2, 2))
    for tx in (
        optax.chain(optax.sgd(0.1), optax.add_noise(1.0, 0.5, 0)),
        optax.chain(optax.add_decayed_weights(1.0), optax.sgd(1.0)),  # decays to zero
        optax.adamw(0.1, weight_decay=0.1),
        optax.lion(0.1),
    ):
        values, state = w.values, tx.init(w.values)
        for _ in range(3):
            grads = jax.tree.map(jnp.zeros_like, values)
            updates, state = tx.update(grads, state, values)
            values = optax.apply_updates(values, updates)
        new = w.with_values(values)
        np.testing.assert_array_equal(new.block_mask, w.block_mask)
        stored = np.kron(w.block_mask, np.ones((2, 2)))
        np.testing.assert_array_equal(new.to_dense() * (1 - stored), 0)


def test_noise_on_a_whole_format_is_refused_by_name():
    w = BlockSparse.from_dense(DENSE, (2, 2))
    tx = optax.add_noise(1.0, 0.5, 0)
    as_float = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), w)
    noisy, _ = tx.update(as_float, tx.init(as_float))
    for use in (noisy.to_dense, lambda: noisy.T, lambda: block_sparse_matmul(jnp.eye(6), noisy)):
        with pytest.raises(ValueError, match=WRITE):
            use()


def test_the_average_of_two_patterns_is_refused_by_name_and_that_of_values_is_not():
    a = BlockSparse.from_dense(DENSE, (2, 2))
    b = a.with_pattern(np.roll(a.block_mask, 1, 0))
    for other in (a, b):
        mean = jax.tree.map(lambda x, y: (x + y) / 2, a, other)
        slow = optax.incremental_update(other, a, 0.5)
        for bad in (mean, slow):
            with pytest.raises(ValueError, match=WRITE):
                bad.to_dense()
    twice = a.with_values((a.values + 3 * a.values) / 2)
    np.testing.assert_array_equal(twice.to_dense(), 2 * DENSE)


def test_orbax_restores_it(tmp_path):
    w = BlockSparse.from_dense(DENSE.astype(jnp.bfloat16), (2, 2))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "w", w)
        checkpointer.wait_until_finished()
        back = checkpointer.restore(tmp_path / "w", jax.tree.map(jnp.zeros_like, w))
    assert back.shape == w.shape and back.dtype == w.dtype
    np.testing.assert_array_equal(back.to_dense(), w.to_dense())


def test_export_carries_it():
    w = BlockSparse.from_dense(DENSE, (2, 2))
    exported = jax.export.export(jax.jit(block_sparse_matmul))(jnp.eye(6), w)
    loaded = jax.export.deserialize(exported.serialize())
    np.testing.assert_array_equal(loaded.call(jnp.eye(6), w), DENSE)


def test_vmap_runs_over_a_stack_of_matrices():
    ws = [BlockSparse.random(jax.random.key(k), (8, 6), (2, 2), density=0.5) for k in range(3)]
    stack = jax.tree.map(lambda *a: jnp.stack(a), *ws)
    y = jax.vmap(block_sparse_matmul, in_axes=(None, 0))(jnp.eye(8), stack)
    np.testing.assert_allclose(y, np.stack([w.to_dense() for w in ws]), rtol=1e-6)


REFUSED = [
    (
        lambda: BlockSparse.from_dense(DENSE, (4, 2)),
        r"block_shape=\(4, 2\) must divide shape=\(6, 4\)",
    ),
    (lambda: BlockSparse.from_dense(DENSE, (0, 2)), r"block_shape=\(0, 2\) must be two positive"),
    (lambda: BlockSparse.from_dense(DENSE[0], (2, 2)), r"shape=\(4,\) must have two dimensions"),
    (
        lambda: BlockSparse.from_dense(DENSE, (2, 2), num_blocks=2),
        r"num_blocks=2 must be at least 4",
    ),
    (
        lambda: jax.jit(lambda d: BlockSparse.from_dense(d, (2, 2)))(DENSE),
        r"num_blocks=None must be a number",
    ),
    (
        lambda: BlockSparse.from_mask(DENSE, DENSE[:2] != 0, (2, 2)),
        r"mask.shape=\(2, 4\) must equal",
    ),
    (
        lambda: BlockSparse.from_block_mask(DENSE, np.ones((2, 2)), (2, 2)),
        r"block_mask.shape=\(2, 2\) must be \(3, 2\)",
    ),
    (
        lambda: BlockSparse.from_block_mask(DENSE, np.ones(3)),
        r"block_mask.shape=\(3,\) must have two",
    ),
    (
        lambda: BlockSparse.from_coordinates(np.ones((2, 2, 2)), [0, 0], [1, 1], (6, 4)),
        r"block \(row 0, column 1\) is given twice",
    ),
    (
        lambda: BlockSparse.from_coordinates(np.ones((1, 2, 2)), [3], [0], (6, 4)),
        r"block_rows holds 3; it must be in \[0, 3\)",
    ),
    (
        lambda: BlockSparse.from_coordinates(np.ones((1, 2, 2)), [0], [-1], (6, 4)),
        r"block_cols holds -1; it must be in \[0, 2\)",
    ),
    (
        lambda: BlockSparse.from_coordinates(np.ones((1, 2, 2)), [0, 1], [0], (6, 4)),
        r"block_rows.shape=\(2,\) must be \(1,\)",
    ),
    (
        lambda: BlockSparse.from_coordinates(np.ones((2, 2)), [0], [0], (6, 4)),
        r"values.shape=\(2, 2\) must be",
    ),
    (
        lambda: BlockSparse.random(jax.random.key(0), (4, 4), (2, 2), density=1.5),
        r"density=1.5 must be between",
    ),
    (
        lambda: BlockSparse.from_dense(DENSE, (2, 2)).with_values(np.ones((4, 2, 1))),
        r"values.shape=\(4, 2, 1\) must be \(4, 2, 2\)",
    ),
    (
        lambda: BlockSparse.from_dense(DENSE, (2, 2)).with_pattern(np.ones((2, 2))),
        r"block_mask.shape=\(2, 2\) must be \(3, 2\)",
    ),
    (
        lambda: BlockSparse.from_dense(DENSE, (2, 2)).with_pattern(np.ones((3, 2))),
        r"num_blocks=4 must be at least 6",
    ),
    (
        lambda: BlockSparse.from_dense(DENSE, (2, 2)).split(4),
        r"parts=4 must divide the 2 block columns",
    ),
    (
        lambda: BlockSparse.from_dense(DENSE, (2, 2)).split(2, "diagonal"),
        r"axis='diagonal' must be",
    ),
    (
        lambda: jax.tree.map(
            lambda a: a.astype(jnp.bfloat16), BlockSparse.from_dense(DENSE, (2, 2))
        ).to_dense(),
        r"places.dtype=bfloat16 must be an integer type",
    ),
]


@pytest.mark.parametrize("build, message", REFUSED, ids=[m[:40] for _, m in REFUSED])
def test_bad_input_is_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@given(matrices(), st.integers(0, 3), st.randoms(use_true_random=False))
def test_blocks_in_any_order_stay_where_they_are_stored(matrix, spare, random):
    dense, block_shape, mask = matrix
    flat = list(mask.ravel())
    random.shuffle(flat)
    other = np.array(flat).reshape(mask.shape)
    n = int(mask.sum()) + spare
    w = BlockSparse.from_block_mask(dense, mask, block_shape, num_blocks=n, pad=True).in_any_order()
    new = w.with_pattern(other)
    np.testing.assert_array_equal(new.block_mask, other)
    both = np.kron(mask & other, np.ones(block_shape))[: dense.shape[0], : dense.shape[1]]
    np.testing.assert_array_equal(new.to_dense(), dense * both)
    stays = (mask & other)[np.asarray(w.block_rows)[: mask.sum()], w.block_cols[: mask.sum()]]
    for a, b in ((w.block_rows, new.block_rows), (w.block_cols, new.block_cols)):
        np.testing.assert_array_equal(np.asarray(a)[: mask.sum()][stays], b[: mask.sum()][stays])
    for order, listed in ((new.order, other), (new.column_order, other.T)):
        assert sorted(order.tolist()) == list(range(n))
        places = zip(new.block_rows[order].tolist(), new.block_cols[order].tolist())
        used = [(r, c) if listed is other else (c, r) for r, c in places][: int(other.sum())]
        assert used == list(zip(*map(np.ndarray.tolist, np.nonzero(listed))))
    np.testing.assert_array_equal(new.T.to_dense(), new.to_dense().T)
