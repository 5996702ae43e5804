"""Two-view layers and the methods that maintain their masks: Bi-Mask, BDWP, SLoPe."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxsparse
from jaxsparse import METHODS
from jaxsparse.engines import scale_by_age
from jaxsparse.engines.two_view import backward_views
from jaxsparse.leaves import Leaf
from jaxsparse.methods import bdwp, bi_mask
from jaxsparse.methods.backward_pattern import along_outputs
from jaxsparse.methods.bi_mask import best_order
from jaxsparse.methods.slope import double_pruning_loss, slope
from jaxsparse.nn.two_view import (
    Backward,
    SLoPeLinear,
    TwoViewConv,
    TwoViewLinear,
    refresh,
    refresh_model,
    step_cost,
    two_view_matmul,
)
from jaxsparse.structures import NM


def make(name, **options):
    defaults = {"total_steps": 200} if name == "slope" else {}
    if name == "bi_mask":
        defaults["candidates"] = 4
    fn = METHODS[name].fn
    return fn(optax.sgd(0.1), **(defaults | {"structure": NM(2, 4)} | options))


def start(tx: Any, params) -> Any:
    return jax.jit(tx.init)(params)


def advance(tx: Any, grads, state, params) -> tuple[Any, Any]:
    return jax.jit(tx.update)(grads, state, params)


def weights(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def in_groups(mask, m, axis):
    mask = jnp.moveaxis(mask, axis, -1)
    return np.asarray(mask.reshape(*mask.shape[:-1], -1, m).sum(-1))


def leaf_of(w, lead=0):
    return Leaf(0, "kernel", w.shape, lead, NM(2, 4))


def mask_of(state):
    masks: Any = jaxsparse.get_masks(state)
    return np.asarray(masks["kernel"])


def view_of(state, path="kernel"):
    return backward_views(state)[path][0]


def test_the_gradients_of_the_product_are_those_worked_out_by_hand():
    x, f, b, dy = weights(3, 8), weights(8, 4, seed=1), weights(8, 4, seed=2), weights(3, 4, seed=3)
    y, pull_back = jax.vjp(two_view_matmul, x, f, b)
    dx, df, db = pull_back(dy)
    np.testing.assert_allclose(y, x @ f, atol=1e-5)
    np.testing.assert_allclose(dx, dy @ b.T, atol=1e-5)
    np.testing.assert_allclose(df, x.T @ dy, atol=1e-5)
    assert not np.any(db)


def test_leading_axes_of_the_activations_and_vmap_over_stacked_weights():
    x, f = weights(2, 3, 8), weights(2, 8, 4, seed=1)
    y = jax.vmap(two_view_matmul)(x, f, f)
    np.testing.assert_allclose(y, jnp.einsum("lbi,lio->lbo", x, f), rtol=1e-5)
    grad = jax.grad(lambda w: two_view_matmul(x, w, w).sum())(f[0])
    np.testing.assert_allclose(grad, jnp.broadcast_to(x.sum((0, 1))[:, None], (8, 4)), rtol=1e-5)


def test_shapes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"w_bwd \(4, 8\); expected"):
        two_view_matmul(jnp.ones((2, 8)), jnp.ones((8, 4)), jnp.ones((4, 8)))


def test_a_convolution_takes_its_input_gradient_with_the_backward_view():
    layer = TwoViewConv(4, 8, (3, 3), strides=2, rngs=nnx.Rngs(0))
    plain = nnx.Conv(4, 8, (3, 3), strides=2, rngs=nnx.Rngs(1))
    x, b = weights(2, 6, 6, 4), weights(3, 3, 4, 8, seed=5)
    plain.kernel[...] = layer.kernel[...]
    np.testing.assert_allclose(layer(x), plain(x), atol=1e-5)
    layer.backward[...] = b
    dx = jax.grad(lambda x: jnp.sin(layer(x)).sum())(x)
    dy = jnp.cos(plain(x))
    plain.kernel[...] = b
    expected = jax.vjp(plain, x)[1](dy)[0]
    np.testing.assert_allclose(dx, expected, atol=1e-5)


@pytest.mark.parametrize("name", ["bi_mask", "bdwp", "slope"])
def test_both_views_have_n_of_m_in_their_own_direction(name):
    params = {"kernel": weights(16, 24)}
    tx = make(name)
    state = start(tx, params)
    for step in range(3):
        f, b = mask_of(state), view_of(state)
        assert (in_groups(f, 4, 0) == 2).all()
        if name == "bdwp":
            assert (in_groups(b, 4, 1) == 2).all()
            assert (b & ~f).any()
        else:
            assert b.sum() <= f.sum() and not (b & ~f).any()
        if name == "slope":
            assert (in_groups(b, 4, 1) <= 2).all()
        grads = {"kernel": weights(16, 24, seed=step + 1)}
        updates, state = advance(tx, grads, state, params)
        params = optax.apply_updates(params, updates)
        assert not np.any(np.asarray(params["kernel"])[~mask_of(state)])


def test_in_the_order_found_each_group_of_outputs_keeps_at_most_n():
    w = weights(16, 24)
    tx = bi_mask(optax.sgd(0.1), candidates=6, seed=3)
    state = start(tx, {"kernel": w})
    order, b = state.aux.order["kernel"], view_of(state)
    assert np.unique(order).tolist() == list(range(24))
    assert (in_groups(b[:, order], 4, 1) <= 2).all()


def test_more_orders_never_keep_fewer_weights_and_one_is_the_identity():
    w = weights(32, 32)
    kind, leaf = NM(2, 4, axis=-1), leaf_of(w)
    f = along_outputs(leaf_of(w.T), kind, w.T).T
    kept = []
    for candidates in (1, 2, 5, 20):
        order = best_order(leaf, kind, w, f, candidates, jnp.uint32(7))
        kept.append(int(along_outputs(leaf, kind, w, where=f, order=order).sum()))
        if candidates == 1:
            assert order.tolist() == list(range(32))
    assert kept == sorted(kept) and kept[-1] > kept[0]


def test_stacked_layers_have_an_order_each():
    w = weights(3, 8, 16)
    rules = [("kernel", jaxsparse.targets.stacked(1))]
    tx = bi_mask(optax.sgd(0.1), candidates=8, targets=rules)
    state = start(tx, {"kernel": w})
    order, b = state.aux.order["kernel"], view_of(state)
    assert order.shape == (3, 16)
    for i in range(3):
        assert (in_groups(b[i][:, order[i]], 4, 1) <= 2).all()


def test_weights_that_are_n_m_both_ways_lose_nothing_to_the_second_mask():
    tile = jnp.kron(jnp.eye(2), jnp.ones((2, 2)))  # 2 of 4 along rows and along columns
    w = jnp.tile(tile, (2, 3)) * (1 + jnp.abs(weights(8, 12)))
    for tx in (make("bi_mask", candidates=1), make("slope")):
        state = start(tx, {"kernel": w})
        np.testing.assert_array_equal(view_of(state), w != 0)


@pytest.mark.parametrize(
    ("n", "m", "loss"), [(1, 2, 0.125), (2, 4, 0.09375), (2, 8, 0.0584), (4, 8, 0.0684)]
)
def test_pruning_twice_costs_what_the_binomial_formula_says(n, m, loss):
    assert double_pruning_loss(n, m) == pytest.approx(loss, abs=5e-5)
    tx = slope(optax.sgd(0.1), total_steps=10, structure=NM(n, m))
    state = start(tx, {"kernel": weights(512, 512)})
    assert float(jnp.mean(view_of(state))) == pytest.approx(n / m - loss, abs=2.5e-3)


def test_the_cost_of_a_step_counts_two_sparse_products_of_three():
    assert step_cost(2, 8) == 0.5
    assert step_cost(2, 4) == pytest.approx(2 / 3)
    assert step_cost(4, 4) == 1.0


def test_bi_mask_decays_raw_weights_outside_f_only():
    params = {"kernel": weights(8, 8)}
    tx = bi_mask(optax.sgd(0.5), decay=0.1, candidates=1)
    state = start(tx, params)
    f = mask_of(state)
    zeros = {"kernel": jnp.zeros((8, 8))}
    _, new = advance(tx, zeros, state, jaxsparse.apply_masks(params, state))
    z, z_new = state.raw["kernel"], new.raw["kernel"]
    np.testing.assert_allclose(z_new, jnp.where(f, z, z * (1 - 0.5 * 0.1)), rtol=1e-6)


def test_bi_mask_searches_an_order_every_so_many_steps_only():
    params = {"kernel": weights(16, 16)}
    tx = bi_mask(optax.sgd(0.3), update_every=3, candidates=6)
    state, orders = start(tx, params), []
    for step in range(6):
        orders.append(tuple(np.asarray(state.aux.order["kernel"]).tolist()))
        _, state = advance(tx, {"kernel": weights(16, 16, seed=step + 9)}, state, params)
    orders.append(tuple(np.asarray(state.aux.order["kernel"]).tolist()))
    changed = [a != b for a, b in itertools.pairwise(orders)]
    assert changed[:2] == [False, False] and changed[3:5] == [False, False]
    assert changed[2] or changed[5]


def test_slope_moves_no_weight_outside_its_first_mask_and_keeps_the_mask():
    params = {"kernel": weights(16, 16)}
    tx = slope(optax.adamw(0.1, weight_decay=0.1), total_steps=10, update_every=2)
    state = start(tx, params)
    first, views = mask_of(state), [view_of(state)]
    params = jaxsparse.apply_masks(params, state)
    for step in range(4):
        updates, state = advance(tx, {"kernel": weights(16, 16, seed=step + 2)}, state, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_array_equal(mask_of(state), first)
        np.testing.assert_array_equal(params["kernel"] != 0, first)
        views.append(view_of(state))
    moved = [bool((a != b).any()) for a, b in itertools.pairwise(views)]
    assert moved == [False, True, False, True]


def test_adapters_change_nothing_when_inserted_and_train_from_their_step_on():
    layer = SLoPeLinear(8, 4, rank=0, rngs=nnx.Rngs(0))
    x = weights(5, 8)
    before = layer(x)
    layer.insert_adapters(2, nnx.Rngs(1))
    np.testing.assert_array_equal(layer(x), before)

    graphdef, params, views = nnx.split(layer, nnx.Param, Backward)
    tx = slope(optax.adamw(0.1, weight_decay=0.5), total_steps=10, adapter_step=2)
    state = start(tx, params)
    assert list(backward_views(state)) == ["kernel"]

    @jax.jit
    def step(params, state):
        loss = lambda p: (nnx.merge(graphdef, p, views)(x) ** 2).sum()
        updates, state = advance(tx, jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    untrained = params
    for _ in range(2):
        params, state = step(params, state)
    np.testing.assert_array_equal(params["adapter_in"][...], untrained["adapter_in"][...])
    assert not np.any(params["adapter_out"][...])
    params, state = step(params, state)
    assert np.any(params["adapter_out"][...])


def test_an_adapter_that_trains_late_starts_with_one_learning_rate_if_its_age_counts():
    params = {"kernel": weights(4, 4), "adapter_in": weights(4, 1), "adapter_out": weights(1, 4)}
    for aged, size in (
        (True, 0.1),
        (False, 0.1 * 0.1 / (1 - 0.9**41) * np.sqrt((1 - 0.999**41) / 1e-3)),
    ):
        adam = optax.chain(optax.adam(0.1), *[scale_by_age()] * aged)
        tx = slope(adam, total_steps=50, adapter_step=40)
        state, p = start(tx, params), params
        for _ in range(41):
            updates, state = advance(tx, params, state, p)
        np.testing.assert_allclose(np.abs(updates["adapter_in"]), size, rtol=1e-3)


@pytest.mark.parametrize("steps", [1, 10, 99, 100, 250])
def test_adapters_train_in_the_last_percent_and_at_least_in_the_last_step(steps):
    params = {"kernel": weights(4, 4), "adapter_in": weights(4, 1), "adapter_out": weights(1, 4)}
    tx = slope(optax.sgd(0.1), total_steps=steps)
    state = start(tx, params)
    first = steps - max(steps // 100, 1)
    for count in (first - 1, first, steps - 1):
        if count < 0:
            continue
        updates, _ = advance(tx, params, state._replace(count=jnp.int32(count)), params)
        moved = [bool(np.any(updates[k])) for k in ("adapter_in", "adapter_out")]
        assert moved == [count >= first] * 2, count


def test_the_scale_of_the_adapters_is_one_over_the_rank():
    layer = SLoPeLinear(8, 4, rank=2, rngs=nnx.Rngs(0))
    x = weights(5, 8)
    base = TwoViewLinear.__call__(layer, x)
    layer.adapter_out[...] = weights(2, 4)
    extra = x @ layer.adapter_in[...] @ layer.adapter_out[...] / 2
    np.testing.assert_allclose(layer(x), base + extra, atol=1e-5)


@pytest.mark.parametrize("name", ["bi_mask", "bdwp", "slope"])
def test_refresh_hands_the_layers_the_weights_behind_the_backward_mask(name):
    model = TwoViewLinear(16, 8, rngs=nnx.Rngs(0))
    graphdef, params, views = nnx.split(model, nnx.Param, Backward)
    dense = params["kernel"][...]
    tx = optax.chain(optax.clip_by_global_norm(1.0), make(name))
    state = start(tx, params)
    params = jaxsparse.apply_masks(params, state)
    views = jax.jit(refresh)(views, params, state)
    b = view_of(state)
    np.testing.assert_array_equal(views["backward"][...], jnp.where(b, dense, 0))
    x, dy = weights(3, 16), weights(3, 8, seed=1)
    layer = nnx.merge(graphdef, params, views)
    dx = jax.vjp(layer, x)[1](dy)[0]
    np.testing.assert_allclose(dx, dy @ jnp.where(b, dense, 0).T, atol=1e-5)


def test_a_model_trained_in_place_refreshes_in_place_and_dense_layers_keep_one_view():
    model = nnx.Sequential(
        TwoViewLinear(8, 8, rngs=nnx.Rngs(0)), TwoViewLinear(8, 4, rngs=nnx.Rngs(1))
    )
    rules = [("layers/1/kernel", False)]
    optimizer = nnx.Optimizer(model, bi_mask(optax.sgd(0.1), targets=rules), wrt=nnx.Param)
    x = weights(4, 8)

    @nnx.jit
    def step(model, optimizer):
        grads = nnx.grad(lambda m: (m(x) ** 2).sum())(model)
        optimizer.update(model, grads)
        refresh_model(model, optimizer.opt_state)

    step(model, optimizer)
    first, last = model.layers
    b = view_of(optimizer.opt_state, "layers/0/kernel")
    kept = np.asarray(b)
    np.testing.assert_array_equal(np.asarray(first.backward[...] != 0), kept)
    np.testing.assert_allclose(first.backward[...][kept], first.kernel[...][kept], rtol=1e-6)
    np.testing.assert_array_equal(last.backward[...], last.kernel[...])


def test_training_with_two_views_learns():
    """A regression in which both weights of a two-layer network must be found."""
    x = weights(256, 16)
    y = jnp.tanh(x @ weights(16, 8, seed=1)) @ weights(8, 4, seed=2)
    assert _train("bdwp", x, y) < 0.3 * float(jnp.var(y))


def _train(name, x, y, steps=200):
    model = nnx.Sequential(
        TwoViewLinear(16, 64, rngs=nnx.Rngs(0)), jnp.tanh, TwoViewLinear(64, 4, rngs=nnx.Rngs(1))
    )
    graphdef, params, views = nnx.split(model, nnx.Param, Backward)
    tx: Any = METHODS[name].fn(optax.adam(1e-2), structure=NM(2, 4))
    state = start(tx, params)
    params = jaxsparse.apply_masks(params, state)

    def step(carry, _):
        params, views, state = carry
        loss = lambda p: jnp.mean((nnx.merge(graphdef, p, views)(x) - y) ** 2)
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        return (params, refresh(views, params, state), state), value

    start_of_run = (params, refresh(views, params, state), state)
    return float(jax.lax.scan(step, start_of_run, None, length=steps)[1][-1])


@pytest.mark.parametrize("name", ["bdwp", "slope"])
def test_packed_masks_are_the_same_masks(name):
    params = {"kernel": weights(16, 24)}
    plain, packed = make(name), make(name, pack_masks=True)
    a, b = start(plain, params), packed.init(params)
    grads = {"kernel": weights(16, 24, seed=4)}
    _, a = advance(plain, grads, a, params)
    _, b = advance(packed, grads, b, params)
    np.testing.assert_array_equal(view_of(a), view_of(b))


def test_bad_arguments_are_named():
    params = {"kernel": jnp.ones((8, 6))}
    with pytest.raises(ValueError, match="structure=Block"):
        bi_mask(optax.sgd(0.1), structure=jaxsparse.structures.Block(2, 2))
    with pytest.raises(ValueError, match="m=4 does not divide axis -1 of 'kernel'"):
        bdwp(optax.sgd(0.1), structure=NM(2, 4)).init(params)
    with pytest.raises(ValueError, match="candidates=0"):
        bi_mask(optax.sgd(0.1), candidates=0)
    with pytest.raises(ValueError, match="update_every=0"):
        slope(optax.sgd(0.1), total_steps=10, update_every=0)
    with pytest.raises(ValueError, match="adapter_step=-1"):
        slope(optax.sgd(0.1), total_steps=10, adapter_step=-1)
    with pytest.raises(ValueError, match="rank=-1"):
        SLoPeLinear(4, 4, rank=-1, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="no two-view state"):
        tx = jaxsparse.static(optax.sgd(0.1), sparsity=0.5)
        backward_views(start(tx, params))
    layer = TwoViewLinear(4, 4, rngs=nnx.Rngs(0))
    state = bdwp(optax.sgd(0.1), structure=NM(2, 4)).init({"kernel": jnp.ones((4, 4))})
    with pytest.raises(ValueError, match="is no Backward variable"):
        refresh(nnx.state(layer, nnx.Param), nnx.state(layer, nnx.Param), state)
    with pytest.raises(ValueError, match="no leaf 'backward'|no leaf 'kernel'"):
        refresh(nnx.state(layer, Backward), {"other": jnp.ones((4, 4))}, state)
