"""Every structure allows exactly its pattern, and pools, ranks and expands its units."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxsparse
from jaxsparse import structures
from jaxsparse.leaves import Leaf
from jaxsparse.structures import NM, Block, Channel, FanIn, Unstructured

KINDS = [
    Unstructured(),
    Block(2, 4),
    Channel(-1),
    Channel(-2),
    FanIn(),
    NM(2, 4),
    NM(1, 2, axis=-1),
    NM(3, 4, strided=True),
]


def normal(shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.parametrize("shape", [(8, 12), (3, 3, 8, 4)])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_units_expand_to_the_weights_that_pool_to_them(kind, shape):
    kind.check("w", shape)
    scores = jnp.abs(normal(shape))
    pooled = kind.pool(scores)
    assert pooled.size * kind.unit_size(shape) == scores.size
    np.testing.assert_allclose(float(pooled.sum()), float(scores.sum()), rtol=1e-5)
    units = jax.random.bernoulli(jax.random.key(1), 0.5, pooled.shape)
    mask = kind.expand(units, shape)
    assert mask.shape == shape
    assert np.array_equal(structures.unit_mask(kind, mask), units)
    assert int(mask.sum()) == int(units.sum()) * kind.unit_size(shape)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_stacked_layers_are_masked_as_if_alone(kind):
    stack = jnp.abs(normal((3, 8, 12)))
    k = kind.budget((8, 12), 48)
    together = Leaf(0, "w", stack.shape, 1, kind).best(stack, k)
    alone = [structures.topk(kind, layer, k) for layer in stack]
    assert np.array_equal(together, np.stack(alone))


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 100), n=st.integers(1, 4), axis=st.sampled_from([-1, -2]),
       strided=st.booleans())  # fmt: skip
def test_n_m_keeps_the_n_largest_of_every_group(seed, n, axis, strided):
    x = np.abs(np.asarray(normal((8, 12), seed)))
    mask = np.asarray(structures.topk(NM(n, 4, axis, strided), jnp.asarray(x), n))
    x, mask = (np.moveaxis(a, axis, -1) for a in (x, mask))
    if strided:
        x, mask = (a.reshape(a.shape[0], 4, -1).swapaxes(1, 2) for a in (x, mask))
    x, mask = x.reshape(-1, 4), mask.reshape(-1, 4)
    assert np.all(mask.sum(1) == n)
    assert np.all(np.where(mask, x, np.inf).min(1) >= np.where(mask, -np.inf, x).max(1))


def test_a_block_is_kept_whole_by_the_sum_of_its_scores():
    x = jnp.zeros((4, 8)).at[0, 0].set(3.0).at[2:, 4:].set(1.0)
    mask = structures.topk(Block(2, 4), x, 1)
    assert np.array_equal(mask, jnp.zeros((4, 8), bool).at[2:, 4:].set(True))  # 8 beats 3


def test_a_convolution_is_the_matrix_of_its_window_and_inputs_by_outputs():
    mask = structures.topk(Block(9, 1), jnp.abs(normal((3, 3, 2, 4))), 5)
    tiles = np.asarray(mask).reshape(2, 9, 4, 1).sum((1, 3))
    assert sorted(set(tiles.ravel())) == [0, 9] and (tiles == 9).sum() == 5


def test_constant_fan_in_keeps_as_many_weights_of_every_output():
    mask = structures.topk(FanIn(), jnp.abs(normal((3, 3, 2, 5))), 4)
    assert mask.sum((0, 1, 2)).tolist() == [4] * 5


def test_scores_of_bfloat16_are_summed_and_ranked_in_float32():
    """256 + 1 is 256 in bfloat16: two blocks that differ by little would tie."""
    x = jnp.full((16, 32), 1.0, jnp.bfloat16).at[15, 31].set(2.0)
    assert Block(16, 16).pool(x).tolist() == [[256.0, 257.0]]
    assert structures.topk(Block(16, 16), x, 1)[0].tolist() == [False] * 16 + [True] * 16
    assert Channel(-1).pool(jnp.full((512, 1), 1.0, jnp.bfloat16).at[0].set(2.0)).tolist() == [513]


def test_a_budget_is_rounded_so_that_no_more_weights_stay_than_asked():
    assert Block(2, 4).budget((8, 12), 47) == 5
    assert FanIn().budget((8, 12), 47) == 3
    assert Channel(-1).budget((8, 12), 47) == 5
    # A ramp towards n:m tightens m, m-1, ..., n.
    assert [NM(1, 4).budget((8, 12), k) for k in (96, 73, 72, 49, 24)] == [4, 4, 3, 3, 1]


@pytest.mark.parametrize(
    "kind, shape, message",
    [
        (Block(3, 4), (8, 12), r"3 must divide its 8 rows"),
        (Block(2, 5), (8, 12), r"5 must divide its 12 columns"),
        (Block(16, 4), (8, 12), r"does not tile 'w'.*16 must divide its 8 rows"),
        (NM(2, 4), (10, 12), r"m=4 does not divide axis -2 of 'w'.*choose another axis"),
        (NM(2, 4, axis=2), (8, 12), r"give an axis from -2 to 1"),
        (Channel(3), (8, 12), r"give an axis from -2 to 1"),
    ],
)
def test_a_layer_that_cannot_have_the_structure_is_named(kind, shape, message):
    with pytest.raises(ValueError, match=message):
        kind.check("w", shape)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Block(0, 4), "at least 1"),
        (lambda: NM(5, 4), "need 1 <= n <= m"),
        (lambda: NM(0, 4), "need 1 <= n <= m"),
        (lambda: structures.resolve(4), "structure=4: give None.*or a text such as '2:4'"),
        (lambda: structures.parse("5:4"), "need 1 <= n <= m"),
        (lambda: structures.parse("block:0x4"), "at least 1"),
        *[
            (lambda text=text: structures.parse(text), f"structure={text!r}: write 2:4")
            for text in (
                "2x4",
                "2:",
                ":4",
                "block",
                "block:4",
                "block:4x",
                "channel:a",
                "fanin",
                "",
            )
        ],
    ],
)
def test_a_structure_that_makes_no_sense_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


TEXTS = {
    "unstructured": Unstructured(),
    "2:4": NM(2, 4),
    "block:2x4": Block(2, 4),
    "channel": Channel(-1),
    "channel:-2": Channel(-2),
    "fan_in": FanIn(),
}


@pytest.mark.parametrize("text", TEXTS)
def test_a_structure_is_named_by_its_text(text):
    assert structures.parse(text) == structures.resolve(text) == TEXTS[text]


WITH_STRUCTURE = [n for n, m in jaxsparse.METHODS.items() if "structure" in m.options]


@pytest.mark.parametrize("name", WITH_STRUCTURE)
def test_every_method_with_a_structure_takes_its_text(name):
    method, text = jaxsparse.METHODS[name], "2:4"
    if name.startswith("mest"):  # defined for every structure but N:M
        text = "block:2x4"
    fixed = TEXTS[text].sparsity is not None
    options = {
        "total_steps": 1000,
        "sparsity": None if fixed else 0.5,
        "allocation": "uniform",  # a global one, the default of some, has no place for N:M
    }
    options = {k: v for k, v in options.items() if k in method.options and v is not None}
    params = {"kernel": normal((8, 8))}

    def program(structure):
        tx = method.fn(optax.sgd(0.1), structure=structure, **options)
        step = lambda g, p: tx.update(g, tx.init(p), p, value=jnp.float32(1.0))
        return str(jax.make_jaxpr(step)(params, params))

    assert program(text) == program(TEXTS[text])


def test_a_mapping_of_structures_takes_texts():
    params = {"a": {"kernel": normal((8, 8))}, "b": {"kernel": normal((8, 8), 1)}}
    written = jaxsparse.prune(params, 0.5, structure={"^a": "2:4", "^b": "block:4x4"})
    built = jaxsparse.prune(params, 0.5, structure={"^a": NM(2, 4), "^b": Block(4, 4)})
    jax.tree.map(np.testing.assert_array_equal, written, built)


@pytest.mark.parametrize("name", ["static", "magnitude", "magnitude_ste"])
def test_n_m_both_ways_is_a_structure_of_methods(name):
    kind = structures.TransposableNM(2, 4)
    params = {"kernel": normal((8, 12)), "stack": normal((2, 4, 8), 1)}
    more = {"magnitude": {"total_steps": 9, "update_every": 3}}.get(name, {})
    more |= {} if name == "magnitude_ste" else {"allocation": "uniform"}
    tx = jaxsparse.make(
        name,
        optax.sgd(0.1),
        structure=kind,
        targets=[("stack", jaxsparse.targets.stacked())],
        **more,
    )
    state, update = tx.init(params), jax.jit(tx.update)
    for _ in range(9):
        updates, state = update(params, state, params)
        params = optax.apply_updates(params, updates)
    masks = jaxsparse.get_masks(state)
    for m in (masks["kernel"], *masks["stack"]):
        tiles = np.asarray(m).reshape(-1, 4, m.shape[1] // 4, 4)
        assert (tiles.sum(1) == 2).all() and (tiles.sum(3) == 2).all()
    if name == "magnitude":
        best = structures.transposable_nm_mask(jnp.abs(normal((4, 4))), 2, 4)
        (m,) = jaxsparse.prune({"w": normal((4, 4))}, structure=kind)[1].values()
        assert np.array_equal(m, best)


def test_random_masks_that_are_n_m_both_ways_differ_between_seeds():
    kind = structures.TransposableNM(1, 2)
    found = {
        jaxsparse.prune({"w": normal((8, 8))}, score="random", structure=kind, seed=s)[1]["w"]
        .__array__().tobytes() for s in range(4)
    }  # fmt: skip
    assert len(found) == 4


def test_weights_of_masks_that_are_no_ranking_are_not_exchanged_one_by_one():
    tx = jaxsparse.rigl(
        optax.sgd(0.1), structure=structures.TransposableNM(2, 4), total_steps=9, update_every=3,
        allocation="uniform",
    )  # fmt: skip
    params = {"w": normal((8, 8))}
    with pytest.raises(ValueError, match="masks are not ranked weight by weight"):
        tx.update(params, tx.init(params), params)
    with pytest.raises(ValueError, match=r"m=4 must divide the last two sides of 'w'"):
        jaxsparse.prune({"w": normal((8, 6))}, structure=structures.TransposableNM(2, 4))
