"""What a run leaves for its report: `jaxsparse.analysis.report` makes the page of it."""

import ast
import json
import pathlib
from collections.abc import Iterable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

import jaxsparse
from jaxsparse import analysis


def pattern_numbers(counts) -> dict[str, object]:
    """What one look at the zero pattern gives, for the logs: counted on the host, in integers.

    `counts` has `kept`, `born` (kept now, not at the last look) and `size` of the sparse leaves.
    """
    counts = jax.tree.map(lambda x: int(np.sum(x, dtype=np.int64)), jax.device_get(counts))
    kept, born, size = counts["kept"], counts["born"], counts["size"]
    return {
        "sparsity": 1 - sum(kept.values()) / max(1, sum(size.values())),
        "density": {name: kept[name] / size[name] for name in kept},
        "churn": sum(born.values()) / max(1, sum(kept.values())),
        "layer_churn": {name: born[name] / max(1, kept[name]) for name in kept},
    }


def read_options(texts: Iterable[str]) -> dict[str, Any]:
    """`name=value` texts, values as Python literals where they are ones.

    >>> read_options(["allocation=erk", "soft=False", "threshold=0.03"])
    {'allocation': 'erk', 'soft': False, 'threshold': 0.03}

    Raises:
      ValueError: a text without a name or a value.
    """
    options: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not (name and equals and value):
            raise ValueError(f"options: {text!r} is not of the form name=value")
        try:
            options[name] = ast.literal_eval(value)
        except (SyntaxError, ValueError):
            options[name] = value
    return options


def commands_block(points: Iterable[dict]) -> str:
    """The commands that trained these points, in order, as a block of a page."""
    commands = dict.fromkeys(p["command"] for p in points if p.get("command"))
    return "```\n" + "\n".join(commands) + "\n```"


def forward_flops(task, data, state) -> dict[str, int]:
    """Dense operations of one example's forward pass, by leaf."""
    x = jax.ShapeDtypeStruct((1, *data.shape), jnp.int32 if data.is_text else jnp.float32)
    apply = lambda params, stats, x: task.apply(params, stats, x, train=False)[0]
    return analysis.flops.forward_flops(apply, state.params, state.stats, x)


def weight_gradient(method: str, update_every: int | None) -> Literal["sparse", "dense"] | int:
    """At which weights the gradient is needed: see `jaxsparse.analysis.flops.training_flops`."""
    kinds: dict[str, Literal["sparse", "dense"] | int] = {
        "kept": "sparse", "updates": update_every or 100, "all": "dense"
    }  # fmt: skip
    return kinds[jaxsparse.METHODS[method].gradients]


def write(config, workdir: pathlib.Path, data, task, state, evaluation) -> pathlib.Path:
    """Writes `result.json`, and from it and the logs `report.md`, `report.html` and `plots/`; returns
    the HTML file."""
    result = {
        "evaluation": evaluation,
        "summary": jaxsparse.summarize(state.params, state.opt_state).to_dict(),
        "flops": forward_flops(task, data, state),
        "weight_gradient": weight_gradient(config.method, config.options.update_every),
    }
    (workdir / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    return analysis.report(workdir)
