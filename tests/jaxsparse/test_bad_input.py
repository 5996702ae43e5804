"""What cannot be meant is refused, with the argument, its value, and what would be right.

Arguments of single rooms are refused in their own tests (structures, targets, allocations, schedules,
selection), states and checkpoints of another method or model in test_checkpoint.py, what a gradient
with NaN does to every method in test_contracts.py.
"""

import contracts
import jax
import jax.numpy as jnp
import optax
import pytest

import jaxsparse
from jaxsparse import structures
from jaxsparse.testing import parameters

METHODS = sorted(jaxsparse.METHODS)
MOMENTUM = optax.sgd(0.1, momentum=0.9)

BAD = [
    ("sparsity", 1.0),
    ("sparsity", -0.1),
    ("sparsity", True),
    ("sparsity", (0.5, 0.5)),
    ("total_steps", 0),
    ("total_steps", -5),
    ("update_every", 0),
    ("begin_step", -1),
    ("begin_step", contracts.STEPS),  # after the last step
    ("end_step", contracts.STEPS),
    ("drop_fraction", 1.5),
    ("drop_fraction", -0.1),
    ("initial_sparsity", -0.1),
    ("initial_sparsity", 0.9),
    ("structure", "two of four"),
    ("allocation", "erdos"),
    ("targets", "no_such_layer"),
    ("targets", [("kernel", 3)]),
    ("score", "size"),
    ("seed", "zero"),
    ("seed", 0.5),
    ("pack_masks", "yes"),
    ("raw_dtype", jnp.int8),
]


@pytest.mark.parametrize("name", METHODS)
def test_every_method_names_the_argument_that_is_out_of_range(name):
    method = jaxsparse.METHODS[name]
    for option, value in BAD:
        if option not in method.options:
            continue
        if "_step" in option and value == contracts.STEPS and "total_steps" not in method.options:
            continue  # nothing says how long the run is
        with pytest.raises(ValueError) as error:
            tx = method.fn(MOMENTUM, **{**contracts.options(name), option: value})
            state = jax.eval_shape(tx.init, parameters())
            jax.eval_shape(tx.update, parameters(), state, parameters())
        assert f"{option}=" in str(error.value) or f"{option}:" in str(error.value), (option, value)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_says_that_it_wraps_an_optimizer(name):
    with pytest.raises(ValueError, match="inner=0.1: give an optax gradient transformation"):
        jaxsparse.METHODS[name].fn(0.1, **contracts.options(name))


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"dense"}))
def test_every_method_says_that_an_update_needs_the_parameters(name):
    tx = contracts.subject(name).tx
    state = jax.eval_shape(tx.init, parameters())
    with pytest.raises(ValueError, match="update needs the parameters: call tx.update"):
        jax.eval_shape(lambda g, s: tx.update(g, s), parameters(), state)


def test_methods_and_options_are_known_by_name():
    with pytest.raises(ValueError, match=r"unknown method 'rigI'; did you mean 'rigl'"):
        jaxsparse.make("rigI", MOMENTUM)
    with pytest.raises(ValueError, match="'static' has no option 'update_evry'; its options are"):
        jaxsparse.make("static", MOMENTUM, sparsity=0.5, update_evry=3)
    with pytest.raises(
        ValueError, match="sparsity=0.9: 'autosparse' cannot be asked for a sparsity"
    ):
        jaxsparse.make("autosparse", MOMENTUM, sparsity=0.9, total_steps=10)
    with pytest.raises(ValueError, match="sparsity is missing: give the fraction of zeros"):
        jaxsparse.rigl(MOMENTUM, total_steps=1000)


@pytest.mark.parametrize(
    "sparsity, structure, message",
    [
        (None, structures.NM(3, 5), r"m=5 does not divide axis -2 of '(conv|dense)/kernel'"),
        (
            0.5,
            structures.Block(16, 16),
            "does not tile 'conv/kernel' of shape .*divide its 8 columns",
        ),
        (
            0.9,
            structures.Block(8, 8),
            "leaves nothing of 'conv/kernel'.*Block.*or keep the leaf dense with targets=",
        ),  # rounds to nothing
        (0.9, structures.Channel(-1), "leaves nothing of 'conv/kernel'.*Channel"),
        (
            0.9,
            structures.NM(2, 4),
            "sparsity=0.9 contradicts .*whose sparsity is 0.5; leave sparsity",
        ),
    ],
)
def test_a_network_that_cannot_be_is_refused_at_init(sparsity, structure, message):
    with pytest.raises(ValueError, match=message):
        tx = jaxsparse.rigl(
            MOMENTUM, sparsity, total_steps=1000, structure=structure, allocation="uniform"
        )
        tx.init(parameters())


def test_a_global_budget_of_nothing_is_refused():
    with pytest.raises(
        ValueError, match="sparsity=0.9 leaves nothing of 384 weights; ask for less"
    ):
        jaxsparse.prune(parameters(), 0.9, allocation="global", structure=structures.Block(8, 8))


def test_a_tree_without_anything_to_sparsify_is_a_warning_that_lists_the_paths():
    with pytest.warns(UserWarning, match="no leaf is sparsified.*paths are bias"):
        jaxsparse.static(MOMENTUM, 0.5).init({"bias": jnp.ones(3)})


@pytest.mark.parametrize(
    "masks, message",
    [
        ("ones", "masks='ones': use 'random', 'from_params' or a tree of masks"),
        (
            {"kernel": jnp.ones((3, 2), bool)},
            r"mask of 'kernel' is bool\[3, 2\]; it must be bool\[2, 3\]",
        ),
        ({"kernel": jnp.ones((2, 3))}, "mask of 'kernel' is float32"),
        (
            {"kernal": jnp.ones((2, 3), bool)},
            "masks: no leaf matches 'kernal'; paths look like 'kernel'",
        ),
    ],
)
def test_masks_that_do_not_fit_are_named(masks, message):
    with pytest.raises(ValueError, match=message):
        jaxsparse.static(MOMENTUM, masks=masks).init({"kernel": jnp.ones((2, 3))})


def test_masks_that_fix_the_sparsity_take_no_other():
    with pytest.raises(ValueError, match="sparsity=0.5: these masks fix the sparsity themselves"):
        jaxsparse.static(MOMENTUM, 0.5, masks="from_params")


def test_a_score_that_needs_gradients_says_so():
    with pytest.raises(ValueError, match="score='saliency' needs gradients, and none were given"):
        jaxsparse.prune(parameters(), 0.5, score="saliency")


def test_a_model_with_nan_is_not_pruned_silently():
    broken = parameters()
    broken["dense"]["kernel"] = broken["dense"]["kernel"].at[2, 3].set(jnp.nan)
    with pytest.raises(ValueError, match="the scores of 'dense/kernel' hold NaN"):
        jaxsparse.prune(broken, 0.5)


@pytest.mark.parametrize("name", ["rigl", "magnitude_ste"])
def test_updates_that_are_not_like_the_parameters_are_refused_by_the_name_of_the_leaf(name):
    params = {"fc": {"kernel": jnp.ones((8, 4)), "bias": jnp.ones(4)}}
    more = {"total_steps": 1000} if name == "rigl" else {}
    tx = jaxsparse.make(name, MOMENTUM, sparsity=0.5, **more)
    state = tx.init(params)
    for path, bad in (("fc/bias", {"kernel": jnp.ones((8, 4)), "bias": jnp.ones((1, 4))}),
                      ("fc/kernel", {"kernel": jnp.ones(4), "bias": jnp.ones(4)})):  # fmt: skip
        with pytest.raises(ValueError, match=f"updates: '{path}' has shape"):
            tx.update({"fc": bad}, state, params)
    with pytest.raises(ValueError, match="updates: not a tree like the parameters"):
        tx.update({"fc": {"kernel": jnp.ones((8, 4))}}, state, params)
