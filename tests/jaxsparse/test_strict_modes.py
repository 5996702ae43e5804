"""Every method under 64-bit types and under JAX's strict modes, and with leaves of size 0.

Shapes are enough: what fails there fails when a step is traced, and nothing is compiled.
"""

import contracts
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxsparse
from jaxsparse import structures
from jaxsparse.testing import masks_of, parameters

METHODS = sorted(jaxsparse.METHODS)


def trace(name, params, grads=None):
    """Traces `init` and two updates of a method; the second takes the state of the first."""
    tx = contracts.subject(name).tx
    state = jax.eval_shape(tx.init, params)
    grads = params if grads is None else grads
    for _ in range(2):
        updates, new = jax.eval_shape(tx.update, grads, state, params)
        describe = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
        assert describe(new) == describe(state), "the state changes"
        assert describe(updates) == describe(params), "updates differ from the parameters"
        state = new
    jax.eval_shape(jaxsparse.apply_masks, params, state) if masks_of(state) is not None else None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("name", METHODS)
def test_with_64_bit_types_enabled(name, dtype):
    with jax.enable_x64(True):
        trace(name, jax.tree.map(lambda x: jnp.asarray(x, dtype), parameters()))


@pytest.mark.parametrize("name", METHODS)
def test_where_ranks_and_dtypes_are_never_promoted(name):
    params = parameters()
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        trace(name, params)


@pytest.mark.parametrize("name", METHODS)
def test_leaves_of_size_0_are_left_alone(name):
    params = {**parameters(), "lora_b": {"kernel": jnp.zeros((0, 16))}, "lora_a": jnp.zeros((8, 0))}
    trace(name, params)


PRUNED = [
    *[(None, name) for name in ("uniform", "erk", "global", "lamp")],
    *[(structures.Block(4, 4), name) for name in ("uniform", "global")],
    *[(x, "uniform") for x in (structures.NM(2, 4), structures.Channel(), structures.FanIn())],
]


@pytest.mark.parametrize("structure, allocation", PRUNED, ids=str)
def test_pruning_once_in_strict_modes_and_with_64_bit_types(structure, allocation):
    k = jax.random.split(jax.random.key(0))
    shapes = {"a": (3, 3, 8, 32), "b": (32, 8)}
    params = {n: jax.random.normal(i, s) for (n, s), i in zip(shapes.items(), k)}
    prune = lambda p: jaxsparse.prune(p, 0.5, structure=structure, allocation=allocation)[1]
    kept = lambda p: {n: int(np.sum(m)) for n, m in jax.jit(prune)(p).items()}
    expected = kept(params)
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        jax.eval_shape(prune, params)
    with jax.enable_x64(True):
        assert kept({n: jnp.asarray(x, "float64") for n, x in params.items()}) == expected


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_counts_with_64_bit_types_are_those_without(dtype):
    with jax.enable_x64(True):
        params = {
            "a": jax.random.normal(jax.random.key(0), (16, 32), dtype),
            "b": jax.random.normal(jax.random.key(1), (32, 8), dtype),
        }
        sparse, _ = jaxsparse.prune(params, 0.75)
        assert {n: int((v != 0).sum()) for n, v in sparse.items()} == {"a": 128, "b": 64}
        tx = jaxsparse.static(optax.sgd(0.1), 0.9, allocation="uniform")
        masks = jaxsparse.get_masks(tx.init({"w": jnp.ones((82, 100), dtype)}))
        assert int(masks["w"].sum()) == 820
