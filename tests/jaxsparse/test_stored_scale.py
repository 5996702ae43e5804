"""`stored` at scale: memory, sharded blocks, replicas, checkpoints."""

import json
import math
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxsparse
from jaxsparse.nn import BlockSparseLinear, Trained, check_stored, full_gradients

OPTIONS = dict(total_steps=40, update_every=3, drop_fraction=lambda _: 0.4)


class Model(nnx.Module):
    def __init__(self, width, hidden, block, density):
        rngs, options = (
            nnx.Rngs(0),
            dict(block_shape=(block, block), density=density, balanced=True),
        )
        self.up = BlockSparseLinear(width, hidden, rngs=rngs, **options)
        self.down = BlockSparseLinear(hidden, width, rngs=rngs, **options)

    def __call__(self, x):
        return self.down(nnx.relu(self.up(x)))


def setup(width=32, hidden=64, block=4, density=0.5, axis_name=None, **options):
    """Parameters and a training step, and the transformation."""
    graph, params, rest = nnx.split(Model(width, hidden, block, density), Trained, ...)
    tx = jaxsparse.stored(optax.adamw(1e-2), **OPTIONS | options)

    def loss(params, x):
        return ((nnx.merge(graph, params, rest)(x) - jnp.sin(x)) ** 2).mean()

    def step(params, state, x):
        value, grads = jax.value_and_grad(loss, allow_int=True)(params, x)
        if axis_name:
            grads = jax.lax.pmean(full_gradients(grads), axis_name)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    return nnx.to_pure_dict(params), tx, step


def batches(n, rows=16, width=32):
    return [jax.random.normal(jax.random.key(i), (rows, width)) for i in range(n)]


# -- memory -------------------------------------------------------------------------------------------


def sizes(text):
    """The numbers of elements of all arrays in a compiled program."""
    found = re.findall(r"\b(?:f32|f16|bf16|s32|u32|s64|u64|pred|s8|u8)\[([\d,]+)\]", text)
    return [math.prod(map(int, dims.split(","))) for dims in found]


def test_nothing_of_the_dense_size_exists_at_init_step_and_update():
    width, density = 4096, 0.0625  # a panel of scores has as many numbers as a layer's values
    params, tx, step = setup(width, width, 64, density)
    x = jax.ShapeDtypeStruct((8, width), jnp.float32)
    init = jax.jit(tx.init).lower(params).compile()
    run = jax.jit(step, donate_argnums=(0, 1)).lower(params, tx.init(params), x).compile()
    dense = width * width
    for compiled in (init, run):
        assert max(sizes(compiled.as_text())) <= 1.1 * density * dense
        memory = compiled.memory_analysis()
        stored = 2 * density * dense * 4  # bytes of the values of both layers
        assert memory.argument_size_in_bytes < 3.2 * stored  # with two moments
    assert "cond" in run.as_text()  # both branches, the one that moves blocks too, are in the text
    assert memory.temp_size_in_bytes < 4 * stored


def test_a_layer_whose_dense_matrix_fits_no_machine_is_made():
    layer = BlockSparseLinear(
        1 << 20, 1 << 20, block_shape=(512, 512), density=1e-6, use_bias=False, rngs=nnx.Rngs(0)
    )
    assert layer.values.shape == (4, 512, 512)
    tx = jaxsparse.stored(optax.adam(1e-3), rule="set", **OPTIONS)
    tx.init(nnx.state(layer, Trained))


CHILD = """
import json, sys
import jax, jax.numpy as jnp
from jax.experimental import topologies
from tests.jaxsparse.test_stored_scale import setup, sizes

topology, width, density = json.loads(sys.argv[1])
devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
mesh = jax.sharding.Mesh(devices[:1], "x")
place = jax.sharding.NamedSharding(mesh, jax.P())
params, tx, step = setup(width, width, 128, density)
abstract = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place)
args = jax.tree.map(abstract, (params, tx.init(params)))
x = jax.ShapeDtypeStruct((128, width), jnp.float32, sharding=place)
with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(*args, x).compile()
text, memory = compiled.as_text(), compiled.memory_analysis()
kernels = ["block_sparse_matmul", "block_sparse_weight_gradient", "block_scores"]
print(json.dumps([max(sizes(text)), memory.temp_size_in_bytes, [k in text for k in kernels]]))
"""


@pytest.mark.slow
def test_nor_does_it_on_tpu():
    pytest.importorskip("libtpu", reason="needs libtpu, which has wheels for x86-64 Linux only")
    width, density = 2048, 0.0625
    environment = dict(
        os.environ, JAX_PLATFORMS="cpu", XLA_FLAGS="", TPU_SKIP_MDS_QUERY="1",
        ALLOW_MULTIPLE_LIBTPU_LOAD="1", PYTHONPATH=os.pathsep.join(sys.path),
    )  # fmt: skip
    child = [sys.executable, "-c", CHILD, json.dumps(["v5e:2x2", width, density])]
    done = subprocess.run(child, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    largest, temporary, kernels = json.loads(done.stdout)
    assert kernels == [True] * 3
    assert largest <= 1.1 * density * width**2
    assert temporary < 12 * density * width**2 * 4


# -- devices ------------------------------------------------------------------------------------------


def place(tree, mesh):
    """Blocks shared by block columns over the mesh, everything else everywhere."""

    def one(path, x):
        blocks = "values" in jax.tree_util.keystr(path) and jnp.ndim(x) == 3
        return jax.device_put(x, NamedSharding(mesh, P("d") if blocks else P()))

    return jax.tree_util.tree_map_with_path(one, tree)


@pytest.mark.parametrize("rule", ["rigl"])
def test_blocks_shared_by_devices_train_as_on_one(rule):
    mesh = Mesh(jax.devices()[:4], "d")
    params, tx, step = setup(rule=rule, groups=4)
    state = tx.init(params)
    one, many = (params, state), place((params, state), mesh)
    run = jax.jit(step)
    for x in batches(7):
        *one, _ = run(*one, x)
        *many, _ = run(*many, jax.device_put(x, NamedSharding(mesh, P("d"))))
    for name in ("up", "down"):
        a, b = one[0][name], many[0][name]
        np.testing.assert_array_equal(a["places"], b["places"])
        assert (a["places"] != params[name]["places"]).any()
        np.testing.assert_allclose(a["values"], b["values"], atol=1e-5)
        spec = b["values"].sharding.spec
        assert spec[0] == "d" and b["values"].addressable_shards[0].data.shape[0] * 4 == len(
            b["values"]
        )
        assert optax.tree.get(many[1], "mu")[name]["values"].sharding.spec[0] == "d"
    check_stored(many[1])


def test_a_layer_that_knows_how_rows_are_split_multiplies_on_each_device_what_is_there():
    mesh = Mesh(jax.devices()[:4], "d")
    rows = NamedSharding(mesh, P("d"))
    options = dict(block_shape=(4, 4), density=0.5, balanced=True)
    x = jax.random.normal(jax.random.key(0), (8, 16))
    found = []
    for given in (None, rows):
        layer = BlockSparseLinear(16, 16, rows=given, rngs=nnx.Rngs(0), **options)
        layer.due[...] = jnp.ones(4, jnp.int32)
        graph, params, rest = nnx.split(layer, Trained, ...)
        loss = lambda p, x, g=graph, r=rest: (nnx.merge(g, p, r)(x) ** 2).mean()
        x = x if given is None else jax.device_put(x, rows)
        grads = jax.jit(jax.grad(loss, allow_int=True))(params, x)
        found.append(nnx.to_pure_dict(full_gradients(grads)))
    np.testing.assert_allclose(found[0]["values"], found[1]["values"], atol=1e-6)
    norms = [f["scores"] for f in found]  # of the sum, and the sum over devices of those of each
    assert (norms[1] >= norms[0] - 1e-5).all() and (norms[1] > 0).all()


def test_replicas_hold_the_same_blocks_to_the_bit():
    n = 2
    params, tx, step = setup(axis_name="replicas")
    devices = jax.devices()[:n]
    spread = lambda tree: jax.tree.map(lambda x: jnp.stack([x] * n), tree)
    params, state = spread(params), spread(tx.init(params))
    first = params["up"]["places"]
    run = jax.pmap(step, axis_name="replicas", devices=devices)
    for x in batches(7):
        params, state, _ = run(params, state, x.reshape(n, -1, x.shape[-1]))
    for leaf in jax.tree.leaves(params):
        np.testing.assert_array_equal(leaf[0], leaf[1])
    assert (params["up"]["places"] != first).any()


# -- checkpoints --------------------------------------------------------------------------------------


def test_a_run_that_is_restored_goes_on_to_the_bit(tmp_path):
    params, tx, step = setup()
    run, data = jax.jit(step), batches(10)
    carry = params, tx.init(params)
    for x in data[:5]:
        *carry, _ = run(*carry, x)
    with ocp.StandardCheckpointer() as saver:
        saver.save(tmp_path / "5", tuple(carry))
    with ocp.StandardCheckpointer() as saver:
        restored = saver.restore(tmp_path / "5", jax.eval_shape(lambda: tuple(carry)))
    for x in data[5:]:
        *carry, a = run(*carry, x)
        *restored, b = run(*restored, x)
        assert float(a) == float(b)
    jax.tree.map(np.testing.assert_array_equal, tuple(carry), tuple(restored))


def test_a_checkpoint_of_another_capacity_is_refused_with_the_numbers():
    params, tx, _ = setup()
    other, _, _ = setup(density=0.25)
    grads = jax.tree.map(jnp.zeros_like, params)
    with pytest.raises(ValueError, match="'down/values' has room for 64 blocks, its state for 32"):
        tx.update(grads, tx.init(other), params)
