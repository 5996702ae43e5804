"""Which methods find a planted sparse network: loss, and F1 of the support that they recover.

  python -m experiments.studies.teacher

The teacher is a residual network, $h \\leftarrow h + \\tanh(h W_l)$, l = 1, 2, whose matrices hold 2 %
nonzero weights; a student of the same shape starts from its own dense weights and is trained on the
teacher's outputs at the teacher's sparsity. The skip connections pin every unit to its place, so that the
support can be compared weight by weight (in a plain network hidden units can be permuted).

All students share the optimizer, the data and the number of steps; every method has its default options.
All seeds train at once (`vmap`), a run is one `scan`; run the command again to go on where it was
stopped. N:M methods get the pattern of that sparsity, which the teacher does not have. Methods that cannot
be asked for a sparsity appear at the one they reach.
"""

import argparse
import json
import math
import pathlib
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

import jaxsparse
from experiments.report.page import markdown_table
from experiments.studies.commands import commands_block, read_options
from jaxsparse import nn, selection
from jaxsparse.analysis import plots
from jaxsparse.state import find_states

LAYERS, BATCH, LEARNING_RATE = 2, 128, 3e-3
TWO_VIEW = ("bi_mask", "bdwp", "slope")


def network(params, x: Array, views=None) -> Array:
    """`[batch, width]` to `[batch, width]`; `views` are the weights of the input gradients, if those are
    not the parameters."""
    for i in range(LAYERS):
        w = params[f"layer{i}"]["kernel"]
        product = (
            x @ w if views is None else nn.two_view_matmul(x, w, views[f"layer{i}"]["backward"])
        )
        x = x + jnp.tanh(product)
    return x


def make_teacher(key: Array, width: int, density: float):
    """Matrices with exactly `density width^2` nonzero weights, of size 0.5 to 1.5 and either sign."""
    params = {}
    for i in range(LAYERS):
        place, size, sign = jax.random.split(jax.random.fold_in(key, i), 3)
        kept = selection.topk_mask(
            jax.random.uniform(place, (width, width)), round(density * width**2)
        )
        values = jax.random.uniform(size, (width, width), minval=0.5, maxval=1.5)
        signs = jax.random.rademacher(sign, (width, width)).astype(jnp.float32)
        params[f"layer{i}"] = {"kernel": jnp.where(kept, values * signs, 0.0)}
    return params


def make_student(key: Array, width: int):
    """Dense weights of the usual size."""
    init = jax.nn.initializers.lecun_normal()
    keys = jax.random.split(key, LAYERS)
    return {f"layer{i}": {"kernel": init(k, (width, width))} for i, k in enumerate(keys)}


def second_view(params, state):
    """The weights of the input gradients of a two-view method."""
    return nn.refresh({k: {"backward": p["kernel"]} for k, p in params.items()}, params, state)


def recovered(found: list[Array], truth: list[Array]) -> Array:
    """F1 of the support: 2 |found and true| / (|found| + |true|).

    >>> a, b = jnp.array([True, True, False]), jnp.array([False, True, True])
    >>> float(recovered([a], [b]))
    0.5
    """
    count = lambda masks: jnp.sum(jnp.stack([jnp.sum(m) for m in masks]))
    both = count([f & t for f, t in zip(found, truth)])
    return 2 * both / (count(found) + count(truth))


def options_of(name: str, *, sparsity: float, steps: int, seed: Any) -> dict[str, Any]:
    """What a student is given besides the method's defaults."""
    method = jaxsparse.METHODS[name]
    every = max(1, round(1 / (1 - sparsity)))
    known = {"total_steps": steps, "seed": seed}
    if method.structures == "n:m":
        known["structure"] = jaxsparse.structures.NM(1, every)
    elif method.controls_sparsity:
        known["sparsity"] = sparsity
    return {k: v for k, v in known.items() if k in method.options}


def make_run(name: str, *, width: int, density: float, steps: int, **options):
    """The function `seed -> numbers` that trains one student of one teacher, with `options` that are
    not the method's defaults."""

    def run(seed):
        key = jax.random.key(seed)
        teacher = make_teacher(jax.random.fold_in(key, 0), width, density)
        params = make_student(jax.random.fold_in(key, 1), width)
        schedule = optax.cosine_decay_schedule(LEARNING_RATE, steps)
        inner = optax.adam(schedule)
        given = options_of(name, sparsity=1 - density, steps=steps, seed=seed)
        tx = jaxsparse.make(name, inner, **given | options)
        state = tx.init(params)
        if find_states(state):
            params = jaxsparse.apply_masks(params, state)

        def loss_fn(params, x, views=None):
            return jnp.mean((network(params, x, views) - network(teacher, x)) ** 2)

        def step(carry, i):
            params, state = carry
            x = jax.random.normal(jax.random.fold_in(key, i + 2), (BATCH, width))
            views = second_view(params, state) if name in TWO_VIEW else None
            loss, grads = jax.value_and_grad(loss_fn)(params, x, views)
            updates, state = tx.update(grads, state, params, value=loss)
            return (optax.apply_updates(params, updates), state), loss

        (params, _), _ = jax.lax.scan(step, (params, state), jnp.arange(steps))
        test = jax.random.normal(jax.random.fold_in(key, 1), (2048, width))
        # Relative to what the identity, a student of zeros, leaves unexplained.
        unexplained = jnp.mean((test - network(teacher, test)) ** 2)
        weights, truth = jax.tree.leaves(params), [t != 0 for t in jax.tree.leaves(teacher)]
        kept = [w != 0 for w in weights]
        budget = [round(density * w.size) for w in weights]
        top = [selection.topk_mask(jnp.abs(w), k) for w, k in zip(weights, budget)]
        return {
            "loss": loss_fn(params, test) / unexplained,
            "f1": recovered(kept, truth),
            "f1_top": recovered(top, truth),
            "sparsity": 1 - sum(jnp.sum(k) for k in kept) / sum(w.size for w in weights),
        }

    return run


def study(
    methods: list[str],
    *,
    seeds: int,
    width: int,
    density: float,
    steps: int,
    done: list[dict] | None = None,
    save: Callable[[list[dict]], Any] = lambda rows: None,
    options: Mapping[str, Any] | None = None,
    command: str = "",
) -> list[dict]:
    """One row of numbers per method, a list of `seeds` each, best loss first. `done` are rows of an
    earlier study that are not to be repeated; `save` is called with all rows after each method;
    `options` are not the methods' defaults (dense has none); `command` is noted in each new row. A
    method that cannot have this sparsity gets a row with the reason."""
    rows = list(done or [])
    for method in methods:
        own = {} if method == "dense" else dict(options or {})
        name = " ".join([method, *(f"{k}={v}" for k, v in own.items())])
        if any(row["method"] == name for row in rows):
            continue
        started = time.monotonic()
        one = make_run(method, width=width, density=density, steps=steps, **own)
        run = jax.jit(jax.vmap(one))
        try:
            numbers = jax.device_get(run(jnp.arange(seeds)))
        except ValueError as error:
            rows.append({"method": name, "error": str(error), "command": command})
            print(f"{name:>20}: {error}", flush=True)
        else:
            found = {k: np.asarray(v).tolist() for k, v in numbers.items()}
            rows.append({"method": name, **found, "command": command})
            print(
                f"{name:>20}: loss {np.mean(numbers['loss']):.4f}, F1 {np.mean(numbers['f1']):.3f}, "
                f"sparsity {np.mean(numbers['sparsity']):.4f}, {time.monotonic() - started:.1f} s",
                flush=True,
            )
        save(rows)
        jax.clear_caches()
    return sorted(rows, key=lambda row: float(np.mean(row.get("loss", [np.inf]))))


def figure(rows: list[dict], title: str):
    """Loss over F1, one point per method with the range over seeds."""
    from matplotlib.figure import Figure

    columns = math.ceil(len(rows) / 20)  # of the legend
    fig = Figure(figsize=(6.0 + 1.8 * columns, 5), layout="constrained", dpi=110, facecolor="white")
    axes = fig.add_subplot(facecolor="white")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, color="0.5")
    colors, markers = plots._COLORS, plots._MARKERS
    for i, row in enumerate(rows):
        x, y = np.mean(row["f1"]), np.mean(row["loss"])
        spread = [[x - min(row["f1"])], [max(row["f1"]) - x]]
        rise = [[y - min(row["loss"])], [max(row["loss"]) - y]]
        axes.errorbar(
            x,
            y,
            xerr=spread,
            yerr=rise,
            color=colors[i % len(colors)],
            marker=markers[i // len(colors) % len(markers)],
            linestyle="none",
            label=row["method"],
            capsize=2,
            linewidth=0.8,
        )
    axes.set_yscale("log")
    axes.set_xlabel("F1 of the recovered support")
    axes.set_ylabel("test loss / loss of the identity")
    axes.set_title(title)
    fig.legend(loc="outside right upper", fontsize=8, frameon=False, ncols=columns)
    return fig


def write(rows: list[dict], out: pathlib.Path, facts: dict[str, Any]) -> None:
    """Writes `teacher.md` and `teacher.png`."""
    out.mkdir(parents=True, exist_ok=True)
    commands = commands_block(rows)
    failed = [row for row in rows if "error" in row]
    rows = [row for row in rows if "error" not in row]
    title = f"A planted teacher with {facts['density']:.0%} nonzero weights"
    figure(rows, title).savefig(out / "teacher.png")
    cell = lambda x, form: f"{np.mean(x):{form}} ± {np.std(x, ddof=min(1, len(x) - 1)):{form}}"
    table = markdown_table(
        ["method", "loss", "F1", "F1 of the largest weights", "sparsity"],
        [
            [
                row["method"],
                cell(row["loss"], ".4f"),
                cell(row["f1"], ".3f"),
                cell(row["f1_top"], ".3f"),
                f"{np.mean(row['sparsity']):.2%}",
            ]
            for row in rows
        ],
    )
    text = (
        f"# {title}: loss and recovered support\n\n"
        f"{commands}\n\n"
        f"{facts['seeds']} teachers, one student each per method; mean and standard deviation. "
        f"{LAYERS} residual layers of {facts['width']} x {facts['width']} weights, {facts['steps']} "
        f"steps of {BATCH} fresh examples, Adam at {LEARNING_RATE} with cosine decay, the methods' "
        "default options. The loss is relative to that of the identity, a student of zeros. F1 "
        "compares the nonzero weights with the teacher's; the column beside it takes the student's "
        "largest weights, as many as the teacher has, which is what there is to say of students that "
        "are not as sparse. N:M methods have a pattern that the teacher has not.\n\n"
        "![Loss over F1](teacher.png)\n\n" + table + "\n"
    )
    if failed:
        text += "\nWithout a result: " + "; ".join(f"{r['method']} ({r['error']})" for r in failed)
        text += ".\n"
    (out / "teacher.md").write_text(text)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--methods", default="all", help="students, by name; dense is always run")
    parser.add_argument("--seeds", type=int, default=3, help="teachers and students per method")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--width", type=int, default=100, help="the matrices are width x width")
    parser.add_argument(
        "--density", type=float, default=0.02, help="nonzero weights of the teacher"
    )
    parser.add_argument(
        "--options", default="", help="not the methods' defaults: soft=False,rescale=False"
    )
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/teacher"))
    args = parser.parse_args(argv)
    names = list(jaxsparse.METHODS) if args.methods == "all" else args.methods.split(",")
    for name in names:
        jaxsparse.METHODS[name]  # an unknown name stops here
    if args.seeds < 1 or args.steps < 10 or args.width < 2:
        raise ValueError(
            f"seeds={args.seeds}, steps={args.steps}, width={args.width}: at least 1, 10 and 2"
        )
    if not 0 < args.density <= 1:
        raise ValueError(f"density={args.density}: must be in (0, 1]")
    args.changed = read_options(filter(None, args.options.split(",")))
    args.names = ["dense", *(m for m in names if m != "dense")]
    return args


def main(argv: list[str] | None = None) -> None:
    try:
        args = parse(argv)
        facts = {k: getattr(args, k) for k in ("seeds", "width", "density", "steps")}
        saved = args.out / "teacher.json"
        done = load_rows(facts, saved)
    except ValueError as error:
        sys.exit(f"error: {error}")

    def save(rows):
        saved.write_text(json.dumps({"facts": facts, "rows": rows}, indent=1) + "\n")

    args.out.mkdir(parents=True, exist_ok=True)
    given = [a for a in (argv or sys.argv[1:]) if not a.startswith("--out")]
    command = " ".join(["python -m experiments.studies.teacher", *given])
    rows = study(args.names, done=done, save=save, options=args.changed, command=command, **facts)
    write(rows, args.out, facts)
    print(f"wrote {args.out / 'teacher.md'} and teacher.png")


def load_rows(facts: dict[str, Any], path: pathlib.Path) -> list[dict]:
    """The rows of a run that was stopped, or of one with other methods.

    Raises:
      ValueError: of a run with other facts.
    """
    if not path.exists():
        return []
    old = json.loads(path.read_text())
    if old["facts"] != facts:
        raise ValueError(f"{path} holds a run with {old['facts']}, not {facts}; give another --out")
    return old["rows"]


if __name__ == "__main__":
    main()
