"""Counts are exact integers, at any size."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jaxsparse
from jaxsparse import _control, _counts, allocations
from jaxsparse.choose import choose, unit_budgets
from jaxsparse.leaves import find

traced = jax.jit(_counts.scale_count)


def test_counts_beyond_the_integers_of_float32_are_exact():
    assert _counts.kept_count(100_000_000, 0.98) == 2_000_000  # float32 gives 1,999,998
    assert _counts.kept_count(2**24 + 1, 0.5) == 2**23 + 1
    assert _counts.scale_count(10**13, 0.3) == 3 * 10**12


@pytest.mark.parametrize("kind", [float, np.float32, np.float64, jnp.float32])
def test_a_fraction_is_read_as_the_decimal_that_it_stands_for(kind):
    assert int(_counts.scale_count(10, kind(0.9))) == 9
    assert int(_counts.scale_count(1000, kind(0.7))) == 700
    assert int(_counts.scale_count(3, kind(1 / 3))) == 1


@given(st.integers(0, 2**31 - 1), st.integers(0, 2**23))
def test_traced_counts_of_dyadic_fractions_are_within_their_stated_tolerance(n, q):
    fraction = q / 2**23
    exact = int(Fraction(q, 2**23) * n)
    found = int(traced(jnp.int32(n), jnp.float32(fraction)))
    assert exact <= found <= exact + n * 2**-23 + 1
    assert found <= n


@given(st.integers(1, 2**22), st.integers(0, 100))
def test_traced_counts_of_percentages_equal_concrete_ones_below_2_to_the_22(n, percent):
    # A tolerance of 2^-23 moves no count whose exact value is a hundredth or more from the next.
    s = percent / 100
    exact = _counts.scale_count(n, s)
    found = int(traced(jnp.int32(n), jnp.float32(s)))
    assert found == exact or (found == exact + 1 and (Fraction(percent, 100) * n) % 1 > 0.5)


def test_the_ends_of_the_fraction_are_exact_when_traced():
    for n in (1, 1000, 2**24 + 1, 2**31 - 1):
        assert int(traced(jnp.int32(n), jnp.float32(0.0))) == 0
        assert int(traced(jnp.int32(n), jnp.float32(1.0))) == n


def test_budgets_beyond_2_to_the_31_are_exact_integers():
    size = 2**33
    leaves = find(
        {"kernel": jax.ShapeDtypeStruct((size // 8, 8), jnp.float32)}, lambda *_: True
    ).leaves
    (kept,) = unit_budgets(leaves, allocations.Uniform(), 0.9)
    assert kept == size - size * 9 // 10


def test_a_leaf_beyond_2_to_the_31_may_have_a_swept_sparsity():
    size = 2**33
    leaves = find(
        {"kernel": jax.ShapeDtypeStruct((size // 64, 64), jnp.float32)}, lambda *_: True
    ).leaves
    budget = lambda s, ramp: unit_budgets(leaves, allocations.Uniform(), s, ramp)[0]
    for s, ramp in ((0.75, 1.0), (0.5, 0.5), (0.0, 1.0)):
        kept = jax.jit(budget)(jnp.float32(s), jnp.float32(ramp))
        zeros = size * int(_counts._fixed_point(s * ramp)) >> 30
        assert int(kept.high) * 2**24 + int(kept.low) == size - zeros


def test_such_budgets_are_kept_to_the_last_weight(monkeypatch):
    jax.clear_caches()
    monkeypatch.setattr(_counts, "WIDE", 2**7)  # as if no number were wider than 7 bits
    leaves = find({"kernel": jnp.zeros((20, 15))}).leaves
    w = jax.random.normal(jax.random.key(0), (20, 15))
    chosen = lambda s: choose(leaves, [jnp.abs(w)], allocations.Uniform(), s)[0]
    for s in (0.9, 0.5, 0.25):
        assert int(jax.jit(chosen)(jnp.float32(s)).sum()) == 300 - int(300 * s)
    jax.clear_caches()


def test_nine_tenths_of_8200_weights_leave_820():
    assert _counts.kept_count(8200, 0.9) == 820
    _, masks = jaxsparse.prune({"w": jnp.ones((82, 100))}, 0.9)
    assert int(masks["w"].sum()) == 820


# -- A conditional that survives vmap --------------------------------------------------------------


def counted():
    calls = []

    def double(x, y):
        jax.debug.callback(lambda: calls.append(1))
        return x + y

    return calls, double


def test_a_condition_that_fails_skips_its_work():
    calls, double = counted()
    run = jax.jit(lambda go, x: _control.when(go, double, x, x))
    assert float(run(False, 2.0)) == 2.0 and float(run(True, 2.0)) == 4.0
    jax.effects_barrier()
    assert len(calls) == 1


def test_under_vmap_the_work_is_skipped_unless_a_member_asks_for_it():
    calls, double = counted()
    run = jax.jit(jax.vmap(lambda go, x: _control.when(go, double, x, 10.0)))
    x = jnp.arange(3.0)
    assert run(jnp.array([False] * 3), x).tolist() == [0, 1, 2]
    jax.effects_barrier()
    assert len(calls) == 0
    assert run(jnp.array([True, False, True]), x).tolist() == [10, 1, 12]
    jax.effects_barrier()
    assert len(calls) > 0


def test_under_two_vmaps_too():
    calls, double = counted()
    run = jax.jit(jax.vmap(jax.vmap(lambda go, x: _control.when(go, double, x, 10.0))))
    x = jnp.arange(4.0).reshape(2, 2)
    assert run(jnp.zeros((2, 2), bool), x).tolist() == [[0, 1], [2, 3]]
    jax.effects_barrier()
    assert len(calls) == 0
    assert run(x == 3, x).tolist() == [[0, 1], [2, 13]]


def test_what_the_work_closes_over_may_be_batched():
    run = jax.vmap(lambda go, x, y: _control.when(go, lambda c: c + y, x), in_axes=(None, None, 0))
    assert run(True, 1.0, jnp.arange(3.0)).tolist() == [1, 2, 3]
