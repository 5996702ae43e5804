"""Rules of matrix products and convolutions."""

from __future__ import annotations

from jax.extend import core

from jaxsparse.channels.trace import Axes, Product, Role, Trace, Value, shape_of


def dot_general(t: Trace, eqn: core.JaxprEqn, inputs: list[Value]) -> list[Axes]:
    (lhs_in, rhs_in), (lhs_batch, rhs_batch) = eqn.params["dimension_numbers"]
    lhs, rhs = inputs[0], inputs[1]
    for a, b in (*zip(lhs_in, rhs_in), *zip(lhs_batch, rhs_batch)):
        t.labels.unify(lhs.axes[a], rhs.axes[b], t.because(eqn))
    free = [
        [label for d, label in enumerate(value.axes) if d not in {*summed, *batch}]
        for value, summed, batch in ((lhs, lhs_in, lhs_batch), (rhs, rhs_in, rhs_batch))
    ]
    batch = [lhs.axes[d] for d in lhs_batch]
    for value, summed, own in ((lhs, lhs_in, free[0]), (rhs, rhs_in, free[1])):
        if value.leaf is not None:
            t.roles += [Role(value.leaf, value.axes[d], "in") for d in summed]
            t.roles += [Role(value.leaf, label, "out") for label in (*own, *batch)]
    if t.inside(eqn, "dot_product_attention"):
        _attention(t, eqn, inputs)
    out = (*batch, *free[0], *free[1])
    leaf = next((v.leaf for v in (rhs, lhs) if v.leaf is not None), "")
    t.products.append(Product(leaf, t.times, (*out, *(lhs.axes[d] for d in lhs_in))))
    return [out]


def _attention(t: Trace, eqn: core.JaxprEqn, inputs: list[Value]) -> None:
    """`jax.nn.dot_product_attention` takes heads of queries, keys and values of one size, though no product
    needs it: the axis summed over by the first product has as many positions as the last axis of the values."""
    (lhs_in, rhs_in), _ = eqn.params["dimension_numbers"]
    if not t.attention:
        t.attention.append(inputs[0].axes[lhs_in[0]])
        return
    summed = zip(inputs[:2], (lhs_in[0], rhs_in[0]))
    values = next((value for value, d in summed if d != len(value.axes) - 1), None)
    size = t.attention.pop()
    if values is not None and t.labels.size(values.axes[-1]) == t.labels.size(size):
        what = "jax.nn.dot_product_attention, whose heads have one size"
        t.equal.append(((size, values.axes[-1]), t.because(eqn, what)))


def conv(t: Trace, eqn: core.JaxprEqn, inputs: list[Value]) -> list[Axes]:
    """With `G` groups the input features are `G x (inputs of a group)`, the output features `G x (outputs of a
    group)`, both in row-major order. A depthwise convolution is the case of one input per group, an ordinary
    one that of one group."""
    dims, groups = eqn.params["dimension_numbers"], eqn.params["feature_group_count"]
    lhs, kernel = inputs[0], inputs[1]
    window = t.because(eqn, "the window of a convolution")
    size, reason = t.labels.size, t.because(eqn)
    feature, own_in = lhs.axes[dims.lhs_spec[1]], kernel.axes[dims.rhs_spec[1]]
    own_out = kernel.axes[dims.rhs_spec[0]]
    t.pin([kernel.axes[d] for d in dims.rhs_spec[2:]], window)
    t.pin([lhs.axes[d] for d in dims.lhs_spec[2:]], window)
    out = list(t.fresh(shape_of(eqn.outvars[0])))
    t.pin([out[d] for d in dims.out_spec[2:]], window)
    if eqn.params["batch_group_count"] != 1:
        t.pin((*lhs.axes, *kernel.axes, *out), t.because(eqn, "a convolution with batch groups"))
        return [tuple(out)]
    given = t.labels.factor(feature, [groups, size(own_in)], reason)
    taken = t.labels.factor(own_out, [groups, size(own_out) // groups], reason)
    if given is None or taken is None:
        unlike = t.because(eqn, "groups of a convolution that are none of its input")
        t.pin((feature, own_in, own_out), unlike)
        result = own_out
    else:
        t.labels.unify(given[0], taken[0], reason)
        t.labels.unify(given[1], own_in, reason)
        result = own_out
    out[dims.out_spec[1]] = result
    out[dims.out_spec[0]] = lhs.axes[dims.lhs_spec[0]]
    if kernel.leaf is not None:
        t.roles += [Role(kernel.leaf, own_in, "in"), Role(kernel.leaf, own_out, "out")]
    spatial = [kernel.axes[d] for d in dims.rhs_spec[2:]]
    t.products.append(Product(kernel.leaf or "", t.times, (*out, own_in, *spatial)))
    return [tuple(out)]
