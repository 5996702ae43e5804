"""SmolLM2 from its package: what loads without a word and is wrong, and pruning of real layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments.models import smollm2
from jaxsparse import post_training as pt


@pytest.fixture(scope="module")
def slice_of_four():
    return smollm2.load(layers=4)


def test_rotations_of_neighbours_and_of_halves_are_the_same_up_to_the_order():
    x = jax.random.normal(jax.random.key(0), (1, 5, 2, 8))
    order = jnp.array([0, 4, 1, 5, 2, 6, 3, 7])  # neighbours of x[order] are halves of x
    halves = smollm2.rotate(x, 100.0, "halves")
    np.testing.assert_allclose(
        smollm2.rotate(x[..., order], 100.0, "interleaved"), halves[..., order], atol=1e-6
    )
    z = np.asarray(x[..., :4]) + 1j * np.asarray(x[..., 4:])
    angle = np.arange(5)[:, None] * 100.0 ** (-np.arange(4) / 4)
    turned = z * np.exp(1j * angle)[:, None]
    expected = np.concatenate([turned.real, turned.imag], -1)
    np.testing.assert_allclose(halves, expected, atol=1e-5)


def test_the_tokenizer_splits_digits_and_gives_text_back(slice_of_four):
    _, tokenizer = slice_of_four
    said = "In 2024, Paris isn't far.\n    def f(x):"
    assert tokenizer.decode(tokenizer.encode(said).ids) == said
    assert tokenizer.encode("2024").tokens == ["2", "0", "2", "4"]
    assert tokenizer.encode(" Paris").tokens == ["ĠParis"]
    assert tokenizer.encode("<|im_start|>").ids == [1]


def test_weights_lie_on_a_grid_of_sixteen_levels(slice_of_four):
    model, _ = slice_of_four
    row = np.asarray(model.layers[0].up.kernel[...]).T[0].reshape(-1, 32)  # an output's inputs
    assert all(len(np.unique(group)) <= 16 for group in row)


@pytest.mark.parametrize("kind", ["prose", "code"])
def test_halves_of_the_text_share_no_paragraph(kind):
    a, b = (smollm2.text(half, kind).split("\n\n") for half in ("calibration", "evaluation"))
    words = lambda paragraphs: {" ".join(p.split()) for p in paragraphs}
    assert not words(a) & words(b) and len(words(b)) == len(b)
    assert min(sum(map(len, a)), sum(map(len, b))) > 50_000
    lines = [line.strip() for p in a + b for line in p.splitlines()]
    defined = np.mean([line.startswith(("def ", "return ", "if ", "self.")) for line in lines])
    assert defined > 0.15 if kind == "code" else defined < 0.05


def test_batches_are_of_one_shape(slice_of_four):
    _, tokenizer = slice_of_four
    found = smollm2.batches(tokenizer, "calibration", 6, 32, size=3)
    assert [x.shape for x in found] == [(3, 32)] * 2
    with pytest.raises(ValueError, match="sequences=1000000 of 32: the text has"):
        smollm2.batches(tokenizer, "calibration", 1_000_000, 32)


def test_real_layers_are_pruned_block_by_block(slice_of_four):
    model, tokenizer = slice_of_four
    tokens = smollm2.batches(tokenizer, "calibration", 4, 64)
    rule = "layers/[01]/(attention/(query|out)|down)"
    kept = {}
    for method in ("magnitude", "wanda", "sparsegpt"):
        result = pt.prune(model, tokens, method, structure="2:4", targets=rule)
        assert len(result.layers) == 6 and result.sparsity == 0.5
        kept[method] = np.mean([r.pruned for r in result.layers])
    # A real network has features that stand out: here activations do help.
    assert kept["sparsegpt"] < kept["wanda"] < kept["magnitude"]


def test_narrow_removes_hidden_units_and_no_heads():
    config = smollm2.Config(2, width=24, hidden=16, heads=3, groups=1, vocabulary=50)
    model = smollm2.SmolLM2(config, nnx.Rngs(0))
    small = pt.narrow(model, [jnp.arange(8)[None]], "cfsp", sparsity=0.25, slope=0.0).model
    for layer in small.layers:
        assert layer.up.kernel.shape == layer.gate.kernel.shape == (24, 12)
        assert layer.attention.query.kernel.shape == (24, 24)
        assert layer.attention.out.kernel.shape == (24, 24)


@pytest.mark.slow
def test_a_tied_embedding_is_pruned_by_what_its_output_reads(slice_of_four):
    model, tokenizer = slice_of_four
    tokens = smollm2.batches(tokenizer, "calibration", 4, 64)
    kept = {}
    for method in ("magnitude", "wanda"):
        result = pt.prune(
            model, tokens, method, sparsity=0.5, structure="fan_in", targets="embed/embedding"
        )
        (layer,) = result.layers
        kept[method] = layer.pruned
        assert result.sparsity == 0.5 and (np.asarray(result.model.embed.embedding[...]) == 0).any()
    assert kept["wanda"] < kept["magnitude"]


@pytest.mark.slow
def test_the_whole_model_speaks_english_and_the_wrong_order_of_rows_does_not():
    model, tokenizer = smollm2.load()
    ids = jnp.asarray([tokenizer.encode("The capital of France is").ids])
    assert tokenizer.decode([int(jnp.argmax(model(ids)[0, -1]))]) == " Paris"
    tokens = smollm2.batches(tokenizer, "evaluation", 2, 106)
    right = smollm2.nats_per_token(model, tokens)
    wrong = smollm2.nats_per_token(smollm2.load(rope="halves")[0], tokens)
    assert right < 3.6 and wrong > right + 1.0, (right, wrong)


@pytest.mark.parametrize("kind", ["prose", "code"])
def test_the_text_is_long_enough_for_the_autoencoders_config(slice_of_four, kind):
    from experiments.configs import sae_smollm2

    config = sae_smollm2.get_config()
    count = -(-config.tokens // (config.length - 1))
    _, tokenizer = slice_of_four
    assert smollm2.batches(tokenizer, "calibration", count, config.length, kind=kind)
    assert smollm2.batches(tokenizer, "evaluation", config.eval_sequences, config.length, kind=kind)
