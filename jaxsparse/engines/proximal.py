r"""The proximal step *after* an optimizer: a transformation of its updates that gives exact zeros.

    tx = optax.chain(optax.sgd(0.1), proximal(GroupLasso(1e-3), step=0.1))

With $v = p + u$ the point that the optimizer would step to, the new parameters are $prox_{\eta R}(v)$. It keeps
no masks: put around it, any method of the library does (`jaxsparse.magnitude(tx, ...)`), and inside of it any
optimizer does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax.numpy as jnp
import optax
from jax import Array

from jaxsparse.engines._checks import check_inner
from jaxsparse.engines.penalties import CountState, Penalty, check_strength
from jaxsparse.engines.setup import Setup
from jaxsparse.engines.units import Units, group_setup
from jaxsparse.typing import GroupsLike, ScalarOrSchedule, Targets

# (units, weights before the step, where it leads, count) -> weights after it
Change = Callable[[Units, Sequence[Array], Sequence[Array], Array], Sequence[Array]]


def proximal(
    penalty: Penalty,
    step: ScalarOrSchedule,
    *,
    groups: GroupsLike = None,
    targets: Targets = None,
) -> optax.GradientTransformation:
    """The proximal step of a penalty: to stand after an optimizer in `optax.chain`.

    Args:
      penalty: `engines.penalties.L1`, `GroupLasso`, a sum of these, or what has their `prox`.
      step: the step size $\\eta$, the learning rate of the optimizer; or a function of the step.
      groups: what the units are: `channels.find(model, x)`, a structure, None: every output channel.
      targets: which leaves, by path; None: all kernels, or all leaves that the groups name.

    >>> from jaxsparse.engines.penalties import L1
    >>> tx = optax.chain(optax.sgd(1.0), proximal(L1(0.5), 1.0))
    >>> params = {"kernel": jnp.array([[2.0, -0.25]])}
    >>> updates, _ = tx.update({"kernel": jnp.zeros((1, 2))}, tx.init(params), params)
    >>> optax.apply_updates(params, updates)["kernel"].tolist()
    [[1.5, 0.0]]

    Raises:
      ValueError: a negative step, no parameters at an update, groups of another model.
    """
    if not callable(step):
        check_strength("step", step)
    size: Callable = step if callable(step) else lambda count: step
    sparse = group_setup(
        None, groups, targets=targets, sides=("out", "with", "in"), asks_sparsity=False
    )
    return project_after(lambda units, ws, vs, count: penalty.prox(units, vs, size(count)), sparse)


def followed_by(
    inner: optax.GradientTransformation, change: Change, setup: Setup
) -> optax.GradientTransformationExtraArgs:
    """`inner`, and `change` after it."""
    return optax.chain(check_inner(inner), project_after(change, setup))


def project_after(change: Change, setup: Setup) -> optax.GradientTransformation:
    """The transformation that takes `change` in place of the step of the optimizer before it.

    Args:
      change: the new weights, from the units, the weights before the step, where it leads, and the count.
      setup: which leaves, and their units.

    Returns:
      A transformation whose updates are exactly -p at weights that become 0.
    """

    def init_fn(params):
        setup.leaves_for(params)
        return CountState(jnp.zeros((), jnp.int32))

    def update_fn(updates, state, params=None):
        if params is None:
            raise ValueError(
                "update needs the parameters: call tx.update(grads, opt_state, params)"
            )
        plan = setup.leaves_for(params)
        ws, us = plan.take(params), plan.gradients(updates, params)
        vs = [w + u.astype(w.dtype) for w, u in zip(ws, us)]
        new = change(Units(plan.leaves), ws, vs, state.count)
        # What the change leaves alone keeps the update of the optimizer, without a rounding.
        out = [
            jnp.where(x == 0, -w, jnp.where(x == v, u, (x - w).astype(u.dtype)))
            for w, u, v, x in zip(ws, us, vs, new)
        ]
        return plan.put(updates, out), CountState(jnp.asarray(optax.safe_increment(state.count)))

    return optax.GradientTransformation(init_fn, update_fn)
