"""Block predictors and cache policies side by side, on the attention of SmolLM2 over prose.

    python -m experiments.studies.compare_attention --workdir=runs/compare_attention --out=docs/results
    python -m experiments.studies.compare_attention --workdir=runs/compare_attention --out=docs/results --policies= \
        --length=8192 --shortest=2048 --predictors=oracle,streaming,minference,moba,seer --budgets= --calibration=4096
    python -m experiments.studies.compare_attention --workdir=runs/compare_attention --out=docs/results --policies= \
        --length=8192 --prompt=7168 --budgets=0.1,0.05 --no-perplexity --calibration=4096

Every predictor chooses blocks of 32 by 32 at several budgets: recall and relative error against dense attention, on
the dense model's own queries and keys of every third layer; its cost in operations; and the perplexity of the whole model
when every layer attends through its choice. Every cache policy keeps a prompt within several budgets: the perplexity of
what follows it. What is trained or searched (SeerAttention's gates, DSV's projections, MInference's patterns) is so on the
calibration half of the text. Writes `results.json` after every run (a run that is there already is not made again), and
`attention_tables.md` with plots into `--out`.

With `--shortest=n` it also asks what Nawrot et al., The Sparse Frontier, 2025, ask: at equal cost of attention, is a longer
and sparser context better, or a shorter and denser one? The last n / 2 tokens of the text are predicted from its last n
tokens densely, from 2 n at a quarter, 4 n at a sixteenth, up to the whole text; and densely from all of these, at more cost.
"""

from __future__ import annotations

import argparse
import functools
import json
import pathlib
import time
from collections.abc import Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array

from experiments.benchmarks.timing import machine
from experiments.models import smollm2
from jaxsparse import attention
from jaxsparse.attention import Layout, State, measure
from pallas_kernels import block_sparse_attention

BLOCK = 32
LAYOUT = Layout(BLOCK, BLOCK)
BUDGETS = (0.1, 0.2, 0.4)
PREDICTORS = ("oracle", "streaming", "minference", "flexprefill", "moba", "sparge", "nsa", "mra", "seer", "dsv", "adaspa")  # fmt: skip
POLICIES = ("streaming_llm", "h2o", "snapkv", "ada_snapkv", "dynamickv", "zipvl")
ALPHAS = (
    (0.0, 0.1, 0.2, 0.4, 1.0),
    (0.0, 0.3, 0.6, 0.9, 1.0),
)  # FlexPrefill has no budget but a mass
RANK = 16
Params = dict[str, Any]


def make(
    name: str, budget: float, length: int, params: Params, layout: Layout = LAYOUT
) -> attention.Predictor:
    """A predictor of about a density of the causal area."""
    block = layout.block_kv
    if name == "dense":
        return attention.dense(layout=layout)
    if name == "streaming":
        width = int((1 - (1 - budget) ** 0.5) * length) // block * block
        return attention.streaming(sinks=4, window=max(block, width - block), layout=layout)
    if name == "flexprefill":
        alpha = float(np.interp(budget, *ALPHAS))
        return attention.flexprefill(
            alpha=alpha, minimum=block, sample=64, unit=block, layout=layout
        )
    if name == "minference":
        heads = params["patterns"][str(budget)] if params else None
        return attention.minference(density=budget, heads=heads, layout=layout)
    return getattr(attention, name)(density=budget, layout=layout)


def state_of(name: str, params: Params, x: Array, q: Array, k: Array) -> State:
    """What the layer would give the predictor."""
    found = {"seer": params.get("gate"), "dsv": params.get("low_rank")}.get(name)
    module = None if found is None else nnx.merge(*found)
    return State(params=module, q=q, k=k, x=x)


# ------------------------------------------------------------------ the model, layer by layer


class Heads(NamedTuple):
    """What attention sees of a layer: x is its input, q and k are rotated, raw are not."""

    x: Array
    q: Array
    k: Array
    v: Array
    raw_q: Array
    raw_k: Array


def heads_of(layer: smollm2.Block, x_BTD: Array, position: Any = None) -> Heads:
    a = layer.attention
    x = layer.norm1(x_BTD)
    split = lambda y: y.reshape(*y.shape[:2], -1, a.size)
    turn = functools.partial(smollm2.rotate, base=a.config.rope_base, kind=a.config.rope)
    q, k, v = split(a.query(x)), split(a.key(x)), split(a.value(x))
    swap = lambda y: jnp.swapaxes(y, 1, 2)
    return Heads(x, swap(turn(q)), swap(turn(k)), swap(v), swap(q), swap(k))


def finish(layer: smollm2.Block, x_BTD: Array, out_BHTK: Array) -> Array:
    """The rest of a layer after attention."""
    y = jnp.swapaxes(out_BHTK, 1, 2).reshape(*x_BTD.shape[:2], -1)
    x_BTD = x_BTD + layer.attention.out(y)
    return x_BTD + layer.down(layer.hidden(layer.norm2(x_BTD)))


def dense(h: Heads) -> Array:
    """Block by block: of long texts nothing of tokens by tokens is made."""
    return attention.attend(h.q, h.k, h.v, attention.dense(layout=Layout(256, 256)))


class Model:
    """A model cut into its layers, which share one graph: functions of a layer compile once."""

    def __init__(self, model: smollm2.SmolLM2) -> None:
        self.model = model
        parts = [nnx.split(layer) for layer in self.model.layers]
        self.graph, self.states = parts[0][0], [state for _, state in parts]

    def embed(self, tokens: Array) -> Array:
        return self.model.embed(tokens)

    def logits(self, x: Array) -> Array:
        """What the model says after all of its layers."""
        return self.model.embed.attend(self.model.norm(x))

    @functools.cached_property
    def _loss(self) -> Any:
        @jax.jit
        def loss(state: Any, x: Array, tokens: Array) -> Array:
            norm, embed = nnx.merge(graph, state)
            p = jax.nn.log_softmax(embed.attend(norm(x[:, :-1])))
            return -jnp.take_along_axis(p, tokens[:, 1:, None], axis=-1)[..., 0]

        graph, state = nnx.split((self.model.norm, self.model.embed))
        return functools.partial(loss, state)

    def nats(self, x: Array, tokens: Array, after: int = 0) -> float:
        """Mean negative log-likelihood of the tokens after a place, of which so many have their logits at a time."""
        starts = range(after, tokens.shape[1] - 1, 1023)
        parts = [self._loss(x[:, i : i + 1024], tokens[:, i : i + 1024]) for i in starts]
        return float(jnp.mean(jnp.concatenate(parts, 1)))

    def perplexity(self, x: Array, tokens: Array, last: int | None = None) -> float:
        """Of all tokens but the first, or of the last so many."""
        after = 0 if last is None else tokens.shape[1] - last - 1
        return float(np.exp(self.nats(x, tokens, after)))


@functools.partial(jax.jit, static_argnums=0)
def dense_layer(graph: Any, state: Any, x: Array) -> Array:
    layer = nnx.merge(graph, state)
    return finish(layer, x, dense(heads_of(layer, x)))


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def sparse_layer(
    graph: Any, name: str, budget: float, layout: Layout, state: Any, params: Params, x: Array
) -> tuple[Array, Array]:
    """A layer that attends through a choice, and the density of what it read."""
    layer = nnx.merge(graph, state)
    h = heads_of(layer, x)
    choose = make(name, budget, x.shape[1], params, layout)
    mask = choose(h.q, h.k, h.v, state_of(name, params, h.x, h.raw_q, h.raw_k))
    y = finish(layer, x, block_sparse_attention(h.q, h.k, h.v, mask))
    return y, measure.density(mask).mean()


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def measure_layer(
    graph: Any, name: str, budget: float, state: Any, params: Params, x: Array
) -> tuple[Array, Array, Array]:
    """Recall, relative error and density, the mean over heads."""
    h = heads_of(nnx.merge(graph, state), x)
    choose = make(name, budget, x.shape[1], params)
    mask = choose(h.q, h.k, h.v, state_of(name, params, h.x, h.raw_q, h.raw_k))
    out, lse = block_sparse_attention(h.q, h.k, h.v, mask, return_lse=True)
    r = measure.recall(h.q, h.k, lse, samples=256)
    return r.mean(), measure.relative_error(out, dense(h)).mean(), measure.density(mask).mean()


# ------------------------------------------------------------------ what is trained or searched


@functools.partial(jax.jit, static_argnums=(0, 2, 3, 4))
def train(graph: Any, state: Any, kind: str, steps: int, layout: Layout, h: Heads) -> Any:
    """A gate or projections of one layer, on its own attention to a calibration text."""
    tx = optax.adam(optax.cosine_decay_schedule(3e-3, steps))
    target = attention.seer_target(h.q, h.k, layout)

    def loss(state: Any) -> Array:
        module = nnx.merge(graph, state)
        if kind == "gate":
            return attention.seer_loss(module(h.raw_q, h.raw_k), target)
        return attention.dsv_loss(module, h.x, h.q, h.k, rows=128, causal=True)

    def step(carry: Any, _: None) -> Any:
        state, slots = carry
        value, grads = jax.value_and_grad(loss)(state)
        updates, slots = tx.update(grads, slots)
        return (optax.apply_updates(state, updates), slots), value

    (state, _), values = jax.lax.scan(step, (state, tx.init(state)), None, steps)
    return state, values[-1]


NEEDS = {"seer": "gate", "dsv": "low_rank", "minference": "patterns"}


def prepare(
    model: Model,
    tokens: Array,
    budgets: tuple[float, ...],
    steps: int,
    layout: Layout = LAYOUT,
    names: Collection[str] = tuple(NEEDS),
) -> list[Params]:
    """Per layer, what these predictors need: a trained gate, trained projections, the best pattern of each head at each
    budget."""
    needed = {NEEDS[name] for name in names if name in NEEDS}
    if not needed:
        return [{} for _ in model.states]
    x, found = model.embed(tokens), []
    look = jax.jit(lambda state, x: heads_of(nnx.merge(model.graph, state), x))
    search = {
        b: jax.jit(lambda h, b=b: attention.search_patterns(
            h.q[:1], h.k[:1], attention.candidates(b, tokens.shape[1], layout.block_kv), layout)[0])
        for b in budgets
    }  # fmt: skip
    for i, state in enumerate(model.states):
        h, params = look(state, x), {}
        if "patterns" in needed:
            params["patterns"] = {str(b): search[b](h) for b in budgets}
        gate = attention.SeerGate(h.q.shape[1], h.k.shape[1], h.q.shape[3], layout=layout,
                                  rope_base=model.model.config.rope_base, rngs=nnx.Rngs(i))  # fmt: skip
        low = attention.LowRank(x.shape[-1], h.k.shape[1], RANK, rngs=nnx.Rngs(i))
        for name, module in (("gate", gate), ("low_rank", low)):
            if name in needed:
                graph, start = nnx.split(module)
                params[name] = (graph, train(graph, start, name, steps, layout, h)[0])
        found.append(params)
        x = dense_layer(model.graph, state, x)
    return found


def only(name: str, params: Params) -> Params:
    """What one predictor needs, so that it is not traced for the others. A graph is static."""
    part = NEEDS.get(name)
    return {} if part is None else {part: params[part]}


# ------------------------------------------------------------------ runs


def run_predictor(
    model: Model, name: str, budget: float, tokens: Array, trained: list[Params], inputs: dict[int, Array],
    perplexity: bool, last: int,
) -> dict[str, Any]:  # fmt: skip
    """Recall, error and density in some layers, and the perplexity of the whole text and of its last tokens."""
    start, rows = time.perf_counter(), []
    for i, x in inputs.items():
        params = only(name, trained[i])
        found = measure_layer(model.graph, name, budget, model.states[i], params, x)
        rows.append([float(v) for v in found])
    recall, error, density = np.mean(rows, 0)
    config = model.model.config
    length = tokens.shape[1]
    sizes = attention.Sizes(
        length, length, config.heads, config.groups, config.width // config.heads
    )
    cost = make(name, budget, length, trained[0]).cost(sizes) / attention.dense_cost(sizes)
    row = dict(name=name, budget=budget, length=length, recall=float(recall), error=float(error),
               density=float(density), cost=cost, by_layer=[r[0] for r in rows])  # fmt: skip
    if perplexity:
        x, _ = read(model, name, budget, tokens, trained)
        row["perplexity"] = model.perplexity(x, tokens)
        row |= dict(last=last, tail=model.perplexity(x, tokens, last))
    return row | dict(seconds=time.perf_counter() - start)


def read(
    model: Model, name: str, budget: float, tokens: Array, trained: list[Params], layout: Layout = LAYOUT
) -> tuple[Array, float]:  # fmt: skip
    """What the model makes of tokens when all of its layers attend through a choice, and the density that they read."""
    x, densities = model.embed(tokens), []
    for state, params in zip(model.states, trained):
        layer = functools.partial(sparse_layer, model.graph, name, budget, layout, state)
        x, density = layer(only(name, params), x)
        densities.append(float(density))
    return x, float(np.mean(densities))


def run_context(
    model: Model, name: str, budget: float, tokens: Array, trained: list[Params], context: int, last: int
) -> dict[str, Any]:  # fmt: skip
    """The perplexity of the last tokens of a text of which only the end is read."""
    start, end = time.perf_counter(), tokens[:, tokens.shape[1] - context :]
    x, density = read(model, name, budget, end, trained)
    return dict(name=name, budget=budget, length=tokens.shape[1], context=context, last=last, density=density,
                tail=model.perplexity(x, end, last), seconds=time.perf_counter() - start)  # fmt: skip


def equal_cost(length: int, shortest: int) -> list[tuple[int, float]]:
    """Contexts of a text and densities at which attention reads as many pairs as dense attention over the shortest.

    >>> equal_cost(2048, 512)
    [(512, 1.0), (1024, 0.25), (2048, 0.0625)]
    """
    contexts = [shortest * 2**i for i in range((length // shortest).bit_length())]
    return [(n, (shortest / n) ** 2) for n in contexts]


def policy_of(name: str, budget: int) -> attention.Policy:
    if name == "keep_all":
        return attention.keep_all(budget)
    if name == "streaming_llm":
        return attention.streaming_llm(budget)
    if name == "h2o":
        return attention.h2o(budget // 2, budget // 2)
    if name in ("snapkv", "ada_snapkv"):
        return getattr(attention, name)(budget, window=32, kernel=7, sinks=4)
    if name == "dynamickv":
        return attention.dynamickv(budget, window=16, r_max=3.0)
    return attention.zipvl(budget, tau=0.99, probes=128, recent=32)


@functools.partial(jax.jit, static_argnums=(0, 4))
def cached_layer(graph: Any, state: Any, x: Array, cache: attention.Cache, prompt: bool) -> Any:
    layer = nnx.merge(graph, state)
    a, h = layer.attention, heads_of(layer, x)
    turn = functools.partial(rotate_pairs, base=a.config.rope_base)
    call = cache.prefill if prompt else cache.decode
    out, cache = call(h.raw_q, h.raw_k, h.v, position=turn)
    return finish(layer, x, out), cache


def rotate_pairs(x: Array, positions: Array, base: float) -> Array:
    """SmolLM2's rotary positions, of neighbouring entries, at given positions."""
    half = x.shape[-1] // 2
    angle = positions[..., None] * base ** (-jnp.arange(half) / half)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    a, b = x[..., ::2], x[..., 1::2]
    return jnp.stack([a * cos - b * sin, a * sin + b * cos], -1).reshape(x.shape)


def run_policy(
    model: Model, name: str, budget: int, tokens: Array, prompt: int, step: int
) -> dict[str, Any]:
    """Perplexity of what follows a prompt whose cache a policy keeps within a budget; the continuation comes in calls of
    a few tokens, all of which see each other."""
    start, config = time.perf_counter(), model.model.config
    total = tokens.shape[1]
    policy = policy_of(name, budget)
    room = policy.budget if policy.evicts == "step" else policy.budget + total - prompt
    room = room * 2 if name == "ada_snapkv" else room
    caches = [
        attention.Cache.create(policy=policy, batch=tokens.shape[0], kv_heads=config.groups,
                               head_dim=config.width // config.heads, capacity=room)
        for _ in model.states
    ]  # fmt: skip
    first = policy.budget // 2 if policy.first else prompt
    calls = [*range(0, prompt, first), *range(prompt, total, step), total]
    outputs = []
    for begin, end in zip(calls[:-1], calls[1:]):
        x = model.embed(tokens[:, begin:end])
        for i, state in enumerate(model.states):
            x, caches[i] = cached_layer(model.graph, state, x, caches[i], begin < prompt)
        if end == prompt and name == "dynamickv":
            caches = attention.rebalance(caches)
        outputs.append(x)
    x = jnp.concatenate(outputs, 1)
    entries = float(np.mean([float(c.counts.mean()) for c in caches]))
    left = sum(int(c.overflow.sum()) for c in caches)
    return dict(name=name, budget=budget, prompt=prompt, length=total, entries=entries, overflow=left,
                perplexity=model.perplexity(x, tokens, total - prompt),
                seconds=time.perf_counter() - start)  # fmt: skip


# ------------------------------------------------------------------ the page


def table(rows: list[dict[str, Any]], value: str, form: str = "{:.3f}", by: str = "budget") -> str:
    """One value of every name over budgets, or over titles of columns, in Markdown."""
    columns = list(dict.fromkeys(row[by] for row in rows))
    if by == "budget":
        columns = sorted(columns)
    cells = {(row["name"], row[by]): row for row in rows}
    lines = [
        "| | " + " | ".join(f"{c:g}" if by == "budget" else c for c in columns) + " |",
        "| :--- |" + " ---: |" * len(columns),
    ]
    for name in dict.fromkeys(row["name"] for row in rows):
        found = [cells.get((name, c), {}) for c in columns]
        text = [form.format(row[value]) if value in row else "" for row in found]
        lines.append(f"| {name} | " + " | ".join(text) + " |")
    return "\n".join(lines)


def write(out: pathlib.Path, results: dict[str, Any]) -> None:
    """The tables and plots."""
    from jaxsparse.analysis import plots

    tables = out / "attention_tables.md"
    parts = []
    for length in sorted({row["length"] for row in results["predictors"]}):
        rows = [row for row in results["predictors"] if row["length"] == length]
        parts.append(f"## {length} tokens\n")
        for value, form, title in (
            ("recall", "{:.3f}", "Recall, by budget"),
            ("error", "{:.3f}", "Relative error"),
            ("density", "{:.3f}", "Density that was read"),
            ("perplexity", "{:.2f}", "Perplexity, all layers through the choice"),
        ):
            some = [row for row in rows if value in row]
            if some:
                parts.append(f"{title}:\n\n{table(some, value, form)}\n")
        by_name: dict[str, list[dict[str, Any]]] = {}
        for row in rows:
            by_name.setdefault(row["name"], []).append(row)
        curves = {
            name: ([r["density"] for r in some], [r["recall"] for r in some])
            for name, some in by_name.items()
        }
        figure = plots.curves(
            curves,
            title=f"Recall, {length} tokens",
            xlabel="density that was read",
            ylabel="recall",
        )
        figure.savefig(out / f"attention_recall_{length}.png", dpi=150, bbox_inches="tight")
        costs = ", ".join(f"{name} {some[0]['cost']:.3f}" for name, some in by_name.items())
        parts.append(f"Cost of the choice over dense causal attention, in operations: {costs}.\n")
    if results["policies"]:
        parts.append("## Cache policies\n")
        parts.append("Perplexity of the continuation, by entries per head:\n")
        parts.append(table(results["policies"], "perplexity", "{:.2f}") + "\n")
        parts.append(
            "Entries per head at the end, the continuation included where nothing is evicted while decoding:\n"
        )
        parts.append(table(results["policies"], "entries", "{:.0f}") + "\n")
    for length in sorted({row["length"] for row in results["contexts"]}):
        rows = [
            row | dict(column=f"last {row['context']} at {row['budget']:g}")
            for row in sorted(results["contexts"], key=lambda row: (row["context"], row["budget"]))
            if row["length"] == length
        ]
        parts.append(f"## Equal cost, a text of {length} tokens\n")
        for value, form, title in (
            ("tail", "{:.2f}", f"Perplexity of the last {rows[0]['last']} tokens"),
            ("density", "{:.3f}", "Density that was read"),
        ):
            parts.append(f"{title}:\n\n{table(rows, value, form, 'column')}\n")
    dense_line = " ".join(
        f"Dense, {length} tokens: perplexity {row['whole']:.2f}; of the last {row['after']} tokens {row['tail']:.2f}."
        for length, row in results["dense"].items()
    )
    tables.write_text(
        "# Attention, the tables\n\n"
        + dense_line
        + f" Made on {results['machine']}.\n\n"
        + "\n".join(parts)
    )


def _find(rows: list[dict[str, Any]], name: str, budget: float, length: int,
          context: int | None = None) -> dict[str, Any] | None:  # fmt: skip
    """The row of a run, if it is there."""
    wanted = (name, budget, length, context)
    have = lambda r: (r["name"], r["budget"], r["length"], context and r["context"])
    return next((r for r in rows if have(r) == wanted), None)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--workdir", type=pathlib.Path, required=True)
    parser.add_argument("--out", type=pathlib.Path, help="folder for tables and plots")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--prompt", type=int, default=1536)
    parser.add_argument("--every", type=int, default=3, help="of so many layers one is measured")
    parser.add_argument("--steps", type=int, default=60, help="of training gates and projections")
    parser.add_argument("--calibration", type=int, help="tokens that they see; default: --length")
    parser.add_argument("--predictors", default=",".join(PREDICTORS))
    parser.add_argument("--policies", default=",".join(POLICIES))
    parser.add_argument("--budgets", default=",".join(map(str, BUDGETS)))
    parser.add_argument("--entries", default="128,256,512")
    parser.add_argument("--shortest", type=int, help="context that is read densely, at equal cost")
    parser.add_argument("--no-perplexity", action="store_true")
    options = parser.parse_args(arguments)
    options.workdir.mkdir(parents=True, exist_ok=True)
    path = options.workdir / "results.json"
    empty: dict[str, Any] = dict(dense={}, predictors=[], policies=[], contexts=[])
    results = json.loads(path.read_text()) if path.exists() else empty
    results["machine"] = machine()
    names = [n for n in options.predictors.split(",") if n]
    policies = [n for n in options.policies.split(",") if n]
    budgets = tuple(float(b) for b in options.budgets.split(",") if b)

    loaded, tokenizer = smollm2.load()
    model = Model(loaded)
    (tokens,) = smollm2.batches(tokenizer, "evaluation", 1, options.length)
    searched = options.calibration or options.length
    (calibration,) = smollm2.batches(tokenizer, "calibration", 1, searched)

    def save(kind: str, row: dict[str, Any]) -> None:
        results[kind].append(row)
        path.write_text(json.dumps(results, indent=1))
        print({k: v for k, v in row.items() if k != "by_layer"}, flush=True)

    for name in policies:
        for n in (int(e) for e in options.entries.split(",")):
            if not any((r["name"], r["budget"]) == (name, n) for r in results["policies"]):
                save("policies", run_policy(model, name, n, tokens, options.prompt, step=32))
    missing = [
        (name, budget)
        for budget in budgets
        for name in names
        if _find(results["predictors"], name, budget, options.length) is None
    ]
    points = [] if options.shortest is None else equal_cost(options.length, options.shortest)
    wanted = [("dense", 1.0, context) for context, _ in points]
    wanted += [(name, budget, context) for context, budget in points[1:] for name in names]
    unread = [
        (name, budget, context)
        for name, budget, context in wanted
        if _find(results["contexts"], name, budget, options.length, context) is None
    ]
    inputs: dict[int, Array] = {}
    if missing:
        x, after = model.embed(tokens), options.length - options.prompt
        for i, state in enumerate(model.states):
            if i % options.every == 0:
                inputs[i] = x
            x = dense_layer(model.graph, state, x)
        whole, tail = model.perplexity(x, tokens), model.perplexity(x, tokens, after)
        results["dense"][str(options.length)] = dict(whole=whole, tail=tail, after=after)
    needed = {n for n, *_ in missing + unread}
    asked = tuple(sorted({b for _, b, *_ in missing + unread if b < 1}))
    trained = prepare(model, calibration, asked, options.steps, names=needed)
    last = (options.shortest or options.length) // 2
    for name, budget in missing:
        save("predictors", run_predictor(model, name, budget, tokens, trained, inputs,
                                         not options.no_perplexity, last))  # fmt: skip
    for name, budget, context in unread:
        row = _find(results["predictors"], name, budget, context)
        if row is None or row.get("last") != last or row["length"] != options.length:
            row = run_context(model, name, budget, tokens, trained, context, last)
        save("contexts", row | dict(context=context))
    if options.out is not None:
        write(options.out, results)


if __name__ == "__main__":
    main()
