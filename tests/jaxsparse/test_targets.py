"""Which leaves are sparsified: the default, patterns with precedence, stacks; a rule without effect
is an error."""

import dataclasses

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


def test_keys_of_any_name_are_paths_and_no_two_leaves_share_one():
    w = jnp.zeros((4, 4))
    trees = [
        {"attn": {"query": w, "value": w, "raw_value": w, "box": w}},
        {"a": {"b": w}, "a/b": w, "": {"": w}, "'": w},
        [{"value": w}, (w, w), None],
    ]
    for tree in trees:
        names = [path for path, _ in targets.named_leaves(tree)]
        assert len(set(names)) == len(jax.tree.leaves(tree))
    assert [s.path for s in select(trees[0]) if s.selected] == [
        "attn/box", "attn/query", "attn/raw_value", "attn/value"
    ]  # fmt: skip


def test_an_attribute_called_value_is_a_leaf_of_that_name_and_a_box_of_flax_is_none():
    import flax.linen as nn
    from flax import nnx

    @jax.tree_util.register_dataclass
    @dataclasses.dataclass
    class Attention:
        query: jax.Array
        value: jax.Array

    w = jnp.zeros((4, 4))
    boxed = nn.Partitioned(w, names=("a", "b"))
    tree = {"attn": Attention(w, w), "box": boxed, "variable": {"kernel": nnx.Param(w)}}
    expected = ["attn/query", "attn/value", "box", "variable/kernel"]
    assert [path for path, _ in targets.named_leaves(tree)] == expected


def test_the_default_goes_by_whole_words_and_by_what_one_layer_of_a_stack_is():
    w, v = jnp.ones((3, 16, 16)), jnp.ones((3, 16))
    found = select({
        "layers": {"ln_1": {"g": v, "weight": v}, "fc": {"kernel": w, "b": v}},
        "normalizing_flow": {"dense": {"kernel": w[0]}},
        "sentence_embedder": {"mlp": {"kernel": w[0]}},
        "LayerNorm_0": {"w": v}, "attn": {"q_bias": v, "layer_scale": v},
        "wte": {"embedding": w[0]}, "embed_tokens": {"weight": w[0]}, "nothing": jnp.ones((0, 4)),
    })  # fmt: skip
    assert {s.path for s in found if s.selected} == {
        "layers/fc/kernel", "normalizing_flow/dense/kernel", "sentence_embedder/mlp/kernel"
    }  # fmt: skip
    why = {s.path: s.why for s in found}
    assert why["layers/ln_1/g"] == why["LayerNorm_0/w"] == "normalisation"
    assert why["layers/fc/b"] == "stacked vectors" and why["attn/q_bias"] == "bias or scale"
    assert why["wte/embedding"] == why["embed_tokens/weight"] == "embedding"
    assert why["nothing"] == "no elements" and why["layers/fc/kernel"] == ""


def test_a_rule_that_stacks_leaves_vectors_dense_unless_it_means_nothing_else():
    w, v = jnp.ones((3, 16, 16)), jnp.ones((3, 16))
    tree = {"layers": {"kernel": w, "gain": v, "temperature": jnp.ones(3)}}
    assert [s.path for s in select(tree, [("layers", stacked())]) if s.selected] == [
        "layers/kernel"
    ]
    assert [
        s.path for s in select(tree, [("gain", stacked()), ("layers", False)]) if s.selected
    ] == ["layers/gain"]


def test_leaves_without_elements_stay_dense_whatever_is_asked():
    tree = {"w": jnp.ones((4, 4)), "lora_b": jnp.ones((0, 4))}
    for rules in (None, "w|lora", lambda *_: True):
        assert [s.path for s in select(tree, rules) if s.selected] == ["w"]
