"""Caches of fixed capacity: step by step against lists in Python, and what all policies promise."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_oracle import exact
from contracts import QUICK

from jaxsparse import attention
from jaxsparse.attention import Cache
from jaxsparse.attention.cache import rebalance

RNG = np.random.default_rng(3)
quick = functools.partial(jax.jit, compiler_options=QUICK)
HEADS, GROUPS, DIM = 4, 2, 6
rotate = functools.partial(attention.rotary, base=50.0)


@pytest.fixture(autouse=True)
def the_same_numbers_whichever_tests_run():
    RNG.bit_generator.state = np.random.default_rng(30).bit_generator.state


def normal(*shape, scale=1.0):
    return jnp.asarray(scale * RNG.normal(size=shape), jnp.float32)


def prompt(n, batch=1):
    return (
        normal(batch, HEADS, n, DIM, scale=2),
        normal(batch, GROUPS, n, DIM),
        normal(batch, GROUPS, n, DIM),
    )


def make(policy, batch=1, **options):
    return Cache.create(policy=policy, batch=batch, kv_heads=GROUPS, head_dim=DIM, **options)


prefill = quick(lambda c, q, k, v, n=None: c.prefill(q, k, v, lengths=n, position=rotate))
decode = quick(
    lambda c, q, k, v, n=None, s=None: c.decode(q, k, v, lengths=n, store=s, position=rotate)
)


# ------------------------------------------------------------------ the cache in Python


class Lists:
    """One sequence: for each head of keys a list of [position, key, value, score, visits]."""

    def __init__(self, reassign=False):
        self.heads: list[list[list[Any]]] = [[] for _ in range(GROUPS)]
        self.now, self.reassign = 0, reassign

    def turn(self, x, t):
        return np.asarray(rotate(jnp.asarray(x)[None], np.array([t])))[0]

    def attend(self, q, k, v):
        """Outputs [heads, n, dim] and, for each head of keys, probabilities of each query over its list."""
        n = k.shape[1]
        for g in range(GROUPS):
            for i in range(n):
                self.heads[g].append(
                    [self.now + i, np.asarray(k[g, i]), np.asarray(v[g, i]), 0.0, 0.0]
                )
        out, seen = np.zeros((HEADS, n, DIM)), []
        for h in range(HEADS):
            entries = self.heads[h * GROUPS // HEADS]
            p = np.zeros((n, len(entries)))
            for i in range(n):
                place = lambda j, e: j if self.reassign else e[0]
                mine = next(place(j, e) for j, e in enumerate(entries) if e[0] == self.now + i)
                query = self.turn(q[h, i], mine)
                s = [
                    query @ self.turn(e[1], place(j, e)) / np.sqrt(DIM)
                    if e[0] <= self.now + i
                    else -np.inf
                    for j, e in enumerate(entries)
                ]
                w = np.exp(np.array(s) - max(s))
                p[i] = w / w.sum()
                out[h, i] = p[i] @ np.stack([e[2] for e in entries])
            seen.append(p)
        self.now += n
        each = HEADS // GROUPS
        return out, [np.stack(seen[g * each : (g + 1) * each]) for g in range(GROUPS)]

    def keep(self, g, chosen):
        self.heads[g] = [e for j, e in enumerate(self.heads[g]) if j in chosen]


def same(cache, lists, row=0):
    for g in range(GROUPS):
        want = [e[0] for e in lists.heads[g]]
        got = np.asarray(cache.positions[row, g])
        assert got[got >= 0].tolist() == want and (got[len(want) :] == -1).all()
    assert int(cache.lengths[row]) == lists.now and not np.asarray(cache.overflow).any()


def largest(scores, number, forced):
    """Indices: forced ones, then the largest, ties to the first."""
    order = sorted(range(len(scores)), key=lambda j: (j not in forced, -scores[j], j))
    return set(order[:number])


# ------------------------------------------------------------------ policies, step by step


@pytest.mark.parametrize("reassign", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_streaming_llm_step_by_step(reassign):
    policy = attention.streaming_llm(10, sinks=3, reassign=reassign)
    cache, lists = make(policy), Lists(reassign)
    for n in (7, 1, 1, 1, 1, 4, 1, 1):
        q, k, v = prompt(n)
        for g in range(GROUPS):
            size = len(lists.heads[g])
            if size + n > 10:
                room = 10 - n
                lists.keep(g, {*range(min(3, size)), *range(size - (room - 3), size)})
        want, _ = lists.attend(q[0], k[0], v[0])
        out, cache = (prefill if n > 1 else decode)(cache, q, k, v)
        np.testing.assert_allclose(out[0], want, atol=1e-5)
        same(cache, lists)
    assert int(cache.counts.max()) == 10


def test_streaming_llm_does_not_know_how_long_the_text_is():
    """With places in the cache for positions, a shift of all absolute positions changes nothing."""
    cache = make(attention.streaming_llm(8, sinks=2))
    late = dataclasses.replace(cache, lengths=cache.lengths + 1000)
    for _ in range(12):
        q, k, v = prompt(1)
        a, cache = decode(cache, q, k, v)
        b, late = decode(late, q, k, v)
        np.testing.assert_allclose(a, b, atol=1e-6)
    assert int(late.positions.max()) == 1011


def test_h2o_step_by_step_and_what_is_evicted_never_returns():
    policy = attention.h2o(4, 3)
    cache, lists = make(policy), Lists()
    gone = [set() for _ in range(GROUPS)]
    for n in (5, 1, 1, 1, 1, 3, 1, 1, 1):
        q, k, v = prompt(n)
        want, seen = lists.attend(q[0], k[0], v[0])
        for g in range(GROUPS):
            for j, e in enumerate(lists.heads[g]):
                e[3] += seen[g].mean(0).sum(0)[j]
            entries = lists.heads[g]
            recent = {j for j, e in enumerate(entries) if e[0] >= lists.now - 3}
            before = {e[0] for e in entries}
            lists.keep(g, largest([e[3] for e in entries], 7, recent))
            gone[g] |= before - {e[0] for e in lists.heads[g]}
        out, cache = decode(cache, q, k, v)
        np.testing.assert_allclose(out[0], want, atol=1e-5)
        same(cache, lists)
        for g in range(GROUPS):
            np.testing.assert_allclose(
                cache.scores[0, g, :5], [e[3] for e in lists.heads[g]][:5], atol=1e-5
            )
            assert not gone[g] & set(np.asarray(cache.positions[0, g]).tolist())
    assert all(gone)


def pooled(scores, kernel, kind):
    reach = kernel // 2
    part = lambda j: scores[max(0, j - reach) : j + reach + 1]
    return [(np.mean if kind == "mean" else np.max)(part(j)) for j in range(len(scores))]


@pytest.mark.parametrize(
    "kind, adaptive",
    [
        *(pytest.param(kind, False, marks=pytest.mark.slow) for kind in ("mean", "max")),
        ("mean", True),
    ],
)
def test_snapkv_and_ada_snapkv_step_by_step(kind, adaptive):
    window, budget, kernel = 4, 10, 3
    if adaptive:
        policy = attention.ada_snapkv(budget, window=window, kernel=kernel, sinks=2, floor=0.7)
    else:
        policy = attention.snapkv(budget, window=window, kernel=kernel, pooling=kind)
    cache, lists = make(policy, capacity=30), Lists()
    for n in (17, 1, 1, 9, 1):
        q, k, v = prompt(n)
        q = q.at[:, :2].mul(3.0) if adaptive else q  # heads that concentrate get more
        want, seen = lists.attend(q[0], k[0], v[0])
        if n > 1:
            ranked = []
            for g in range(GROUPS):
                looks = seen[g][:, -window:]
                scores = looks.max((0, 1)) if adaptive else looks.mean(0).sum(0)
                size = len(scores) - window
                ranked.append([*pooled(scores[:size], kernel, kind), *[np.inf] * window])
                if adaptive:
                    ranked[g][:2] = [np.inf] * 2
            if adaptive:
                floor = [largest(r, 7, set()) for r in ranked]
                rest = sorted(
                    (
                        (-r[j], g, j)
                        for g, r in enumerate(ranked)
                        for j in range(len(r))
                        if j not in floor[g]
                    )
                )
                for _, g, j in rest[: 2 * budget - sum(map(len, floor))]:
                    floor[g].add(j)
                assert len(floor[0]) > len(floor[1]) and sum(map(len, floor)) == 2 * budget
                for g in range(GROUPS):
                    lists.keep(g, floor[g])
            else:
                for g in range(GROUPS):
                    lists.keep(g, largest(ranked[g], budget, set()))
        out, cache = (prefill if n > 1 else decode)(cache, q, k, v)
        np.testing.assert_allclose(out[0], want, atol=1e-5)
        same(cache, lists)


@pytest.mark.slow
def test_zipvl_step_by_step_and_uniform_attention_prefers_no_early_key():
    cache, lists = make(attention.zipvl(14, tau=0.7, probes=99, recent=2)), Lists()
    q, k, v = prompt(20)
    want, seen = lists.attend(q[0], k[0], v[0])
    total = np.mean([s.mean(0).sum(0) for s in seen], 0)
    visits = 20 - np.arange(20)
    number = int((np.cumsum(np.sort(total)[::-1]) / total.sum() < 0.7).sum()) + 1
    for g in range(GROUPS):
        lists.keep(g, largest(total / visits, max(2, min(number, 14)), {18, 19}))
    out, cache = prefill(cache, q, k, v)
    np.testing.assert_allclose(out[0], want, atol=1e-5)
    same(cache, lists)

    # Equal scores of all pairs: every key is seen with 1 / (t + 1), and early ones have the larger sums.
    cache = make(attention.zipvl(20, tau=0.5, probes=99, recent=1))
    flat = prefill(cache, 0 * q, k, v)[1]
    sums = np.array([sum(1 / (t + 1) for t in range(j, 20)) for j in range(20)])
    number = int((np.cumsum(np.sort(sums)[::-1]) / sums.sum() < 0.5).sum()) + 1
    kept = largest(sums / visits, number, {19})
    assert sorted(kept) == [p for p in np.asarray(flat.positions[0, 0]).tolist() if p >= 0]
    assert kept != set(range(number))
    # A single dominant key.
    strong = prefill(
        make(attention.zipvl(20, tau=0.8, probes=99, recent=0)), q * 0 + 9.0, k * 0, v
    )[1]
    assert int(strong.counts.max()) < 20
    one = make(attention.zipvl(20, tau=0.8, probes=8, recent=0))
    q1 = jnp.zeros((1, HEADS, 20, DIM)).at[..., 0].set(30.0)
    k1 = jnp.zeros((1, GROUPS, 20, DIM)).at[:, :, 0, 0].set(5.0)
    plain = quick(lambda c, q, k, v: c.prefill(q, k, v))(one, q1, k1, v)[1]
    assert plain.counts.tolist() == [[1, 1]] and plain.positions[0, :, 0].tolist() == [0, 0]


@pytest.mark.slow
def test_dynamickv_gives_layers_what_the_ranking_over_all_says():
    policy = attention.dynamickv(8, window=2, kernel=1, r_max=2.0)
    n = 30
    inputs = [prompt(n) for _ in range(3)]
    inputs[1] = (inputs[1][0] * 4, *inputs[1][1:])  # a layer that concentrates: larger best scores
    first = [prefill(make(policy), q, k, v)[1] for q, k, v in inputs]
    assert [c.counts.tolist() for c in first] == [[[14, 14]]] * 3
    caches = rebalance(first)
    counts = np.array([c.counts[0] for c in caches])
    assert (counts[:, 0] == counts[:, 1]).all() and counts[:, 0].sum() == 8 * 3
    scores = np.stack([np.asarray(c.scores[0, :, :12]) for c in first])
    cut = np.sort(scores.ravel())[::-1][6 * 2 * 3 - 1]
    by_layer = (scores >= cut).sum((1, 2))
    assert counts[by_layer.argmax(), 0] == counts.max() and counts.max() <= 14 and counts.min() >= 2
    for i, cache in enumerate(caches):
        for g in range(GROUPS):
            got = np.asarray(cache.positions[0, g])
            had = np.asarray(first[i].positions[0, g])
            best = np.sort(had[:12][np.argsort(-scores[i, g], kind="stable")[: counts[i, g] - 2]])
            assert got[got >= 0].tolist() == [*best.tolist(), n - 2, n - 1]
    trimmed = caches[0].trim(room=1)
    assert trimmed.capacity == counts[0, 0] + 1
    q, k, v = prompt(1)
    a, b = decode(caches[0], q, k, v), decode(trimmed, q, k, v)
    np.testing.assert_allclose(a[0], b[0], atol=1e-6)
    with pytest.raises(ValueError, match="share one policy of attention.dynamickv"):
        rebalance([make(attention.h2o(1, 1))])


# ------------------------------------------------------------------ all policies

POLICIES = {
    "keep_all": attention.keep_all(40),
    "streaming_llm": attention.streaming_llm(40, reassign=False),
    "h2o": attention.h2o(20, 20),
    "snapkv": attention.snapkv(40, window=8),
    "ada_snapkv": attention.ada_snapkv(40, window=8),
    "zipvl": attention.zipvl(40, tau=1.0),
}


CASES = [n if n == "h2o" else pytest.param(n, marks=pytest.mark.slow) for n in POLICIES]


@pytest.mark.parametrize("name", CASES)
def test_with_room_for_everything_chunks_and_steps_are_dense_attention(name):
    q, k, v = prompt(40, batch=2)
    t = np.arange(40)
    want = exact(rotate(q, t), rotate(k, t), v)
    cache, out = make(POLICIES[name], batch=2), []
    at = 0
    for n in (16, 16, *[1] * 8):
        part = [x[:, :, at : at + n] for x in (q, k, v)]
        y, cache = (prefill if n > 1 else decode)(cache, *part)
        out.append(y)
        at += n
    np.testing.assert_allclose(jnp.concatenate(out, 2), want, atol=2e-5)
    assert cache.counts.tolist() == [[40, 40]] * 2


def test_sequences_of_different_lengths_are_each_what_they_are_alone():
    policy = attention.h2o(3, 3)
    q, k, v = prompt(9, batch=3)
    lengths = jnp.array([9, 4, 0])
    poison = jnp.where(jnp.arange(9)[:, None] < lengths[:, None, None, None], 0, jnp.nan)
    cache = make(policy, batch=3)
    out, cache = prefill(cache, q + poison, k + poison, v + poison, lengths)
    step = prompt(1, batch=3)
    last, cache = decode(cache, *step, jnp.array([1, 1, 0]))
    for b, n in enumerate((9, 4)):
        alone = make(policy)
        want, alone = prefill(alone, q[b : b + 1, :, :n], k[b : b + 1, :, :n], v[b : b + 1, :, :n])
        np.testing.assert_allclose(out[b, :, :n], want[0], atol=1e-5)
        assert not np.asarray(out[b, :, n:]).any()
        want, alone = decode(alone, *(x[b : b + 1] for x in step))
        np.testing.assert_allclose(last[b], want[0], atol=1e-5)
        np.testing.assert_array_equal(cache.positions[b], alone.positions[0])
    assert cache.counts[2].tolist() == [0, 0] and not np.asarray(last[2]).any()
    assert np.isfinite(cache.k).all() and np.isfinite(cache.v).all()


@pytest.mark.parametrize("name", ["h2o", "snapkv", "ada_snapkv", "dynamickv", "zipvl"])
def test_chunks_in_which_a_sequence_has_no_token_leave_it_as_it_is(name):
    """Prompts of 16 and 8 tokens in chunks of 8: the second one sits a chunk out."""
    policy = {
        "h2o": attention.h2o(3, 3),
        "snapkv": attention.snapkv(6, window=2),
        "ada_snapkv": attention.ada_snapkv(6, window=2, sinks=1),
        "dynamickv": attention.dynamickv(4, window=2, r_max=2.0),
        "zipvl": attention.zipvl(6, tau=0.7, probes=4, recent=1),
    }[name]
    q, k, v = prompt(16, batch=2)
    cache = make(policy, batch=2, capacity=16)
    _, cache = prefill(cache, q[:, :, :8], k[:, :, :8], v[:, :, :8], jnp.array([8, 8]))
    nothing = [x[:, :, 8:].at[1].set(jnp.nan) for x in (q, k, v)]
    out, after = prefill(cache, *nothing, jnp.array([8, 0]))
    assert not np.asarray(out[1]).any() and int(after.lengths[0]) == 16
    for field in ("k", "v", "positions", "scores", "visits", "lengths"):
        before, now = (np.asarray(getattr(c, field)[1]) for c in (cache, after))
        np.testing.assert_array_equal(now, before, err_msg=field)


@pytest.mark.slow
def test_scan_and_vmap_are_the_loop():
    policy = attention.snapkv(8, window=3)
    q, k, v = prompt(20)
    start = prefill(make(policy, capacity=14), q[:, :, :12], k[:, :, :12], v[:, :, :12])[1]
    parts = [x[:, :, 12:18].transpose(2, 0, 1, 3)[:, :, :, None] for x in (q, k, v)]

    def body(cache, xs):
        out, cache = cache.decode(*xs, position=rotate)
        return cache, out

    cache, outs = quick(lambda c, xs: jax.lax.scan(body, c, xs))(start, parts)
    loop = start
    for i in range(6):
        want, loop = decode(loop, *(p[i] for p in parts))
        np.testing.assert_allclose(outs[i], want, atol=1e-6)
    np.testing.assert_array_equal(cache.positions, loop.positions)
    two = jax.tree.map(lambda x: jnp.stack([x, x]), start)
    mapped, _ = quick(jax.vmap(lambda c, q, k, v: c.decode(q, k, v, position=rotate), (0, None, None, None)))(two, *(p[0] for p in parts))  # fmt: skip
    np.testing.assert_allclose(mapped[1], outs[0], atol=1e-6)


def test_a_prompt_filled_at_once_is_that_of_prefill_by_its_last_queries():
    policy = attention.snapkv(9, window=4)
    q, k, v = prompt(25)
    want = prefill(make(policy), q, k, v)[1]
    got = quick(lambda c, q, k, v: c.fill(q, k, v, position=rotate))(
        make(policy), q[:, :, -4:], k, v
    )
    np.testing.assert_array_equal(got.positions, want.positions)
    np.testing.assert_allclose(got.k, want.k, atol=1e-6)


@pytest.mark.slow
def test_planted_attention_is_kept_with_its_neighbours():
    q, k, v = prompt(40)
    k = 0.1 * k.at[:, :, 17].set(30.0 * q[:, ::2, -8:].mean(2) + 30.0 * q[:, 1::2, -8:].mean(2))
    cache = quick(lambda c, q, k, v: c.prefill(q, k, v)[1])(
        make(attention.snapkv(16, window=8, kernel=5)), q, k, v
    )
    for g in range(GROUPS):
        assert {15, 16, 17, 18, 19} <= set(np.asarray(cache.positions[0, g]).tolist())


def test_a_token_that_is_not_stored_is_seen_in_its_own_step_only():
    cache = make(attention.keep_all(6), batch=2)
    q, k, v = prompt(4, batch=2)
    _, cache = prefill(cache, q, k, v)
    a = prompt(1, batch=2)
    store = jnp.array([[True], [False]])
    out, after = decode(cache, *a, None, store)
    want, both = decode(cache, *a)
    np.testing.assert_allclose(out, want, atol=1e-6)
    assert after.counts.tolist() == [[5, 5], [4, 4]] and after.lengths.tolist() == [5, 5]
    _, after = decode(after, *prompt(1, batch=2))
    assert after.positions[1, 0].tolist() == [0, 1, 2, 3, 5, -1]


def test_what_finds_no_room_is_counted_under_jit_and_an_error_outside():
    cache = make(attention.snapkv(6, window=2), capacity=8)
    _, cache = prefill(cache, *prompt(10))
    for _ in range(5):
        x = prompt(1)
        out, cache = decode(cache, *x)
    assert cache.counts.tolist() == [[8, 8]] and cache.overflow.tolist() == [[3, 3]]
    assert cache.lengths.tolist() == [15] and np.isfinite(out).all()
    with pytest.raises(
        ValueError, match="the cache is full: 1 entries of a head do not fit capacity=8"
    ):
        cache.decode(*x, position=rotate)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: make(attention.h2o(4, 4), capacity=7), "capacity=7 is below the policy's budget=8"),
        (lambda: make(attention.keep_all(8), batch=0), "batch=0, kv_heads=2"),
        (lambda: attention.snapkv(32, window=32), "budget=32 must be above the forced entries, window=32"),
        (lambda: attention.snapkv(64, kernel=4), "kernel=4 must be odd"),
        (lambda: attention.ada_snapkv(256, floor=1.5), r"floor=1.5 must lie in \[0, 1\]"),
        (lambda: attention.streaming_llm(4, sinks=4), "budget=4 must be above sinks=4"),
        (lambda: attention.h2o(4, 0), "recent=0 must be at least 1"),
        (lambda: attention.dynamickv(64, r_max=0.5), "r_max=0.5"),
        (lambda: attention.zipvl(8, recent=8), "tau=0.975, recent=8"),
        (lambda: make(attention.streaming_llm(8)).decode(*prompt(1)), "StreamingLLM reassigns positions: give position="),
        (lambda: make(attention.streaming_llm(8)).prefill(*prompt(9), position=rotate), "a call of 9 tokens is more than budget=8"),
        (lambda: make(attention.keep_all(8)).decode(*prompt(1, batch=2)), "do not fit a cache of batch 1, 2 heads"),
        (lambda: make(attention.keep_all(8)).prefill(*prompt(4), lengths=jnp.array([5])), r"lengths=\[5\] must lie in \[0, 4\]"),
        (lambda: make(attention.keep_all(8)).prefill(*prompt(4), lengths=jnp.array([1, 2])), "lengths has shape"),
        (lambda: make(attention.keep_all(8)).prefill(prompt(3)[0], *prompt(4)[1:]), "with lengths="),
        (lambda: make(attention.keep_all(8), dtype=jnp.int32), "dtype=int32 must be a floating-point type"),
        (lambda: make(attention.keep_all(8), v_dim=0), "v_dim=0 must be positive"),
        (lambda: make(attention.keep_all(8), v_dim=4).prefill(*prompt(4)), "do not fit a cache of batch 1, 2 heads, head_dim 6 and v_dim 4"),
        (lambda: attention.h2o(2.5, 4), "heavy=2.5 must be at least 1, an integer"),
        (lambda: make(attention.snapkv), "must be a policy, which attention.snapkv"),
        (lambda: make(attention.keep_all(8)).decode(*prompt(2), store=jnp.array([True, False])), r"store has shape \(2,\) .* give booleans \[1, 2\]"),
        (lambda: make(attention.keep_all(8)).decode(*prompt(1), store=jnp.array([[0.3]])), "store has shape .* float32"),
        (lambda: make(attention.keep_all(8)).fill(prompt(5)[0], *prompt(4)[1:]), "q has 5 positions and k 4"),
    ],
)  # fmt: skip
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_call_as_long_as_the_budget_leaves_nothing_else():
    cache = make(attention.streaming_llm(8, sinks=3))
    for _ in range(2):
        _, cache = prefill(cache, *prompt(8))
    assert (
        cache.positions[0, 0].tolist() == list(range(8, 16))
        and not np.asarray(cache.overflow).any()
    )
