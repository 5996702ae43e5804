"""Trains a sparse autoencoder of any family, and writes a report.

  python -m experiments.train_sae --workdir=runs/sae
  python -m experiments.train_sae --config=experiments/configs/sae_smollm2.py \\
      --config.family=BatchTopK --workdir=runs/sae_smollm2

Without --config: TopK on rows of a planted dictionary, under a minute, with the recovery of its atoms.
experiments/configs/sae_planted.py lists every field. The same command goes on where a run was stopped or
killed; SIGTERM and Ctrl-C save first. The folder gets metrics.jsonl, report.md with figures, the
autoencoder in SAELens' layout where it has one (model/), and features.html for a language model.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags
from absl import logging as absl_logging
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from ml_collections import config_flags

from experiments.checkpoints import CheckpointError, Checkpoints
from experiments.datasets.planted import planted
from experiments.fields import SEEDS, Rule, check_by, integer, number, one_of, text, yes_or_no
from experiments.logs import Logs, read
from experiments.models import smollm2
from experiments.stopping import Diverged, StopSignal
from jaxsparse import sae

OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "adam": lambda rate: optax.adam(rate, eps=6.25e-10),
    "adamw": lambda rate: optax.adamw(rate, eps=6.25e-10),
    "lion": optax.lion,
    "muon": optax.contrib.muon,
}
# Of these three an autoencoder needs more than rows of one layer.
FAMILIES: dict[str, type[sae.SAE]] = {
    name: kind
    for name in sae.__all__
    if name not in ("SAE", "GradientTopK", "Crosscoder")
    and isinstance(kind := getattr(sae, name), type)
    and issubclass(kind, sae.SAE)
}


def least_and_most(value: Any) -> str | None:
    """Two whole numbers of at least 0, the first not above the second."""
    right = isinstance(value, tuple | list) and len(value) == 2 and not any(map(integer(0), value))
    return None if right and value[0] <= value[1] else "must be two whole numbers (least, most)"


def devices(value: Any) -> str | None:
    """Two whole numbers of at least 1 whose product is at most the number of devices."""
    right = isinstance(value, tuple | list) and len(value) == 2 and not any(map(integer(1), value))
    right = right and value[0] * value[1] <= jax.device_count()
    return (
        None
        if right
        else f"must be two whole numbers whose product is at most {jax.device_count()}"
    )


FIELDS: dict[str, Rule] = {
    "family": one_of(FAMILIES),
    "d_sae": integer(1),
    "dead_after": integer(1),
    "data": one_of(("planted", "smollm2")),
    "tokens": integer(1),
    "scale": yes_or_no,
    "width": integer(1),
    "atoms": integer(1),
    "active": least_and_most,
    "noise": number(0.0),
    "site": text,
    "text": one_of(("prose", "code")),
    "layers": integer(1),
    "length": integer(2),
    "eval_sequences": integer(1),
    "seed": integer(0, SEEDS - 1),
    "steps": integer(1),
    "batch_size": integer(1),
    "learning_rate": number(above=0.0),
    "optimizer": one_of(OPTIMIZERS),
    "clip_norm": number(above=0.0),
    "unit_norm": yes_or_no,
    "sparsity_warmup": integer(0),
    "mesh": devices,
    "resample_every": integer(0),
    "log_every": integer(1),
    "checkpoint_every": integer(1),
    "keep_checkpoints": integer(1),
}


def check(config: Any) -> None:
    """Refuses a config that cannot be run as it says; the family checks its own options.

    Raises:
      ValueError: names every field with a wrong value, and says what would do.
    """
    check_by(config, FIELDS, free=("options",))


@dataclasses.dataclass(frozen=True)
class Data:
    """Rows to train and to measure on; the true atoms, or a network, its texts, and its loss with reconstructions."""

    rows: np.ndarray
    held_out: np.ndarray
    atoms: np.ndarray | None = None
    network: nnx.Module | None = None
    tokens: tuple[jax.Array, ...] = ()
    decode: Callable[[list[int]], str] | None = None
    recovery: sae.Recovery | None = None


def load(config: Any, whole: nnx.Module | None = None) -> Data:
    """The activations that a configuration asks for.

    Args:
      config: as of `train`.
      whole: a language model whose loss is measured in place of that of its first blocks.

    Raises:
      ValueError: a site that does not exist, more tokens than the text has.
    """
    if config.data == "planted":
        made = planted(
            config.tokens + 4096, width=config.width, atoms=config.atoms,
            active=tuple(config.active), noise=config.noise, seed=config.seed,
        )  # fmt: skip
        return Data(made.rows[4096:], made.rows[:4096], made.atoms)
    network, tokenizer = smollm2.load(config.layers)
    count = -(-config.tokens // (config.length - 1))
    batches = lambda half, n: smollm2.batches(tokenizer, half, n, config.length, kind=config.text)
    training, evaluation = (
        batches("calibration", count), batches("evaluation", config.eval_sequences),
    )  # fmt: skip
    collect = lambda b: sae.Stored.collect(network, config.site, b, batch_size=1, skip_first=1).rows
    recovery = sae.Recovery(
        network if whole is None else whole, config.site, evaluation, smollm2.next_token_loss,
        skip_first=1,
    )  # fmt: skip
    return Data(
        collect(training)[: config.tokens], collect(evaluation), None, network, tuple(evaluation),
        tokenizer.decode, recovery,
    )  # fmt: skip


def make_model(config: Any, width: int) -> sae.SAE:
    """The autoencoder of a configuration.

    Raises:
      ValueError: options that the family does not take.
    """
    options = dict(config.options)
    try:
        return FAMILIES[config.family](
            width, config.d_sae, dead_after=config.dead_after, rngs=nnx.Rngs(config.seed), **options
        )
    except TypeError as error:
        raise ValueError(f"options={options} of {config.family}: {error}") from error


def make_optimizer(config: Any) -> optax.GradientTransformation:
    """Clipping, the optimizer with its rate falling to 0 over the last fifth, atoms of norm 1."""
    last = max(config.steps // 5, 1)
    rate = optax.linear_schedule(config.learning_rate, 0.0, last, config.steps - last)
    tx = optax.chain(
        optax.clip_by_global_norm(config.clip_norm), OPTIMIZERS[config.optimizer](rate)
    )
    return sae.unit_norm_decoder(tx) if config.unit_norm else tx


def train(config: Any, workdir: str | pathlib.Path, data: Data | None = None) -> dict[str, float]:
    """Runs the experiment to its end, from the last checkpoint in `workdir` if there is one.

    Args:
      config: the fields of experiments/configs/sae_planted.py.
      workdir: the folder of the run.
      data: what `load(config)` gives, where several runs share it.

    Returns:
      The measures of `sae.evaluate` on held-out rows; `recovery` (the mean over true atoms of the largest
      cosine with a learned one) or `loss_recovered`.

    Raises:
      SystemExit: with code 0, after SIGTERM or Ctrl-C, when all is saved.
      ValueError: for a config that cannot be run, or a `workdir` of another run.
      Diverged: the loss is not finite.
    """
    check(config)
    data = load(config) if data is None else data
    model = fit(config, workdir, data)
    measures = evaluate(config, model, data)
    report(config, model, data, measures, pathlib.Path(workdir).absolute())
    return measures


def fit(config: Any, workdir: str | pathlib.Path, data: Data) -> sae.SAE:
    """Trains to the end, from the last checkpoint in `workdir` if there is one, and measures nothing.

    Args, Raises: as of `train`.

    Returns:
      The autoencoder of rows as they are.
    """
    check(config)
    workdir = pathlib.Path(workdir).absolute()
    workdir.mkdir(parents=True, exist_ok=True)
    if config.batch_size % config.mesh[0]:
        raise ValueError(
            f"batch_size={config.batch_size}: must be a multiple of the {config.mesh[0]} devices of mesh"
        )
    if len(data.rows) < config.batch_size:
        raise ValueError(f"batch_size={config.batch_size}: there are {len(data.rows)} rows")
    scale = sae.input_scale(jnp.asarray(data.rows[:8192])) if config.scale else 1.0
    model, tx = make_model(config, data.rows.shape[1]), make_optimizer(config)
    # The median of a sample: what the bias of the decoder starts from.
    model.b_dec[...] = sae.geometric_median(scale * jnp.asarray(data.rows[:2048]))
    stored = sae.Stored(data.rows, batch_size=config.batch_size, seed=config.seed)
    warm_up = sae.warm_up(config.sparsity_warmup)
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    @jax.jit
    def train_step(params, rest, opt_state, x, step):
        def loss(params):
            model = nnx.merge(graph, params, rest, copy=True)  # counters of this trace
            value, metrics = model.loss(scale * x, warmup=warm_up(step))
            return value, (nnx.state(model, nnx.Not(nnx.Param)), metrics)

        (value, (rest, metrics)), slope = jax.value_and_grad(loss, has_aux=True)(params)
        updates, opt_state = tx.update(slope, opt_state, params)
        return optax.apply_updates(params, updates), rest, opt_state, {"loss": value} | metrics

    state = (params, rest, tx.init(params))
    plain = lambda s: jax.tree.map(lambda v: v, nnx.to_pure_dict(s))
    save = lambda s: {"params": plain(s[0]), "rest": plain(s[1]), "slots": jax.tree.leaves(s[2])}
    checkpoints = Checkpoints(workdir / "checkpoints", config.to_dict(), config.keep_checkpoints)
    restored = checkpoints.restore(jax.eval_shape(lambda: save(state)))
    first = 0
    if restored is not None:
        first, saved = restored
        nnx.replace_by_pure_dict(state[0], saved["params"])
        nnx.replace_by_pure_dict(state[1], saved["rest"])
        slots = jax.tree.unflatten(jax.tree.structure(state[2]), saved["slots"])
        state = (*state[:2], slots)
    mesh = jax.make_mesh(
        tuple(config.mesh), ("data", "features"), axis_types=(AxisType.Auto, AxisType.Auto)
    )
    state = jax.device_put(state, sae.shardings(state, mesh, config.d_sae))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    batch = lambda step: jax.device_put(stored.batch(step), rows)
    logs = Logs(workdir, first_step=first, steps=config.steps, active=True)
    with StopSignal() as stop:
        for step in range(first + 1, config.steps + 1):
            params, rest, slots, numbers = train_step(*state, batch(step - 1), step)
            state = (params, rest, slots)
            every = config.resample_every
            if every and step % every == 0 and step < config.steps:
                state = _resample(graph, state, tx, scale * batch(step), config.seed + step)
            last, stopping = step == config.steps, stop.requested(step)
            if last or stopping or step % config.log_every == 0:
                found = {k: float(v) for k, v in numbers.items()}
                if not np.isfinite(found["loss"]):
                    raise Diverged(f"step {step}: the loss is not finite; lower learning_rate")
                logs.write(step, found)
                logs.progress(step, f"loss {found['loss']:.4f}, L0 {found['l0']:.1f}")
            if last or stopping or step % config.checkpoint_every == 0:
                checkpoints.save(step, save(state), wait=last or stopping)
            if stopping and not last:
                logs.say(f"stopped at step {step} and saved; the same command goes on from here")
                logs.close()
                checkpoints.close()
                sys.exit(0)
    logs.close()
    checkpoints.close()
    return nnx.merge(graph, *state[:2]).fold_scale(scale)


def _resample(graph, state, tx, x, seed):
    model = nnx.merge(graph, *state[:2])
    model, slots = sae.resample(model, state[2], tx, x, key=jax.random.key(seed))
    _, params, rest = nnx.split(model, nnx.Param, ...)
    return params, rest, slots


def evaluate(config: Any, model: sae.SAE, data: Data) -> dict[str, float]:
    """The measures of a model of unscaled rows."""
    rows = jnp.asarray(data.held_out)
    found = sae.evaluate(model, [rows[i : i + 1024] for i in range(0, len(rows), 1024)]).scalars()
    if data.atoms is not None:
        cosines = sae.max_cosines(jnp.asarray(data.atoms), model.W_dec[...])
        found |= {"recovery": float(cosines.mean()), "recovered": float(np.mean(cosines > 0.9))}
    if data.recovery is not None:
        loss = data.recovery(model)
        found |= {"loss_recovered": loss.fraction} | {
            f"loss_{k}": v for k, v in dataclasses.asdict(loss).items()
        }
    return found


def report(
    config: Any, model: sae.SAE, data: Data, measures: dict[str, float], workdir: pathlib.Path
) -> None:
    """report.md with its figure, result.json, the model's files, and the page of features."""
    from matplotlib.figure import Figure

    lines = read(workdir / "metrics.jsonl")
    density = sae.evaluate(model, [jnp.asarray(data.held_out)]).density
    figure = Figure(figsize=(9, 3), layout="tight")
    left, middle, right = figure.subplots(1, 3)
    steps = [line["step"] for line in lines]
    left.plot(steps, [line["mse"] for line in lines])
    left.set(xlabel="step", ylabel="squared error, scaled inputs", yscale="log")
    middle.plot(steps, [line["l0"] for line in lines])
    middle.set(xlabel="step", ylabel="active latents per token")
    right.hist(np.log10(density[density > 0]), bins=30)
    right.set(xlabel="log10 of the fraction of tokens", ylabel="latents")
    figure.savefig(workdir / "report.png", dpi=120)
    table = "\n".join(f"| {k} | {v:.4g} |" for k, v in measures.items())
    (workdir / "report.md").write_text(
        f"# {config.family} on {config.data}\n\n| measure | value |\n| :--- | ---: |\n{table}\n\n"
        "![Error and L0 over training, densities of latents](report.png)\n"
    )
    row = {"config": json.loads(config.to_json_best_effort()), "measures": measures}
    (workdir / "result.json").write_text(json.dumps(row, indent=1) + "\n")
    if type(model) in (sae.ReLU, sae.TopK, sae.JumpReLU, sae.Gated):
        sae.saelens.save(model, workdir / "model")
    if data.network is not None and data.decode is not None:
        order = np.argsort(-density)
        alive = order[: int((density > 0).sum())]
        latents = [int(i) for i in alive[:: max(len(alive) // 20, 1)][:20]]
        found = sae.top_examples(
            model, data.network, config.site, data.tokens, latents, skip_first=1
        )
        page = sae.dashboard(*found, latents, data.decode, title=f"{config.family}, {config.site}")
        (workdir / "features.html").write_text(page)


def main(argv: list[str]) -> None:
    """The command, with its flags parsed."""
    given: Any = flags.FLAGS
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    absl_logging.set_verbosity(absl_logging.WARNING)
    try:
        measures = train(given.config, given.workdir)
    except (ValueError, Diverged, CheckpointError) as error:
        sys.exit(f"error: {error}")
    print(json.dumps(measures, indent=1))
    print(f"report: {pathlib.Path(given.workdir) / 'report.md'}")


if __name__ == "__main__":
    config_flags.DEFINE_config_file(
        "config",
        str(pathlib.Path(__file__).parent / "configs" / "sae_planted.py"),
        "the experiment",
    )
    flags.DEFINE_string("workdir", "runs/sae", "where checkpoints, metrics and the report go")
    app.run(main)
