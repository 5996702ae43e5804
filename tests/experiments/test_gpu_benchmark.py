"""The benchmark for GPUs, as far as it goes without one."""

import json

import pytest

from experiments.benchmarks import gpu


def test_what_a_chip_needs_at_least_follows_from_the_data_sheet():
    case = next(c for c in gpu.cases() if str(c) == "matmul, blocks of 128, forward, 0.25")
    assert case.flops == 2 * 8192**3 * 0.25
    assert case.bytes == 2 * (2 * 8192**2 + 8192**2 * 0.25)
    assert case.seconds(gpu.CHIPS["h100"]) == pytest.approx(case.flops / 989e12)
    decode = next(c for c in gpu.cases() if c.kernel.startswith("decode"))
    assert decode.seconds(gpu.CHIPS["a100"]) == pytest.approx(decode.bytes / 2.04e12)


def test_figures_become_a_table_and_a_plot_with_the_roofline(tmp_path):
    name = "matmul, blocks of 128, forward, 0.25"
    times = {"ours": 0.5e-3, "dense": 2e-3}
    results = {"machine": "NVIDIA H100 80GB HBM3", "seconds": {name: times}}
    (line,) = (r for r in gpu.tables(results).splitlines() if r.startswith("| matmul"))
    assert line == "| matmul, blocks of 128 | forward | 0.25 | 0.500 | 0.278 | 0.25 (dense) |"
    gpu.plot(results, tmp_path / "gpu.png")
    assert (tmp_path / "gpu.png").stat().st_size > 1000


def test_a_machine_without_a_gpu_is_told_so(tmp_path):
    with pytest.raises(SystemExit, match="this measures a GPU, and JAX runs on cpu"):
        gpu.main(["--out", str(tmp_path)])


@pytest.mark.slow
def test_every_case_runs_in_a_small_size(tmp_path):
    gpu.main(["--tiny", "--out", str(tmp_path)])
    found = json.loads((tmp_path / "gpu.json").read_text())["seconds"]
    assert len(found) == len(gpu.cases(tiny=True))
    assert all(len(times) >= 2 for times in found.values())
