"""`stored(rule="momentum")`: growth by the sketched average of gradients, and the sketch itself."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jaxsparse
from jaxsparse.nn import BlockSparseLinear, CondensedLinear, check_stored, full_gradients
from pallas_kernels import BlockSparse, sketch_blocks
from tests.jaxsparse.test_stored import split

BLOCK, SHAPE, STEPS, EVERY = (4, 4), (16, 24), 13, 4
DATA = np.random.default_rng(0)
XS = DATA.normal(size=(STEPS, 8, 16)).astype(np.float32)
YS = DATA.normal(size=(STEPS, 8, 24)).astype(np.float32)


def layer(sketch=BLOCK, **options):
    options = dict(density=0.5, rngs=nnx.Rngs(0), use_bias=False) | options
    return BlockSparseLinear(*SHAPE, block_shape=BLOCK, sketch=sketch, **options)


def moving(**options):
    options = dict(
        rule="momentum", total_steps=20, update_every=EVERY, drop_fraction=lambda _: 0.3
    ) | options  # fmt: skip
    return jaxsparse.stored(optax.sgd(0.05), **options)


def train(tx, model, xs=XS, ys=YS):
    make, params = split(model)

    def step(carry, batch):
        p, s = carry
        loss = lambda p: ((make(p)(batch[0]) - batch[1]) ** 2).sum(-1).mean()
        g = full_gradients(jax.grad(loss, allow_int=True)(p))
        u, s = tx.update(g, s, p)
        return (optax.apply_updates(p, u), s), None

    carry = params, tx.init(params)
    return jax.jit(lambda c, *data: jax.lax.scan(step, c, data)[0])(carry, xs, ys)


def weight(params):
    return BlockSparse(params["values"], params["places"], SHAPE, BLOCK)


def norms(m):
    """The Frobenius norms of the blocks."""
    cut = m.reshape(SHAPE[0] // 4, 4, SHAPE[1] // 4, 4)
    return np.sqrt((cut**2).sum((1, 3)))


def by_hand(w, mask, decay):
    """The same run on a dense matrix in NumPy, float64."""
    w, mask = w.astype(np.float64), mask.copy()
    wide = lambda m: np.kron(m, np.ones(BLOCK)) > 0
    momentum = np.zeros(SHAPE)
    for t in range(STEPS):
        g = XS[t].T @ (2 * (XS[t] @ w - YS[t])) / len(XS[t])
        momentum = decay * momentum + (1 - decay) * g
        old = mask.copy()
        if t and t % EVERY == 0 and t <= 15:
            sizes = np.abs(w).reshape(4, 4, 6, 4).sum((1, 3))
            n = int(mask.sum())
            keep = np.argsort(-np.where(mask, sizes, -1.0).ravel())[: n - int(0.3 * n)]
            mask = np.isin(np.arange(mask.size), keep).reshape(mask.shape)
            free = np.where(mask, -1.0, norms(momentum))
            grown = np.argsort(-free.ravel())[: n - len(keep)]
            mask |= np.isin(np.arange(mask.size), grown).reshape(mask.shape)
        w = np.where(wide(mask & old), w - 0.05 * g, 0.0)
    return w, mask


def test_with_sketches_of_full_size_it_is_sparse_momentum_on_blocks():
    model = layer()
    start = weight(split(model)[1])
    params, state = train(moving(decay=0.8), model)
    check_stored(state)
    w, mask = by_hand(np.asarray(start.to_dense()), np.asarray(start.block_mask), 0.8)
    np.testing.assert_array_equal(weight(params).block_mask, mask)
    np.testing.assert_allclose(weight(params).to_dense(), w, atol=1e-5)
    assert (mask != np.asarray(start.block_mask)).any()
    # What the last gradient alone would have grown is another pattern.
    assert (by_hand(np.asarray(start.to_dense()), start.block_mask, 0.0)[1] != mask).any()


def test_a_sketch_is_linear_and_right_in_the_mean():
    x, dy = XS[0], YS[0]
    probe = jnp.zeros((4, 2, 6, 3))

    def sketch(x, dy):
        return jax.grad(lambda p: (sketch_blocks(x, jnp.zeros_like(dy), p, BLOCK) * dy).sum())(
            probe
        )

    halves = sketch(x[:4], dy[:4]) + sketch(x[4:], dy[4:])
    np.testing.assert_allclose(sketch(x, dy), halves, atol=1e-4)
    # Every row of the weight goes into the sketches of its own block row.
    rows = np.stack([sketch(np.eye(16)[None, i], dy[:1]) for i in range(16)])
    of = np.abs(rows).sum((2, 3, 4)) > 0  # [row of W, block row]
    np.testing.assert_array_equal(of, np.kron(np.eye(4), np.ones((4, 1))) > 0)


def test_the_mean_square_of_sketches_is_that_of_the_gradient():
    # Each block has signs of its own: many blocks are many draws.
    rng = np.random.default_rng(1)
    x, dy = (rng.normal(size=(64, n)).astype(np.float32) for n in (512, 768))
    probe = jnp.zeros((512 // 8, 2, 768 // 8, 4))
    s = jax.grad(lambda p: (sketch_blocks(x, jnp.zeros_like(dy), p, (8, 8)) * dy).sum())(probe)
    exact = ((x.T @ dy).reshape(64, 8, 96, 8) ** 2).sum((1, 3))
    found = np.asarray((s**2).sum((1, 3)))
    assert abs(found.mean() / exact.mean() - 1) < 0.05
    # 8 numbers for 64: large blocks are told from small ones.
    scale = np.repeat(np.where(np.arange(64) % 8 == 0, 4.0, 1.0), 8)
    s = jax.grad(lambda p: (sketch_blocks(x * scale, jnp.zeros_like(dy), p, (8, 8)) * dy).sum())(
        probe
    )
    rows = np.asarray((s**2).sum((1, 3))).mean(1)
    assert set(np.argsort(-rows)[:8]) == set(range(0, 64, 8))


def test_what_always_pulls_is_grown_where_a_single_gradient_sees_noise():
    # A part of the target belongs to a block that is not stored; most outputs get noise besides.
    rng = np.random.default_rng(2)
    mask = np.zeros((4, 6), bool)
    mask[:, :4] = np.eye(4)
    signal = np.zeros(SHAPE)
    signal[:4, 16:20] = rng.normal(size=BLOCK)
    xs = rng.normal(size=(61, 8, 16)).astype(np.float32)
    noise = 4 * rng.normal(size=(61, 8, 24)) * (np.arange(24) < 16)
    ys = (xs @ signal + noise).astype(np.float32)
    stored = jnp.asarray(np.kron(mask, np.ones(BLOCK)) > 0)
    w = BlockSparse.from_mask(jnp.full(SHAPE, 1e-3), stored, BLOCK)

    def grown(decay):
        options = dict(drop_fraction=lambda _: 0.25, update_every=60, end_step=60, total_steps=80)
        model = BlockSparseLinear(
            *SHAPE, block_shape=BLOCK, weight=w, sketch=(2, 2), use_bias=False
        )
        params, state = train(moving(decay=decay, **options), model, xs, ys)
        check_stored(state)
        return bool(weight(params).block_mask[0, 4])

    assert grown(0.95) and not grown(0.0)


@pytest.mark.parametrize("split_rows", [False, True])
def test_on_eight_devices_it_is_the_run_on_one(split_rows):
    # The layer's rows over devices, by XLA or inside of `shard_map`: sketches add up.
    mesh = Mesh(np.array(jax.devices()[:4]), "d")
    rows = NamedSharding(mesh, PartitionSpec("d"))
    one, _ = train(moving(), layer((2, 2)))
    model = layer((2, 2), rows=rows if split_rows else None)
    xs, ys = (jax.device_put(a, NamedSharding(mesh, PartitionSpec(None, "d"))) for a in (XS, YS))
    many, state = train(moving(), model, xs, ys)
    check_stored(state)
    np.testing.assert_array_equal(one["places"], many["places"])
    np.testing.assert_allclose(one["values"], many["values"], atol=1e-5)


def test_replicas_that_average_gradients_move_as_one():
    tx, model = moving(), layer((2, 2))
    make, params = split(model)

    def loss(p, x, y):
        return ((make(p)(x) - y) ** 2).sum(-1).mean()

    def step(p, s, x, y):
        g = full_gradients(jax.grad(loss, allow_int=True)(p, x, y))
        u, s = tx.update(jax.lax.pmean(g, "d"), s, p)
        return optax.apply_updates(p, u), s

    run = jax.pmap(step, axis_name="d", devices=jax.devices()[:4])
    copies = lambda tree: jax.tree.map(lambda x: jnp.stack([x] * 4), tree)
    p, s = copies(params), copies(tx.init(params))
    for x, y in zip(XS, YS):
        p, s = run(p, s, x.reshape(4, 2, 16), y.reshape(4, 2, 24))
    one, _ = train(tx, model)
    for i in range(4):
        np.testing.assert_array_equal(p["places"][i], one["places"])


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_gradients_that_are_not_finite_leave_the_momentum(bad):
    tx, (_, params) = moving(), split(layer((2, 2)))
    grads = full_gradients(jax.tree.map(jnp.ones_like, params))
    good = tx.update(grads, tx.init(params), params)[1]
    wrong = grads | {"sketch": grads["sketch"].at[0, 0, 0, 0].set(bad)}
    state = good._replace(count=jnp.int32(EVERY))
    updates, after = tx.update(wrong, state, params)
    np.testing.assert_array_equal(after.momentum[0], good.momentum[0])
    if jnp.isnan(bad):  # which moves nothing
        assert not updates["places"].any() and int(after.skipped) == 1


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_sketches_of_half_precision_hold_large_sums_and_small_gradients(dtype):
    # All signs are those of the same seeds, so that the sketch of float32 is the oracle.
    def sketch(x, dy):
        loss = lambda p: (sketch_blocks(x, jnp.zeros_like(dy), p, (128, 128)) * dy).sum()
        return jax.grad(loss)(jnp.zeros((1, 2, 1, 2)))

    rng = np.random.default_rng(0)
    x, dy = (jnp.asarray(rng.normal(size=(64, 128)), dtype).astype(jnp.float32) for _ in "xy")
    close = functools.partial(np.testing.assert_allclose, rtol=0.05, atol=1.0)
    close(sketch(x.astype(dtype), dy.astype(dtype)), sketch(x, dy))
    large = (dy * 16384).astype(dtype)
    close(sketch(x.astype(dtype), large) / 16384, sketch(x, large.astype(jnp.float32)) / 16384)
    close(sketch(x.astype(dtype), dy * 1e-9) * 1e9, sketch(x, dy))


def test_signs_are_the_same_under_every_setting_of_jax():
    def sketch():
        x, dy = jnp.asarray(XS[0]), jnp.asarray(YS[0])
        loss = lambda p: (sketch_blocks(x, jnp.zeros_like(dy), p, BLOCK) * dy).sum()
        return jax.grad(loss)(jnp.zeros((4, 2, 6, 3), jnp.float32))

    want = sketch()
    with jax.enable_x64(True):
        np.testing.assert_allclose(sketch(), want, rtol=1e-4, atol=1e-4)
    with jax.default_prng_impl("rbg"):
        np.testing.assert_allclose(sketch(), want, rtol=1e-4, atol=1e-4)


def test_under_x64_the_momentum_stays_float32():
    with jax.enable_x64(True):
        params, state = train(moving(decay=np.float64(0.8)), layer((2, 2)))
    check_stored(state)
    assert state.momentum[0].dtype == jnp.float32
    again, _ = train(moving(decay=0.8), layer((2, 2)))
    np.testing.assert_array_equal(params["places"], again["places"])


def test_a_sketch_changes_no_step_that_clips_inside():
    def step(model):
        tx, (make, params) = clipping, split(model)
        g = jax.grad(lambda p: ((make(p)(XS[0]) - YS[0]) ** 2).mean(), allow_int=True)(params)
        return tx.update(full_gradients(g), tx.init(params), params)[0]["values"]

    inner = optax.chain(optax.clip_by_global_norm(1e-3), optax.sgd(0.1))
    clipping = jaxsparse.stored(inner, rule="set", total_steps=300)
    np.testing.assert_allclose(optax.global_norm(step(layer((2, 2)))), 1e-4, rtol=1e-5)
    np.testing.assert_array_equal(step(layer((2, 2))), step(layer(None)))


def test_it_moves_on_odd_shapes_and_in_every_seed_of_a_vmap():
    odd = BlockSparseLinear(
        17, 23, block_shape=(5, 4), density=0.5, sketch=(3, 1), use_bias=False, rngs=nnx.Rngs(0)
    )
    tx, (make, params) = moving(drop_fraction=lambda _: 0.5), split(odd)

    def run(seed):
        def step(carry, key):
            p, s = carry
            x = jax.random.normal(key, (8, 17))
            g = jax.grad(lambda p: ((make(p)(x) - x.sum()) ** 2).mean(), allow_int=True)(p)
            u, s = tx.update(full_gradients(g), s, p)
            return (optax.apply_updates(p, u), s), None

        keys = jax.random.split(jax.random.key(seed), STEPS)
        return jax.lax.scan(step, (params, tx.init(params)), keys)[0]

    many, states = jax.jit(jax.vmap(run))(jnp.arange(2))
    check_stored(states)
    for i in range(2):
        one, _ = jax.jit(run)(i)
        np.testing.assert_array_equal(many["places"][i], one["places"])
        assert (one["places"] != params["places"]).any()


def test_stacked_layers_keep_a_sketch_each():
    @nnx.split_rngs(splits=3)
    @nnx.vmap(in_axes=0, out_axes=0)
    def stack_of(rngs):
        return layer((2, 2), rngs=rngs)

    stack = stack_of(nnx.Rngs(0))
    tx, (_, params) = moving(), split(stack)
    assert tx.init(params).momentum[0].shape == (3, 4, 2, 6, 2)


def test_nothing_of_the_dense_size_is_made():
    model = BlockSparseLinear(
        2048, 2048, block_shape=(128, 128), density=0.05, sketch=(2, 2), rngs=nnx.Rngs(0)
    )
    tx, (make, params) = moving(), split(model)
    x = jnp.ones((8, 2048))

    @jax.jit
    def step(p, s):
        g = full_gradients(jax.grad(lambda p: make(p)(x).sum(), allow_int=True)(p))
        u, s = tx.update(g, s, p)
        return optax.apply_updates(p, u), s

    text = step.lower(params, tx.init(params)).compile().as_text()
    assert "2048,2048" not in text
    assert tx.init(params).momentum[0].size == 2**2 * 16**2


def test_what_cannot_be_is_named():
    with pytest.raises(
        ValueError, match=r"sketch=\(5, 2\): give two integers, from 1 to .*\(4, 4\)"
    ):
        layer((5, 2))
    with pytest.raises(ValueError, match="sketch=2: give two integers"):
        layer(2)
    with pytest.raises(ValueError, match="keeps no sketch for growth by momentum"):
        moving().init(split(layer(None))[1])
    with pytest.raises(ValueError, match="decay=1: must be at least 0 and less than 1"):
        moving(decay=1)
    singles = CondensedLinear(8, 8, density=0.5, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="rule='momentum': 'values' stores weights one by one"):
        moving().init(split(singles)[1])
    tx, (_, params) = moving(), split(layer((2, 2)))
    grads = {k: g for k, g in jax.tree.map(jnp.zeros_like, params).items() if k != "sketch"}
    with pytest.raises(ValueError, match="the gradient of 'sketch' is missing"):
        tx.update(grads, tx.init(params), params)
    with pytest.raises(ValueError, match=r"'sketch' has shape .* must be \(4, 2, 6, 2\)"):
        tx.init(params | {"sketch": jnp.zeros((4, 2, 5, 2))})
    with pytest.raises(ValueError, match=r"probe.shape=\(4, 2, 5, 2\) must be \(4, r, 6, c\)"):
        sketch_blocks(XS[0], YS[0], jnp.zeros((4, 2, 5, 2)), BLOCK)
