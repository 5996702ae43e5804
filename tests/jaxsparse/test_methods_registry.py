"""The registry: its facts are those of the signatures, and help() explains every argument."""

import inspect
import re
from typing import get_args

import jax.numpy as jnp
import optax
import pytest

import jaxsparse
from jaxsparse.methods import registry
from jaxsparse.structures import NM, resolve

METHODS = dict(jaxsparse.METHODS)
PRESETS = {name: m for name, m in METHODS.items() if hasattr(m.fn, "func")}
INNER = optax.sgd(0.1, momentum=0.9)
RUN = dict(sparsity=0.9, total_steps=1000)


def defaults(method):
    return {p.name: p.default for p in inspect.signature(method.fn).parameters.values()}


@pytest.mark.parametrize("name", METHODS)
def test_facts_are_of_the_kinds_that_the_registry_knows(name):
    method = METHODS[name]
    assert method.dynamics in get_args(registry.Dynamics)
    assert method.structures in get_args(registry.Structures)
    assert method.gradients in get_args(registry.Gradients)


@pytest.mark.parametrize("name", METHODS)
def test_what_the_registry_says_of_structures_is_what_the_method_takes(name):
    method = METHODS[name]
    takes = "structure" in method.options
    assert takes == (method.structures in ("any", "any but n:m", "n:m"))
    if method.structures == "n:m":
        assert isinstance(resolve(defaults(method)["structure"]), NM)
        with pytest.raises(ValueError, match="structure="):
            make(name, structure="block:4x4")
    if method.structures == "any but n:m":
        tx = make(name, structure="block:2x2")
        assert tx.init({"kernel": jnp.ones((20, 20))})
    assert ("sparsity" in method.options) == method.controls_sparsity


@pytest.mark.parametrize("name", METHODS)
def test_a_run_that_starts_dense_says_until_when_in_options_that_exist(name):
    method = METHODS[name]
    if method.starts_dense:
        assert method.dense_phase
    for word in re.findall(r"\b\w+_(?:step|sparsity)\b", method.dense_phase or ""):
        assert word in method.options, word


def make(name, **options):
    method = METHODS[name]
    known = {k: v for k, v in RUN.items() if k in method.options and v is not None}
    if resolve(defaults(method).get("structure")).sparsity is not None:
        known.pop("sparsity", None)
    return jaxsparse.make(name, INNER, **known | options)


@pytest.mark.parametrize("name", METHODS)
def test_resolved_options_are_those_of_the_run(name):
    method = METHODS[name]
    found = method.resolved(**RUN)
    assert set(found) == set(method.options)
    steps = {k: v for k, v in found.items() if k.endswith("_step") or k == "update_every"}
    assert not [k for k, v in steps.items() if v is None]
    assert method.resolved(**found) == found, "what is resolved stays"
    make(name, **{k: v for k, v in found.items() if v is not None and k in steps})


@pytest.mark.parametrize(
    "name, want",
    {
        "rigl": dict(update_every=100, begin_step=100, end_step=750),
        "set_itop": dict(update_every=15, begin_step=15, end_step=750),
        "rigl_itop": dict(update_every=41, begin_step=41, end_step=750),
        "magnitude": dict(begin_step=0, end_step=750),
        "granet": dict(begin_step=0, end_step=500, regrow_end_step=750),
        "st3": dict(begin_step=50, end_step=500, update_every=1),
        "hypersparse": dict(begin_step=200, end_step=600, update_every=400 / 140),
        "iss_p": dict(end_step=170),
        "autosparse": dict(reset_step=900),
        "slope": dict(adapter_step=990),
    }.items(),
)
def test_defaults_that_depend_on_the_run_are_resolved(name, want):
    found = METHODS[name].resolved(**RUN)
    assert {k: found[k] for k in want} == want
    given = METHODS[name].resolved(**RUN | want)
    assert given == found


def test_resolved_leaves_out_what_a_method_does_not_have_and_names_what_is_missing():
    assert "total_steps" not in METHODS["static"].resolved(**RUN)
    with pytest.raises(ValueError, match="'rigl' needs total_steps"):
        METHODS["rigl"].resolved(sparsity=0.9)
    with pytest.raises(ValueError, match="begin_step=2000 is not within"):
        METHODS["rigl"].resolved(begin_step=2000, **RUN)


def test_presets_are_their_method_with_the_options_that_their_name_stands_for():
    fixed = {name: dict(m.fixed) for name, m in PRESETS.items()}
    assert fixed == {
        "global_magnitude": {"score": "magnitude"},
        "random_pruning": {"score": "random", "recovery": False},
        "saliency": {"score": "saliency", "recovery": False},
        "mest_soft": {"memory": "soft"},
        "set_itop": {},
        "rigl_itop": {"growth": "gradient"},
        "st3_sigma": {"measure": "sigma"},
    }
    for name, method in PRESETS.items():
        assert not set(method.fixed) & method.options
        assert getattr(jaxsparse, name) is method.fn and method.fn.__name__ == name
        assert set(method.fixed) <= set(inspect.signature(method.fn.func).parameters)
    with pytest.raises(ValueError, match="'st3_sigma' has no option 'measure'"):
        jaxsparse.make("st3_sigma", INNER, sparsity=0.9, total_steps=10, measure="magnitude")


@pytest.mark.parametrize("name", METHODS)
def test_help_explains_every_argument_where_it_stands(name):
    method = METHODS[name]
    text = inspect.getdoc(method.fn)
    assert text and ">>>" in text or name == "dense"
    if name in PRESETS or name == "dense":
        return
    args = text.split("\nArgs:\n")[1].split("\n\n")[0]
    assert "see the guide" not in text and "as `rigl`" not in args
    for argument in inspect.signature(method.fn).parameters:
        assert re.search(rf"^  {argument}: \w|^  {argument}: [\"$]", args, re.M), argument


@pytest.mark.parametrize("name", METHODS)
def test_types_of_arguments_say_something(name):
    for p in inspect.signature(METHODS[name].fn).parameters.values():
        assert p.annotation is not inspect.Parameter.empty
        assert not re.search(r"\bAny\b", str(p.annotation)), p
