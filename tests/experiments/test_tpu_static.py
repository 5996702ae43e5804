"""The schedule tool on kernels whose counts are known by hand."""

import textwrap

import pytest

from experiments.benchmarks import tpu_static

CASES = '''
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

def matmul(m=512, k=512, n=512, tile=256, skip=False):
    """A tiled product; with `skip`, a concrete list says which row tiles are computed."""
    def kernel(wanted, x, w, y):
        @pl.when(wanted[pl.program_id(0)] == 1)
        def _():
            y[...] = jnp.dot(x[...], w[...], preferred_element_type=jnp.float32).astype(y.dtype)
    call = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(m // tile,),
            in_specs=[pl.BlockSpec((tile, k), lambda i, _: (i, 0)),
                      pl.BlockSpec((k, n), lambda i, _: (0, 0))],
            out_specs=pl.BlockSpec((tile, n), lambda i, _: (i, 0)),
        ),
        out_shape=jax.ShapeDtypeStruct((m, n), jnp.bfloat16),
        name="tiled",
    )
    wanted = np.array([not (skip and i % 2) for i in range(m // tile)], np.int32)
    s = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    return call, (wanted, s(m, k), s(k, n)), dict(useful_flops=2 * m * k * n)

def broken():
    raise ValueError("no such case")
'''


@pytest.fixture(scope="module")
def analyze(tmp_path_factory):
    pytest.importorskip("libtpu", reason="needs libtpu, which has wheels for x86-64 Linux only")
    file = tmp_path_factory.mktemp("cases") / "cases.py"
    file.write_text(textwrap.dedent(CASES))
    return lambda name, **kw: tpu_static.analyze(f"{file}:{name}", **kw)


@pytest.mark.slow
def test_matrix_unit_cycles_and_bytes_are_those_counted_by_hand(analyze):
    report = analyze("matmul", topology="v5e:2x2")
    assert report["ok"], report.get("error")
    (kernel,) = report["kernels"]
    # v5e: a 128^3 product holds one of four matrix units for 128 cycles, 32 of all four.
    assert kernel["mxu_busy_cycles"] == 32 * (512 // 128) ** 3
    # x and w in, y out, once each, in bfloat16; and the list of tiles, 512 bytes at least.
    assert kernel["hbm_bytes"] == 3 * 512 * 512 * 2 + 512
    assert kernel["cycles_dma"] >= kernel["cycles"] >= kernel["mxu_busy_cycles"]
    assert report["useful"]["ideal_cycles"] == kernel["mxu_busy_cycles"]


@pytest.mark.slow
def test_a_concrete_list_is_followed(analyze):
    kwargs = dict(m=1024, skip=True)
    (kernel,) = analyze("matmul", topology="v5e:2x2", kwargs=kwargs)["kernels"]
    assert kernel["mxu_busy_cycles"] == 32 * (1024 // 128) * (512 // 128) ** 2 // 2


@pytest.mark.slow
def test_a_wider_matrix_unit_takes_a_quarter(analyze):
    (kernel,) = analyze("matmul", topology="v6e:2x2")["kernels"]
    assert kernel["mxu_busy_cycles"] == 8 * (512 // 128) ** 3


def test_a_failure_is_reported_not_raised(analyze):
    report = analyze("broken")
    assert not report["ok"] and "no such case" in report["error"]
