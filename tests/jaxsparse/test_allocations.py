"""How a budget is split over the layers; the golden values of ERK are in test_goldens.py, those of
rules for initial networks in test_initial_networks.py."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxsparse
from jaxsparse import allocations
from jaxsparse.allocations import ErdosRenyi, Explicit, Global, Uniform
from jaxsparse.leaves import find
from jaxsparse.testing import by_path

SHAPES = {"layer_1": (784, 300), "layer_2": (300, 100), "layer_10": (100, 10)}


def leaves_of(shapes):
    tree = {k: {"kernel": jax.ShapeDtypeStruct(s, jnp.float32)} for k, s in shapes.items()}
    return sorted(find(tree).leaves, key=lambda leaf: list(shapes).index(leaf.path[:-7]))


LEAVES = leaves_of(SHAPES)


def total(sparsities, leaves):
    return sum((1 - s) * leaf.size for s, leaf in zip(sparsities, leaves))


def test_uniform_is_the_same_everywhere_but_where_a_layer_is_dense():
    assert Uniform().sparsities(LEAVES, 0.9) == [0.9, 0.9, 0.9]
    assert Uniform(first_dense=True).sparsities(LEAVES, 0.9) == [0.0, 0.9, 0.9]
    assert Uniform(dense=("layer_10",)).sparsities(LEAVES, 0.9) == [0.9, 0.9, 0.0]


def test_er_follows_inputs_and_outputs_and_erk_all_sides_of_the_kernel():
    leaves = leaves_of({"conv": (3, 3, 64, 64), "head": (64, 64)})
    er, erk = ([1 - s for s in ErdosRenyi(kernel=k).sparsities(leaves, 0.9)] for k in (False, True))
    assert er[0] / er[1] == pytest.approx(1.0)
    assert erk[0] / erk[1] == pytest.approx((3 + 3 + 64 + 64) / 9 / (64 + 64))
    for found in (er, erk):
        assert total([1 - d for d in found], leaves) == pytest.approx(0.1 * 40960, abs=2)


@settings(max_examples=40, deadline=None)
@given(
    sides=st.lists(st.tuples(st.integers(1, 64), st.integers(1, 64)), min_size=1, max_size=6),
    sparsity=st.floats(0.0, 0.99),
    kernel=st.booleans(),
)
def test_er_meets_the_budget_of_a_uniform_split_and_no_density_exceeds_one(sides, sparsity, kernel):
    leaves = leaves_of({f"layer_{i}": s for i, s in enumerate(sides)})
    found = ErdosRenyi(kernel=kernel).sparsities(leaves, sparsity)
    assert all(0.0 <= s <= 1.0 for s in found)
    uniform = sum(leaf.size - math.floor(sparsity * leaf.size) for leaf in leaves)
    assert total(found, leaves) == pytest.approx(uniform, abs=1 + 1e-6 * uniform)


def test_layers_outside_the_budget_are_not_paid_for_and_those_inside_are():
    outside = ErdosRenyi(first_dense=True).sparsities(LEAVES, 0.9)
    assert outside[0] == 0.0
    assert total(outside[1:], LEAVES[1:]) == pytest.approx(0.1 * 31000)
    inside = ErdosRenyi(last_dense=True).sparsities(LEAVES, 0.9)
    assert inside[2] == 0.0 and total(inside, LEAVES) == pytest.approx(0.1 * 266200)


def test_the_first_and_the_last_layer_are_those_of_the_natural_order():
    """layer_10 comes after layer_2, whatever the order of the tree."""
    assert allocations.last_leaf(LEAVES) == "layer_10/kernel"
    shuffled = [LEAVES[2], LEAVES[0], LEAVES[1]]
    assert Uniform(first_dense=True).sparsities(shuffled, 0.9) == [0.9, 0.0, 0.9]


@pytest.mark.parametrize("rule", [Uniform(), ErdosRenyi(), ErdosRenyi(kernel=False)], ids=str)
def test_a_traced_sparsity_gives_the_same_split(rule):
    traced = jax.jit(lambda s: [jnp.asarray(x) for x in rule.sparsities(LEAVES, s)])
    for s in (0.5, 0.9, 0.98):
        np.testing.assert_allclose(traced(s), rule.sparsities(LEAVES, s), atol=2e-5)


def test_sparsities_by_path_take_the_first_pattern_and_the_default():
    rule = allocations.resolve({"layer_1$|layer_1/": 0.5, "layer": 0.8})
    assert rule.sparsities(LEAVES, None) == [0.5, 0.8, 0.8]
    assert Explicit({"layer_2": 0.5}).sparsities(LEAVES, 0.9) == [0.9, 0.5, 0.9]
    assert Explicit({"layer_2": 0.5}, default=0.7).sparsities(LEAVES, 0.9) == [0.7, 0.5, 0.7]
    w = {k: {"kernel": jnp.ones((10, 10))} for k in ("x", "y")}
    _, masks = jaxsparse.prune(w, 0.5, allocation={"x": 0.9})
    assert {k: int(m.sum()) for k, m in by_path(masks).items()} == {"x/kernel": 10, "y/kernel": 50}


def test_scores_divided_by_their_norm_rank_layers_of_different_scale_alike():
    w = jax.random.normal(jax.random.key(0), (20, 20))
    tree = {"large": {"kernel": 100 * w}, "small": {"kernel": w}}
    _, plain = jaxsparse.prune(tree, 0.5, allocation="global")
    _, scaled = jaxsparse.prune(tree, 0.5, allocation=Global(normalize="l2"))
    kept = lambda masks: [int(m.sum()) for m in by_path(masks).values()]
    assert kept(plain)[1] < 40 and sum(kept(plain)) == 400
    assert abs(kept(scaled)[0] - 200) <= 2 and sum(kept(scaled)) == 400


@pytest.mark.parametrize("normalize", ["l2", "mean"])
def test_layers_are_put_on_one_scale_as_divided_by_hand(normalize):
    rng = np.random.default_rng(0)
    tree = {f"l{i}": {"kernel": jnp.asarray(rng.normal(size=s) * c, jnp.float32)}
            for i, (s, c) in enumerate([((3, 4), 1.0), ((20, 10), 0.01), ((2, 30), 50.0)])}  # fmt: skip
    _, masks = jaxsparse.prune(tree, 0.7, allocation=f"global_{normalize}")
    _, again = jaxsparse.prune(
        jax.tree.map(lambda w: 8.0 * w, tree), 0.7, allocation=Global(normalize=normalize)
    )
    scale = {"l2": np.linalg.norm, "mean": lambda x: np.mean(np.abs(x))}[normalize]
    every = np.concatenate([np.abs(np.asarray(x, np.float64) / scale(x)).ravel()
                            for x in by_path(tree).values()])  # fmt: skip
    cut = np.sort(every)[-(272 - 190)]
    found = np.concatenate([m.ravel() for m in by_path(masks).values()])
    assert np.array_equal(found, every >= cut)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), masks, again))


def test_stacked_layers_are_put_on_one_scale_each():
    w = jax.random.normal(jax.random.key(0), (20, 20))
    tree = {"layers": {"kernel": jnp.stack([100 * w, w])}}
    for normalize in ("l2", "mean", "lamp"):
        _, masks = jaxsparse.prune(
            tree, 0.5, allocation=Global(normalize=normalize),
            targets=[("layers", jaxsparse.targets.stacked())],
        )  # fmt: skip
        kept = np.asarray(masks["layers"]["kernel"]).sum(axis=(1, 2))
        assert kept.sum() == 400 and abs(kept[0] - 200) <= 2, normalize


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: allocations.resolve("erdos"), r"allocation='erdos': give one of \['er', 'erk'"),
        (lambda: Explicit({"a": 1.0}), r"allocation: sparsity 1.0 for 'a' is not in \[0, 1\)"),
        (lambda: Explicit({"no": 0.5}).sparsities(LEAVES, 0.9), "allocation: no leaf matches 'no'"),
        (
            lambda: Explicit({"layer_2": 0.5}).sparsities(LEAVES, None),
            "no pattern matches 'layer_1/",
        ),
        (lambda: Uniform(dense=("no",)).sparsities(LEAVES, 0.9), "no leaf matches 'no'"),
        (lambda: Global(normalize="l1"), "use None, 'l2', 'rms', 'mean' or 'lamp'"),
        (lambda: Global(minimum=-1), "must not be negative"),
    ],
)
def test_what_makes_no_sense_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_ranking_needs_units_of_one_size():
    tree = {"a": {"kernel": jnp.ones((8, 8))}}
    with pytest.raises(ValueError, match="allocation='global' ranks units of one size"):
        jaxsparse.prune(tree, structure=jaxsparse.structures.NM(2, 4), allocation="global")
