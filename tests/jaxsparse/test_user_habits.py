"""What users do without reading the manual."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import jaxsparse


class Net(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(8, 16, rngs=rngs)
        self.norm = nnx.BatchNorm(16, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.last = nnx.Linear(16, 4, rngs=rngs)


@pytest.fixture
def net_and_optimizer():
    net = Net(nnx.Rngs(0))
    tx = jaxsparse.static(optax.adam(1e-3), sparsity=0.75, allocation="uniform")
    return net, nnx.Optimizer(net, tx, wrt=nnx.Param)


def test_importing_jaxsparse_imports_nothing_heavy():
    code = (
        "import sys, jaxsparse; heavy = {'matplotlib', 'orbax', 'tensorflow', 'tensorflow_datasets', "
        "'tensorboardX', 'sklearn', 'pallas_kernels', 'experiments', 'jax.experimental.pallas'}; "
        "new = heavy & set(sys.modules); bare = set(sys.argv[1].split(',')); print(sorted(new - bare))"
    )
    peers = (
        "import sys, jax, optax, chex, flax.nnx; print(','.join(sorted(set(sys.modules) & {'orbax', "
        "'tensorflow', 'jax.experimental.pallas'})))"
    )
    run = lambda *args: subprocess.run(
        [sys.executable, "-c", *args], check=True, capture_output=True, text=True
    ).stdout.strip()
    assert run(code, run(peers)) == "[]"


def test_the_package_says_that_it_is_typed():
    import importlib.resources

    assert importlib.resources.files("jaxsparse").joinpath("py.typed").is_file()


def test_an_nnx_module_and_its_optimizer_can_be_summarized(net_and_optimizer):
    summary = jaxsparse.summarize(*net_and_optimizer)
    masked = {r.path for r in summary.rows if r.masked is not None}
    assert masked == {"first/kernel", "last/kernel"}
    assert {r.path for r in summary.rows} == masked | {
        "first/bias", "last/bias", "norm/scale", "norm/bias"
    }  # fmt: skip


def test_the_state_of_an_nnx_module_can_be_masked_before_the_first_step(net_and_optimizer):
    net, optimizer = net_and_optimizer
    nnx.update(net, jaxsparse.apply_masks(nnx.state(net, nnx.Param), optimizer))
    masks = jaxsparse.get_masks(optimizer)
    np.testing.assert_array_equal(net.first.kernel[...] != 0, masks["first"]["kernel"])
    assert jaxsparse.summarize(net, optimizer).sparsity == 0.75


def test_masks_apply_to_trees_with_and_without_nnx_variables(net_and_optimizer):
    net, optimizer = net_and_optimizer
    masks = jaxsparse.get_masks(optimizer)
    wrapped = jaxsparse.masking.apply(nnx.state(net, nnx.Param), masks)
    pure = jaxsparse.masking.apply(nnx.as_pure(nnx.state(net, nnx.Param)), masks)
    assert jax.tree.leaves(pure)[1].sum() == jax.tree.leaves(wrapped)[1].sum()
    assert isinstance(wrapped["first"]["kernel"], nnx.Param)


def test_the_pruned_state_of_a_trained_module_keeps_its_masks_in_fine_tuning():
    net = Net(nnx.Rngs(0))
    state, masks = jaxsparse.prune(nnx.state(net, nnx.Param), 0.5)
    nnx.update(net, state)
    tx = jaxsparse.static(optax.sgd(0.1), masks="from_params")
    optimizer = nnx.Optimizer(net, tx, wrt=nnx.Param)
    found = jaxsparse.get_masks(optimizer)
    for a, b in zip(jax.tree.leaves(masks), jax.tree.leaves(found)):
        np.testing.assert_array_equal(a, b)


def test_a_linen_train_state_gives_its_masks():
    params = {"dense": {"kernel": jnp.ones((8, 4)), "bias": jnp.zeros(4)}}
    tx = jaxsparse.magnitude(optax.adam(1e-3), sparsity=0.5, total_steps=10)
    state = TrainState.create(apply_fn=lambda *_: None, params=params, tx=tx)
    masks = jaxsparse.get_masks(state)
    assert masks["dense"]["bias"] is None
    assert masks["dense"]["kernel"].shape == (8, 4)


def pruned_by(tx, steps=21):
    """The parameters and the state of a run that prunes a layer, its loss the distance to 1."""
    params = {"kernel": jax.random.normal(jax.random.key(0), (16, 32)) / 4}
    x, y = jax.random.normal(jax.random.key(1), (32, 16)), jnp.ones((32, 32))
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        grads = jax.grad(lambda p: jnp.mean((x @ p["kernel"] - y) ** 2))(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(steps):
        params, state = step(params, state)
    return params, state


def pruning(inner=None):
    inner = optax.sgd(0.05) if inner is None else inner
    return jaxsparse.magnitude(inner, sparsity=0.75, total_steps=20, update_every=4)


@pytest.mark.parametrize(
    "tx",
    [
        pruning(),
        optax.chain(optax.clip_by_global_norm(0.1), pruning()),
        pruning(optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(0.05))),
    ],
    ids=["alone", "clip before", "clip inside"],
)
def test_what_stands_before_a_method_or_inside_of_it_leaves_the_network_exactly_sparse(tx, recwarn):
    params, state = pruned_by(tx)
    assert jaxsparse.summarize(params, state).sparsity == 0.75
    assert bool(jax.jit(jaxsparse.check)(params, state))
    jaxsparse.apply_masks(params, state)
    assert not [w for w in recwarn if w.category is UserWarning]


@pytest.mark.parametrize(
    "after",
    [
        optax.clip_by_global_norm(0.1),
        optax.ema(0.5),
        optax.scale(0.5),
        optax.add_decayed_weights(0.1),
    ],
    ids=["clip", "ema", "scale", "decay"],
)
def test_what_stands_after_a_method_is_found_wherever_a_user_looks(after):
    params, state = pruned_by(optax.chain(pruning(), after))
    assert not bool(jax.jit(jaxsparse.check)(params, state))
    outside = int(jnp.sum((params["kernel"] != 0) & ~jaxsparse.get_masks(state)["kernel"]))
    assert f"{outside} nonzero outside the mask" in str(jaxsparse.summarize(params, state))
    with pytest.warns(UserWarning, match=f"{outside} weights of 'kernel'.*put clipping"):
        mended = jaxsparse.apply_masks(params, state)
    assert bool(jaxsparse.check(mended, state))


def test_a_network_that_is_dense_before_the_first_update_is_no_fault(recwarn):
    params = {"kernel": jnp.ones((8, 8))}
    state = pruning().init(params)
    jaxsparse.apply_masks(params, state)
    assert "outside the mask" not in str(jaxsparse.summarize(params, state))
    assert not [w for w in recwarn if w.category is UserWarning]


def test_check_needs_a_state_of_a_method():
    with pytest.raises(ValueError, match="holds no state of a jaxsparse method"):
        jaxsparse.check({"w": jnp.ones(2)}, optax.adam(0.1).init({"w": jnp.ones(2)}))


def test_masks_that_a_user_gave_stay_his():
    params, masks = jaxsparse.prune({"kernel": jax.random.normal(jax.random.key(0), (16, 32))}, 0.5)
    tx = jaxsparse.static(optax.adam(1e-2), masks=masks)

    def step(params, state):
        updates, state = tx.update(params, state, params)
        return optax.apply_updates(params, updates), state

    jax.jit(step, donate_argnums=(0, 1))(params, tx.init(params))
    assert not masks["kernel"].is_deleted()
    assert jaxsparse.masking.count_kept(masks) == 256


def test_pruning_at_once_returns_no_array_of_the_caller():
    params = {"kernel": jnp.ones((8, 8)), "bias": jnp.ones(8)}
    sparse, _ = jaxsparse.prune(params, 0.5)
    jax.jit(lambda p: jax.tree.map(lambda x: x + 1, p), donate_argnums=0)(sparse)
    assert not params["bias"].is_deleted()


@pytest.mark.parametrize("name, packed", [("rigl", False), ("rigl", True), ("st3", False)])
def test_shardings_of_a_state_are_made_from_those_of_the_parameters(name, packed):
    mesh = jax.make_mesh((8,), ("x",))
    rows = jax.NamedSharding(mesh, jax.P("x"))
    params = {"kernel": jnp.arange(512.0).reshape(64, 8), "bias": jnp.ones(8)}
    shardings = {"kernel": rows, "bias": jax.NamedSharding(mesh, jax.P())}
    tx = jaxsparse.make(name, optax.adam(1e-3), sparsity=0.5, total_steps=400, pack_masks=packed)
    place = optax.tree.map_params(
        tx, lambda _, s: s, jax.eval_shape(tx.init, params), shardings,
        transform_non_params=lambda _: None,
    )  # fmt: skip
    state = jax.jit(tx.init, out_shardings=place)(jax.device_put(params, shardings))
    assert state.inner[0].mu["kernel"].sharding == rows
    masks = jax.tree.leaves(state.masks)
    assert [m.sharding.is_equivalent_to(rows, 2) for m in masks] == [True]


@pytest.mark.parametrize("packed", [False, True])
def test_a_state_can_be_pickled_and_serialized_by_flax(packed):
    import pickle

    from flax import serialization

    params = {"kernel": jax.random.normal(jax.random.key(0), (12, 8)), "bias": jnp.ones(8)}
    tx = jaxsparse.rigl(optax.adam(1e-3), 0.5, total_steps=400, pack_masks=packed)
    state = tx.init(params)
    back = pickle.loads(pickle.dumps(state))
    other = serialization.from_bytes(tx.init(params), serialization.to_bytes(state))
    for found in (back, other):
        assert jax.tree.structure(found) == jax.tree.structure(state)
        for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(found)):
            assert np.array_equal(a, b)
    assert int(optax.tree.get(state, "count", filtering=lambda p, _: len(p) == 1)) == 0
