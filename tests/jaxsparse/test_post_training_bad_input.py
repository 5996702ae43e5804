"""What post-training pruning says of calls that cannot be meant."""

import jax
import jax.numpy as jnp
import pytest

from jaxsparse import post_training as pt


def two(p, x):
    return jax.nn.relu(x @ p["up"]["kernel"]) @ p["down"]["kernel"]


W = jax.random.normal(jax.random.key(0), (8, 4))
X = jax.random.normal(jax.random.key(1), (6, 8))
MODEL = (two, {"up": {"kernel": W}, "down": {"kernel": W.T}})
LOSS = lambda outputs, batch: jnp.mean(jnp.square(outputs))


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        (r"sparsity='half': give one number", {"sparsity": "half"}),
        (r"sparsity=\{'up': 0.5\}: give one number", {"sparsity": {"up": 0.5}}),
        (r"batches: is one ArrayImpl; give a list of batches, \[batch\]", {"batches": X}),
        (r"batches: is one dict; give a list", {"batches": {"x": X}}),
        (r"batches: is one NoneType; give a list", {"batches": None}),
        (r"batches: number 1 holds shape \(0, 8\); give arrays with", {"batches": [X, X[:0]]}),
        (r"batches: number 0 holds 'a text'; give arrays", {"batches": ["a text"]}),
        (r"mask: is one ArrayImpl; give a function of a batch", {"mask": jnp.ones(6)}),
        (r"blocks='\(': give a regular expression", {"blocks": "("}),
        (r"blocks='layers': no kernel's name matches; .* like 'up/kernel'", {"blocks": "layers"}),
        (
            r"allocation='owl': with structure=NM\(n=2, m=4.* every layer has the same sparsity",
            {"structure": "2:4", "allocation": "owl", "sparsity": None},
        ),
        (
            r"allocation=\{'up': 0.3\}: with structure=NM",
            {"structure": "2:4", "allocation": {"up": 0.3}, "sparsity": None},
        ),
        (r"loss: returned shape \(6,\); return one number",
         {"method": "obd", "loss": lambda outputs, batch: outputs.sum(1)}),
        (r"refit=-1: give an integer of at least 1", {"refit": -1}),
        (r"refit=0.5: give an integer of at least 1", {"refit": 0.5}),
        (r"refit=True: 'sparsegpt' gives integers here",
         {"method": "sparsegpt", "quantize": pt.Int(4, 4), "refit": True}),
        (r"quantize=4: give a grid, such as post_training.Int\(4\)",
         {"method": "sparsegpt", "quantize": 4}),
        (r"'up/kernel' \(8, 4\): block=0: give an integer", {"method": "sparsegpt", "block": 0}),
        (r"damping=-1.0: give a fraction", {"method": "sparsegpt", "damping": -1.0}),
        (r"damping=nan: give a fraction", {"method": "alps", "damping": float("nan")}),
        (r"damping='x': give a fraction", {"method": "gqsa", "group": 4, "damping": "x"}),
        (r"steps=0: give an integer of at least 1", {"method": "alps", "steps": 0}),
        (r"cycles=-1: give an integer of at least 0", {"method": "dsnot", "cycles": -1}),
        (r"block=0: give an integer of at least 1",
         {"method": "woodfisher", "loss": LOSS, "block": 0}),
        (r"steps=-1: give an integer of at least 0",
         {"method": "chita", "loss": LOSS, "steps": -1}),
    ],
)  # fmt: skip
def test_prune_names_the_argument_that_is_wrong(message, arguments):
    call = {"model": MODEL, "batches": [X], "method": "wanda", "sparsity": 0.5} | arguments
    with pytest.raises(ValueError, match=message):
        pt.prune(**call)


def test_an_allocation_may_be_named_beside_n_m_if_it_is_the_uniform_one():
    given = pt.prune(MODEL, [X], "wanda", structure="2:4", allocation="uniform")
    assert given.sparsity == 0.5


@pytest.mark.parametrize(
    ("message", "statistic"),
    [
        (r"statistic=None: give Norms\(\), Gram\(\)", None),
        (r"statistic=<class .*Gram'>: give Norms\(\), Gram\(\)", pt.Gram),
        (r"statistic=.*: returned \w+; return post_training.Inputs", lambda rows: rows.sum()),
    ],
)
def test_calibrate_names_a_statistic_that_is_none(message, statistic):
    with pytest.raises(ValueError, match=message):
        pt.calibrate(MODEL, [X], statistic)


def test_calibrate_gives_no_statistic_of_inputs_that_are_not_finite():
    with pytest.raises(ValueError, match="inputs of 'up/kernel' hold NaN or infinity"):
        pt.calibrate(MODEL, [X.at[0, 0].set(jnp.nan)], pt.Norms())


@pytest.mark.parametrize("bits", [1, 9, 4.5])
def test_a_grid_has_two_to_eight_whole_bits(bits):
    with pytest.raises(ValueError, match="2 to 8 bits, a positive group"):
        pt.Int(bits)


@pytest.mark.parametrize(
    ("message", "core", "given"),
    [
        (r"gram: has shape \(4, 4\); .* give \[in, in\], here \(8, 8\)",
         pt.sparsegpt_core, (W, jnp.eye(4))),
        (r"gram: has shape \(4, 4\)", pt.alps_core, (W, jnp.eye(4))),
        (r"gram: has shape \(4, 4\)", pt.exact_obs_core, (W, jnp.eye(4))),
        (r"squares: has shape \(4,\); .* give \[in\], here \(8,\)",
         pt.wanda_core, (W, jnp.ones(4))),
        (r"squares: has shape \(4,\)", pt.ria_core, (W, jnp.ones(4))),
        (r"mean: has shape \(4,\)", pt.dsnot_core, (W, jnp.ones(4), jnp.ones(8))),
        (r"gradients: has shape \(8, 4\); .* give \[samples, in, out\]", pt.obd_core, (W, W)),
        (r"gradients: has shape \(3, 4, 8\); .* here \(3, 8, 4\)",
         pt.woodfisher_core, (W, jnp.ones((3, 4, 8)))),
        (r"gradients: has shape \(3, 4, 8\)", pt.chita_core, (W, jnp.ones((3, 4, 8)))),
        (r"w: has shape \(2, 8, 4\); give one layer as a matrix",
         pt.wanda_core, (jnp.stack([W, W]), jnp.ones(8))),
    ],
)  # fmt: skip
def test_a_core_names_what_is_of_another_layer(message, core, given):
    with pytest.raises(ValueError, match=message):
        core(*given, 0.5)


def test_a_mask_of_another_layer_is_named():
    with pytest.raises(ValueError, match=r"mask: has shape \(4, 8\); .* here \(8, 4\)"):
        pt.sparsegpt_core(W, jnp.eye(8), mask=jnp.ones((4, 8), bool))
    with pytest.raises(ValueError, match=r"mask: has shape \(4, 8\)"):
        pt.refit_core(W, jnp.eye(8), pt.magnitude_core(W.T, 0.5))


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        (r"rank=2.5: give an integer of at least 1", {"rank": 2.5}),
        (r"alpha=nan: give a finite number", {"alpha": float("nan")}),
        (r"targets='\(': give a regular expression", {"targets": "("}),
        (r"targets=\[\('up', True\)\]: give a regular expression", {"targets": [("up", True)]}),
        (r"masks: 'kern' has shape \(8, 4\), and the model has no such leaf; give a tree like",
         {"masks": {"kern": W != 0}}),
        (r"masks: 'up/kernel' has shape \(4, 8\), and the model has the leaf \(8, 4\)",
         {"masks": {"up": {"kernel": W.T != 0}, "down": {"kernel": None}}}),
    ],
)  # fmt: skip
def test_an_adapter_names_the_argument_that_is_wrong(message, arguments):
    masks = jax.tree.map(lambda w: w > 0, MODEL[1])
    with pytest.raises(ValueError, match=message):
        pt.adapter(MODEL, **({"masks": masks} | arguments))
