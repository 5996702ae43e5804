"""`stored` of weights that are stored one by one: the masked run with constant fan-in, and its candidates."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxsparse
from jaxsparse import scores
from jaxsparse.nn import (
    BlockSparseLinear,
    CondensedLinear,
    _stored_tree,
    check_stored,
    full_gradients,
)
from jaxsparse.structures import FanIn
from pallas_kernels import Condensed, cpu
from tests.jaxsparse.test_stored import check_same_run, split
from tests.jaxsparse.test_stored_scale import sizes

X = jax.random.normal(jax.random.key(0), (16, 32))


def thinned(state):
    """The first state with an unstructured pattern: outputs keep different numbers of inputs."""
    thin = lambda m: m & (np.arange(m.shape[0])[:, None] % 3 < 1 + np.arange(m.shape[1]) % 3)
    kernels, treedef = jax.tree.flatten(state.masks)
    return state._replace(masks=treedef.unflatten([jnp.asarray(thin(m)) for m in kernels]))


def check_definition(rule, inner, sparsity, uneven=False):
    def layer_of(kernel, mask):
        w = Condensed.from_mask(kernel, mask)
        return CondensedLinear(*w.shape, weight=w, candidates=1.0)

    def weight_of(arrays, shape):
        w = Condensed(arrays["values"], arrays["rows"], arrays["outputs"], shape)
        return w.to_dense(), w.with_values(jnp.ones_like(w.values)).to_dense() != 0

    start = thinned if uneven else lambda state: state
    check_same_run(rule, inner, sparsity, FanIn(), layer_of, weight_of, start=start)


@pytest.mark.parametrize("rule", ["rigl", pytest.param("set", marks=pytest.mark.slow)])
def test_a_stored_run_is_the_masked_run_with_constant_fan_in(rule):
    check_definition(rule, optax.adamw(3e-3, weight_decay=0.01), 0.7)


@pytest.mark.slow
@pytest.mark.parametrize(
    "rule, inner, sparsity, uneven",
    [
        ("magnitude", optax.adamw(3e-3), 0.75, False),
        ("static", optax.adamw(3e-3), 0.7, False),
        ("rigl", optax.sgd(0.05, momentum=0.9), 0.7, True),
        ("set", optax.chain(optax.clip_by_global_norm(0.5), optax.lion(1e-3)), 0.6, True),
        ("magnitude", optax.sgd(0.05, momentum=0.9), 0.89, False),
    ],
)
def test_so_it_is_for_other_rules_optimizers_and_uneven_outputs(rule, inner, sparsity, uneven):
    check_definition(rule, inner, sparsity, uneven=uneven)


# -- candidates, slots, stacks ------------------------------------------------------------------------


def layer(**options):
    return CondensedLinear(32, 8, **dict(density=0.25, rngs=nnx.Rngs(0)) | options)


def moving(inner=None, **options):
    options = dict(total_steps=30, update_every=2) | options
    if not callable(options.get("rule")):
        options = dict(drop_fraction=lambda _: 0.25) | options
    return jaxsparse.stored(inner or optax.sgd(0.1, momentum=0.9), **options)


def loss_of(make):
    return lambda p: ((make(p)(X) - jnp.sin(3 * X[:, :8])) ** 2).mean()


def test_growth_takes_the_steepest_of_the_candidates_which_are_drawn_anew():
    tx, (make, params) = moving(), split(layer(candidates=16))
    state, drawn = tx.init(params), set()
    gradient = jax.jit(jax.grad(loss_of(make), allow_int=True))
    update = jax.jit(tx.update)
    for _ in range(12):
        due = np.asarray(params["due"])
        w = Condensed(params["values"], params["rows"], params["outputs"], (32, 8))
        updates, state = update(full_gradients(gradient(params)), state, params)
        new = optax.apply_updates(
            params, jax.tree.map(lambda u, p: u.astype(p.dtype), updates, params)
        )
        if due.any():
            assert due.sum() == 16
            drawn.add(tuple(due))
            full = X.T @ jax.grad(lambda y: ((y - jnp.sin(3 * X[:, :8])) ** 2).mean())(
                X @ w.to_dense() + params["bias"]
            )
            steep, size = np.abs(np.asarray(full)), np.abs(np.asarray(params["values"]))
            for o in range(8):
                rows = np.asarray(params["rows"])[o]
                kept = rows[np.argsort(-size[o])[:6]]
                free = [r for r in np.flatnonzero(due) if r not in kept]
                best = sorted(free, key=lambda r: -steep[r, o])[:2]
                assert set(np.asarray(new["rows"])[o]) == {*kept, *best}
        params = new
    check_stored(state)
    assert len(drawn) > 3


def test_a_rule_of_ones_own_sees_some_outputs_at_a_time(monkeypatch):
    monkeypatch.setattr(_stored_tree, "_PANEL", 3 * 32)
    seen = []

    @scores.declare(needs_gradient=True)
    def rule(step):
        (view,) = step.views
        seen.append((view.leaf.path, view.w.shape, view.g.shape, view.stats.shape))
        return [jnp.roll(view.m, 1, axis=0) & (view.stats < 32 * 8)]

    tx, (make, params) = moving(rule=rule), split(layer(candidates=1.0))
    state, before = tx.init(params), np.asarray(params["rows"])
    update = jax.jit(tx.update)
    for _ in range(3):
        grads = full_gradients(jax.grad(loss_of(make), allow_int=True)(params))
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    check_stored(state)
    assert set(seen) == {("kernel", (32, 3), (32, 3), (32, 3))}  # 8 outputs: three panels
    np.testing.assert_array_equal(np.sort(params["rows"], 1), np.sort((before + 1) % 32, 1))


def test_slots_of_grown_weights_start_afresh_and_those_of_others_stay():
    tx = moving(optax.sgd(0.0, momentum=0.9), begin_step=3, drop_fraction=lambda _: 0.75)
    make, params = split(layer())
    state, gradient = tx.init(params), jax.jit(jax.grad(loss_of(make), allow_int=True))
    for step in range(4):
        old, before = params, state
        updates, state = tx.update(gradient(params), state, params)
        params = optax.apply_updates(params, updates)
        assert params["due"].any() == (step == 2)
    stays = old["rows"] == params["rows"]
    assert 0 < int(stays.sum()) < stays.size
    trace = lambda s: optax.tree.get(s, "trace")["values"]
    np.testing.assert_array_equal(trace(state)[stays], trace(before)[stays])
    assert not trace(state)[~stays].any() and bool(trace(state)[stays].any())
    assert not params["values"][~stays].any()
    np.testing.assert_array_equal(params["values"][stays], old["values"][stays])


def test_gradients_of_replicas_are_averaged_to_those_of_the_whole_batch():
    """Scores are the gradient itself, not its size: their mean is that of the mean."""
    make, params = split(layer())
    params["due"] = jnp.ones_like(params["due"]).at[8:].set(0)
    loss = lambda p, x: (make(p)(x) ** 2).mean()
    g = jax.grad(loss, allow_int=True)
    halves = [g(params, X[:8])["scores"], g(params, X[8:])["scores"]]
    assert g(params, X)["scores"].shape == (8, 8)
    np.testing.assert_allclose(sum(halves) / 2, g(params, X)["scores"], atol=1e-6)


@pytest.mark.slow
def test_stacked_layers_move_each_for_itself():
    tx = moving(rule="set")
    pair = [split(layer(rngs=nnx.Rngs(i)))[1] for i in range(2)]
    params = jax.tree.map(lambda *x: jnp.stack(x), *pair)
    state = tx.init(params)
    for _ in range(3):
        updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
        params = optax.apply_updates(params, updates)
    grown = []
    for i in range(2):
        old, new = np.asarray(pair[i]["rows"]), np.asarray(params["rows"][i])
        assert all(len(set(row)) == 8 for row in new)
        grown.append([sorted(set(n) - set(o)) for n, o in zip(new, old)])
        assert all(grown[i])
    assert grown[0] != grown[1]


# -- memory -------------------------------------------------------------------------------------------


@pytest.mark.skipif(cpu.why_not(jnp.float32) is not None, reason="no C++ compiler")
@pytest.mark.parametrize("rule", ["rigl", pytest.param("set", marks=pytest.mark.slow)])
def test_nothing_of_the_dense_size_exists_at_init_step_and_update(rule):
    width, density = 4096, 0.0625
    model = CondensedLinear(width, width, density=density, implementation="cpu", rngs=nnx.Rngs(0))
    make, params = split(model)
    tx = moving(optax.adam(1e-3), rule=rule)

    def step(params, state, x):
        value, grads = jax.value_and_grad(lambda p: (make(p)(x) ** 2).mean(), allow_int=True)(
            params
        )
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    x = jax.ShapeDtypeStruct((8, width), jnp.float32)
    init = jax.jit(tx.init).lower(params).compile()
    run = jax.jit(step, donate_argnums=(0, 1)).lower(params, tx.init(params), x).compile()
    for compiled in (init, run):
        assert max(sizes(compiled.as_text())) <= 1.1 * density * width**2
        memory = compiled.memory_analysis()
        held = density * width**2 * 4  # bytes of the values
        assert memory.argument_size_in_bytes < 6.1 * held  # rows twice, two moments, scores
    assert memory.temp_size_in_bytes < 8 * held


# -- bad input ----------------------------------------------------------------------------------------


def test_what_cannot_be_is_named():
    tx, (_, params) = moving(), split(layer())
    rows = np.array(params["rows"])

    def changed(*at, to):
        new = rows.copy()
        new[at] = to
        return params | {"rows": jnp.asarray(new)}

    with pytest.raises(ValueError, match=r"'rows' stores row \d+ of output 3 twice; store it once"):
        tx.init(changed(3, 1, to=rows[3, 0]))
    with pytest.raises(
        ValueError, match="'rows' holds row 33 of output 0, outside of the 32 inputs"
    ):
        tx.init(changed(0, 0, to=33))
    with pytest.raises(ValueError, match="'rows' stores nothing"):
        tx.init(changed(slice(None), to=32))
    with pytest.raises(ValueError, match=r"'rows' has shape \(8, 7\), .* must be \(8, 8\)"):
        tx.init(params | {"rows": params["rows"][:, 1:]})
    with pytest.raises(ValueError, match=r"'due' has shape \(\), .* must be"):
        tx.init(params | {"due": jnp.int32(0)})
    with pytest.raises(ValueError, match="'values' has no 'due' beside it"):
        tx.init({k: v for k, v in params.items() if k != "due"})
    with pytest.raises(ValueError, match="'values' keeps no candidates for growth by gradient"):
        tx.init(split(layer(candidates=0))[1])
    moving(rule="set").init(split(layer(candidates=0))[1])
    with pytest.raises(ValueError, match="groups=2: outputs that store their weights one by one"):
        moving(groups=2).init(params)
    other = tx.init(split(layer(density=0.5))[1])
    grads = jax.tree.map(jnp.zeros_like, params)
    with pytest.raises(ValueError, match="room for 8 weights of an output, its state for 16"):
        tx.update(grads, other, params)


def test_layers_that_cannot_be_are_named():
    cases = [
        (dict(density=0.001), "density=0.001 stores none of the 32 inputs"),
        (dict(density=1.5), "density=1.5 stores .* or more than there are"),
        (dict(candidates=33), "candidates=33: give a share of the 32 inputs, .* from 1 to 32"),
        (dict(candidates=0.0001 - 1), "candidates=-0.9999: give a share"),
        (dict(candidates=True), "candidates=True: give a share"),
        (dict(rngs=None), "density=None or rngs=None: give both"),
        (dict(weight=Condensed.from_dense(jnp.eye(8))), "density=0.25 and a weight are given"),
        (dict(density=None, weight=Condensed.from_dense(jnp.eye(8))), r"it must be \(32, 8\)"),
    ]
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            layer(**options)
    with pytest.raises(ValueError, match="fan_in=9 must be an integer from 1 to 8"):
        Condensed.random(jax.random.key(0), (8, 4), fan_in=9)
    with pytest.raises(ValueError, match="candidates=5: give a share of the 4 block rows"):
        BlockSparseLinear(16, 16, block_shape=(4, 4), density=0.5, candidates=5, rngs=nnx.Rngs(0))


def test_rows_at_random_are_distinct_and_cover_all_inputs():
    for make in (
        Condensed.random,
        jax.jit(Condensed.random, static_argnums=1, static_argnames="fan_in"),
    ):
        w = make(jax.random.key(0), (20, 50), fan_in=6)
        assert all(len(set(row)) == 6 for row in np.asarray(w.rows).tolist())
        assert set(np.asarray(w.rows).ravel().tolist()) == set(range(20))
        assert 0.8 < float(w.values.std()) * 6**0.5 < 1.2
