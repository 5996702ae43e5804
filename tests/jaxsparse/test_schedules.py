"""Schedules end where they should, and say so if the run is too short for it."""

import jax
import jax.numpy as jnp
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jaxsparse
from jaxsparse import schedules
from jaxsparse.testing import by_path

steps = st.integers(0, 1000)


@given(begin=steps, length=steps, final=st.floats(0, 1, width=32), power=st.integers(1, 4))
def test_a_polynomial_is_exact_at_both_ends_and_monotone(begin, length, final, power):
    s = schedules.polynomial(begin, begin + length, final=final, power=power)
    times = jnp.array([0, begin, begin + length // 3, begin + length // 2, begin + length, 5000])
    values = jax.vmap(s)(times).tolist()
    assert values[-2] == values[-1] == final
    assert values == sorted(values)
    assert values[0] == 0.0 or begin + length == 0


def test_a_cosine_is_zero_from_its_end_on():
    f = schedules.cosine(0.3, 100)
    assert float(f(100)) == 0.0 and float(f(10**6)) == 0.0 and float(f(99)) > 0


def test_an_inverse_power_falls_from_its_value_to_zero():
    f = schedules.inverse_power(0.4, 10, power=3)
    assert [float(f(t)) for t in (0, 5, 10, 11)] == pytest.approx([0.4, 0.05, 0, 0])


def test_one_shot_jumps_and_constant_stays():
    jump = schedules.one_shot(3, final=0.9)
    assert [float(jump(t)) for t in (0, 2, 3, 4)] == pytest.approx([0, 0, 0.9, 0.9])
    assert float(schedules.constant(0.3)(7)) == pytest.approx(0.3)


@given(begin=st.integers(0, 20), length=st.integers(0, 40), every=st.integers(1, 50))
def test_updates_include_their_end_whatever_the_interval(begin, length, every):
    u = schedules.Updates(begin, begin + length, every)
    fired = [t for t in range(begin + length + 60) if u.fires(t)]
    assert fired[0] == begin and fired[-1] == begin + length
    assert set(range(begin, begin + length + 1, every)) <= set(fired)


@pytest.mark.parametrize("every", [1, 7, 30, 1000])
@pytest.mark.parametrize("name", ["magnitude", "random_pruning"])
def test_a_gradual_method_ends_exactly_at_its_target_whatever_its_interval(name, every):
    tx = jaxsparse.make(
        name, optax.sgd(0.1), sparsity=0.8, total_steps=20, end_step=10, update_every=every
    )
    params = {"kernel": jax.random.normal(jax.random.key(0), (10, 10))}

    def step(carry, _):
        p, s = carry
        u, s = tx.update(p, s, p)
        return (optax.apply_updates(p, u), s), None

    (_, state), _ = jax.lax.scan(step, (params, tx.init(params)), None, length=11)
    assert int(by_path(jaxsparse.get_masks(state))["kernel"].sum()) == 20


def test_defaults_fit_into_runs_of_any_length():
    for total in (1, 2, 3, 7, 100):
        u = schedules.window(total)
        assert 0 <= u.begin <= u.end < total


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(total_steps=0), "total_steps=0: a run has at least one step"),
        (dict(total_steps=10, update_every=0), "update_every=0: must be at least 1"),
        (dict(total_steps=10, begin_step=-1), "begin_step=-1: must not be negative"),
        (dict(total_steps=10, begin_step=10), "begin_step=10 is not within total_steps=10"),
        (dict(total_steps=10, begin_step=5, end_step=4), "end_step=4 is before begin_step=5"),
        (dict(total_steps=10, end_step=10), "the run would stop short of its target"),
    ],
)
def test_a_window_that_does_not_fit_is_an_error(arguments, message):
    with pytest.raises(ValueError, match=message):
        schedules.window(**arguments)


def test_a_rigl_run_shorter_than_its_interval_is_an_error():
    with pytest.raises(ValueError, match="masks would never be updated"):
        jaxsparse.rigl(optax.sgd(0.1), 0.9, total_steps=50, update_every=100)


def test_steps_may_be_traced():
    def fires(total):
        return schedules.window(total, update_every=3, fraction=0.5).fires(6)

    assert jax.jit(fires)(20) and not jax.jit(fires)(8)
