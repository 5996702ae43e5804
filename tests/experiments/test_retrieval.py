"""The retrieval study: texts that a reader can answer, a model that learns to, and the run as a whole."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.studies import compare_attention as study
from experiments.studies import retrieval


def read(text: np.ndarray, name: int) -> int:
    """What a reader who knows the rules answers: what follows the name, and what follows that if it is a name."""
    while name < retrieval.NAMES:
        name = int(text[np.flatnonzero(text == name)[0] + 1])
    return name


@pytest.mark.parametrize("task, number", [("needle", 1), ("needles", 8), ("tracking", 4)])
def test_a_reader_can_answer_every_question(task, number):
    texts = retrieval.draw(task, np.random.default_rng(0), 20, 96)
    body = 96 - 2 * number
    assert (texts.asked.sum(1) == number).all() and not texts.asked[:, :body].any()
    for row, asked in zip(texts.tokens, texts.asked):
        for at in np.flatnonzero(asked):
            assert read(row[:body], int(row[at])) == row[at + 1]
    # Facts lie anywhere in the body, and definitions come before what refers to them.
    pairs = [np.flatnonzero(row[:body] < retrieval.NAMES) for row in texts.tokens]
    assert min(p[0] for p in pairs) < body // 4 and max(p[-1] for p in pairs) > 3 * body // 4
    if task == "tracking":
        for row in texts.tokens[:, :body].tolist():
            known, at = set(), 0
            while at < body:
                if row[at] >= retrieval.NAMES:  # noise
                    at += 1
                    continue
                name, symbol = row[at : at + 2]
                assert symbol >= retrieval.NAMES or symbol in known
                known, at = known | {name}, at + 2
            assert len(known) == 8


def test_texts_that_cannot_be_are_refused():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="task='nedle' must be one of"):
        retrieval.draw("nedle", rng, 1, 64)
    with pytest.raises(ValueError, match="16 pairs and 8 questions do not fit length=40"):
        retrieval.draw("needles", rng, 1, 40)


def test_right_answers_are_counted_where_they_are_asked():
    texts = retrieval.draw("needles", np.random.default_rng(0), 4, 64)
    right = np.eye(96)[np.roll(texts.tokens, -1, 1)] * 50
    wrong = right.copy()
    at = np.argwhere(texts.asked)[:8]  # of 32 questions a quarter
    wrong[tuple(at.T)] = np.eye(96)[95] * 50
    loss, share = retrieval.answers(jnp.asarray(right), texts)
    assert float(share) == 1.0 and float(loss) < 1e-6
    assert float(retrieval.answers(jnp.asarray(wrong), texts)[1]) == pytest.approx(0.75)


def test_contexts_of_equal_cost_read_equally_many_pairs():
    points = study.equal_cost(4096, 512)
    assert [n for n, _ in points] == [512, 1024, 2048, 4096]
    assert {n * n * d for n, d in points} == {512 * 512}


def test_the_run_keeps_what_it_made_and_writes_its_page(tmp_path, monkeypatch):
    monkeypatch.setattr(retrieval, "PHASES", (retrieval.Phase(32, 8, 2),))
    arguments = [f"--workdir={tmp_path}", f"--out={tmp_path}", "--lengths=48", "--budgets=0.2,0.9",
                 "--predictors=streaming", "--texts=4", "--steps=2", "--shortest=48"]  # fmt: skip
    retrieval.main(arguments)
    page = (tmp_path / "retrieval_tables.md").read_text()
    assert "## 48 tokens" in page and "| streaming |" in page and "## Equal cost" in page
    results = json.loads((tmp_path / "results_0.json").read_text())
    # Of 6 blocks 5 are forced: a fifth of them is no budget, and not tried.
    assert [(r["name"], r["budget"]) for r in results["rows"]] == [("dense", 1.0), ("streaming", 0.9)]  # fmt: skip
    monkeypatch.setattr(retrieval, "run", None)
    monkeypatch.setattr(retrieval, "train", None)
    retrieval.main(arguments)  # nothing is made again
    assert (tmp_path / "retrieval_tables.md").read_text().split("Made on")[0] in page


def test_reading_every_block_is_dense_attention():
    model = study.Model(retrieval.build())
    texts = retrieval.draw("needles", np.random.default_rng(5), 2, 48)
    x = model.embed(jnp.asarray(texts.tokens))
    for state in model.states:
        x, density = study.sparse_layer(model.graph, "dense", 1.0, retrieval.LAYOUT, state, {}, x)
        assert float(density) == 1.0
    np.testing.assert_allclose(model.logits(x), model.model(texts.tokens), atol=1e-4)


@pytest.mark.slow
def test_a_small_model_learns_to_look_things_up(monkeypatch):
    some = dict(needles=6, questions=6)
    draw = lambda rng, batch, length: retrieval.draw("needles", rng, batch, length, **some)
    monkeypatch.setattr(retrieval, "mixed", draw)
    trained = retrieval.train(retrieval.build(), retrieval.Phase(32, 32, 250))
    texts = draw(np.random.default_rng(5), 32, 32)
    assert float(retrieval.answers(trained(texts.tokens), texts)[1]) > 0.9
