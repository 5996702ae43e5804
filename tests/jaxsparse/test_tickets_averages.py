"""Averages of networks with one mask, and the line between two."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxsparse.analysis import connectivity
from jaxsparse.tickets import average, greedy_soup

RNG = np.random.default_rng(0)


def siblings(n, masks=None):
    mask = RNG.random((6, 5)) < 0.4
    draw = lambda m: {"kernel": jnp.asarray(np.where(m, RNG.normal(size=(6, 5)), 0), jnp.float32)}
    return [draw(mask if masks is None else masks[i]) for i in range(n)], mask


def test_a_mean_of_one_mask_has_that_mask_and_of_several_less_sparsity():
    networks, mask = siblings(4)
    np.testing.assert_array_equal(np.asarray(average(networks)["kernel"]) != 0, mask)
    masks = [RNG.random((6, 5)) < 0.4 for _ in range(3)]
    others, _ = siblings(3, masks)
    with pytest.raises(ValueError, match="zeros of 'kernel' differ"):
        average(others)
    union = np.asarray(average(others, same_zeros=False)["kernel"]) != 0
    np.testing.assert_array_equal(union, np.logical_or.reduce(masks))
    with pytest.raises(ValueError, match="there are none"):
        average([])


def test_a_soup_of_copies_is_the_copy_and_of_a_convex_loss_no_worse_than_the_mean():
    (one, *_), _ = siblings(1)
    np.testing.assert_array_equal(average([one] * 4)["kernel"], one["kernel"])
    networks, _ = siblings(5)
    x = RNG.normal(size=(20, 6)).astype("f4")
    loss = lambda p: float(jnp.mean((x @ p["kernel"] - 1) ** 2))
    assert loss(average(networks)) <= np.mean([loss(p) for p in networks])
    found = greedy_soup(networks, lambda p: -loss(p))
    assert loss(found.params) <= min(map(loss, networks))
    assert found.members[0] == int(np.argmin([loss(p) for p in networks]))


def test_there_is_no_barrier_in_a_bowl_nor_between_copies_and_one_between_valleys():
    rng = np.random.default_rng(0)
    a, b = ({"w": jnp.asarray(rng.normal(size=5))} for _ in range(2))
    bowl = lambda p: jnp.mean(p["w"] ** 2)
    assert connectivity.line(bowl, a, b).barrier <= 1e-6
    assert connectivity.line(bowl, a, a).barrier == pytest.approx(0, abs=1e-6)
    wells = lambda p: jnp.sum((p["w"] ** 2 - 1) ** 2)
    low, high = {"w": -jnp.ones(3)}, {"w": jnp.ones(3)}
    assert connectivity.line(wells, low, high).barrier == pytest.approx(3, rel=1e-3)
    with pytest.raises(ValueError, match="points=2"):
        connectivity.line(bowl, a, b, points=2)


def test_a_network_that_diverged_is_in_no_soup():
    networks = [{"w": jnp.array([x])} for x in (jnp.nan, 1.0, 1.5)]
    assert greedy_soup(networks, lambda p: -jnp.abs(p["w"][0])).members == (1,)
    with pytest.raises(ValueError, match="at least one must not be NaN"):
        greedy_soup(networks[:1], lambda p: p["w"][0])


def test_copies_average_to_themselves_in_every_type():
    assert [int(average([{"s": jnp.int32(n)}] * 6)["s"]) for n in (7, 14, 25)] == [7, 14, 25]
    x = jnp.asarray(RNG.normal(size=1000), jnp.bfloat16)
    found = average([{"w": x}] * 3)["w"]
    assert found.dtype == jnp.bfloat16 and bool((found == x).all())
