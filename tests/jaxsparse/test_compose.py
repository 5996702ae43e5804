"""Any inner optimizer, and any optax wrapper around a method."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contracts import QUICK

import jaxsparse
from jaxsparse.engines._slots import restart
from jaxsparse.leaves import find
from jaxsparse.testing import by_path, close, gradients, masks_of, parameters, same, target


def own():
    """An optimizer that no list knows: a running mean of gradients per weight, and the last step."""

    def init(params):
        mean = jax.tree.map(lambda p: jnp.full_like(p, 0.25), params)
        return {"mean": mean, "seen": jnp.zeros((), jnp.int32)}

    def update(updates, state, params=None):
        mean = jax.tree.map(lambda m, g: 0.5 * (m + g), state["mean"], updates)
        return jax.tree.map(lambda m: -0.1 * m, mean), {"mean": mean, "seen": state["seen"] + 1}

    return optax.GradientTransformation(init, update)


INNER = {
    "adabelief": lambda: optax.adabelief(1e-2),
    "adadelta": lambda: optax.adadelta(1.0),
    "adafactor": lambda: optax.adafactor(1e-2),
    "adafactor factored": lambda: optax.adafactor(1e-2, min_dim_size_to_factor=4),
    "adagrad": lambda: optax.adagrad(1e-1),
    "adam": lambda: optax.adam(1e-2),
    "adamax": lambda: optax.adamax(1e-2),
    "adan": lambda: optax.adan(1e-2),
    "ademamix": lambda: optax.contrib.ademamix(1e-2),
    "adopt": lambda: optax.contrib.adopt(1e-2),
    "amsgrad": lambda: optax.amsgrad(1e-2),
    "cocob": lambda: optax.contrib.cocob(),
    "dog": lambda: optax.contrib.dog(),
    "fromage": lambda: optax.fromage(1e-2),
    "lamb": lambda: optax.lamb(1e-2),
    "lars": lambda: optax.lars(1e-2),
    "lion": lambda: optax.lion(1e-2),
    "madgrad": lambda: optax.contrib.madgrad(1e-2),
    "mechanic": lambda: optax.contrib.mechanize(optax.sgd(1e-2)),
    "momo": lambda: optax.contrib.momo(1e-1),
    "muon": lambda: optax.contrib.muon(1e-2),
    "nadamw": lambda: optax.nadamw(1e-2),
    "noisy_sgd": lambda: optax.noisy_sgd(1e-2),
    "novograd": lambda: optax.novograd(1e-2),
    "optimistic": lambda: optax.optimistic_gradient_descent(1e-2),
    "polyak_sgd": lambda: optax.polyak_sgd(),
    "prodigy": lambda: optax.contrib.prodigy(1.0),
    "radam": lambda: optax.radam(1e-2),
    "rmsprop": lambda: optax.rmsprop(1e-2, momentum=0.9),
    "rprop": lambda: optax.rprop(1e-2),
    "schedule_free": lambda: optax.contrib.schedule_free_adamw(1e-2),
    "sgd": lambda: optax.sgd(1e-1),
    "sm3": lambda: optax.sm3(1e-2),
    "yogi": lambda: optax.yogi(1e-2),
    "MultiSteps": lambda: optax.MultiSteps(optax.adam(1e-2), 2).gradient_transformation(),
    "add_noise": lambda: optax.chain(optax.add_noise(0.1, 0.5, 0), optax.adam(1e-2)),
    "apply_if_finite": lambda: optax.apply_if_finite(optax.adam(1e-2), 3),
    "clip": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2)),
    "ema": lambda: optax.chain(optax.scale_by_adam(), optax.ema(0.9), optax.scale(-1e-2)),
    "inject_hyperparams": lambda: optax.inject_hyperparams(optax.adam)(
        learning_rate=optax.linear_schedule(1e-2, 0.0, 10)
    ),
    "masked": lambda: optax.masked(
        optax.adamw(1e-2), lambda p: jax.tree.map(lambda x: jnp.ndim(x) > 1, p)
    ),
    "partition": lambda: optax.partition(
        {"matrix": optax.adam(1e-2), "rest": optax.sgd(1e-2)},
        lambda p: jax.tree.map(lambda x: "matrix" if jnp.ndim(x) == 2 else "rest", p),
    ),
    "reduce_on_plateau": lambda: optax.chain(
        optax.adam(1e-2), optax.contrib.reduce_on_plateau(patience=1)
    ),
    "own": own,
}


# No slot of these belongs to one weight.
STATELESS = ("sgd", "noisy_sgd", "fromage", "polyak_sgd", "adafactor factored")


def small():
    tree = parameters()
    return {"kernel": tree["dense"]["kernel"], "bias": tree["dense"]["bias"]}


@pytest.mark.parametrize("name", INNER)
def test_the_slots_of_weights_that_start_anew_are_those_of_init_and_no_others_change(name):
    inner = optax.with_extra_args_support(INNER[name]())
    params = small()
    plan = find(params)
    live = [jax.random.bernoulli(jax.random.key(0), 0.5, leaf.shape) for leaf in plan.leaves]

    @functools.partial(jax.jit, compiler_options=QUICK)
    def run(params):
        state = inner.init(params)
        for _ in range(2):
            grads = gradients(params, target(params))
            updates, state = inner.update(grads, state, params, value=1.0)
            params = optax.apply_updates(params, updates)
        return state, params, inner.init(params)

    # Apart: in one program the slots could be computed twice, and rounded in two ways.
    state, params, start = run(params)
    anew = jax.jit(lambda s: restart(inner, s, live, plan, params), compiler_options=QUICK)(state)
    before, after, fresh = by_path(state), by_path(anew), by_path(start)
    alive = np.asarray(live[0])
    slots = 0
    for path, old in before.items():
        new, start = after[path], fresh[path]
        if old.shape == alive.shape:
            slots += 1
            assert np.array_equal(new[alive], old[alive]), path
            assert np.array_equal(new[~alive], start[~alive]), path
        else:
            assert np.array_equal(new, old), path
    assert slots or name in STATELESS, "no slot per weight was found"


# One of each kind of state and of each wrapper; the others are slow.
FEW = (
    *("adafactor factored", "adam", "lion", "momo", "muon", "schedule_free", "sgd", "MultiSteps"),
    *("add_noise", "inject_hyperparams", "partition", "own"),
)


@pytest.mark.parametrize(
    "name", [n if n in FEW else pytest.param(n, marks=pytest.mark.slow) for n in INNER]
)
def test_rigl_runs_with_any_inner_optimizer_and_stays_exact(name):
    tx = jaxsparse.rigl(
        INNER[name](), 0.75, total_steps=8, update_every=2, end_step=7, allocation="uniform"
    )
    params = small()

    @functools.partial(jax.jit, compiler_options=QUICK)
    def run(params):
        def step(carry, _):
            p, s = carry
            u, s = tx.update(gradients(p, target(p)), s, p, value=1.0)
            p = optax.apply_updates(p, u)
            return (p, s), (p, jaxsparse.get_masks(s), s.inner)

        return jax.lax.scan(step, (params, tx.init(params)), None, length=6)[1]

    ps, ms, inner = run(params)
    ps, ms = jax.device_get((ps, ms))
    assert ms["kernel"].reshape(6, -1).sum(1).tolist() == [32] * 6
    assert not np.any(ps["kernel"][~ms["kernel"]])
    assert all(np.all(np.isfinite(x)) for x in ps.values())
    assert np.any(ms["kernel"][1] != ms["kernel"][2]), "the masks were updated at step 2"
    grown = ms["kernel"][2] & ~ms["kernel"][1]
    assert not np.any(ps["kernel"][2][grown]), "grown weights start at 0"
    both = ms["kernel"][2] & ms["kernel"][1]
    for path, x in by_path(inner).items():  # the update has taken the place of the step
        if x.shape[1:] == both.shape:
            assert np.array_equal(x[2][both], x[1][both]), f"slots in {path} moved"
        if x.shape[1:] == ps["bias"].shape[1:]:
            assert np.array_equal(x[2], x[1]), f"slots of the bias in {path} moved"
    assert np.array_equal(ps["bias"][2], ps["bias"][1]), "dense leaves stand still"


@pytest.mark.parametrize("method, packed", [("rigl", False), ("rigl", True), ("set", False)])
def test_a_compiled_step_copies_no_weights_and_slots_only_where_they_may_stand_still(
    method, packed
):
    """An update is rare, a copy of a donated state is paid at every step. The two masks that tell
    what has grown are apart, and so are the two slots of Adam where RigL chooses between them."""
    tx = jaxsparse.make(
        method, optax.adamw(1e-3), sparsity=0.9, total_steps=1000, pack_masks=packed
    )
    params = {"kernel": jax.ShapeDtypeStruct((96, 160), jnp.float32)}
    state = jax.eval_shape(tx.init, params)

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    step = jax.jit(step, donate_argnums=(0, 1), compiler_options=QUICK)
    text = step.lower(params, state, params).compile().as_text()
    found = re.findall(r"= (\w+)\[(?:96|12),160\]\S* copy\(", text)
    assert "f32[96,160]" in text
    assert found.count("f32") <= (2 if method == "rigl" else 0), found
    assert set(found) <= {"f32", "u8" if packed else "pred"}, found
    # Nor does it store anything of their size for a branch that is not taken.
    entry = text[text.index("ENTRY") :]
    returned = re.findall(r"%[\w.-]+", entry[entry.index("ROOT") :].split("\n")[0])
    made = re.findall(r"(%[\w.-]+) = f32\[96,160\]\S* (?!copy|parameter|get-tuple)", entry)
    assert made and set(made) <= set(returned), set(made) - set(returned)


@pytest.mark.parametrize("method", ["rigl", "set"])
def test_a_grown_weight_takes_its_first_step_as_if_training_began(method):
    """With Adam without bias correction the first step of a fresh slot has one size."""
    inner = optax.chain(optax.scale_by_rms(0.9), optax.scale(-0.01))
    tx = jaxsparse.make(
        method, inner, sparsity=0.75, total_steps=40, update_every=20, allocation="uniform"
    )
    params = small()
    state = tx.init(params)
    step = jax.jit(tx.update, compiler_options=QUICK)
    for _ in range(22):
        old = jaxsparse.get_masks(state)["kernel"]
        updates, state = step(gradients(params, target(params)), state, params)
        before, params = params["kernel"], optax.apply_updates(params, updates)
        if int(state.count) == 21:
            grown = np.asarray(jaxsparse.get_masks(state)["kernel"] & ~old)
            assert grown.any() and not np.any(np.asarray(params["kernel"])[grown])
    moved = np.abs(np.asarray(params["kernel"] - before))[grown]
    np.testing.assert_allclose(moved, 0.01 / np.sqrt(0.1), rtol=1e-3)


# -- Wrappers around a method ----------------------------------------------------------------------


def test_two_methods_share_a_network_between_them():
    labels = {"conv": {"kernel": "rigl"}, "dense": {"kernel": "st3", "bias": "st3"},
              "norm": {"scale": "plain"}}  # fmt: skip
    tx = optax.partition(
        {
            "rigl": jaxsparse.rigl(optax.adam(1e-2), 0.9, total_steps=10, update_every=2),
            "st3": jaxsparse.st3(
                optax.sgd(1e-2), 0.5, total_steps=10, begin_step=0, end_step=0, pack_masks=True
            ),
            "plain": optax.sgd(1e-2),
        },
        labels,
    )
    params = parameters()
    state = tx.init(params)
    first = by_path(jaxsparse.apply_masks(params, state))
    for _ in range(4):
        updates, state = tx.update(gradients(params, target(params)), state, params)
        params = optax.apply_updates(params, updates)
    masks, weights = by_path(jaxsparse.get_masks(state)), by_path(params)
    assert masks.keys() == {"conv/kernel", "dense/kernel"}
    assert masks["conv/kernel"].sum() == 26 and masks["dense/kernel"].sum() == 64
    for path, m in masks.items():
        assert not np.any(weights[path][~m])
    assert np.count_nonzero(first["conv/kernel"]) == 26
    assert by_path(jaxsparse.get_raw_params(state)).keys() == {"dense/kernel"}


@pytest.mark.parametrize("names", [("static", "st3", "dense"), ("dense", "static", "st3")])
def test_labels_may_stand_for_whole_branches(names):
    """A branch that belongs to another method is a single `MaskedNode` in the state of this one."""
    labels = dict(zip(("conv", "dense", "norm"), names))
    tx = optax.partition(
        {
            "static": jaxsparse.static(optax.sgd(0.1), 0.75, allocation="uniform"),
            "st3": jaxsparse.st3(optax.sgd(0.1), 0.5, total_steps=9, begin_step=0, end_step=0),
            "dense": optax.sgd(0.1),
        },
        labels,
    )
    params = parameters()
    state = tx.init(params)
    sizes = {"conv": 256, "dense": 128, "norm": 0}
    kept = {"static": 0.25, "st3": 0.5}
    want = {f"{b}/kernel": sizes[b] * kept[n] for b, n in labels.items() if n in kept and sizes[b]}
    masks = by_path(jaxsparse.get_masks(state))
    assert {path: m.sum() for path, m in masks.items()} == want
    sparse = by_path(jaxsparse.apply_masks(params, state))
    assert {path: np.count_nonzero(sparse[path]) for path in want} == want
    rows = {r.path: r for r in jaxsparse.summarize(params, state).rows}
    assert {path for path, r in rows.items() if r.masked is not None} == set(want)
    raw = jaxsparse.get_raw_params(state)
    assert set(by_path(raw)) == {p for p in want if labels[p.split("/")[0]] == "st3"}


def test_a_method_may_hold_another_one_for_other_leaves():
    inner = jaxsparse.static(optax.sgd(0.1), 0.5, targets="dense/kernel", allocation="uniform")
    tx = jaxsparse.static(inner, 0.75, targets="conv/kernel", allocation="uniform")
    params = parameters()
    state = tx.init(params)
    updates, state = tx.update(gradients(params, target(params)), state, params)
    kept = {p: int(m.sum()) for p, m in by_path(jaxsparse.get_masks(state)).items()}
    assert kept == {"conv/kernel": 64, "dense/kernel": 64}
    sparse = by_path(optax.apply_updates(params, updates))
    assert {p: np.count_nonzero(sparse[p]) for p in kept} == kept


# What decides shapes or branches of a method (a minimum, a number of candidates) is static.
INJECTED = {"sparsity", "total_steps", "begin_step", "end_step", "update_every", "drop_fraction",
            "seed"}  # fmt: skip


@pytest.mark.parametrize("name", sorted(jaxsparse.METHODS))
def test_every_method_can_be_built_by_inject_hyperparams(name):
    import contracts

    method, chosen = jaxsparse.METHODS[name], contracts.options(name)
    tx = optax.inject_hyperparams(method.fn, static_args={"inner", *(method.options - INJECTED)})(
        inner=optax.sgd(0.1, momentum=0.9), **chosen
    )
    params = parameters()
    state = jax.eval_shape(tx.init, params)
    _, new = jax.eval_shape(tx.update, params, state, params)
    assert jax.tree.structure(state) == jax.tree.structure(new)


def test_hyperparameters_that_are_injected_act_as_if_they_were_given():
    options = dict(sparsity=0.75, total_steps=12, update_every=2, drop_fraction=0.3)
    inner = optax.sgd(0.1, momentum=0.9)
    plain = jaxsparse.rigl(inner, **options, allocation="uniform")
    tx = optax.inject_hyperparams(jaxsparse.rigl)(inner, **options, allocation="uniform")

    def run(tx):
        p = small()
        s = tx.init(p)
        step = jax.jit(tx.update, compiler_options=QUICK)
        for _ in range(6):
            u, s = step(gradients(p, target(p)), s, p)
            p = optax.apply_updates(p, u)
        return p, masks_of(s)

    one, two = run(plain), run(tx)
    same(one[1], two[1], "masks")
    close(one[0], two[0], "weights")


def test_an_average_of_the_weights_becomes_sparse_through_apply_masks():
    tx = jaxsparse.rigl(optax.sgd(0.1), 0.75, total_steps=12, update_every=2, allocation="uniform")
    params = average = small()
    state = tx.init(params)
    step = jax.jit(tx.update, compiler_options=QUICK)
    for _ in range(5):
        updates, state = step(gradients(params, target(params)), state, params)
        params = optax.apply_updates(params, updates)
        average = optax.incremental_update(params, average, 0.5)
    sparse = jaxsparse.apply_masks(average, state)["kernel"]
    assert int((average["kernel"] != 0).sum()) > 32 >= int((sparse != 0).sum())


def test_under_vmap_scores_are_computed_at_updates_only():
    calls = []

    def score(w, g=None):
        jax.debug.callback(lambda: calls.append(1))
        return jnp.abs(w)

    tx = jaxsparse.one_shot(optax.sgd(0.1), 0.5, score=score, begin_step=3)
    many = jax.vmap(lambda s: {"kernel": jnp.ones((4, 4)) * s})(jnp.arange(1.0, 4.0))
    states = jax.vmap(tx.init)(many)
    jax.effects_barrier()
    calls.clear()
    step = jax.jit(jax.vmap(tx.update))
    for t in range(6):
        updates, states = step(many, states, many)
        many = optax.apply_updates(many, updates)
        jax.effects_barrier()
        assert len(calls) == (0 if t < 3 else 1), f"step {t}"


def test_seeds_and_leaves_draw_different_masks_and_one_seed_the_same():
    params = {"a": {"kernel": jnp.ones((16, 16))}, "b": {"kernel": jnp.ones((16, 16))}}

    def masks(seed, method=jaxsparse.static):
        return by_path(jaxsparse.get_masks(method(optax.sgd(0.1), 0.5, seed=seed).init(params)))

    one, two, again = masks(0), masks(1), masks(0)
    same(one, again, "one seed")
    assert not np.array_equal(one["a/kernel"], one["b/kernel"])
    for path in one:
        agree = (one[path] == two[path]).mean()
        assert 0.35 < agree < 0.65, "masks of two seeds are independent"


def test_updates_of_one_run_draw_different_positions_and_seeds_do_not_share_streams():
    (leaf,) = find({"kernel": jnp.ones((4, 4))}).leaves
    salts = {int(leaf.salt(seed, stream)) for seed in range(20) for stream in range(20)}
    assert len(salts) == 400
