"""Trees of masks: applied, counted, packed to bits, and found in the state of any optimizer."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contracts import QUICK

import jaxsparse
from jaxsparse import masking
from jaxsparse.testing import by_path


def params():
    k = jax.random.split(jax.random.key(0))
    return {
        "a": {"kernel": jax.random.normal(k[0], (8, 6)), "bias": jnp.ones(6)},
        "b": {"kernel": jax.random.normal(k[1], (6, 4))},
    }


def test_masks_are_applied_by_choice_not_by_product():
    bad = jnp.array([jnp.nan, jnp.inf, -1.0, -jnp.inf, 2.0])
    keep = jnp.array([False, False, False, True, True])
    out = masking.apply({"w": bad, "b": bad}, {"w": keep, "b": None})
    assert out["w"].tolist() == [0.0, 0.0, 0.0, -np.inf, 2.0]
    assert not np.any(np.signbit(np.asarray(out["w"][:3])))
    assert np.array_equal(out["b"], bad, equal_nan=True)


@pytest.mark.parametrize(
    "shape, axis",
    [((1,), -1), ((7,), -1), ((9,), -1), ((3, 13), -1), ((2, 3, 5), -1), ((16, 32), -2),
     ((2, 24, 5), -2), ((16, 3, 5), -3), ((3, 3, 1, 16), -1)],
)  # fmt: skip
def test_packing_takes_one_bit_per_weight_and_is_inverted(shape, axis):
    """The axis that wastes least is packed, the last but one before others."""
    mask = jax.random.bernoulli(jax.random.key(1), 0.5, shape)
    packed = masking.pack(mask)
    assert packed.shape == shape
    assert packed.axis == axis
    assert packed.bits.nbytes == mask.size // shape[axis] * -(-shape[axis] // 8)
    assert np.array_equal(masking.unpack(packed), mask)
    assert masking.count_kept({"w": packed, "b": None}) == int(mask.sum())


@pytest.mark.parametrize("name", ["rigl", "set", "magnitude", "magnitude_ste", "st3", "str"])
def test_packed_masks_are_the_same_masks_step_by_step(name):
    known = jaxsparse.METHODS[name].options
    given = dict(sparsity=0.5, total_steps=8, update_every=2, end_step=6)
    given = {k: v for k, v in given.items() if k in known}
    runs = []
    for packed in (False, True):
        tx = jaxsparse.make(name, optax.sgd(0.1, momentum=0.9), pack_masks=packed, **given)

        def step(carry, _, tx=tx):
            p, s = carry
            u, s = tx.update(jax.tree.map(jnp.sin, p), s, p)
            p = optax.apply_updates(p, u)
            return (p, s), (p, jaxsparse.get_masks(s))

        start = (params(), tx.init(params()))
        run = lambda s, step=step: jax.lax.scan(step, s, length=6)[1]
        runs.append(jax.jit(run, compiler_options=QUICK)(start))
    weights, masks = ([by_path(r[i]) for r in runs] for i in (0, 1))
    for one, two in (weights, masks):
        assert one.keys() == two.keys()
    assert all(np.array_equal(masks[0][k], masks[1][k]) for k in masks[0])
    # Two programs: XLA contracts products and sums in one where it does not in the other.
    for path, w in weights[0].items():
        np.testing.assert_allclose(w, weights[1][path], rtol=1e-6, atol=1e-7)


def test_packed_state_holds_one_bit_per_weight_of_mask():
    n = 8 * 6 + 6 * 4
    for packed, size in ((False, n), (True, 1 * 6 + 1 * 4)):
        state = jaxsparse.static(optax.sgd(0.1), 0.5, pack_masks=packed).init(params())
        assert sum(x.nbytes for x in jax.tree.leaves(state.masks)) == size


WRAPPERS = {
    "alone": lambda tx: tx,
    "chain": lambda tx: optax.chain(optax.clip_by_global_norm(1.0), tx),
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 2),
    "masked": lambda tx: optax.masked(tx, {"a": True, "b": False}),
    "partition": lambda tx: optax.partition(
        {"x": tx, "y": optax.sgd(0.1)}, {"a": {"kernel": "x", "bias": "y"}, "b": {"kernel": "y"}}
    ),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
    "all": lambda tx: optax.MultiSteps(
        optax.chain(optax.apply_if_finite(optax.masked(tx, {"a": True, "b": False}), 3)), 2
    ),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_masks_and_raw_weights_are_found_inside_any_wrapper(name):
    tx = jaxsparse.magnitude_ste(optax.sgd(0.1), 0.5)
    state = WRAPPERS[name](tx).init(params())
    masks, raw = jaxsparse.get_masks(state), jaxsparse.get_raw_params(state)
    some = ["a/kernel"] if name in ("masked", "partition", "all") else ["a/kernel", "b/kernel"]
    assert list(by_path(masks)) == list(by_path(raw)) == some
    assert masks["a"]["bias"] is None and int(masks["a"]["kernel"].sum()) == 24
    sparse = jaxsparse.apply_masks(params(), state)
    assert int((sparse["a"]["kernel"] != 0).sum()) == 24


def test_methods_that_hold_masks_keep_no_raw_weights():
    state = jaxsparse.static(optax.sgd(0.1), 0.5).init(params())
    assert jaxsparse.get_raw_params(state) is None


def test_a_state_without_a_method_is_an_error_that_says_what_to_pass():
    state = optax.adam(0.1).init(params())
    for read in (jaxsparse.get_masks, jaxsparse.get_raw_params):
        with pytest.raises(
            ValueError, match="holds no state of a jaxsparse method; pass the state"
        ):
            read(state)
    with pytest.raises(ValueError, match="holds no state of a jaxsparse method"):
        jaxsparse.apply_masks(params(), state)


def test_the_sparse_network_before_the_first_update_is_that_of_the_masks_or_of_the_raw_weights():
    p = params()
    state = jaxsparse.rigl(optax.sgd(0.1), 0.5, total_steps=1000).init(p)
    sparse = by_path(jaxsparse.apply_masks(p, state))
    for path, m in by_path(jaxsparse.get_masks(state)).items():
        assert np.array_equal(sparse[path], np.where(m, by_path(p)[path], 0))
    state = jaxsparse.str_(optax.sgd(0.1), threshold_init=-1.0).init(p)
    th = 1 / (1 + np.exp(1.0))
    w = by_path(p)["a/kernel"]
    expected = np.sign(w) * np.maximum(np.abs(w) - th, 0)
    found = by_path(jaxsparse.apply_masks(p, state))["a/kernel"]
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_masks_are_taken_from_the_zeros_of_a_sparse_model():
    p = params()
    sparse, masks = jaxsparse.prune(p, 0.75)
    state = jaxsparse.static(optax.sgd(0.1), masks="from_params").init(sparse)
    for found in (jaxsparse.get_masks(state), masking.from_zeros(sparse)):
        assert by_path(found).keys() == {"a/kernel", "b/kernel"}
        assert all(np.array_equal(m, by_path(masks)[k]) for k, m in by_path(found).items())


def test_a_summary_counts_leaves_and_totals_and_says_it_in_every_form():
    p = params()
    sparse, masks = jaxsparse.prune(p, 0.75)
    state = jaxsparse.static(optax.sgd(0.1), masks=masks).init(sparse)
    s = jaxsparse.summarize(sparse, state)
    assert s.sparsity == 0.75 and s.total.size == 48 + 6 + 24
    assert s.total.nonzeros == 12 + 6 + 6 and s.sparse.nonzeros == 18
    log = s.to_dict()
    assert log["leaves"]["a/kernel"]["mask_sparsity"] == 0.75
    assert log["leaves"]["a/bias"]["mask_sparsity"] is None
    assert log["sparsity"] == 0.75 and log["bytes"] == 4 * 78
    text, page = str(s), s._repr_html_()
    for word in ("a/kernel", "8x6", "75.00%", "sparse leaves", "total"):
        assert word in text and word in page
    assert jaxsparse.summarize(p).sparsity == 0.0


def test_a_leaf_that_is_zero_everywhere_is_kept_whole_and_named():
    p = {"base": jnp.eye(4), "lora_b": jnp.zeros((2, 4))}
    tx = jaxsparse.static(optax.sgd(0.1), masks="from_params")
    with pytest.warns(
        UserWarning, match=r"'lora_b' is zero everywhere.*targets=\[\('lora_b', False"
    ):
        state = tx.init(p)
    for s in (state, jax.jit(tx.init)(p)):
        masks = jaxsparse.get_masks(s)
        assert int(masks["base"].sum()) == 4 and bool(masks["lora_b"].all())
    updates, _ = tx.update({"base": jnp.ones((4, 4)), "lora_b": jnp.ones((2, 4))}, state, p)
    assert int(jnp.count_nonzero(updates["lora_b"])) == 8


def test_masks_that_match_no_leaf_are_named_for_modules_that_are_no_containers_too():
    @jax.tree_util.register_dataclass
    @dataclasses.dataclass
    class Module:
        kernel: jax.Array

    p, misspelt = Module(jnp.ones((4, 4))), {"kernal": jnp.ones((4, 4), bool)}
    tx = jaxsparse.static(optax.sgd(0.1), masks=misspelt)
    with pytest.raises(ValueError, match="kernal"):
        tx.init(p)
    tx = jaxsparse.static(optax.adam(0.1), masks=Module(jnp.eye(4, dtype=bool)))
    kept = optax.tree.map_params(tx, lambda x: x + 1, tx.init(p))
    assert jaxsparse.get_masks(kept).kernel.sum() == 4


def test_a_summary_says_why_a_leaf_is_dense():
    p = {"fc": {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)}, "head": jnp.ones((4, 4)),
         "norm1": {"weight": jnp.ones((2, 4))}, "lost": jnp.ones((4, 4))}  # fmt: skip
    keep = {"fc": {"kernel": jnp.eye(4, dtype=bool), "bias": None}, "head": None,
            "norm1": {"weight": None}, "lost": jnp.zeros((4, 4), bool)}  # fmt: skip
    state = jaxsparse.static(optax.sgd(0.1), masks=keep).init(p)
    s = jaxsparse.summarize(jaxsparse.apply_masks(p, state), state)
    notes = {r.path: r.note for r in s.rows}
    assert notes == {"fc/kernel": "", "fc/bias": "vector", "head": "left out",
                     "norm1/weight": "normalisation", "lost": "empty mask"}  # fmt: skip
    assert s.to_dict()["leaves"]["head"]["note"] == "left out"
    assert "left out" in str(s) and "left out" in s._repr_html_()
    keep["head"] = jnp.ones((4, 4), bool)  # as ERK leaves small layers
    state = jaxsparse.static(optax.sgd(0.1), masks=keep).init(p)
    row = next(r for r in jaxsparse.summarize(p, state).rows if r.path == "head")
    assert row.note == "kept whole by its budget"
    assert "note" not in str(jaxsparse.summarize({"kernel": jnp.ones((2, 2))}))


def test_masks_that_are_given_reach_the_leaves_whose_names_they_bear():
    p = {"attn": {"box": jnp.ones((4, 4)), "value": jnp.ones((4, 4))}, "a": {"b": jnp.ones((2, 2))},
         "a/b": jnp.ones((2, 2))}  # fmt: skip
    given = jax.tree.map(lambda w: jax.random.bernoulli(jax.random.key(w.size), 0.5, w.shape), p)
    given["a/b"] = ~given["a"]["b"]
    held = jaxsparse.get_masks(jaxsparse.static(optax.sgd(0.1), masks=given).init(p))
    assert all(np.array_equal(*pair) for pair in zip(jax.tree.leaves(given), jax.tree.leaves(held)))
