"""The page of a training run, and pages in general."""

import json

import pytest

from experiments.report import report, result
from experiments.report.page import Page
from jaxsparse.analysis import plots


def test_a_page_is_one_html_file_with_its_plots_inside_and_escapes_text(tmp_path):
    page = Page("a < b")
    page.figure(plots.density_bars({"layer": 0.25}), "density", "one layer")
    page.table(["layer", "kept"], [["<first>", 10]])
    markdown, html = page.write(tmp_path)
    text = html.read_text()
    assert "<h1>a &lt; b</h1>" in text and "&lt;first&gt;" in text
    assert 'src="data:image/png;base64,iVBOR' in text
    assert (tmp_path / "plots" / "density.png").read_bytes().startswith(b"\x89PNG")
    assert "![one layer](plots/density.png)" in markdown.read_text()


def test_a_row_of_the_wrong_length_is_refused():
    with pytest.raises(ValueError, match="1 cells, the header 2"):
        Page("x").table(["a", "b"], [["only"]])


@pytest.fixture
def workdir(tmp_path):
    """What a run of two looks leaves: 800 of 1000 weights are zero at step 10, 900 at step 30."""
    layer = {"shape": [100, 10], "size": 1000, "nonzeros": 100, "sparsity": 0.9, "bytes": 4000}
    looks = [
        {
            "step": step,
            "loss": loss,
            "accuracy": 0.5,
            "sparsity": 1 - d,
            "density": {"w": d},
            "churn": 0.1,
            "layer_churn": {"w": 0.1},
        }
        for step, loss, d in ((10, 2.0, 0.2), (30, 1.0, 0.1))
    ]
    files = {
        "config.json": {
            "method": "rigl",
            "dataset": "digits",
            "model": "mlp",
            "steps": 30,
            "batch_size": 8,
            "log_every": 10,
        },
        "result.json": {
            "evaluation": {"accuracy": 0.75, "loss": 1.25},
            "summary": {
                "sparsity": 0.9,
                "nonzeros": 100,
                "size": 1000,
                "leaves": {"w": layer | {"mask_sparsity": 0.9}},
            },
            "flops": {"w": 2000},
            "weight_gradient": "sparse",
        },
    }
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    lines = [*looks, {"step": 30, "eval_accuracy": 0.75, "eval_loss": 1.25}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def test_the_report_of_a_run_is_made_from_what_the_run_left(workdir):
    page = report(workdir)
    assert page == workdir / "report.html" and page.read_text().startswith("<!doctype html>")
    text = (workdir / "report.md").read_text()
    assert text.startswith("# rigl on digits with mlp, 90.0% sparse\n")
    assert "| test accuracy | 75.00% |" in text
    assert "| operations of a forward pass | 200 of 2,000 |" in text
    # Ten steps at density 0.2, twenty at 0.1.
    assert "| operations of training, relative to dense | 0.133 |" in text
    plots = {path.stem for path in (workdir / "plots").iterdir()}
    assert plots == {"loss", "accuracy", "sparsity", "churn", "density"}


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "result.json"])
def test_a_directory_that_is_not_that_of_a_finished_run_is_refused(workdir, name):
    (workdir / name).unlink()
    with pytest.raises(ValueError, match=f"workdir='{workdir}': {name} is missing; give the"):
        report(workdir)


@pytest.mark.parametrize(
    "method, options, expected",
    [
        ("dense", {}, "dense"),
        ("set", {}, "sparse"),
        ("rigl", {}, 100),
        ("rigl", {"update_every": None}, 100),
        ("rigl", {"update_every": 7}, 7),
        ("rigl_itop", {}, 123),  # 8 of 195 parts of the run
    ],
)
def test_the_gradient_is_counted_as_often_as_the_run_reads_it(method, options, expected):
    assert result.weight_gradient(method, options, total_steps=3000) == expected
