"""The study of autoencoders goes on where it stopped."""

import json

import numpy as np
import pytest

from experiments import train_sae
from experiments.studies import compare_sae


def test_finished_runs_are_read_and_other_families_kept(tmp_path, capsys, monkeypatch):
    common = [
        "--steps=3",
        "--seeds=1",
        "--settings=1",
        f"--workdir={tmp_path}",
        f"--out={tmp_path}",
    ]
    compare_sae.main([*common, "--families=MatryoshkaTopK"])
    first = capsys.readouterr().out.splitlines()[-1]
    assert first.startswith("| MatryoshkaTopK | ks=(1, 2), k=2 | 2.0 |")

    def train(*_):
        raise AssertionError("trained again")

    with monkeypatch.context() as patch:
        patch.setattr(train_sae, "fit", train)
        compare_sae.main([*common, "--families=MatryoshkaTopK"])
        assert capsys.readouterr().out.splitlines()[-1] == first
        with pytest.raises(AssertionError, match="trained again"):
            compare_sae.main([*common, "--families=TopK"])
    compare_sae.main([*common, "--families=TopK"])
    table = capsys.readouterr().out.splitlines()
    assert table[-2].startswith("| TopK |") and table[-1] == first
    rows = json.loads((tmp_path / "sae_planted.json").read_text())
    assert [(row["family"], row["seeds"]) for row in rows] == [("TopK", 1), ("MatryoshkaTopK", 1)]
    with pytest.raises(SystemExit):
        compare_sae.main([*common, "--settings=4"])
    with pytest.raises(SystemExit):
        compare_sae.main([*common, "--text=code"])


def test_site_and_text_reach_the_run_and_the_names_of_its_files(tmp_path, capsys, monkeypatch):
    loaded = []

    def load(config, whole):
        assert whole is None
        loaded.append((config.site, config.text))
        return train_sae.Data(np.zeros((0, 2)), np.zeros((0, 2)))

    found = {"l0": 1.0, "loss_recovered": 0.5, "explained_variance": 0.5, "dead": 0.0}
    monkeypatch.setattr(train_sae, "load", load)
    monkeypatch.setattr(train_sae, "fit", lambda *_: None)
    monkeypatch.setattr(train_sae, "evaluate", lambda *_: found)
    common = ["--data=smollm2", "--seeds=1", "--settings=1", "--families=TopK"]
    common += [f"--workdir={tmp_path}", f"--out={tmp_path}"]
    for more in (
        [],
        ["--site=layers/3/down"],
        ["--text=code"],
        ["--site=layers/3", "--text=prose"],
    ):
        compare_sae.main([*common, *more])
    # The last is the first: its row is read.
    assert loaded == [("layers/3", "prose"), ("layers/3/down", "prose"), ("layers/3", "code")]
    names = sorted(path.name for path in tmp_path.glob("*.json"))
    assert names == [
        "sae_smollm2.json",
        "sae_smollm2_code.json",
        "sae_smollm2_layers.3.down.json",
        "sae_smollm2_layers.3_prose.json",
    ]
