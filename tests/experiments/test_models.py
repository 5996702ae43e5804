"""Models: sizes, shapes, and that a scanned Transformer is the same function."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from experiments import models


def size(model):
    return sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))


@pytest.mark.parametrize(
    ("name", "shape", "classes", "options", "parameters"),
    [
        ("mlp", (40, 1), 10, {}, 15_210),
        ("cnn", (40, 1), 10, {}, 5 * 25 + 25 + 2 * (5 * 25 * 25 + 25) + 5 * 25 * 10 + 10),
        ("cnn", (8, 8, 1), 10, {}, 32_210),
        ("resnet", (32, 32, 3), 10, {"depth": 20}, 272_474),
        ("resnet", (224, 224, 3), 1000, {"depth": 50}, 25_557_032),
        ("resnet", (224, 224, 3), 1000, {"depth": 18}, 11_689_512),
    ],
)
def test_models_have_the_published_number_of_parameters(name, shape, classes, options, parameters):
    model = nnx.eval_shape(lambda: models.create(name, shape, classes, rngs=nnx.Rngs(0), **options))
    assert size(model) == parameters


@pytest.mark.parametrize(
    ("name", "shape"),
    [("mlp", (8, 8, 1)), ("cnn", (8, 8, 1)), ("cnn", (40, 1)), ("vit", (8, 8, 1))],
)
def test_models_map_a_batch_to_logits(name, shape):
    model = models.create(name, shape, 7, rngs=nnx.Rngs(0))
    assert jax.eval_shape(model, jnp.zeros((3, *shape))).shape == (3, 7)


@pytest.mark.slow
def test_layers_under_scan_compute_what_separate_layers_compute():
    options = {"dim": 16, "depth": 3, "heads": 2}
    plain = models.create("transformer", (8,), 11, rngs=nnx.Rngs(0), **options)
    scanned = models.create(
        "transformer", (8,), 11, rngs=nnx.Rngs(0), scan_layers=True, remat=True, **options
    )
    states = [nnx.to_pure_dict(nnx.state(layer)) for layer in plain.layers]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *states)
    for name in ("embed", "norm", "head"):
        nnx.update(getattr(scanned, name), nnx.state(getattr(plain, name)))
    graphdef, state = nnx.split(scanned)
    pure = nnx.to_pure_dict(state)
    pure["layers"] = stacked
    scanned = nnx.merge(graphdef, pure)
    tokens = jnp.arange(16).reshape(2, 8) % 11
    assert jnp.allclose(plain(tokens), scanned(tokens), atol=1e-5)


def test_the_transformer_does_not_see_the_future():
    model = models.create("transformer", (6,), 11, rngs=nnx.Rngs(0), dim=16, depth=2, heads=2)
    tokens = jnp.arange(6)[None]
    changed = tokens.at[0, 4].set(9)
    a, b = model(tokens), model(changed)
    assert jnp.array_equal(a[:, :4], b[:, :4]) and not jnp.allclose(a[:, 4:], b[:, 4:])


@pytest.mark.parametrize(
    ("name", "shape", "options"),
    [
        ("transformer", (16,), {"dim": 64, "depth": 2, "heads": 2, "scan_layers": True}),
        ("vit", (8, 8, 1), {"dim": 64, "depth": 2, "heads": 2}),
    ],
)
def test_with_rows_a_device_works_on_its_part_of_the_batch(name, shape, options):
    mesh = Mesh(np.array(jax.devices()), "data")
    rows = NamedSharding(mesh, P("data"))

    def flops(batch, rows):
        model = nnx.eval_shape(
            lambda: models.create(name, shape, 64, rngs=nnx.Rngs(0), rows=rows, **options)
        )
        graphdef, state = nnx.split(model)
        # Weights are split over the same devices as the batch, by their last axis but one.
        place = lambda x: jax.ShapeDtypeStruct(
            x.shape,
            x.dtype,
            sharding=NamedSharding(mesh, P(*[None] * (x.ndim - 2), "data"))
            if rows is not None and x.ndim > 1 and x.shape[-2] % 8 == 0
            else None,
        )
        x = jax.ShapeDtypeStruct(
            (batch, *shape), jnp.int32 if name == "transformer" else jnp.float32, sharding=rows
        )
        apply = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x))
        return apply.lower(jax.tree.map(place, state), x).compile().cost_analysis()["flops"]

    assert flops(32, rows) < 1.1 * flops(4, None)


def test_a_depth_that_no_residual_network_has_is_refused():
    with pytest.raises(ValueError, match="depth=21: must be 6n"):
        models.create("resnet", (32, 32, 3), 10, rngs=nnx.Rngs(0), depth=21)


def test_a_patch_that_does_not_divide_the_image_is_refused():
    with pytest.raises(ValueError, match="patch=3 does not divide images of 8x8"):
        models.create("vit", (8, 8, 1), 10, rngs=nnx.Rngs(0), patch=3)
