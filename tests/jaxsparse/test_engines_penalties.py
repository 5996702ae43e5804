"""Penalty gradients before the inner optimizer and proximal steps after it, against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxsparse
from jaxsparse.engines import L1, GroupLasso, Sum, add_penalty, proximal
from jaxsparse.engines.units import Units, group_setup
from jaxsparse.leaves import find
from jaxsparse.structures import Channel, Coupled

RNG = np.random.default_rng(0)
KERNEL = RNG.normal(size=(2, 3, 4, 5)).astype(np.float32)
KERNEL[..., 2] = 0
# The axes that stay when norms are taken, by family.
FAMILIES = {"filters": (3,), "channels": (2,), "shapes": (0, 1, 2), "layers": ()}


def groups_of(w, family):
    """Index tuples of every group of a family."""
    fixed = FAMILIES[family]
    for at in np.ndindex(*[w.shape[a] for a in fixed]):
        index = [slice(None)] * w.ndim
        for a, i in zip(fixed, at):
            index[a] = i
        yield tuple(index)


def lasso(w, strength, family):
    """Value, gradient and proximal step of a group lasso, group by group."""
    value, grad, prox = 0.0, np.zeros_like(w), np.array(w)
    for at in groups_of(w, family):
        norm = np.sqrt((w[at] ** 2).sum())
        value += strength * norm
        if norm > 0:
            grad[at] = strength * w[at] / norm
            prox[at] = max(0.0, 1 - strength / norm) * w[at]
    return value, grad, prox


def one(penalty, w, structure=None):
    units = Units(find({"kernel": jnp.asarray(w)}, None, structure or Channel()).leaves)
    ws = [jnp.asarray(w)]
    return penalty.value(units, ws), penalty.gradient(units, ws)[0], penalty.prox(units, ws, 1.0)[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_four_families_of_a_group_lasso_are_those_of_a_loop(family):
    for found, want in zip(one(GroupLasso(1.7, family), KERNEL), lasso(KERNEL, 1.7, family)):
        np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-6)


def test_the_gradient_has_the_norm_of_the_strength_in_every_group_that_is_not_zero():
    grad = np.asarray(one(GroupLasso(0.3, "filters"), KERNEL)[1])
    norms = np.sqrt((grad**2).sum((0, 1, 2)))
    np.testing.assert_allclose(norms, [0.3, 0.3, 0, 0.3, 0.3], atol=1e-6)


def test_filters_are_the_units_of_output_channels_and_sizes_enter_as_their_root():
    for a, b in zip(one(GroupLasso(0.5), KERNEL), one(GroupLasso(0.5, "filters"), KERNEL)):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    sized, plain = one(GroupLasso(0.5, by_size=True), KERNEL), one(GroupLasso(0.5), KERNEL)
    np.testing.assert_allclose(sized[0], plain[0] * np.sqrt(24), rtol=1e-6)
    np.testing.assert_allclose(sized[1], np.sqrt(24) * plain[1], rtol=1e-5)


def test_a_sum_of_families_adds_gradients_and_l1_within_groups_solves_both():
    terms = GroupLasso(0.2, "filters"), GroupLasso(0.3, "shapes")
    both = one(Sum(terms), KERNEL)
    np.testing.assert_allclose(
        both[0], lasso(KERNEL, 0.2, "filters")[0] + lasso(KERNEL, 0.3, "shapes")[0], rtol=1e-5
    )
    np.testing.assert_allclose(
        both[1], lasso(KERNEL, 0.2, "filters")[1] + lasso(KERNEL, 0.3, "shapes")[1], atol=1e-6
    )
    # The sparse group lasso: the proximal point has no better neighbour.
    w = np.random.default_rng(3).normal(size=(4, 3)).astype(np.float32)
    sparse = Sum((L1(0.4), GroupLasso(0.6, "filters")))
    found = np.asarray(one(sparse, w)[2])
    objective = lambda x: (
        0.5 * ((x - w) ** 2).sum() + 0.4 * np.abs(x).sum() + 0.6 * np.sqrt((x**2).sum(0)).sum()
    )
    rng = np.random.default_rng(4)
    assert all(
        objective(found) <= objective(found + 1e-2 * rng.normal(size=w.shape)) for _ in range(200)
    )


def test_units_that_span_leaves_are_shrunk_together():
    params = {"a": jnp.asarray([[3.0, 0.1], [0.0, 0.0]]), "b": jnp.asarray([[4.0], [0.1]])}
    coupled = Coupled([[("a", 1), ("b", 0)]])
    tx = optax.chain(optax.sgd(1.0), proximal(GroupLasso(1.0), 1.0, groups=coupled))
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    new = optax.apply_updates(params, updates)
    np.testing.assert_allclose(new["a"], [[2.4, 0], [0, 0]], rtol=1e-6)
    np.testing.assert_allclose(new["b"], [[3.2], [0]], rtol=1e-6)


def ridge(steps, lr, tx):
    """Proximal gradient descent on 0.5 ||w - c||^2, whose solution with a group lasso is known."""
    goal = jnp.asarray([[3.0, 0.3, -2.0], [4.0, 0.4, 0.0]])
    params = {"kernel": jnp.ones((2, 3))}
    state = tx.init(params)
    step = jax.jit(lambda p, s: tx.update({"kernel": p["kernel"] - goal}, s, p))
    for _ in range(steps):
        updates, state = step(params, state)
        params = optax.apply_updates(params, updates)
    return np.asarray(params["kernel"])


def test_the_proximal_step_recovers_the_zero_groups_of_a_ridge_problem_and_the_subgradient_does_not():
    prox = ridge(200, 0.2, optax.chain(optax.sgd(0.2), proximal(GroupLasso(1.0), 0.2)))
    np.testing.assert_allclose(prox, [[2.4, 0, -1], [3.2, 0, 0]], atol=1e-5)
    assert (prox[:, 1] == 0).all()
    sub = ridge(200, 0.2, optax.chain(add_penalty(GroupLasso(1.0)), optax.sgd(0.2)))
    np.testing.assert_allclose(sub[:, [0, 2]], [[2.4, -1], [3.2, 0]], atol=1e-5)
    assert (sub[:, 1] != 0).any()


def test_the_penalty_stands_before_momentum_and_the_proximal_step_after_it():
    params = {"kernel": jnp.asarray([[1.0, -2.0]])}
    zeros = {"kernel": jnp.zeros((1, 2))}
    before = optax.chain(add_penalty(L1(0.1)), optax.sgd(1.0, momentum=0.5))
    state = before.init(params)
    for _ in range(2):  # 0.1, then 0.1 + 0.5 * 0.1
        updates, state = before.update(zeros, state, params)

    np.testing.assert_allclose(updates["kernel"], [[-0.15, 0.15]], rtol=1e-6)
    after = optax.chain(optax.sgd(1.0, momentum=0.5), proximal(L1(0.1), lambda t: 1.0 + t))
    state = after.init(params)
    for size in (0.1, 0.2):
        updates, state = after.update(zeros, state, params)
        np.testing.assert_allclose(updates["kernel"], [[-size, size]], rtol=1e-5)


@pytest.mark.parametrize("name", ["rigl", "st3", "magnitude"])
def test_both_compose_with_methods(name):
    inner = optax.chain(add_penalty(L1(1e-3)), optax.adam(1e-2), proximal(GroupLasso(1e-3), 1e-2))
    tx = jaxsparse.make(name, inner, sparsity=0.5, total_steps=2000)
    params = {"kernel": jnp.asarray(RNG.normal(size=(6, 6)), jnp.float32)}
    state = tx.init(params)
    updates, state = tx.update({"kernel": jnp.ones((6, 6))}, state, params)
    params = optax.apply_updates(params, updates)
    assert bool(jaxsparse.check(params, state)) and np.isfinite(params["kernel"]).all()


def test_families_of_kernels_leave_vectors_alone():
    bias = jnp.asarray([3.0, 4.0])
    units = Units(find({"bias": bias}, "bias", Channel()).leaves)
    assert GroupLasso(1.0, "shapes").gradient(units, [bias])[0].tolist() == [0, 0]
    assert GroupLasso(1.0, "filters").prox(units, [bias], 1.0)[0].tolist() == [3, 4]
    assert float(GroupLasso(1.0, "layers").value(units, [bias])) == 5


def test_bad_arguments_say_what_and_where():
    with pytest.raises(ValueError, match="strength=-1"):
        L1(-1)
    with pytest.raises(ValueError, match="family='rows'"):
        GroupLasso(1.0, "rows")
    with pytest.raises(ValueError, match="step=-0.1"):
        proximal(L1(1.0), -0.1)
    with pytest.raises(ValueError, match=r"groups=3: give what channels.find"):
        add_penalty(L1(1.0), groups=3)
    for tx in (add_penalty(L1(1.0)), proximal(L1(1.0), 0.1)):
        with pytest.raises(ValueError, match="update needs the parameters"):
            tx.update({"kernel": jnp.ones((2, 2))}, tx.init({"kernel": jnp.ones((2, 2))}))
    assert group_setup(0.5, None).structure == Channel()
