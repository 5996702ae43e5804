"""MiniLM from its package: embeddings as those of the reference, pruned with padding in the batches."""

import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.models import minilm
from experiments.studies import compare_embeddings
from jaxsparse import post_training as pt

GOLDEN = json.loads((pathlib.Path(__file__).parent / "minilm_golden.json").read_text())


@pytest.fixture(scope="module")
def loaded():
    return minilm.load()


def test_embeddings_are_those_of_transformers(loaded):
    """Made by transformers 5 with `AutoModel`, mean pooling and normalization, in float32."""
    model, tokenizer = loaded
    ids, mask = minilm.tokens(tokenizer, GOLDEN["sentences"], length=26)
    assert ids.tolist() == GOLDEN["tokens"]
    found = model(ids, mask)
    np.testing.assert_allclose(found, np.asarray(GOLDEN["embeddings"]), atol=1e-4)
    longer = model(*minilm.tokens(tokenizer, GOLDEN["sentences"], length=40))
    np.testing.assert_allclose(longer, found, atol=1e-5)  # padding changes nothing


def test_halves_of_the_sentences_are_disjoint_prose():
    a, b = (minilm.sentences(half) for half in ("calibration", "evaluation"))
    assert not set(a) & set(b) and min(len(a), len(b)) > 200


def test_neighbours_are_counted_and_a_dense_model_loses_none():
    x = np.random.default_rng(0).normal(size=(30, 5))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    assert compare_embeddings.overlap(x, x, 10) == 1.0
    other = np.random.default_rng(1).normal(size=(30, 5))
    assert compare_embeddings.overlap(x, other, 10) < 0.6
    line = np.arange(4.0)[:, None] * [[0.1, 0.0]] + [[1.0, 0.0]]  # the nearest of all is the last
    assert compare_embeddings.overlap(line, line[::-1], 1) == 0.0


def test_layers_are_pruned_with_padding_in_the_batches(loaded):
    model, tokenizer = loaded
    batch = minilm.tokens(tokenizer, minilm.sentences("calibration")[:4], length=24)
    rule = "layers/0/(query|up)/kernel"
    result = pt.prune(
        model, [batch], "wanda", sparsity=0.5, targets=rule, mask=lambda b: b[1], errors=False
    )
    assert result.sparsity == 0.5
    cosine = jnp.sum(result.model(*batch) * model(*batch), axis=-1)
    assert 0.7 < float(jnp.mean(cosine)) < 0.9999


@pytest.mark.slow
def test_embeddings_that_are_looked_up_are_pruned_by_the_size_of_their_entries(loaded):
    model, tokenizer = loaded
    batch = minilm.tokens(tokenizer, minilm.sentences("calibration")[:4], length=24)
    rule = "^(embed|position)/embedding"
    result = pt.prune(
        model, [batch], "wanda", structure="2:4", targets=rule, mask=lambda b: b[1], errors=False
    )
    assert [r.name for r in result.layers] == ["embed/embedding", "position/embedding"]
    dense = np.abs(np.asarray(model.embed.embedding[...])).reshape(-1, 4)
    kept = np.asarray(result.model.embed.embedding[...]).reshape(-1, 4) != 0
    least = np.where(kept, dense, np.inf).min(1)
    assert (kept.sum(1) <= 2).all() and (least >= np.where(kept, 0, dense).max(1)).all()
    cosine = jnp.sum(result.model(*batch) * model(*batch), axis=-1)
    assert 0.7 < float(jnp.mean(cosine)) < 0.9999
