"""Every predictor under JAX's transformations and dtypes: jit, vmap, grad, bfloat16, 64-bit and strict modes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_oracle import exact
from contracts import QUICK
from flax import nnx

from jaxsparse import attention
from jaxsparse.attention import Layout, State

quick = functools.partial(jax.jit, compiler_options=QUICK)
BATCH, HEADS, GROUPS, N, DIM, FEATURES, B = 2, 4, 2, 60, 8, 16, 8  # the last block is short
LAYOUT = Layout(B, B)
RNG = np.random.default_rng(4)
Q, K, V, X, WEIGHT = (
    RNG.normal(size=shape).astype(np.float32)
    for shape in [
        (BATCH, HEADS, N, DIM), *2 * [(BATCH, GROUPS, N, DIM)], (BATCH, N, FEATURES), (BATCH, HEADS, N, DIM)
    ]
)  # fmt: skip
HALF = dict(density=0.5, layout=LAYOUT)
PREDICTORS = {
    "dense": attention.dense(layout=LAYOUT),
    "streaming": attention.streaming(sinks=4, window=12, layout=LAYOUT),
    "oracle": attention.oracle(**HALF),
    "moba": attention.moba(**HALF),
    "sparge": attention.sparge(**HALF, similarity=0.1),
    "minference": attention.minference(**HALF, heads=[0, 1, 2, 4]),
    "flexprefill": attention.flexprefill(alpha=0.3, minimum=8, sample=16, unit=B, layout=LAYOUT),
    "nsa": attention.nsa(**HALF),
    "mra": attention.mra(**HALF),
    "adaspa": attention.adaspa(**HALF),
    "seer": attention.seer(
        **HALF, gate=attention.SeerGate(HEADS, GROUPS, DIM, layout=LAYOUT, rngs=nnx.Rngs(0))
    ),
    "dsv": attention.dsv(**HALF, model=attention.LowRank(FEATURES, GROUPS, 3, rngs=nnx.Rngs(0))),
    "dense_below": attention.dense_below(attention.moba(**HALF), 32),
    "top_p": attention.moba(rule=attention.top_p(0.6), layout=LAYOUT),
    "threshold": attention.moba(rule=attention.threshold(0.1), layout=LAYOUT),
}
QUICK_ONES = ("streaming", "oracle", "moba", "sparge", "minference", "nsa", "seer", "dsv")
every = pytest.mark.parametrize(
    "name", [n if n in QUICK_ONES else pytest.param(n, marks=pytest.mark.slow) for n in PREDICTORS]
)


def attend(choose, q, k, v, x):
    """The output, and the pairs that the choice shows."""
    mask = choose(q, k, v, State(x=x))
    return attention.attend(q, k, v, choose, state=State(x=x)), mask.to_dense()


@every
def test_mapped_over_a_batch_it_is_a_loop_over_sequences(name):
    one = lambda *arrays: tuple(y[0] for y in attend(PREDICTORS[name], *(a[None] for a in arrays)))
    out, seen = quick(jax.vmap(one))(Q, K, V, X)
    np.testing.assert_allclose(out, exact(Q, K, V, np.asarray(seen)), atol=2e-5)
    for b in range(BATCH):
        alone = PREDICTORS[name](*(a[b : b + 1] for a in (Q, K, V)), State(x=X[b : b + 1]))
        np.testing.assert_array_equal(seen[b], alone.to_dense()[0])


@every
def test_gradients_are_those_of_dense_attention_to_what_was_chosen(name):
    def sparse(q, k, v):
        out, seen = attend(PREDICTORS[name], q, k, v, X)
        return jnp.sum(out * WEIGHT), seen

    def dense(q, k, v, seen):
        k, v = (jnp.repeat(x, HEADS // GROUPS, 1) for x in (k, v))
        s = jnp.einsum("bhqd,bhkd->bhqk", q, k, precision="highest") / DIM**0.5
        p = jax.nn.softmax(jnp.where(seen, s, -jnp.inf), -1)
        return jnp.sum(jnp.einsum("bhqk,bhkd->bhqd", p, v, precision="highest") * WEIGHT)

    grads, seen = quick(jax.grad(sparse, (0, 1, 2), has_aux=True))(Q, K, V)
    seen = np.repeat(seen, HEADS // seen.shape[1], 1)
    for got, want in zip(grads, quick(jax.grad(dense, (0, 1, 2)))(Q, K, V, seen)):
        np.testing.assert_allclose(got, want, atol=5e-5)


@every
def test_the_choice_does_not_depend_on_the_dtype(name):
    """Numbers that bfloat16 has: what differs is the precision in which the choice is made."""
    arrays = [np.asarray(jnp.asarray(a, jnp.bfloat16), np.float32) for a in (Q, K, V, X)]
    run = lambda *a: PREDICTORS[name](*a[:3], State(x=a[3]))
    want = np.asarray(quick(run)(*arrays).codes)
    half = quick(run)(*(jnp.asarray(a, jnp.bfloat16) for a in arrays))
    # Means of keys are rounded by `nsa` and so is what small networks make: a block near the limit may change.
    rounds = name in ("nsa", "dsv")
    assert (np.asarray(half.codes) != want).mean() <= (0.02 if rounds else 0)
    if name == "adaspa":
        return  # its search attends
    with jax.enable_x64(True):
        wide = quick(run)(*(jnp.asarray(a, jnp.float64) for a in arrays))
        assert {x.dtype for x in jax.tree.leaves(wide)} == {x.dtype for x in jax.tree.leaves(half)}
    np.testing.assert_array_equal(wide.codes, want)


@every
def test_attention_in_bfloat16_is_that_of_its_numbers(name):
    arrays = [jnp.asarray(a, jnp.bfloat16) for a in (Q, K, V, X)]
    out, seen = quick(functools.partial(attend, PREDICTORS[name]))(*arrays)
    assert out.dtype == jnp.bfloat16
    want = exact(*(np.asarray(a, np.float64) for a in arrays[:3]), np.asarray(seen))
    np.testing.assert_allclose(np.asarray(out, np.float64), want, atol=3e-2)


LENGTHS = jnp.array([N, 9])  # closed over
GATES = jnp.full((BATCH, HEADS, N, 3), 0.3, jnp.float32)
POLICIES = {
    "keep_all": attention.keep_all(64),
    "streaming_llm": attention.streaming_llm(64),
    "h2o": attention.h2o(16, 16),
    "snapkv": attention.snapkv(40, window=8),
    "ada_snapkv": attention.ada_snapkv(40, window=8),
    "dynamickv": attention.dynamickv(32, window=8, r_max=2.0),
    "zipvl": attention.zipvl(40, recent=8),
}


def cached(policy):
    def run(q, k, v, x):
        cache = attention.Cache.create(
            policy=policy, batch=BATCH, kv_heads=GROUPS, head_dim=DIM, capacity=128
        )
        _, cache = cache.prefill(q, k, v, position=attention.rotary)
        return cache.decode(*(a[:, :, :1] for a in (q, k, v)), position=attention.rotary)

    return run


def makers(q, k, x):
    """What is trained, and its loss."""
    target = attention.seer_target(q, k, LAYOUT)
    gate = attention.SeerGate(HEADS, GROUPS, DIM, layout=LAYOUT, rngs=nnx.Rngs(1))
    low = attention.LowRank(FEATURES, GROUPS, 3, rngs=nnx.Rngs(1))
    return {
        "seer": (gate, lambda m: attention.seer_loss(m(q, k), target)),
        "dsv": (low, lambda m: attention.dsv_loss(m, x, q, k, causal=True)),
    }


def losses(q, k, v, x):
    return [nnx.value_and_grad(loss)(model) for model, loss in makers(q, k, x).values()]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["seer", "dsv"])
def test_what_is_trained_learns_from_its_loss_and_not_through_the_choice(name, dtype):
    q, k, v, x = (jnp.asarray(a, dtype) for a in (Q, K, V, X))
    model, loss = makers(q, k, x)[name]
    graph, params = nnx.split(model)
    of = lambda params: loss(nnx.merge(graph, params))
    value, grads = quick(of), quick(jax.grad(of))(params)
    size = float(jnp.sqrt(sum(jnp.sum(g * g) for g in jax.tree.leaves(grads))))
    move = lambda s: value(jax.tree.map(lambda p, g: p + s * g / size, params, grads))
    assert float(move(0.02) - move(-0.02)) / 0.04 == pytest.approx(size, rel=2e-2)

    def through(params):
        choose = getattr(attention, name)(**HALF)
        state = State(params=nnx.merge(graph, params), x=x)
        return attention.attend(q, k, v, choose, state=state).sum()

    assert not any(np.asarray(g).any() for g in jax.tree.leaves(quick(jax.grad(through))(params)))


def denoised(q, k, v, x):
    method = attention.AdaSpa(density=0.5, head_step=0.5, warm_up=1, searches=(1,), layout=LAYOUT)
    return method.attend(q, k, v, method.init(q, k))


WHOLE = {
    "nsa_attention": functools.partial(
        attention.nsa_attention, num_blocks=3, window=9, layout=Layout(1, B)
    ),
    "mra_attention": lambda q, k, v, gates: attention.mra_attention(q, k, v, **HALF),
    "vertical_slash_attention": lambda q, k, v, gates: attention.vertical_slash_attention(
        q, k, v, attention.VerticalSlash(8, 4, sample=16), layout=LAYOUT
    ),
}
FUNCTIONS = {
    **{name: lambda q, k, v, x, run=run: run(q, k, v, GATES) for name, run in WHOLE.items()},
    **{name: functools.partial(attend, choose) for name, choose in PREDICTORS.items()},
    **{f"cache, {name}": cached(policy) for name, policy in POLICIES.items()},
    "with_info": lambda q, k, v, x: attention.attend(q, k, v, PREDICTORS["moba"], with_info=True),
    "lengths": lambda q, k, v, x: attention.attend(
        q, k, v, PREDICTORS["minference"], lengths=LENGTHS
    ),
    "quest": lambda q, k, v, x: attention.quest(budget=12, page=4)(q[:, :, :1], k),
    "Compressor": lambda q, k, v, x: attention.Compressor(
        DIM, length=4, stride=2, rngs=nnx.Rngs(0)
    )(k),
    "AdaSpa": denoised,
    "losses": losses,
    "search_patterns": lambda q, k, v, x: attention.search_patterns(
        q[:1], k[:1], attention.candidates(0.5, N, B), LAYOUT
    ),
    "head_sparsity": lambda q, k, v, x: attention.head_sparsity(q, k, causal=True),
}


@pytest.mark.parametrize("name", ["nsa_attention", "mra_attention", "vertical_slash_attention"])
def test_whole_methods_map_over_a_batch(name):
    def one(q, k, v, gates):
        q, k, v, gates = (a[None] for a in (q, k, v, gates))
        return WHOLE[name](q, k, v, gates)[0]

    got = quick(jax.vmap(one))(Q, K, V, GATES)
    np.testing.assert_allclose(got, quick(WHOLE[name])(Q, K, V, GATES), atol=1e-5)


MODES = {
    "x64": lambda: jax.enable_x64(True),
    "strict dtypes": lambda: jax.numpy_dtype_promotion("strict"),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_float32_stays_float32_in_other_modes(name, mode):
    """Traced only: dtypes and promotions are decided there."""
    with MODES[mode]():
        out = jax.eval_shape(FUNCTIONS[name], *(jnp.asarray(a) for a in (Q, K, V, X)))
    wide = [x for x in jax.tree.leaves(out) if x.dtype in (jnp.float64, jnp.int64)]
    assert not wide, wide


def test_attention_has_no_64_bit_kernel_and_says_so():
    with jax.enable_x64(True), pytest.raises(ValueError, match="q has dtype float64; it must be"):
        attention.attend(*(jnp.asarray(a, jnp.float64) for a in (Q, K, V)), PREDICTORS["moba"])
