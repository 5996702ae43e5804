"""The sparse leaves of a tree, and what speaks for their structure; `choose` keeps exactly the budget that is asked."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxsparse
from jaxsparse import _counts, allocations, structures
from jaxsparse.choose import choose, unit_budgets
from jaxsparse.leaves import Leaf, find
from jaxsparse.testing import by_path


def shapes(**sizes):
    """A tree of kernels that hold no memory."""
    return {
        name: {"kernel": jax.ShapeDtypeStruct(shape, jnp.float32)} for name, shape in sizes.items()
    }


def test_values_move_between_the_tree_and_the_list_of_sparse_leaves():
    tree = {"a": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}, "b": (jnp.ones((4, 4)), None)}
    p = find(tree)
    assert [leaf.path for leaf in p.leaves] == ["a/kernel", "b/0"]
    assert [x.shape for x in p.take(tree)] == [(2, 3), (4, 4)]
    put = p.put(tree, [1, 2])
    assert put["a"]["kernel"] == 1 and put["b"] == (2, None) and put["a"]["bias"].shape == (3,)
    assert p.scatter([1, 2]) == {"a": {"kernel": 1, "bias": None}, "b": (2, None)}


def test_structures_may_be_given_by_path():
    p = find(shapes(a=(8, 8), b=(8, 8)), None, {"^a": structures.NM(2, 4)})
    assert [str(leaf.structure) for leaf in p.leaves] == [
        str(structures.NM(2, 4)), str(structures.Unstructured())
    ]  # fmt: skip
    with pytest.raises(ValueError, match="structure.*no_such_layer"):
        find(shapes(a=(8, 8)), None, {"no_such_layer": structures.NM(2, 4)})


def test_salts_differ_between_seeds_streams_and_leaves_and_never_by_their_sum():
    a, b = find(shapes(a=(4, 4), b=(4, 4))).leaves
    found = {int(leaf.salt(s, t)) for leaf in (a, b) for s in range(8) for t in range(8)}
    assert len(found) == 2 * 8 * 8


def test_a_global_ranking_breaks_ties_differently_at_every_seed_and_step():
    leaves = find(shapes(a=(16, 16))).leaves

    def mask(seed, step):
        (m,) = choose(
            leaves, [jnp.zeros((16, 16))], allocations.Global(), 0.5, ties="hash", seed=seed,
            stream=step,
        )  # fmt: skip
        return np.asarray(m)

    assert mask(0, 0).sum() == 128
    assert not np.array_equal(mask(0, 1), mask(1, 0))
    assert not np.array_equal(mask(0, 0), mask(0, 1))
    assert np.array_equal(mask(3, 2), mask(3, 2))


def test_an_n_m_structure_decides_whatever_traced_sparsity_is_swept():
    w = {"a": {"kernel": jax.random.normal(jax.random.key(0), (8, 4))}}
    kind = structures.NM(2, 4)

    @jax.jit
    def masks(sparsity):
        return jaxsparse.prune(w, sparsity, structure=kind)[1]

    (m,) = by_path(masks(jnp.float32(0.5))).values()
    assert m.reshape(2, 4, 4).sum(1).tolist() == [[2] * 4] * 2
    # A layer that the allocation keeps dense stays dense.
    leaves = find(w, None, kind).leaves
    assert unit_budgets(leaves, allocations.Uniform(first_dense=True), 0.5) == [4]


def test_a_schedule_of_a_global_budget_counts_beyond_2_to_the_31(monkeypatch):
    n = 5 * 2**31 + 12345
    for size in (1, 3, 128):
        for s in (0.0, 0.25, 0.9, 0.998, 1.0):
            high, low = _counts.kept_count(n, jnp.float32(s)) // size
            found = int(high) * 2**24 + int(low)
            zeros = n * int(_counts._fixed_point(s)) >> 30
            assert found == (n - zeros) // size
            assert abs(found * size - n * (1 - s)) < n * 2**-22 + size
    # The whole way through, where numbers of 7 bits are the widest.
    jax.clear_caches()
    monkeypatch.setattr(_counts, "WIDE", 2**7)
    leaves = find(shapes(a=(20, 10), b=(10, 10))).leaves
    values = [jax.random.normal(jax.random.key(i), leaf.shape) for i, leaf in enumerate(leaves)]
    chosen = jax.jit(lambda f: choose(leaves, values, allocations.Global(), 0.9, fraction=f))
    kept = [int(sum(m.sum() for m in chosen(jnp.float32(f)))) for f in (0.0, 0.5, 1.0)]
    assert kept == [300, 300 - 135, 30]
    jax.clear_caches()


def test_a_gradual_global_method_can_be_traced_on_a_network_of_ten_billion_weights():
    tree = shapes(**{f"layer{i}": (2**15, 2**15) for i in range(10)})
    tx = jaxsparse.global_magnitude(optax.sgd(0.1), 0.9, total_steps=100)
    state = jax.eval_shape(tx.init, tree)
    updates, new = jax.eval_shape(tx.update, tree, state, tree)
    assert jax.tree.structure(new) == jax.tree.structure(state)
    assert jax.tree.structure(updates) == jax.tree.structure(tree)


def test_budgets_at_the_end_of_a_ramp_are_those_of_the_final_sparsity():
    leaves = find(shapes(a=(10, 10))).leaves
    for f, kept in ((0.0, 100), (0.5, 55), (1.0, 10)):
        (found,) = unit_budgets(leaves, allocations.Uniform(), 0.9, jnp.float32(f))
        assert int(found) == kept


def test_choosing_within_masks_never_brings_a_weight_back():
    leaves = find(shapes(a=(10, 10))).leaves
    values = [jax.random.normal(jax.random.key(0), (10, 10))]
    where = [jax.random.bernoulli(jax.random.key(1), 0.5, (10, 10))]
    (m,) = choose(leaves, values, allocations.Uniform(), 0.8, where=where)
    assert int(m.sum()) == 20 and not np.any(np.asarray(m & ~where[0]))


def test_a_leaf_of_which_a_global_ranking_leaves_nothing_is_named():
    tree = {"base": jax.random.normal(jax.random.key(0), (8, 8)), "lora_b": jnp.zeros((2, 8))}
    with pytest.warns(UserWarning, match=r"nothing of 'lora_b'; allocation=Global\(minimum=1\)"):
        jaxsparse.prune(tree, 0.75, allocation="global")
    with warnings.catch_warnings(action="error"):
        _, masks = jaxsparse.prune(tree, 0.75, allocation=allocations.Global(minimum=1))
    assert {k: int(m.sum()) for k, m in masks.items()} == {"base": 19, "lora_b": 1}


def test_a_traced_sparsity_leaves_no_layer_without_a_unit():
    leaves = find(shapes(a=(8, 8)), None, structures.Block(4, 4)).leaves
    (found,) = unit_budgets(leaves, allocations.Uniform(), jnp.float32(0.9))
    assert int(found) == 1


KINDS = [structures.Unstructured(), structures.Block(2, 4), structures.Channel(0),
         structures.Channel(-2), structures.FanIn(), structures.NM(2, 4), structures.NM(1, 4, 0)]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("stack", [(), (3,), (3, 2)])
def test_a_leaf_asks_its_structure_layer_by_layer(kind, stack):
    layer = (8, 12)
    x = jnp.abs(jax.random.normal(jax.random.key(0), (*stack, *layer)))
    leaf = Leaf(0, "w", x.shape, len(stack), kind)
    layers = x.reshape(-1, *layer)
    pooled = leaf.pool(x)
    assert pooled.ndim == kind.pool(layers[0]).ndim + bool(stack)
    each = pooled if stack else pooled[None]
    assert all(np.array_equal(u, kind.pool(y)) for u, y in zip(each, layers))
    k = kind.budget(layer, 48)
    best = leaf.best(x, k).reshape(-1, *layer)
    assert all(np.array_equal(m, structures.topk(kind, y, k)) for m, y in zip(best, layers))
    mask = best.reshape(x.shape)
    assert np.array_equal(leaf.expand(leaf.units(mask)), mask)
    assert leaf.counts(mask).sum() == k * kind.slices(layer) * max(len(each), 1)
    assert leaf.layer_axes == tuple(range(len(stack), x.ndim)) and leaf.stack_shape == stack
