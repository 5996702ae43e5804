"""The figures of `jaxsparse.analysis`: what is drawn is what is in the data."""

import jax
import jax.numpy as jnp
import matplotlib
import matplotlib.colors
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jaxsparse
from jaxsparse.analysis import figures, memory, plots

POINTS = {
    "rigl": [
        {"forward_flops": 0.2, "sparsity": 0.8, "accuracy": 0.9, "deviation": 0.01},
        {"forward_flops": 0.1, "sparsity": 0.9, "accuracy": 0.8, "deviation": 0.02},
    ],
    "set": [{"forward_flops": 0.2, "sparsity": 0.8, "accuracy": 0.7, "deviation": 0.03}],
}


def all_figures():
    mask = np.eye(6, 8) > 0
    walk = np.cumsum(np.ones((5, 2)), axis=0)
    return {
        "masks": figures.masks({"a": mask, "b": mask.T}),
        "changed": figures.masks({"a": mask}, changed_from={"a": ~mask}),
        "histogram": figures.weight_histogram({"w": np.linspace(-1, 1, 50)}),
        "crossings": figures.crossings(walk, walk * 0, np.ones(5)),
        "connectivity": figures.connectivity([np.eye(4), np.ones((4, 2))]),
        "front": figures.accuracy_over_flops(POINTS, dense=0.95),
        "memory": figures.memory_bars({"run": {"weights": 4000, "masks": 100}}),
        "curves": plots.curves(
            {"a": ([1, 2], [3, 4]), "b": ([1, 2], [1, 2])}, title="t", ylabel="y"
        ),
        "density": plots.density_bars({"a": 0.5}),
        "sparsity": plots.sparsity([1, 2], [0.5, 0.8], {"a": [0.5, 0.8]}),
        "churn": plots.churn([1, 2], [0.5, 0.2], {"a": [0.5, 0.2]}),
        "accuracy": plots.accuracy_over_sparsity(POINTS, dense=0.95),
    }


def test_every_text_has_contrast_on_its_card_whatever_the_readers_style():
    import matplotlib.style
    import matplotlib.text

    def luminance(color):
        rgb = np.array(matplotlib.colors.to_rgb(color))
        return float(np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
                     @ [0.2126, 0.7152, 0.0722])  # fmt: skip

    with matplotlib.style.context("dark_background"):
        for name, figure in all_figures().items():
            figure.canvas.draw()
            assert luminance(figure.get_facecolor()) == pytest.approx(1.0), name
            for text in figure.findobj(matplotlib.text.Text):
                if text.get_text() and text.get_visible():
                    assert luminance(text.get_color()) < 0.18, (name, text.get_text())  # 4.5 : 1


def test_a_notebook_can_show_every_figure_without_pyplot():
    for name, figure in all_figures().items():
        assert figure._repr_png_().startswith(b"\x89PNG"), name


def test_drawing_leaves_the_global_state_of_matplotlib_alone():
    before = dict(matplotlib.rcParams)
    all_figures()
    assert dict(matplotlib.rcParams) == before


def test_a_mask_is_drawn_pixel_by_pixel():
    mask = np.array([[True, False], [False, False]])
    (axes,) = figures.masks({"w": mask}).axes
    image = axes.images[0]
    kept, empty = image.cmap(image.norm([3, 0]))
    np.testing.assert_array_equal(image.get_array(), [[3, 0], [0, 0]])
    assert matplotlib.colors.to_hex(kept) == "#0072b2"
    assert matplotlib.colors.to_hex(empty) == "#e8e8e8"


def test_grown_and_dropped_weights_have_colours_of_their_own():
    before, after = np.array([[1, 1, 0, 0]]), np.array([[1, 0, 1, 0]])
    (axes,) = figures.masks({"w": after}, changed_from={"w": before}).axes
    image = axes.images[0]
    colors = [matplotlib.colors.to_hex(c) for c in image.cmap(image.norm(image.get_array()[0]))]
    assert colors == ["#0072b2", "#d55e00", "#009e73", "#e8e8e8"]


def test_a_convolution_is_drawn_as_the_matrix_from_inputs_to_outputs():
    (axes,) = figures.masks({"conv": np.ones((3, 3, 2, 5))}).axes
    assert axes.images[0].get_array().shape == (18, 5)


def test_a_histogram_counts_each_nonzero_weight_once_and_zeros_in_the_legend():
    x = np.array([0.0, 0.0, 0.0, 0.1, -0.1, 0.5])
    axes = figures.weight_histogram({"x": x}, limit=1.0, bins=21).axes[0]
    assert axes.patches[0].get_data().values.sum() == 3
    assert axes.get_legend().get_texts()[0].get_text() == "x (50 % zeros)"


def test_a_histogram_takes_trees_and_bfloat16():
    tree = {"a": jnp.ones(3, jnp.bfloat16), "b": [jnp.ones(2)]}
    axes = figures.weight_histogram({"t": tree}, limit=2.0, bins=3).axes[0]
    assert axes.patches[0].get_data().values.sum() == 5


def test_connections_are_the_nonzero_weights_with_their_signs():
    kernels = [np.array([[1.0, 0.0], [0.0, -2.0]]), np.array([[0.0], [3.0]])]
    axes = figures.connectivity(kernels).axes[0]
    lines = axes.collections[0]
    assert len(lines.get_segments()) == 3
    assert [matplotlib.colors.to_hex(c) for c in lines.get_colors()] == [
        "#0072b2", "#d55e00", "#0072b2"
    ]  # fmt: skip
    assert [t.get_text() for t in axes.texts] == [
        "2 units\n2 live", "2 units\n1 live", "1 units\n1 live"
    ]  # fmt: skip


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), max_size=20))
def test_the_front_holds_exactly_the_points_that_none_beats(points):
    front = figures.pareto_front(points)
    beaten = lambda p: any(q[0] <= p[0] and q[1] >= p[1] and q != p for q in points)
    assert set(front) == {p for p in points if not beaten(p)}
    assert front == sorted(set(front))


def test_small_losses_fill_a_logarithmic_plot():
    x, y = [1, 2, 3], [1.0, 1e-2, 1e-3]
    axes = plots.curves({"loss": (x, y)}, title="t", ylabel="loss", log=True).axes[0]
    low, high = axes.get_ylim()
    assert 1e-4 < low < 1e-3 and 1 < high < 10


def test_error_bars_are_the_deviations():
    axes = figures.accuracy_over_flops(POINTS).axes[0]
    (bars,) = axes.containers[1].lines[2]
    (low, high) = bars.get_segments()[0][:, 1]
    assert (low, high) == pytest.approx((0.67, 0.73))


def test_memory_adds_up_to_all_bytes_of_parameters_and_state():
    params = {"kernel": jnp.ones((32, 16)), "bias": jnp.ones(16)}
    for name in ("dense", "static", "rigl", "magnitude", "st3", "autosparse"):
        options = {k: v for k, v in {"sparsity": 0.5, "total_steps": 1000}.items()
                   if k in jaxsparse.METHODS[name].options}  # fmt: skip
        state = jaxsparse.make(name, optax.adam(1e-3), **options).init(params)
        found = memory.training_memory(params, state)
        total = sum(x.nbytes for x in jax.tree.leaves((params, state)))
        assert sum(found.values()) == total, name
        assert (found["raw weights"] > 0) == jaxsparse.METHODS[name].keeps_raw, name


def test_memory_is_known_before_anything_is_allocated():
    params = {"kernel": jax.ShapeDtypeStruct((1 << 16, 1 << 14), jnp.bfloat16)}
    tx = jaxsparse.magnitude(optax.sgd(0.1), sparsity=0.5, total_steps=10, pack_masks=True)
    found = memory.training_memory(params, jax.eval_shape(tx.init, params))
    assert (found["weights"], found["masks"]) == (1 << 31, 1 << 27)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: figures.masks({}), "by_name is empty"),
        (lambda: figures.masks({"b": np.ones(3)}), r"by_name\['b'\] has shape \(3,\)"),
        (
            lambda: figures.masks({"a": np.eye(2)}, changed_from={"a": np.eye(3)}),
            r"changed_from\['a'\] has shape \(3, 3\)",
        ),
        (lambda: figures.weight_histogram({"w": np.ones(2)}, bins=4), "bins=4: give an odd number"),
        (lambda: figures.weight_histogram({"w": np.ones(2)}, limit=0), "limit=0: must be positive"),
        (lambda: figures.crossings(np.ones((3, 2)), np.ones((2, 2))), "both must be"),
        (lambda: figures.connectivity([np.eye(2), np.eye(3)]), r"kernels\[0\] has 2 outputs"),
        (lambda: figures.connectivity([np.ones((200, 200))]), "40000 connections"),
        (lambda: figures.accuracy_over_flops({"m": [{"accuracy": 1.0}]}), "lacks deviation, forward"),
        (lambda: memory.stored_bytes(10, 11, 4), "nonzeros=11: must be between 0 and size=10"),
        (lambda: memory.stored_bytes(10, 3, 4, block=2), "block=2: must divide nonzeros=3"),
    ],
)  # fmt: skip
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
