"""The tool that compiles for a GPU that is not here, on a kernel whose figures are known by hand."""

import json
import os
import subprocess
import sys

import pytest

from tools import gpu_static

FACTORY = """
import jax, jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

def product(x, y, out):
    add = lambda i, s: s + jnp.dot(x[:, pl.ds(i * 32, 32)], y[pl.ds(i * 32, 32), :])
    out[...] = jax.lax.fori_loop(0, 8, add, jnp.zeros((64, 64), jnp.float32))

def make():
    call = pl.pallas_call(product, grid=(2,), out_shape=jax.ShapeDtypeStruct((128, 64), "float32"),
        in_specs=[pl.BlockSpec((64, 256), lambda i: (i, 0)), pl.BlockSpec((256, 64), lambda i: (0, 0))],
        out_specs=pl.BlockSpec((64, 64), lambda i: (i, 0)), name="product",
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=2))
    return call, (jax.ShapeDtypeStruct((128, 256), "bfloat16"), jax.ShapeDtypeStruct((256, 64), "bfloat16"))
"""


@pytest.mark.skipif(gpu_static.why_not() is not None, reason=str(gpu_static.why_not()))
@pytest.mark.parametrize("target, unit", [("h100", "wgmma"), ("a100", "mma")])
def test_a_product_is_compiled_with_tensor_cores_and_its_figures_are_reported(
    target, unit, tmp_path
):
    (tmp_path / "factory.py").write_text(FACTORY)
    command = [sys.executable, "-m", "tools.gpu_static", f"{tmp_path}/factory.py:make"]
    done = subprocess.run(
        [*command, "--target", target, "--no-spills"],
        env=os.environ | dict(JAX_PLATFORMS="cpu", XLA_FLAGS=""),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout)
    assert report["argument_bytes"] == 2 * (128 * 256 + 256 * 64)
    assert report["output_bytes"] == 4 * 128 * 64 and report["temporary_bytes"] == 0
    (launch,), (kernel,) = report["launches"], report["kernels"]
    assert launch["name"] == kernel["name"] == "product"
    assert launch["grid"] == [2, 1, 1] and launch["threads"] == 4 * 32
    assert launch["shared"] >= 2 * (64 * 32 + 32 * 64)  # both operands of a stage
    assert kernel["instructions"][unit] > 0 and kernel["instructions"]["cp.async"] > 0
    if "registers" in kernel:  # where the assembler is installed
        assert 0 < kernel["registers"] < 256 and kernel["spill_bytes"] == 0


def test_an_unknown_target_is_refused():
    with pytest.raises(ValueError, match="target='v100' is unknown; choose one of"):
        gpu_static.devices("v100")
