"""Pruned models as files: names and configuration of transformers, and bitmasks."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from experiments import export
from experiments.models import minilm, smollm2
from jaxsparse import post_training as pt


@pytest.fixture(scope="module")
def small():
    """A SmolLM2 of two small blocks with random weights, pruned."""
    config = smollm2.Config(2, 16, 24, 4, 2, vocabulary=32)
    model = smollm2.SmolLM2(config, nnx.Rngs(0))
    return pt.prune(model, [jnp.arange(12).reshape(2, 6)], "wanda", sparsity=0.5, errors=False)


def test_a_packed_matrix_is_the_matrix_and_keeps_zeros_that_the_mask_keeps():
    rng = np.random.default_rng(0)
    for columns in (1, 8, 13):
        x = rng.normal(size=(5, columns)).astype(np.float32)
        mask = rng.random(x.shape) < 0.5
        x = np.where(mask, x, 0)
        x[mask] = np.where(rng.random(mask.sum()) < 0.2, 0, x[mask])
        parts = export.pack(x, mask)
        assert (
            parts["bitmask"].shape == (5, -(-columns // 8)) and parts["bitmask"].dtype == np.uint8
        )
        assert parts["compressed"].size == mask.sum() and parts["shape"].dtype == np.int64
        for row in range(5):
            start = parts["row_offsets"][row]
            values = parts["compressed"][start : start + mask[row].sum()]
            assert np.array_equal(values, x[row, mask[row]])
            bits = [parts["bitmask"][row, i // 8] >> (i % 8) & 1 for i in range(columns)]
            assert np.array_equal(np.asarray(bits, bool), mask[row])
        dense, found = export.unpack(parts)
        assert np.array_equal(dense, x) and np.array_equal(found, mask)
    with pytest.raises(ValueError, match=r"x: has shape \(3,\)"):
        export.pack(np.ones(3))


def llama(tensors, config, tokens):
    """The network as transformers defines it, in NumPy: weights [out, in], rotations of halves."""
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    size = config["head_dim"]
    norm = lambda x, w: x / np.sqrt(np.mean(x**2, -1, keepdims=True) + config["rms_norm_eps"]) * w
    angle = np.arange(tokens.size)[:, None] * config["rope_theta"] ** (
        -np.arange(0, size, 2) / size
    )
    cos, sin = (np.concatenate([f(angle)] * 2, -1)[:, None] for f in (np.cos, np.sin))
    half = lambda x: np.concatenate([-x[..., size // 2 :], x[..., : size // 2]], -1)
    x = tensors["model.embed_tokens.weight"][tokens]
    for i in range(config["num_hidden_layers"]):
        w = lambda name, i=i: tensors[f"model.layers.{i}.{name}.weight"]
        h = norm(x, w("input_layernorm"))
        q = (h @ w("self_attn.q_proj").T).reshape(-1, heads, size)
        k, v = ((h @ w(f"self_attn.{n}_proj").T).reshape(-1, groups, size) for n in "kv")
        q, k = (a * cos + half(a) * sin for a in (q, k))
        k, v = (np.repeat(a, heads // groups, axis=1) for a in (k, v))
        scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(size)
        scores = np.where(np.tril(np.ones(scores.shape[1:], bool)), scores, -np.inf)
        p = np.exp(scores - scores.max(-1, keepdims=True))
        y = np.einsum("hqk,khd->qhd", p / p.sum(-1, keepdims=True), v).reshape(tokens.size, -1)
        x = x + y @ w("self_attn.o_proj").T
        h = norm(x, w("post_attention_layernorm"))
        gate = h @ w("mlp.gate_proj").T
        x = x + (gate / (1 + np.exp(-gate)) * (h @ w("mlp.up_proj").T)) @ w("mlp.down_proj").T
    return norm(x, tensors["model.norm.weight"]) @ tensors["model.embed_tokens.weight"].T


def test_an_exported_language_model_computes_the_same_by_the_definition_of_transformers(
    small, tmp_path
):
    export.save(small.model, tmp_path)
    tensors = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    tokens = np.array([3, 1, 4, 1, 5])
    expected = small.model(jnp.asarray(tokens[None]))[0]
    np.testing.assert_allclose(llama(tensors, config, tokens), expected, atol=1e-4)
    assert config["architectures"] == ["LlamaForCausalLM"] and config["tie_word_embeddings"]


def test_bitmasks_are_read_back_equal_and_are_smaller(small, tmp_path):
    sizes = export.save(small.model, tmp_path / "dense")
    packed = export.save(small.model, tmp_path / "sparse", masks=small.masks)
    assert sizes["written"] == sizes["dense"] > packed["written"]
    dense, sparse = (export.read(tmp_path / name) for name in ("dense", "sparse"))
    assert sorted(dense) == sorted(sparse)
    for name, x in dense.items():
        assert np.array_equal(x, sparse[name]) and x.dtype == sparse[name].dtype
    stored = safetensors.numpy.load_file(tmp_path / "sparse" / "model.safetensors")
    layer = "model.layers.0.mlp.up_proj"
    assert f"{layer}.weight" not in stored and stored[f"{layer}.compressed"].size == 16 * 24 // 2
    about = json.loads((tmp_path / "sparse" / "config.json").read_text())["quantization_config"]
    assert about["sparsity_config"]["format"] == "sparse-bitmask"
    assert about["sparsity_config"]["global_sparsity"] == 0.5
    with pytest.raises(ValueError, match="model=Linear: give a SmolLM2 or a MiniLM"):
        export.save(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), tmp_path)


def test_every_parameter_of_minilm_has_its_name_of_the_file(tmp_path):
    model = minilm.MiniLM(minilm.Config(1, 8, 12, 2, 16, 8), nnx.Rngs(0))
    export.save(model, tmp_path)
    found = export.read(tmp_path)
    assert len(found) == len(jax.tree.leaves(nnx.state(model, nnx.Param))) == 5 + 16
    up = found["encoder.layer.0.intermediate.dense.weight"]
    assert np.array_equal(up.T, model.layers[0].up.kernel[...])
    assert "encoder.layer.0.attention.output.LayerNorm.bias" in found
    assert found["embeddings.token_type_embeddings.weight"].shape == (2, 8)
