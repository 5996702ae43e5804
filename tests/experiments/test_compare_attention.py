"""The study of attention on SmolLM2, on a model of its design that is small and knows nothing."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments.models import smollm2
from experiments.studies import compare_attention as study

CONFIG = smollm2.Config(layers=2, width=16, hidden=16, heads=2, groups=1, vocabulary=32)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 32, (1, 1100)), jnp.int32)


@pytest.fixture
def model():
    return smollm2.SmolLM2(CONFIG, nnx.Rngs(0))


def test_perplexity_in_parts_is_that_of_all_logits(model):
    whole = model(TOKENS)
    x = study.Model(model).embed(TOKENS)
    for layer in model.layers:
        x = layer(x)
    want = float(smollm2.next_token_loss(whole, TOKENS))
    assert study.Model(model).nats(x, TOKENS) == pytest.approx(want, rel=1e-5)
    want = np.exp(float(smollm2.next_token_loss(whole[:, -8:], TOKENS[:, -8:])))
    assert study.Model(model).perplexity(x, TOKENS, last=7) == pytest.approx(want, rel=1e-5)


def test_a_context_is_the_end_of_the_text(model):
    row = study.run_context(study.Model(model), "dense", 1.0, TOKENS, [{}, {}], 200, 50)
    logits = model(TOKENS[:, -200:])
    want = np.exp(float(smollm2.next_token_loss(logits[:, -51:], TOKENS[:, -51:])))
    assert row["tail"] == pytest.approx(want, rel=1e-5)
    assert (row["context"], row["last"], row["density"]) == (200, 50, 1.0)


def test_the_study_keeps_what_it_made_and_writes_its_page(tmp_path, monkeypatch, model):
    monkeypatch.setattr(smollm2, "load", lambda: (model, None))
    batches = lambda tokenizer, half, sequences, length: [TOKENS[:, :length]]
    monkeypatch.setattr(smollm2, "batches", batches)
    arguments = [
        f"--workdir={tmp_path}", f"--out={tmp_path}", "--length=256", "--prompt=128", "--shortest=128",
        "--predictors=streaming", "--budgets=0.5", "--policies=snapkv", "--entries=64",
    ]  # fmt: skip
    study.main(arguments)
    page = (tmp_path / "attention_tables.md").read_text()
    assert "| | last 128 at 1 | last 256 at 0.25 |" in page
    assert "Perplexity of the last 64 tokens" in page and "| snapkv |" in page
    for name in ("run_policy", "run_predictor", "run_context", "dense_layer"):
        monkeypatch.setattr(study, name, None)
    study.main(arguments)  # nothing is made again
    again = (tmp_path / "attention_tables.md").read_text()
    assert again.partition("Made on")[0] == page.partition("Made on")[0]
