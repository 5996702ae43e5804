"""Block scores: sums of |x^T dy| over blocks, against NumPy; and as the gradient of a probe."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from pallas_kernels import block_scores, score_blocks, sketch_blocks
from pallas_kernels.block_scores import xla
from tests.pallas_kernels.bases import quick

CASES = [  # rows, in, out, block shape
    (20, 300, 700, (128, 128)),
    (600, 1100, 1300, (128, 256)),  # several tiles, ragged
]


def oracle(x, dy, block_shape):
    gradient = np.abs(np.asarray(x, np.float64).T @ np.asarray(dy, np.float64))
    (bh, bw), (rows, cols) = block_shape, gradient.shape
    found = np.zeros((-(-rows // bh), -(-cols // bw)))
    for r in range(rows):
        for c in range(cols):
            found[r // bh, c // bw] += gradient[r, c]
    return found


def operands(rows, width, height, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=(rows, n)), dtype) for n in (width, height)]


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_small_blocks_of_ragged_matrices_are_scored(implementation):
    for rows, width, height, block_shape in [
        (5, 7, 9, (2, 3)),
        (1, 4, 4, (4, 4)),
        (3, 5, 1, (1, 1)),
    ]:
        x, dy = operands(rows, width, height)
        found = block_scores(x, dy, block_shape, implementation=implementation)
        np.testing.assert_allclose(found, oracle(x, dy, block_shape), rtol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_the_kernel_scores_as_the_panels_do(case):
    *sizes, block_shape = case
    x, dy = operands(*sizes)
    run = lambda **options: quick(
        functools.partial(block_scores, block_shape=block_shape, **options)
    )
    want = run(implementation="reference")(x, dy)
    np.testing.assert_allclose(run(implementation="xla")(x, dy), want, rtol=1e-5)
    np.testing.assert_allclose(run(implementation="tpu", interpret=True)(x, dy), want, rtol=1e-5)


def test_panels_are_whole_blocks_and_cover_the_matrix():
    for size, block, most in [(4096, 128, 512), (300, 128, 512), (5000, 96, 512), (700, 700, 512)]:
        panel, number = xla._cut(size, block, most)
        assert panel % block == 0 and panel * number >= size > panel * (number - 1)


def test_no_array_of_the_size_of_the_gradient_is_made():
    x, dy = (jax.ShapeDtypeStruct((64, 8192), jnp.float32) for _ in range(2))
    memory = jax.jit(lambda x, dy: block_scores(x, dy, (128, 128))).lower(x, dy).compile()
    assert memory.memory_analysis().temp_size_in_bytes < 0.1 * 4 * 8192**2


def test_the_probe_costs_its_scores_where_they_are_due_only():
    x, w = operands(6, 8, 8)[0], jnp.ones((8, 4))
    probe = jnp.zeros((2, 2))

    def loss(w, probe, due):
        y = score_blocks(x, x @ w, probe, due, (4, 2))
        return (y**2).sum()

    for due in (0, 1):
        g, scores = jax.grad(loss, (0, 1))(w, probe, jnp.full(2, due))
        np.testing.assert_allclose(g, jax.grad(lambda w: ((x @ w) ** 2).sum())(w), rtol=1e-6)
        want = np.abs(g).reshape(2, 4, 2, 2).sum((1, 3)) * due
        np.testing.assert_allclose(scores, want, rtol=1e-5)
        some = jax.grad(loss, 1)(w, probe[:1], jnp.array([0, due]))
        np.testing.assert_allclose(some, want[1:], rtol=1e-5)
    text = jax.jit(jax.grad(loss, 1)).lower(w, probe, jnp.zeros(2, int)).as_text()
    assert "stablehlo.case" in text  # a conditional, not a select of both


@pytest.mark.parametrize("mean", [False, True])
def test_devices_that_share_the_rows_find_the_scores_of_all(mean):
    """Of five block columns eight devices score one or none each."""
    x, w = operands(16, 8, 8)[0], jnp.asarray(np.random.default_rng(1).normal(size=(8, 10)))
    due, rows, whole = jnp.array([1, 0]), PartitionSpec("data"), PartitionSpec()

    def loss(probe, x, axis_name=None):
        y = score_blocks(x, x @ w, probe, due, (4, 2), axis_name=axis_name)
        return (y**2).mean() if mean else (y**2).sum()

    def shared(probe, x):
        one = lambda probe, x: loss(probe, x, "data")[None]
        mesh = Mesh(jax.devices(), ("data",))
        parts = jax.shard_map(one, mesh=mesh, in_specs=(whole, rows), out_specs=rows)(probe, x)
        return parts.mean() if mean else parts.sum()

    for probe in (jnp.zeros((1, 5)), jnp.zeros((2, 5))):
        want = jax.grad(loss)(probe, x)
        np.testing.assert_allclose(jax.jit(jax.grad(shared))(probe, x), want, rtol=1e-5)
        assert (want != 0).any()
    found = jax.pmap(lambda x: jax.lax.pmean(jax.grad(loss)(probe, x, "data"), "data"), "data")
    whole_loss = jax.grad(lambda probe: loss(probe, x) / (1 if mean else 8))
    np.testing.assert_allclose(found(x.reshape(8, 2, 8))[0], whole_loss(probe), rtol=1e-5)


def test_scores_of_stacked_layers_are_those_of_each():
    x, dy = operands(6, 8, 8)
    xs, dys = jnp.stack([x, 2 * x]), jnp.stack([dy, dy])
    found = jax.vmap(functools.partial(block_scores, block_shape=(4, 4)))(xs, dys)
    want = [block_scores(a, b, (4, 4)) for a, b in zip(xs, dys)]
    np.testing.assert_allclose(found, jnp.stack(want), rtol=1e-6)


@pytest.mark.parametrize(
    "name, call",
    [
        ("dy", block_scores),
        ("y", lambda x, y, b: score_blocks(x, y, jnp.zeros((4, 4)), jnp.ones(4, int), b)),
        ("y", lambda x, y, b: sketch_blocks(x, y, jnp.zeros((4, 1, 4, 1)), b)),
    ],
    ids=["block_scores", "score_blocks", "sketch_blocks"],
)
def test_rows_and_block_shapes_are_checked_alike(name, call):
    x, y = operands(6, 8, 8)
    for block_shape in ((0, 2), (2, -1), (2,), (2, 2, 2), 2, (2.0, 2)):
        message = f"block_shape={block_shape} must be two positive integers"
        with pytest.raises(ValueError, match=re.escape(message)):
            call(x, y, block_shape)
    for other in (y[:5], y[0], y[None], jnp.float32(1)):
        message = f"x.shape=(6, 8) and {name}.shape={other.shape} must be equal but for"
        with pytest.raises(ValueError, match=re.escape(message)):
            call(x, other, (2, 2))
    want = (4, 4) if name == "dy" else (6, 8)
    assert call(x, y, [2, np.int64(2)]).shape == want


def test_bad_arguments_are_named():
    x, dy = operands(6, 8, 8)
    with pytest.raises(ValueError, match="x.dtype=int32 must be a floating-point type"):
        block_scores(x.astype(int), dy, (2, 2))
    with pytest.raises(ValueError, match="'tpu' does not support .* it runs on TPU"):
        block_scores(x, dy, (2, 2), implementation="tpu")
    with pytest.raises(ValueError, match="multiples of 128"):
        block_scores(x, dy, (2, 2), implementation="tpu", interpret=True)
    with pytest.raises(ValueError, match=r"probe.shape=\(3, 3\) must be \(4, 4\)"):
        score_blocks(x, dy, jnp.zeros((3, 3)), jnp.zeros(4, int), (2, 2))
    with pytest.raises(ValueError, match=r"due.shape=\(3,\) must be \(4,\)"):
        score_blocks(x, dy, jnp.zeros((2, 4)), jnp.zeros(3, int), (2, 2))
    for name in (["data"], ()):
        with pytest.raises(ValueError, match="must be a name, a tuple of names, or None"):
            score_blocks(x, x, jnp.zeros((4, 4)), jnp.ones(4, int), (2, 2), axis_name=name)
    with pytest.raises(ValueError, match="give a vector of integers"):
        score_blocks(x, dy, jnp.zeros((4, 4)), jnp.zeros(4), (2, 2))
