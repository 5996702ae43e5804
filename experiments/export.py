"""Pruned models as files that others read: safetensors with the names and the configuration of transformers.

    export.save(result.model, folder)                              # dense, zeros and all
    export.save(result.model, folder, masks=result.masks)          # sparse matrices as bitmasks
    tensors = export.read(folder)                                  # dense arrays by their names, from both

The sparse form is `sparse-bitmask` of compressed-tensors (read with its version 0.11). Of a matrix
`layer.weight` [rows, columns], row by row:

    layer.compressed    [kept]                the values that are kept
    layer.bitmask       [rows, columns / 8]   uint8, the lowest bit first
    layer.shape         [2]                   int64
    layer.row_offsets   [rows]                int64, where the values of a row begin

Half of the weights gone take 53 % of the bytes in float32 (32 bits kept of 64, and two bits of mask).
"""

import json
import math
import os
import pathlib
from typing import Any

import numpy as np
from flax import nnx

from experiments.models import minilm, smollm2
from jaxsparse import targets

PARTS = ("compressed", "bitmask", "shape", "row_offsets")
Tensors = dict[str, np.ndarray]


def pack(x: np.ndarray, mask: np.ndarray | None = None) -> Tensors:
    """The parts of a sparse matrix.

    >>> parts = pack(np.array([[0.0, 2.0, 0.0], [3.0, 0.0, 4.0]]))
    >>> parts["compressed"].tolist(), parts["bitmask"].tolist(), parts["row_offsets"].tolist()
    ([2.0, 3.0, 4.0], [[2], [5]], [0, 1])
    """
    mask = np.asarray(x != 0 if mask is None else mask, bool)
    if x.ndim != 2 or mask.shape != x.shape:
        raise ValueError(
            f"x: has shape {x.shape}, its mask {mask.shape}; give a matrix and its mask"
        )
    counts = mask.sum(axis=1, dtype=np.int64)
    return {
        "compressed": np.ascontiguousarray(x[mask]),
        "bitmask": np.packbits(mask, axis=-1, bitorder="little"),
        "shape": np.asarray(x.shape, np.int64),
        "row_offsets": np.cumsum(counts) - counts,
    }


def unpack(parts: Tensors) -> tuple[np.ndarray, np.ndarray]:
    """The matrix and its mask."""
    shape = tuple(int(n) for n in parts["shape"])
    bits = np.unpackbits(parts["bitmask"], axis=-1, count=shape[-1], bitorder="little")
    mask = bits.reshape(shape).astype(bool)
    dense = np.zeros(shape, parts["compressed"].dtype)
    dense[mask] = parts["compressed"]
    return dense, mask


def _turned(x: np.ndarray, heads: int) -> np.ndarray:
    """Rows of queries or keys [heads * size, in], from rotations of neighbours to rotations of halves."""
    return x.reshape(heads, -1, 2, x.shape[-1]).swapaxes(1, 2).reshape(x.shape)


def _smollm2(model: smollm2.SmolLM2, leaves: Tensors) -> tuple[Tensors, dict[str, Any]]:
    names = {
        "attention/query": "self_attn.q_proj", "attention/key": "self_attn.k_proj",
        "attention/value": "self_attn.v_proj", "attention/out": "self_attn.o_proj",
        "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj",
        "norm1": "input_layernorm", "norm2": "post_attention_layernorm",
    }  # fmt: skip
    c, found = model.config, {}
    for path, x in leaves.items():
        if not path.startswith("layers/"):
            name = "embed_tokens" if path.startswith("embed") else "norm"
            found[f"model.{name}.weight"] = x
            continue
        _, layer, rest = path.split("/", 2)
        part = rest.rpartition("/")[0]
        if c.rope == "interleaved" and part in ("attention/query", "attention/key"):
            x = _turned(x, c.heads if part.endswith("query") else c.groups)
        found[f"model.layers.{layer}.{names[part]}.weight"] = x
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "hidden_size": c.width, "intermediate_size": c.hidden, "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads, "num_key_value_heads": c.groups, "vocab_size": c.vocabulary,
        "head_dim": c.width // c.heads, "rope_theta": c.rope_base, "rms_norm_eps": c.epsilon,
        "max_position_embeddings": 8192, "tie_word_embeddings": True, "torch_dtype": "float32",
        "bos_token_id": 1, "eos_token_id": 2, "attention_bias": False,
    }  # fmt: skip
    return found, config


def _minilm(model: minilm.MiniLM, leaves: Tensors) -> tuple[Tensors, dict[str, Any]]:
    c = model.config
    config = {
        "architectures": ["BertModel"], "model_type": "bert", "hidden_act": "gelu",
        "hidden_size": c.width, "intermediate_size": c.hidden, "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads, "vocab_size": c.vocabulary, "type_vocab_size": c.types,
        "max_position_embeddings": c.positions, "layer_norm_eps": c.epsilon, "torch_dtype": "float32",
        "pad_token_id": 0, "position_embedding_type": "absolute",
    }  # fmt: skip
    return {minilm.their_name(path): x for path, x in leaves.items()}, config


def tensors_of(model: nnx.Module, masks: Any = None) -> tuple[Tensors, Tensors, dict[str, Any]]:
    """Arrays by the names of transformers, masks by the same names, and the configuration.

    Raises:
      ValueError: a model of another class.
    """
    if not isinstance(model, smollm2.SmolLM2 | minilm.MiniLM):
        raise ValueError(f"model={type(model).__name__}: give a SmolLM2 or a MiniLM")

    def theirs(tree: Any) -> tuple[Tensors, dict[str, Any]]:
        leaves = {}
        for path, x in targets.named_leaves(tree):
            x = np.asarray(x)
            leaves[path] = np.ascontiguousarray(x.T) if path.endswith("kernel") else x
        if isinstance(model, minilm.MiniLM):
            return _minilm(model, leaves)
        return _smollm2(model, leaves)

    tensors, config = theirs(nnx.state(model, nnx.Param))
    return tensors, theirs(masks)[0] if masks is not None else {}, config


def save(model: nnx.Module, folder: str | os.PathLike, masks: Any = None) -> dict[str, int]:
    """Writes `model.safetensors` and `config.json`.

    Args:
      model: a SmolLM2 or a MiniLM.
      folder: which is made where there is none.
      masks: a tree like the parameters, None where dense: what has a mask is written in the sparse form.

    Returns:
      Bytes of all arrays: "dense", and as "written".
    """
    import safetensors.numpy

    tensors, kept, config = tensors_of(model, masks)
    written: Tensors = {}
    for name, x in tensors.items():
        if name in kept:
            layer = name.removesuffix(".weight")
            written |= {f"{layer}.{part}": v for part, v in pack(x, kept[name]).items()}
        else:
            written[name] = np.ascontiguousarray(x)
    if kept:
        size = sum(math.prod(m.shape) for m in kept.values())
        zeros = size - sum(int(m.sum()) for m in kept.values())
        layers = {
            name.removesuffix(".weight") for name in tensors if "proj" in name or "dense" in name
        }
        config["quantization_config"] = {
            "quant_method": "compressed-tensors",
            "format": "dense",
            "sparsity_config": {
                "format": "sparse-bitmask",
                "global_sparsity": zeros / size,
                "sparsity_structure": "unstructured",
                "targets": ["Linear"],
                "ignore": sorted(layers - {name.removesuffix(".weight") for name in kept}),
            },
        }
    path = pathlib.Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    safetensors.numpy.save_file(written, path / "model.safetensors", {"format": "pt"})
    (path / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    total = lambda arrays: sum(x.nbytes for x in arrays.values())
    return {"dense": total(tensors), "written": total(written)}


def read(folder: str | os.PathLike) -> Tensors:
    """Dense arrays by their names, of a folder that `save` wrote, in either form."""
    import safetensors.numpy

    found = safetensors.numpy.load_file(pathlib.Path(folder) / "model.safetensors")
    packed = [name.removesuffix(".bitmask") for name in found if name.endswith(".bitmask")]
    for name in packed:
        parts = {part: found.pop(f"{name}.{part}") for part in PARTS}
        found[f"{name}.weight"] = unpack(parts)[0]
    return found
