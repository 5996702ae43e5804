"""The schedule tool on listings and kernels whose counts are known by hand."""

import textwrap

import numpy as np
import pytest

from tools import tpu_static
from tools.tpu_static import dumps, hlo
from tools.tpu_static.bundles import parse_bundles
from tools.tpu_static.memory import Dma, smem_words
from tools.tpu_static.program import Program
from tools.tpu_static.simulate import simulate
from tools.tpu_static.unknown import U, select, signed, unsigned

# A loop of five turns: one copy of eight granules in each, and a wait for it before the branch back. Four
# bundles follow a branch before it takes effect.
LISTING = """
= control target key end
0x0   :  { %s1_s1 = smov 0  ;;  %s9_s9 = smov 7 }
0x1   : > { %5 = dma.hbm_to_vmem /*hbm=*/%s8_s8, /*size_in_granules=*/8, %s7_s7, /*dst_syncflagno=*/%s9_s9 }
0x2   : > { %s1_s1 = sadd.s32 1, %s1_s1 }
0x3   : > { %6 = dma.done.wait %s9_s9, 8 }
0x4   : > { %p1_p1 = scmp.ne.s32.totalorder %s1_s1, 5 /* loop exit test */ }
0x5   : > { %7 = sbr.rel (%p1_p1) target bundleno = 1 (0x1), region = 3 }
0x6   : > { %8 = vmatmul.mubr.bf16.gmra.mxu0 %v1_v1 }
0x7   : > {}
0x8   : > {}
0x9   : > {}
0xa   :  { %9 = vdelay 3 }
"""
RATES = {"packed": 16, "plain": 8, "x8": 16}


def run(listing, **options):
    program = Program(parse_bundles(listing), [], [], RATES)
    return simulate(program, bytes_per_cycle=64.0, latency=10.0, **options)


def test_a_listing_is_read_bundle_by_bundle():
    bundles = parse_bundles(LISTING)
    assert [b.addr for b in bundles] == list(range(11))
    assert [[op.opcode for op in b.ops] for b in bundles[:3]] == [
        ["smov", "smov"],
        ["dma.hbm_to_vmem"],
        ["sadd.s32"],
    ]
    assert bundles[5].ops[0].guard == ("", "p1") and "loop exit" in bundles[4].ops[0].note


def test_a_loop_is_run_as_often_as_its_branch_says():
    found = run(LISTING)
    # One bundle before, five turns of nine, and the last with a delay of three.
    assert found["cycles"] == 1 + 5 * 9 + 3
    (loop,) = found["loops"]
    assert loop["iterations"] == 5 == loop["exit_constant"]
    assert loop["paths"][0]["cycles"] == 9
    assert found["mxu_busy"][0] == 5 * RATES["packed"]
    assert found["unknown_branches"] == {} and not found["truncated"]


def test_each_copy_is_counted_and_waited_for():
    found = run(LISTING)
    assert found["dma_count"] == {"hbm_to_vmem": 5}
    assert found["dma_bytes"] == {"hbm_to_vmem": 5 * 8 * 32}
    # 256 bytes at 64 a cycle and a latency of 10, two bundles of which pass before the wait.
    assert found["stall"] == pytest.approx(5 * (4 + 10 - 2))
    assert run(LISTING, granule=512)["dma_bytes"] == {"hbm_to_vmem": 5 * 8 * 512}


def test_a_run_that_is_cut_off_says_so():
    assert run(LISTING, max_blocks=2)["truncated"]


def test_a_branch_that_is_not_known_is_counted():
    listing = LISTING.replace("%s1_s1 = smov 0", "%s1_s1 = spop %v1_v1")
    assert list(run(listing)["unknown_branches"].values()) == [1]


def test_copies_share_the_bandwidth_and_those_beside_it_take_the_latency():
    dma = Dma(bytes_per_cycle=32.0, latency=5.0)
    for flag in (1, 2):
        dma.start(0.0, "hbm_to_vmem", 4, flag)  # 128 bytes each: 4 cycles alone, 8 together
    dma.start(0.0, "vmem_to_smem", 4, 3)
    assert dma.wait(0.0, 3, 4) == 5.0
    assert dma.wait(0.0, 1, 4) == pytest.approx(8 + 5)
    assert dma.wait(20.0, 2, 4) == 0.0
    assert dma.wait(20.0, 9, 4) == 0.0  # nothing was started under this flag


def test_unknown_scalars_spread_and_known_bits_stay():
    assert (U + 1) is U and (U & 0) == 0 and (U | True) is True
    assert select(U, 3, 3) == 3 and select(U, 3, 4) is U and select(False, 3, 4) == 4
    assert signed(0xFFFFFFFF) == -1 and unsigned(-1) == 0xFFFFFFFF


def test_integers_lie_in_scalar_memory_in_tiles_of_eight_rows():
    assert smem_words(np.array([3, -1], np.int32)) == [3, -1]
    rows = np.arange(2 * 128, dtype=np.int32).reshape(2, 128)
    assert smem_words(rows) == list(range(256))
    # Two rows of 16 bits share a word, the lower one in the lower bits.
    halves = np.stack([np.full(128, 1), np.full(128, 2)]).astype(np.int16)
    assert smem_words(halves) == [1 + (2 << 16)] * 128


def test_estimates_in_a_loop_count_as_often_as_it_runs():
    text = textwrap.dedent("""
        %body (p: s32[]) -> s32[] {
          %f = f32[8]{0} fusion(%p), backend_config={"estimated_cycles":"10"}
          %g = f32[16]{0} all-reduce(%f), replica_groups={{0,1}}
        }

        %cond (p: s32[]) -> pred[] {
          %n = s32[] constant(7)
          ROOT %c = pred[] compare(%p, %n), direction=LT
        }

        ENTRY %main (p: s32[]) -> s32[] {
          %w = s32[] while(%p), condition=%cond, body=%body
        }
    """)
    found = hlo.parse_hlo(text)
    assert found["estimated_cycles"] == 70 and found["unknown_trip_loops"] == 0
    (collective,) = found["collectives"]
    assert (collective["bytes"], collective["times"]) == (64, 7)
    told = text.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"9"}}')
    assert hlo.parse_hlo(told)["estimated_cycles"] == 90


def test_what_is_copied_to_vmem_beside_the_kernels_is_counted():
    text = textwrap.dedent("""
        ENTRY %main (v: bf16[8,128]) -> bf16[8,128] {
          %a = (bf16[8,128]{1,0:T(8,128)(2,1)S(1)}, bf16[8,128]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) copy-start(%v)
          %b = (f32[8,128]{1,0:T(8,128)}, f32[8,128]{1,0:T(8,128)S(1)}, u32[]{:S(2)}) copy-start(%w)
          %c = (s32[4]{0:T(128)S(1)}, s32[4]{0:T(128)S(1)}, u32[]{:S(2)}) copy-start(%x)
        }
    """)
    assert hlo.parse_hlo(text)["prefetched_bytes"] == 8 * 128 * 2


def test_dumps_are_read_by_kernel_and_kind(tmp_path):
    for name in ("12-matmul.1-34-final_bundles.txt", "12-matmul.1-40-packed-bundles-post-ra.txt"):
        (tmp_path / name).write_text("")
    assert list(dumps.kernel_files(tmp_path)["matmul.1"]) == [
        "final_bundles",
        "packed-bundles-post-ra",
    ]
    table = tmp_path / "use.txt"
    table.write_text("== CAPACITY\nMXU, VLOAD\n4 3\n== UTILIZATION\n1 0\n0 2\n")
    assert dumps.read_utilization(table) == ([[1, 0], [0, 2]], ["MXU", "VLOAD"], [4, 3])
    assert dumps.read_utilization(None) == ([], [], [])
    assert dumps.matmul_rates(tmp_path, "v5e") == {"packed": 16, "plain": 8, "x8": 16}


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
