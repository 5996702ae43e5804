"""Predictors that train: the gate of SeerAttention, DSV's projections, NSA; gradients through the kernel."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from attention_oracle import exact, kept, probabilities, tiles
from contracts import QUICK
from flax import nnx

from jaxsparse import attention
from jaxsparse.attention import Layout, State
from jaxsparse.attention.nsa import Compressor, compressed_attention, mean_blocks, selection_scores
from jaxsparse.attention.seer import rotary

nsa_module = importlib.import_module("jaxsparse.attention.nsa")  # the name is the function's
RNG = np.random.default_rng(2)
quick = functools.partial(jax.jit, compiler_options=QUICK)


@pytest.fixture(autouse=True)
def the_same_numbers_whichever_tests_run():
    RNG.bit_generator.state = np.random.default_rng(20).bit_generator.state


def normal(*shape, scale=1.0):
    return jnp.asarray(scale * RNG.normal(size=shape), jnp.float32)


N, DIM, B = 64, 8, 8
LAYOUT = Layout(B, B, sinks=0, local=0)


# ------------------------------------------------------------------ SeerAttention


def test_the_target_is_the_block_maximum_with_rows_of_sum_one():
    q, k = normal(1, 4, N, DIM), normal(1, 2, N, DIM)
    got = attention.seer_target(q, k, LAYOUT)
    top = tiles(probabilities(q, k), B, B, lambda t: t.max((-1, -2)))
    np.testing.assert_allclose(got, top / top.sum(-1, keepdims=True), atol=1e-6)
    np.testing.assert_allclose(got.sum(-1), 1, atol=1e-5)


def test_the_loss_is_a_divergence_and_zero_at_the_target():
    target = jnp.array([[[[1.0, 0.0], [0.25, 0.75]]]])
    exactly = jnp.where(target > 0, jnp.log(jnp.where(target > 0, target, 1)), -jnp.inf)
    assert float(attention.seer_loss(exactly, target)) == 0
    half = jnp.log(jnp.array([[[[1.0, 0.0], [0.5, 0.5]]]]))
    want = 10 * (0.25 * np.log(0.5) + 0.75 * np.log(1.5)) / 2
    assert float(attention.seer_loss(half, target)) == pytest.approx(want, rel=1e-5)


def test_a_gate_learns_a_planted_pattern_and_nothing_else_moves():
    """Blocks of queries look for the block of keys with their centre; the gate has to find the rotation between."""
    turn = jnp.asarray(np.linalg.qr(RNG.normal(size=(DIM, DIM)))[0], jnp.float32)
    weights = {"q": jnp.eye(DIM) * 3, "k": turn * 3}

    def batch(key):
        a, b, c = jax.random.split(key, 3)
        centres = jax.random.normal(a, (4, 1, 8, DIM))
        owner = jax.random.permutation(b, 8)
        spread = lambda x: jnp.repeat(x, B, 2) + 0.2 * jax.random.normal(c, (4, 1, N, DIM))
        return spread(centres[:, :, owner] @ weights["q"]), spread(centres @ weights["k"])

    layout = Layout(B, B, causal=False, sinks=0, local=0)
    gate = attention.SeerGate(1, 1, DIM, width=16, rope_base=None, layout=layout, rngs=nnx.Rngs(0))
    graph, params = nnx.split(gate)
    tx = optax.adam(0.02)

    def loss(params, key):
        q, k = batch(key)
        # What the model's own attention does: keys turned back.
        target = attention.seer_target(q, k @ turn.T, layout)
        return attention.seer_loss(nnx.merge(graph, params)(q, k), target)

    @quick
    def train(params, state):
        def step(carry, key):
            params, state = carry
            value, grads = jax.value_and_grad(loss)(params, key)
            updates, state = tx.update(grads, state)
            return (optax.apply_updates(params, updates), state), value

        return jax.lax.scan(step, (params, state), jax.random.split(jax.random.key(0), 100))

    (params, _), losses = train(params, tx.init(params))
    assert float(losses[-5:].mean()) < 0.2 * float(losses[0])
    trained = nnx.merge(graph, params)
    q, k = batch(jax.random.key(99))
    choose = attention.seer(rule=attention.top_k(2), layout=layout)
    mask = quick(lambda q, k: choose(q, k, None, State(params=trained)))(q, k)
    p = tiles(probabilities(q, k @ turn.T, False), B, B, lambda t: t.sum((-1, -2)) / B)
    best = np.sort(p, -1)[..., -2:].sum(-1).mean()
    assert (p * kept(mask)).sum(-1).mean() > 0.95 * best

    # The gate's inputs are the caller's to stop; the target never passes a gradient.
    grads = jax.grad(lambda w: attention.seer_target(normal(1, 1, N, DIM) @ w["q"], normal(1, 1, N, DIM) @ w["k"], layout).sum())(weights)  # fmt: skip
    assert all(not np.asarray(g).any() for g in grads.values())


def test_rotary_positions_turn_halves():
    x, t = normal(3, 6), np.array([0, 1, 5])
    got = rotary(x, t, 100.0)
    for i in range(3):
        for c in range(3):
            a = t[i] * 100.0 ** (-c / 3)
            z = complex(x[i, c], x[i, c + 3]) * np.exp(1j * a)
            np.testing.assert_allclose([got[i, c], got[i, c + 3]], [z.real, z.imag], atol=1e-5)


# ------------------------------------------------------------------ DSV


def test_a_low_rank_predictor_learns_scores_of_low_rank_and_leaves_the_model_alone():
    features, rank = 12, 3
    wq, wk = (normal(features, rank) @ normal(rank, DIM) for _ in range(2))
    model = attention.LowRank(features, 1, rank, rngs=nnx.Rngs(0))
    graph, params = nnx.split(model)
    heads = lambda x, w: (x @ w)[:, None]

    def loss(params, x, w):
        return attention.dsv_loss(nnx.merge(graph, params), x, heads(x, w[0]), heads(x, w[1]))

    tx = optax.adam(0.03)

    @quick
    def train(params):
        def step(carry, key):
            params, state = carry
            x = jax.random.normal(key, (2, N, features))
            value, grads = jax.value_and_grad(loss)(params, x, (wq, wk))
            updates, state = tx.update(grads, state)
            return (optax.apply_updates(params, updates), state), value

        keys = jax.random.split(jax.random.key(1), 300)
        (params, _), losses = jax.lax.scan(step, (params, tx.init(params)), keys)
        x = jax.random.normal(jax.random.key(7), (1, N, features))
        other = jax.grad(loss, argnums=(1, 2))(params, x, (wq, wk))
        low_q, low_k = nnx.merge(graph, params)(x)
        return losses, other, x, low_q[0, 0] @ low_k[0, 0].T

    losses, other, x, guess = train(params)
    assert float(losses[-1]) < 0.02
    assert all(not np.asarray(g).any() for g in jax.tree.leaves(other))
    true = (x[0] @ wq) @ (x[0] @ wk).T
    top = lambda s: np.argsort(-np.asarray(s), -1)[:, :8]
    same = np.mean([len(set(a) & set(b)) / 8 for a, b in zip(top(true), top(guess))])
    assert same > 0.95


def test_heads_that_are_not_sparse_yet_read_everything():
    x, q, k = normal(1, N, 16), normal(1, 4, N, DIM), normal(1, 2, N, DIM)
    low = attention.LowRank(16, 2, 3, rngs=nnx.Rngs(0))
    layout = Layout(B, B, causal=False)

    @quick
    def choose(sparse):
        how = attention.dsv(density=0.4, model=low, sparse_heads=sparse, layout=layout)
        return how(q, k, None, State(x=x))

    mask = kept(choose(jnp.array([True, False])))
    assert mask[0, 0].sum() == 25 and mask[0, 1].sum() == 64
    assert kept(choose(jnp.array([True, True])))[0, 1].sum() == 25


@pytest.mark.slow
def test_head_sparsity_is_the_share_of_keys_that_hold_the_mass():
    q, k = normal(1, 2, 20, DIM, scale=3), normal(1, 2, 20, DIM)
    got = attention.head_sparsity(q, k, mass=0.9, rows=20, causal=True)
    p = probabilities(q, k)
    want = np.zeros((1, 2))
    for h in range(2):
        for i in range(20):
            row = np.cumsum(np.sort(p[0, h, i])[::-1])
            want[0, h] += (1 - ((row < 0.9 - 1e-6).sum() + 1) / (i + 1)) / 20
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert attention.pays(jnp.array([0.5, 0.01]), 64, 16).tolist() == [True, False]


# ------------------------------------------------------------------ NSA

HEADS, GROUPS = 4, 2
Q, K, V = normal(1, HEADS, N, DIM), normal(1, GROUPS, N, DIM), normal(1, GROUPS, N, DIM)
CHOICE = Layout(1, B, sinks=0, local=1)


@functools.partial(quick, static_argnums=(4, 5))
def nsa(q, k, v, gates, num_blocks, window):
    return attention.nsa_attention(
        q, k, v, gates, num_blocks=num_blocks, window=window, layout=CHOICE
    )


def only(i):
    return jnp.zeros((1, HEADS, N, 3)).at[..., i].set(1.0)


def test_compression_and_selection_are_those_of_a_loop():
    k, v = (np.asarray(x, np.float64) for x in (K, V))
    out, p = compressed_attention(Q, mean_blocks(6, 3)(K), mean_blocks(6, 3)(V), length=6, stride=3)
    starts = range(0, N - 6 + 1, 3)
    scores = np.zeros((GROUPS, N, N // B))
    for h in range(HEADS):
        g = h // 2
        for t in range(N):
            blocks = [c for c in starts if c + 5 <= t]
            if not blocks:
                assert not np.asarray(out[0, h, t]).any()
                continue
            keys = np.stack([k[0, g, c : c + 6].mean(0) for c in blocks])
            values = np.stack([v[0, g, c : c + 6].mean(0) for c in blocks])
            w = np.exp(keys @ np.asarray(Q[0, h, t]) / np.sqrt(DIM))
            w /= w.sum()
            np.testing.assert_allclose(out[0, h, t], w @ values, atol=1e-5)
            for c, weight in zip(blocks, w):
                for n in range(N // B):
                    scores[g, t, n] += weight * (c < n * B + B and c + 6 > n * B)
    got = selection_scores(p, CHOICE, N, length=6, stride=3)
    np.testing.assert_allclose(got[0], scores, atol=1e-5)


@pytest.mark.parametrize("length, stride", [(B, B), (6, 3)])
def test_a_predictor_that_looks_at_a_few_queries_at_a_time_scores_the_same(
    monkeypatch, length, stride
):
    monkeypatch.setattr(nsa_module, "_QUERIES", 2 * B)
    q, k = (
        Q[:, :, :43],
        K[:, :, :62],
    )  # the last tile, the last part and the last block are not whole
    sizes = dict(length=length, stride=stride)
    blocks = mean_blocks(length, stride)(k)
    p = np.asarray(compressed_attention(q, blocks, blocks, offset=62 - 43, **sizes)[1]).sum(2)
    want = np.zeros((*p.shape[:2], 6, 8))
    for t, c in np.ndindex(p.shape[2:]):
        for n in range(8):
            want[:, :, t // B, n] += p[:, :, t, c] * (
                c * stride < (n + 1) * B and c * stride + length > n * B
            )
    got = nsa_module._tile_scores(q, blocks, Layout(B, B), 62, **sizes)
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_with_all_blocks_the_selected_branch_is_dense_and_the_window_is_a_window():
    dense = exact(Q, K, V)
    np.testing.assert_allclose(nsa(Q, K, V, only(1), N // B, 16), dense, atol=1e-5)
    q, k = np.arange(N)[:, None], np.arange(N)
    seen = ((k <= q) & (q - k < 16))[None, None]
    np.testing.assert_allclose(nsa(Q, K, V, only(2), N // B, 16), exact(Q, K, V, seen), atol=1e-5)
    assert not np.asarray(nsa(Q, K, V, only(0), N // B, 16))[:, :, : B - 1].any()


@pytest.mark.slow
def test_every_branch_is_causal_and_what_is_not_selected_is_not_read():
    gates = jnp.ones((1, HEADS, N, 3)) / 3
    out = nsa(Q, K, V, gates, 3, 16)
    t = 37
    later = nsa(Q, K.at[:, :, t:].add(3.0), V.at[:, :, t:].set(50.0), gates, 3, 16)
    np.testing.assert_allclose(out[:, :, :t], later[:, :, :t], atol=1e-5)
    # One block of values: the selected branch of a query changes if and only if it chose the block.
    choose = attention.nsa(rule=attention.top_k(3), layout=CHOICE)
    blocks = kept(quick(choose)(Q, K))[0]
    other = nsa(Q, K, V.at[:, :, 16:24].add(5.0), only(1), 3, 16)
    moved = np.abs(np.asarray(other - nsa(Q, K, V, only(1), 3, 16)))[0].max(-1) > 0
    np.testing.assert_array_equal(moved, np.repeat(blocks[:, :, 2], 2, 0) == 1)
    assert blocks.shape[0] == GROUPS and 0 < moved[:, 30:].mean() < 1


def test_gradients_are_those_of_fixed_choices():
    compress = [Compressor(DIM, length=B, stride=4, rngs=nnx.Rngs(i)) for i in range(2)]
    graph, params = nnx.split(compress)
    gates = jax.nn.sigmoid(normal(1, HEADS, N, 3))
    want = normal(1, HEADS, N, DIM)

    def loss(params, q, k, v, gates):
        ck, cv = nnx.merge(graph, params)
        out = attention.nsa_attention(
            q, k, v, gates, num_blocks=3, window=9, compress_k=ck, compress_v=cv, layout=CHOICE
        )
        return jnp.sum(out * want)

    args = (params, Q, K, V, gates)
    grads = quick(jax.grad(loss, argnums=range(5)))(*args)
    assert all(np.isfinite(g).all() and np.abs(g).max() > 0 for g in jax.tree.leaves(grads))
    value = quick(loss)
    direction = jax.tree.map(lambda x: normal(*x.shape), args)
    eps = 1e-3
    move = lambda s: jax.tree.map(lambda x, d: x + s * eps * d, args, direction)
    numeric = (float(value(*move(1))) - float(value(*move(-1)))) / (2 * eps)
    exactly = sum(
        float(jnp.vdot(g, d)) for g, d in zip(jax.tree.leaves(grads), jax.tree.leaves(direction))
    )
    assert numeric == pytest.approx(exactly, rel=2e-2)


# ------------------------------------------------------------------ gradients through the kernel


@pytest.mark.parametrize("name", ["moba", pytest.param("sparge", marks=pytest.mark.slow)])
def test_at_a_full_budget_gradients_are_those_of_dense_attention(name):
    choose = getattr(attention, name)(density=1.0, layout=Layout(B, B))
    want = normal(1, HEADS, N, DIM)

    def sparse(q, k, v):
        return jnp.sum(attention.attend(q, k, v, choose) * want)

    def dense(q, k, v):
        q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
        return jnp.sum(
            jnp.swapaxes(jax.nn.dot_product_attention(q, k, v, is_causal=True), 1, 2) * want
        )

    for a, b in zip(*(quick(jax.grad(f, (0, 1, 2)))(Q, K, V) for f in (sparse, dense))):
        np.testing.assert_allclose(a, b, atol=1e-4)
