"""Any pytree of parameters: Flax NNX and Linen, Equinox, plain containers; any kind of leaf."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxsparse
from jaxsparse.targets import stacked
from jaxsparse.testing import by_path

X = jax.random.normal(jax.random.key(0), (16, 8))
Y = jnp.sin(X[:, :4])


def sparse_tx(**options):
    return jaxsparse.rigl(
        optax.adam(1e-2), 0.75, total_steps=12, update_every=2, allocation="uniform", **options
    )


def zeros_of(tree):
    return {p: float((x == 0).mean()) for p, x in by_path(tree).items() if x.ndim > 1}


# -- Containers and frameworks ---------------------------------------------------------------------


class Net(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(8, 16, rngs=rngs), nnx.Linear(16, 4, rngs=rngs)])
        self.norm = nnx.BatchNorm(16, rngs=rngs)

    def __call__(self, x):
        return self.layers[1](nnx.relu(self.norm(self.layers[0](x))))


def test_flax_nnx_with_its_optimizer():
    net = Net(nnx.Rngs(0))
    optimizer = nnx.Optimizer(net, sparse_tx(), wrt=nnx.Param)

    @nnx.jit
    def step(net, optimizer):
        grads = nnx.grad(lambda n: jnp.mean((n(X) - Y) ** 2))(net)
        optimizer.update(net, grads)

    for _ in range(4):
        step(net, optimizer)
    params = nnx.pure(nnx.state(net, nnx.Param))
    assert zeros_of(params) == {"layers/0/kernel": 0.75, "layers/1/kernel": 0.75}
    masks = by_path(jaxsparse.get_masks(optimizer.opt_state))
    assert {p: int(m.sum()) for p, m in masks.items()} == {
        "layers/0/kernel": 32,
        "layers/1/kernel": 16,
    }
    assert all(int(m.sum()) == 4 * m.size // 16 for m in masks.values())


@pytest.mark.parametrize("method, packed", [("rigl", True), ("rigl_itop", False), ("st3", True)])
def test_packed_bits_survive_the_optimizer_of_nnx(method, packed):
    """It hands them back in pieces; only their shapes are lost to who reads them there."""
    net = nnx.Linear(20, 16, rngs=nnx.Rngs(0))
    options = {"total_steps": 8, "pack_masks": packed} | (
        {"update_every": 2} if method != "st3" else {}
    )
    tx = jaxsparse.make(method, optax.adam(1e-2), sparsity=0.75, **options)
    optimizer = nnx.Optimizer(net, tx, wrt=nnx.Param)
    for _ in range(4):  # what the update grows moves a step later
        optimizer.update(net, nnx.grad(lambda n: jnp.mean((n(jnp.eye(20)) - 1) ** 2))(net))
    if not packed:
        kept = jaxsparse.get_masks(optimizer)["kernel"]
        assert kept.sum() == 80 and not np.any(np.asarray(net.kernel[...])[~np.asarray(kept)])
        return
    if method == "rigl":
        assert np.count_nonzero(net.kernel[...]) == 80
    with pytest.raises(ValueError, match="pack_masks=True lose their shapes inside nnx.Optimizer"):
        jaxsparse.get_masks(optimizer)


def test_flax_linen():
    class Linen(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.LayerNorm()(nn.relu(nn.Dense(16)(x)))
            return nn.Dense(4)(x)

    model = Linen()
    params = model.init(jax.random.key(0), X)
    tx = sparse_tx()
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        grads = jax.grad(lambda p: jnp.mean((model.apply(p, X) - Y) ** 2))(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(4):
        params, state = step(params, state)
    assert zeros_of(params) == {"params/Dense_0/kernel": 0.75, "params/Dense_1/kernel": 0.75}


def test_equinox_modules_with_none_leaves():
    model = eqx.nn.MLP(8, 4, 16, 1, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)
    tx = sparse_tx()
    state = tx.init(params)

    @eqx.filter_jit
    def step(params, state):
        def loss(p):
            return jnp.mean((jax.vmap(eqx.combine(p, static))(X) - Y) ** 2)

        updates, state = tx.update(eqx.filter_grad(loss)(params), state, params)
        return eqx.apply_updates(params, updates), state

    for _ in range(4):
        params, state = step(params, state)
    assert zeros_of(params) == {"layers/0/weight": 0.75, "layers/1/weight": 0.75}
    assert jaxsparse.get_masks(state).layers[0].bias is None
    sparse = jaxsparse.apply_masks(params, state)
    assert isinstance(sparse, eqx.nn.MLP)


@pytest.mark.parametrize(
    "tree",
    [
        [jnp.ones((4, 4)), jnp.ones(4)],
        (jnp.ones((4, 4)), None, {"b": jnp.ones(4)}),
        jnp.ones((4, 4)),
        {"a": [(jnp.ones((4, 4)),)], "none": None},
    ],
    ids=["list", "tuple with None", "one array", "nested"],
)
@pytest.mark.parametrize("name", ["static", "magnitude_ste"])
def test_plain_containers(name, tree):
    tx = jaxsparse.make(name, optax.sgd(0.1), sparsity=0.75)
    state = tx.init(tree)
    updates, state = tx.update(tree, state, tree)
    new = optax.apply_updates(tree, updates)
    assert jax.tree.structure(new) == jax.tree.structure(tree)
    assert list(zeros_of(new).values()) == [0.75]
    assert jax.tree.structure(jaxsparse.get_masks(state), is_leaf=lambda x: x is None)


def test_an_empty_tree_and_a_tree_without_kernels():
    tx = jaxsparse.static(optax.sgd(0.1), 0.5)
    state = tx.init({})
    assert tx.update({}, state, {})[0] == {}
    with pytest.warns(UserWarning, match="no leaf is sparsified"):
        tx.init({"bias": jnp.ones(4)})


# -- Kinds of leaves -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rigl", "magnitude", "st3", "magnitude_ste", "autosparse", "set"])
def test_bfloat16_parameters(name):
    options = {"sparsity": 0.75, "total_steps": 12, "update_every": 2}
    method = jaxsparse.METHODS[name]
    tx = method.fn(optax.adam(1e-2), **{k: v for k, v in options.items() if k in method.options})
    params = {"kernel": jax.random.normal(jax.random.key(0), (16, 8)).astype(jnp.bfloat16)}
    state = tx.init(params)
    step = jax.jit(tx.update)
    for _ in range(12):
        updates, state = step(params, state, params)
        params = optax.apply_updates(params, updates)
    assert params["kernel"].dtype == jnp.bfloat16
    mask = jaxsparse.get_masks(state)["kernel"]
    assert not np.any(np.asarray(params["kernel"], np.float32)[~np.asarray(mask)])
    if name not in ("st3", "autosparse"):  # a threshold among equal bfloat16 values prunes them all
        assert int(mask.sum()) == 32


def test_raw_weights_of_bfloat16_parameters_may_be_float32_and_then_do_not_stall():
    tx = jaxsparse.magnitude_ste(optax.sgd(1e-4), 0.5, raw_dtype=jnp.float32)
    params = {"kernel": jnp.array([[1.0], [0.5]], jnp.bfloat16)}
    grads = jax.tree.map(jnp.ones_like, params)
    state = tx.init(params)
    step = jax.jit(tx.update)
    for _ in range(100):
        updates, state = step(grads, state, params)
        params = optax.apply_updates(params, updates)
    raw = jaxsparse.get_raw_params(state)["kernel"]
    assert raw.dtype == jnp.float32 and params["kernel"].dtype == jnp.bfloat16
    np.testing.assert_allclose(raw[:, 0], [0.99, 0.49], rtol=1e-5)


def test_mixed_precision_keeps_the_dtype_of_every_leaf():
    params = {
        "a": {"kernel": jnp.ones((8, 8), jnp.bfloat16)},
        "b": {"kernel": jnp.ones((8, 8), jnp.float32)},
        "c": {"kernel": jnp.ones((8, 8), jnp.float16)},
    }
    tx = jaxsparse.rigl(optax.sgd(0.1), 0.75, total_steps=9, update_every=1)
    state = tx.init(params)
    for _ in range(2):
        updates, state = tx.update(params, state, params)
        new = optax.apply_updates(params, updates)
        assert jax.tree.map(lambda x: x.dtype, new) == jax.tree.map(lambda x: x.dtype, params)
    assert zeros_of(new) == {"a/kernel": 0.75, "b/kernel": 0.75, "c/kernel": 0.75}


def test_integer_leaves_and_scalars_pass_through():
    params = {"kernel": jnp.ones((4, 4)), "table": jnp.arange(6).reshape(2, 3), "t": jnp.float32(2)}
    grads = {"kernel": jnp.ones((4, 4)), "table": jnp.zeros((2, 3), jnp.int32), "t": jnp.float32(1)}
    tx = jaxsparse.static(optax.sgd(0.1), 0.5)
    state = tx.init(params)
    updates, state = tx.update(grads, state, params)
    new = optax.apply_updates(params, updates)
    assert np.array_equal(new["table"], params["table"]) and new["table"].dtype == jnp.int32
    assert float(new["t"]) == pytest.approx(1.9)
    assert jaxsparse.get_masks(state)["table"] is None


def test_convolutions_are_pruned_in_every_structure():
    params = {"conv": {"kernel": jax.random.normal(jax.random.key(0), (3, 3, 8, 16))}}
    s = jaxsparse.structures
    for structure in (None, s.NM(2, 4), s.Block(8, 8), s.Channel(-1), s.Channel(-2), s.FanIn()):
        sparse, _ = jaxsparse.prune(params, 0.5, structure=structure)
        assert zeros_of(sparse) == {"conv/kernel": 0.5}, structure


# -- Stacked layers --------------------------------------------------------------------------------


def test_layers_stacked_by_scan_have_budgets_of_their_own():
    """Ten times smaller weights in one layer do not cost it its share."""
    k = jax.random.split(jax.random.key(0), 3)
    layers = [jax.random.normal(key, (16, 16)) * scale for key, scale in zip(k, (1, 0.1, 1))]
    together = {"kernel": jnp.stack(layers)}
    _, masks = jaxsparse.prune(together, 0.8, targets=[("kernel", stacked())])
    alone = [jaxsparse.prune({"kernel": w}, 0.8)[1]["kernel"] for w in layers]
    assert np.array_equal(masks["kernel"], np.stack(alone))


@pytest.mark.parametrize("allocation", ["uniform", "erk", "er"])
def test_a_stack_is_allocated_as_its_layers_are(allocation):
    w = jnp.ones((3, 16, 16))
    other = {"kernel": jnp.ones((8, 64))}
    one = jaxsparse.prune({"stack": {"kernel": w}, "z": other}, 0.8, allocation=allocation,
                          targets=[("stack", stacked())])[1]  # fmt: skip
    split = {str(i): {"kernel": w[i]} for i in range(3)}
    many = jaxsparse.prune(split | {"z": other}, 0.8, allocation=allocation)[1]
    assert one["stack"]["kernel"].sum((1, 2)).tolist() == [
        int(many[str(i)]["kernel"].sum()) for i in range(3)
    ]
    assert int(one["z"]["kernel"].sum()) == int(many["z"]["kernel"].sum())


def test_rigl_updates_every_layer_of_a_linen_scan():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.relu(nn.Dense(8)(x)), None

    stack = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)()
    params = stack.init(jax.random.key(0), X, None)
    tx = sparse_tx(targets=[("kernel", stacked())])
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        grads = jax.grad(lambda p: jnp.mean((stack.apply(p, X, None)[0] - X) ** 2))(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    before = by_path(jaxsparse.get_masks(state))["params/Dense_0/kernel"]
    for _ in range(3):
        params, state = step(params, state)
    after = by_path(jaxsparse.get_masks(state))["params/Dense_0/kernel"]
    assert after.sum((1, 2)).tolist() == [16] * 3
    assert np.all((before != after).any((1, 2)))


@pytest.mark.parametrize("name", ["autosparse", "st3", "st3_sigma", "sr_ste", "magnitude_ste"])
def test_straight_through_methods_treat_a_stack_as_layers(name):
    """Thresholds, scales and groups belong to one layer of the stack, or to the network."""
    w = jax.random.normal(jax.random.key(0), (2, 8, 4)) * jnp.array([1.0, 3.0]).reshape(2, 1, 1)
    options = {"sparsity": 0.5, "total_steps": 10, "begin_step": 0, "end_step": 0}
    method = jaxsparse.METHODS[name]
    options = {k: v for k, v in options.items() if k in method.options}
    if name == "autosparse":
        options["threshold_init"] = -1.0

    def trained(params, **more):
        tx = method.fn(optax.sgd(0.1), **options, **more)
        state = tx.init(params)
        params = jaxsparse.apply_masks(params, state)
        for _ in range(2):
            updates, state = tx.update(params, state, params)
            params = optax.apply_updates(params, updates)
        return params

    one = trained({"kernel": w}, targets=[("kernel", stacked())])["kernel"]
    many = trained({"a": {"kernel": w[0]}, "b": {"kernel": w[1]}})
    np.testing.assert_allclose(one, np.stack([many["a"]["kernel"], many["b"]["kernel"]]), rtol=1e-5)
