"""The figures of pod_compile: on a program written by hand, and on small meshes of TPUs."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jaxsparse
from experiments import parallel
from experiments.benchmarks import pod_compile
from experiments.datasets import Dataset
from experiments.task import make_task

WIRE = pod_compile.WIRES["v5e"]
PROGRAM = """
HloModule step

%cheap (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %c = f32[8]{0} copy(%p), backend_config={"estimated_cycles":"10"}
}

%more (q: s32[]) -> pred[] {
  %q = s32[] parameter(0)
  ROOT %lt = pred[] custom-call(%q)
}

%body (b: f32[8]) -> f32[8] {
  %b = f32[8]{0} parameter(0)
  %ar = (s32[4]{0}, s32[2]{0}) all-reduce(%b, %b), to_apply=%add
  ROOT %f = f32[8]{0} fusion(%b), kind=kLoop, calls=%x, backend_config={"estimated_cycles":"100"}
}

%dear (r: f32[8]) -> f32[8] {
  %r = f32[8]{0} parameter(0)
  ROOT %w = f32[8]{0} while(%r), condition=%more, body=%body
}

ENTRY %main (s: f32[8]) -> f32[8] {
  %s = f32[8]{0} parameter(0)
  %ag = (f32[2]{0}, f32[8]{0}) all-gather-start(%s), dimensions={0}
  %i = s32[] custom-call(%s)
  ROOT %cond = f32[8]{0} conditional(%i, %s, %s), branch_computations={%cheap, %dear}
}
"""


def test_a_program_is_followed_along_either_branch():
    both = pod_compile.steps_of(PROGRAM, 6, WIRE, [2, 2])
    assert both["ordinary"]["cycles"] == 10
    assert both["update"]["cycles"] == 600
    gather = {"all-gather": {"count": 1, "bytes": 32, "largest": 32}}
    assert both["ordinary"]["collectives"] == gather
    assert both["update"]["collectives"] == gather | {
        "all-reduce": {"count": 6, "bytes": 6 * 24, "largest": 24}
    }
    assert both["update"]["largest_collective_of_update"] == 24


def test_branches_by_a_predicate_are_told_apart():
    text = PROGRAM.replace(
        "branch_computations={%cheap, %dear}", "true_computation=%dear, false_computation=%cheap"
    )
    assert pod_compile.steps_of(text, 6, WIRE, [2]) == pod_compile.steps_of(PROGRAM, 6, WIRE, [2])


def test_a_sum_over_a_torus_takes_its_bytes_twice_around_and_the_hops():
    seconds = pod_compile._on_wire("all-reduce", 2**30, WIRE, [4, 4])
    assert seconds == pytest.approx(2 * (2**30 * 15 / 16 / (4 * 4.5e10) + 4e-6))


@pytest.fixture(scope="module")
def devices():
    pytest.importorskip("libtpu", reason="libtpu, the TPU compiler, is not installed")
    return pod_compile.devices_of("v5e:2x2")


def test_the_masks_of_a_sharded_optimizer_move_counters_only(devices):
    sharding = NamedSharding(Mesh(devices, "x"), PartitionSpec("x"))
    params = {"kernel": jax.ShapeDtypeStruct((1024, 1024), jnp.float32, sharding=sharding)}
    tx = jaxsparse.rigl(optax.sgd(0.1), 0.9, total_steps=1000)
    state = jax.tree.map(
        lambda x: x.update(sharding=sharding) if x.ndim else x, jax.eval_shape(tx.init, params)
    )
    text = jax.jit(tx.update).lower(params, state, params).compile().as_text()
    both = pod_compile.steps_of(text, 6, WIRE, [2, 2])
    assert not both["ordinary"]["collectives"]
    assert 0 < both["update"]["largest_collective_of_update"] < 1000, "of a leaf of 4 MB"
    assert both["update"]["cycles"] > 2 * both["ordinary"]["cycles"]


@pytest.fixture(scope="module")
def rows(devices):
    """What a small Transformer's training step takes, by method, with sharded parameters."""

    def measure(method):
        config, _ = pod_compile.configure(
            pod_compile.Case("transformer_1b", method, "v5e:2x2", "fsdp")
        )
        config.model_options.update(dim=256, depth=2, heads=2)
        data = Dataset("tokens", {}, lambda record, rng: dict(record), (128,), 512, True)
        lowered, state, shards = pod_compile.lower(config, data, devices)
        program = lowered.compile()
        size = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
        steps = pod_compile.steps_of(program.as_text(), 6, WIRE, [2, 2])
        return steps | {"share": size(shards) * devices.size / size(state)}

    return {m: measure(m) for m in ("dense", "rigl", "global_magnitude")}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["rigl", "global_magnitude"])
def test_on_a_small_mesh_a_training_step_costs_what_the_dense_one_does(rows, method):
    dense, sparse = rows["dense"], rows[method]
    assert sparse["ordinary"]["cycles"] < 1.1 * dense["ordinary"]["cycles"]
    of = lambda row: {k: v["bytes"] for k, v in row["ordinary"]["collectives"].items()}
    assert sum(of(sparse).values()) < 1.01 * sum(of(dense).values()) + 1000
    assert sparse["update"]["largest_collective_of_update"] < 10_000, "of leaves of 2 MB"
    assert np.isclose(sparse["share"], 1.0, rtol=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["resnet50", "transformer_1b"])
def test_on_256_chips_the_state_of_each_is_its_share(devices, model):
    case = pod_compile.Case(model, "rigl", "v5e:16x16", "fsdp")
    config, data = pod_compile.configure(case)
    strategy = parallel.Fsdp(
        batch_size=config.batch_size, devices=pod_compile.devices_of(case.topology)
    )
    state = jax.eval_shape(make_task(config, data, mesh=strategy.mesh).init)
    parts = jax.tree.map(
        lambda x, s: math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize,
        state,
        strategy.shardings(state),
    )
    everything = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    assert sum(jax.tree.leaves(parts)) <= 1.05 * everything / 256
