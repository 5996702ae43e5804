"""The experiments on claims, on the smallest case."""

import json

import pytest

from experiments.studies import claims


@pytest.mark.slow
def test_a_claim_is_measured_printed_and_written(tmp_path, capsys):
    claims.main(["collapse", "--seeds=1", f"--out={tmp_path}"])
    found = json.loads((tmp_path / "collapse.json").read_text())
    assert found["facts"]["seeds"] == 1 and len(found["rows"]) == 15
    last = {r["score"]: r["collapsed networks"] for r in found["rows"][-5:]}
    assert last["synflow"] == "0 of 1" and last["magnitude"] == "1 of 1"
    assert "| synflow | 1000 |" in capsys.readouterr().out


def test_every_claim_has_a_sentence_and_a_command():
    for name, (run, seeds, _) in claims.CLAIMS.items():
        assert run.__doc__ and seeds > 1
        assert f"claims {name}" in (claims.__doc__ or "")
    with pytest.raises(SystemExit):
        claims.main(["nothing"])
