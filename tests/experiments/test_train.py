"""The training job: the same result on any devices, and nothing lost when it is stopped."""

import json
import os
import pathlib
import resource
import shutil
import signal

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding

from experiments import datasets, hosts, parallel, train
from experiments.checkpoints import CheckpointError
from experiments.configs import base
from experiments.datasets import Dataset
from experiments.microbatches import mean_over_microbatches
from experiments.reliability import runs
from experiments.task import make_task
from jaxsparse.targets import path_name

STEPS, EVERY = 24, 6


def make_config(data_dir, **changes):
    """RigL at 80 % on the digits, 24 steps, a checkpoint every 6."""
    c = base.get_config()
    c.data_dir, c.dataset, c.model = data_dir, "digits", "mlp"
    c.model_options.hidden = (32,)
    c.sparsity, c.options.update_every = 0.8, 5
    c.batch_size, c.steps, c.warmup_steps, c.learning_rate = 64, STEPS, 5, 3e-3
    c.log_every = c.eval_every = c.checkpoint_every = EVERY
    c.keep_checkpoints = 2
    c.update(changes)
    return c


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory):
    """The tests run the same few programs: they are compiled once."""
    before = (
        jax.config.jax_compilation_cache_dir,
        jax.config.jax_persistent_cache_min_compile_time_secs,
    )
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("cache")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    yield
    jax.config.update("jax_compilation_cache_dir", before[0])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", before[1])


@pytest.fixture(scope="module")
def whole(tmp_path_factory, data_dir):
    """The work directory of a run that nothing disturbed."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    train.train(make_config(data_dir), workdir)
    return workdir


def disturb(monkeypatch, at, change):
    """Applies `change` to the batch of step `at`, as it is read."""
    batches = datasets.batches

    def disturbed(*args, start=0, **kwargs):
        for step, batch in enumerate(batches(*args, start=start, **kwargs), start=start + 1):
            yield change(batch) if step == at else batch

    monkeypatch.setattr(train.datasets, "batches", disturbed)


def assert_same_run(workdir, whole):
    assert runs.differences(runs.final_arrays(whole), runs.final_arrays(workdir)) == {}
    assert runs.metrics(workdir) == runs.metrics(whole)


# What a run leaves behind.


def test_a_run_writes_metrics_checkpoints_config_and_a_report(whole):
    assert {"config.json", "metrics.jsonl", "report.html", "report.md"} <= set(os.listdir(whole))
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [x["step"] for x in lines if "loss" in x] == [6, 12, 18, 24]
    assert all(x["sparsity"] == pytest.approx(0.8, abs=0.01) for x in lines if "sparsity" in x)
    assert list((whole / "tensorboard").glob("events.out.tfevents.*"))


def test_only_as_many_checkpoints_are_kept_as_asked(whole):
    assert runs.complete_steps(whole) == [18, 24]


def test_a_run_that_is_done_only_evaluates_and_says_where_it_writes(whole, data_dir, capsys):
    before = runs.metrics(whole)
    evaluation = train.train(make_config(data_dir), whole)
    said = capsys.readouterr().out
    assert f"resumed at step {STEPS}" in said and f"writes to {whole}" in said
    assert f"tensorboard --logdir {whole / 'tensorboard'}" in said
    assert evaluation["accuracy"] == json.loads(before[-1])["eval_accuracy"]
    assert runs.metrics(whole) == before


# Stopped and gone on with.


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_ends_with_0_and_the_run_goes_on_bit_for_bit(
    whole, data_dir, tmp_path, monkeypatch, number
):
    def stop(batch):
        os.kill(os.getpid(), number)
        return batch

    workdir = tmp_path / "run"
    with monkeypatch.context() as patch:
        disturb(patch, 15, stop)
        with pytest.raises(SystemExit) as ended:
            train.train(make_config(data_dir), workdir)
    assert ended.value.code == 0
    assert runs.complete_steps(workdir)[-1] == 15
    train.train(make_config(data_dir), workdir)
    assert runs.differences(runs.final_arrays(whole), runs.final_arrays(workdir)) == {}
    # The loss of the steps 13 to 15 is logged when it stops, and is not in the mean of 16 to 18.
    last = lambda lines: [x for x in lines if json.loads(x)["step"] > 18]
    assert last(runs.metrics(workdir)) == last(runs.metrics(whole))


@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_a_damaged_checkpoint_is_passed_over_and_the_run_ends_with_the_same_bits(
    whole, data_dir, tmp_path, damage, caplog
):
    workdir = copy(whole, tmp_path)
    file = max((workdir / "checkpoints" / str(STEPS)).rglob("*"), key=lambda p: p.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0xFF
    file.write_bytes(content if damage == "flipped" else content[: len(content) // 2])
    train.train(make_config(data_dir), workdir)
    assert "the checkpoint of step 24 cannot be read" in caplog.text
    assert "that of step 18 is used" in caplog.text
    assert [path.name for path in (workdir / "unreadable").iterdir()] == ["24-0"]
    assert_same_run(workdir, whole)


def test_a_disk_that_fills_up_stops_the_run_which_goes_on_when_there_is_room(
    whole, data_dir, tmp_path, monkeypatch
):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(batch):  # from here on no file can be larger than 4 kB; an array of the state is
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
        return batch

    workdir = tmp_path / "run"
    stopped = pytest.raises(CheckpointError, match="(?s)could not be written .*of step (6|12)")
    try:
        with monkeypatch.context() as patch, stopped:
            disturb(patch, 15, fill)
            train.train(make_config(data_dir), workdir)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    train.train(make_config(data_dir), workdir)
    assert_same_run(workdir, whole)


def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_the_last_good_checkpoint(
    whole, data_dir, tmp_path, monkeypatch
):
    workdir = tmp_path / "run"
    with monkeypatch.context() as patch:
        disturb(patch, 16, lambda batch: batch | {"x": np.full_like(batch["x"], np.nan)})
        with pytest.raises(
            train.Diverged, match=rf"step 16 of {STEPS} \(loss nan.*is that of step 12"
        ):
            train.train(make_config(data_dir), workdir)
    assert runs.complete_steps(workdir) == [6, 12]
    train.train(make_config(data_dir), workdir)
    assert_same_run(workdir, whole)


def test_a_loss_above_max_loss_stops_the_run(data_dir, tmp_path):
    with pytest.raises(train.Diverged, match=r"step 1 of 24 .*No step was saved"):
        train.train(make_config(data_dir, max_loss=0.01), tmp_path / "run")


# Another number of devices.


@pytest.fixture(scope="module")
def data(data_dir):
    return datasets.load("digits", data_dir=data_dir)


def create(config):
    return parallel.create(
        config.parallel,
        batch_size=config.batch_size,
        microbatches=config.microbatches,
        tensor=config.tensor,
    )


def final_state(config, data, steps=STEPS):
    strategy = create(config)
    task = make_task(config, data, strategy.axis_name, mesh=strategy.mesh)
    state = strategy.init(task.init)
    step = strategy.compile(task.train_step, donate=True)
    for batch in datasets.batches(data, config.batch_size, stop=steps):
        state, numbers = step(state, strategy.put(batch))
    return jax.device_get(strategy.to_save(state)), jax.device_get(numbers)


@pytest.mark.parametrize("name", ["pmap", "fsdp"])
def test_the_same_masks_and_weights_as_one_device(whole, data, data_dir, name):
    alone = runs.final_arrays(whole)
    state, _ = final_state(make_config(data_dir, parallel=name), data)
    leaves = {
        path_name(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(state)
    }
    assert leaves.keys() == alone.keys()
    for path, x in leaves.items():
        if x.dtype == bool:
            np.testing.assert_array_equal(x, alone[path], err_msg=path)
        else:
            np.testing.assert_allclose(x, alone[path], rtol=1e-3, atol=1e-5, err_msg=path)


@pytest.mark.parametrize("name", ["pmap", "fsdp"])
def test_a_run_goes_on_on_another_number_of_devices(whole, data_dir, tmp_path, name):
    workdir = copy(whole, tmp_path)
    shutil.rmtree(workdir / "checkpoints" / str(STEPS))
    evaluation = train.train(make_config(data_dir, parallel=name), workdir)
    expected = json.loads(runs.metrics(whole)[-1])
    assert evaluation["accuracy"] == pytest.approx(expected["eval_accuracy"], abs=0.01)
    masks = lambda arrays: {path: x for path, x in arrays.items() if x.dtype == bool}
    assert (
        runs.differences(masks(runs.final_arrays(whole)), masks(runs.final_arrays(workdir))) == {}
    )


@pytest.mark.parametrize(
    ("shape", "shard"),
    [
        ((16, 24), (16, 3)),  # the longer axis
        ((12, 24), (12, 3)),  # the one that divides
        ((3, 3, 4, 6), (3, 3, 1, 6)),  # as many devices as can
        ((3, 3, 12, 20), (3, 3, 12, 5)),
        ((8, 5, 3), (8, 5, 3)),  # only the last two
        ((4,), (1,)),
        ((7,), (7,)),
        ((), ()),
    ],
)
def test_a_leaf_is_split_along_that_of_its_last_two_axes_that_most_devices_divide(shape, shard):
    strategy = parallel.Fsdp(batch_size=64)
    spec = strategy.spec("conv/kernel", shape)
    assert NamedSharding(strategy.parts, spec).shard_shape(shape) == shard


@pytest.mark.parametrize(
    ("shape", "shard"),
    [
        ((16, 4, 4), (2, 4, 4)),  # eight devices share the blocks
        ((6, 16, 16), (3, 4, 16)),  # two the blocks, four the rows
        ((3, 5, 16, 16), (3, 5, 2, 16)),  # stacked layers, an odd number of blocks
        ((5, 3, 3), (5, 3, 3)),
    ],
)
def test_stored_blocks_are_split_and_where_devices_do_not_divide_them_their_rows(shape, shard):
    strategy = parallel.Fsdp(batch_size=64)
    spec = strategy.spec("layers/up/values", shape)
    assert NamedSharding(strategy.parts, spec).shard_shape(shape) == shard


def test_with_a_tensor_axis_a_leaf_is_split_over_both():
    strategy = parallel.Fsdp(batch_size=64, tensor=2)
    shard = lambda name, shape: NamedSharding(
        strategy.parts, strategy.spec(f"layers/{name}/kernel", shape)
    ).shard_shape(shape)
    assert shard("up", (3, 16, 32)) == (3, 4, 16)
    assert shard("down", (3, 32, 16)) == (3, 16, 4)
    assert shard("down", (3, 32, 6)) == (3, 16, 3)


DIGITS = Dataset("digits", {}, lambda record, rng: dict(record), (8, 8, 1), 10)


def make_resnet(data_dir, **changes):
    """The smallest residual network; its batch normalisation is what is looked at."""
    changes |= {"model": "resnet", "model_options": {"depth": 8, "width": 4}}
    c = make_config(data_dir)
    c.model_options = {}
    c.update(changes)
    return c


def test_statistics_and_all_that_belongs_to_a_parameter_are_split(data_dir):
    config = make_resnet(data_dir, parallel="fsdp")
    strategy = create(config)
    state = jax.eval_shape(make_task(config, DIGITS, mesh=strategy.mesh).init)
    shards = jax.tree.map(lambda x, s: s.shard_shape(x.shape), state, strategy.shardings(state))
    shards = {
        path_name(path): tuple(shard)
        for path, shard in jax.tree_util.tree_leaves_with_path(
            shards, is_leaf=lambda x: isinstance(x, tuple) and all(isinstance(n, int) for n in x)
        )
    }
    kernels = [s for path, s in shards.items() if path.endswith("blocks/1/convs/1/kernel")]
    assert len(kernels) == 4, "the parameter, its mask and two moments"
    assert set(kernels) == {(3, 3, 1, 8)}
    assert {s for path, s in shards.items() if path.endswith("blocks/1/norms/1/mean")} == {(1,)}


def test_microbatches_are_added_in_one_order_on_any_number_of_devices():
    values = np.random.default_rng(0).normal(size=(16, 33)).astype(np.float32)
    # Times 2: a product that is exact is the same whether or not it is fused with a sum.
    piece_sums = lambda scale, x: {"sum": scale * x.sum(0), "max": x.max(0)}
    pieces = [piece_sums(np.float32(2), piece) for piece in values.reshape(8, 2, 33)]
    while len(pieces) > 1:  # the tree, in NumPy
        pieces = [{key: a[key] + b[key] for key in a} for a, b in zip(pieces[::2], pieces[1::2])]
    expected = {key: x / np.float32(8) for key, x in pieces[0].items()}
    for devices in (1, 2, 4, 8):
        mean = mean_over_microbatches(piece_sums, 8, "i")
        split = values.reshape(devices, -1, 33)
        out = jax.pmap(mean, "i", in_axes=(None, 0), devices=jax.devices()[:devices])(2.0, split)
        for key, x in jax.device_get(out).items():
            np.testing.assert_array_equal(x, np.stack([expected[key]] * devices), err_msg=key)
    alone = jax.jit(mean_over_microbatches(piece_sums, 8))(2.0, values)
    for key, x in jax.device_get(alone).items():
        np.testing.assert_array_equal(x, expected[key])


def test_microbatches_change_the_gradient_by_rounding_only(data, data_dir):
    plain, numbers = final_state(make_config(data_dir), data, steps=2)
    cut, cut_numbers = final_state(make_config(data_dir, microbatches=8), data, steps=2)
    for a, b in zip(jax.tree.leaves(plain.params), jax.tree.leaves(cut.params)):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    assert numbers["loss"] == pytest.approx(cut_numbers["loss"], rel=1e-5)


@pytest.mark.parametrize("method", ["rigl", "magnitude", "sr_ste"])
def test_the_job_takes_the_text_of_a_structure(data, data_dir, method):
    config = make_config(data_dir, method=method, structure="2:4")
    config.options.targets = "layers/0/kernel"
    if method == "sr_ste":
        config.options.update_every = None  # it has none
    state, _ = final_state(config, data)
    kernel = np.asarray(state.params["layers"][0]["kernel"])
    per_group = (kernel.reshape(16, 4, 32) != 0).sum(axis=1)
    assert (per_group == 2).all()


# Refusals.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "riggl"}, "config.method='riggl': did you mean 'rigl'"),
        ({"model": "mpl"}, "config.model='mpl': did you mean 'mlp'"),
        ({"dataset": "digit"}, "dataset='digit' is not known; close matches: .*digits"),
        ({"optimizer": "adamx"}, "optimizer='adamx': .*choose from adamw"),
        ({"decay": "step"}, "decay='step': choose from cosine, linear"),
        ({"parallel": "tpu"}, "parallel='tpu': choose from none, pmap, fsdp"),
        ({"parallel": "pmap", "batch_size": 20}, "batch_size=20 does not divide over 8 devices"),
        ({"parallel": "fsdp", "tensor": 3}, "tensor=3 does not divide 8 devices"),
        ({"microbatches": 6}, "microbatches=6: must be a power of two that divides batch_size=64"),
        ({"parallel": "pmap", "microbatches": 4}, "microbatches=4 does not divide over 8 devices"),
        ({"parallel": "fsdp", "tensor": 2, "microbatches": 8}, "microbatches=8: not with tensor=2"),
        ({"structure": "2x4"}, "config.structure='2x4': .*write 2:4 .*block:16x16"),
        ({"batch_size": 5000}, "batch_size=5000: must be between 1 and the 1497 examples"),
    ],
)
def test_a_config_that_cannot_be_run_is_refused(data_dir, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        train.train(make_config(data_dir, **changes), tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "set"}, "method: 'rigl' in the checkpoint, 'set' now"),
        (
            {"model_options": {"hidden": (16,)}},
            r"model_options.hidden: \[32\] in the checkpoint, \[16\]",
        ),
        (
            {"learning_rate": 0.1, "seed": 1},
            "learning_rate: 0.003 in the checkpoint, 0.1 now; seed: 0",
        ),
    ],
)
def test_the_checkpoint_of_another_run_is_refused_with_the_difference_named(
    whole, data_dir, changes, message
):
    before = runs.complete_steps(whole)
    with pytest.raises(ValueError, match=message):
        train.train(make_config(data_dir, **changes), whole)
    assert runs.complete_steps(whole) == before


def test_a_misspelt_field_of_the_config_is_a_message():
    message = "error: --config has no field 'sparsty' Did you mean .sparsity."
    with pytest.raises(SystemExit, match=message), train.unknown_field_is_a_message():
        _ = base.get_config().sparsty


def test_a_bucket_as_work_directory_is_refused(data_dir):
    with pytest.raises(ValueError, match="workdir='gs://bucket/run': must be a directory"):
        train.train(make_config(data_dir), "gs://bucket/run")


# Several processes (started as such in the slow tests).


@pytest.fixture
def joined(monkeypatch):
    """The arguments with which `jax.distributed.initialize` was called."""
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **given: calls.append(given))
    return calls


def test_one_process_joins_nobody(joined, monkeypatch):
    # What libtpu writes there where there is no TPU.
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "WARNING: could not determine names, please set it")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    hosts.initialize()
    assert joined == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("SLURM_STEP_NUM_TASKS", "4"),
        ("OMPI_COMM_WORLD_SIZE", "2"),
        ("TPU_WORKER_HOSTNAMES", "host-0,host-1"),
        ("JAX_COORDINATOR_ADDRESS", "host-0:1234"),
    ],
)
def test_several_processes_of_a_job_manager_are_joined(joined, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    hosts.initialize()
    hosts.initialize(distributed=False)
    assert len(joined) == 1


def test_processes_are_joined_by_their_flags(joined):
    hosts.initialize("localhost:1234", 2, 1)
    given = {"coordinator_address": "localhost:1234", "num_processes": 2, "process_id": 1}
    assert joined == [given]
    with pytest.raises(ValueError, match="distributed=False: contradicts num_processes=2"):
        hosts.initialize(num_processes=2, distributed=False)


def test_an_address_that_is_not_complete_is_an_error_that_names_the_flags(monkeypatch):
    def incomplete(**given):
        raise ValueError("Number of processes must be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", incomplete)
    with pytest.raises(ValueError, match="coordinator_address='a:1'.*--process_id=i"):
        hosts.initialize("a:1")


def copy(workdir: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    return shutil.copytree(workdir, tmp_path / "run")
