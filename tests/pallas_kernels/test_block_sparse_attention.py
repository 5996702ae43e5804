"""Block-sparse attention against its definition: outputs, log-sum-exp and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import (
    BlockMask,
    Grid,
    block_sparse_attention,
    block_sparse_decode,
    merge_attention,
    ring_block_sparse_attention,
)

# Tests compile much and run little.
quick = functools.partial(
    jax.jit,
    compiler_options={"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False},
)


def random_qkv(seed, batch=1, heads=2, kv_heads=1, q_len=40, kv_len=48, dim=8, v_dim=8, dtype="f4"):
    rng = np.random.default_rng(seed)
    shapes = ((batch, heads, q_len, dim), (batch, kv_heads, kv_len, dim))
    shapes += ((batch, kv_heads, kv_len, v_dim),)
    return tuple(jnp.asarray(rng.normal(size=s).astype(jnp.dtype(dtype))) for s in shapes)


@functools.partial(quick, static_argnames=("implementation", "causal", "softcap", "scale"))
def results(implementation, q, k, v, mask, **options):
    """Output, LSE and the gradients of a random linear function of both."""

    def loss(q, k, v):
        out, lse = block_sparse_attention(
            q, k, v, mask, return_lse=True, implementation=implementation, **options
        )
        weights = jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)
        finite = jnp.where(jnp.isneginf(lse), 0.0, lse)
        return jnp.sum(out * weights) + jnp.sum(finite * weights[..., -1]), (out, lse)

    grads, (out, lse) = jax.grad(loss, (0, 1, 2), has_aux=True)(q, k, v)
    return out, lse, *grads


def assert_same(got, want, atol=2e-5):
    for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), got, want):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        assert not np.isnan(a).any(), name
        np.testing.assert_allclose(a, b, atol=atol, rtol=atol, err_msg=name)


@st.composite
def cases(draw):
    block_q, block_kv = draw(st.sampled_from([(8, 8), (16, 8), (8, 24)]))
    kv_heads = draw(st.sampled_from([1, 2]))
    sizes = dict(
        batch=draw(st.integers(1, 2)),
        heads=kv_heads * draw(st.sampled_from([1, 3])),
        kv_heads=kv_heads,
        q_len=draw(st.integers(1, 40)),
        kv_len=draw(st.integers(1, 50)),
        dim=draw(st.sampled_from([4, 16])),
        v_dim=draw(st.sampled_from([4, 10])),
    )
    seed = draw(st.integers(0, 2**16))
    rng = np.random.default_rng(seed)
    nq, nk = -(-sizes["q_len"] // block_q), -(-sizes["kv_len"] // block_kv)
    lead = (
        draw(st.sampled_from([1, sizes["batch"]])),
        draw(st.sampled_from([1, kv_heads, sizes["heads"]])),
    )
    grid = Grid(q_len=sizes["q_len"], kv_len=sizes["kv_len"], block_q=block_q, block_kv=block_kv)
    keep = rng.random((*lead, nq, nk)) < draw(st.sampled_from([0.0, 0.2, 0.6, 1.0]))
    mask = BlockMask.from_dense(keep, grid)
    pattern = draw(st.sampled_from(["none", "and local", "or sinks", "only strided", "mixed"]))
    if pattern == "and local":
        mask &= BlockMask.local(grid, window=(7, 5))
    elif pattern == "or sinks":
        mask |= BlockMask.sinks(grid, num_keys=3)
    elif pattern == "only strided":
        mask = BlockMask.strided(grid, stride=6) & BlockMask.prefix(grid, length=5)
    elif pattern == "mixed":
        mask = (mask | BlockMask.local(grid, window=9)) & BlockMask.strided(grid, stride=2)
    options = dict(
        causal=draw(st.booleans()),
        softcap=draw(st.sampled_from([None, 1.5])),
        scale=draw(st.sampled_from([None, 0.7])),
    )
    if draw(st.booleans()):
        options["segment_ids"] = tuple(
            jnp.asarray(np.sort(rng.integers(0, 3, (sizes["batch"], n)).astype("i4"), -1))
            for n in (sizes["q_len"], sizes["kv_len"])
        )
    return random_qkv(seed, **sizes), mask, options


def is_empty(q, k, mask, options):
    """Rows of `[batch, heads, q_len]` that see no key."""
    seen = np.asarray(quick(BlockMask.to_dense)(mask))
    seen = np.broadcast_to(seen, (q.shape[0], *seen.shape[1:]))
    if options["causal"]:
        seen = seen & (np.arange(q.shape[2])[:, None] >= np.arange(k.shape[2]))
    if "segment_ids" in options:
        of_q, of_k = (np.asarray(x) for x in options["segment_ids"])
        seen = seen & (of_q[..., None] == of_k[:, None])[:, None]
    return ~np.repeat(seen.any(-1), q.shape[1] // seen.shape[1], 1)


def agrees(case):
    (q, k, v), mask, options = case
    got = results("xla", q, k, v, mask, **options)
    assert_same(got, results("reference", q, k, v, mask, **options))
    empty = is_empty(q, k, mask, options)
    out, lse, dq, *_ = (np.asarray(x) for x in got)
    np.testing.assert_array_equal(np.isneginf(lse), empty)
    assert not out[empty].any() and not dq[empty].any()


@settings(max_examples=3)
@given(cases())
def test_xla_equals_the_definition_and_empty_rows_give_zero_and_minus_infinity(case):
    agrees(case)


@pytest.mark.slow
@settings(max_examples=100)
@given(cases())
def test_xla_equals_the_definition_in_many_cases(case):
    agrees(case)


def test_the_reference_is_softmax_attention():
    q, k, v = random_qkv(0, heads=2, kv_heads=2, q_len=16, kv_len=16)
    mask = BlockMask.causal(Grid(16, block_q=8, block_kv=8))
    want = jax.nn.dot_product_attention(*(jnp.swapaxes(x, 1, 2) for x in (q, k, v)), is_causal=True)
    for implementation in ("reference", "xla"):
        run = quick(functools.partial(block_sparse_attention, implementation=implementation))
        np.testing.assert_allclose(run(q, k, v, mask), jnp.swapaxes(want, 1, 2), atol=1e-5)


def test_bfloat16_stays_near_float32():
    q, k, v = random_qkv(1, heads=4, kv_heads=2, dtype="bfloat16")
    mask = BlockMask.from_dense(np.ones((5, 6), bool), (8, 8))
    got = results("xla", q, k, v, mask)
    want = results("reference", *(x.astype(jnp.float32) for x in (q, k, v)), mask)
    assert all(a.dtype == jnp.bfloat16 for a in (got[0], *got[2:]))
    assert_same(got, want, atol=0.05)


def with_grads(f, *args):
    """f's output (and LSE), and the gradients of a function of both, all from one program."""

    def loss(*args):
        result = f(*args)
        out, lse = result if isinstance(result, tuple) else (result, jnp.zeros(()))
        finite = jnp.where(jnp.isneginf(lse), 0.0, jnp.cos(lse))
        return jnp.sum(jnp.sin(out)) + jnp.sum(finite), result

    return jax.tree.leaves(quick(jax.grad(loss, (0, 1, 2), has_aux=True))(*args))


def assert_close(got, want):
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_parts_merge_by_their_lse_with_gradients():
    q, k, v = random_qkv(2)
    keep = np.random.default_rng(0).random((5, 6)) < 0.6
    keep[2] = False  # empty in both parts
    left = keep & (np.arange(6) < 2)
    whole, *parts = (BlockMask.from_dense(x, (8, 8)) for x in (keep, left, keep & ~left))
    attend = functools.partial(block_sparse_attention, implementation="xla", return_lse=True)
    merged = with_grads(lambda *x: merge_attention([attend(*x, m) for m in parts]), q, k, v)
    assert_close(merged, with_grads(lambda *x: attend(*x, whole), q, k, v))


def test_vmap_remat_and_a_traced_mask_change_nothing():
    q, k, v = random_qkv(3, batch=3)
    keep = jnp.asarray(np.random.default_rng(0).random((3, 2, 5, 6)) < 0.5)

    def one(q, k, v, keep):
        mask = BlockMask.from_dense(keep, (8, 8))
        return block_sparse_attention(q[None], k[None], v[None], mask, implementation="xla")[0]

    def at_once(q, k, v, keep):
        mask = BlockMask.from_dense(keep, (8, 8))
        return block_sparse_attention(q, k, v, mask, implementation="xla")

    got = with_grads(jax.vmap(jax.checkpoint(one)), q, k, v, keep)
    assert_close(got, with_grads(at_once, q, k, v, keep))


@pytest.mark.parametrize("axes", [(0, None, None), (None, 0, 0)])
def test_vmap_with_a_shared_mask_or_shared_operands_changes_nothing(axes):
    stacked = [jnp.stack(x) for x in zip(*(random_qkv(i, batch=2) for i in range(3)))]
    args = [x if axis == 0 else x[0] for x, axis in zip(stacked, axes)]
    mask = BlockMask.from_dense(np.random.default_rng(0).random((2, 5, 6)) < 0.5, (8, 8))
    ids = jnp.arange(40) // 17 * jnp.ones((2, 1), int), jnp.arange(48) // 17 * jnp.ones((2, 1), int)

    def run(*qkv):
        return block_sparse_attention(*qkv, mask, segment_ids=ids, implementation="xla")

    got, once = quick(jax.vmap(run, axes))(*args), quick(run)
    for i in range(3):
        want = once(*(x[i] if axis == 0 else x for x, axis in zip(args, axes)))
        np.testing.assert_allclose(got[i], want, atol=1e-6)


def test_a_new_mask_compiles_nothing_anew():
    q, k, v = random_qkv(4)
    traces = []

    @jax.jit
    def run(q, k, v, mask):
        traces.append(None)
        return block_sparse_attention(q, k, v, mask, implementation="xla")

    rng = np.random.default_rng(0)
    for density in (0.0, 0.3, 1.0):
        run(q, k, v, BlockMask.from_dense(rng.random((2, 5, 6)) < density, (8, 8)))
    assert len(traces) == 1


def test_shard_map_over_heads_and_batch():
    q, k, v = random_qkv(5, batch=2, heads=4, kv_heads=4)
    keep = np.random.default_rng(0).random((2, 4, 5, 6)) < 0.5
    mask = BlockMask.from_dense(keep, (8, 8))
    auto = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=auto)
    spec = jax.P("data", "model")
    run = functools.partial(block_sparse_attention, implementation="xla")
    sharded = jax.shard_map(run, mesh=mesh, in_specs=spec, out_specs=spec)
    assert_close(with_grads(sharded, q, k, v, mask), with_grads(run, q, k, v, mask))


def test_a_ring_over_the_sequence_equals_one_device_with_gradients():
    q, k, v = random_qkv(6, heads=2, q_len=64, kv_len=64)
    grid = Grid(64, block_q=8, block_kv=8)
    keep = np.random.default_rng(0).random((2, 8, 8)) < 0.5
    mask = BlockMask.from_dense(keep, grid) & BlockMask.causal(grid)
    mesh = jax.make_mesh(
        (4,), ("seq",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:4]
    )
    spec = jax.P(None, None, "seq")
    ring = jax.shard_map(
        functools.partial(ring_block_sparse_attention, axis_name="seq", softcap=2.0),
        mesh=mesh,
        in_specs=(spec, spec, spec, jax.P()),
        out_specs=(spec, spec),
    )

    whole = functools.partial(block_sparse_attention, softcap=2.0, return_lse=True)
    assert_close(with_grads(ring, q, k, v, mask), with_grads(whole, q, k, v, mask))
    with pytest.raises(ValueError, match="q has 8 positions on each of 4 devices"):
        jax.eval_shape(ring, q[:, :, :32], k, v, mask)


def test_decode_equals_attention_over_the_chosen_blocks_and_reads_no_others():
    q, k, v = random_qkv(7, batch=2, heads=4, kv_heads=2, q_len=1, kv_len=48)
    keep = np.random.default_rng(1).random((2, 2, 1, 6)) < 0.5
    keep[0, 0] = False
    mask = BlockMask.from_dense(keep, (1, 8), capacity=6)
    lengths = jnp.array([48, 19])
    unread = jnp.repeat(jnp.asarray(~keep[:, :, 0]), 8, -1)[..., None]
    poisoned = [jnp.where(unread, jnp.nan, x) for x in (k, v)]
    poisoned = [x.at[0, 0, :8].set(0.0) for x in poisoned]  # padding of an empty list
    poisoned = [jnp.where((jnp.arange(48) < 8)[:, None] & unread, 0.0, x) for x in poisoned]
    got = quick(block_sparse_decode)(q[:, :, 0], *poisoned, mask, lengths)
    ids = jnp.zeros((2, 1), int), (jnp.arange(48) >= lengths[:, None]).astype(int)
    attend = functools.partial(block_sparse_attention, implementation="reference")
    want = quick(attend)(q, k, v, mask, segment_ids=ids)
    np.testing.assert_allclose(got, want[:, :, 0], atol=1e-5)
    with pytest.raises(ValueError, match="decoding takes chosen blocks"):
        pattern = BlockMask.sinks(Grid(1, 48, block_q=1, block_kv=8), num_keys=4)
        block_sparse_decode(q[:, :, 0], k, v, pattern, lengths)
    with pytest.raises(ValueError, match="decoding needs 1, 1 and the cache's 48"):
        block_sparse_decode(q[:, :, 0], k, v, BlockMask.causal(48), lengths)


def test_memory_grows_with_the_kept_blocks_not_with_the_square():
    def temporaries(length):
        shape = jax.ShapeDtypeStruct((1, 1, length, 8), jnp.float32)
        mask = BlockMask.local(Grid(length, block_q=16, block_kv=16), window=32)
        run = jax.jit(
            lambda q, k, v: jax.grad(
                lambda *x: block_sparse_attention(*x, mask, implementation="xla").sum(), (0, 1, 2)
            )(q, k, v)
        )
        return run.lower(shape, shape, shape).compile().memory_analysis().temp_size_in_bytes

    most = temporaries(4096)
    assert most < 4.5 * temporaries(1024)
    assert most < 4096 * 4096


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(q=jnp.ones((2, 40, 8))), r"q has shape \(2, 40, 8\); it must have 4 axes"),
        (dict(q=jnp.ones((1, 2, 40, 8), jnp.int8)), "q has dtype int8"),
        (dict(v=jnp.ones((1, 1, 48, 8), jnp.bfloat16)), "v has dtype bfloat16 but q has float32"),
        (dict(k=jnp.ones((1, 3, 48, 8))), r"k has shape \(1, 3, 48, 8\)"),
        (dict(v=jnp.ones((1, 1, 40, 8))), r"v has shape \(1, 1, 40, 8\)"),
        (dict(q=jnp.ones((1, 2, 32, 8))), "mask is for q_len=40 and kv_len=48; q has 32"),
        (dict(softcap=-1.0), "softcap=-1.0 must be"),
        (dict(scale=0.0), "scale=0.0 must be"),
        (
            dict(segment_ids=jnp.zeros((1, 40), int)),
            r"segment_ids of the keys have shape \(1, 40\)",
        ),
        (dict(implementation="cuda"), "implementation='cuda' is unknown"),
        (dict(implementation="tpu"), "implementation='tpu' does not support these arguments"),
        (dict(implementation="gpu"), "it runs on GPU, not on cpu"),
        (
            dict(implementation="gpu", interpret=True),
            "block_q=8 and block_kv=8 must be multiples of 16",
        ),
        (
            dict(mask=BlockMask.from_dense(np.ones((3, 5, 6), bool), (8, 8))),
            "mask is for batch 1 and 3 heads",
        ),
    ],
)
def test_arguments_that_do_not_fit_are_named(change, message):
    q, k, v = random_qkv(0)
    mask = BlockMask.from_dense(np.ones((5, 6), bool), (8, 8))
    with pytest.raises(ValueError, match=message):
        block_sparse_attention(**(dict(q=q, k=k, v=v, mask=mask) | change))
