"""`--config.storage=stored`: the training job on layers that store blocks."""

import json
import shutil

import jax
import numpy as np
import pytest

from experiments import datasets, fields, parallel, storage, train
from experiments.configs import base
from experiments.task import make_task
from jaxsparse.nn import stored_blocks
from jaxsparse.nn.stored import stored_states

TARGETS = "layers/.*kernel"


def make_config(data_dir, **changes):
    c = base.get_config()
    c.data_dir, c.dataset, c.model, c.method = data_dir, "digits", "mlp", "rigl"
    c.model_options.hidden = (32, 32)
    c.storage, c.structure, c.options.targets = "stored", "block:4x4", "layers/[01]/kernel"
    c.sparsity, c.options.update_every, c.options.drop_fraction = 0.75, 4, 0.5
    c.batch_size, c.steps, c.warmup_steps, c.learning_rate = 64, 16, 2, 3e-3
    c.log_every = c.eval_every = c.checkpoint_every = 8
    c.update(changes)
    return c


@pytest.mark.slow
@pytest.mark.parametrize("sketch", [None, 2])
def test_a_stored_run_resumes_to_the_bit_and_reports_the_matrices(sketch, data_dir, tmp_path):
    whole = train.train(make_config(data_dir, sketch=sketch), tmp_path / "whole")
    config = make_config(data_dir, keep_checkpoints=5, sketch=sketch)
    train.train(config, tmp_path / "again")
    (tmp_path / "again" / "checkpoints").rename(tmp_path / "kept")
    shutil.rmtree(tmp_path / "kept" / "16", ignore_errors=True)
    (tmp_path / "kept").rename(tmp_path / "again" / "checkpoints")
    again = train.train(config, tmp_path / "again")
    assert whole == again
    result = json.loads((tmp_path / "whole" / "result.json").read_text())
    row = result["summary"]["leaves"]["layers/0/kernel"]
    assert row["shape"] == [64, 32] and abs(row["mask_sparsity"] - 0.75) < 0.1
    assert result["flops"]["layers/0/kernel"] == 2 * 64 * 32
    last = json.loads((tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()[-2])
    assert set(last["density"]) == {"layers/0/kernel", "layers/1/kernel"}


@pytest.mark.parametrize("method", ["rigl", "magnitude"])
def test_each_layer_stores_as_many_blocks_as_the_masked_method_keeps(method, data_dir):
    config = make_config(data_dir, method=method)
    config.options.drop_fraction = None
    data = datasets.load("digits", data_dir=data_dir)
    stored = jax.jit(make_task(config, data).init)()
    config.storage = "masks"
    masked = jax.jit(make_task(config, data).init)()
    for i in range(2):
        blocks = stored_blocks(stored.params)[f"layers/{i}/kernel"]
        kernel = np.asarray(masked.params["layers"][i]["kernel"])
        assert int(blocks.sum()) * 16 == np.count_nonzero(kernel)
        scale = float(np.std(stored.params["layers"][i]["values"]))
        assert 0.7 < scale / np.std(kernel[kernel != 0]) < 1.4


@pytest.mark.slow
@pytest.mark.parametrize(
    "model, dataset, structure, options",
    [
        ("vit", "digits", "block:16x16", dict(patch=2, dim=32, depth=1)),
        ("transformer", "stdlib_text", "block:16x16", dict(dim=32, depth=1)),
    ],
)
@pytest.mark.parametrize("method", ["rigl", "set", "magnitude", "static"])
@pytest.mark.parametrize("parallel", ["none", "fsdp", "pmap"])
def test_models_train_stored_on_one_device_and_on_several(
    model, dataset, structure, options, method, parallel, data_dir, tmp_path
):
    config = make_config(
        data_dir,
        model=model,
        dataset=dataset,
        structure=structure,
        method=method,
        parallel=parallel,
    )
    config.model_options, config.options.targets, config.length = options, TARGETS, 32
    if method == "static":
        config.options.update_every = config.options.drop_fraction = None
    if method == "magnitude":
        config.options.drop_fraction = None
    evaluation = train.train(config, tmp_path)
    assert np.isfinite(evaluation["loss"])


def test_with_a_sketch_blocks_grow_by_momentum(data_dir):
    config = make_config(data_dir, sketch=2, clip_norm=1e-3)
    data = datasets.load("digits", data_dir=data_dir)
    task = make_task(config, data)
    state, step = jax.jit(task.init)(), jax.jit(task.train_step)
    first = stored_blocks(state.params)
    for batch in datasets.batches(data, 64, start=0, stop=6, seed=0):
        state, _ = step(state, batch)
    (inside,) = stored_states(state.opt_state)
    assert [m.shape for m in inside.momentum] == [(16, 2, 8, 2), (8, 2, 8, 2)]
    assert all(m.any() for m in inside.momentum)
    assert any((first[path] != m).any() for path, m in stored_blocks(state.params).items())


def test_layers_that_are_stacked_for_a_scan_store_as_many_each(data_dir):
    config = make_config(data_dir, model="transformer", dataset="stdlib_text", length=32)
    config.structure, config.options.targets = "block:16x16", TARGETS
    config.model_options = dict(dim=32, depth=3, scan_layers=True)
    config.options.allocation = "uniform"
    data = datasets.load("stdlib_text", data_dir=data_dir, length=32)
    task = make_task(config, data)
    state = jax.jit(task.init)()
    up = state.params["layers"]["up"]
    assert up["values"].shape == (3, 4, 16, 16) and up["due"].shape == (3, 2)
    places = np.asarray(up["places"])
    assert len({p.tobytes() for p in places}) > 1  # other draws in each layer
    batch = next(iter(datasets.batches(data, 8, start=0, stop=1, seed=0)))
    step = jax.jit(task.train_step)
    for _ in range(6):
        state, numbers = step(state, batch)
    assert np.isfinite(numbers["loss"])
    moved = np.asarray(state.params["layers"]["up"]["places"])
    assert (places != moved).any()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fsdp", "pmap"])
def test_rigl_on_eight_devices_is_rigl_on_one(name, data_dir):
    """Scores are of the gradient of the whole batch, not of those of the devices. 27 blocks of the first
    matrix, of which eight devices hold a part of the rows each."""
    found = {}
    for parallel_name in ("none", name):
        config = make_config(data_dir, parallel=parallel_name, structure="block:8x8", sparsity=0.15)
        config.options.allocation = "uniform"
        data = datasets.load("digits", data_dir=data_dir)
        strategy = parallel.create(parallel_name, batch_size=64)
        axis = strategy.axis_name if parallel_name == "pmap" else None
        task = make_task(config, data, axis, mesh=strategy.mesh)
        state = strategy.init(task.init)
        step = strategy.compile(task.train_step, donate=True)
        for batch in datasets.batches(data, 64, start=0, stop=9, seed=0):  # two updates
            state, _ = step(state, strategy.put(batch))
        found[parallel_name] = state.params["layers"]
    if name == "fsdp":
        shards = found[name][0]["values"].addressable_shards
        assert shards[0].data.shape == (27, 1, 8)
    for i in range(2):
        one, other = found["none"][i], found[name][i]
        places, values = (x[0] if name == "pmap" else x for x in (other["places"], other["values"]))
        np.testing.assert_array_equal(one["places"], places)
        np.testing.assert_allclose(one["values"], values, atol=1e-5)


@pytest.mark.slow
def test_1x1_convolutions_of_a_residual_network_are_stored(data_dir):
    """The step is traced, not run: it takes minutes to compile."""
    config = make_config(data_dir, model="resnet", structure="block:4x4")
    config.model_options = dict(depth=50, width=8)
    config.options.targets = r"blocks/\d+/(convs/[02]|shortcut)/kernel"
    config.options.drop_fraction, config.options.allocation = None, "uniform"
    data = datasets.load("digits", data_dir=data_dir)
    task = make_task(config, data)
    state = jax.eval_shape(task.init)
    batch = next(iter(datasets.batches(data, 8, start=0, stop=1, seed=0)))
    new, _ = jax.eval_shape(task.train_step, state, batch)
    block = new.params["blocks"][3]  # with a stride, and a shortcut
    assert block["convs"][0]["values"].shape == (8, 4, 4)
    assert block["convs"][1]["kernel"].shape == (3, 3, 16, 16)
    assert block["shortcut"]["values"].shape == (32, 4, 4)
    config.options.targets = "blocks/3/convs/1/kernel"
    with pytest.raises(ValueError, match="is not the kernel of a linear layer, or of a 1 x 1"):
        make_task(config, data)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        dict(structure="fan_in"),
        dict(structure="fan_in", method="set", parallel="pmap"),
        dict(parallel="fsdp"),
        dict(method="set", parallel="pmap"),
        dict(sketch=2, parallel="fsdp", clip_norm=1.0),
        dict(sketch=2, parallel="pmap"),
    ],
)
def test_stacked_layers_and_single_weights_train(changes, data_dir, tmp_path):
    config = make_config(data_dir, model="transformer", dataset="stdlib_text", length=32)
    config.structure, config.options.targets = "block:16x16", TARGETS
    config.model_options = dict(dim=32, depth=2, scan_layers=True)
    config.update(changes)
    assert np.isfinite(train.train(config, tmp_path)["loss"])


def test_what_does_not_go_with_stored_layers_is_named(data_dir):
    cases = [
        (dict(method="st3"), "config.method='st3': cannot be trained as stored"),
        (dict(structure="2:4"), "config.structure='2:4': storage=stored needs blocks"),
        (dict(structure="fan_in", parallel="fsdp"), "config.parallel='fsdp': must be none or pmap"),
        (dict(model="cnn"), "config.model='cnn': storage=stored knows linear layers and"),
        (dict(storage="csr"), "config.storage='csr': choose from masks, stored"),
        (
            dict(sketch=2, method="set"),
            "config.sketch=2: growth by momentum needs method=rigl, not",
        ),
        (dict(sketch=2, storage="masks"), "sketch=2: growth by momentum needs storage=stored, not"),
        (
            dict(sketch=2, structure="fan_in"),
            "sketch=2: growth by momentum needs blocks, .* fan_in",
        ),
    ]
    for changes, message in cases:
        config = make_config(data_dir, **changes)
        config.model_options, config.options.update_every = {}, None
        config.options.drop_fraction = None
        with pytest.raises(ValueError, match=message):
            fields.check(config)
    config = make_config(data_dir)
    config.options.allocation = "global"
    with pytest.raises(ValueError, match="storage=stored needs budgets of layers"):
        fields.check(config)
    config = make_config(data_dir)
    config.options.targets = None
    data = datasets.load("digits", data_dir=data_dir)
    with pytest.raises(ValueError, match="does not tile 'layers/2/kernel'"):
        make_task(config, data)
    assert storage.dense(config).method == "dense"
