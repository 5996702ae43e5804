"""The attention kernels for GPUs: in the interpreter, and compiled for devices that are not here."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bases import INTERPRETED
from compiled import compiled_for_gpu
from hypothesis import given, settings
from hypothesis import strategies as st
from test_block_sparse_attention import assert_same, quick, random_qkv
from writes import count_writes

from pallas_kernels import BlockMask, Grid, block_sparse_attention, block_sparse_decode
from pallas_kernels.block_sparse_attention import gpu
from pallas_kernels.block_sparse_attention.inputs import Inputs

INTERPRET = INTERPRETED["gpu"]


@functools.partial(quick, static_argnames=("implementation", "causal", "softcap", "scale"))
def results(implementation, q, k, v, mask, **options):
    """Output, LSE and the gradients of a function of both."""

    def loss(q, k, v):
        out, lse = block_sparse_attention(
            q,
            k,
            v,
            mask,
            return_lse=True,
            implementation=implementation,
            interpret=INTERPRETED.get(implementation, False),
            **options,
        )
        weights = jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)
        finite = jnp.where(jnp.isneginf(lse), 0.0, lse)
        return jnp.sum(out * weights) + jnp.sum(finite * weights[..., -1]), (out, lse)

    grads, (out, lse) = jax.grad(loss, (0, 1, 2), has_aux=True)(q, k, v)
    return out, lse, *grads


@st.composite
def cases(draw):
    block_q, block_kv = draw(st.sampled_from([(16, 16), (16, 32), (48, 16)]))
    kv_heads = draw(st.sampled_from([1, 2]))
    sizes = dict(
        batch=draw(st.integers(1, 2)),
        heads=kv_heads * draw(st.sampled_from([1, 3])),
        kv_heads=kv_heads,
        q_len=draw(st.sampled_from([1, 30, 64])),
        kv_len=draw(st.sampled_from([5, 32, 60])),
        dim=draw(st.sampled_from([8, 16])),
        v_dim=draw(st.sampled_from([8, 20])),
    )
    seed = draw(st.integers(0, 2**16))
    rng = np.random.default_rng(seed)
    nq, nk = -(-sizes["q_len"] // block_q), -(-sizes["kv_len"] // block_kv)
    lead = (
        draw(st.sampled_from([1, sizes["batch"]])),
        draw(st.sampled_from([1, kv_heads, sizes["heads"]])),
    )
    grid = Grid(q_len=sizes["q_len"], kv_len=sizes["kv_len"], block_q=block_q, block_kv=block_kv)
    keep = rng.random((*lead, nq, nk)) < draw(st.sampled_from([0.0, 0.3, 1.0]))
    mask = BlockMask.from_dense(keep, grid)
    pattern = draw(st.sampled_from(["none", "local", "mixed"]))
    if pattern == "local":
        mask &= BlockMask.local(grid, window=(7, 5))
    elif pattern == "mixed":
        mask = (mask | BlockMask.sinks(grid, num_keys=3)) & BlockMask.strided(grid, stride=3)
    options = dict(
        causal=draw(st.booleans()), softcap=draw(st.sampled_from([None, 1.5])), scale=0.7
    )
    if draw(st.booleans()):
        options["segment_ids"] = tuple(
            jnp.asarray(np.sort(rng.integers(0, 3, (sizes["batch"], n)).astype("i4"), -1))
            for n in (sizes["q_len"], sizes["kv_len"])
        )
    return random_qkv(seed, **sizes), mask, options


@pytest.mark.slow
@settings(max_examples=25)
@given(cases())
def test_gpu_kernels_equal_the_definition(case):
    (q, k, v), mask, options = case
    got = results("gpu", q, k, v, mask, **options)
    assert_same(got, results("reference", q, k, v, mask, **options))


def everything():
    """Heads of a group with lists of their own, rules, segments, ragged ends, an empty row."""
    q, k, v = random_qkv(0, heads=4, kv_heads=2, q_len=60, kv_len=40, dim=8, v_dim=20)
    grid = Grid(60, 40, block_q=32, block_kv=16)
    keep = np.random.default_rng(0).random((4, 2, 3)) < 0.7
    keep[1, 0], keep[2] = False, True
    mask = BlockMask.from_dense(keep, grid) & BlockMask.local(grid, window=(40, 10))
    ids = jnp.arange(60)[None] // 25, jnp.arange(40)[None] // 25
    return (q, k, v), mask, dict(segment_ids=ids, softcap=1.5)


def test_outputs_and_gradients_equal_the_definition_in_one_case_of_everything():
    qkv, mask, options = everything()
    got = results("gpu", *qkv, mask, **options)
    assert_same(got, results("reference", *qkv, mask, **options))
    assert not np.any(got[0][:, 1, :32]) and np.isneginf(got[1][:, 1, :32]).all()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bits_stay_near_float32(dtype):
    qkv, mask, options = everything()
    got = results("gpu", *(x.astype(dtype) for x in qkv), mask, **options)
    assert all(a.dtype == dtype for a in (got[0], *got[2:]))
    assert_same(got, results("reference", *qkv, mask, **options), atol=0.1)


@pytest.mark.skipif(not INTERPRET, reason="counts what the interpreter writes")
def test_every_number_is_written_by_one_program(monkeypatch):
    count_writes(monkeypatch)
    (q, k, v), mask, _ = everything()
    inputs = Inputs(q, k, v, mask, None, 1.0, None)
    out, lse = gpu.forward(inputs, interpret=True)
    grads = gpu.backward(inputs, lse, lse, q[..., :1] * jnp.ones((20,)), interpret=True)
    for x in (out, lse, *grads):
        np.testing.assert_array_equal(x, 1)


@pytest.mark.parametrize("shared", [False, True])
def test_decode_reads_the_chosen_blocks_and_no_others(shared):
    q, k, v = random_qkv(7, batch=2, heads=6, kv_heads=2, q_len=1, kv_len=96, v_dim=20)
    keep = np.random.default_rng(1).random((1 if shared else 2, 1 if shared else 2, 1, 6)) < 0.5
    keep[0, 0] = [True, False, True, True, False, False] if shared else False
    mask = BlockMask.from_dense(keep, (1, 16), capacity=6)
    lengths = jnp.array([96, 35])
    unread = jnp.repeat(jnp.asarray(~np.broadcast_to(keep, (2, 2, 1, 6))[:, :, 0]), 16, -1)
    unread |= (jnp.arange(96) >= lengths[:, None])[:, None]
    k, v = (jnp.where(unread[..., None], jnp.nan, x) for x in (k, v))

    def run(q, k, v, **options):
        return block_sparse_decode(q[:, :, 0], k, v, mask, lengths, scale=0.5, **options)

    got, pull = jax.vjp(lambda q: run(q, k, v, implementation="gpu", interpret=INTERPRET), q)
    want, same = jax.vjp(lambda q: run(q, k, v, implementation="xla"), q)
    np.testing.assert_allclose(got, want, atol=1e-5)
    np.testing.assert_allclose(pull(got)[0], same(want)[0], atol=1e-5)
    with pytest.raises(ValueError, match="block_kv=8 must be a multiple of 16"):
        small = BlockMask.from_dense(np.ones((1, 12), bool), (1, 8))
        block_sparse_decode(q[:, :, 0], k, v, small, lengths, implementation="gpu", interpret=True)


ATTENTION = """
def decode(batch, heads, kv_heads, length, dim, block, chosen, dtype):
    grid = Grid(1, length, block_q=1, block_kv=block)
    make = lambda s: BlockMask.from_scores(s, chosen, grid)
    mask = jax.eval_shape(make, S((batch, kv_heads, 1, grid.kv_blocks), "float32"))
    cache = S((batch, kv_heads, length, dim), dtype)
    args = S((batch, heads, dim), dtype), cache, cache, mask, S((batch,), "int32")
    return block_sparse_decode, args

def attention(side, length, dim, v_dim, block, dtype, partial=True, group=4):
    grid, heads = Grid(length, block_q=block, block_kv=block), 2 * group
    def mask_of(scores):
        mask = BlockMask.from_scores(scores, max(1, grid.kv_blocks // 4), grid)
        return mask & BlockMask.causal(grid) if partial else mask
    mask = jax.eval_shape(mask_of, S((heads, grid.q_blocks, grid.kv_blocks), "float32"))
    q, k, v = (S((1, h, length, d), dtype) for h, d in ((heads, dim), (2, dim), (2, v_dim)))
    ids = S((1, length), "int32") if partial else None
    def run(q, k, v, mask, ids):
        f = lambda q, k, v: block_sparse_attention(
            q, k, v, mask, segment_ids=ids, softcap=30.0 if partial else None, return_lse=True)
        if side == "forward":
            return f(q, k, v)
        return jax.vjp(f, q, k, v)[1]((q[..., :1] * jnp.ones((v_dim,), dtype), q[..., 0].astype("float32")))
    return run, (q, k, v, mask, ids)
"""
QUICK = [
    ["decode", 2, 32, 8, 32768, 128, 64, 64, "bfloat16"],
    ["attention", "forward", 8192, 128, 128, 128, "bfloat16", False],
    ["attention", "backward", 1000, 80, 64, 64, "bfloat16"],
]
DECODE = [
    ["decode", 2, 32, 8, 32768, dim, 64, 64, dtype]
    for dim, dtype in ((64, "float16"), (256, "bfloat16"), (128, "float32"), (80, "bfloat16"))
]
FULL = (
    DECODE
    + [["attention", "backward", 4096, d, d, 128, "bfloat16", False] for d in (64, 128, 256)]
    + [["attention", "backward", 4096, 64, 64, 64, "bfloat16", False, 1]]
) + [
    ["attention", side, 4096, dim, dim, block, dtype]
    for side in ("forward", "backward")
    for dim, block, dtype in (
        (16, 64, "float16"),
        (32, 32, "float16"),
        (64, 64, "bfloat16"),
        (64, 128, "bfloat16"),
        (128, 128, "bfloat16"),
        (128, 64, "bfloat16"),
        (256, 128, "bfloat16"),
        (64, 64, "float32"),
        (128, 128, "float32"),
    )
]


def sound(target, cases):
    """Compiled without spills, with tensor cores and copies ahead."""
    for case, report in zip(cases, compiled_for_gpu(target, ATTENTION, cases)):
        kernels = [k for k in report["kernels"] if k["name"].startswith("block_sparse")]
        assert kernels, case
        for kernel in kernels:
            launch = next(x for x in report["launches"] if x["name"] == kernel["name"])
            found = kernel["instructions"]
            assert found.get("wgmma") or found.get("mma"), (case, kernel)
            assert found.get("cp.async") and not found.get("local memory"), (case, kernel)
            assert launch["threads"] in (128, 256)
            if "registers" in kernel:
                assert kernel["spill_bytes"] == 0
            wide = case[0] == "decode" or max(case[3:5]) > 128 or case[6] == "float32"
            if not wide:  # two programs fit
                assert 2 * launch["shared"] <= dict(h100=233_472, a100=167_936)[target], case
                if "registers" in kernel:
                    registers = -(-kernel["registers"] // 8) * 8 * launch["threads"]
                    assert 2 * registers <= 65_536, (case, kernel)
        yield report


@pytest.mark.parametrize("target", ["h100", "a100"])
def test_forward_and_backward_compile_for_gpus(target):
    decode, forward, backward = sound(target, QUICK)
    assert decode["temporary_bytes"] < 1 << 21  # parts to merge, and no gathered copy of the cache
    unit = dict(h100="wgmma", a100="mma")[target]
    (kernel,) = (k for k in forward["kernels"] if "attention" in k["name"])
    assert kernel["instructions"][unit]
    assert forward["temporary_bytes"] < 1 << 20  # no copy of an operand, no scores
    names = {k["name"] for k in backward["kernels"]}
    ours = {"block_sparse_attention", "block_sparse_attention_dkv", "block_sparse_attention_dq"}
    assert ours <= names


@pytest.mark.slow
@pytest.mark.parametrize("target", ["h100", "a100"])
def test_every_variant_compiles_for_gpus(target):
    assert len(list(sound(target, FULL))) == len(FULL)
