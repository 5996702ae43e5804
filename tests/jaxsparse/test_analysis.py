"""Operations by the RigL paper's accounting, bytes and plots."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsparse.analysis import dynamics, plots
from jaxsparse.analysis.flops import (
    Traffic,
    forward_bytes,
    forward_flops,
    sparse_flops,
    training_flops,
)


def shape(*dims):
    return jax.ShapeDtypeStruct(dims, jnp.float32)


def conv(x, kernel, strides=(1, 1)):
    return jax.lax.conv_general_dilated(
        x, kernel, strides, "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def test_a_convolution_and_a_linear_layer_cost_what_the_formula_says():
    params = {"conv": shape(3, 3, 3, 16), "dense": shape(8 * 8 * 16, 10)}

    def net(p, x):
        return conv(x, p["conv"], (2, 2)).reshape(1, -1) @ p["dense"]

    flops = forward_flops(net, params, shape(1, 16, 16, 3))
    assert flops == {"conv": 2 * 8 * 8 * 16 * 3 * 3 * 3, "dense": 2 * 1024 * 10}


def test_grouped_convolutions_cost_their_groups():
    def net(p, x):
        return jax.lax.conv_general_dilated(
            x, p, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=4
        )

    flops = forward_flops(net, shape(3, 3, 1, 4), shape(1, 5, 5, 4))
    assert sum(flops.values()) == 2 * 5 * 5 * 4 * 9


def test_products_inside_scan_count_once_per_iteration_and_belong_to_the_stack():
    def net(p, x):
        return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["layers"])[0]

    assert forward_flops(net, {"layers": shape(5, 8, 8)}, shape(1, 8)) == {"layers": 5 * 2 * 64}


def test_views_of_a_weight_are_the_weight_and_activations_are_not():
    def net(p, x):
        h = x @ p["w"].astype(jnp.bfloat16).T.reshape(8, 4) + p["b"]
        return h @ h.T

    params = {"b": shape(4), "w": shape(4, 8)}
    assert forward_flops(net, params, shape(2, 8)) == {"w": 2 * 2 * 8 * 4, "": 2 * 2 * 2 * 4}


def test_remat_and_jit_do_not_hide_products():
    net = jax.jit(jax.checkpoint(lambda p, x: x @ p))
    assert sum(forward_flops(net, shape(3, 5), shape(1, 3)).values()) == 30


def test_of_the_branches_of_a_cond_the_dearer_counts():
    def net(p, x):
        return jax.lax.cond(x[0, 0] > 0, lambda: x @ p["w"] @ p["w"], lambda: x @ p["w"])

    assert sum(forward_flops(net, {"w": shape(4, 4)}, shape(1, 4)).values()) == 64


def test_a_product_reads_its_operands_and_writes_its_result_in_their_types():
    params = {"conv": shape(3, 3, 3, 16), "w": jax.ShapeDtypeStruct((1024, 10), jnp.bfloat16)}

    def net(p, x):
        h = conv(x, p["conv"], (2, 2)).reshape(1, -1).astype(jnp.bfloat16)
        return h @ p["w"] @ (h @ p["w"]).T

    x = 16 * 16 * 3
    assert forward_bytes(net, params, shape(1, 16, 16, 3)) == {
        "conv": Traffic(4 * 432, 4 * (x + 1024)),
        "w": Traffic(2 * 2 * 10240, 2 * 2 * (1024 + 10)),
        "": Traffic(0, 2 * (10 + 10 + 1)),
    }


def test_of_masked_weights_the_smallest_format_is_moved_once_per_iteration():
    def net(p, x):
        return jax.lax.scan(lambda h, w: (h @ w, None), x, p["layers"])[0]

    params, x = {"layers": shape(5, 8, 8)}, shape(1, 8)
    masks = {"layers": np.broadcast_to(np.arange(64).reshape(8, 8) < 16, (5, 8, 8))}
    density = dynamics.density(masks)
    assert density == {"layers": 0.25}
    bitmap = 16 * 4 + 64 // 8
    found = forward_bytes(net, params, x, density=density)
    assert found == {"layers": Traffic(5 * bitmap, 5 * 4 * (8 + 8))}
    assert sparse_flops(forward_flops(net, params, x), density) == 5 * 2 * 16


def test_resnet50_at_80_percent_uniform_needs_the_published_part_of_the_operations():
    """8.2 GFLOPs dense, 0.23 of it at 80 % with the first layer dense (RigL, table 2)."""
    from flax import nnx

    from experiments import models

    model = nnx.eval_shape(
        lambda: models.create("resnet", (224, 224, 3), 1000, rngs=nnx.Rngs(0), depth=50)
    )
    graphdef, params, stats = nnx.split(model, nnx.Param, ...)

    def net(params, stats, x):
        model = nnx.merge(graphdef, params, stats)
        model.eval()
        return model(x)

    pure = nnx.to_pure_dict(params), nnx.to_pure_dict(stats)
    dense = forward_flops(net, *pure, shape(1, 224, 224, 3))
    total = sum(dense.values())
    assert round(total / 1e9, 1) == 8.2
    sparse = sparse_flops(dense, {k: 0.2 for k in dense if k != "stem/kernel"})
    assert abs(sparse / total - 0.23) < 0.01


def test_training_costs_by_the_formulas_of_the_paper():
    f_s, f_d = 2.0, 20.0
    assert training_flops(f_d, f_d, "dense") == 3 * f_d
    assert training_flops(f_s, f_d, "sparse") == 3 * f_s
    assert training_flops(f_s, f_d, "dense") == 2 * f_s + f_d
    assert training_flops(f_s, f_d, 100) == pytest.approx((3 * f_s * 100 + 2 * f_s + f_d) / 101)


@pytest.mark.parametrize("bad", [0, -1, "often"])
def test_a_gradient_schedule_that_makes_no_sense_is_refused(bad):
    with pytest.raises(ValueError, match="weight_gradient=.*'sparse', 'dense' or a positive"):
        training_flops(1.0, 2.0, bad)


def test_a_density_out_of_range_is_refused_by_name():
    with pytest.raises(ValueError, match=r"density\['w'\]=1.5: must be between 0 and 1"):
        sparse_flops({"w": 10}, {"w": 1.5})
    with pytest.raises(ValueError, match=r"density\['w'\]=-1: must be between 0 and 1"):
        forward_bytes(lambda p, x: x @ p["w"], {"w": shape(2, 2)}, shape(1, 2), density={"w": -1})


def test_accuracy_over_sparsity_shows_every_method_and_the_dense_line():
    points = [{"sparsity": s, "accuracy": 0.9, "deviation": 0.01} for s in (0.8, 0.9, 0.98)]
    figure = plots.accuracy_over_sparsity({"rigl": points, "set": points}, dense=0.95)
    axes = figure.axes[0]
    assert {t.get_text() for t in axes.get_legend().get_texts()} == {"dense", "rigl", "set"}
    assert [t.get_text() for t in axes.get_xticklabels()] == ["80 %", "90 %", "95 %", "98 %"]
