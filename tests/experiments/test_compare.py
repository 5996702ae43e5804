"""The grid of methods and sparsities: what is trained, what is saved, and what is written."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsparse
from experiments import datasets
from experiments.studies import compare

FACTS = {
    "dataset": "digits",
    "model": "mlp",
    "steps": 40,
    "batch_size": 32,
    "seeds": [0, 1],
    "parameters": 1,
}


def point(method, accuracy, asked: float | None = 0.8, setting=None, **other):
    return {
        "method": method,
        "setting": setting,
        "asked": asked,
        "sparsity": asked or 0.5,
        "accuracy": accuracy,
        "deviation": 0.01,
        "forward_flops": 0.2,
        "seconds": 1.0,
        **other,
    }


@pytest.fixture
def small(config):
    config.options.update_every = None
    config.options.begin_step = None
    config.steps, config.warmup_steps = 300, 5
    return config


def test_a_grid_is_trained_saved_and_not_trained_again(small):
    saved = []
    points = compare.compare(small, ["dense", "static"], [0.5, 0.8], [0, 1], save=saved.append)
    assert [(p["method"], p["asked"]) for p in points] == [
        ("dense", None),
        ("static", 0.5),
        ("static", 0.8),
    ]
    assert len(saved) == 2
    # Zeros are rounded down in each layer.
    assert [p["sparsity"] for p in points] == pytest.approx([0.0, 0.5, 0.8], abs=2e-3)
    assert all(len(p["accuracies"]) == 2 and p["accuracy"] > 0.3 for p in points)
    assert points[1]["forward_flops"] == pytest.approx(0.5, abs=0.01)
    again = compare.compare(small, ["dense", "static"], [0.5, 0.8], [0, 1], done=points)
    assert again == points


@pytest.mark.slow
def test_a_network_of_the_grid_is_the_one_trained_alone(small):
    data = datasets.load("digits", data_dir=small.data_dir)
    splits = {split: compare.on_device(data, split) for split in ("train", "test")}
    run = compare.make_run(compare.configure(small, data, "set", None), data, splits)
    both = run(jnp.array([0, 1, 0, 1]), jnp.array([0.5, 0.5, 0.9, 0.9]))
    alone = run(jnp.array([1]), jnp.array([0.9]))
    for name, n in both["nonzeros"].items():
        assert n[3] == alone["nonzeros"][name][0]
    np.testing.assert_allclose(both["loss"][3], alone["loss"][0], rtol=0.05)


@pytest.mark.slow
def test_two_view_methods_are_trained_with_two_views(small):
    data = datasets.load("digits", data_dir=small.data_dir)
    config = compare.configure(small, data, "bdwp", "2:4")
    # 64 inputs, 32 hidden units, 10 classes: groups of 4 do not divide the outputs of the last layer
    assert config.options.targets == r"^(layers/0/kernel)$"
    assert compare.configure(small, data, "sr_ste", "2:4").options.targets == config.options.targets
    task = compare.make_task(config, data)
    init, train_step = compare._refreshed(task, "bdwp")
    state = init()
    batch = {k: x[:32] for k, x in compare.on_device(data, "train").items()}
    for _ in range(2):
        state, _ = jax.jit(train_step)(state, batch)
    first = state.stats["layers"][0]["backward"]
    per_group = (np.asarray(first) != 0).reshape(64, 8, 4).sum(axis=-1)
    assert (per_group == 2).all()
    last = state.stats["layers"][1]["backward"]
    np.testing.assert_array_equal(last, state.params["layers"][1]["kernel"])


def test_every_method_is_swept_over_sparsities_or_settings():
    for name, method in jaxsparse.METHODS.items():
        swept = compare.sweep(name, [0.8, 0.9])
        if method.controls_sparsity and name not in compare.SETTINGS:
            assert swept == [(None, [0.8, 0.9])]
        else:
            assert all(asked == [None] for _, asked in swept)


def test_the_page_has_a_table_by_sparsity_and_names_what_is_missing(tmp_path):
    points = [
        point("dense", 0.9, None, command="first"),
        point("static", 0.5, command="first"),
        point("static", 0.4, 0.9, command="second"),
        point("rigl", 0.7, command="first"),
        point("rigl", 0.6, 0.9, sparsity=0.87),
        point("sr_ste", 0.8, None, "2:4"),
        {"method": "slope", "setting": "1:8", "asked": None, "error": "no", "seconds": 0.1},
    ]
    paths = compare.write(FACTS, points, tmp_path, ["rigl"])
    page = paths[2].read_text()
    assert page.index("| rigl |") < page.index("| static |"), "best first at the highest sparsity"
    assert "Dense: 90.0 ± 1.0" in page and "| 70.0 ± 1.0 | 60.0 ± 1.0 |" in page
    assert "```\nfirst\nsecond\n```" in page, "each command once, in order"
    assert "sr_ste 2:4" in page and "rigl at 90%: 87.00%" in page
    assert "Without a result: slope (no)." in page
    assert all(p.stat().st_size > 10_000 for p in paths[:2])
    assert compare.load_points(FACTS, paths[3]) == points


def test_options_that_are_not_the_defaults_have_a_row_of_their_own(small):
    points = compare.compare(
        small,
        ["dense", "static"],
        [0.5],
        [0],
        done=[point("dense", 0.9, None), point("static", 0.5, 0.5)],
        changed={"allocation": "uniform", "config.warmup_steps": 9},
        command="this",
    )
    new = points[-1]
    assert len(points) == 3 and new["command"] == "this"
    assert compare._name(new) == "static allocation=uniform config.warmup_steps=9"
    data = datasets.load("digits", data_dir=small.data_dir)
    config = compare.configure(
        small, data, "static", None, {"allocation": "erk", "config.cycles": 2}
    )
    assert config.options.allocation == "erk" and config.cycles == 2 and small.cycles == 1
    with pytest.raises(ValueError, match="'erk' is not of the form"):
        compare.read_options(["allocation=uniform", "erk"])


def test_points_of_another_run_are_not_mixed_in(tmp_path):
    path = tmp_path / "points.json"
    assert compare.load_points(FACTS, path) == []
    path.write_text(json.dumps({"facts": FACTS | {"steps": 50}, "points": []}))
    with pytest.raises(ValueError, match="another run \\(steps 50 there, 40 here\\)"):
        compare.load_points(FACTS, path)
