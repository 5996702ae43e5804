"""The TPU kernels: interpreted against the definition, and compiled for real TPUs."""

import functools
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import BlockMask, Grid, block_sparse_attention
from pallas_kernels.block_sparse_attention import reference, tpu, tpu_walk
from pallas_kernels.block_sparse_attention.inputs import Inputs
from pallas_kernels.block_sparse_attention.mask import within_segments

# The interpreter's programs are large and run once.
quick = functools.partial(
    jax.jit,
    compiler_options={"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False},
)
NAMES = ("out", "lse", "dq", "dk", "dv")


@pytest.fixture(autouse=True)
def small_steps(monkeypatch):
    """Less unrolling, so that the interpreter's compilation is short; the code is the same."""
    for name in ("CHUNK", "BACKWARD_CHUNK"):
        monkeypatch.setattr(tpu_walk, name, 256)
    for name in ("STEP", "BACKWARD_STEP"):
        monkeypatch.setattr(tpu_walk, name, 128)


def agree(
    mask,
    segments=None,
    softcap=None,
    heads=2,
    kv_heads=1,
    dim=16,
    v_dim=24,
    fetch=None,
    passes=("forward", "backward"),
    interpret=True,
):
    """Whether the interpreted kernels give the definition's results and gradients."""
    rng = np.random.default_rng(0)
    batch = 1 if segments is None else segments[0].shape[0]
    shapes = (
        (heads, mask.grid.q_len, dim),
        (kv_heads, mask.grid.kv_len, dim),
        (kv_heads, mask.grid.kv_len, v_dim),
    )
    qkv = [jnp.asarray(rng.normal(size=(batch, *s)), jnp.float32) for s in shapes]
    dout = jnp.asarray(rng.normal(size=(*qkv[0].shape[:3], v_dim)), jnp.float32)

    @quick
    def definition(dout, *qkv):
        f = lambda *x: reference.forward(Inputs(*x, mask, segments, 0.3, softcap))
        (out, lse), pull = jax.vjp(f, *qkv)
        dlse = jnp.where(jnp.isneginf(lse), 0.0, jnp.cos(lse))
        return out, lse, jnp.sum(dout * out, -1) - dlse, pull((dout, dlse))

    out, lse, delta, grads = definition(dout, *qkv)
    kernel_mask = mask if segments is None else within_segments(mask, *segments)
    inputs = lambda qkv: Inputs(*qkv, kernel_mask, segments, 0.3, softcap)
    options = dict(fetch=fetch, interpret=interpret)
    got = {}
    if "forward" in passes:
        got |= zip(NAMES[:2], quick(lambda *x: tpu.forward(inputs(x), **options))(*qkv))
    if "backward" in passes:
        run = quick(
            lambda lse, delta, dout, *x: tpu.backward(inputs(x), lse, delta, dout, **options)
        )
        got |= zip(NAMES[2:], run(lse, delta, dout, *qkv))
    want = dict(zip(NAMES, (out, lse, *grads)))
    for name, x in got.items():
        np.testing.assert_allclose(x, want[name], atol=3e-5, rtol=3e-5, err_msg=name)


def test_the_forward_kernel_equals_the_definition_with_an_empty_row_and_a_ragged_end():
    grid = Grid(256, 200)
    keep = np.array([[[True, True], [False, False]], [[False, True], [True, False]]])
    agree(BlockMask.from_dense(keep, grid), passes=["forward"])


def test_the_forward_kernel_hides_what_a_window_does_not_show():
    # One list has cut, full and absent blocks.
    agree(BlockMask.local(384, window=300), passes=["forward"])


def test_the_backward_kernel_equals_the_definition_with_an_empty_row_and_column():
    keep = np.array([[[True, True], [False, False]], [[False, True], [False, True]]])
    agree(BlockMask.from_dense(keep), passes=["backward"])


@pytest.mark.slow
@pytest.mark.parametrize("fetch", [False, True])
def test_kernels_equal_the_definition_on_chosen_blocks_patterns_and_ragged_lengths(fetch):
    grid = Grid(300, 500)
    keep = np.random.default_rng(0).random((2, 3, 4)) < 0.5
    keep[0], keep[1, 2] = False, False  # an empty head, an empty row
    mask = BlockMask.from_dense(keep, grid) | BlockMask.local(grid, window=40)
    agree(mask & BlockMask.causal(grid), fetch=fetch)


@pytest.mark.slow
@pytest.mark.parametrize("fetch", [False, True])
def test_kernels_equal_the_definition_with_windows_some_chunks_at_a_time(monkeypatch, fetch):
    for name in ("STEP", "BACKWARD_STEP"):
        monkeypatch.setattr(tpu_walk, name, 256)
    grid = Grid(512, 640)
    keep = np.random.default_rng(0).random((2, 4, 5)) < 0.7
    keep[0, 2] = False
    for window in (
        BlockMask.causal(grid, offset=128),
        BlockMask.local(grid, window=(250, 40)),
        BlockMask.local(grid, window=250) & BlockMask.causal(grid, offset=-3),
        BlockMask.local(grid, window=9) & BlockMask.causal(grid, offset=-20),  # nothing
    ):
        agree(window, fetch=fetch)
        agree(BlockMask.from_dense(keep, grid) & window, fetch=fetch)


@pytest.mark.slow
@pytest.mark.parametrize("fetch", [False, True])
def test_kernels_equal_the_definition_with_empty_rows_and_a_soft_cap(fetch):
    keep = np.array([[True, True, True], [False, False, False]])
    agree(BlockMask.from_dense(keep, (256, 128)), softcap=1.5, fetch=fetch)


@pytest.mark.slow
@pytest.mark.parametrize("order", ["packed", "shuffled"])
@pytest.mark.parametrize("length", [256, 300])  # forward, only whole blocks are without branches
def test_kernels_equal_the_definition_with_segments(order, length):
    rng = np.random.default_rng(0)
    segments = tuple(rng.integers(0, 4, (2, length)) for _ in range(2))
    if order == "packed":
        segments = tuple(np.sort(x, -1) for x in segments)
    mask = BlockMask.causal(length)
    agree(mask, tuple(jnp.asarray(x, jnp.int32) for x in segments))


@pytest.mark.slow
def test_lists_that_come_tile_by_tile_change_nothing(monkeypatch):
    monkeypatch.setattr(tpu_walk, "PREFETCHED_WORDS", 0)
    monkeypatch.setattr(tpu_walk, "TILE", 128)
    keep = np.random.default_rng(1).random((2, 3, 3)) < 0.6
    for fetch in (False, True):
        agree(BlockMask.from_dense(keep), fetch=fetch)


@pytest.mark.slow
def test_queries_cut_into_parts_that_fit_vmem_change_nothing(monkeypatch):
    grid = Grid(256, 256)
    mask = BlockMask.local(grid, window=150) | BlockMask.sinks(grid, num_keys=3)
    monkeypatch.setattr(tpu, "_room", lambda: 1)
    agree(mask)


@pytest.mark.slow
@pytest.mark.parametrize("passes", ["forward", "backward"])
def test_fetched_blocks_are_awaited_before_they_are_read_and_nothing_else_is_read(passes):
    # Copies happen when they are awaited, and memory that nobody wrote holds NaN.
    keep = np.random.default_rng(2).random((2, 3, 5)) < 0.5
    keep[0, 1] = False
    strict = pltpu.InterpretParams(dma_execution_mode="on_wait", uninitialized_memory="nan")
    agree(BlockMask.from_dense(keep), fetch=True, passes=[passes], interpret=strict)


CHILD = """
import json, sys
import jax, jax.numpy as jnp
from jax.experimental import topologies
from pallas_kernels import BlockMask, Grid, block_sparse_attention
for topology, case, fetched in json.loads(sys.argv[1]):
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    b, h, hk, s, d, dv, bq, bk, dtype, per_row, *features = case
    shards = 2 if "sharded" in features else 1
    mesh = jax.sharding.Mesh(devices[:shards], "x")
    heads = jax.P(None, "x") if shards > 1 else jax.P()
    def abstract(*shape, dtype=dtype, spec=heads):
        place = jax.sharding.NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)
    rows = 1024 if "few queries" in features else s
    q, k, v = abstract(b, h, rows, d), abstract(b, hk, s, d), abstract(b, hk, s, dv)
    ids = abstract(b, s, dtype="int32", spec=jax.P()) if "packed" in features else None
    nq, nk = -(-rows // bq), -(-s // bk)
    def attend(q, k, v, keep, ids):
        mask = BlockMask.from_dense(keep, Grid(rows, s, bq, bk), capacity=nq * (per_row or nk))
        return block_sparse_attention(
            q, k, v, mask, causal="causal" in features, segment_ids=ids, return_lse=True,
            softcap=30.0 if "softcap" in features else None, implementation="tpu")
    if shards > 1:
        attend = jax.shard_map(
            attend, mesh=mesh, in_specs=(*[heads] * 4, jax.P()), out_specs=(heads, heads))
    def loss(*args):
        out, lse = attend(*args)
        return out.astype("float32").sum() + lse.sum()
    keep = abstract(b if "per batch" in features else 1, h, nq, nk, dtype="bool")
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        run = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))
        text = run.lower(q, k, v, keep, ids).compile().as_text()
    kernels = ["block_sparse_attention_" + x for x in ("forward", "backward")]
    print(all(x in text for x in kernels) and
          all(y is None or (f"{x}_fetched" in text) == y for x, y in zip(kernels, fetched)))
"""

# Whether blocks are fetched forward and backward; None: that depends on the TPU's memory.
WHOLE, FETCHED, EITHER = (False, False), (True, True), (None, None)
QUICK = [
    # batch, heads, kv_heads, length, dim, v_dim, block_q, block_kv, dtype, blocks per row, ...
    ((1, 1, 1, 256, 128, 128, 128, 128, "bfloat16", 0, "causal"), WHOLE),
    ((1, 1, 1, 256, 128, 128, 128, 128, "bfloat16", 1), FETCHED),
]
FULL = [
    ((1, 1, 1, 1024, 128, 128, 512, 512, "bfloat16", 0, "causal"), WHOLE),
    ((1, 2, 1, 1024, 128, 128, 128, 128, "bfloat16", 0), WHOLE),
    ((1, 2, 2, 1000, 64, 256, 256, 128, "bfloat16", 0, "causal", "packed"), WHOLE),
    ((1, 2, 2, 1024, 128, 128, 256, 256, "bfloat16", 0, "causal", "packed"), WHOLE),
    ((2, 1, 1, 1024, 256, 128, 128, 256, "float32", 0, "per batch"), WHOLE),
    ((1, 2, 2, 1024, 128, 128, 256, 256, "bfloat16", 0, "softcap"), WHOLE),
    ((1, 2, 2, 2048, 128, 64, 128, 128, "bfloat16", 1, "causal", "packed"), FETCHED),
    ((1, 1, 1, 2048, 256, 256, 128, 128, "float32", 1, "softcap"), FETCHED),
    # 8 heads with their own lists: of full rows, and of 16 blocks of 128 per row
    ((1, 8, 8, 131072, 128, 128, 256, 256, "bfloat16", 0, "causal"), EITHER),
    ((1, 8, 8, 131072, 128, 128, 128, 128, "bfloat16", 16), EITHER),
    # keys and values of a head that no VMEM holds; shorter ones would have to be wider, and compile
    # no faster (it is the kernels that take long, not the length)
    ((1, 2, 1, 262144, 128, 128, 256, 256, "bfloat16", 16), FETCHED),
    ((1, 2, 1, 262144, 256, 256, 128, 128, "float32", 16, "few queries"), (True, False)),
]
SHARDED = [((2, 4, 2, 1024, 128, 128, 128, 128, "bfloat16", 0, "sharded"), WHOLE)]
TOPOLOGIES = ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"]
STRICT = dict(
    JAX_ENABLE_X64="1", JAX_NUMPY_RANK_PROMOTION="raise", JAX_NUMPY_DTYPE_PROMOTION="strict"
)


def compiles(*cases, strict=False):
    """Whether the TPU compiler takes every case and the kernels are in its result. All are compiled
    in one process, which has to be started and to load libtpu."""
    pytest.importorskip("libtpu", reason="needs libtpu, which has wheels for x86-64 Linux only")
    environment = dict(
        os.environ,
        JAX_PLATFORMS="cpu",
        XLA_FLAGS="",
        TPU_SKIP_MDS_QUERY="1",
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",
        **(STRICT if strict else {}),
    )
    done = subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps(cases)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == ["True"] * len(cases), done.stdout + done.stderr[-3000:]


def test_forward_and_backward_compile_for_a_real_tpu_in_strict_modes():
    compiles(*(("v5e:2x2", *case) for case in QUICK), strict=True)


@pytest.mark.slow
def test_forward_and_backward_compile_for_every_generation():
    compiles(*((topology, *case) for topology in TOPOLOGIES for case in QUICK))


@pytest.mark.slow
@pytest.mark.parametrize("case", FULL, ids=lambda case: "-".join(map(str, case[0])))
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_every_variant_compiles_for_real_tpus(topology, case):
    compiles((topology, *case))


@pytest.mark.slow
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_shard_map_over_heads_compiles_for_real_tpus(topology):
    compiles(*((topology, *case) for case in SHARDED))


@pytest.mark.parametrize(
    "blocks, dim, message",
    [
        ((64, 128), 16, "block_q=64 and block_kv=128 must be multiples of 128"),
        ((128, 128), 320, "head_dim=320 and v_dim=320 must be at most 256"),
    ],
)
def test_what_the_kernels_cannot_take_is_named(blocks, dim, message):
    x = jnp.ones((1, 1, 128, dim))
    mask = BlockMask.causal(Grid(128, block_q=blocks[0], block_kv=blocks[1]))
    with pytest.raises(ValueError, match=message):
        block_sparse_attention(x, x, x, mask, implementation="tpu")


def test_a_row_whose_list_cannot_fit_smem_is_named():
    q, k = jax.ShapeDtypeStruct((1, 1, 128, 8), "float32"), jnp.zeros((1, 1, 128, 8))
    mask = jax.eval_shape(lambda x: BlockMask.from_dense(x, capacity=8), jnp.ones((1, 60000), bool))
    assert "at most 56000 blocks; choose larger blocks" in str(tpu.why_not(q, k, k, mask))
