"""The TPU kernels: interpreted against the definition, and compiled for real TPUs."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import BlockMask, block_sparse_attention
from pallas_kernels.block_sparse_attention import reference, tpu


@pytest.fixture
def small_steps(monkeypatch):
    """Less unrolling, so that the interpreter's compilation is short; the code is the same."""
    for name in ("CHUNK", "BACKWARD_CHUNK"):
        monkeypatch.setattr(tpu, name, 256)
    for name in ("STEP", "BACKWARD_STEP"):
        monkeypatch.setattr(tpu, name, 128)


def agree(mask, segments=None, softcap=None, heads=2, kv_heads=1, dim=16, v_dim=24, seed=0):
    """Whether the interpreted kernels give the definition's results and gradients."""
    rng = np.random.default_rng(seed)
    batch = 1 if segments is None else segments[0].shape[0]
    shapes = (heads, mask.q_len, dim), (kv_heads, mask.kv_len, dim), (kv_heads, mask.kv_len, v_dim)
    q, k, v = (jnp.asarray(rng.normal(size=(batch, *s)), jnp.float32) for s in shapes)
    dout = jnp.asarray(rng.normal(size=(*q.shape[:3], v_dim)), jnp.float32)

    (out, lse), pull = jax.vjp(
        lambda *x: reference.attention(*x, mask, segments, 0.3, softcap), q, k, v
    )
    dlse = jnp.where(jnp.isneginf(lse), 0.0, jnp.cos(lse))
    got = tpu.forward(q, k, v, mask, segments, 0.3, softcap, interpret=True)
    delta = jnp.sum(dout * out, -1) - dlse
    args = (q, k, v, mask, segments, 0.3, softcap, lse, delta, dout)
    got += tpu.backward(*args, interpret=True)
    for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), got, (out, lse, *pull((dout, dlse)))):
        np.testing.assert_allclose(a, b, atol=3e-5, rtol=3e-5, err_msg=name)


@pytest.mark.slow
def test_kernels_equal_the_definition_on_chosen_blocks_patterns_and_ragged_lengths(small_steps):
    shape = dict(q_len=300, kv_len=500, block_q=128, block_kv=128)
    keep = np.random.default_rng(0).random((2, 3, 4)) < 0.5
    keep[0], keep[1, 2] = False, False  # an empty head, an empty row
    mask = BlockMask.from_dense(keep, **shape) | BlockMask.local(window=40, **shape)
    agree(mask & BlockMask.causal(**shape))


@pytest.mark.slow
def test_kernels_equal_the_definition_with_empty_rows_and_a_soft_cap(small_steps):
    keep = np.array([[True, True, True], [False, False, False]])
    agree(BlockMask.from_dense(keep, block_q=256, block_kv=128), softcap=1.5)


@pytest.mark.slow
def test_kernels_equal_the_definition_with_segments(small_steps):
    rng = np.random.default_rng(0)
    segments = tuple(jnp.asarray(np.sort(rng.integers(0, 4, (2, 256)), -1)) for _ in range(2))
    agree(BlockMask.from_dense(np.ones((2, 2), bool)), segments)


@pytest.mark.slow
def test_streamed_lists_and_several_tiles_change_nothing(small_steps, monkeypatch):
    monkeypatch.setattr(tpu, "PREFETCHED_WORDS", 0)
    monkeypatch.setattr(tpu, "TILE", 128)
    keep = np.random.default_rng(1).random((2, 3, 3)) < 0.6
    agree(BlockMask.from_dense(keep))


@pytest.mark.slow
def test_parts_that_fit_vmem_change_nothing(small_steps, monkeypatch):
    monkeypatch.setattr(
        tpu, "_buffers", lambda resident, tile, blocks, own=0: (2, 1 + (blocks > 1))
    )
    shape = dict(q_len=256, kv_len=256, block_q=128, block_kv=128)
    agree(BlockMask.local(window=150, **shape) | BlockMask.sinks(num_keys=3, **shape))


CHILD = """
import json, sys
import jax, jax.numpy as jnp
from jax.experimental import topologies
from pallas_kernels import BlockMask, block_sparse_attention
topology, cases = json.loads(sys.argv[1])
device = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]
mesh = jax.sharding.Mesh([device], "x")
place = jax.sharding.NamedSharding(mesh, jax.P())
for case in cases:
    b, h, hk, s, d, dv, bq, bk, dtype, causal, packed = case
    def abstract(*shape, dtype=dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)
    q, k, v = abstract(b, h, s, d), abstract(b, hk, s, d), abstract(b, hk, s, dv)
    ids = abstract(b, s, dtype="int32") if packed else None
    def loss(q, k, v, keep, ids):
        mask = BlockMask.from_dense(keep, block_q=bq, block_kv=bk, q_len=s, kv_len=s)
        out, lse = block_sparse_attention(
            q, k, v, mask, causal=causal, segment_ids=ids, return_lse=True, implementation="tpu")
        return out.astype("float32").sum() + lse.sum()
    keep = abstract(h, -(-s // bq), -(-s // bk), dtype="bool")
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        run = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))
        text = run.lower(q, k, v, keep, ids).compile().as_text()
    names = ["block_sparse_attention_" + x for x in ("forward", "backward")]
    print(all(name in text for name in names))
"""


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_forward_and_backward_compile_for_real_tpus(topology):
    pytest.importorskip("libtpu")
    cases = [
        # batch, heads, kv_heads, length, dim, v_dim, block_q, block_kv, dtype, causal, packed
        (1, 2, 1, 1024, 128, 128, 128, 128, "bfloat16", False, False),
        (1, 2, 2, 1000, 64, 256, 256, 128, "bfloat16", True, True),
        (2, 1, 1, 1024, 256, 128, 128, 256, "float32", False, False),
        (1, 1, 1, 131072, 128, 128, 256, 256, "bfloat16", True, False),
    ]
    environment = dict(
        os.environ,
        JAX_PLATFORMS="cpu",
        XLA_FLAGS="",
        TPU_SKIP_MDS_QUERY="1",
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",
    )
    done = subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps([topology, cases])],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == ["True"] * len(cases), done.stderr[-3000:]


@pytest.mark.parametrize(
    "blocks, dim, message",
    [
        ((64, 128), 16, "block_q=64 and block_kv=128 must be multiples of 128"),
        ((128, 128), 320, "head_dim=320 and v_dim=320 must be at most 256"),
    ],
)
def test_what_the_kernels_cannot_take_is_named(blocks, dim, message):
    x = jnp.ones((1, 1, 128, dim))
    mask = BlockMask.causal(128, block_q=blocks[0], block_kv=blocks[1])
    with pytest.raises(ValueError, match=message):
        block_sparse_attention(x, x, x, mask, implementation="tpu")
