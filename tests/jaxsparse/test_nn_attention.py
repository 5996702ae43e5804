"""The attention layer: masks, gradients, Linen, and decoding against a cache."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contracts import QUICK
from flax import nnx

from jaxsparse.nn.attention import BlockSparseAttention, top_blocks
from pallas_kernels import BlockMask, Grid

SIZES = dict(block_q=8, block_kv=8)


def layer(**options):
    return BlockSparseAttention(16, num_heads=4, num_kv_heads=2, rngs=nnx.Rngs(0), **options)


X = jax.random.normal(jax.random.key(1), (2, 40, 16))
# The layer holds no state that a call changes, so that plain jit will do.
quick = functools.partial(jax.jit, compiler_options=QUICK)
run = quick(lambda model, x, mask=None: model(x, mask))
prefill = quick(lambda model, x, cache: model.prefill(x, cache))
decode = quick(lambda model, x, cache, n: model.decode(x, cache, num_blocks=n), static_argnums=3)


@quick
def dense(model, x):
    q, k, v = (f(x) for f in (model.query, model.key, model.value))
    return model.out(jax.nn.dot_product_attention(q, k, v, is_causal=True))


def test_with_every_block_it_is_dense_causal_attention():
    for mask in (lambda q, k: BlockMask.causal(Grid(q.shape[2], **SIZES)), top_blocks(5, **SIZES)):
        model = layer(mask=mask)
        np.testing.assert_allclose(run(model, X), dense(model, X), atol=1e-5)


def test_a_mask_given_with_the_call_takes_the_place_of_the_layers():
    model = layer(mask=top_blocks(1, **SIZES))
    mask = BlockMask.local(Grid(40, **SIZES), window=10)
    given = run(model, X, mask)
    np.testing.assert_allclose(given, run(layer(mask=lambda q, k: mask), X), atol=1e-6)
    assert np.abs(run(model, X) - given).max() > 1e-3


def test_chosen_blocks_are_the_own_one_and_the_best_before():
    q = k = jnp.zeros((1, 1, 32, 2)).at[:, :, 8:16].set(1.0).at[:, :, 24:].set(1.0)
    mask = jax.jit(top_blocks(2, **SIZES))(q, k)
    want = [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [0, 1, 0, 1]]
    np.testing.assert_array_equal(mask.codes[0, 0] != 0, want)


def test_gradients_reach_every_parameter_and_are_finite():
    model = layer(mask=top_blocks(2, **SIZES))
    grads = quick(nnx.grad(lambda m, x: jnp.sum(m(x) ** 2)))(model, X)
    for path, g in jax.tree_util.tree_leaves_with_path(grads):
        assert np.isfinite(g).all(), path
        # A bias of the keys shifts all scores of a query alike.
        assert np.abs(g).max() > 0 or "key" in str(path), path


def test_it_works_in_linen_through_the_bridge():
    module = nnx.bridge.ToLinen(
        BlockSparseAttention,
        args=(16,),
        kwargs=dict(num_heads=4, mask=top_blocks(2, **SIZES)),
    )
    params = jax.jit(module.init)(jax.random.key(0), X)
    assert jax.eval_shape(module.apply, params, X).shape == X.shape


def test_prefill_then_decode_equals_one_pass_when_all_blocks_are_read():
    model = layer(mask=lambda q, k: BlockMask.causal(Grid(q.shape[2], **SIZES)))
    want = dense(model, X)
    out, cache = prefill(model, X[:, :21], model.init_cache(2, 48, block_kv=8))
    np.testing.assert_allclose(out, want[:, :21], atol=1e-5)
    for i in range(21, 27):
        out, cache = decode(model, X[:, i : i + 1], cache, 6)
        np.testing.assert_allclose(out[:, 0], want[:, i], atol=1e-5)
    np.testing.assert_array_equal(cache.lengths, [27, 27])
    keys = model.key(X[:, :27]).swapaxes(1, 2)
    np.testing.assert_allclose(cache.sums[:, :, 1], keys[:, :, 8:16].sum(2), atol=1e-5)


def test_decode_reads_the_newest_the_first_and_the_best_blocks_only():
    model = layer(mask=lambda q, k: BlockMask.causal(Grid(q.shape[2], **SIZES)))
    _, cache = prefill(model, X, model.init_cache(2, 48, block_kv=8))
    clean, _ = decode(model, X[:, :1], cache, 3)
    # Blocks that no head chose may hold anything.
    q = model.query(X[:, :1]).reshape(2, 2, 2, 4).mean(2)
    means = jnp.einsum("bhd,bhnd->bhn", q, cache.sums[:, :, 1:5])
    best = 1 + jnp.argmax(means, -1)
    poison = jnp.ones((2, 2, 6), bool).at[:, :, jnp.array([0, 5])].set(False)
    poison &= jnp.arange(6) != best[..., None]
    poison = jnp.repeat(poison, 8, -1)[..., None]
    bad = dataclasses.replace(cache, v=jnp.where(poison, jnp.nan, cache.v))
    np.testing.assert_array_equal(clean, decode(model, X[:, :1], bad, 3)[0])


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: layer()(X), "mask=None: give one here"),
        (lambda: top_blocks(0), "num_blocks=0 must be at least 1"),
        (
            lambda: BlockSparseAttention(16, num_heads=3, num_kv_heads=2, rngs=nnx.Rngs(0)),
            "num_heads=3 must be a positive multiple of num_kv_heads=2",
        ),
        (
            lambda: BlockSparseAttention(16, num_heads=3, rngs=nnx.Rngs(0)),
            "in_features=16 is not a multiple of num_heads=3",
        ),
        (lambda: layer().init_cache(1, 20, block_kv=8), "capacity=20 must be a multiple"),
        (lambda: layer().prefill(X, layer().init_cache(2, 32, block_kv=8)), "x has 40 positions"),
        (
            lambda: layer().decode(X, layer().init_cache(2, 32, block_kv=8), num_blocks=2),
            "x has 40 positions; decode takes one",
        ),
        (
            lambda: layer().decode(X[:, :1], layer().init_cache(2, 32, block_kv=8), num_blocks=5),
            "num_blocks=5 must lie in",
        ),
        (
            lambda: layer(softcap=3.0).decode(
                X[:, :1], layer().init_cache(2, 32, block_kv=8), num_blocks=2
            ),
            "decode has no softcap",
        ),
    ],
)
def test_what_does_not_fit_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
