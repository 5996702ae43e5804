"""Every variant of the matmul kernels, compiled ahead of time by the real TPU compiler."""

import json
import os
import subprocess
import sys

import pytest

TOPOLOGIES = ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"]
STRICT = dict(
    JAX_ENABLE_X64="1", JAX_NUMPY_RANK_PROMOTION="raise", JAX_NUMPY_DTYPE_PROMOTION="strict"
)

CHILD = """
import json, sys
import jax, jax.numpy as jnp
from jax.experimental import topologies
from pallas_kernels import BlockSparse, NMSparse, block_sparse_matmul, nm_matmul

topology, cases = json.loads(sys.argv[1])
devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
mesh = jax.sharding.Mesh(devices[: 2 if cases[0][0] == "sharded" else 1], "x")
place = jax.sharding.NamedSharding(mesh, jax.P())

def abstract(*shape, dtype):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

def block_sparse(rows, shape, block, blocks, dtype):
    def loss(x, values, places):
        w = BlockSparse(values, places, tuple(shape), tuple(block))
        return block_sparse_matmul(x, w).astype("float32").sum()
    args = (abstract(rows, shape[0], dtype=dtype), abstract(blocks, *block, dtype=dtype),
            abstract(3, blocks, dtype="int32"))
    names = ["", "_t", "_weight_gradient"]
    kernels = ["block_sparse_" + ("matmul" + n if n != names[2] else n[1:]) for n in names]
    return jax.value_and_grad(loss, (0, 1)), args, kernels

def sharded(rows, shape, block, blocks, dtype):
    # block columns of w over the devices
    shape = shape[0], shape[1] // mesh.size
    def local(x, values, places):
        return block_sparse_matmul(x, BlockSparse(values[0], places[0], shape, tuple(block)))
    split, columns = jax.P("x"), jax.P(None, "x")
    run = jax.shard_map(local, mesh=mesh, in_specs=(jax.P(), split, split), out_specs=columns)
    def loss(x, values, places):
        return run(x, values, places).astype("float32").sum()
    _, args, kernels = block_sparse(rows, shape, block, blocks, dtype)
    place = jax.sharding.NamedSharding(mesh, split)
    args = args[:1] + tuple(
        jax.ShapeDtypeStruct((mesh.size, *a.shape), a.dtype, sharding=place) for a in args[1:]
    )
    return jax.value_and_grad(loss, (0, 1)), args, kernels + ["all-reduce"]

def n_of_m(rows, shape, n, m):
    bits = {2: 1, 4: 2, 8: 4, 16: 4}[m]
    def run(x, values, codes):
        return nm_matmul(x, NMSparse(values, codes, tuple(shape), n, m, 1))
    groups = shape[0] // m
    args = (abstract(rows, shape[0], dtype="bfloat16"),
            abstract(n, groups, shape[1], dtype="bfloat16"),
            abstract(n, groups * bits // 32, shape[1], dtype="int32"))
    return run, args, ["nm_matmul"]

for kind, *case in cases:
    run, args, kernels = dict(block=block_sparse, nm=n_of_m, sharded=sharded)[kind](*case)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        text = jax.jit(run).lower(*args).compile().as_text()
    print(all(name in text for name in kernels))
"""

QUICK = [
    # rows, shape, block shape, stored blocks, dtype
    ("block", 256, (1024, 512), (128, 128), 12, "bfloat16"),
    ("nm", 16, (1024, 512), 2, 4),
]
FULL = [
    ("block", 300, (1000, 700), (128, 256), 17, "bfloat16"),  # ragged
    ("block", 3, (1024, 1024), (256, 128), 16, "bfloat16"),  # fewer rows than a tile
    ("block", 2048, (4096, 4096), (128, 128), 256, "bfloat16"),
    ("block", 1024, (4096, 4096), (256, 256), 64, "bfloat16"),
    ("block", 1024, (4096, 8192), (512, 512), 32, "bfloat16"),
    ("block", 256, (512, 512), (128, 128), 8, "float32"),
    ("block", 256, (1024, 1024), (256, 256), 5, "float32"),
    ("block", 512, (2048, 2048), (1024, 1024), 2, "bfloat16"),
    ("block", 512, (16384, 16384), (128, 128), 8192, "bfloat16"),  # panels and lists at their size
    ("nm", 1, (4096, 4096), 2, 4),
    ("nm", 16, (4096, 11008), 1, 4),
    ("nm", 16, (4096, 1024), 4, 8),
    ("nm", 33, (2048, 1024), 1, 2),
    ("nm", 16, (4096, 1024), 2, 16),
]


SHARDED = [("sharded", 256, (1024, 1024), (128, 128), 12, "bfloat16")]


def compiles(topology, cases, strict=False):
    """Whether the TPU compiler takes every case and the kernels are in its result."""
    pytest.importorskip("libtpu", reason="needs libtpu, which has wheels for x86-64 Linux only")
    environment = dict(
        os.environ,
        JAX_PLATFORMS="cpu",
        XLA_FLAGS="",
        TPU_SKIP_MDS_QUERY="1",
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",
        **(STRICT if strict else {}),
    )
    child = [sys.executable, "-c", CHILD, json.dumps([topology, cases])]
    done = subprocess.run(child, env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["True"] * len(cases), done.stderr[-3000:]


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_forward_and_both_gradients_compile(topology):
    compiles(topology, QUICK, strict=topology == "v5e:2x2")


@pytest.mark.slow
def test_weights_sharded_by_block_columns_compile():
    compiles("v5e:2x2", SHARDED)


@pytest.mark.slow
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_every_variant_compiles(topology):
    compiles(topology, FULL)
