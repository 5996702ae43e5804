"""Autoencoders as SAELens keeps them: `sae_weights.safetensors` and `cfg.json` in a folder.

| here | architecture there | tensors |
| :--- | :--- | :--- |
| `ReLU` | standard | W_enc, b_enc, W_dec, b_dec |
| `TopK` | topk | the same, and `k` in the configuration |
| `JumpReLU` | jumprelu | and threshold |
| `Gated` | gated | W_enc, b_gate, r_mag, b_mag, W_dec, b_dec |
| `BatchTopK` and kin | jumprelu | through `to_jump_relu` |

Weights are `[d_in, d_sae]` and `[d_sae, d_in]`, as here. The other side may not subtract b_dec from the
input (`apply_b_dec_to_input: false`): it is folded into the encoder's bias on loading.
Transcoders are not read or written.
"""

from __future__ import annotations

import json
import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxsparse.sae.batch_topk import BatchTopK
from jaxsparse.sae.relu import Gated, JumpReLU, ReLU
from jaxsparse.sae.scaffold import SAE
from jaxsparse.sae.topk import TopK

_DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16}
_COMMON = {"W_enc": "W_enc", "W_dec": "W_dec", "b_dec": "b_dec"}
_NAMES = {
    "standard": _COMMON | {"b_enc": "b_enc"},
    "topk": _COMMON | {"b_enc": "b_enc"},
    "jumprelu": _COMMON | {"b_enc": "b_enc", "threshold": "threshold"},
    "gated": _COMMON | {"b_enc": "b_gate", "r": "r_mag", "b_mag": "b_mag"},
}


def save(model: SAE, folder: str | pathlib.Path, **config: Any) -> None:
    """Writes a model and its configuration.

    Args:
      model: `ReLU`, `TopK`, `JumpReLU`, `Gated` or `BatchTopK`, of unscaled activations (`fold_scale`).
      folder: made if it is not there.
      **config: more entries of `cfg.json`, such as `metadata={"hook_name": ...}`.

    Raises:
      ValueError: a transcoder, or a family that SAELens has no name for.
    """
    if isinstance(model, BatchTopK):
        model = model.to_jump_relu()
    kinds = {ReLU: "standard", TopK: "topk", JumpReLU: "jumprelu", Gated: "gated"}
    architecture = kinds.get(type(model))
    if architecture is None or model.transcodes:
        raise ValueError(
            f"model: {type(model).__name__} has no layout in SAELens; give one of "
            f"{', '.join(k.__name__ for k in kinds)} or BatchTopK, without d_out"
        )
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        there: np.asarray(getattr(model, here)[...], np.float32)
        for here, there in _NAMES[architecture].items()
    }
    write_tensors(folder / "sae_weights.safetensors", tensors)
    entries = {
        "architecture": architecture, "d_in": model.d_model, "d_sae": model.d_sae,
        "dtype": "float32", "device": "cpu", "apply_b_dec_to_input": True,
        "normalize_activations": "none", "reshape_activations": "none",
    }  # fmt: skip
    if isinstance(model, TopK):
        entries |= {"k": model.k, "rescale_acts_by_decoder_norm": model.by_norm}
    (folder / "cfg.json").write_text(json.dumps(entries | config, indent=1) + "\n")


def load(folder: str | pathlib.Path) -> SAE:
    """Reads a model that `save` or SAELens wrote.

    Raises:
      ValueError: an architecture or normalisation that is not known, entries or tensors that are missing or
        tensors of another shape; each is named.
      FileNotFoundError: no such folder, or not both files in it.
    """
    folder = pathlib.Path(folder)
    try:
        config = json.loads((folder / "cfg.json").read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{folder}: cfg.json is no JSON: {error}") from error
    architecture = config.get("architecture", "standard")
    if architecture not in _NAMES:
        raise ValueError(
            f"{folder}: architecture={architecture!r}; can be read: {', '.join(_NAMES)}"
        )
    if config.get("normalize_activations", "none") not in ("none", None):
        raise ValueError(
            f"{folder}: normalize_activations={config['normalize_activations']!r}; fold the scale "
            'there, so that it is "none"'
        )
    needed = ("d_in", "d_sae", *(["k"] if architecture == "topk" else []))
    if missing := [name for name in needed if name not in config]:
        raise ValueError(f"{folder}: cfg.json lacks {', '.join(missing)}; {architecture} needs it")
    sizes, rngs = (int(config["d_in"]), int(config["d_sae"])), nnx.Rngs(0)
    if architecture == "topk":
        norms = bool(config.get("rescale_acts_by_decoder_norm", False))
        model: SAE = TopK(*sizes, k=int(config["k"]), by_norm=norms, rngs=rngs)
    else:
        family = {"standard": ReLU, "jumprelu": JumpReLU, "gated": Gated}[architecture]
        model = family(*sizes, rngs=rngs)
    tensors = read_tensors(folder / "sae_weights.safetensors")
    for here, there in _NAMES[architecture].items():
        variable = getattr(model, here)
        if there not in tensors or tensors[there].shape != variable.shape:
            found = tensors[there].shape if there in tensors else "missing"
            raise ValueError(f"{folder}: {there} is {found}; {architecture} needs {variable.shape}")
        variable[...] = jnp.asarray(tensors[there], jnp.float32)
    if not config.get("apply_b_dec_to_input", True):
        model.b_enc[...] = model.b_enc[...] + model.b_dec[...] @ model.encoder()
        if isinstance(model, Gated):  # its magnitudes read the same input, scaled
            shift = model.b_dec[...] @ model.encoder()
            model.b_mag[...] = model.b_mag[...] + jnp.exp(model.r[...]) * shift
    return model


def write_tensors(path: pathlib.Path, tensors: dict[str, np.ndarray]) -> None:
    """A safetensors file: the length of a header, the header in JSON, the arrays one after the other."""
    header, offset = {}, 0
    for name, value in tensors.items():
        header[name] = {
            "dtype": {4: "F32", 8: "F64", 2: "F16"}[value.dtype.itemsize],
            "shape": list(value.shape),
            "data_offsets": [offset, offset + value.nbytes],
        }
        offset += value.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    data = b"".join(np.ascontiguousarray(v).tobytes() for v in tensors.values())
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def read_tensors(path: pathlib.Path) -> dict[str, np.ndarray]:
    """The arrays of a safetensors file of floating-point numbers.

    Raises:
      ValueError: the file is cut short, or has a dtype that is not floating point.
    """
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    if len(data) < 8 or 8 + size > len(data):
        raise ValueError(f"{path}: is no safetensors file, or is cut short")
    found = {}
    for name, entry in json.loads(data[8 : 8 + size]).items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in _DTYPES:
            raise ValueError(f"{path}: {name} is {entry['dtype']}; give floating-point tensors")
        start, stop = entry["data_offsets"]
        part = data[8 + size + start : 8 + size + stop]
        if len(part) != stop - start:
            raise ValueError(f"{path}: is cut short in {name}")
        found[name] = np.frombuffer(part, _DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return found
