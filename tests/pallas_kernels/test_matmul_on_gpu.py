"""The matmul kernels for GPUs: in the interpreter, and compiled for devices that are not here."""

import warnings

import jax.numpy as jnp
import numpy as np
import pytest
from bases import INTERPRETED
from compiled import compiled_for_gpu
from hypothesis import given, settings
from hypothesis import strategies as st
from test_block_sparse_matmul import PATTERNS, check, problem
from writes import count_writes

from pallas_kernels import BlockSparse, _gpu
from pallas_kernels.block_sparse_matmul import gpu

INTERPRET = INTERPRETED["gpu"]


@pytest.fixture
def small_device(monkeypatch):
    """Few processors, so that lists are not split because the device is empty."""
    monkeypatch.setattr(_gpu, "chip", lambda: _gpu.Chip("a100", 80, 1))


@given(
    rows=st.sampled_from([1, 40, 50]),
    grid=st.sampled_from([(1, 1), (3, 5), (2, 4)]),
    block_shape=st.sampled_from([(16, 16), (16, 32), (32, 16), (48, 16), (16, 256)]),
    pattern=st.sampled_from(PATTERNS[2:]),
    dtype=st.sampled_from([jnp.float32, jnp.bfloat16, jnp.float16]),
    spare=st.sampled_from([0, 1]),
    processors=st.sampled_from([1, 108]),
)
@settings(max_examples=12)
@pytest.mark.slow
def test_gpu_kernels_agree_with_dense(rows, grid, block_shape, pattern, dtype, spare, processors):
    shape = grid[0] * block_shape[0] - 5, grid[1] * block_shape[1] - 9
    capacity = grid[0] * grid[1] + spare
    x, w, dy = problem((rows,), shape, block_shape, pattern, dtype, capacity)
    with pytest.MonkeyPatch.context() as patch:
        if INTERPRET:
            patch.setattr(_gpu, "chip", lambda: _gpu.Chip("a100", 80, processors))
        patch.setattr(gpu, "_SPLIT", 1)
        check(x, w, dy, "gpu", processors)


def test_forward_and_gradients_agree_with_dense():
    x, w, dy = problem((40,), (45, 90), (16, 32), "random", jnp.bfloat16, capacity=8)
    check(x, w, dy, "gpu", None)


def uneven(columns=9):
    """One long column, one that is empty, and one block in each of the others; ragged."""
    mask = np.zeros((10, columns), bool)
    mask[:, 6], mask[3, :2], mask[1, 7:] = True, True, True
    dense = jnp.asarray(np.random.default_rng(0).integers(-8, 9, (157, 16 * columns - 3)) / 8, "f")
    return BlockSparse.from_block_mask(dense, mask, (16, 16), pad=True, num_blocks=mask.sum() + 1)


def test_a_column_much_longer_than_the_mean_is_split_and_its_parts_are_added_up(small_device):
    w = uneven()
    p = gpu._plan(jnp.ones((40, 157)), w, False, gpu.PRODUCT["a100"]["tf32, 16"])
    assert p.most < 10 and p.slots  # the column of ten blocks takes several programs
    x = jnp.asarray(np.random.default_rng(1).integers(-8, 9, (40, 157)) / 8, jnp.float32)
    y = gpu.matmul(x, w, interpret=INTERPRET)
    np.testing.assert_allclose(y, np.asarray(x) @ np.asarray(w.to_dense()), atol=1e-5)


def test_columns_that_cannot_be_longer_than_the_limit_need_no_second_kernel(small_device):
    w = BlockSparse.from_dense(jnp.ones((64, 64)), (16, 16))
    assert not gpu._plan(jnp.ones((512, 64)), w, False, gpu.PRODUCT["a100"]["tf32, 16"]).slots


@pytest.mark.skipif(not INTERPRET, reason="counts what the interpreter writes")
@pytest.mark.parametrize("transposed", [False, True])
def test_every_number_of_y_is_written_by_one_program(transposed, small_device, monkeypatch):
    count_writes(monkeypatch)
    w = uneven()
    x = jnp.ones((40, w.shape[1 if transposed else 0]))
    y = gpu.matmul(x, w, transposed=transposed, interpret=True)
    np.testing.assert_array_equal(y, 1)


@pytest.mark.skipif(not INTERPRET, reason="counts what the interpreter writes")
def test_every_number_of_the_weight_gradient_is_written_by_one_program(monkeypatch, small_device):
    count_writes(monkeypatch)
    w = uneven()
    values = gpu.weight_gradient(jnp.ones((40, 157)), jnp.ones((40, w.shape[1])), w, interpret=True)
    np.testing.assert_array_equal(values, 1)


def test_what_sticks_out_of_the_matrix_may_be_anything():
    w = uneven()
    inside = np.asarray(w.with_values(jnp.ones_like(w.values)).to_dense())
    k = np.asarray(w.block_rows)[:, None, None] * 16 + np.arange(16)[:, None]
    j = np.asarray(w.block_cols)[:, None, None] * 16 + np.arange(16)
    out = (k >= w.shape[0]) | (j >= w.shape[1])
    w = w.with_values(jnp.where(out, jnp.nan, 1.0))
    for transposed in (False, True):
        x = jnp.ones((3, w.shape[1 if transposed else 0]))
        y = gpu.matmul(x, w, transposed=transposed, interpret=INTERPRET)
        np.testing.assert_allclose(y, x @ (inside.T if transposed else inside))


def test_a_gpu_that_is_too_old_is_named_once_and_xla_serves(monkeypatch):
    monkeypatch.setattr(_gpu, "target_platform", lambda: "gpu")
    monkeypatch.setattr(_gpu, "chip", lambda: _gpu.Chip("small", 75, 40))
    _gpu._say_once.cache_clear()
    with pytest.warns(UserWarning, match="compute capability 8.0.*not 7.5; plain XLA serves"):
        reason = _gpu.why_not(False)
    assert reason is not None and "7.5" in reason
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _gpu.why_not(False) == reason


MATMUL = """
from pallas_kernels.block_sparse_matmul import gpu

def product(kind, rows, shape, block, blocks, dtype, precision=None):
    def run(x, dy, values, places):
        w = BlockSparse(values, places, tuple(shape), tuple(block))
        if kind == "gradient":
            return gpu.weight_gradient(x, dy, w, precision=precision)
        transposed = kind == "transposed"
        return gpu.matmul(dy if transposed else x, w, transposed=transposed, precision=precision)
    return run, (S((rows, shape[0]), dtype), S((rows, shape[1]), dtype), S((blocks, *block), dtype),
                 S((3, blocks), "int32"))

def gradients(rows, shape, block, blocks, dtype):
    # by the public function, as a user calls it
    def loss(x, values, places):
        w = BlockSparse(values, places, tuple(shape), tuple(block))
        return block_sparse_matmul(x, w).astype("float32").sum()
    args = S((rows, shape[0]), dtype), S((blocks, *block), dtype), S((3, blocks), "int32")
    return jax.value_and_grad(loss, (0, 1)), args
"""
KINDS = ["product", "transposed", "gradient"]
QUICK = [
    ["gradients", 1000, (1000, 700), (64, 64), 30, "bfloat16"],
    ["product", "product", 8192, (8192, 8192), (128, 128), 1024, "bfloat16"],
    ["product", "gradient", 8192, (8192, 8192), (128, 128), 1024, "bfloat16"],
]
FULL = [
    ["product", kind, 4096, (4096, 4096), (side, side), (4096 // side) ** 2 // 4, dtype, precision]
    for kind in KINDS
    for side in (16, 32, 64, 128)
    for dtype, precision in (("float16", None), ("float32", None), ("float32", "highest"))
] + [
    ["product", "product", 7, (1000, 700), (16, 48), 9, "bfloat16"],
    ["product", "transposed", 300, (1000, 700), (384, 128), 5, "bfloat16"],
    ["product", "product", 16, (8192, 8192), (128, 128), 400, "bfloat16"],  # split to fill
]


def sound(target, cases):
    """Compiled without spills, with tensor cores, copies ahead, and room for two programs."""
    processor = dict(h100=233_472, a100=167_936)[target]
    for case, report in zip(cases, compiled_for_gpu(target, MATMUL, cases)):
        kernels = [k for k in report["kernels"] if k["name"].startswith("block_sparse")]
        assert kernels, case
        for kernel in kernels:
            if kernel["name"].endswith("_sum"):
                continue
            launch = next(x for x in report["launches"] if x["name"] == kernel["name"])
            found = kernel["instructions"]
            assert found.get("wgmma") or found.get("mma"), (case, kernel)
            assert found.get("cp.async") and not found.get("local memory"), (case, kernel)
            assert launch["threads"] in (128, 256)
            assert 2 * launch["shared"] <= processor, (case, launch)
            if "registers" in kernel:
                assert kernel["spill_bytes"] == 0
                registers = -(-kernel["registers"] // 8) * 8 * launch["threads"]
                assert 2 * registers <= 65_536, (case, kernel)
        yield report


@pytest.mark.parametrize("target", ["h100", "a100"])
def test_forward_and_both_gradients_compile_for_gpus(target):
    user, product, gradient = sound(target, QUICK)
    names = [kernel["name"] for kernel in user["kernels"]]
    for name in ("matmul", "matmul_t", "weight_gradient"):
        assert f"block_sparse_{name}" in names
    unit = dict(h100="wgmma", a100="mma")[target]
    for report in (product, gradient):
        (kernel,) = (k for k in report["kernels"] if k["name"].startswith("block_sparse"))
        assert kernel["instructions"][unit]
        assert report["temporary_bytes"] < 1 << 20  # lists, and no copy of an operand


@pytest.mark.slow
@pytest.mark.parametrize("target", ["h100", "a100"])
def test_every_variant_compiles_for_gpus(target):
    assert len(list(sound(target, FULL))) == len(FULL)
