"""What a run leaves for its report."""

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
    """Steps from one update of the masks to the next; 100 for a method that has no such option."""
    given = {name: value for name, value in options.items() if value is not None}
    resolved = jaxsparse.METHODS[method].resolved(**{**given, "total_steps": total_steps})
    return int(resolved.get("update_every") or 100)


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
    dense: Task | None = None,
) -> pathlib.Path:
    """Writes `result.json`, and from it and the logs `report.md`, `report.html` and `plots/`.

    Args:
      workdir: of the run, with `config.json` and `metrics.jsonl` in it.
      method, options, total_steps: as for `weight_gradient`.
      data, task: what was trained.
      state: at the end, in this host's memory.
      evaluation: on the test split, at the end.
      dense: of layers that are stored as blocks, the task that stores them dense, whose operations count.

    Returns:
      The path of the HTML page.
    """
    result = {
        "evaluation": evaluation,
        "summary": jaxsparse.summarize(state.params, state.opt_state).to_dict(),
        "flops": forward_flops(dense or task, data, jax.eval_shape(dense.init) if dense else state),
        "weight_gradient": weight_gradient(method, options, total_steps),
    }
    (workdir / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    return report(workdir)
