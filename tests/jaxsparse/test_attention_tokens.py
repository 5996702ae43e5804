"""Dynamic-LLaVA's parts: decisions, the loss, and the equality that makes training honest."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contracts import QUICK
from flax import nnx

from jaxsparse.attention import tokens

quick = functools.partial(jax.jit, compiler_options=QUICK)
RNG = np.random.default_rng(4)


@pytest.fixture(autouse=True)
def the_same_numbers_whichever_tests_run():
    RNG.bit_generator.state = np.random.default_rng(40).bit_generator.state


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


X = normal(1, 1, 4, 2)


def test_a_decision_is_hard_and_its_gradient_soft():
    logits, key = normal(3, 50, 2), jax.random.key(1)
    m, pull = jax.vjp(lambda x: tokens.decide(key, x, 0.7), logits)
    assert set(np.unique(m)) == {0.0, 1.0}
    noise = jax.random.gumbel(key, logits.shape)
    soft = lambda x: jax.nn.softmax((jax.nn.log_softmax(x) + noise) / 0.7)[..., 0]
    y, pull_soft = jax.vjp(soft, logits)
    np.testing.assert_array_equal(m, (y >= 0.5).astype(np.float32))
    g = normal(3, 50)
    np.testing.assert_allclose(pull(g)[0], pull_soft(g)[0], atol=1e-6)
    before = jnp.zeros((3, 50)).at[:, ::2].set(1.0)
    again = tokens.decide(key, logits, 0.7, before)
    np.testing.assert_array_equal(again, m * before)


def test_the_loss_is_zero_where_the_mean_is_the_ratio_and_the_temperature_falls():
    m = jnp.array([[1.0, 0, 0, 0], [1, 1, 0, 0]])
    assert float(tokens.ratio_loss([m[:1]], [0.25])) == 0
    assert float(tokens.ratio_loss([m, m], [0.25, 0.5])) == pytest.approx(100 * 2 * 0.0625 / 2)
    np.testing.assert_allclose(
        tokens.temperature(jnp.array([0.0, 0.5, 1.0])), [1, 0.1**0.5, 0.1], rtol=1e-6
    )


def test_masked_training_is_the_shorter_sequence_for_the_tokens_that_stay():
    q, k, v = normal(1, 4, 20, 8), 3 * normal(1, 2, 20, 8), normal(1, 2, 20, 8)
    m = jnp.asarray(RNG.random((1, 20)) < 0.5, jnp.float32)
    stay = np.flatnonzero(m[0])
    got = tokens.masked_attention(q, k, v, m)
    swap = lambda x: jnp.swapaxes(x, 1, 2)
    cut = lambda x: swap(x)[:, stay]
    want = jax.nn.dot_product_attention(cut(q), cut(k), cut(v), is_causal=True)
    np.testing.assert_allclose(swap(got)[:, stay], want, atol=1e-5)
    # One that is dropped sees itself and what stays.
    t = int(np.flatnonzero(np.asarray(m[0]) == 0)[-1])
    seen = [*(j for j in stay if j < t), t]
    alone = jax.nn.dot_product_attention(swap(q)[:, t : t + 1], swap(k)[:, seen], swap(v)[:, seen])
    np.testing.assert_allclose(swap(got)[:, t : t + 1], alone, atol=1e-5)
    ones = tokens.masked_attention(q, k, v, jnp.ones((1, 20)))
    want = jax.nn.dot_product_attention(swap(q), swap(k), swap(v), is_causal=True)
    np.testing.assert_allclose(swap(ones), want, atol=1e-5)
    # A dropped key far above the others: finite, gradients too.
    k = k.at[:, :, 0].mul(100.0)
    grad = jax.grad(lambda m: tokens.masked_attention(q, k, v, m).sum())(m.at[:, 0].set(0.0))
    assert np.isfinite(grad).all() and np.abs(grad).max() > 0


def test_kept_tokens_stand_in_their_order():
    logits = normal(3, 30, 2)
    got = np.asarray(tokens.keep_tokens(logits, 0.35))
    score = np.asarray(jax.nn.log_softmax(logits)[..., 0])
    for b in range(3):
        assert got[b].tolist() == sorted(np.argsort(-score[b])[:10].tolist())
    assert tokens.keep_tokens(logits, 1.0).tolist() == [list(range(30))] * 3
    with pytest.raises(ValueError, match="ratio=0.01 of 30 tokens keeps 0"):
        tokens.keep_tokens(logits, 0.01)
    with pytest.raises(ValueError, match="2 masks and 1 ratios"):
        tokens.ratio_loss([logits[..., 0]] * 2, [0.5])
    with pytest.raises(ValueError, match=r"mask has shape \(1, 3\)"):
        tokens.masked_attention(X, X, X, jnp.ones((1, 3)))


@pytest.mark.slow
def test_a_predictor_learns_which_tokens_matter():
    """The target is a mean over marked tokens; a quarter may stay."""
    model = tokens.ImagePredictor(6, width=16, heads=2, blocks=1, rngs=nnx.Rngs(0))
    graph, params = nnx.split(model)
    tx = optax.adam(3e-3)

    def batch(key):
        a, b = jax.random.split(key)
        mark = jax.random.permutation(a, jnp.arange(16) < 4, independent=True).astype(jnp.float32)
        x = jax.random.normal(b, (16, 16, 6)).at[..., 0].set(0.0)
        marks = jax.vmap(lambda k: jax.random.permutation(k, mark))(jax.random.split(a, 16))
        return x.at[..., 0].set(4 * marks - 2), marks

    def loss(params, key, progress):
        x, marks = batch(key)
        m = tokens.decide(key, nnx.merge(graph, params)(x), tokens.temperature(progress))
        # What is dropped cannot be read.
        value = x[..., 1:3]
        want = (marks[..., None] * value).sum(1) / 4
        got = ((m * marks)[..., None] * value).sum(1) / 4
        return jnp.mean((got - want) ** 2) + tokens.ratio_loss([m], [0.25], weight=5.0)

    @quick
    def train(params):
        def step(carry, i):
            params, slots = carry
            grads = jax.grad(loss)(params, jax.random.fold_in(jax.random.key(0), i), i / 200)
            updates, slots = tx.update(grads, slots)
            return (optax.apply_updates(params, updates), slots), None

        (params, _), _ = jax.lax.scan(
            step, (params, tx.init(params)), jnp.arange(200.0).astype(jnp.int32)
        )
        x, marks = batch(jax.random.key(5))
        return nnx.merge(graph, params)(x), marks

    logits, marks = train(params)
    found = np.asarray(tokens.keep_tokens(logits, 0.25))
    hits = np.mean([np.asarray(marks)[b, found[b]].mean() for b in range(16)])
    assert hits > 0.9
