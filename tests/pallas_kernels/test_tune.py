"""The tuner: what it tries, what it leaves out, and that kernels read what it found."""

import itertools
import types

import jax
import pytest

from pallas_kernels import _gpu, tune
from pallas_kernels._gpu import Config

TABLE = Config(16, 16, 4, 2)


@pytest.fixture
def pretend(monkeypatch):
    """The problem is small and runs in the interpreter, whose programs have no sizes that fail."""
    seen = []

    def problem(size, length):
        def run(x):
            seen.append(_gpu.config("product", size, {"a100": {size: TABLE}}))
            if seen[-1].stages == 4:
                raise RuntimeError("Shared memory size limit exceeded")
            return x + (seen[-1].warps == 8)

        return run, (jax.numpy.zeros(length),)

    monkeypatch.setitem(tune.KERNELS, "product", ({"a100": {"16 bits, 16": TABLE}}, problem))
    return seen


def test_the_fastest_of_those_that_run_and_give_the_same_numbers_is_chosen(pretend):
    tried = [TABLE, Config(16, 16, 8, 2), Config(16, 16, 4, 4), Config(16, 32, 4, 2)]
    clock = itertools.count(9, -1)
    best, found = tune.tune(
        "product", "16 bits, 16", length=4, sizes=tried, measure=lambda run: float(next(clock))
    )
    assert pretend == tried and best == tried[3]
    assert found[tried[1]] == "other numbers than the table's sizes"
    assert "Shared memory size limit exceeded" in found[tried[2]]
    assert found[TABLE] == 9.0 and found[best] == 8.0


def test_what_was_found_is_read_by_the_kernels_of_that_device(monkeypatch, tmp_path):
    path = tmp_path / "deep" / "tuned.json"
    monkeypatch.setenv("PALLAS_KERNELS_CACHE", str(path))
    tune.save(path, "NVIDIA L4", "product tf32, 16", Config(32, 16, 4, 2))
    tune.save(path, "NVIDIA L4", "gradient tf32, 16", Config(64, 16, 4, 2))
    device = types.SimpleNamespace(device_kind="NVIDIA L4", compute_capability="8.9", core_count=58)
    monkeypatch.setattr(_gpu, "target_platform", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [device])
    table = {"small": {"tf32, 16": TABLE, "exact, 16": TABLE}}
    assert _gpu.chip() == _gpu.Chip("small", 89, 58)
    assert _gpu.config("product", "tf32, 16", table) == Config(32, 16, 4, 2)
    assert _gpu.config("gradient", "tf32, 16", table) == Config(64, 16, 4, 2)
    assert _gpu.config("product", "exact, 16", table) == TABLE  # not tuned


def test_every_class_of_every_table_is_a_problem_that_can_be_traced():
    for kernel, (table, problem) in tune.KERNELS.items():
        assert table["h100"].keys() == table["a100"].keys() == table["small"].keys()
        for size in list(table["a100"])[:1]:
            function, arguments = problem(size, 256)
            jax.eval_shape(lambda *args, f=function: f(*args), *arguments)
        assert all(c.tile >= 16 for sizes in table.values() for c in sizes.values()), kernel


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="kernel='prod' is unknown; choose one of"):
        tune.tune("prod", "tf32, 16")
    with pytest.raises(ValueError, match="size='tf32, 17' is no class of product"):
        tune.tune("product", "tf32, 17")
    with pytest.raises(SystemExit, match="nothing to tune here: it runs on GPU, not on cpu"):
        tune.main([])
