"""The study of autoencoders goes on where it stopped."""

import json

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
