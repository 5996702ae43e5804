"""`stored`: the same run as under masks, with stored values only; and what it refuses."""

import functools
import inspect
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxsparse
from jaxsparse import scores
from jaxsparse.nn import BlockSparseLinear, CondensedLinear, Trained, check_stored, full_gradients
from jaxsparse.structures import Block
from pallas_kernels import BlockSparse

BLOCK, SHAPE = (4, 4), (16, 16)
SWAPPING = ("rigl", "set", "momentum")
X = jax.random.normal(jax.random.key(0), (8, 16))


class MLP(nnx.Module):
    def __init__(self, rngs):
        self.first, self.second = nnx.Linear(32, 64, rngs=rngs), nnx.Linear(64, 32, rngs=rngs)
        self.head = nnx.Linear(32, 4, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.second(nnx.relu(self.first(x)))))


def layer(**options):
    options = dict(density=0.5, balanced=True, rngs=nnx.Rngs(0)) | options
    return BlockSparseLinear(*SHAPE, block_shape=BLOCK, **options)


def split(model, wrt=Trained):
    graph, params, rest = nnx.split(model, wrt, ...)
    return lambda p: nnx.merge(graph, p, rest), nnx.to_pure_dict(params)


def loss_of(make):
    return lambda p: ((make(p)(X) - 1.0) ** 2).mean()


def train(tx, steps=12, model=None, state=None):
    """Parameters, state and losses after some steps on one layer; jitted as one loop."""
    make, params = split(model or layer())

    def step(carry, _):
        p, s = carry
        loss, g = jax.value_and_grad(loss_of(make), allow_int=True)(p)
        u, s = tx.update(full_gradients(g), s, p)
        return (optax.apply_updates(p, u), s), loss

    @jax.jit
    def run(p, s):
        return jax.lax.scan(step, (p, s), None, length=steps)

    (params, state), losses = run(params, tx.init(params) if state is None else state)
    return params, state, losses


def weight(params):
    return BlockSparse(params["values"], params["places"], SHAPE, BLOCK)


def moving(inner, **options):
    options = dict(rule="rigl", total_steps=30, update_every=2) | options
    if options["rule"] in SWAPPING:
        options = dict(drop_fraction=lambda _: 0.3) | options
    return jaxsparse.stored(inner, **options)


# -- the definition ----------------------------------------------------------------------------------


def both_runs(rule, inner, sparsity, structure, layer_of, start=lambda state: state, steps=300):
    """The same run under masks and as stored: parameters, masks, and losses of each.

    `layer_of(kernel, mask)` is a stored layer, and `start` changes the masked method's first state.
    """
    rng = np.random.default_rng(0)
    xs = jnp.asarray(rng.normal(size=(steps, 16, 32)), jnp.float32)
    ys = jnp.argmax(xs @ rng.normal(size=(32, 4)), -1)
    method = {"set": jaxsparse.set_}.get(rule) or getattr(jaxsparse, rule)
    timing = {} if rule == "static" else dict(total_steps=steps, update_every=10)
    targets = [("(first|second)/kernel", True), (".*", False)]
    options = dict(structure=structure, allocation="uniform", targets=targets, seed=3)
    masked = method(inner, sparsity, **options, **timing)
    final = dict(sparsity=sparsity) if rule == "magnitude" else {}
    stored = jaxsparse.stored(inner, rule=rule, seed=3, **timing, **final)

    dense, params = split(MLP(nnx.Rngs(0)), nnx.Param)
    state = start(masked.init(params))
    params, masks = jaxsparse.apply_masks(params, state), jaxsparse.get_masks(state)
    model = MLP(nnx.Rngs(0))
    for name in ("first", "second"):
        setattr(model, name, layer_of(params[name]["kernel"], masks[name]["kernel"]))
    sparse, arrays = split(model)

    def loss(make, p, x, y):
        return optax.softmax_cross_entropy_with_integer_labels(make(p)(x), y).mean()

    def step(tx, make, p, s, x, y):
        value, g = jax.value_and_grad(functools.partial(loss, make), allow_int=True)(p, x, y)
        u, s = tx.update(g, s, p)
        return optax.apply_updates(p, u), s, value

    def pair(carry, batch):
        p, s, q, t = carry
        p, s, a = step(masked, dense, p, s, *batch)
        q, t, b = step(stored, sparse, q, t, *batch)
        return (p, s, q, t), (a, b)

    carry = params, state, arrays, stored.init(arrays)
    run = jax.jit(lambda carry, data: jax.lax.scan(pair, carry, data))
    (params, state, arrays, end), losses = run(carry, (xs, ys))
    check_stored(end)
    return masks, params, jaxsparse.get_masks(state), arrays, losses


def check_same_run(rule, inner, sparsity, structure, layer_of, weight_of, **options):
    """`weight_of(arrays, shape)` is what a stored layer holds, and where."""
    found = both_runs(rule, inner, sparsity, structure, layer_of, **options)
    first, params, masks, arrays, (masked, stored) = found
    np.testing.assert_allclose(masked, stored, atol=1e-5)
    assert masked[-50:].mean() < masked[:50].mean()
    for name in ("first", "second"):
        kernel, mask = params[name]["kernel"], np.asarray(masks[name]["kernel"])
        matrix, held = weight_of(arrays[name], kernel.shape)
        np.testing.assert_allclose(matrix, kernel, atol=1e-5)
        np.testing.assert_array_equal(held, mask)
        assert (rule == "static") == np.array_equal(mask, first[name]["kernel"])


def check_definition(rule, inner, sparsity):
    def layer_of(kernel, mask):
        w = BlockSparse.from_mask(kernel, mask, (8, 8))
        return BlockSparseLinear(*w.shape, block_shape=(8, 8), weight=w)

    def weight_of(arrays, shape):
        w = BlockSparse(arrays["values"], arrays["places"], shape, (8, 8))
        return w.to_dense(), np.kron(w.block_mask, np.ones((8, 8))) > 0

    check_same_run(rule, inner, sparsity, Block(8, 8), layer_of, weight_of)


@pytest.mark.parametrize("rule", ["rigl", "set"])
def test_a_stored_run_is_the_masked_run_of_the_same_rule_and_seed(rule):
    check_definition(rule, optax.adamw(3e-3, weight_decay=0.01), 0.7)


@pytest.mark.slow
@pytest.mark.parametrize(
    "rule, inner, sparsity",
    [
        ("magnitude", optax.adamw(3e-3), 0.75),
        ("static", optax.adamw(3e-3), 0.7),
        ("rigl", optax.sgd(0.05, momentum=0.9), 0.7),
        ("rigl", optax.chain(optax.clip_by_global_norm(0.5), optax.lion(1e-3)), 0.8),
        ("magnitude", optax.sgd(0.05, momentum=0.9), 0.89),
    ],
)
def test_so_it_is_for_other_rules_and_optimizers(rule, inner, sparsity):
    check_definition(rule, inner, sparsity)


# -- a pattern that is data ---------------------------------------------------------------------------

INSIDE = {
    "adamw": optax.adamw(1e-2),
    "add_noise": optax.chain(optax.add_noise(0.1, 0.5, key=0), optax.sgd(1e-2)),
    "complete decay": optax.chain(optax.sgd(1e-2), optax.add_decayed_weights(-1.0)),
    "ema": optax.chain(optax.adam(1e-2), optax.ema(0.9)),
    "adafactor": optax.adafactor(1e-2, min_dim_size_to_factor=2),
    "sgd": optax.sgd(1e-2, momentum=0.9, nesterov=True),
    "adabelief": optax.adabelief(1e-2),
    "adagrad": optax.adagrad(1e-2),
    "adadelta": optax.adadelta(1e-2),
    "adamax": optax.adamax(1e-2),
    "amsgrad": optax.amsgrad(1e-2),
    "fromage": optax.fromage(1e-2),
    "lamb": optax.lamb(1e-2),
    "lars": optax.lars(1e-2),
    "lion": optax.lion(1e-3),
    "noisy_sgd": optax.noisy_sgd(1e-2, key=0),
    "novograd": optax.novograd(1e-2),
    "optimistic": optax.optimistic_gradient_descent(1e-2),
    "radam": optax.radam(1e-2),
    "rmsprop": optax.rmsprop(1e-2, momentum=0.9),
    "rprop": optax.rprop(1e-2),
    "sign_sgd": optax.sign_sgd(1e-2),
    "sm3": optax.sm3(1e-2),
    "yogi": optax.yogi(1e-2),
    "muon": optax.contrib.muon(1e-2),
    "prodigy": optax.contrib.prodigy(1.0),
    "schedule_free": optax.contrib.schedule_free_adamw(1e-2),
    "dadapt": optax.contrib.dadapt_adamw(1.0),
    "sophia-like cap": optax.chain(optax.clip(0.1), optax.adaptive_grad_clip(0.1), optax.sgd(0.1)),
}
QUICK = ("adamw", "add_noise", "complete decay", "adafactor")


def check_inside(name):
    model = layer()
    params, state, losses = train(moving(INSIDE[name], rule="set"), steps=9, model=model)
    check_stored(state)
    first = BlockSparse(model.values[...], model.places[...], SHAPE, BLOCK)
    assert params["places"].dtype == jnp.int32
    assert int(weight(params).block_mask.sum()) == first.num_blocks
    assert bool((weight(params).block_mask != first.block_mask).any())
    assert bool(jnp.isfinite(losses).all())
    layer(weight=weight(params), density=None, balanced=False, rngs=None)  # a pattern that is one
    moving(INSIDE[name]).init(params)


@pytest.mark.parametrize("name", QUICK)
def test_places_stay_places_whatever_the_inner_optimizer_does(name):
    check_inside(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(INSIDE) - set(QUICK)))
def test_so_it_is_over_the_optimizers_of_optax(name):
    check_inside(name)


OUTSIDE = {
    "add_noise": optax.add_noise(0.1, 0.5, key=0),
    "complete decay": optax.add_decayed_weights(-1.0),
    "scale": optax.scale(0.5),
}


@pytest.mark.parametrize(
    "name",
    ["scale", *(pytest.param(n, marks=pytest.mark.slow) for n in ("add_noise", "complete decay"))],
)
def test_what_changes_places_from_outside_is_refused(name):
    tx = optax.chain(moving(optax.sgd(1e-2)), OUTSIDE[name])
    params, state, _ = train(tx, steps=6)
    assert bool(jnp.isnan(params["values"]).any())  # compiled, it shows
    with pytest.raises(ValueError, match="places were changed by something else than `stored`"):
        check_stored(state)
    make, params = split(layer())
    state, gradient = tx.init(params), jax.jit(jax.grad(loss_of(make), allow_int=True))
    with pytest.raises(ValueError, match="put it inside, around the optimizer of the values"):
        for _ in range(6):
            updates, state = tx.update(full_gradients(gradient(params)), state, params)
            params = optax.apply_updates(params, updates)


def test_the_average_of_two_patterns_is_refused_by_name():
    (make, a), (_, b) = split(layer()), split(layer(rngs=nnx.Rngs(1)))
    means = [
        jax.tree.map(lambda x, y: (x + y) / 2, a, b),
        optax.incremental_update(a, b, 0.5),
    ]
    for mean in means:
        with pytest.raises(ValueError, match="places.dtype=float32 must be an integer type"):
            make(mean)(X)


# -- wrappers and frameworks --------------------------------------------------------------------------

WRAPPERS = {
    "chain": lambda: optax.chain(optax.clip_by_global_norm(1.0), moving(optax.adam(1e-2))),
    "MultiSteps": lambda: optax.MultiSteps(moving(optax.adam(1e-2)), 2).gradient_transformation(),
    "apply_if_finite": lambda: optax.apply_if_finite(moving(optax.adam(1e-2)), 3),
    "partition": lambda: optax.partition(
        {"a": moving(optax.adam(1e-2)), "b": optax.sgd(0.1)},
        lambda p: {name: "b" if name == "bias" else "a" for name in p},
    ),
    "inject": lambda: optax.inject_hyperparams(lambda rate: moving(optax.adam(rate)))(rate=1e-2),
}


@pytest.mark.parametrize("name", ["chain", "MultiSteps", "apply_if_finite", "partition"])
def test_it_moves_inside_of_the_wrappers_of_optax(name):
    params, state, losses = train(WRAPPERS[name]())
    check_stored(state)
    assert losses[-1] < losses[0]
    assert bool((params["places"] != layer().places[...]).any())


@pytest.mark.slow
def test_multi_steps_of_equal_batches_is_the_plain_run_with_each_step_twice():
    plain, _, _ = train(moving(optax.adam(1e-2)), steps=6)
    twice, _, _ = train(WRAPPERS["MultiSteps"](), steps=12)
    np.testing.assert_array_equal(plain["places"], twice["places"])
    np.testing.assert_allclose(plain["values"], twice["values"], atol=1e-6)


def test_an_nnx_optimizer_trains_as_the_functional_loop_does():
    model = layer()
    optimizer = nnx.Optimizer(model, moving(optax.adamw(1e-2)), wrt=Trained)

    @nnx.jit
    def step(model, optimizer):
        loss = lambda model: ((model(X) - 1.0) ** 2).mean()
        grads = nnx.grad(loss, argnums=nnx.DiffState(0, Trained), allow_int=True)(model)
        optimizer.update(model, grads)

    for _ in range(6):
        step(model, optimizer)
    params, _, _ = train(moving(optax.adamw(1e-2)), steps=6)
    np.testing.assert_array_equal(model.places[...], params["places"])
    np.testing.assert_allclose(model.values[...], params["values"], atol=1e-6)


def test_stacked_layers_move_each_for_itself():
    tx = moving(optax.adam(1e-2), rule="set")
    pair = [split(layer(rngs=nnx.Rngs(i)))[1] for i in range(2)]
    params = jax.tree.map(lambda *x: jnp.stack(x), *pair)
    state = tx.init(params)
    for _ in range(3):
        grads = jax.tree.map(jnp.ones_like, params)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    for i in range(2):
        new = weight({k: v[i] for k, v in params.items()}).block_mask
        old = weight(pair[i]).block_mask
        assert int(new.sum()) == int(old.sum()) and bool((new != old).any())
    assert bool((weight({k: v[0] for k, v in params.items()}).block_mask
                 != weight({k: v[1] for k, v in params.items()}).block_mask).any())  # fmt: skip


# -- slots, steps, NaN --------------------------------------------------------------------------------


def test_slots_of_grown_blocks_start_afresh_and_those_of_others_stay():
    make, params = split(layer())
    tx = moving(optax.sgd(0.0, momentum=0.9), begin_step=3, drop_fraction=lambda _: 0.75)
    state, gradient = tx.init(params), jax.jit(jax.grad(loss_of(make), allow_int=True))
    for step in range(4):
        old, before = params, state
        updates, state = tx.update(gradient(params), state, params)
        params = optax.apply_updates(params, updates)
        assert params["due"].tolist() == [int(step == 2)] * 4
    stays = (old["places"][:2] == params["places"][:2]).all(0)
    assert 0 < int(stays.sum()) < len(stays)
    trace = lambda s: optax.tree.get(s, "trace")["values"]
    np.testing.assert_array_equal(trace(state)[stays], trace(before)[stays])
    assert not trace(state)[~stays].any() and bool(trace(state)[stays].any())
    assert not params["values"][~stays].any()
    np.testing.assert_array_equal(params["values"][stays], old["values"][stays])


def test_some_block_rows_are_candidates_drawn_anew_for_each_update():
    tx, (make, params) = moving(optax.sgd(0.1)), split(layer(candidates=0.5))
    state, gradient = tx.init(params), jax.jit(jax.grad(loss_of(make), allow_int=True))
    assert params["scores"].shape == (2, 4)
    drawn = set()
    for _ in range(12):
        due, old = np.asarray(params["due"]), weight(params).block_mask
        updates, state = tx.update(gradient(params), state, params)
        params = optax.apply_updates(params, updates)
        grown = np.asarray(weight(params).block_mask & ~old)
        assert not grown[due == 0].any() and int(weight(params).block_mask.sum()) == 8
        if due.any():
            assert due.sum() == 2
            drawn.add(tuple(due))
    check_stored(state)
    assert len(drawn) > 2


def test_a_gradient_that_is_nan_moves_nothing_and_shows():
    make, params = split(layer())
    tx = moving(optax.sgd(0.1), begin_step=1)
    state, gradient = tx.init(params), jax.grad(loss_of(make), allow_int=True)
    updates, state = tx.update(gradient(params), state, params)
    params = optax.apply_updates(params, updates)
    grads = gradient(params)
    grads = grads | {"scores": grads["scores"].at[0, 0].set(jnp.nan)}
    updates, state = tx.update(grads, state, params)
    assert not updates["places"].any() and updates["values"].any()
    with pytest.raises(ValueError, match="updates: 1 updates of the pattern did not take place"):
        check_stored(state)


@pytest.mark.parametrize("fraction", [0.25, 1.0])
def test_groups_of_columns_keep_their_numbers_of_blocks(fraction):
    tx = moving(optax.adam(1e-2), groups=2, drop_fraction=lambda _: fraction)
    params, _, _ = train(tx)
    moved = weight(params)
    assert bool((params["places"] != layer().places[...]).any())
    np.testing.assert_array_equal(moved.block_mask.reshape(4, 2, 2).sum((0, 2)), [4, 4])
    np.testing.assert_array_equal(moved.block_cols.reshape(2, 4) // 2, [[0] * 4, [1] * 4])


def test_a_rule_of_ones_own_sees_norms_of_blocks():
    seen = []

    @scores.declare(needs_gradient=True)
    def rule(step):
        (view,) = step.views
        seen.append((view.leaf.path, view.w.shape, view.g.shape, view.m.shape))
        return [jnp.flip(view.m, 0)]

    params, _, _ = train(moving(optax.sgd(0.1), rule=rule), steps=3)
    assert set(seen) == {("kernel", (4, 4), (4, 4), (4, 4))}
    first = weight(split(layer())[1])
    np.testing.assert_array_equal(weight(params).block_mask, jnp.flip(first.block_mask, 0))


# -- bad input ----------------------------------------------------------------------------------------


def test_arguments_are_checked_by_name():
    inner = optax.sgd(0.1)
    cases = [
        (dict(rule="rigl"), "total_steps=None: rule='rigl' needs the length"),
        (dict(rule="snip", total_steps=10), "rule='snip': give 'rigl', 'set'"),
        (dict(rule="magnitude", total_steps=10), "sparsity=None: rule='magnitude' needs"),
        (dict(rule="static", groups=0), "groups=0: give a number of groups"),
        (dict(total_steps=10, update_every=1, drop_fraction=2.0), "drop_fraction=2.0"),
        (dict(total_steps=10), "begin_step=100 is not within total_steps=10"),
    ]
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            jaxsparse.stored(inner, **options)
    with pytest.raises(ValueError, match="give an optax gradient transformation"):
        jaxsparse.stored(0.1, rule="static")


MOVING = ("rigl", "set", "momentum", "magnitude", "a function")


@pytest.mark.parametrize(
    "option, value, readers",
    [
        ("total_steps", 30, (*MOVING, "static")),
        ("seed", 3, (*MOVING, "static")),
        ("groups", 2, (*MOVING, "static")),
        ("update_every", 2, MOVING),
        ("begin_step", 4, MOVING),
        ("end_step", 20, MOVING),
        ("drop_fraction", 0.3, SWAPPING),
        ("decay", 0.9, ("momentum",)),
        ("sparsity", 0.7, ("magnitude",)),
        ("initial_sparsity", 0.0, ("magnitude",)),
    ],
)
def test_an_option_goes_with_the_rules_that_read_it(option, value, readers):
    for name in (*MOVING, "static"):
        rule = (lambda step: step.masks) if name == "a function" else name
        options = {} if name == "static" else dict(total_steps=30, update_every=5)
        options |= dict(sparsity=0.8) if name == "magnitude" else {}
        make = lambda rule=rule, options=options: jaxsparse.stored(
            optax.sgd(0.1), rule=rule, **options | {option: value}
        )
        if name in readers:
            make()
        else:
            with pytest.raises(ValueError, match=f"{option}={value}: rule=.* does not read it"):
                make()
    assert set(inspect.signature(jaxsparse.stored).parameters) == {
        "inner", "rule", "total_steps", "seed", "groups", "update_every", "begin_step", "end_step",
        "drop_fraction", "decay", "sparsity", "initial_sparsity",
    }  # fmt: skip


def test_pruning_to_more_than_is_stored_is_refused():
    def init(model, sparsity):
        tx = jaxsparse.stored(optax.sgd(0.1), rule="magnitude", sparsity=sparsity, total_steps=300)
        return tx.init(split(model)[1])

    message = r"sparsity=0.4: 'values' stores 8 of 16 blocks, .* down to 9; give more than 0.5, or"
    with pytest.raises(ValueError, match=message):
        init(layer(), 0.4)
    with pytest.raises(ValueError, match=message):  # where only shapes are known
        jax.jit(lambda: init(layer(), 0.4))()
    init(layer(), 0.5)
    columns = CondensedLinear(16, 8, density=0.25, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="sparsity=0.5: .* 4 of 16 weights of an output, .* to 8"):
        init(columns, 0.5)
    init(columns, 0.75)
    two = nnx.List([layer(), layer(density=0.25)])
    with pytest.raises(ValueError, match="sparsity=0.6: '1/values' stores 4 of 16 blocks"):
        init(two, 0.6)


def test_a_part_of_less_than_one_block_warns_that_nothing_moves():
    _, params = split(layer(density=0.25))  # 4 blocks
    make = lambda f, **o: moving(optax.sgd(0.1), drop_fraction=lambda _: f, **o).init(params)
    message = "drop_fraction: 0.2 of the 4 units .* 'kernel' .* never changes .* give 0.25 or more"
    with pytest.warns(UserWarning, match=message):
        make(0.2)
    with pytest.warns(UserWarning, match="0.25 of the 2 units"):
        make(0.25, groups=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make(0.26)


def test_parameters_gradients_and_states_that_do_not_fit_are_named():
    tx, (make, params) = moving(optax.sgd(0.1)), split(layer())
    state = tx.init(params)
    grads = jax.grad(loss_of(make), allow_int=True)(params)
    with pytest.raises(ValueError, match="'values' has no 'places' beside it; .* wrt=jaxsparse.nn"):
        tx.init(nnx.state(layer(), nnx.Param))
    with pytest.raises(ValueError, match="params: no stored matrix .* among kernel"):
        tx.init({"kernel": jnp.ones((4, 4))})
    with pytest.raises(ValueError, match=r"'places' has shape \(3, 8\), .* must be \(4, 8\)"):
        tx.init(params | {"places": params["places"][:3]})
    with pytest.raises(ValueError, match="gradient of 'scores' is missing"):
        tx.update({"values": grads["values"], "bias": grads["bias"]}, state, params)
    with pytest.raises(ValueError, match="'bias' has shape"):
        tx.update(grads | {"bias": jnp.ones(3)}, state, params)
    with pytest.raises(ValueError, match="'kernel' is no leaf of the parameters"):
        tx.update(grads | {"kernel": jnp.ones(3)}, state, params)
    with pytest.raises(ValueError, match="update needs the parameters"):
        tx.update(grads, state)
    with pytest.raises(ValueError, match="EmptyState is not the state"):
        tx.update(grads, optax.EmptyState(), params)
    other = tx.init(split(layer(density=0.75))[1])
    with pytest.raises(ValueError, match="'values' has room for 8 blocks, its state for 12"):
        tx.update(grads, other, params)
    momentum = moving(optax.sgd(0.1), rule="momentum")
    sketched = lambda r: split(layer(sketch=(r, r)))[1]
    ones = jax.tree.map(jnp.ones_like, sketched(2))
    with pytest.raises(
        ValueError, match=r"sketch of 'values' .* \(4, 2, 4, 2\), .* \(4, 1, 4, 1\)"
    ):
        momentum.update(ones, momentum.init(sketched(1)), sketched(2))
    with pytest.raises(ValueError, match="another rule: it keeps 0 averages .* this rule 1"):
        momentum.update(ones, tx.init(sketched(2)), sketched(2))
    with pytest.raises(ValueError, match="another rule: it keeps 1 averages .* this rule 0"):
        tx.update(ones, momentum.init(sketched(2)), sketched(2))
    with pytest.raises(ValueError, match="opt_state holds no state of `stored`"):
        check_stored(optax.sgd(0.1).init(params))


def test_patterns_that_are_none_are_named():
    tx, (_, params) = moving(optax.sgd(0.1)), split(layer())
    places = np.array(params["places"])

    def changed(*at, to):
        new = places.copy()
        new[at] = to
        return params | {"places": jnp.asarray(new)}

    twice = changed(slice(0, 2), 1, to=places[:2, 0])
    with pytest.raises(ValueError, match=r"stores block \(row \d, column \d\) twice"):
        tx.init(twice)
    with pytest.raises(
        ValueError, match=r"block \(row -1, column \d\) outside of the grid \(4, 4\)"
    ):
        tx.init(changed(0, 0, to=-1))
    with pytest.raises(ValueError, match="does not list the blocks by column"):
        tx.init(changed(3, slice(None), to=places[3, ::-1]))
    with pytest.raises(ValueError, match="'places' stores nothing"):
        tx.init(changed(0, slice(None), to=4))
    with pytest.raises(ValueError, match="density=0.01 stores none of the 4 x 4 blocks"):
        layer(density=0.01)
    w = BlockSparse.from_block_mask(jnp.ones(SHAPE), np.tril(np.ones((4, 4))))
    _, uneven = split(layer(weight=w, density=None, balanced=False, rngs=None))
    with pytest.raises(ValueError, match=r"groups=2: .*\[7, 3\] .* they must be equally many"):
        moving(optax.sgd(0.1), groups=2).init(uneven)
    with pytest.raises(ValueError, match="groups=3 must divide the 4 block columns"):
        moving(optax.sgd(0.1), groups=3).init(params)


def test_a_rule_that_wants_more_blocks_than_are_stored_is_refused():
    tx = moving(optax.sgd(0.1), rule=lambda step: [jnp.ones(v.m.shape, bool) for v in step.views])
    params, state, _ = train(tx, steps=3)
    assert bool(jnp.isnan(params["values"]).any())
    with pytest.raises(ValueError, match="more than a layer stores; give the layer a larger"):
        check_stored(state)
