"""The job that trains autoencoders: it goes on bit for bit, and says what it cannot do."""

import json
import shutil

import numpy as np
import pytest

from experiments import fields, train_sae
from experiments.configs import sae_planted
from experiments.datasets.planted import planted


def config(**changes):
    c = sae_planted.get_config()
    c.tokens, c.steps, c.batch_size, c.d_sae = 400, 6, 32, 24
    c.log_every, c.checkpoint_every = 2, 3
    for name, value in changes.items():
        setattr(c, name, value)
    return c


def test_rows_are_sums_of_planted_atoms():
    made = planted(50, width=8, atoms=5, active=(1, 2))
    codes = np.linalg.lstsq(made.atoms.T, made.rows.T, rcond=None)[0].T
    used = (np.abs(codes) > 1e-4).sum(1)
    assert set(used) == {1, 2} and codes.min() > -1e-4
    with pytest.raises(ValueError, match="active="):
        planted(5, width=8, atoms=5, active=(1, 6))


def test_a_run_that_goes_on_is_the_run_that_was_not_stopped(tmp_path):
    whole = train_sae.train(config(), tmp_path / "run")
    assert {"recovery", "explained_variance", "l0"} <= set(whole)
    assert (tmp_path / "run" / "report.png").exists()
    assert json.loads((tmp_path / "run" / "result.json").read_text())["measures"] == whole
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "6")
    assert train_sae.train(config(), tmp_path / "run") == whole
    with pytest.raises(ValueError, match="family"):
        train_sae.train(config(family="BatchTopK"), tmp_path / "run")


def test_batches_and_latents_may_be_split_over_devices(tmp_path):
    one = train_sae.train(config(), tmp_path / "one")
    many = train_sae.train(config(mesh=(2, 4)), tmp_path / "many")
    assert many == pytest.approx(one, rel=1e-3)
    shutil.rmtree(tmp_path / "many" / "checkpoints" / "6")
    assert train_sae.train(config(mesh=(2, 4)), tmp_path / "many") == many
    with pytest.raises(ValueError, match="batch_size=33: must be a multiple of the 2"):
        train_sae.train(config(mesh=(2, 4), batch_size=33), tmp_path / "odd")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"family": "TopQ"}, "family='TopQ'"),
        ({"data": "prose"}, "data='prose'"),
        ({"optimizer": "sgdx"}, "optimizer='sgdx'"),
        ({"options": {"kk": 2}}, "options="),
    ],
)
def test_what_cannot_be_run_is_named(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        train_sae.train(config(**changes), tmp_path)


# Values that each field must refuse: of another type, beyond each end of its range, or not known.
BAD = {
    "mesh": [(0, 1), (3, 3), 2, (1, 2.0)],
    "family": ["SAE", "", None],
    "d_sae": [0, 1.5, None],
    "dead_after": [0, 1.5],
    "data": ["", None],
    "tokens": [0, 1.5],
    "scale": ["yes", 1],
    "width": [0, 1.5],
    "atoms": [0, 1.5],
    "active": [(2, 1), (1,), (-1, 2), 3],
    "noise": [-0.1, float("nan")],
    "site": ["", None],
    "text": ["", "poems", None],
    "layers": [0, 1.5],
    "length": [1, 1.5],
    "eval_sequences": [0, 1.5],
    "seed": [-1, 2**32],
    "steps": [0, 1.5],
    "batch_size": [0, 1.5],
    "learning_rate": [0.0, -1e-3, float("inf")],
    "optimizer": ["sgd", None],
    "clip_norm": [0.0, -1.0, float("nan"), None],
    "unit_norm": ["yes", 1],
    "sparsity_warmup": [-1, 1.5],
    "resample_every": [-1, 1.5],
    "log_every": [0, 1.5],
    "checkpoint_every": [0, 1.5],
    "keep_checkpoints": [0, 1.5],
}


def test_every_field_refuses_what_it_cannot_be_before_anything_is_written(tmp_path):
    known = {n for n in fields.flatten(config().to_dict()) if not n.startswith("options.")}
    assert known == set(BAD) == set(train_sae.FIELDS)
    for name, values in BAD.items():
        for value in values:
            c = config()
            with c.ignore_type():
                setattr(c, name, value)
            with pytest.raises(ValueError) as refused:
                train_sae.train(c, tmp_path / "run")
            assert f"config.{name}={value!r}: " in str(refused.value)
    assert not (tmp_path / "run").exists()
