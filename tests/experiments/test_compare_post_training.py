"""Tables of post-training pruning: which method is measured where, resumption, and the split of a budget over parts."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.studies import compare_parts, compare_post_training


def test_methods_are_measured_at_budgets_that_they_can_have():
    fits = compare_post_training.fits
    assert fits("SparseGPT", "2:4") and fits("SparseGPT", "0.7") and not fits("SparseGPT", "20%")
    assert fits("FLAP", "20%") and not fits("FLAP", "0.5")
    assert not fits("SparseGPT, OWL", "2:4") and fits("SparseGPT, OWL", "0.3")
    assert not fits("GQSA, 4 bits", "4:8") and not fits("Wanda, EvoPress", "2:4")
    settings = compare_post_training.settings_of
    assert settings("2:4") == {"structure": "2:4"} and settings("0.3") == {"sparsity": 0.3}
    assert settings("20%") == {"sparsity": 0.2}


@pytest.fixture
def small(monkeypatch):
    """A comparison whose runs are counted and cost nothing."""
    made = []

    def run(model, calibration, evaluation, method, logits, **settings):
        if made and made[-1] == "stop":
            raise KeyboardInterrupt
        made.append((method, settings))
        quality = {"perplexity": 30.0 + len(made), "dense_perplexity": 25.0, "divergence": 0.1}
        return None, {"method": method, "seconds": float(len(made))} | quality

    monkeypatch.setattr(compare_post_training, "prepare", lambda options: (None, [], []))
    monkeypatch.setattr(compare_post_training, "logits_of", lambda model, tokens: [])
    monkeypatch.setattr(compare_post_training, "run", run)
    monkeypatch.setattr(compare_post_training.jax.config, "update", lambda *_: None)
    return made


def test_a_comparison_that_was_stopped_goes_on_and_keeps_one_table(small, tmp_path):
    call = lambda *more: compare_post_training.main(
        [f"--workdir={tmp_path}", "--methods=Wanda;FLAP;SparseGPT", *more]
    )
    call("--budgets=0.5")
    assert small == [
        ("wanda", {"sparsity": 0.5, "errors": False}),
        ("sparsegpt", {"sparsity": 0.5, "errors": False}),
    ]
    small.append("stop")
    with pytest.raises(KeyboardInterrupt):
        call("--budgets=0.5,2:4")
    small.remove("stop")
    call("--budgets=2:4,20%,0.5")
    assert [m for m, _ in small] == ["wanda", "sparsegpt", "wanda", "sparsegpt", "flap"]
    assert len(json.loads((tmp_path / "results.json").read_text())) == 5
    page = (tmp_path / "results.md").read_text()
    assert "| method | 0.5 | 2:4 | 20% | seconds |" in page
    assert "| dense | 25.0 | 25.0 | 25.0 | |" in page
    assert "| Wanda | 31 | 33 |  | 1 to 3 |" in page and "| FLAP |  |  | 35 | 5 |" in page
    assert (tmp_path / "results.png").stat().st_size > 1000
    with pytest.raises(ValueError, match="no 'Wander'; there are magnitude; Wanda"):
        compare_post_training.main([f"--workdir={tmp_path}", "--methods=Wander"])


def test_parts_are_kinds_and_thirds_of_the_blocks():
    import re

    parts = compare_parts.parts_of({"up": "/up/"}, 30)
    assert list(parts) == ["up", "early blocks", "middle blocks", "late blocks"]
    hit = lambda part, path: bool(re.search(parts[part], path))
    assert hit("early blocks", "layers/9/up/kernel") and hit("late blocks", "layers/29/up/kernel")
    assert not hit("early blocks", "layers/10/up/kernel") and not hit("middle blocks", "layers/1/")
    thirds = list(parts)[1:]
    assert all(sum(hit(t, f"layers/{i}/up/kernel") for t in thirds) == 1 for i in range(30))


def test_parameters_are_mixed_by_the_part_that_they_belong_to():
    dense = {"a": {"kernel": jnp.ones(3)}, "b": {"kernel": jnp.ones(2)}}
    at = lambda s: {k: {"kernel": jnp.full(v["kernel"].shape, s)} for k, v in dense.items()}
    pruned = {s: at(s) for s in compare_parts.SPARSITIES}
    found = compare_parts.mixed(dense, pruned, {"^a/": 0.6, "^b/": 0.0})
    assert found["a"]["kernel"].tolist() == pytest.approx([0.6] * 3)
    assert found["b"]["kernel"].tolist() == [1.0] * 2


def test_the_split_keeps_as_many_weights_and_has_the_least_sum_of_damages():
    rng = np.random.default_rng(0)
    curves = {k: sorted(rng.random(4)) for k in "abc"}
    sizes = {"a": 10, "b": 20, "c": 30}
    found = compare_parts.split(curves, sizes, 0.4)
    levels = (0.0, *compare_parts.SPARSITIES)
    kept = lambda split: sum(n - round(s * n) for n, s in zip(sizes.values(), split))
    cost = lambda split: sum(([0.0, *curves[k]])[levels.index(s)] for k, s in zip(sizes, split))
    every = [(a, b, c) for a in levels for b in levels for c in levels]
    best = min(cost(s) for s in every if kept(s) <= kept((0.4, 0.4, 0.4)))
    assert kept(found.values()) <= 36 and cost(found.values()) == pytest.approx(best)


def test_the_cliff_is_where_a_curve_bends_most():
    assert compare_parts.cliff([0.0, 0.1, 5.0, 9.0]) == 0.4
    assert compare_parts.cliff([0.0, 0.0, 0.1, 4.0]) == 0.6
