"""Selection is exact: against plain NumPy, in every transformation of JAX, on any sharding."""

import functools
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxsparse import _counts, allocations, selection, structures
from jaxsparse.selection import _search
from jaxsparse.selection.quantile import times

DTYPES = ["float32", "bfloat16", "float16", "float8_e4m3fn", "int32", "uint32", "int8", "bool"]


def exact(x) -> np.ndarray:
    """The values without loss, as float64."""
    return np.asarray(jnp.asarray(x)).astype(np.float64)


def reference(x, k, where=None) -> np.ndarray:
    """The k largest by a stable sort; NaN are not eligible."""
    values = exact(x)
    ok = ~np.isnan(values)
    if where is not None:
        ok &= np.broadcast_to(where, values.shape)
    eligible = np.flatnonzero(ok)
    order = eligible[np.argsort(-values.ravel()[eligible], kind="stable")]
    mask = np.zeros(values.size, bool)
    mask[order[: int(k)]] = True
    return mask.reshape(values.shape)


def scores_like(rng, shape, dtype, kind):
    """Scores with few or many ties, special values, both signs."""
    x = rng.standard_normal(shape) * 10
    if kind == "rounded":
        x = np.round(x / 8)
    elif kind == "zeros":
        x = np.where(rng.random(shape) < 0.9, rng.choice([0.0, -0.0], shape), x)
    elif kind == "equal":
        x = np.full(shape, 2.0)
    elif kind == "special" and jnp.issubdtype(jnp.dtype(dtype), jnp.floating):
        special = [np.nan, -np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-42, -1e-42, 240.0]
        x = rng.choice(special, shape)
    if dtype in ("uint32", "bool"):
        x = np.abs(x)
    return jnp.asarray(x.astype(np.float32)).astype(dtype)


together = functools.partial(selection.topk_masks, together=True)


def random_mask(seed, shape, k):
    """k entries at random: all scores are equal, and a hash ranks them."""
    return selection.topk_mask(jnp.zeros(shape), k, ties="hash", seed=seed)


KINDS = st.sampled_from(["smooth", "rounded", "zeros", "equal", "special"])


# -- topk_mask -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@given(kind=KINDS, seed=st.integers(0, 99), k=st.integers(0, 80), some=st.booleans())
def test_the_k_largest_of_every_dtype_ties_to_the_lower_position(dtype, kind, seed, k, some):
    rng = np.random.default_rng(seed)
    x = scores_like(rng, (6, 11), dtype, kind)
    where = rng.random((6, 11)) < (0.6 if some else 1.1)
    np.testing.assert_array_equal(selection.topk_mask(x, k, where=where), reference(x, k, where))


def test_special_values_rank_by_value_and_nan_is_never_chosen():
    x = jnp.array([jnp.nan, -jnp.inf, 1.0, jnp.inf, -0.0, 0.0, -1.0])
    chosen = [np.flatnonzero(selection.topk_mask(x, k)).tolist() for k in range(8)]
    assert chosen[:5] == [[], [3], [2, 3], [2, 3, 4], [2, 3, 4, 5]]
    assert chosen[5:] == [[2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6]]


@pytest.mark.parametrize("kind", ["smooth", "rounded", "zeros", "equal", "heavy", "denormal"])
def test_large_arrays_too(kind):
    rng = np.random.default_rng(1)
    shape = (2, 300, 500)
    x = np.abs(rng.standard_normal(shape)).astype(np.float32)
    if kind == "heavy":
        x = x**9
    elif kind == "denormal":
        x = (x * 1e-41).astype(np.float32)
    elif kind != "smooth":
        x = np.abs(exact(scores_like(rng, shape, "float32", kind))).astype(np.float32)
    for k in (1, 3000, 30_000, 299_999):
        np.testing.assert_array_equal(selection.topk_mask(x, k), reference(x, k))


@pytest.mark.parametrize("kind", ["smooth", "rounded to bfloat16", "zeros"])
@pytest.mark.parametrize("kept", [0.5, 0.1, 0.01])
def test_few_passes_over_the_data(kind, kept):
    rng = np.random.default_rng(0)
    x = jnp.abs(jnp.asarray(rng.standard_normal((600, 500)), jnp.float32))
    if kind == "zeros":
        x = jnp.where(rng.random((600, 500)) < 0.9, 0, x)
    elif kind != "smooth":
        x = x.astype(jnp.bfloat16).astype(jnp.float32)
    reads = []

    def score(x):
        jax.debug.callback(lambda: reads.append(1))
        return x

    selection.topk_mask(x, int(kept * x.size), score=score).block_until_ready()
    jax.effects_barrier()
    assert 2 <= len(reads) <= 12  # the last makes the mask


@given(kind=KINDS, seed=st.integers(0, 99), k=st.integers(0, 80))
def test_a_hash_breaks_ties_among_equal_scores_only(kind, seed, k):
    rng = np.random.default_rng(seed)
    x = scores_like(rng, (6, 11), "float32", kind)
    mask = np.asarray(selection.topk_mask(x, k, ties="hash", seed=seed))
    best = reference(x, k)
    assert mask.sum() == best.sum()
    np.testing.assert_array_equal(np.sort(exact(x)[mask]), np.sort(exact(x)[best]))


def test_hashed_ties_favour_no_row_and_differ_between_seeds():
    zeros = jnp.zeros((400, 250))
    a, b, c = (
        np.asarray(selection.topk_mask(zeros, 10_000, ties="hash", seed=s))
        for s in (0, 1, 2**32 - 1)
    )
    for mask in (a, b, c):
        for axis, cells in ((0, 250), (1, 400)):
            expected = 10_000 / cells
            chi2 = ((mask.sum(axis) - expected) ** 2).sum() / (expected * 0.9)
            assert abs(chi2 - cells) < 5 * np.sqrt(2 * cells)
    for one, other in ((a, b), (a, c), (b, c)):
        assert abs((one & other).sum() - 1000) < 5 * np.sqrt(1000)
        assert abs((one & np.roll(other, 1, 1)).sum() - 1000) < 5 * np.sqrt(1000)


@pytest.mark.parametrize("axis", [0, 1, -1, (0, 1), (0, 2), (-2, -1)])
@pytest.mark.parametrize("ties", ["position", "hash"])
def test_slices_along_axes_are_ranked_apart(axis, ties):
    rng = np.random.default_rng(3)
    x = jnp.asarray(np.round(rng.standard_normal((3, 40, 50)), 1), jnp.float32)
    axes = [a % 3 for a in np.atleast_1d(axis)]
    rest = [a for a in range(3) if a not in axes]
    counts = rng.integers(0, np.prod([x.shape[a] for a in axes]) + 1, [x.shape[a] for a in rest])
    where = rng.random(x.shape) < 0.8
    mask = np.asarray(selection.topk_mask(x, counts, axis=axis, where=where, ties=ties, seed=0))
    for index in np.ndindex(counts.shape):
        slices: list = [slice(None)] * 3
        for a, i in zip(rest, index):
            slices[a] = i
        at = tuple(slices)
        best = reference(x[at], counts[index], where[at])
        if ties == "position":
            np.testing.assert_array_equal(mask[at], best)
        else:
            values = exact(x[at])
            np.testing.assert_array_equal(np.sort(values[mask[at]]), np.sort(values[best]))


@given(kind=KINDS, seed=st.integers(0, 99), k=st.integers(0, 8))
def test_short_slices_too(kind, seed, k):
    rng = np.random.default_rng(seed)
    x = scores_like(rng, (5, 7, 3), "float32", kind)
    where = rng.random(x.shape) < 0.8
    mask = np.asarray(selection.topk_mask(x, k, axis=1, where=where))
    for i, j in np.ndindex(5, 3):
        np.testing.assert_array_equal(mask[i, :, j], reference(x[i, :, j], k, where[i, :, j]))
    hashed = np.asarray(selection.topk_mask(x, k, axis=1, ties="hash", seed=seed))
    assert (hashed.sum(1) == np.minimum(k, (~np.isnan(exact(x))).sum(1))).all()


def test_scores_may_be_made_in_each_pass():
    w, g = jax.random.normal(jax.random.key(0), (2, 30, 40))
    fused = selection.topk_mask((w, g), 100, score=lambda w, g: jnp.abs(w * g))
    np.testing.assert_array_equal(fused, selection.topk_mask(jnp.abs(w * g), 100))
    slices = selection.topk_mask(w, 3, axis=0, score=jnp.abs)
    np.testing.assert_array_equal(slices, selection.topk_mask(jnp.abs(w), 3, axis=0))


@pytest.mark.parametrize("shape", [(0,), (3, 0), (), (1,)])
def test_empty_and_single_entries(shape):
    x = jnp.ones(shape)
    for k in (0, 1, 5):
        assert int(selection.topk_mask(x, k).sum()) == min(k, x.size)
        assert int(random_mask(0, shape, k).sum()) == min(k, x.size)
        assert sum(int(m.sum()) for m in together([x, x], k)) == min(k, 2 * x.size)


def test_wide_words_keep_their_order():
    with jax.enable_x64(True):
        x = 1 + 1e-12 * jnp.asarray(np.random.default_rng(0).permutation(200).reshape(10, 20))
        assert x.dtype == jnp.float64 and len(set(np.float32(x).ravel().tolist())) == 1
        x = x.at[0, 0].set(jnp.nan).at[0, 1].set(-jnp.inf)
        n = jnp.asarray(np.random.default_rng(1).integers(-(2**62), 2**62, (10, 20)))
        u = n.astype(jnp.uint64) * 2
        for k in (1, 50, 198, 200):
            np.testing.assert_array_equal(selection.topk_mask(x, k), reference(x, k))
            for y in (n, u):
                order = np.argsort(np.asarray(y).ravel(), kind="stable")[::-1]
                assert set(np.flatnonzero(selection.topk_mask(y, k))) == set(order[:k].tolist())


# -- Many arrays -----------------------------------------------------------------------------------


@given(kind=KINDS, seed=st.integers(0, 99), k=st.integers(0, 120), some=st.booleans())
def test_arrays_are_ranked_together_without_regard_to_shape_and_dtype(kind, seed, k, some):
    rng = np.random.default_rng(seed)
    shapes = [((4, 5), "float32"), ((3, 2, 7), "bfloat16"), ((), "float32"), ((0, 3), "float16")]
    leaves = [scores_like(rng, shape, dtype, kind) for shape, dtype in shapes]
    where = [rng.random(shape) < 0.7 if some else np.ones(shape, bool) for shape, _ in shapes]
    masks = together(leaves, k, where=where)
    flat = np.concatenate([exact(x).ravel() for x in leaves])
    expected = reference(flat, k, np.concatenate([np.ravel(w) for w in where]))
    np.testing.assert_array_equal(np.concatenate([np.ravel(m) for m in masks]), expected)
    assert [m.shape for m in masks] == [shape for shape, _ in shapes]
    hashed = together(leaves, k, where=where, ties="hash", seed=seed)
    chosen = np.concatenate([np.ravel(m) for m in hashed])
    np.testing.assert_array_equal(np.sort(flat[chosen]), np.sort(flat[expected]))


@given(seed=st.integers(0, 99), k=st.integers(0, 60))
def test_every_array_keeps_its_minimum_and_all_together_k(seed, k):
    rng = np.random.default_rng(seed)
    leaves = [jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((5, 6), (20,), (4, 4))]
    minimum = [3, 20, 0]
    masks = together(leaves, jnp.int32(k), minimum=minimum)
    assert sum(int(m.sum()) for m in masks) == k
    if k >= 23:
        own = [reference(x, n) for x, n in zip(leaves, minimum)]
        free = np.concatenate([np.where(o, np.nan, x).ravel() for o, x in zip(own, leaves)])
        expected = reference(free, k - 23) | np.concatenate([o.ravel() for o in own])
        np.testing.assert_array_equal(np.concatenate([np.ravel(m) for m in masks]), expected)


@given(
    kind=KINDS.filter(lambda kind: kind != "special"), seed=st.integers(0, 99), q=st.floats(0, 1)
)
def test_quantiles_are_those_of_numpy(kind, seed, q):
    rng = np.random.default_rng(seed)
    leaves = [scores_like(rng, s, "float32", kind) for s in ((9, 4), (15,))]
    flat = np.concatenate([exact(x).ravel() for x in leaves])
    for given_q in (q, jnp.float32(q)):
        expected = np.quantile(flat, float(given_q))
        np.testing.assert_allclose(
            selection.quantile(leaves, given_q), expected, rtol=1e-5, atol=1e-5
        )


@given(
    bits=st.integers(0, 0x3F800000),
    n=st.integers(0, 2**32 - 1) | st.integers(0, 1000) | st.just(2**31),
)
def test_the_index_of_a_quantile_is_exact_up_to_billions_of_entries(bits, n):
    q = np.uint32(bits).view(np.float32)
    floor, fraction = times(jnp.asarray(q), n)
    h = Fraction(float(q)) * n
    assert int(floor) == h.__floor__()
    assert abs(float(fraction) - float(h - h.__floor__())) < 1e-6


# -- N:M, random -----------------------------------------------------------------------------------


@pytest.mark.parametrize("n, m", [(2, 4), (1, 4), (4, 8), (0, 2), (3, 3), (20, 40)])
@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("stride", [False, True])
def test_n_of_every_m(n, m, axis, stride):
    x = np.round(np.random.default_rng(0).standard_normal((m * 2, m * 3)) * 3).astype(np.float32)
    kind = structures.NM(max(n, 1), m, axis=axis, strided=stride)
    mask = np.moveaxis(np.asarray(structures.topk(kind, jnp.asarray(x), n)), axis, -1)
    y = np.moveaxis(x, axis, -1)
    for row, kept in zip(y, mask):
        split = (
            (row.reshape(m, -1).T, kept.reshape(m, -1).T)
            if stride
            else (row.reshape(-1, m), kept.reshape(-1, m))
        )
        for group, got in zip(*split):
            np.testing.assert_array_equal(got, reference(group, n))


def test_random_masks_have_exactly_k_anywhere():
    masks = [np.asarray(random_mask(s, (200, 300), 6000)) for s in range(4)]
    assert [m.sum() for m in masks] == [6000] * 4
    assert len({m.tobytes() for m in masks}) == 4
    for mask in masks:
        chi2 = ((mask.sum(1) - 30) ** 2).sum() / 27
        assert abs(chi2 - 200) < 5 * 20
    key = jax.random.key(7)
    a = random_mask(key, (50,), 20)
    b = random_mask(jax.random.key_data(key), (50,), 20)
    np.testing.assert_array_equal(a, b)
    grown = random_mask(0, (200, 300), 7000)
    assert not (masks[0] & ~np.asarray(grown)).any()  # a larger k adds to a smaller one


def test_the_hash_of_a_position_is_part_of_the_contract():
    # A run that is restored must draw the masks it would have drawn.
    assert selection.position_hash((2, 2), 0).tolist() == [
        [879465130, 830940178],
        [2347042648, 2030344098],
    ]
    h = np.asarray(selection.position_hash((300, 400), jnp.uint32(5)))
    assert len(np.unique(h)) == h.size
    assert abs(h.mean() / 2**32 - 0.5) < 0.005


# -- Transformations -------------------------------------------------------------------------------


def test_jit_vmap_and_scan_give_the_same_masks_for_traced_k_and_seed():
    x = jnp.round(jax.random.normal(jax.random.key(0), (5, 30, 20)), 1)
    ks, seeds = jnp.array([0, 1, 77, 599, 600]), jnp.arange(5)
    for ties in ("position", "hash"):
        one = functools.partial(selection.topk_mask, ties=ties)
        expected = np.stack([one(a, int(k), seed=int(s)) for a, k, s in zip(x, ks, seeds)])
        batched = jax.jit(jax.vmap(lambda a, k, s, one=one: one(a, k, seed=s)))(x, ks, seeds)
        np.testing.assert_array_equal(batched, expected)
        step = lambda c, aks, one=one: (c, one(aks[0], aks[1], seed=aks[2]))
        np.testing.assert_array_equal(jax.lax.scan(step, 0, (x, ks, seeds))[1], expected)


def test_a_new_k_compiles_nothing():
    traced = []

    def score(x):
        traced.append(None)
        return jnp.abs(x)

    x = jax.random.normal(jax.random.key(0), (7, 9))
    selection.topk_mask(x, 3, score=score)
    n = len(traced)
    eager = len(traced) and selection.topk_mask(x, 4, score=score)
    assert len(traced) <= n + 1 and int(eager.sum()) == 4  # shapes are asked for, nothing else


def test_scores_are_constants_for_gradients():
    x = jnp.array([3.0, -1.0, 2.0])
    g = jax.grad(lambda x: jnp.sum(jnp.where(selection.topk_mask(x, 2), x, 0.0) ** 2))(x)
    assert g.tolist() == [6.0, 0.0, 4.0]
    assert jax.grad(lambda x: selection.quantile([x], 0.5))(x).tolist() == [0.0, 0.0, 0.0]


def test_shard_map_ranks_what_a_device_holds():
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    x = jnp.round(jax.random.normal(jax.random.key(0), (16, 30)), 1)
    specs = dict(mesh=mesh, in_specs=PartitionSpec("d"), out_specs=PartitionSpec("d"))

    def local(x):
        a, b = together([x, x[0]], 9, ties="hash", seed=1)
        quantile = selection.quantile([x], 0.5)
        return jnp.stack([a, jnp.broadcast_to(b, x.shape), x > quantile], 1)

    sharded = np.asarray(jax.jit(jax.shard_map(local, **specs))(x))
    expected = np.concatenate([local(part) for part in x.reshape(8, 2, 30)])
    np.testing.assert_array_equal(sharded, expected)


def many_masks(x, k):
    return [
        selection.topk_mask(x, k),
        selection.topk_mask(x, k // 512, axis=0),
        *together([x, x * x], k, ties="hash", seed=3),
        random_mask(1, x.shape, k) & (x >= 0),
        selection.quantile([x], 0.9),
    ]


@functools.cache
def masks_of_one_device():
    x = jnp.abs(jnp.round(jax.random.normal(jax.random.key(0), (512, 320)), 2))
    return x, jax.jit(many_masks)(x, 16_000)


AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit


@pytest.mark.parametrize(
    "spec, axis_type",
    [(("a", None), AUTO), ((None, "b"), AUTO), (("a", "b"), AUTO), (("b", "a"), EXPLICIT)],
    ids=str,
)
def test_sharded_arrays_give_bitwise_the_masks_of_one_device(spec, axis_type):
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(axis_type,) * 2)
    sharding = NamedSharding(mesh, PartitionSpec(*spec))
    x, expected = masks_of_one_device()
    got = jax.jit(many_masks)(jax.device_put(x, sharding), 16_000)
    for one, other in zip(expected, got, strict=True):
        np.testing.assert_array_equal(one, other)
    assert got[0].sharding.is_equivalent_to(sharding, 2)


# -- Counts beyond 32 bits -------------------------------------------------------------------------


@pytest.fixture
def small_words(monkeypatch):
    """As if numbers of 7 bits were the widest: what happens at 2^31 entries, with a few hundred."""
    jax.clear_caches()
    monkeypatch.setattr(_counts, "WIDE", 2**7)
    monkeypatch.setattr(_counts, "BASE_BITS", 3)
    yield
    jax.clear_caches()


def test_counts_and_positions_of_two_words(small_words):
    rng = np.random.default_rng(0)
    x = jnp.asarray(np.round(rng.standard_normal((13, 6, 5))), jnp.float32)
    for k in (0, 1, 127, 128, 200, 389, 390, 1000):
        best = reference(x, k)
        np.testing.assert_array_equal(selection.topk_mask(x, k), best)
        masks = together([x[:5], x[5:]], k)
        np.testing.assert_array_equal(np.concatenate(masks), best)
        hashed = np.asarray(selection.topk_mask(x, jnp.int32(k), ties="hash", seed=1))
        np.testing.assert_array_equal(np.sort(exact(x)[hashed]), np.sort(exact(x)[best]))
        assert int(random_mask(0, x.shape, k).sum()) == min(k, x.size)


def test_counts_from_the_host_have_any_size():
    high, low = _counts.count_of(5 * 10**9, 10**10, wide=True)
    assert int(high) * 2**_counts.BASE_BITS + int(low) == 5 * 10**9
    traced = _counts.count_of(jnp.uint32(4 * 10**9), 10**10, wide=True)
    assert int(traced[0]) * 2**_counts.BASE_BITS + int(traced[1]) == 4 * 10**9
    assert int(_counts.count_of(jnp.uint32(4 * 10**9), 100, wide=False)[0]) == 100


# -- Bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda x: selection.topk_mask(x, -1), "k=-1: give a count"),
        (lambda x: selection.topk_mask(x, 2.5), "k has dtype float32: give a count"),
        (lambda x: selection.topk_mask(x, True), "k has dtype bool: give a count"),
        (lambda x: selection.topk_mask(x, jnp.ones((5,), int)), r"k has shape \(5,\)"),
        (lambda x: selection.topk_mask(x, jnp.ones((5,), int), axis=0), r"k has shape \(5,\)"),
        (lambda x: selection.topk_mask(x * 1j, 1), "scores have dtype complex64"),
        (lambda x: selection.topk_mask(x, 1, axis=2), "axis=2: give distinct axes"),
        (lambda x: selection.topk_mask(x, 1, axis=(0, -2)), r"axis=\(0, -2\): give distinct"),
        (lambda x: selection.topk_mask(x, 1, ties="index"), "ties='index'"),
        (lambda x: selection.topk_mask(x, 1, ties="hash"), "needs a seed"),
        (lambda x: selection.topk_mask(x, 1, ties="hash", seed=0.5), "seed=0.5: give an integer"),
        (lambda x: selection.topk_mask(x, 1, where=x), "where has dtype float32"),
        (lambda x: selection.topk_mask(x, 1, where=x[None] > 0), r"where has shape \(1, 4, 6\)"),
        (lambda x: selection.topk_mask((x, x), 1), "several operands need score="),
        (lambda x: selection.topk_mask(x, 1, score=jnp.sum), "it must be elementwise"),
        (lambda x: random_mask(jnp.ones(3), (2,), 1), "seed of dtype float32 and shape"),
        (lambda x: random_mask(0, (2,), -3), "k=-3: give a count"),
        (lambda x: together([x], 1, where=[]), "where must be a list"),
        (lambda x: together([x], 1, minimum=[2]), r"adds up to 2, more than k=1"),
        (lambda x: together([x], 1, minimum=[-2]), "minimum=-2: give a count"),
        (lambda x: selection.topk_masks([x], [1, 2]), "k must be a list with one entry per leaf"),
        (lambda x: selection.topk_masks([x], [1], axis=[4]), "axis=4: give distinct axes"),
        (lambda x: selection.topk_masks([x], [-1]), "k=-1: give a count"),
        (lambda x: selection.topk_masks([x], [1], ties="hash"), "needs a seed"),
        (lambda x: together([x], 1, axis=0), "axis=0: a ranking of all arrays together has no axes"),
        (lambda x: selection.topk_masks([x], 1, minimum=[1]), "minimum= is for together=True"),
        (lambda x: selection.quantile([], 0.5), "no entries at all"),
        (lambda x: selection.quantile([x], 1.5), r"q=1.5: must be in \[0, 1\]"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(jnp.ones((4, 6)))


def test_lamp_scores_are_the_share_of_what_ranks_no_lower():
    x = jnp.array([[1.0, 2.0], [2.0, 3.0]])
    np.testing.assert_allclose(
        allocations.lamp_scores(x), np.array([[1 / 18, 4 / 17], [4 / 13, 1.0]]), rtol=1e-6
    )
    stacked = allocations.lamp_scores(jnp.stack([x, 5 * x]), lead=1)
    np.testing.assert_allclose(stacked[0], stacked[1], rtol=1e-6)


@pytest.mark.parametrize("ties", ["position", "hash"])
def test_masks_searched_side_by_side_are_those_searched_one_by_one(ties):
    k = jax.random.split(jax.random.key(0), 4)
    stacked, rounded = (
        jax.random.normal(k[0], (3, 40, 50)),
        jnp.round(jax.random.normal(k[1], (64, 33))),
    )
    rows = [  # scores, k, axes, where
        (stacked, jnp.array([10, 0, 2000]), (1, 2), None),
        (rounded, 700, None, rounded > -2),
        (jnp.zeros((7, 9)), jnp.int32(11), None, None),
        (jnp.full((5,), jnp.nan), 99, None, None),
        (jax.random.normal(k[2], (200, 6)), 17, (0,), None),
        (jax.random.normal(k[3], (8, 6)), 2, (1,), None),  # short slices
        (rounded.astype(jnp.bfloat16), 100, None, None),  # another dtype
    ]
    seeds = [jnp.uint32(i) for i in range(len(rows))]
    alone = [
        selection.topk_mask(x, n, axis=a, where=w, ties=ties, seed=s)
        for (x, n, a, w), s in zip(rows, seeds)
    ]
    x, n, a, w = map(list, zip(*rows))
    listed = selection.topk_masks(x, n, axis=a, where=w, ties=ties, seed=seeds)
    np.testing.assert_equal(jax.device_get(listed), jax.device_get(alone))


@pytest.mark.parametrize("axes", [(0,), (0, 1)])
def test_counts_and_minima_of_separate_reductions_are_those_of_one(axes):
    x = jax.random.bits(jax.random.key(0), (5, 7), jnp.uint32)
    flags = [x > jnp.uint32(2**31), x % 3 == 0]
    one = _search._totals_in_one(flags, [x], axes=axes, wide=False)
    np.testing.assert_equal(
        jax.device_get(_search._totals_apart(flags, [x], axes=axes)), jax.device_get(one)
    )


@pytest.mark.parametrize("axis", [None, 0, 1])
def test_equal_scores_draw_the_masks_that_zeros_have(axis):
    free = jax.random.bernoulli(jax.random.key(0), 0.6, (40, 7))
    options = dict(where=free, ties="hash", seed=3, axis=axis)
    drawn = selection.topk_mask(free, 5, score=selection.equal_scores, **options)
    np.testing.assert_array_equal(drawn, selection.topk_mask(jnp.zeros((40, 7)), 5, **options))
