"""The optimizer of a run: its schedule, the inner optimizer, and the method around it."""

import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax

import jaxsparse
from experiments import storage
from jaxsparse.engines import scale_by_age


def make_optimizer(
    config,
    *,
    stacked: Mapping[str, int] | None = None,
    seed: Any = None,
    sparsity: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """The inner optimizer, and the method around it: the one line that makes a network sparse.

    Args:
      config: of it are read `method`, `storage`, `sparsity`, `structure`, `options`, `steps`, `seed`, `clip_norm`,
        and the fields of `learning_rate_schedule` and `INNER`.
      stacked: which leaves stack layers, as the model says (`models.stacked`).
      seed, sparsity: may be traced, for sweeps in one program; `None` for the config's.

    Returns:
      The transformation; its `update` takes the loss as `value=`.

    Raises:
      ValueError: options that the method does not have, or does not take.
    """
    schedule = learning_rate_schedule(
        config.learning_rate,
        config.steps,
        warmup_steps=config.warmup_steps,
        decay=config.decay,
        cycles=config.cycles,
    )
    inner = INNER[config.optimizer](
        schedule, weight_decay=config.weight_decay, momentum=config.momentum
    )

    def clipped(tx):
        if config.clip_norm is None:
            return tx
        return optax.chain(optax.clip_by_global_norm(config.clip_norm), tx)

    if config.storage == "stored":  # outside, the norm would be that of scores and sketches, too
        tx = storage.make_stored(config, clipped(inner), seed=seed, sparsity=sparsity)
    else:
        options = method_options(config, stacked=stacked, seed=seed, sparsity=sparsity)
        tx = clipped(jaxsparse.make(config.method, inner, **options))
    return optax.with_extra_args_support(tx)


def method_options(
    config,
    *,
    stacked: Mapping[str, int] | None = None,
    seed: Any = None,
    sparsity: Any = None,
) -> dict[str, Any]:
    """The options that the config gives its method; arguments as of `make_optimizer`."""
    method = jaxsparse.METHODS[config.method]
    options = {name: value for name, value in config.options.items() if value is not None}
    structure = config.structure
    if structure is not None:
        options["structure"] = structure
    elif "structure" in method.options:
        structure = inspect.signature(method.fn).parameters["structure"].default
    # N:M says how many zeros there are.
    fixed = jaxsparse.structures.resolve(structure).sparsity is not None
    if stacked and "targets" in method.options:
        options["targets"] = targets_of(options.get("targets"), stacked)
    known = {
        "sparsity": None if fixed else config.sparsity if sparsity is None else sparsity,
        "total_steps": config.steps,
        "seed": config.seed if seed is None else seed,
    }
    return {name: v for name, v in known.items() if name in method.options} | options


def targets_of(
    pattern: str | None, stacked: Mapping[str, int]
) -> Callable[[str, Any], bool | jaxsparse.targets.stacked]:
    """The leaves that match `pattern`, or the default ones; each of stacked layers has its own budget."""

    def select(path, leaf):
        chosen = (
            jaxsparse.targets.is_kernel(path, leaf)
            if pattern is None
            else re.search(pattern, path) is not None
        )
        axes = next((n for stack, n in stacked.items() if re.search(stack, path)), 0)
        return jaxsparse.targets.stacked(axes) if chosen and axes else chosen

    return select


def _matrices(params):
    """Where weights decay: not in vectors, which are biases and scales; but in scalars, for learned
    thresholds (STR) live of decay."""
    return jax.tree.map(lambda p: p.ndim != 1, params)


def _adamw(schedule, *, weight_decay, momentum):
    return optax.adamw(schedule, weight_decay=weight_decay, mask=_matrices)


def _sgd(schedule, *, weight_decay, momentum):
    return optax.chain(
        optax.add_decayed_weights(weight_decay, mask=_matrices),
        optax.sgd(schedule, momentum=momentum, nesterov=True),
    )


def _lion(schedule, *, weight_decay, momentum):
    return optax.lion(schedule, weight_decay=weight_decay, mask=_matrices)


def _muon(schedule, *, weight_decay, momentum):
    return optax.contrib.muon(schedule, weight_decay=weight_decay)


def _adamw_by_age(schedule, *, weight_decay, momentum):
    return optax.chain(
        optax.scale_by_adam(),
        scale_by_age(),
        optax.add_decayed_weights(weight_decay, mask=_matrices),
        optax.scale_by_learning_rate(schedule),
    )


# Inner optimizers by name: `(schedule, *, weight_decay, momentum)`; only sgd has the momentum.
INNER: Mapping[str, Callable[..., optax.GradientTransformation]] = {
    "adamw": _adamw,
    "adamw_by_age": _adamw_by_age,
    "sgd": _sgd,
    "lion": _lion,
    "muon": _muon,
}


def _cosine(peak: float, steps: int, warmup: int) -> optax.Schedule:
    return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, steps)


def _linear(peak: float, steps: int, warmup: int) -> optax.Schedule:
    up = optax.linear_schedule(0.0, peak, warmup)
    down = optax.linear_schedule(peak, 0.0, steps - warmup)
    return optax.join_schedules([up, down], [warmup])


# One warm-up and decay by name: `(peak, steps, warmup)`.
DECAYS: Mapping[str, Callable[[float, int, int], optax.Schedule]] = {
    "cosine": _cosine,
    "linear": _linear,
}


def learning_rate_schedule(
    peak: float, steps: int, *, warmup_steps: int = 0, decay: str = "cosine", cycles: int = 1
) -> optax.Schedule:
    """Linear warm-up to the peak, then the decay to zero at the last step; `cycles` times in equal
    parts of the run (rewinds, after which pruned networks recover).

    Args:
      peak: the highest learning rate.
      steps: of the whole run.
      warmup_steps: of each cycle, fewer than it has steps.
      decay: a key of `DECAYS`.
      cycles: from 1 to `steps`.

    Returns:
      The learning rate as a function of the step, counted from 0.

    >>> rate = learning_rate_schedule(1.0, 20, warmup_steps=5, decay="linear", cycles=2)
    >>> [float(rate(step)) for step in (0, 5, 10, 15)]
    [0.0, 1.0, 0.0, 1.0]
    """
    ends = [steps * i // cycles for i in range(cycles + 1)]
    parts = [DECAYS[decay](peak, b - a, warmup_steps) for a, b in zip(ends, ends[1:])]
    return optax.join_schedules(parts, ends[1:-1])
