"""The N:M decoding kernel for GPUs: in the interpreter, and compiled for devices that are not here."""

import jax.numpy as jnp
import numpy as np
import pytest
from bases import INTERPRETED
from compiled import compiled_for_gpu
from writes import count_writes

from pallas_kernels import NMSparse, nm_matmul
from pallas_kernels.nm_matmul import gpu

INTERPRET = INTERPRETED["gpu"]


def problem(rows=3, shape=(4 * 37, 70), n=2, m=4):
    rng = np.random.default_rng(0)
    x, w = (
        jnp.asarray(rng.integers(-8, 9, s) / 8, jnp.bfloat16) for s in ((rows, shape[0]), shape)
    )
    return x, NMSparse.from_dense(w, n, m)


@pytest.mark.parametrize("n, m", [(2, 4), pytest.param(1, 16, marks=pytest.mark.slow)])
def test_groups_and_outputs_that_fill_no_tile(n, m):
    x, w = problem(shape=(m * 37, 70), n=n, m=m)
    y = nm_matmul(x, w, implementation="gpu", interpret=INTERPRET, out_dtype=jnp.float32)
    np.testing.assert_allclose(y, np.asarray(x, "f") @ np.asarray(w.to_dense(), "f"), atol=1e-4)


@pytest.mark.skipif(not INTERPRET, reason="counts what the interpreter writes")
def test_every_number_is_written_by_one_program_of_each_part(monkeypatch):
    count_writes(monkeypatch)
    x, w = problem()
    y = gpu.matmul(x, w, interpret=True, out_dtype=jnp.float32)
    np.testing.assert_array_equal(y, 16)  # sixteen parts, each with a sum of its own


@pytest.mark.parametrize(
    "x, message",
    [
        (jnp.ones((2, 148)), "it takes bfloat16 and float16, not float32"),
        (jnp.ones((65, 148), jnp.bfloat16), "up to 64 rows of x, not 65"),
    ],
)
def test_what_the_kernel_does_not_take_is_named(x, message):
    w = NMSparse.from_dense(jnp.ones((148, 8), x.dtype), 2, 4)
    with pytest.raises(ValueError, match=message):
        nm_matmul(x, w, implementation="gpu", interpret=True)


DECODE = """
def decode(rows, shape, n, m, bits, dtype):
    groups = shape[0] // m
    def run(x, values, codes):
        return nm_matmul(x, NMSparse(values, codes, tuple(shape), n, m, 1))
    return run, (S((rows, shape[0]), dtype), S((n, groups, shape[1]), dtype),
                 S((n, -(-groups * bits // 32), shape[1]), "int32"))
"""
QUICK = [["decode", 1, (4096, 4096), 2, 4, 2, "bfloat16"]]
FULL = [
    ["decode", 64, (4096, 4096), 2, 4, 2, "float16"],
    ["decode", 16, (4096, 11008), 1, 4, 2, "bfloat16"],
    ["decode", 16, (4096, 1000), 4, 8, 4, "bfloat16"],
    ["decode", 16, (4096, 1024), 2, 16, 4, "bfloat16"],
    ["decode", 33, (2000, 1024), 1, 2, 1, "bfloat16"],
]


@pytest.mark.parametrize(
    "target, cases",
    [
        ("h100", QUICK),
        ("a100", QUICK),
        pytest.param("h100", FULL, marks=pytest.mark.slow),
        pytest.param("a100", FULL, marks=pytest.mark.slow),
    ],
)
def test_it_compiles_with_tensor_cores_and_without_spills(target, cases):
    for case, report in zip(cases, compiled_for_gpu(target, DECODE, cases), strict=True):
        (kernel,) = (k for k in report["kernels"] if k["name"] == "nm_matmul")
        found = kernel["instructions"]
        assert found.get("mma") or found.get("wgmma"), case
        assert found["cp.async"] and "local memory" not in found, case
        if "registers" in kernel:
            assert kernel["spill_bytes"] == 0, case
