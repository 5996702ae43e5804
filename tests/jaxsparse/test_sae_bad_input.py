"""Wrong calls of autoencoders, their data, measures and files: each is named, with what would do."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxsparse import sae

D, F = 4, 8
X = np.random.default_rng(0).normal(size=(20, D)).astype(np.float32)
NETWORK = nnx.Sequential(nnx.Linear(D, D, rngs=nnx.Rngs(0)), nnx.relu)


def topk(width=D):
    return sae.TopK(width, F, k=2, rngs=nnx.Rngs(0))


def made(kind, **options):
    return lambda: kind(D, F, rngs=nnx.Rngs(0), **options)


def squared(output, _):
    return jnp.mean(output**2)


@pytest.mark.parametrize(
    "call, message",
    [
        (made(sae.ReLU, l1=-1.0), "l1=-1.0: give a number that is not negative"),
        (made(sae.ReLU, l1=float("nan")), "l1=nan"),
        (made(sae.Gated, l1=-1.0), "l1=-1.0"),
        (made(sae.JumpReLU, l0=-1.0), "l0=-1.0"),
        (made(sae.JumpReLU, pre_act=-1.0), "pre_act=-1.0"),
        (made(sae.JumpReLU, target_l0=0.0), "target_l0=0.0: give a positive number"),
        (made(sae.TopK, k=2.0), "k=2.0: give an integer from 1 to d_sae=8"),
        (lambda: topk().decode(jnp.ones((2, 5))), r"f: shape \(2, 5\); give \[..., 8\]"),
        (lambda: topk().loss(jnp.ones((0, D))), r"x: shape \(0, 4\)"),
        (lambda: topk()(X[:, :3]), r"x: shape \(20, 3\); give \[..., 4\]"),
        (lambda: sae.geometric_median(jnp.ones((0, D))), r"x: shape \(0, 4\)"),
        (lambda: sae.evaluate(topk(), X), r"one has shape \(4,\); give a list of batches"),
        (lambda: sae.evaluate(topk(), [X * np.nan]), "batches: one has NaN"),
        (lambda: sae.max_cosines(jnp.ones((2, 3)), jnp.ones((2, 4))), r"others: shape \(2, 4\)"),
        (
            lambda: sae.Recovery(NETWORK, "layers/0", [X], lambda output, _: output),
            r"loss: gives shape \(20, 4\)",
        ),
        (
            lambda: sae.Recovery(NETWORK, "layers/0", [X], squared)(lambda v: v[:, :2]),
            r"model: makes \(20, 2\) of activations \(20, 4\)",
        ),
        (lambda: sae.Recovery(NETWORK, "layers/0", [X], squared)(topk(5)), "which is d_model"),
        (lambda: sae.Activations(NETWORK, "layers/0", [X], batch_size=1.5), "batch_size=1.5"),
        (lambda: sae.Stored.collect(NETWORK, "layers/0", []), "batches: are empty"),
        (lambda: sae.Stored(np.ones((4, 2), int), batch_size=2), "dtype int64; give .* of floats"),
    ],
)
def test_a_wrong_call_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_rows_that_are_not_finite_are_named_when_a_batch_has_them():
    rows = np.ones((6, 2), np.float32)
    rows[4, 1] = np.nan
    stored = sae.Stored(rows, batch_size=3)
    with pytest.raises(ValueError, match="1 of 3 in a batch are not finite, such as row 4"):
        [stored.batch(step) for step in range(2)]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"k": None}, "cfg.json lacks k; topk needs it"),
        ({"d_in": None, "d_sae": None}, "cfg.json lacks d_in, d_sae"),
        ({"k": 99}, "k=99: give an integer from 1 to d_sae=8"),
        ({"architecture": "gated"}, "b_gate is missing; gated needs"),
        (None, "cfg.json is no JSON"),
    ],
)
def test_a_configuration_of_another_model_or_of_none_is_named(change, message, tmp_path):
    sae.saelens.save(topk(), tmp_path)
    file = tmp_path / "cfg.json"
    config = json.loads(file.read_text()) | (change or {})
    kept = {name: value for name, value in config.items() if value is not None}
    file.write_text("{" if change is None else json.dumps(kept))
    with pytest.raises(ValueError, match=message):
        sae.saelens.load(tmp_path)


def test_a_number_of_numpy_is_an_integer():
    made = sae.TopK(4, 8, k=np.int64(2), rngs=nnx.Rngs(0))
    assert type(made.k) is int
    assert (made(jnp.ones((3, 4))).shape) == (3, 4)
