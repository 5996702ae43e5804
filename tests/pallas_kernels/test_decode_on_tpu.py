"""The TPU kernel that reads chosen blocks of a cache: interpreted against the definition, and compiled for real TPUs."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import BlockMask, block_sparse_decode
from pallas_kernels.block_sparse_attention import tpu_decode

# Copies happen when they are awaited, and memory that nobody wrote holds NaN.
STRICT_MEMORY = pltpu.InterpretParams(dma_execution_mode="on_wait", uninitialized_memory="nan")
BLOCK, CAPACITY = 16, 160


def case(dtype=np.float32, batch=2, heads=6, kv_heads=2):
    """Queries, a cache and which of its blocks are kept; one head keeps none."""
    rng = np.random.default_rng(0)
    q = rng.normal(size=(batch, heads, 128))
    k, v = rng.normal(size=(2, batch, kv_heads, CAPACITY, 128))
    keep = rng.random((batch, kv_heads, CAPACITY // BLOCK)) < 0.6
    keep[0, 0], keep[1, 1, 3] = False, True
    lengths = np.array([CAPACITY, 3 * BLOCK + 5])[:batch]
    return [jnp.asarray(x, dtype) for x in (q, k, v)], keep, lengths


def definition(q, k, v, keep, lengths, scale):
    """One query and head after the other, in NumPy."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros(q.shape)
    for b, h in np.ndindex(q.shape[:2]):
        g = h * k.shape[1] // q.shape[1]
        seen = np.repeat(keep[b, g], BLOCK) & (np.arange(CAPACITY) < lengths[b])
        if seen.any():
            w = np.exp(k[b, g, seen] @ q[b, h] * scale)
            out[b, h] = w @ v[b, g, seen] / w.sum()
    return out


def mask_of(keep):
    return BlockMask.from_dense(keep[:, :, None], (1, BLOCK), capacity=keep.shape[-1])


@pytest.mark.parametrize("cache", [jnp.float32, jnp.bfloat16])
def test_chosen_blocks_are_awaited_and_nothing_else_is_read(monkeypatch, cache):
    monkeypatch.setattr(tpu_decode, "CHUNK", 3 * BLOCK)  # so that some heads have more than one
    (q, k, v), keep, lengths = case()
    k, v = k.astype(cache), v.astype(cache)
    want = definition(q, k, v, keep, lengths, 0.5)
    unread = ~np.repeat(keep, BLOCK, -1) | (np.arange(CAPACITY) >= lengths[:, None, None])
    k, v = (jnp.where(unread[..., None], jnp.nan, x) for x in (k, v))
    got = block_sparse_decode(
        q, k, v, mask_of(keep), jnp.asarray(lengths), scale=0.5, implementation="tpu",
        interpret=STRICT_MEMORY,
    )  # fmt: skip
    np.testing.assert_allclose(got, want, atol=1e-5)
    other = block_sparse_decode(q, k, v, mask_of(keep), jnp.asarray(lengths), scale=0.5)
    np.testing.assert_allclose(other, want, atol=1e-5)


def test_heads_may_share_a_list_and_gradients_are_those_of_plain_jax():
    (q, k, v), keep, lengths = case()
    mask = BlockMask.from_dense(keep[1, 1][None, None, None], (1, BLOCK), capacity=10)

    def pulled(**options):
        f = lambda *x: block_sparse_decode(*x, mask, jnp.asarray(lengths), **options)
        out, pull = jax.vjp(f, q, k, v)
        return out, *pull(jnp.cos(out))

    for a, b in zip(pulled(implementation="tpu", interpret=True), pulled(implementation="xla")):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize(
    "dtype, block, dim, message",
    [
        ("float16", 16, 128, "not q of float16"),
        ("bfloat16", 8, 128, "block_kv=8 must be a multiple of 16, at most 2048"),
        ("float32", 16, 64, "head_dim=64 and v_dim=64 must be 128 or 256"),
    ],
)
def test_what_the_kernel_cannot_take_is_named(dtype, block, dim, message):
    q, cache = jnp.ones((1, 2, dim), dtype), jnp.ones((1, 1, 64, dim), dtype)
    mask = BlockMask.from_dense(np.ones((1, 64 // block), bool), (1, block))
    options = dict(implementation="tpu", interpret=True)
    with pytest.raises(ValueError, match=message):
        block_sparse_decode(q, cache, cache, mask, jnp.array([64]), **options)


def test_lists_that_do_not_fit_scalar_memory_are_named():
    cache = jax.ShapeDtypeStruct((400, 8, 64 * 16, 128), "bfloat16")
    q = jax.ShapeDtypeStruct((400, 8, 128), "bfloat16")
    keep = jax.ShapeDtypeStruct((400, 8, 1, 64), "bool")
    mask = jax.eval_shape(lambda x: BlockMask.from_dense(x, (1, 16), capacity=64), keep)
    assert "208000 words of at most 180000" in str(tpu_decode.why_not(q, cache, cache, mask, True))


CHILD = """
import json, sys
import jax
from jax.experimental import topologies
from pallas_kernels import BlockMask, block_sparse_decode
for topology, heads, kv_heads, length, dim, block, chosen, dtype, shards in json.loads(sys.argv[1]):
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = jax.sharding.Mesh(devices[:shards], "x")
    spread = jax.P(None, "x") if shards > 1 else jax.P()
    def abstract(*shape, dtype=dtype, spec=spread):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.sharding.NamedSharding(mesh, spec))
    def decode(q, k, v, scores, lengths):
        mask = BlockMask.from_scores(scores, chosen, (1, block))
        return block_sparse_decode(q, k, v, mask, lengths, implementation="tpu")
    if shards > 1:
        specs = (*[spread] * 4, jax.P())
        decode = jax.shard_map(decode, mesh=mesh, in_specs=specs, out_specs=spread)
    cache = abstract(2, kv_heads, length, dim)
    scores = abstract(2, kv_heads, 1, length // block, dtype="float32")
    lengths = abstract(2, dtype="int32", spec=jax.P())
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        run = jax.jit(decode).lower(abstract(2, heads, dim), cache, cache, scores, lengths)
        print("block_sparse_decode" in run.compile().as_text())
"""
# heads, heads of keys, length, head_dim, block, chosen blocks, dtype, devices
CASES = [
    (8, 2, 32768, 128, 64, 52, "bfloat16", 1),
    (4, 4, 4096, 256, 8, 40, "float32", 1),
    (8, 2, 4096, 128, 16, 40, "bfloat16", 2),
]


def compiles(topology, strict):
    pytest.importorskip("libtpu", reason="needs libtpu, which has wheels for x86-64 Linux only")
    modes = dict(
        JAX_ENABLE_X64="1", JAX_NUMPY_RANK_PROMOTION="raise", JAX_NUMPY_DTYPE_PROMOTION="strict"
    )
    environment = dict(
        os.environ, JAX_PLATFORMS="cpu", XLA_FLAGS="", TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1",
        **(modes if strict else {}),
    )  # fmt: skip
    cases = json.dumps([(topology, *case) for case in CASES])
    done = subprocess.run(
        [sys.executable, "-c", CHILD, cases], env=environment, capture_output=True, text=True
    )
    assert done.stdout.split() == ["True"] * len(CASES), done.stdout + done.stderr[-3000:]


def test_the_kernel_compiles_for_a_real_tpu_in_strict_modes():
    compiles("v5e:2x2", strict=True)


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v4:2x2x1", "v5p:2x2x1", "v6e:2x2"])
def test_the_kernel_compiles_for_every_generation(topology):
    compiles(topology, strict=False)
