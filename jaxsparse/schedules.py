"""Sparsity, drop fraction and gradient annealing over time: plain optax schedules.

A schedule is a function from the step count (int or traced int32) to a float32 scalar. Any optax
schedule does where one of these is asked for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse._control import is_concrete

Schedule = Callable[[jax.typing.ArrayLike], jax.Array]
Number = float | int | np.number | jax.Array


def _progress(step, begin, end) -> jax.Array:
    """(step - begin) / (end - begin), clipped to [0, 1]; exactly 1 from `end` on."""
    step, begin, end = jnp.asarray(step), jnp.asarray(begin), jnp.asarray(end)
    done = jnp.clip(step - begin, 0, None).astype(jnp.float32)
    whole = jnp.maximum(end - begin, 1).astype(jnp.float32)
    return jnp.where(step >= end, 1.0, jnp.minimum(done / whole, 1.0))


def polynomial(begin, end, *, final: Any = 1.0, initial: Any = 0.0, power: Any = 3) -> Schedule:
    r"""$S(t) = S_f + (S_i - S_f)(1 - (t - t_0)/(t_1 - t_0))^{power}$: `initial` before `begin`,
    exactly `final` from `end` on. With power 3 it is the cubic curve of Zhu & Gupta, To prune, or
    not to prune, 2017.

    >>> s = polynomial(0, 100, final=0.8)
    >>> [round(float(s(t)), 4) for t in (0, 50, 100, 1000)]
    [0.0, 0.7, 0.8, 0.8]
    """

    def schedule(step):
        left = 1.0 - _progress(step, begin, end)
        value = final + (initial - final) * left**power
        value = jnp.where(left == 1.0, initial, value)  # exact at both ends
        return jnp.where(left == 0.0, final, value).astype(jnp.float32)

    return schedule


def cubic(begin, end, *, final: Any = 1.0, initial: Any = 0.0) -> Schedule:
    """`polynomial` of power 3."""
    return polynomial(begin, end, final=final, initial=initial, power=3)


def one_shot(step_at, *, final=1.0, initial=0.0) -> Schedule:
    """`initial` before `step_at`, `final` from it on."""
    return lambda step: jnp.where(jnp.asarray(step) >= step_at, final, initial).astype(jnp.float32)


def constant(value) -> Schedule:
    """The same value at every step."""
    return lambda step: jnp.asarray(value, jnp.float32)


def cosine(value, end, *, final=0.0) -> Schedule:
    r"""$\alpha_T + (\alpha - \alpha_T)/2\,(1 + \cos(\pi t / T))$, $\alpha_T$ (`final`) from $T$ on;
    with `final` 0, RigL's drop fraction (Evci et al., Rigging the lottery, 2020).

    >>> f = cosine(0.3, 100)
    >>> [round(float(f(t)), 3) for t in (0, 50, 100, 101)]
    [0.3, 0.15, 0.0, 0.0]
    """

    def schedule(step):
        progress = _progress(step, 0, end)
        decayed = final + (value - final) / 2 * (1.0 + jnp.cos(jnp.pi * progress))
        return jnp.where(progress >= 1.0, final, decayed)

    return schedule


def inverse_power(value, end, *, power=1) -> Schedule:
    r"""$\alpha (1 - t/T)^{power}$, 0 after $T$."""
    return lambda step: value * (1.0 - _progress(step, 0, end)) ** power


def phases(values, begin, end) -> Schedule:
    """`values` one after the other, in equally long phases between `begin` and `end`; the first one
    before, the last one from `end` on.

    >>> s = phases([0.3, 0.2, 0.1], 0, 9)
    >>> [round(float(s(t)), 1) for t in (0, 2, 3, 6, 9, 100)]
    [0.3, 0.3, 0.2, 0.1, 0.1, 0.1]
    """
    table = jnp.asarray(values, jnp.float32)

    def schedule(step):
        n, span = table.shape[0], jnp.maximum(jnp.asarray(end) - begin, 1)
        now = jnp.clip(jnp.asarray(step) - begin, 0, span)
        return table[jnp.clip(now * n // span, 0, n - 1)]

    return schedule


def rounds(sparsity, number, begin, end) -> Schedule:
    r"""The part of the way to `sparsity` in iterative pruning: of `number` R cuts, spread evenly from
    `begin` to `end`, each leaves the same fraction of what is there, so that after k of them the
    sparsity is $1 - (1 - S)^{k/R}$.

    >>> s = rounds(0.75, 2, 0, 10)
    >>> [round(0.75 * float(s(t)), 2) for t in (0, 9, 10)]
    [0.5, 0.5, 0.75]
    """

    def schedule(step):
        span = jnp.maximum(jnp.asarray(end) - begin, 1)
        past = jnp.asarray(step) - begin
        k = jnp.where(past < 0, 0, 1 + jnp.minimum(past, span) * (number - 1) // span)
        k = jnp.where(jnp.asarray(step) >= end, number, k).astype(jnp.float32)
        now = 1.0 - (1.0 - jnp.asarray(sparsity, jnp.float32)) ** (k / number)
        return jnp.where(k >= number, 1.0, now / jnp.maximum(sparsity, 1e-9))

    return schedule


def anytime_densities(sparsity, stages, *, base=0.8) -> jax.Array:
    r"""The densities $base^{\tau_i}$ of `stages` stages, $\tau$ in equal steps from 1 to where the
    density is 1 - `sparsity` (Misra et al., APP: anytime progressive pruning, 2022).

    >>> [round(float(d), 4) for d in anytime_densities(1 - 0.8**4.5, 8)]
    [0.8, 0.7155, 0.64, 0.5724, 0.512, 0.4579, 0.4096, 0.3664]
    """
    most = jnp.log(1.0 - jnp.asarray(sparsity, jnp.float32)) / jnp.log(base)
    return base ** jnp.linspace(1.0 if stages > 1 else most, most, stages)


def gradient_annealing(value, end, *, reset=None, low=-6.0, high=6.0) -> Schedule:
    r"""AutoSparse's decay of the gradient of pruned weights (Kundu et al., 2023):
    $\alpha_0 \max\bigl(\tfrac{1 + \cos(\pi t/T)}{2}, 1 - \sigma(L_0 + (L_1 - L_0) t/T)\bigr)$,
    and exactly 0 from the step `reset` on (the curve alone never reaches 0).

    >>> a = gradient_annealing(1.0, 100)
    >>> [round(float(a(t)), 6) for t in (0, 25, 50, 75, 100)]
    [1.0, 0.952574, 0.5, 0.146447, 0.002473]
    """

    def schedule(step):
        x = _progress(step, 0, end)
        cos = 0.5 * (1.0 + jnp.cos(jnp.pi * x))
        sigmoid = 1.0 - jax.nn.sigmoid(low + (high - low) * x)
        decayed = value * jnp.maximum(cos, sigmoid)
        return decayed if reset is None else jnp.where(jnp.asarray(step) >= reset, 0.0, decayed)

    return schedule


@dataclasses.dataclass(frozen=True)
class Updates:
    """The steps at which masks are recomputed: `begin`, `begin + every`, ... and, with `at_end`,
    `end` itself, so that a schedule that ends there is reached whether or not `every` divides the
    interval. Steps are counted from 0: step t is the (t + 1)-th `update`.
    """

    begin: int | np.integer | jax.Array
    end: int | np.integer | jax.Array
    every: int | np.integer | jax.Array = 1
    at_end: bool = True

    def fires(self, step) -> jax.Array:
        """Whether masks are recomputed at `step` (bool scalar).

        >>> u = Updates(0, 10, 4)
        >>> [t for t in range(14) if u.fires(t)]
        [0, 4, 8, 10]
        """
        step = jnp.asarray(step)
        due = (step - self.begin) % self.every == 0
        due = due | (step == self.end) if self.at_end else due
        return (step >= self.begin) & (step <= self.end) & due


@dataclasses.dataclass(frozen=True)
class At:
    """Single steps at which masks are recomputed.

    >>> [t for t in range(10) if At((2, 5)).fires(t)]
    [2, 5]
    """

    steps: Sequence[int | np.integer | jax.Array]

    def fires(self, step) -> jax.Array:
        """Whether masks are recomputed at `step` (bool scalar)."""
        return jnp.any(jnp.asarray(step) == jnp.stack([jnp.asarray(s) for s in self.steps]))

    def passed(self, step) -> jax.Array:
        """How many of the steps are at or before `step` (int32 scalar)."""
        return jnp.sum(
            jnp.asarray(step) >= jnp.stack([jnp.asarray(s) for s in self.steps]), dtype=jnp.int32
        )


@dataclasses.dataclass(frozen=True)
class Both:
    """The steps of either of two sets."""

    first: Updates | At
    second: Updates | At

    def fires(self, step) -> jax.Array:
        """Whether masks are recomputed at `step` (bool scalar)."""
        return self.first.fires(step) | self.second.fires(step)


def check_length(total_steps) -> None:
    """Raises `ValueError` if a run of `total_steps` has no step."""
    if is_concrete(total_steps) and total_steps < 1:
        raise ValueError(f"total_steps={total_steps}: a run has at least one step")


def window(
    total_steps: Any,
    begin_step: Any = None,
    end_step: Any = None,
    update_every: Any = 1,
    *,
    default_begin: Any = 0,
    fraction: float = 0.75,
    at_end: bool = True,
) -> Updates:
    """The update steps of a run of `total_steps`, checked; `begin_step` is by default
    `default_begin`, `end_step` `fraction * total_steps`.

    Raises:
      ValueError: `total_steps` or `update_every` below 1, `begin_step` negative, `end_step` before
        `begin_step` or not within the run (the schedule would never reach its target).
    """
    total, every = total_steps, update_every
    check_length(total)
    begin = default_begin if begin_step is None else begin_step
    if end_step is None:
        percent = round(fraction * 100)
        end = total * percent // 100
        # Never after the last step of a short run, never before its begin.
        end = jnp.maximum(end, begin) if not is_concrete(end, begin) else max(end, begin)
    else:
        end = end_step
    if is_concrete(total, every, begin, end):
        if every < 1:
            raise ValueError(f"update_every={every}: must be at least 1")
        if begin < 0:
            raise ValueError(f"begin_step={begin}: must not be negative")
        if begin >= total:
            raise ValueError(
                f"begin_step={begin} is not within total_steps={total}: the masks would never be "
                f"updated; give a begin_step (and an update_every) below {total}"
            )
        if not begin <= end:
            raise ValueError(f"end_step={end} is before begin_step={begin}")
        if end >= total:
            raise ValueError(
                f"end_step={end} is not within total_steps={total}: the run would stop short of "
                f"its target; steps count from 0, so give an end_step of at most {total - 1}"
            )
    return Updates(begin, end, every, at_end)


def drop_fraction(value: Number | Schedule, end_step, *, final: float = 0.0) -> Schedule:
    """The `drop_fraction` of a method that drops and grows: a schedule as it is; a number as the start
    of a cosine to `final` at `end_step`.

    >>> [round(float(drop_fraction(0.3, 100)(jnp.int32(t))), 2) for t in (0, 50, 100)]
    [0.3, 0.15, 0.0]

    Raises:
      ValueError: a number not in [0, 1].
    """
    if callable(value):
        return value
    if is_concrete(value) and not 0.0 <= float(value) <= 1.0:
        raise ValueError(
            f"drop_fraction={value}: the part of the kept weights that an update replaces must be in "
            "[0, 1]"
        )
    return cosine(value, end_step, final=final)
