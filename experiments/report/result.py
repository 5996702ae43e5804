"""What a run leaves for its report."""

import inspect
import json
import pathlib
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

import jaxsparse
from experiments.datasets import Dataset
from experiments.report.training import report
from experiments.task import State, Task
from jaxsparse.analysis import flops


def forward_flops(task: Task, data: Dataset, state: State) -> dict[str, int]:
    """Dense operations of one example's forward pass, by leaf."""
    x = jax.ShapeDtypeStruct((1, *data.shape), jnp.int32 if data.is_text else jnp.float32)
    apply = lambda params, stats, x: task.apply(params, stats, x, train=False)[0]
    return flops.forward_flops(apply, state.params, state.stats, x)


def weight_gradient(
    method: str, options: Mapping[str, Any], total_steps: int
) -> Literal["sparse", "dense"] | int:
    """At which weights the gradient is needed: see `jaxsparse.analysis.flops.training_flops`.

    Args:
      method: a key of `jaxsparse.METHODS`.
      options: those that the run gives to it.
      total_steps: of the run.
    """
    kind = jaxsparse.METHODS[method].gradients
    if kind == "updates":
        return update_every(method, options, total_steps)
    return "sparse" if kind == "kept" else "dense"


def update_every(method: str, options: Mapping[str, Any], total_steps: int) -> int:
    """Steps from one update of the masks to the next.

    TODO(methods): `jaxsparse.METHODS[method].resolved(total_steps=total_steps, **options)` knows this; the
    rest of the function goes when the registry has it.
    """
    given = options.get("update_every")
    if given is None and "update_every" in jaxsparse.METHODS[method].options:
        given = inspect.signature(jaxsparse.METHODS[method].fn).parameters["update_every"].default
    if given is None and method == "rigl_itop":
        given = max(1, total_steps * 8 // 195)
    return given or 100


def write(
    workdir: pathlib.Path,
    *,
    method: str,
    options: Mapping[str, Any],
    total_steps: int,
    data: Dataset,
    task: Task,
    state: State,
    evaluation: Mapping[str, float],
) -> pathlib.Path:
    """Writes `result.json`, and from it and the logs `report.md`, `report.html` and `plots/`.

    Args:
      workdir: of the run, with `config.json` and `metrics.jsonl` in it.
      method, options, total_steps: as for `weight_gradient`.
      data, task: what was trained.
      state: at the end, in this host's memory.
      evaluation: on the test split, at the end.

    Returns:
      The path of the HTML page.
    """
    result = {
        "evaluation": evaluation,
        "summary": jaxsparse.summarize(state.params, state.opt_state).to_dict(),
        "flops": forward_flops(task, data, state),
        "weight_gradient": weight_gradient(method, options, total_steps),
    }
    (workdir / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    return report(workdir)
