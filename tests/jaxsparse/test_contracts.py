"""The contracts of the design, over every method of the registry."""

import contracts
import jax
import jax.numpy as jnp
import optax
import pytest

import jaxsparse
from jaxsparse import testing

METHODS = sorted(jaxsparse.METHODS)


@pytest.fixture(params=METHODS, scope="module")
def name(request):
    return request.param


@pytest.fixture
def subject(name):
    return contracts.subject(name)


def test_pruned_weights_are_exactly_zero_and_kept_ones_are_counted(name, subject):
    known = contracts.expected(name, 0) is not None
    testing.check_exact(subject, (lambda t: contracts.expected(name, t)) if known else None)


def test_the_run_is_finite_and_every_leaf_trains(subject):
    testing.check_finite(subject)


def test_the_first_forward_pass_can_be_sparse(subject):
    testing.check_first_forward(subject)


def test_update_compiles_once(subject):
    testing.check_compiles_once(subject)


def test_state_keeps_structure_shapes_and_dtypes(subject):
    testing.check_state_is_stable(subject)


def test_no_array_is_as_large_as_all_weights_together(subject):
    testing.check_no_array_of_all_weights(subject)


def test_extra_arguments_reach_the_inner_optimizer(subject):
    testing.check_extra_args(subject)


def test_a_state_moved_through_host_memory_continues_bit_for_bit(subject):
    testing.check_resumes(subject)


def test_nan_gradients_leave_masks_alone_and_show(subject):
    testing.check_nan(subject)


@pytest.mark.parametrize("kind", contracts.kinds())
def test_runs_under_vmap_and_scan_with_swept_options(kind):
    subject = contracts.subject(kind)
    swept = "sparsity" in subject.sweeps and contracts.expected(kind, 0) is not None
    testing.check_vmap_and_scan(
        subject, (lambda t: contracts.expected(kind, t, contracts.OTHER)) if swept else None
    )


def test_traces_inside_optax_wrappers(subject):
    testing.check_traces_inside_wrappers(subject)


@pytest.mark.parametrize("kind", contracts.kinds())
def test_steps_outside_of_jit_are_what_compiled_ones_are_and_compile_once(kind):
    testing.check_without_jit(contracts.subject(kind))


def test_no_array_of_the_caller_is_in_a_state_or_a_result(subject):
    testing.check_ownership(subject)


def test_optax_finds_what_is_like_the_parameters_in_a_state(subject):
    testing.check_map_params(subject)


@pytest.mark.parametrize("kind", contracts.kinds())
def test_does_the_same_inside_optax_wrappers(kind):
    testing.check_composes(contracts.subject(kind))


def test_masks_follow_the_options_of_every_method(name):
    """Whoever registers a method gives it the common names for common options."""
    method = jaxsparse.METHODS[name]
    assert method.controls_sparsity == ("sparsity" in method.options)
    assert method.dynamics in ("none", "fixed", "gradual", "dynamic", "projected")
    assert method.summary
    assert method.reference or name == "dense"


def test_the_check_sees_weights_that_are_joined():
    def joined(inner):
        def update(updates, state, params=None, **extra):
            norm = jnp.linalg.norm(jnp.concatenate([x.ravel() for x in jax.tree.leaves(updates)]))
            return jax.tree.map(lambda x: x / norm, updates), state

        return optax.GradientTransformationExtraArgs(inner.init, update)

    with pytest.raises(AssertionError, match="concatenate makes 16384 numbers of 16384 weights"):
        testing.check_no_array_of_all_weights(testing.Subject(joined))
