"""Checkpoints are complete or absent; a damaged one is never used."""

import contextlib
import os
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxsparse
from experiments.checkpoints import CheckpointError, Checkpoints
from experiments.logs import Logs, read

# What Orbax leaves behind when a restore fails.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

CONFIG = {"method": "rigl", "options": {"update_every": 5}}


def state(step):
    """Parameters and optimizer state of a sparse network, different for each step."""
    params = {"kernel": jax.random.normal(jax.random.key(step), (64, 48)), "bias": jnp.ones(48)}
    tx = jaxsparse.rigl(optax.adam(1e-3), 0.75, total_steps=10, update_every=2)
    return {"params": params, "opt_state": tx.init(params)}


def shapes():
    place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), state(0))


def assert_equal(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        np.testing.assert_array_equal(x, y)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A directory with the checkpoints of the steps 1 and 2."""
    directory = tmp_path_factory.mktemp("written") / "checkpoints"
    checkpoints = Checkpoints(directory, CONFIG, keep=3)
    for step in (1, 2):
        checkpoints.save(step, state(step), wait=True)
    checkpoints.close()
    return directory


@pytest.fixture
def directory(written, tmp_path):
    return shutil.copytree(written, tmp_path / "checkpoints")


def restore(directory):
    with contextlib.closing(Checkpoints(directory, CONFIG, keep=3)) as checkpoints:
        return checkpoints.restore(shapes())


def test_the_newest_checkpoint_is_restored(directory):
    step, restored = restore(directory)
    assert step == 2
    assert_equal(restored, state(2))


def test_there_is_nothing_to_restore_in_an_empty_directory(tmp_path):
    assert restore(tmp_path / "new") is None


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path):
    path.write_bytes(b"")


def remove(path):
    path.unlink()


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [truncate, empty, remove, flip])
def test_no_file_can_be_damaged_without_notice(written, tmp_path, damage):
    files = [p.relative_to(written) for p in sorted((written / "2").rglob("*")) if p.is_file()]
    assert len(files) > 3
    fell_back = 0
    for i, file in enumerate(files):
        directory = shutil.copytree(written, tmp_path / str(i) / "checkpoints")
        if damage is not remove and (directory / file).stat().st_size == 0:
            continue
        damage(directory / file)
        step, restored = restore(directory)
        assert_equal(
            restored, state(step)
        )  # the state that was saved at that step, or the one before
        if step == 1:
            fell_back += 1
            assert not (directory / "2").exists(), (
                "moved aside, so that the step can be saved again"
            )
            assert [p.name for p in (directory.parent / "unreadable").iterdir()] == ["2-0"]
    assert fell_back > 0


def test_an_emptied_checkpoint_is_passed_over(directory):
    shutil.rmtree(directory / "2")
    (directory / "2").mkdir()
    step, restored = restore(directory)
    assert step == 1
    assert_equal(restored, state(1))


def test_if_none_can_be_read_the_run_stops_and_nothing_is_changed(directory):
    for step in ("1", "2"):
        for path in (directory / step / "state").rglob("*"):
            if path.is_file():
                empty(path)
    with pytest.raises(CheckpointError, match=r"none of the checkpoints .* can be read \(step 2: "):
        restore(directory)
    assert {"1", "2"} <= set(os.listdir(directory))


def test_an_unfinished_checkpoint_is_not_one(directory):
    shutil.copytree(directory / "2", directory / "3.orbax-checkpoint-tmp-0")
    step, _ = restore(directory)
    assert step == 2


def test_a_state_that_is_not_finite_is_not_saved(tmp_path):
    with contextlib.closing(Checkpoints(tmp_path / "c", CONFIG, keep=3)) as checkpoints:
        bad = state(1)
        bad["params"]["bias"] = bad["params"]["bias"].at[3].set(jnp.nan)
        with pytest.raises(FloatingPointError, match="not finite in params/bias"):
            checkpoints.save(1, bad)
        assert checkpoints.latest() is None


def test_a_step_that_was_moved_aside_can_be_saved_again(directory):
    truncate(max((directory / "2").rglob("*"), key=lambda p: p.is_file() and p.stat().st_size))
    with contextlib.closing(Checkpoints(directory, CONFIG, keep=3)) as checkpoints:
        assert checkpoints.restore(shapes())[0] == 1
        checkpoints.save(2, state(2), wait=True)
    assert restore(directory)[0] == 2


@contextlib.contextmanager
def room_for(size: int):
    """No file can grow beyond `size` bytes, as on a disk that is full by then."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [0, 4096])
def test_a_full_disk_is_an_error_that_says_so_and_the_last_checkpoint_stays(tmp_path, size):
    directory = tmp_path / "c"
    with contextlib.closing(Checkpoints(directory, CONFIG, keep=3)) as checkpoints:
        checkpoints.save(1, state(1), wait=True)
        second = state(2)
        failed = pytest.raises(CheckpointError, match="could not be written.*is that of step 1")
        with room_for(size), failed:
            checkpoints.save(2, second, wait=True)
    step, restored = restore(directory)
    assert step == 1
    assert_equal(restored, state(1))
    with contextlib.closing(Checkpoints(directory, CONFIG, keep=3)) as checkpoints:
        checkpoints.save(2, second, wait=True)  # there is room again
    assert restore(directory)[0] == 2


def test_a_directory_that_takes_no_file_is_an_error_before_the_first_step(tmp_path):
    refused = pytest.raises(CheckpointError, match="cannot be written: .*--workdir, or make room")
    with room_for(0), refused:
        Checkpoints(tmp_path / "c", CONFIG, keep=3)


@pytest.mark.parametrize("damage", [truncate, flip])
def test_a_damaged_checkpoint_is_named_with_the_reason_and_with_the_one_that_is_used(
    directory, caplog, damage
):
    damage(
        max((directory / "2" / "state").rglob("*"), key=lambda p: p.is_file() and p.stat().st_size)
    )
    restore(directory)
    (line,) = [r.getMessage() for r in caplog.records if "cannot be read" in r.getMessage()]
    moved = directory.parent / "unreadable" / "2-0"
    assert line.startswith("the checkpoint of step 2 cannot be read (")
    assert line.endswith(f"): it was moved to {moved}, and that of step 1 is used")
    assert len(line) < 400 + len(str(moved))


def test_a_file_in_the_place_of_the_directory_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        Checkpoints(tmp_path / "file", CONFIG, keep=3)


# The lines of metrics.jsonl belong to the checkpoint that a run goes on from.


def test_a_resumed_run_forgets_the_lines_after_its_checkpoint(tmp_path):
    logs = Logs(tmp_path, first_step=0, steps=30, active=True)
    for step in (10, 20, 30):
        logs.write(step, {"loss": 1.0, "density": {"a": 0.1}})
    logs.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "lo')  # a kill cut it short
    logs = Logs(tmp_path, first_step=20, steps=30, active=True)
    logs.write(30, {"loss": 2.0})
    logs.close()
    lines = read(tmp_path / "metrics.jsonl")
    assert [(x["step"], x["loss"]) for x in lines] == [(10, 1.0), (20, 1.0), (30, 2.0)]


def test_only_the_first_process_writes(tmp_path):
    logs = Logs(tmp_path, first_step=0, steps=30, active=False)
    logs.write(10, {"loss": 1.0})
    logs.say("nothing")
    logs.close()
    assert os.listdir(tmp_path) == []
