"""On eight virtual devices: the same run as on one, masks equal on all, state sharded like weights."""

import functools

import contracts
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxsparse
from jaxsparse.testing import by_path, close, exchanged, masks_of, parameters, same, target

STEPS = 5
SHAPE = (16, 32)


def params():
    k = jax.random.split(jax.random.key(0))
    return {
        "a": {"kernel": jax.random.normal(k[0], SHAPE), "bias": jnp.zeros(32)},
        "b": {"kernel": jax.random.normal(k[1], (32, 8))},
    }


def data():
    x = jax.random.normal(jax.random.key(2), (64, 16))
    return x, jnp.sin(x[:, :8])


def loss(p, batch):
    x, y = batch
    return jnp.mean((jnp.tanh(x @ p["a"]["kernel"] + p["a"]["bias"]) @ p["b"]["kernel"] - y) ** 2)


METHODS = {
    "rigl": lambda i, **o: jaxsparse.rigl(i, 0.75, total_steps=8, update_every=2, **o),
    "set": lambda i, **o: jaxsparse.set_(i, 0.75, total_steps=8, update_every=2, **o),
    "global_magnitude": lambda i, **o: jaxsparse.global_magnitude(
        i, 0.75, total_steps=8, end_step=4, update_every=2, **o
    ),
    "st3": lambda i, **o: jaxsparse.st3(i, 0.75, total_steps=8, begin_step=0, end_step=4, **o),
    "autosparse": lambda i, **o: jaxsparse.autosparse(i, total_steps=8, threshold_init=-1.0, **o),
    "sr_ste": lambda i, **o: jaxsparse.sr_ste(i, **o),
}


def step_of(tx, mean=lambda g: g):
    def step(p, s, batch):
        grads = mean(jax.grad(loss)(p, batch))
        updates, s = tx.update(grads, s, p)
        return optax.apply_updates(p, updates), s

    return step


def inner():
    return optax.sgd(0.2, momentum=0.9)


@functools.cache
def alone(name):
    """Parameters and masks of the run on one device."""
    tx = METHODS[name](inner())
    p = params()
    s = tx.init(p)
    step = jax.jit(step_of(tx))
    for _ in range(STEPS):
        p, s = step(p, s, data())
    return jax.device_get((p, masks_of(s)))


def check(name, p, s):
    same(alone(name)[1], masks_of(s), f"{name}: masks")
    close(alone(name)[0], p, f"{name}: weights", rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def mesh():
    return Mesh(np.array(jax.devices()), ("x",))


@pytest.mark.parametrize("name", ["rigl", "set", "st3"])
def test_pmap_of_replicas(name):
    tx = METHODS[name](inner())
    p = params()
    s = tx.init(p)
    everywhere = lambda tree: jax.tree.map(lambda x: jnp.stack([x] * 8), tree)
    step = jax.pmap(step_of(tx, lambda g: jax.lax.pmean(g, "i")), axis_name="i")
    batch = jax.tree.map(lambda x: x.reshape(8, 8, *x.shape[1:]), data())
    p, s = everywhere(p), everywhere(s)
    for _ in range(STEPS):
        p, s = step(p, s, batch)
    for path, m in by_path(s.masks).items():
        assert np.all(m == m[:1]), f"{path}: replicas differ"
    check(name, *jax.tree.map(lambda x: x[0], jax.device_get((p, s))))


@pytest.mark.parametrize("name", ["rigl", "autosparse"])
def test_shard_map_over_the_batch(name, mesh):
    tx = METHODS[name](inner())
    p = params()
    s = tx.init(p)
    step = jax.jit(
        jax.shard_map(
            step_of(tx, lambda g: jax.lax.pmean(g, "x")),
            mesh=mesh, in_specs=(P(), P(), P("x")), out_specs=(P(), P()), check_vma=False,
        )
    )  # fmt: skip
    for _ in range(STEPS):
        p, s = step(p, s, data())
    check(name, p, s)


def sharding_of(mesh):
    """Rows of one kernel and columns of the other on eight devices; the bias everywhere."""
    return {
        "a": {"kernel": NamedSharding(mesh, P("x")), "bias": NamedSharding(mesh, P())},
        "b": {"kernel": NamedSharding(mesh, P(None, "x"))},
    }


def sharded_run(name, mesh, sharding=None, **options):
    tx = METHODS[name](inner(), **options)
    p = jax.device_put(params(), sharding or sharding_of(mesh))
    s = tx.init(p)
    batch = jax.device_put(data(), NamedSharding(mesh, P("x")))
    step = jax.jit(step_of(tx))
    states = [(p, s)]
    for _ in range(STEPS):
        p, s = step(p, s, batch)
        states.append((p, s))
    return step, states


def leaves_like(state, p):
    """The leaves of a state by path that have the shape of a kernel, with that kernel's sharding."""
    kernels = {x.shape: x.sharding for x in jax.tree.leaves(p) if x.ndim == 2}
    for path, x in jax.tree_util.tree_leaves_with_path(state):
        if x.shape in kernels:
            yield jax.tree_util.keystr(path), x, kernels[x.shape]


@pytest.mark.parametrize("name", METHODS)
def test_jit_with_sharded_parameters(name, mesh):
    step, states = sharded_run(name, mesh)
    check(name, *states[-1])
    assert step._cache_size() == 1, "one compilation"
    for t, (p, s) in enumerate(states):
        wrong = [q for q, x, want in leaves_like(s, p) if not x.sharding.is_equivalent_to(want, 2)]
        assert not wrong, f"{wrong} are not sharded like their weights after {t} steps"


# LAMP's score is a sum over the weights of a layer that rank no lower: a sort of each layer. Bi-Mask
# looks for an order of the outputs, and these are what is spread over devices here.
GATHERS = {"lamp", "bi_mask"}


@pytest.mark.parametrize("name", contracts.kinds())
def test_every_method_finds_the_masks_of_one_device_where_weights_are_sharded(name, mesh):
    """Columns of each kernel on eight devices."""
    method = contracts.subject(name)
    split = lambda x: NamedSharding(mesh, P(*[None] * (x.ndim - 1), "x") if x.ndim > 1 else P())

    def spread(tree):
        return jax.tree.map(lambda x: jax.device_put(x, split(x)), tree)

    start = parameters()
    run = method.train(
        spread(start), method.tx.init(spread(start)), spread(target(start)), method.steps
    )
    same(method.run.masks, run.masks, f"{name}: masks")
    close(method.run.params, run.params, f"{name}: weights", rtol=1e-4, atol=1e-5)

    # The step that has just run, which compiles nothing anew. Between devices go counters.
    args = spread(start), method.tx.init(spread(start)), spread(target(start))
    largest = max(exchanged(method.step.lower(*args).compile().as_text()), default=0)
    smallest = min(x.size for x in jax.tree.leaves(start) if x.ndim > 1)
    assert (largest < smallest) == (name not in GATHERS), f"{largest} numbers are exchanged"


def test_packed_masks_keep_the_sharding_of_the_other_axes(mesh):
    split = lambda n: NamedSharding(mesh, P(None, "x") if n == 2 else P())
    sharding = jax.tree.map(lambda x: split(x.ndim), params())
    step, states = sharded_run("rigl", mesh, sharding, pack_masks=True)
    check("rigl", *states[-1])
    assert step._cache_size() == 1
    for t, (_, s) in enumerate(states):
        bits = s.masks["a"]["kernel"].bits
        assert bits.shape == (2, 32)
        assert bits.sharding.shard_shape(bits.shape) == (2, 4), f"after {t} steps"


def test_init_under_jit_places_the_state_like_the_parameters(mesh):
    p = jax.device_put(params(), sharding_of(mesh))
    s = jax.jit(METHODS["st3"](inner()).init)(p)
    # The zeros of an inner optimizer's slots have no sharding under jit; what is ours has.
    for path, x, want in leaves_like(s._replace(inner=None), p):
        assert x.sharding.is_equivalent_to(want, 2), path


def test_random_masks_are_the_same_on_any_number_of_devices(mesh):
    tx = jaxsparse.static(inner(), 0.75, seed=3)
    one = masks_of(tx.init(params()))
    many = masks_of(tx.init(jax.device_put(params(), sharding_of(mesh))))
    under_jit = masks_of(jax.jit(tx.init)(jax.device_put(params(), sharding_of(mesh))))
    same(one, many, "eager")
    same(one, under_jit, "under jit")


@pytest.mark.parametrize("name", ["rigl", "set", "st3"])
def test_shardings_that_are_part_of_types(name):
    """A mesh whose axes are explicit, which is what `jax.make_mesh` makes."""
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
    split = {"a": {"kernel": P(None, "x"), "bias": P("x")}, "b": {"kernel": P("x")}}
    sharded = jax.device_put(params(), jax.tree.map(lambda s: NamedSharding(mesh, s), split))
    tx = METHODS[name](inner())

    @jax.jit
    def step(p, s):
        updates, s = tx.update(jax.tree.map(jnp.sin, p), s, p)
        return optax.apply_updates(p, updates), s

    found = []
    for p in (params(), sharded):
        s = tx.init(p)
        for _ in range(STEPS):
            p, s = step(p, s)
        found.append(jax.device_get((p, masks_of(s))))
    (p, m), (p_8, m_8) = found
    same(m, m_8, "masks")
    close(p, p_8, "weights", rtol=1e-4, atol=1e-5)
