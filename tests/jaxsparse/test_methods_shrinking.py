"""Top-KAST, AC/DC, GSM, ISS-P, HyperSparse and ART, progressive gradient flow, global STR."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from training import masks, matrix, start, stepper

import jaxsparse
from jaxsparse.masking import unpack
from jaxsparse.structures import NM

SGD = optax.sgd(0.1)


def train(tx, params, steps, grads=None):
    """Parameters and masks after each step."""
    params, state = start(tx, params)
    step, found = stepper(tx), []
    for t in range(steps):
        g = {"kernel": matrix(params["kernel"].shape, t + 1)} if grads is None else grads(t, params)
        params, state = step(params, state, g)
        found.append((np.asarray(params["kernel"]), masks(state)["kernel"]))
    return found, state


# Top-KAST


def test_raw_weights_outside_the_backward_set_never_move_whatever_the_optimizer_remembers():
    tx = jaxsparse.top_kast(optax.adam(0.05), 0.8, backward_sparsity=0.5)
    params, state = start(tx, {"kernel": matrix()})
    step = stepper(tx)
    for t in range(4):
        z, wide = state.raw["kernel"], np.asarray(unpack(state.aux[0]))
        assert wide.sum() == 50 and (masks(state)["kernel"] <= wide).all()
        params, state = step(params, state, {"kernel": matrix(seed=t + 1)})
        moved = np.asarray(z != state.raw["kernel"])
        assert not moved[~wide].any() and moved[wide].all()


def test_a_dense_backward_set_without_decay_is_the_straight_through_estimator():
    ours, _ = train(
        jaxsparse.top_kast(SGD, 0.8, backward_sparsity=0.0, decay=0.0), {"kernel": matrix()}, 4
    )
    theirs, _ = train(jaxsparse.magnitude_ste(SGD, 0.8), {"kernel": matrix()}, 4)
    for (p, m), (q, n) in zip(ours, theirs):
        np.testing.assert_array_equal(m, n)
        np.testing.assert_array_equal(p, q)


def test_the_decay_outside_the_forward_set_is_divided_by_its_density():
    tx = jaxsparse.top_kast(optax.sgd(1.0), 0.75, backward_sparsity=0.5, decay=0.01)
    z = jnp.array([[4.0, 3.0], [2.0, 1.0]])
    params, state = start(tx, {"kernel": z})
    _, state = stepper(tx)(params, state, {"kernel": jnp.zeros((2, 2))})
    want = [[4 * 0.99, 3 * (1 - 0.01 / 0.25)], [2.0, 1.0]]
    np.testing.assert_allclose(state.raw["kernel"], want, rtol=1e-6)


def test_top_kast_errors_and_its_rare_rankings():
    with pytest.raises(ValueError, match="backward_sparsity=0.9: must be in"):
        jaxsparse.top_kast(SGD, 0.8, backward_sparsity=0.9)
    with pytest.raises(ValueError, match="decay=-1"):
        jaxsparse.top_kast(SGD, 0.8, decay=-1)
    tx = jaxsparse.top_kast(optax.sgd(1.0), 0.8, update_every=3)
    found, _ = train(tx, {"kernel": matrix()}, 7)
    same = [(a[1] == b[1]).all() for a, b in zip(found, found[1:])]
    assert same == [True, True, False, True, True, False]


# AC/DC


def test_ac_dc_alternates_and_ends_sparse():
    tx = jaxsparse.ac_dc(SGD, 0.9, total_steps=10, switches=(2, 4, 6))
    found, _ = train(tx, {"kernel": matrix()}, 9)
    assert [int(m.sum()) for _, m in found] == [100, 100, 10, 10, 100, 100, 10, 10, 10]


def test_a_dense_phase_starts_pruned_weights_at_zero_and_every_momentum_anew():
    params = {"kernel": matrix(), "bias": jnp.zeros(2)}
    tx = jaxsparse.ac_dc(optax.sgd(0.1, momentum=0.9), 0.9, total_steps=10, switches=(1, 3, 5))
    params, state = start(tx, params)
    step = stepper(tx)
    g = {"kernel": jnp.ones((10, 10)), "bias": jnp.ones(2)}
    for t in range(4):
        before, pruned = params, ~masks(state)["kernel"]
        params, state = step(params, state, g)
        if t == 3:
            assert pruned.sum() == 90
            np.testing.assert_allclose(np.asarray(params["kernel"])[pruned], -0.1, rtol=1e-6)
            np.testing.assert_allclose(params["bias"] - before["bias"], -0.1, rtol=1e-5)
            np.testing.assert_allclose(state.inner[0].trace["kernel"], 1.0)


def test_the_default_phases_are_the_authors():
    from jaxsparse.methods.ac_dc import _default_switches

    assert _default_switches(100)[:3] == (10, 15, 20) and _default_switches(100)[-2:] == (75, 85)
    assert len(_default_switches(100)) % 2 == 1 and _default_switches(8) == (4,)


@pytest.mark.parametrize("switches", [(2, 4), (4, 2, 6), (2, 4, 10), ()])
def test_ac_dc_refuses_phases_that_do_not_end_sparse_within_the_run(switches):
    with pytest.raises(ValueError, match="odd number of increasing steps from 0 to 9"):
        jaxsparse.ac_dc(SGD, 0.9, total_steps=10, switches=switches)


# GSM


def test_exactly_q_gradients_pass_and_the_others_decay_with_momentum():
    lr, beta, decay = 0.1, 0.9, 0.01
    inner = optax.chain(optax.add_decayed_weights(decay), optax.sgd(lr, momentum=beta))
    tx = jaxsparse.gsm(inner, 0.9, total_steps=100)
    # 10 weights with large |w g|; the others have a gradient, too
    w = jnp.where(jnp.arange(100).reshape(10, 10) < 10, 10.0, 1.0)
    g = jnp.where(jnp.arange(100).reshape(10, 10) < 10, 1.0, 0.5)
    params, state = start(tx, {"kernel": w})
    step, v, x = stepper(tx), 0.0, 1.0
    for _ in range(5):
        params, state = step(params, state, {"kernel": g})
        v = beta * v + decay * x
        x -= lr * v
        passive = np.asarray(params["kernel"]).ravel()[10:]
        np.testing.assert_allclose(passive, x, rtol=1e-5)
        assert (np.asarray(params["kernel"]).ravel()[:10] < 10 - 0.09).all()


def test_gsm_at_sparsity_zero_is_the_inner_optimizer_and_then_cuts_globally():
    inner = optax.sgd(0.1, momentum=0.9)
    ours, _ = train(jaxsparse.gsm(inner, 0.0, total_steps=10), {"kernel": matrix()}, 4)
    theirs, _ = train(
        jaxsparse.gsm(inner, 0.9, total_steps=10, end_step=3), {"kernel": matrix()}, 6
    )
    plain = inner.init({"kernel": matrix()})
    p = {"kernel": matrix()}
    for t in range(4):
        u, plain = inner.update({"kernel": matrix(seed=t + 1)}, plain)
        p = optax.apply_updates(p, u)
    np.testing.assert_allclose(ours[-1][0], p["kernel"], rtol=1e-5, atol=1e-6)
    assert [int(m.sum()) for _, m in theirs] == [100, 100, 100, 10, 10, 10]
    largest = np.abs(theirs[2][0]).ravel().argsort()[-10:]
    assert theirs[3][1].ravel()[largest].all()


def test_the_cut_of_gsm_costs_nothing_and_that_of_plain_training_much():
    key = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(key[0], (500, 20)) @ (jnp.eye(20) + 0.1)  # correlated inputs
    truth = jnp.where(jnp.arange(20) < 4, 2.0, 0.3 * jax.random.normal(key[1], (20,)))
    y = x @ truth + jax.random.normal(key[2], (500,))
    loss = lambda p: jnp.mean((x @ p["kernel"][:, 0] - y) ** 2)
    inner = optax.chain(optax.add_decayed_weights(0.1), optax.sgd(1e-3, momentum=0.98))

    @functools.partial(jax.jit, static_argnums=0)
    def trained(tx):
        def step(carry, _):
            p, state = carry
            u, state = tx.update(jax.grad(loss)(p), state, p)
            return (optax.apply_updates(p, u), state), None

        p = {"kernel": jnp.linalg.lstsq(x, y)[0][:, None]}  # the method starts from a trained model
        return jax.lax.scan(step, (p, tx.init(p)), None, 6000)[0][0]

    cost = lambda p: float(loss(jaxsparse.prune(p, 0.8)[0]) - loss(p))
    shrunk = trained(jaxsparse.gsm(inner, 0.8, total_steps=7000, end_step=6999))
    plain = trained(inner)
    assert abs(cost(shrunk)) < 0.02 and cost(plain) > 1.0
    assert loss(shrunk) < 1.02 * loss(jaxsparse.prune(plain, 0.8)[0])


# ISS-P


def test_the_smallest_weights_shrink_by_their_factor_and_may_come_back():
    w = jnp.array([[4.0, -3.0], [2.0, -1.0]])
    tx = jaxsparse.iss_p(optax.sgd(1.0), 0.5, total_steps=20, shrink=0.5, end_step=10)
    back = {"kernel": jnp.zeros((2, 2)).at[1, 1].set(10.0)}

    def grads(t, _):
        return back if t == 2 else {"kernel": jnp.zeros((2, 2))}

    found, _ = train(tx, {"kernel": w}, 4, grads)
    np.testing.assert_allclose(found[0][0], [[4, -3], [1, -0.5]])
    np.testing.assert_allclose(found[1][0], [[4, -3], [0.5, -0.25]])
    np.testing.assert_allclose(found[2][0], [[4, -1.5], [0.25, -10.25]])
    assert found[3][1].all(), "the masks are dense before end_step"


def test_shrinking_to_zero_is_iterative_hard_thresholding_and_the_cut_is_exact():
    tx = jaxsparse.iss_p(SGD, 0.9, total_steps=8, shrink=0.0, end_step=4)
    found, _ = train(tx, {"kernel": matrix()}, 6)
    assert [int((p != 0).sum()) for p, _ in found] == [10] * 6
    assert [int(m.sum()) for _, m in found] == [100] * 4 + [10] * 2
    with pytest.raises(ValueError, match="shrink=1.5"):
        jaxsparse.iss_p(SGD, 0.9, total_steps=8, shrink=1.5)


def test_the_l2_penalty_of_the_smallest_weights_grows_to_its_limit_and_is_kept():
    w = jnp.array([[4.0, -3.0], [2.0, -1.0]])
    tx = jaxsparse.iss_p(
        optax.sgd(0.1), 0.5, total_steps=20, penalty="l2", limit=0.4, update_every=2, end_step=8
    )
    up = {"kernel": jnp.zeros((2, 2)).at[1, 1].set(40.0)}  # the last weight comes to -5

    def grads(t, _):
        return up if t == 3 else {"kernel": jnp.zeros((2, 2))}

    found, state = train(tx, {"kernel": w}, 10, grads)
    # Steps 0 to 1: lambda = 0.1 for the two smallest, and the gradient lambda w; then 0.2.
    np.testing.assert_allclose(found[0][0], [[4, -3], [1.98, -0.99]], rtol=1e-6)
    np.testing.assert_allclose(found[2][0][1, 0], 2.0 * 0.99**2 * 0.98, rtol=1e-6)
    # Counted at steps 0, 2, 4, 6: -1 is among the smallest twice, and then the -3.
    np.testing.assert_allclose(state.aux[0], [[0.0, 0.2], [0.4, 0.2]], rtol=1e-6)
    assert [int(m.sum()) for _, m in found] == [4] * 8 + [2] * 2
    assert (found[9][1] == [[True, False], [False, True]]).all()
    for bad, text in (({"penalty": "l1"}, "penalty='l1'"), ({"limit": -1}, "limit=-1")):
        with pytest.raises(ValueError, match=text):
            jaxsparse.iss_p(SGD, 0.9, total_steps=8, **bad)


@pytest.mark.parametrize("steps", [600, 1000, 110, 13])
def test_the_l2_penalty_ends_at_its_limit_however_the_interval_divides(steps):
    """Oracle: updates at 0, 20, 40, ... before the cut, each adding limit over their number."""
    tx = jaxsparse.iss_p(optax.sgd(0.0), 0.5, total_steps=steps, penalty="l2", limit=0.5)
    end = max(steps * 17 // 100, 0)
    grown = len(range(0, end, 20))
    params, state = start(tx, {"kernel": jnp.arange(1.0, 5.0).reshape(2, 2)})
    step, zeros = stepper(tx), {"kernel": jnp.zeros((2, 2))}
    found = []
    for t in range(end + 1):
        state = state._replace(count=jnp.int32(t))
        if t % 20 == 0 or t == end:
            _, state = step(params, state, zeros)
            found.append(float(state.aux[0][0, 0]))
    want = [0.5 * min(i, grown) / grown for i in range(1, len(found) + 1)]
    np.testing.assert_allclose(found, want, rtol=1e-5)
    assert max(found) <= 0.5 and float(state.aux[0][1, 1]) == 0.0


# HyperSparse


def closed_form(w, sparsity):
    size = np.abs(np.asarray(w, np.float64)).ravel()
    border = np.sort(size)[int(np.floor(sparsity * size.size))]
    s = np.arctanh(1 / np.sqrt(3)) / border
    slope = np.sign(w) * s / np.cosh(s * np.abs(w)) ** 2
    return slope * size.sum() / np.tanh(s * size).sum(), border


def test_the_regulariser_is_zero_and_its_gradient_the_closed_form():
    w = matrix()
    loss = lambda w: jaxsparse.hypersparse_loss({"kernel": w}, 0.9)
    value, got = jax.value_and_grad(loss)(w)
    want, border = closed_form(w, 0.9)
    assert abs(float(value)) < 1e-4
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(jax.grad(loss)(7 * w), want, rtol=1e-4, atol=1e-6)


def test_the_push_is_half_as_strong_again_at_zero_as_at_the_border_and_fades_above():
    w = jnp.array([[1e-6, 1.0], [100.0, 0.5]])  # half is pruned: the border is 1
    push = jax.grad(lambda w: jaxsparse.hypersparse_loss({"kernel": w}, 0.5))(w)
    assert float(push[0, 0] / push[0, 1]) == pytest.approx(1.5, rel=1e-4)
    assert abs(float(push[1, 0])) < 1e-6


def test_hypersparse_adds_the_growing_gradient_until_its_cut():
    tx = jaxsparse.hypersparse(
        optax.sgd(1.0), 0.9, total_steps=20, penalty=1e-3, growth=2.0, update_every=1,
        begin_step=1, end_step=4,
    )  # fmt: skip
    zero = lambda t, _: {"kernel": jnp.zeros((10, 10))}
    found, _ = train(tx, {"kernel": matrix()}, 6, zero)
    np.testing.assert_array_equal(found[0][0], matrix())
    for t in (1, 2):
        want, _ = closed_form(found[t - 1][0], 0.9)
        step = found[t - 1][0] - found[t][0]
        np.testing.assert_allclose(step, 1e-3 * 2 ** (t - 1) * want, rtol=2e-3, atol=1e-6)
    assert [int(m.sum()) for _, m in found] == [100] * 4 + [10] * 2
    np.testing.assert_array_equal(found[5][0], found[4][0])


def test_art_stops_when_the_pruned_copies_are_as_good_as_the_dense_model():
    dense = [0.5, 0.6, 0.7, 0.8, 0.81]
    assert jaxsparse.art_stop([0.1, 0.2, 0.3, 0.4, 0.5], dense) is None
    # windows of three: means 0.7 and 0.8667; the second exceeds 0.81
    assert jaxsparse.art_stop([0.1, 0.2, 0.9, 0.8, 0.9], dense) == 3
    assert jaxsparse.art_stop([0.1, 0.2, 0.9, 0.8, 0.9], dense, buffer=0) == 2
    with pytest.raises(ValueError, match="one of each per epoch"):
        jaxsparse.art_stop([0.1], [0.1, 0.2])


def test_hypersparse_errors():
    with pytest.raises(ValueError, match="growth=0.5"):
        jaxsparse.hypersparse(SGD, 0.9, total_steps=20, growth=0.5)


def test_a_leaf_of_zeros_below_a_learned_threshold_is_named():
    params = {"base": matrix((4, 4)), "lora_b": jnp.zeros((2, 4))}
    for tx in (jaxsparse.str_(SGD), jaxsparse.autosparse(SGD, total_steps=9)):
        with pytest.warns(UserWarning, match=r"'lora_b' is zero .* targets=\[\('lora_b', False"):
            tx.init(params)


# Progressive gradient flow


@pytest.mark.parametrize("flow", ["identity", "true"])
def test_faded_weights_and_the_gradient_that_reaches_them(flow):
    z = jnp.array([[4.0], [3.0], [2.0], [1.0]])
    tx = jaxsparse.mdgf(
        optax.sgd(0.01), total_steps=10, decay="linear", begin_step=0, end_step=4, flow=flow
    )
    params, state = start(tx, {"kernel": z})
    np.testing.assert_array_equal(params["kernel"], z)  # beta(0) = 1
    g, step = {"kernel": jnp.ones((4, 1))}, stepper(tx)
    betas = [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    for t in range(5):
        raw = state.raw["kernel"]
        params, state = step(params, state, g)
        beta = 1.0 if flow == "identity" else betas[t]
        np.testing.assert_allclose(raw - state.raw["kernel"], [[0.01], [0.01], [0.01 * beta], [0.01 * beta]], rtol=1e-3, atol=1e-6)  # fmt: skip
        now = state.raw["kernel"] * jnp.array([[1.0], [1.0], [betas[t + 1]], [betas[t + 1]]])
        np.testing.assert_allclose(params["kernel"], now, rtol=1e-5)
        assert masks(state)["kernel"].all() == (betas[t + 1] > 0)  # N:M as soon as the weights are
    assert masks(state)["kernel"].ravel().tolist() == [True, True, False, False]


def test_exponential_fading_follows_its_rate_and_is_cut_at_the_end():
    z = jnp.array([[4.0], [1.0]])
    tx = jaxsparse.mdgf(optax.sgd(0.0), total_steps=9, rate=0.5, end_step=3, structure=NM(1, 2))
    found, _ = train(tx, {"kernel": z}, 5)
    want = [np.exp(-0.5), np.exp(-1.0), np.exp(-1.5), 0.0, 0.0]
    np.testing.assert_allclose([p[1, 0] for p, _ in found], want, rtol=1e-5)


def test_a_linear_rate_that_ends_before_the_window_does_is_sparse_from_then_on():
    tx = jaxsparse.mdgf(
        optax.sgd(0.0), total_steps=40, decay="linear", rate=0.25, begin_step=0, end_step=30
    )
    found, _ = train(tx, {"kernel": matrix((8, 4))}, 12)
    for t, (p, m) in enumerate(found):
        np.testing.assert_array_equal(m, p != 0)
        assert m.sum() == (32 if t < 3 else 16), t


def test_stages_of_structure_decay():
    pairs = lambda *a: [(s.n, s.m) for s in jaxsparse.sdgf_stages(*a)]
    assert pairs(NM(1, 8)) == [(7, 8), (4, 8), (2, 8), (1, 8)]
    assert pairs(NM(2, 16)) == [(15, 16), (8, 16), (4, 16), (2, 16)]
    assert pairs(NM(2, 4)) == [(3, 4), (2, 4)]
    assert pairs(NM(1, 8), "geometric") == [(8, 64), (4, 32), (2, 16), (1, 8)]
    assert pairs(NM(1, 8), "densify") == [(1, 64), (1, 32), (1, 16), (1, 8)]
    with pytest.raises(ValueError, match="stages='fine'"):
        jaxsparse.sdgf_stages(NM(1, 8), "fine")
    with pytest.raises(ValueError, match="n times a power of 2"):
        jaxsparse.sdgf_stages(NM(2, 6))


def test_sdgf_tightens_in_equal_stages():
    tx = jaxsparse.sdgf(SGD, total_steps=12, begin_step=2, end_step=10, structure=NM(1, 8))
    found, _ = train(tx, {"kernel": matrix((16, 4))}, 12)
    per_group = [np.unique(m.reshape(2, 8, 4).sum(axis=1)).tolist() for _, m in found]
    assert per_group == [[8]] * 2 + [[7]] * 2 + [[4]] * 2 + [[2]] * 2 + [[1]] * 4
    tx = jaxsparse.sdgf(
        SGD, total_steps=9, begin_step=0, end_step=8, structure=NM(1, 2), stages="densify"
    )
    found, _ = train(tx, {"kernel": matrix((16, 4))}, 9)
    per_output = [np.unique(m.sum(axis=0)).tolist() for _, m in found]
    assert per_output == [[1]] * 2 + [[2]] * 2 + [[4]] * 2 + [[8]] * 3
    tx = jaxsparse.sdgf(SGD, total_steps=12, structure=NM(1, 2), stages="geometric")
    with pytest.raises(ValueError, match="m=16 does not divide"):
        tx.init({"kernel": matrix((8, 4))})


def test_gradient_flow_errors():
    with pytest.raises(ValueError, match="defined for NM"):
        jaxsparse.mdgf(SGD, total_steps=9, structure=jaxsparse.structures.FanIn())
    for bad, text in (({"decay": "cubic"}, "decay='cubic'"), ({"flow": "x"}, "flow='x'"),
                      ({"rate": 0.0}, "rate=0.0")):  # fmt: skip
        with pytest.raises(ValueError, match=text):
            jaxsparse.mdgf(SGD, total_steps=9, **bad)


# STR with one threshold


def test_the_gradient_of_a_global_threshold_is_that_of_the_loss():
    z = {"a": matrix((4, 3)), "b": matrix((3, 5), 1)}
    goal = jax.tree.map(lambda x: x[::-1], z)

    def soft(s):
        t = jax.nn.sigmoid(s)
        return jax.tree.map(lambda z: jnp.sign(z) * jax.nn.relu(jnp.abs(z) - t), z)

    loss = lambda p: sum(jnp.sum((x - y) ** 2) for x, y in zip(p.values(), goal.values()))
    tx = jaxsparse.str_(optax.sgd(0.0), threshold_init=-1.0, scope="global",
                        threshold_optimizer=optax.sgd(1.0))  # fmt: skip
    params, state = start(tx, z)
    _, state = stepper(tx)(params, state, jax.grad(loss)(params))
    h = 1e-2
    slope = (loss(soft(-1.0 + h)) - loss(soft(-1.0 - h))) / (2 * h)
    found = [float(s) for s in jax.tree.leaves(state.aux[0])]
    assert found[0] == found[1] and found[0] == pytest.approx(-1.0 - float(slope), rel=2e-2)
    with pytest.raises(ValueError, match="scope='net'"):
        jaxsparse.str_(SGD, scope="net")


# ST-3 with rare rankings


def test_st3_holds_its_mask_between_rankings():
    """Asked for 80 % with a ranking every 5 steps; the thresholds alone let 57 % stand four steps later."""
    tx = jaxsparse.st3(
        optax.sgd(0.01), 0.8, total_steps=100, begin_step=0, end_step=10, update_every=5
    )
    found, _ = train(tx, {"kernel": matrix((40, 40))}, 40, lambda t, _: {
        "kernel": 30.0 * matrix((40, 40), t + 1)
    })  # fmt: skip
    for t in range(10, 40):
        p, m = found[t]
        assert not p[~m].any() and m.sum() == 1600 - (1 + int(np.floor(1599 * 0.8))), t
        same = (m == found[t - 1][1]).all()
        assert same == (t % 5 != 0), t


def test_a_kept_weight_below_the_threshold_of_st3_is_zero_and_does_not_change_its_sign():
    z = jnp.array([[4.0], [3.0], [2.0], [1.0]])
    tx = jaxsparse.st3(
        optax.sgd(1.0), 0.5, total_steps=100, begin_step=0, end_step=0, update_every=50,
        rescale=False,
    )  # fmt: skip
    params, state = start(tx, {"kernel": z})  # the threshold is 2.5
    np.testing.assert_allclose(params["kernel"][:, 0], [1.5, 0.5, 0, 0])
    state = state._replace(count=jnp.int32(1))
    down = {"kernel": jnp.array([[0.0], [1.0], [-5.0], [0.0]])}  # z = 4, 2, 7, 1
    params, state = stepper(tx)(params, state, down)
    np.testing.assert_allclose(params["kernel"][:, 0], [1.5, 0.0, 0.0, 0.0])
    assert masks(state)["kernel"][:, 0].tolist() == [True, True, False, False]


# Gradual pruning with recovery


@pytest.mark.parametrize("momentum, decay", [(0.0, 0.0), (0.9, 0.0), (0.0, 0.1)])
def test_what_happens_to_a_pruned_weight_that_may_recover(momentum, decay):
    """Plain SGD leaves it; momentum and decay move it on. Oracle: the recurrence of v and z."""
    inner = optax.chain(
        optax.add_decayed_weights(decay), optax.sgd(0.1, momentum=momentum or None)
    )  # fmt: skip
    tx = jaxsparse.magnitude(inner, 0.5, total_steps=10, begin_step=2, end_step=2, recovery=True)
    z = jnp.array([[4.0, 3.0], [0.23, 0.12]])
    params, state = start(tx, {"kernel": z})
    step, ones = stepper(tx), {"kernel": jnp.ones((2, 2))}
    want, v = np.asarray(z, np.float64), np.zeros((2, 2))
    kept = np.ones((2, 2), bool)
    for t in range(8):
        params, state = step(params, state, ones)
        v = momentum * v + kept + decay * want
        want = want - 0.1 * v
        if t == 2:
            kept = np.abs(want) >= np.sort(np.abs(want).ravel())[2]
        np.testing.assert_allclose(state.raw["kernel"], want, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(np.asarray(params["kernel"]) != 0, kept)
