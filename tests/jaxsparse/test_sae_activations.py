"""Activations read from models, measures against NumPy, files of SAELens, and the page of features."""

import json
from html.parser import HTMLParser

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from safetensors import numpy as safetensors

from jaxsparse import sae

VOCABULARY, WIDTH, F = 11, 6, 16
RNG = np.random.default_rng(0)
TOKENS = [jnp.asarray(RNG.integers(0, VOCABULARY, (4, 5)), jnp.int32) for _ in range(6)]


class Block(nnx.Module):
    def __init__(self, rngs):
        self.mlp, self.spare = nnx.Linear(WIDTH, WIDTH, rngs=rngs), nnx.Linear(1, 1, rngs=rngs)
        self.size = 3

    def __call__(self, x):
        return x + jnp.tanh(self.mlp(x))


class Network(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.embed = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
        self.layers = nnx.List([Block(rngs) for _ in range(2)])

    def hidden(self, tokens):
        """The oracle: the same sums by hand."""
        x = self.embed.embedding[...][tokens]
        inner = []
        for layer in self.layers:
            inner.append(x @ layer.mlp.kernel[...] + layer.mlp.bias[...])
            x = x + jnp.tanh(inner[-1])
        return inner, x

    def __call__(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            assert layer.size == 3  # attributes of an intercepted layer are there
            x = layer(x)
        return self.embed.attend(x)


class Plain(linen.Module):
    @linen.compact
    def __call__(self, tokens):
        x = linen.Embed(VOCABULARY, WIDTH, name="embed")(tokens)
        return linen.Dense(VOCABULARY, name="head")(linen.Dense(WIDTH, name="mlp")(x))


@pytest.fixture(scope="module")
def network():
    return Network()


def test_sites_are_read_and_replaced_in_nnx(network):
    inner, last = network.hidden(TOKENS[0])
    read = sae.hooks.capture(network, "layers/1/mlp", TOKENS[0])
    np.testing.assert_allclose(read, inner[1], rtol=1e-5, atol=1e-6)
    given = sae.hooks.capture(network, "layers/1", TOKENS[0], part="input")
    before = network.embed.embedding[...][TOKENS[0]] + jnp.tanh(inner[0])
    np.testing.assert_allclose(given, before, rtol=1e-5, atol=1e-6)
    zeroed = sae.hooks.run(network, "layers/1", jnp.zeros_like, TOKENS[0])
    np.testing.assert_array_equal(zeroed, jnp.zeros_like(zeroed))
    assert type(network.layers[1]) is Block  # the model is as it was
    np.testing.assert_allclose(
        network(TOKENS[0]), last @ network.embed.embedding[...].T, rtol=1e-5, atol=1e-6
    )


def test_sites_are_read_and_replaced_in_linen():
    module = Plain()
    variables = module.init(jax.random.key(0), TOKENS[0])
    model = (module, variables)
    assert sae.hooks.sites(model, TOKENS[0]) == ["embed", "mlp", "head"]
    p = variables["params"]
    expected = p["embed"]["embedding"][TOKENS[0]] @ p["mlp"]["kernel"] + p["mlp"]["bias"]
    (batch,) = sae.Activations(model, "mlp", TOKENS[:1], batch_size=20)
    np.testing.assert_allclose(
        np.sort(batch, axis=0), np.sort(expected.reshape(20, -1), axis=0), rtol=1e-5, atol=1e-6
    )
    out = sae.hooks.run(model, "mlp", jnp.zeros_like, TOKENS[0])
    np.testing.assert_allclose(out, jnp.broadcast_to(p["head"]["bias"], out.shape))


def test_a_site_that_does_not_exist_or_is_not_called_is_named(network):
    with pytest.raises(ValueError, match=r"site='layers/1/mpl'.*layers/1/mlp"):
        sae.hooks.capture(network, "layers/1/mpl", TOKENS[0])
    with pytest.raises(ValueError, match="spare'.*is not called"):
        sae.hooks.capture(network, "layers/0/spare", TOKENS[0])
    with pytest.raises(ValueError, match="batch_size=1000"):
        list(sae.Activations(network, "layers/0", TOKENS, batch_size=1000))


def test_a_stream_hands_out_every_token_once_shuffled_and_the_same_again(network):
    expected = np.concatenate([network.hidden(t)[0][0][:, 1:].reshape(-1, WIDTH) for t in TOKENS])
    stream = sae.Activations(network, "layers/0/mlp", TOKENS, batch_size=8, buffer=4, skip_first=1)
    first, again = (np.concatenate(list(stream)) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert first.shape == expected.shape and np.abs(first - expected).max() > 0.1
    order = lambda rows: rows[np.lexsort(rows.T)]
    np.testing.assert_allclose(order(first), order(expected), rtol=1e-4, atol=1e-5)


def test_padding_is_left_out_and_what_is_not_finite_is_named(network):
    keep = lambda tokens: tokens != 0
    rows = np.concatenate(
        list(sae.Activations(network, "layers/0", TOKENS, batch_size=1, keep=keep).chunks())
    )
    assert len(rows) == sum(int((t != 0).sum()) for t in TOKENS)
    broken = Network()
    broken.embed.embedding[...] = broken.embed.embedding[...].at[3].set(jnp.nan)
    with pytest.raises(ValueError, match="not finite"):
        list(sae.Activations(broken, "layers/0", TOKENS, batch_size=1).chunks())


def test_stored_batches_are_a_function_of_the_step(network, tmp_path):
    stored = sae.Stored.collect(
        network, "layers/0", TOKENS, path=tmp_path / "rows.npy", batch_size=30
    )
    assert len(stored) == 4 and len(stored.rows) == 120
    late = stored.batch(5)
    again = sae.Stored(np.load(tmp_path / "rows.npy"), batch_size=30)
    np.testing.assert_array_equal(again.batch(5), late)
    seen = np.concatenate([again.batch(s) for s in range(4)])
    assert len(np.unique(seen.round(5), axis=0)) == len(np.unique(stored.rows.round(5), axis=0))
    with pytest.raises(ValueError, match="batch_size=500"):
        sae.Stored(stored.rows, batch_size=500)


def test_measures_are_those_of_numpy_over_all_tokens_at_once():
    model = sae.TopK(WIDTH, F, k=3, rngs=nnx.Rngs(0))
    x = (RNG.normal(size=(50, WIDTH)) + 3).astype(np.float32)
    found = sae.evaluate(model, [jnp.asarray(x[:20]), jnp.asarray(x[20:])])
    f, guess = np.asarray(model.encode(x)), np.asarray(model(x), np.float64)
    error = ((x - guess) ** 2).sum()
    expected = {
        "l0": (f != 0).sum(1).mean(),
        "mse": error / 50,
        "explained_variance": 1 - error / ((x - x.mean(0)) ** 2).sum(),
        "cosine": np.mean(
            [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(x, guess)]
        ),
        "bias": (guess**2).sum() / (x * guess).sum(),
        "dead": np.mean((f != 0).sum(0) == 0),
        "encoder_cosine": 1.0,
    }
    for name, value in expected.items():
        np.testing.assert_allclose(getattr(found, name), value, rtol=1e-4, err_msg=name)
    np.testing.assert_allclose(found.density.sum(), found.l0)
    atoms = np.asarray(model.W_dec[...])
    cosine = np.abs(atoms @ atoms.T) - 2 * np.eye(F)
    np.testing.assert_allclose(found.max_cosine, cosine.max(1).mean(), rtol=1e-5)


def test_explained_variance_is_invariant_and_the_bias_of_shrinking_is_the_factor():
    class Shrunk(sae.ReLU):
        factor = 0.9

        def decode(self, f, x=None):
            return self.factor * x

    x = jnp.asarray(RNG.normal(size=(40, WIDTH)), jnp.float32)
    model = Shrunk(WIDTH, F, rngs=nnx.Rngs(0))
    found = sae.evaluate(model, [x])
    np.testing.assert_allclose(found.bias, 0.9, rtol=1e-5)
    np.testing.assert_allclose(sae.evaluate(model, [x * 3]).explained_variance,
                               found.explained_variance, rtol=1e-5)  # fmt: skip


def test_loss_recovered_is_one_for_the_identity_and_zero_for_zeros(network):
    def loss(logits, tokens):
        p = jax.nn.log_softmax(logits[:, :-1])
        return -jnp.mean(jnp.take_along_axis(p, tokens[:, 1:, None], -1))

    found = sae.loss_recovered(network, "layers/1", lambda y: y, TOKENS[:2], loss)
    expected = np.mean([float(loss(network(t), t)) for t in TOKENS[:2]])
    np.testing.assert_allclose(found.original, expected, rtol=1e-5)
    assert found.fraction == 1.0
    assert sae.loss_recovered(network, "layers/1", jnp.zeros_like, TOKENS[:2], loss).fraction == 0.0
    np.testing.assert_allclose(found.ablated, np.log(VOCABULARY), rtol=1e-5)
    model = sae.TopK(WIDTH, F, k=3, rngs=nnx.Rngs(0))
    ours = sae.loss_recovered(network, "layers/1", model, TOKENS[:1], loss)
    by_hand = loss(model(network.hidden(TOKENS[0])[1]) @ network.embed.embedding[...].T, TOKENS[0])
    np.testing.assert_allclose(ours.patched, by_hand, rtol=1e-5)


FAMILIES = [
    (sae.ReLU, {}),
    (sae.TopK, {"k": 3, "by_norm": True}),
    (sae.JumpReLU, {"threshold": 0.3}),
    (sae.Gated, {}),
]


@pytest.mark.parametrize("kind, options", FAMILIES, ids=lambda x: getattr(x, "__name__", ""))
def test_files_of_saelens_are_written_and_read(kind, options, tmp_path):
    model = kind(WIDTH, F, rngs=nnx.Rngs(0), **options)
    model.b_dec[...], model.b_enc[...] = jnp.full(WIDTH, 0.3), jnp.full(F, 0.1)
    sae.saelens.save(model, tmp_path)
    x = jnp.asarray(RNG.normal(size=(9, WIDTH)), jnp.float32)
    back = sae.saelens.load(tmp_path)
    assert type(back) is kind
    np.testing.assert_allclose(back(x), model(x), atol=1e-6)
    theirs = safetensors.load_file(tmp_path / "sae_weights.safetensors")
    np.testing.assert_array_equal(theirs["W_dec"], model.W_dec[...])
    safetensors.save_file(theirs, tmp_path / "sae_weights.safetensors")
    config = json.loads((tmp_path / "cfg.json").read_text())
    (tmp_path / "cfg.json").write_text(json.dumps(config | {"apply_b_dec_to_input": False}))
    z = np.asarray(x @ theirs["W_enc"])  # what SAELens computes with that configuration
    bias = theirs["b_gate" if kind is sae.Gated else "b_enc"]
    shown = np.asarray(sae.saelens.load(tmp_path).pre_activations(x))
    np.testing.assert_allclose(shown, z + bias, atol=1e-5)


def test_what_saelens_has_no_name_for_is_refused(tmp_path):
    with pytest.raises(ValueError, match="KSparse has no layout"):
        sae.saelens.save(sae.KSparse(WIDTH, F, k=2, rngs=nnx.Rngs(0)), tmp_path)
    sae.saelens.save(sae.ReLU(WIDTH, F, rngs=nnx.Rngs(0)), tmp_path)
    config = json.loads((tmp_path / "cfg.json").read_text())
    (tmp_path / "cfg.json").write_text(json.dumps(config | {"architecture": "gated"}))
    with pytest.raises(ValueError, match="b_gate is missing"):
        sae.saelens.load(tmp_path)
    (tmp_path / "sae_weights.safetensors").write_bytes(b"\x00" * 4)
    with pytest.raises(ValueError, match="cut short"):
        sae.saelens.load(tmp_path)


def test_the_page_of_features_shows_where_a_latent_is_largest(network):
    model = sae.TopK(WIDTH, F, k=3, rngs=nnx.Rngs(0))
    codes = np.concatenate([model.encode(network.hidden(t)[1]) for t in TOKENS])
    latent = int(codes.max((0, 1)).argmax())
    examples, density = sae.top_examples(model, network, "layers/1", TOKENS, [latent], count=2)
    tokens, values, peak = examples[0][0]
    np.testing.assert_allclose(values[peak], codes[..., latent].max(), rtol=1e-4)
    np.testing.assert_allclose(density, [(codes[..., latent] != 0).mean()])
    page = Page(sae.dashboard(examples, density, [latent], lambda ids: f"<{ids[0]}>"))
    assert f"Latent {latent}" in page.texts
    assert f"<{tokens[peak]}>" in [text for text, kind, _ in page.marks if kind == "top"]
    with pytest.raises(ValueError, match=f"latents: {F}"):
        sae.top_examples(model, network, "layers/1", TOKENS, [F])


class Page(HTMLParser):
    """Reads a page strictly: every element is closed in order, attributes are not given twice."""

    def __init__(self, text):
        super().__init__()
        self.open, self.texts, self.marks, self.lines = [], [], [], []
        assert text.startswith("<!doctype html>")
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs) and tag != "script"
        if tag == "p" and dict(attrs)["class"] == "text":
            self.lines.append("")
        if tag == "mark":
            self.marks.append(["", dict(attrs)["class"], dict(attrs)["title"]])
        if tag != "meta":  # has no end
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        assert "<" not in data or self.open[-1] in ("mark", "p", "title", "h1", "span")
        self.texts.append(data)
        if self.open and self.open[-1] == "mark":
            self.marks[-1][0] += data
        if self.lines and "p" in self.open:
            self.lines[-1] += data


WORDS = [
    "<script>alert(1)</script>",
    "&amp;",
    '"',
    "'",
    "\0\r",
    "a\nb",
    "</p></body>",
    "<!--",
    "plain",
    "",
]


def test_the_page_is_valid_html_whatever_texts_are_in_it():
    tokens = np.arange(len(WORDS))
    values = np.full(len(WORDS), 0.5)
    values[0], values[8] = 2.0, 0.0
    page = Page(
        sae.dashboard(
            [[(tokens, values, 0)]],
            np.array([0.5]),
            [7],
            lambda ids: WORDS[ids[0]],
            title="</title><script>",
            context=20,
        )  # fmt: skip
    )
    shown = [w for w in WORDS if w not in ("plain", "", "\0\r", "a\nb")]
    found = [text for text, _, _ in page.marks]
    assert [text for text in found if text in WORDS] == shown
    assert {"␀␍", "a↵b", "⟨9⟩"} <= set(found) and "plain" in page.lines[0]
    assert page.marks[0] == [WORDS[0], "top", "2"] and page.marks[1][1:] == ["on", "0.5"]
    assert page.texts.count("</title><script>") == 2


def test_long_contexts_are_cut_around_the_most_active_token_with_dots():
    tokens, values = np.arange(5000), np.zeros(5000)
    values[3000] = values[2999] = 1.0
    make = lambda peak, **o: Page(
        sae.dashboard([[(tokens, values, peak)]], np.ones(1), [0], lambda ids: f" {ids[0]}", **o)
    )
    page = make(3000, context=4)
    assert page.lines == ["1… 2996 2997 2998 2999 3000 3001 3002…"]
    assert [kind for _, kind, _ in page.marks] == ["on", "top"]
    assert len(make(3000, context=10_000).lines[0].split()) == 5001  # and the value
    silent = sae.dashboard([[(tokens, 0 * values, 0)], []], np.zeros(2), [0, 1], str)
    assert not Page(silent).marks and "never active on these texts" in silent
    with pytest.raises(ValueError, match="context=-1"):
        make(0, context=-1)
    with pytest.raises(ValueError, match="1 lists of examples and 1 densities for 2 latents"):
        sae.dashboard([[]], np.ones(1), [0, 1], str)


def test_a_character_of_several_tokens_is_shown_once():
    data = "aé漢".encode()
    decode = lambda ids: bytes(ids).decode(errors="replace")
    tokens, values = np.frombuffer(data, np.uint8), np.array([0.0, 0.0, 0.0, 0.0, 3.0, 0.0])
    page = Page(sae.dashboard([[(tokens, values, 4)]], np.ones(1), [0], decode))
    assert page.lines == ["3aé漢"] and page.marks == [["漢", "top", "3"]]
    cut = Page(sae.dashboard([[(tokens[:4], values[:4] + 1, 0)]], np.ones(1), [0], decode))
    assert cut.lines == ["1aé\ufffd"]
