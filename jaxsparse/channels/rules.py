"""The table of rules: what every primitive does to the labels of its operands.

A rule takes the trace, the equation and the values of its operands, unifies or pins labels, and returns the
labels of each result. A primitive without a rule pins all that it touches, and the report names it.
"""

from __future__ import annotations

from jaxsparse.channels import rules_index as index
from jaxsparse.channels import rules_plain as plain
from jaxsparse.channels import rules_product as product
from jaxsparse.channels import rules_shape as shape
from jaxsparse.channels.trace import Rule

_ELEMENTWISE = """
abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt ceil clamp clz complex conj
convert_element_type copy copy_p cos cosh digamma div eq erf erf_inv erfc exp exp2 expm1 floor ge gt igamma igammac
imag integer_pow is_finite le le_to lgamma log log1p logistic lt lt_to max mesh_cast min mul ne neg nextafter not or
polygamma population_count pow real reduce_precision regularized_incomplete_beta rem reshard round rsqrt select_n
sharding_constraint shift_left shift_right_arithmetic shift_right_logical sign sin sinh sqrt square stop_gradient sub
tan tanh xor
"""
_REDUCTIONS = ["sum", "max", "min", "prod", "and", "or", "xor"]
_CUMULATIVE = ["cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp"]
_WINDOWS = ["reduce_window", "reduce_window_sum", "reduce_window_max", "reduce_window_min"]
_RANDOM = [
    "random_bits",
    "random_seed",
    "random_wrap",
    "random_unwrap",
    "random_fold_in",
    "random_split",
]
_SCATTERS = [
    "scatter",
    "scatter-add",
    "scatter_add",
    "scatter-mul",
    "scatter_mul",
    "scatter_min",
    "scatter_max",
]

RULES: dict[str, Rule] = {
    **dict.fromkeys(_ELEMENTWISE.split(), plain.elementwise),
    **dict.fromkeys([f"reduce_{name}" for name in _REDUCTIONS], plain.reduce),
    **dict.fromkeys(_CUMULATIVE, index.along("axis")),
    **dict.fromkeys(_WINDOWS, plain.reduce_window),
    **dict.fromkeys([*_RANDOM, "threefry2x32", "empty", "rng_bit_generator"], plain.fresh),
    **dict.fromkeys(_SCATTERS, index.scatter),
    "optimization_barrier": plain.one_to_one,
    "argmax": index.arg_reduce,
    "argmin": index.arg_reduce,
    "broadcast_in_dim": shape.broadcast_in_dim,
    "concatenate": shape.concatenate,
    "conv_general_dilated": product.conv,
    "dot_general": product.dot_general,
    "dynamic_slice": index.dynamic_slice,
    "dynamic_update_slice": index.dynamic_update_slice,
    "gather": index.gather,
    "iota": index.iota,
    "pad": shape.pad,
    "reshape": shape.reshape,
    "rev": index.along("dimensions"),
    "slice": shape.slice_,
    "sort": index.along("dimension"),
    "split": shape.split,
    "squeeze": shape.squeeze,
    "stack": shape.stack,
    "top_k": index.top_k,
    "transpose": shape.transpose,
    "unstack": shape.unstack,
}
