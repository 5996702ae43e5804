"""Every field of a config is checked before a run does anything."""

import importlib
import pathlib
from typing import Any

import pytest

from experiments import configs, fields, train, train_sae
from experiments.configs import base

NAN, INF = float("nan"), float("inf")

# Values that each field must refuse: of another type, beyond each end of its range, or not known.
BAD: dict[str, list[Any]] = {
    "method": ["riggl", "", None, 3],
    "sparsity": [-0.1, 1.0, NAN, "0.9", None],
    "storage": ["csr", "", None],
    "sketch": [0, -1, 1.5, "2", 2],
    "structure": ["2x4", "5:4", "", 24],
    "options.update_every": [0, -1, 1.5, "5", True],
    "options.begin_step": [-1, 0.5, 4000],
    "options.end_step": [-1, 0.5, 4000],
    "options.initial_sparsity": [-0.1, 1.0, NAN, "0"],
    "options.drop_fraction": [-0.1, 1.1, NAN, "cosine"],
    "options.allocation": ["erkk", "", 1],
    "options.targets": ["(", 3],
    "options.seed": [-1, 2**32, 0.5],
    "options.pack_masks": ["yes", 1],
    "dataset": ["", None, 3],
    "data_dir": ["", 3],
    "image_size": [0, -1, 1.5],
    "length": [0, 257, 1.5, None],
    "reader_threads": [-1, 1.5, None],
    "reader_processes": [-1, 1.5, None],
    "model": ["mpl", "", None],
    "seed": [-1, 2**32, 0.5, None],
    "batch_size": [0, -1, 1.5, None],
    "steps": [0, -1, 1.5, None],
    "optimizer": ["adam", "", None],
    "learning_rate": [0.0, -1e-3, NAN, INF, "1e-3", None],
    "decay": ["step", "", None],
    "warmup_steps": [-1, 1.5, 4000, None],
    "cycles": [0, -1, 1.5, 4001, None],
    "weight_decay": [-0.1, NAN, INF, None],
    "momentum": [-0.1, 1.0, NAN, None],
    "label_smoothing": [-0.1, 1.0, NAN, None],
    "clip_norm": [-1.0, 0.0, NAN, INF, "1"],
    "parallel": ["tpu", "", None],
    "tensor": [0, -1, 1.5, 2, None],
    "microbatches": [-1, 6, 256, 1.5, None],
    "log_every": [0, -1, 1.5, None],
    "eval_every": [0, -1, 1.5, None],
    "checkpoint_every": [0, -1, 1.5, None],
    "keep_checkpoints": [0, -1, 1.5, None],
    "max_loss": [0.0, -1.0, NAN, None],
}


def changed(**values) -> Any:
    """The default config with these fields, whatever their type; dots stand as two underscores."""
    config = base.get_config()
    with config.unlocked(), config.ignore_type(), config.options.ignore_type():
        config.update_from_flattened_dict(
            {name.replace("__", "."): value for name, value in values.items()}
        )
    return config


def test_the_table_has_every_field_of_the_config():
    assert set(fields.flatten(base.get_config().to_dict())) == set(BAD) == set(fields.FIELDS)


@pytest.mark.parametrize(
    "name, value", [pytest.param(n, v, id=f"{n}={v}") for n, vs in BAD.items() for v in vs]
)
def test_a_bad_value_is_refused_with_the_name_of_its_field(name, value):
    config = changed(**{name.replace(".", "__"): value})
    with pytest.raises(ValueError) as refused:
        fields.check(config)
    assert f"config.{name}={value!r}: " in str(refused.value)


def test_all_bad_fields_are_named_at_once():
    with pytest.raises(ValueError, match=r"config.clip_norm=-1.0: .*; config.log_every=0: "):
        fields.check(changed(clip_norm=-1.0, log_every=0))


@pytest.mark.parametrize(
    "values, message",
    [
        ({"clip_norm": -1.0}, "must be a finite number above 0, or None"),
        ({"keep_checkpoints": 0}, "must be a whole number of at least 1"),
        ({"length": 300}, "must be a whole number from 1 to 256"),
        ({"sparsity": 1.0}, "must be a finite number at least 0 and below 1"),
        ({"warmup_steps": 100, "steps": 60}, "must be below steps=60, .*; 6 would do"),
        ({"warmup_steps": 100, "steps": 180, "cycles": 2}, "below steps=180 over cycles=2"),
        (
            {"options__begin_step": 9, "options__end_step": 5},
            "begin_step=9: must not be above .*=5",
        ),
        ({"microbatches": 6}, "must be a power of two that divides batch_size=128, or 0"),
        ({"tensor": 2}, "needs parallel='fsdp', not 'none'"),
        ({"tensor": 2, "parallel": "fsdp", "microbatches": 8}, "microbatches=8: not with tensor=2"),
        ({"method": "st3", "structure": "2:4"}, "structure='2:4': st3 has no structure to choose"),
        (
            {"method": "sr_ste", "options__update_every": 5},
            "sr_ste has no such option; its are .*decay",
        ),
        ({"model_options__hiden": (3,)}, r"model_options.hiden=\(3,\): mlp has no .*hidden"),
        ({"sparsty": 0.9}, r"config.sparsty=0.9: is no field; did you mean sparsity\?"),
    ],
)
def test_a_refusal_says_what_would_do(values, message):
    with pytest.raises(ValueError, match=message):
        fields.check(changed(**values))


def test_nothing_is_written_before_the_config_is_checked(tmp_path):
    with pytest.raises(ValueError, match="clip_norm"):
        train.train(changed(clip_norm=-1.0), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "name", sorted(path.stem for path in pathlib.Path(configs.__path__[0]).glob("[a-z]*.py"))
)
def test_every_config_of_the_folder_passes(name):
    job = train_sae if name.startswith("sae_") else fields
    job.check(importlib.import_module(f"experiments.configs.{name}").get_config())
