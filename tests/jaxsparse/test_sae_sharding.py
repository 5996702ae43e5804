"""Latents over devices: the same losses, codes and gradients, and no device holds them all."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxsparse import sae

KINDS = {
    "TopK": lambda: sae.TopK(16, 64, k=4, sparse=True, rngs=nnx.Rngs(0)),
    "BatchTopK": lambda: sae.BatchTopK(16, 64, k=4, rngs=nnx.Rngs(0)),
    "ReLU": lambda: sae.ReLU(16, 64, rngs=nnx.Rngs(0)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_losses_codes_and_gradients_are_those_of_one_device(kind):
    mesh = jax.make_mesh((2, 4), ("data", "features"), axis_types=(AxisType.Auto,) * 2)
    graph, params, rest = nnx.split(KINDS[kind](), nnx.Param, ...)
    x = jax.random.normal(jax.random.key(1), (32, 16))

    @jax.jit
    def run(params, rest, x):
        def loss(params):
            model = nnx.merge(graph, params, rest, copy=True)
            return model.loss(x)[0], model.encode(x)

        return jax.value_and_grad(loss, has_aux=True)(params)

    one = run(params, rest, x)
    put = lambda tree: jax.device_put(tree, sae.shardings(tree, mesh, 64))
    many = run(
        put(params), put(rest), jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
    )
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(many)):
        np.testing.assert_allclose(a, b, atol=2e-5)
    slope = many[1]["W_dec"][...]
    assert slope.sharding.shard_shape(slope.shape) == (16, 16)


def test_a_mesh_that_does_not_fit_is_refused():
    mesh = jax.make_mesh((8,), ("features",), axis_types=(AxisType.Auto,))
    with pytest.raises(ValueError, match="d_sae=60: must be a multiple of the 8 devices"):
        sae.shardings({"a": jnp.ones(60)}, mesh, 60)
    with pytest.raises(ValueError, match="axis='latents': the mesh has 'features'"):
        sae.shardings({"a": jnp.ones(64)}, mesh, 64, axis="latents")
