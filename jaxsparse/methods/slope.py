"""SLoPe: a fixed N:M mask, pruned once more for the gradient of the input; adapters at the end."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxsparse import schedules, scores
from jaxsparse import targets as rules
from jaxsparse.engines import hold_masks, is_concrete, keep_best, when
from jaxsparse.engines.setup import setup
from jaxsparse.engines.two_view import two_view
from jaxsparse.methods.backward_pattern import along_outputs, pattern
from jaxsparse.methods.registry import register
from jaxsparse.typing import StepCount, StructureLike, Targets

_ADAPTER = re.compile(r"(^|/)adapter_(in|out)$")


def double_pruning_loss(n: int, m: int) -> float:
    r"""The part of all weights that the second pruning of a random n:m matrix removes on average:
    $\sum_{j=n+1}^{m} \binom{m}{j} s^j (1 - s)^{m - j} (j - n)/m$ with $s = n/m$.

    >>> double_pruning_loss(2, 4), double_pruning_loss(1, 2)
    (0.09375, 0.125)
    """
    s = n / m
    terms = (math.comb(m, j) * s**j * (1 - s) ** (m - j) * (j - n) / m for j in range(n + 1, m + 1))
    return sum(terms)


def sparsifiable(path: str, leaf: Any) -> bool:
    """The default targets of `slope`: kernels, but not the adapters."""
    return rules.is_kernel(path, leaf) and not _ADAPTER.search(path)


def _last_percent(total_steps):
    """The first step of the last 1 % of the run, which has at least one step."""
    length = total_steps // 100
    return total_steps - (max(length, 1) if is_concrete(length) else jnp.maximum(length, 1))


def _timing(options: Mapping[str, Any]) -> dict[str, Any]:
    given = options["adapter_step"]
    return {"adapter_step": _last_percent(options["total_steps"]) if given is None else given}


@register(
    "slope",
    reference="Mozaffari et al., SLoPe: double-pruned sparse plus lazy low-rank adapter "
    "pretraining of LLMs, 2025",
    controls_sparsity=False,
    dynamics="fixed",
    structures="n:m",
    timing=_timing,
)
def slope(
    inner: optax.GradientTransformation,
    *,
    total_steps: StepCount,
    adapter_step: StepCount | None = None,
    structure: StructureLike = "2:4",
    update_every: int = 100,
    targets: Targets = None,
    pack_masks: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""The forward mask $m_R$ is chosen once, by |W| at `init` (n of m inputs), and kept; the
    backward mask $m_{RC} \le m_R$ keeps the n largest $|W \odot m_R|$ of each m outputs and is
    refreshed every `update_every` steps:

    $$Y = X (W \odot m_R),\quad \partial X = \partial Y (W \odot m_{RC})^T,\quad
      \partial W = X^T \partial Y \odot m_R.$$

    Low-rank adapters, leaves named `adapter_in` and `adapter_out` (`jaxsparse.nn.SLoPeLinear`), stay
    as they are until `adapter_step` and train with the weights from then on. On layers with one
    view this is `static` with a magnitude mask; see `jaxsparse.nn.two_view`.

    Args:
      inner: the optimizer of the weights and of the adapters.
      total_steps: the length of the run, in steps.
      adapter_step: the first step that moves the adapters; by default the last 1 % of the run, at
        least its last step.
      structure: NM(n, m) or its text; m must divide the inputs and the outputs of every sparse
        leaf.
      update_every: steps between two choices of $m_{RC}$.
      targets: by default all kernels but the adapters. (The authors' release leaves out layers
        whose sides differ by more than a factor of 5.)
      pack_masks: store masks as one bit per weight.

    >>> import jaxsparse
    >>> tx = jaxsparse.methods.slope(optax.adamw(1e-4), total_steps=10_000)

    Raises:
      ValueError: another structure, groups that do not divide, a step outside the run.
    """
    schedules.check_length(total_steps)
    forward, kind = pattern(structure)
    late = _last_percent(total_steps) if adapter_step is None else adapter_step
    if is_concrete(update_every) and update_every < 1:
        raise ValueError(f"update_every={update_every}: must be at least 1")
    if isinstance(late, int) and late < 0:
        raise ValueError(f"adapter_step={late}: must not be negative")
    chosen = sparsifiable if targets is None else targets
    sparse = setup(structure=forward, targets=chosen, pack_masks=pack_masks)
    init = keep_best(scores.magnitude, sparse)

    def rule(leaf, w, m, old, count):
        def choose(_, w, m):
            return along_outputs(leaf, kind, w, where=m)

        if old is None:
            return choose(None, w, m), None
        return when((count + 1) % update_every == 0, choose, old[0], w, m), None

    tx = two_view(hold_masks(inner, sparse, init=init), sparse, kind, rule)

    def update(updates, state, params=None, **extra):
        def gate(tree):
            early = lambda x: jnp.where(state.count >= late, x, jnp.zeros((), x.dtype))
            named = rules.named_leaves(tree)
            gated = [early(x) if _ADAPTER.search(path) else x for path, x in named]
            return jax.tree.unflatten(jax.tree.structure(tree), gated)

        # Both ways: no moments of the adapters before their time, and no weight decay.
        updates, new = tx.update(gate(updates), state, params, **extra)
        return gate(updates), new

    return optax.GradientTransformationExtraArgs(tx.init, update)
