"""Which leaves are sparsified: the default, patterns with precedence, stacks; a rule without effect
is an error."""

import jax
import jax.numpy as jnp
import pytest

from jaxsparse import targets
from jaxsparse.targets import select, stacked


def tree():
    w = jnp.zeros((4, 4))
    return {
        "embedding": {"table": w},
        "encoder": [{"kernel": w, "bias": jnp.zeros(4)}, {"kernel": w, "bias": jnp.zeros(4)}],
        "head": {"kernel": w},
        "ids": jnp.zeros((4, 4), jnp.int32),
        "layer_norm": {"weight": w},
        "stack": {"kernel": jnp.zeros((3, 4, 4))},
    }


def chosen(rules):
    return [s.path for s in select(tree(), rules) if s.selected]


KERNELS = ["encoder/0/kernel", "encoder/1/kernel", "head/kernel", "stack/kernel"]


def test_by_default_kernels_but_no_embeddings_norms_biases_or_integers():
    assert chosen(None) == KERNELS


def test_a_pattern_takes_only_what_matches_it_even_what_the_default_would_not():
    assert chosen("encoder/.*kernel") == KERNELS[:2]
    assert chosen("table") == ["embedding/table"]


def test_of_several_rules_the_first_that_matches_decides_and_the_default_what_none_matches():
    assert chosen([("head", False)]) == [p for p in KERNELS if p != "head/kernel"]
    assert chosen([("encoder/0/kernel", True), ("encoder", False)]) == [
        p for p in KERNELS if p != "encoder/1/kernel"
    ]
    assert chosen([("embedding", True)]) == ["embedding/table", *KERNELS]
    assert chosen([("head/kernel", True), (".*", False)]) == ["head/kernel"]


def test_a_function_decides_alone():
    assert chosen(lambda path, leaf: leaf.ndim == 3) == ["stack/kernel"]
    assert chosen(targets.is_kernel) == KERNELS


def test_a_stack_counts_its_leading_axes():
    found = {s.path: s.lead for s in select(tree(), [("stack", stacked())]) if s.selected}
    assert found == {p: int(p.startswith("stack")) for p in KERNELS}


def test_paths_are_the_same_in_dicts_lists_and_modules():
    from flax import nnx

    net = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    assert [s.path for s in select(nnx.state(net, nnx.Param))] == ["bias", "kernel"]
    assert [s.path for s in select([{"a": jnp.zeros(2)}, (jnp.zeros(2),)])] == ["0/a", "1/0"]


def test_shapes_are_enough():
    shapes = jax.eval_shape(tree)
    assert [s for s in select(shapes) if s.selected] == [s for s in select(tree()) if s.selected]


@pytest.mark.parametrize(
    "rules, message",
    [
        (
            "encodr/0/kernel",
            r"no leaf matches 'encodr/0/kernel'; paths look like 'encoder/0/kernel'",
        ),
        (
            [("head", True), ("no_such", False)],
            "targets: no leaf matches 'no_such'.*9 leaves in all",
        ),
        ([("(", True)], r"targets: '\(' is not a regular expression"),
        ([("head", 1)], r"targets: 'head' has the value 1; use True, False or stacked\(k\)"),
        (
            ["head"],
            r"targets: expected pairs \(pattern, True \| False \| stacked\(k\)\), got 'head'",
        ),
        ("ids", "targets: 'ids' has dtype int32; only floating-point leaves can be sparse"),
        (
            [("head", stacked(2))],
            r"'head/kernel' has shape \(4, 4\), too few dimensions for stacked",
        ),
    ],
)
def test_a_rule_that_cannot_be_meant_is_an_error(rules, message):
    with pytest.raises(ValueError, match=message):
        select(tree(), rules)


def test_a_stack_has_an_axis():
    with pytest.raises(ValueError, match=r"stacked\(axes=0\): give at least one"):
        stacked(0)
