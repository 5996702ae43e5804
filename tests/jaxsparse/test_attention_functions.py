"""Attention with a choice where other code expects attention: jax.nn, Flax, and the layer."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_oracle import exact, kept, probabilities
from contracts import QUICK
from flax import nnx

from jaxsparse import attention
from jaxsparse.attention import Layout
from jaxsparse.nn import BlockSparseAttention

quick = functools.partial(jax.jit, compiler_options=QUICK)
LAYOUT = Layout(8, 8)
HEAD = jnp.ones((2, 1, 40, 16))
X = jax.random.normal(jax.random.key(1), (2, 40, 16))
rotate = functools.partial(attention.rotary, base=100.0)


def test_a_layer_of_flax_takes_a_predictor_as_its_attention():
    make = lambda **options: nnx.MultiHeadAttention(
        4, 16, decode=False, rngs=nnx.Rngs(0), **options
    )
    causal = nnx.make_causal_mask(X[..., 0])
    want = quick(lambda x: make()(x, mask=causal))(X)
    full = make(attention_fn=attention.as_fn(attention.moba(density=1.0, layout=LAYOUT)))
    np.testing.assert_allclose(quick(lambda x: full(x))(X), want, atol=1e-5)
    np.testing.assert_allclose(quick(lambda x: full(x, is_causal=True))(X), want, atol=1e-5)
    with pytest.raises(ValueError, match="bias and mask must be None"):
        full(X, mask=causal)
    with pytest.raises(ValueError, match="sow_weights=True"):
        full(X, sow_weights=True)
    drop = make(attention_fn=attention.as_fn(attention.dense()), dropout_rate=0.5)
    with pytest.raises(ValueError, match="dropout_rate=0.5: attention weights are never made"):
        drop(X, deterministic=False, rngs=nnx.Rngs(1))


def test_it_has_the_shape_of_jax_attention_with_lengths_and_without_a_batch():
    q, k = jax.random.normal(jax.random.key(0), (2, 2, 40, 4, 8))
    k, lengths = k[:, :, :2], jnp.array([40, 21])
    choose = attention.dense(layout=LAYOUT)
    ours = functools.partial(attention.dot_product_attention, choose=choose, is_causal=True)
    theirs = functools.partial(jax.nn.dot_product_attention, is_causal=True)
    got = quick(lambda q, k, n: ours(q, k, k, key_value_seq_lengths=n))(q, k, lengths)
    want = theirs(q, k, k, key_value_seq_lengths=lengths)
    np.testing.assert_allclose(got[0], want[0], atol=1e-5)
    np.testing.assert_allclose(got[1, :21], want[1, :21], atol=1e-5)
    assert not np.asarray(got[1, 21:]).any()
    np.testing.assert_allclose(quick(lambda q, k: ours(q, k, k))(q[0], k[0]), want[0], atol=1e-5)


@pytest.mark.slow
def test_padding_reaches_no_choice_and_no_output():
    q, k, v = jax.random.normal(jax.random.key(3), (3, 2, 2, 40, 8))
    lengths = jnp.array([40, 21])
    choose = attention.sparge(density=0.7, layout=LAYOUT)
    run = quick(lambda q, k, v: attention.attend(q, k, v, choose, lengths=lengths))
    fill = lambda x: x.at[1, :, 21:].set(jnp.nan)
    out = run(q, k, v)
    np.testing.assert_array_equal(out, run(fill(q), fill(k), fill(v)))
    # The short one alone, at its own length, with as many blocks a row.
    rule = attention.top_k(2)
    both = attention.attend(q, k, v, attention.moba(rule=rule, layout=LAYOUT), lengths=lengths)
    cut = lambda x: x[1:, :, :21]
    alone = attention.attend(cut(q), cut(k), cut(v), attention.moba(rule=rule, layout=LAYOUT))
    np.testing.assert_allclose(both[1:, :, :21], alone, atol=1e-5)


@pytest.mark.parametrize("name", ["moba", "sparge", "unlike", "dsv", "mra"])
def test_no_budget_is_spent_on_blocks_of_padding(name):
    """Where queries see what comes after them, an empty block has scores, too: those of zeros."""
    both = dataclasses.replace(LAYOUT, causal=False, sinks=0, local=0)
    rule = attention.top_k(2)
    low = attention.LowRank(8, 2, 4, rngs=nnx.Rngs(0))
    choose = {
        "moba": attention.moba(rule=rule, layout=both),
        "sparge": attention.sparge(rule=rule, layout=both),
        "unlike": attention.sparge(rule=rule, similarity=0.2, layout=both),
        "dsv": attention.dsv(rule=rule, model=low, layout=both),
        "mra": attention.mra(density=0.4, layout=both),
    }[name]
    q = jnp.abs(jax.random.normal(jax.random.key(3), (2, 2, 64, 8)))
    k = -jnp.abs(jax.random.normal(jax.random.key(4), (2, 2, 64, 8)))  # all scores below 0
    state = attention.State(x=jnp.swapaxes(q, 1, 2)[..., 0, :], lengths=jnp.array([64, 30]))
    pad = lambda x, axis: jnp.where(
        jnp.expand_dims(jnp.arange(64) < state.lengths[:, None], axis), x, 0
    )
    q, k = (pad(x, (1, 3)) for x in (q, k))
    kept = np.asarray(choose(q, k, None, state._replace(x=pad(state.x, 2))).codes != 0)
    blocks = -(-30 // both.block_kv)
    assert not kept[1, :, :, blocks:].any()
    assert kept[1, :, :blocks].any(-1).all()


def layer(**options):
    return BlockSparseAttention(
        16, num_heads=4, num_kv_heads=2, position=rotate, rngs=nnx.Rngs(0), **options
    )


def heads(model, x):
    q, k, v = (jnp.swapaxes(f(x), 1, 2) for f in (model.query, model.key, model.value))
    t = jnp.arange(x.shape[1])
    return rotate(q, t), rotate(k, t), v


def test_a_layer_reports_density_recall_and_what_was_dropped():
    model = layer(choose=attention.moba(density=0.7, layout=Layout(8, 8, capacity=9)))
    out, info = quick(lambda m, x: m(x, with_info=True, samples=40))(model, X)
    np.testing.assert_allclose(out, quick(lambda m, x: m(x))(model, X), atol=1e-6)
    q, k, v = heads(model, X)
    assert model.choose is not None
    mask = quick(model.choose)(q, k)
    recall = (probabilities(q, k) * np.repeat(mask.to_dense(), 2, 1)).sum(-1)
    np.testing.assert_allclose(info.recall, recall.mean(-1), atol=1e-5)
    np.testing.assert_allclose(info.density, kept(mask).sum((2, 3)) / 15, atol=1e-6)
    assert info.dropped.tolist() == [[1, 1]] * 2
    # A row that lost its last block sees what is left, and the layer says so.
    assert float(info.recall.min()) < 0.99


@pytest.mark.slow
def test_a_layer_gives_a_gate_what_it_reads_and_owns_its_parameters():
    gate = attention.SeerGate(4, 2, 4, layout=LAYOUT, rngs=nnx.Rngs(3))
    model = layer(choose=attention.seer(density=0.7, layout=LAYOUT), gate=gate)
    assert "gate" in nnx.state(model, nnx.Param)
    q, k = (jnp.swapaxes(f(X), 1, 2) for f in (model.query, model.key))
    log_a = gate(q, k)  # before positions
    want = attention.by_scores(
        "gate", lambda q, k, s: log_a, attention.select.density(0.7), LAYOUT, lambda sizes: 0.0
    )
    q, k, v = heads(model, X)
    direct = attention.attend(q, k, v, want)
    np.testing.assert_allclose(model(X), model.out(jnp.swapaxes(direct, 1, 2)), atol=1e-5)


def test_decoding_by_pages_is_dense_at_a_full_budget_and_reads_the_best_pages_else():
    run = quick(lambda m, x, c: m.prefill(x, c))
    step = quick(lambda m, x, c: m.decode(x, c))
    want = None
    for budget in (48, 12):
        model = layer(choose=attention.quest(budget=budget, page=4, layout=LAYOUT))
        q, k, v = heads(model, X)
        dense = exact(q, k, v)
        want = model.out(jnp.swapaxes(jnp.asarray(dense, jnp.float32), 1, 2))
        out, cache = run(model, X[:, :30], model.init_cache(2, 48, block_kv=8))
        np.testing.assert_allclose(out, want[:, :30], atol=1e-5)
        for t in range(30, 40):
            out, cache = step(model, X[:, t : t + 1], cache)
            if budget == 48:
                np.testing.assert_allclose(out[:, 0], want[:, t], atol=1e-5)
        fresh = attention.pages(cache.k, 4, cache.lengths)
        for a, b in zip(cache.pages, fresh):
            np.testing.assert_array_equal(a, b)
    assert np.abs(out[:, 0] - want[:, 39]).max() > 1e-3


def test_prompts_of_different_lengths_go_on_as_each_alone():
    model = layer(choose=attention.quest(budget=12, page=4, layout=LAYOUT))
    prompt = X[:, :30].at[1, 11:].set(jnp.nan)
    run = quick(lambda m, x, c, n=None: m.prefill(x, c, lengths=n))
    step = quick(lambda m, x, c: m.decode(x, c))
    by_number = quick(lambda m, x, c: m.decode(x, c, num_blocks=2))
    out, cache = run(model, prompt, model.init_cache(2, 48, block_kv=8), jnp.array([30, 11]))
    assert np.isfinite(cache.k).all() and np.isfinite(cache.sums).all()
    want, alone = run(model, X[1:, :11], model.init_cache(1, 48, block_kv=8))
    np.testing.assert_allclose(out[1, :11], want[0], atol=1e-5)
    for t in range(30, 35):  # over the end of a page and of a block
        token = X[:, t : t + 1]
        for decode in (by_number, step):
            got, after = decode(model, token, cache)
            expected, after_alone = decode(model, token[1:], alone)
            np.testing.assert_allclose(got[1], expected[0], atol=1e-5)
        cache, alone = after, after_alone
    assert cache.lengths.tolist() == [35, 16]


def both_lengths(of_queries, of_keys):
    x = X[:, :, None]
    return attention.dot_product_attention(
        x, x, x, choose=attention.dense(), is_causal=True,
        query_seq_lengths=of_queries, key_value_seq_lengths=of_keys,
    )  # fmt: skip


def test_lengths_are_given_once_or_twice_as_numbers_or_arrays():
    want = both_lengths(None, jnp.array([40, 7]))
    np.testing.assert_array_equal(both_lengths([40, 7], np.array([40, 7])), want)
    assert not np.asarray(want)[1, 7:].any() and np.asarray(want)[1, 6].any()


def test_under_jit_lengths_are_cut_to_what_there_is():
    choose = attention.minference(density=0.7, layout=LAYOUT)
    head = jax.random.normal(jax.random.key(3), HEAD.shape)
    run = quick(lambda n: attention.attend(head, head, head, choose, lengths=n))
    np.testing.assert_array_equal(run(jnp.array([99, 17])), run(jnp.array([40, 17])))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: layer(mask=lambda q, k: None, choose=attention.dense()), "mask and choose are both given"),
        (lambda: layer(choose=attention.dense()).decode(X[:, :1], layer().init_cache(2, 16, block_kv=8)), "num_blocks=None"),
        (lambda: layer(choose=attention.quest(budget=64, page=16)).init_cache(1, 24, block_kv=8), "capacity=24 must be a multiple of the predictor's page=16"),
        (lambda: attention.dot_product_attention(X[:, :, None], X[:, :, None], X[:, :, None], choose=attention.dense()), "is_causal=False, but the predictor has Layout"),
        (lambda: attention.dot_product_attention(X[:, :9, None], X[:, :, None], X[:, :, None], choose=attention.dense(), is_causal=True), "is_causal with 9 queries and 40 keys"),
        (lambda: attention.dot_product_attention(X[:, :, None], X[:, :, None], X[:, :, None], choose=attention.dense(), is_causal=True, query_seq_lengths=jnp.array([1, 2])), "query_seq_lengths alone"),
        (lambda: attention.attend(HEAD, HEAD, HEAD, attention.dense(), lengths=jnp.array([1.0])), "lengths has shape"),
        (lambda: layer(choose=attention.dense()).prefill(X, layer().init_cache(2, 48, block_kv=8), lengths=jnp.array([1])), "lengths has shape"),
        (lambda: attention.attend(HEAD, HEAD, HEAD, attention.dense(), with_info=True, softcap=3.0), "with_info=True"),
        (lambda: attention.attend(HEAD[0], HEAD[0], HEAD[0], attention.dense()), r"q has shape .* give \[batch, heads"),
        (lambda: attention.attend([HEAD[0], HEAD[1, :, :9]], HEAD, HEAD, attention.dense()), "q is a list; give an array .* with lengths="),
        (lambda: attention.attend(HEAD, HEAD[:, :, :9], HEAD[:, :, :9], attention.dense()), r"q_len=40 is more than kv_len=9: .* \[batch, heads, length, dim\]"),
        (lambda: attention.attend(HEAD, HEAD, HEAD, attention.dense(), with_info=True, samples=0), "samples=0 must be at least 1"),
        (lambda: attention.dot_product_attention(X[0], X[0], X[0], choose=attention.dense(), is_causal=True), r"query has shape \(40, 16\)"),
        (lambda: (lambda m: m.decode(X[:, :1], m.prefill(X, m.init_cache(2, 40, block_kv=8))[1]))(layer(choose=attention.quest(budget=12, page=4))), r"the cache is full: lengths=\[40, 40\], capacity=40"),
        (lambda: attention.attend(HEAD, HEAD, HEAD, attention.moba), "choose=moba must be a predictor, which attention.moba"),
        (lambda: attention.as_fn("moba"), "choose=str must be a predictor"),
        (lambda: attention.attend(HEAD, HEAD, HEAD, attention.dense(), lengths=[5, 99]), r"lengths=\[5, 99\] must lie in \[0, 40\]"),
        (lambda: attention.attend(HEAD, HEAD, HEAD, attention.dense(), lengths=jnp.array([-1, 3])), r"must lie in \[0, 40\]"),
        (lambda: both_lengths([3, 4], [5, 9]), "must be the same: give the latter alone"),
        (lambda: jax.jit(both_lengths)(jnp.array([3, 4]), jnp.array([3, 4])), "must be the same: give the latter alone"),
    ],
)  # fmt: skip
def test_bad_input_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


class Decoder(nnx.Module):
    """A layer that keeps its cache as a variable."""

    def __init__(self):
        self.layer = layer(choose=attention.dense(layout=LAYOUT))
        policy = attention.snapkv(24, window=8)
        self.cache = nnx.Variable(
            attention.Cache.create(policy=policy, batch=2, kv_heads=2, head_dim=4, capacity=32)
        )

    def __call__(self, x, prompt):
        q, k, v = (
            jnp.swapaxes(f(x), 1, 2) for f in (self.layer.query, self.layer.key, self.layer.value)
        )
        cache = self.cache.get_value()
        out, cache = (cache.prefill if prompt else cache.decode)(q, k, v, position=rotate)
        self.cache.set_value(cache)
        return self.layer.out(jnp.swapaxes(out, 1, 2))


def test_a_cache_lives_in_a_module():
    model = Decoder()
    run = nnx.jit(lambda m, x, prompt: m(x, prompt), static_argnums=2)
    want = quick(lambda m, x: m(x))(model.layer, X)
    out = run(model, X[:, :30], True)
    np.testing.assert_allclose(out, want[:, :30], atol=1e-5)
    for t in range(30, 34):
        out = run(model, X[:, t : t + 1], False)
    assert model.cache.get_value().counts.tolist() == [[28, 28]] * 2
    assert np.abs(out[:, 0] - want[:, 33]).max() < 0.5


@pytest.mark.slow
def test_heads_and_batch_on_several_devices_are_those_of_one():
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    mesh = Mesh(np.asarray(jax.devices()[:4]).reshape(2, 2), ("batch", "heads"))
    q, k, v = jax.random.normal(jax.random.key(5), (3, 2, 4, 64, 8))
    spec = NamedSharding(mesh, PartitionSpec("batch", "heads"))
    for choose in (
        attention.sparge(density=0.6, layout=LAYOUT),
        attention.minference(density=0.6, layout=LAYOUT),
    ):
        run = quick(lambda q, k, v, choose=choose: attention.attend(q, k, v, choose))
        want = run(q, k, v)
        got = run(*(jax.device_put(x, spec) for x in (q, k, v)))
        np.testing.assert_allclose(got, want, atol=1e-5)
