"""On a TPU mesh with sharded weights, selection moves counters only: read off the compiled program.

The TPU compiler runs without a TPU. Without libtpu these tests are skipped.
"""

import math
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxsparse import selection, structures

pytestmark = pytest.mark.slow

LARGEST = 64 * 1024  # bytes; the leaves below have 16 MB and more
COLLECTIVES = "all-gather|all-reduce|all-to-all|collective-permute|collective-broadcast|reduce-scatter|ragged-all-to-all"
BYTES = {"f32": 4, "s32": 4, "u32": 4, "bf16": 2, "pred": 1, "s8": 1, "u8": 1}


@pytest.fixture(scope="module")
def mesh():
    pytest.importorskip("libtpu", reason="libtpu, the TPU compiler, is not installed")
    from jax.experimental import topologies

    os.environ.update(TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:4x4").devices
    return Mesh(np.array(devices).reshape(4, 4), ("a", "b"))


def compiled(mesh, function, *arguments):
    """The program for arguments given as (shape, spec) or (shape, spec, dtype)."""
    shapes = [
        jax.ShapeDtypeStruct(
            shape, *(dtype or [jnp.float32]), sharding=NamedSharding(mesh, PartitionSpec(*spec))
        )
        for shape, spec, *dtype in arguments
    ]
    return jax.jit(function).lower(*shapes).compile()


def collectives(text: str) -> list[int]:
    """The bytes of the result of each collective operation of a program."""
    found = []
    for shapes, start in re.findall(rf"= (.*?) (?:{COLLECTIVES})(-start)?\(", text):
        sizes = [
            BYTES[dtype] * math.prod(int(n) for n in dims.split(",") if n)
            for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", shapes)
            if dtype in BYTES
        ]
        # What starts a permutation or a gather returns its operand, too, and tokens.
        found.append(max(sizes) if start else sum(sizes))
    return found


K = ((), (), jnp.int32)
BOTH, ROWS = ((2048, 2048), ("a", "b")), ((4096, 1024), (("a", "b"), None))
CONV = ((3, 3, 512, 1024), (None, None, None, ("a", "b")), jnp.bfloat16)
WIDE = ((2**16, 2**16), ("a", "b"))  # 2^32 entries: counts and positions of two words

CASES = {
    "topk over both axes": (selection.topk_mask, BOTH, K),
    "topk over rows": (selection.topk_mask, ROWS, K),
    "topk of a convolution": (selection.topk_mask, CONV, K),
    "topk of 2^32 weights": (selection.topk_mask, WIDE, K),
    "topk with hashed ties": (
        lambda x, k: selection.topk_mask(x, k, ties="hash", seed=k), BOTH, K,
    ),
    "topk per output": (lambda x, k: selection.topk_mask(x, k, axis=0), BOTH, K),
    "topk within a mask": (
        lambda x, m, k: selection.topk_mask(x, k, where=m), BOTH, (*BOTH, jnp.bool_), K,
    ),
    "global topk": (
        lambda x, y, z, k: selection.topk_masks([x, y, z], k, together=True),
        BOTH, CONV, ROWS, K,
    ),
    "several topk": (
        lambda x, y, z, k: selection.topk_masks(
            [x, y, z], [k, k, 2 * k], ties="hash", seed=k, axis=[None, None, 0]
        ),
        BOTH, ROWS, BOTH, K,
    ),
    "2:4 along rows": (lambda x: structures.topk(structures.NM(2, 4), x, 2), BOTH),
    "2:4 along columns": (lambda x: structures.topk(structures.NM(2, 4, axis=-1), x, 2), BOTH),
    "random": (
        lambda x, k: selection.topk_mask(0 * x, k, ties="hash", seed=k), BOTH, K,
    ),
    "quantile": (lambda x, q: x > selection.quantile([x], q), BOTH, ((), ())),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_no_collective_is_as_large_as_a_leaf(mesh, case):
    function, *arguments = CASES[case]
    program = compiled(mesh, function, *arguments)
    assert max(collectives(program.as_text()), default=0) <= LARGEST
    masks = [s for s in jax.tree.leaves(program.output_shardings) if s.spec != PartitionSpec()]
    assert masks, "the mask is sharded as the weights are"


def test_masks_of_many_leaves_share_the_exchanges_of_a_pass(mesh):
    leaves = [((2048, 1024), (("a", "b"), None))] * 4
    one, four = (
        len(collectives(compiled(mesh, function, *leaves, K).as_text()))
        for function in (
            lambda x, *rest: selection.topk_masks([x], [rest[-1]]),
            lambda *xs: selection.topk_masks(xs[:-1], [xs[-1]] * 4),
        )
    )
    assert four <= one, "counters of all leaves are summed together"


def test_the_check_sees_a_gathered_leaf(mesh):
    everywhere = NamedSharding(mesh, PartitionSpec())
    gather = lambda x: jax.lax.with_sharding_constraint(x * 2, everywhere)
    assert max(collectives(compiled(mesh, gather, BOTH).as_text())) >= 4 * 2048 * 2048
