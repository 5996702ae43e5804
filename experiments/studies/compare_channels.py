"""Methods on whole channels at equal operations: accuracy of the shrunk network on digits.

  python -m experiments.studies.compare_channels

A small convolutional network trains on the digits of scikit-learn with each method, is shrunk by
`channels.shrink`, and the narrower network is what is tested. Beside it stands a dense network of the same
widths that trains from scratch for as many steps. Three seeds.
"""

import argparse
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax

import jaxsparse
from jaxsparse import channels

METHODS: dict[str, dict[str, Any]] = {
    "hspg": dict(strength=1e-3),
    "hesso": {},
    "ssl": dict(families={"units": 1e-3}),
    "wgsef": dict(strength=3e-5),
    "slimming": dict(strength=1e-3, allocation="uniform"),
    "mask_sparsity": dict(strength=2e-3, allocation="uniform"),
    "polarization": dict(strength=1e-3, allocation="uniform"),
    "depgraph": dict(strength=1e-3),
    "group_slimming": dict(strength=1e-3),
    "magnitude": {},
    "random_pruning": {},
}
WIDTHS = (16, 32)


def network(params: dict[str, Any], x: Array) -> Array:
    """Two convolutions with scales and shifts, a mean over space, a linear layer."""
    for name, stride in (("first", 1), ("second", 2)):
        layer = params[name]
        x = lax.conv_general_dilated(
            x, layer["kernel"], (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x = jax.nn.relu(x * layer["scale"] + layer["bias"])
    return x.mean((1, 2)) @ params["last"]["kernel"] + params["last"]["bias"]


def initial(seed: Array | int, widths: tuple[int, int] = WIDTHS) -> dict[str, Any]:
    """Parameters of a network of these widths."""
    keys, (a, b) = jax.random.split(jax.random.key(seed), 3), widths
    he = jax.nn.initializers.he_normal()
    layer = lambda key, shape: {
        "kernel": he(key, shape),
        "scale": jnp.ones(shape[-1]),
        "bias": jnp.zeros(shape[-1]),
    }
    return {
        "first": layer(keys[0], (3, 3, 1, a)),
        "second": layer(keys[1], (3, 3, a, b)),
        "last": {"kernel": he(keys[2], (b, 10)), "bias": jnp.zeros(10)},
    }


def digits() -> tuple[Array, Array, Array, Array]:
    """Training images and labels, test images and labels."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    images = jnp.asarray(np.asarray(pixels).reshape(-1, 8, 8, 1) / 8.0 - 1.0, jnp.float32)
    labels = jnp.asarray(labels)
    order = np.random.default_rng(0).permutation(len(labels))
    train, test = order[:1200], order[1200:]
    return images[train], labels[train], images[test], labels[test]


def trained(tx, steps: int, seeds: int, widths: tuple[int, int] = WIDTHS):
    """Parameters and states of all seeds, stacked."""
    x, y, _, _ = digits()

    def loss(params, at):
        logits = network(params, x[at])
        return optax.softmax_cross_entropy_with_integer_labels(logits, y[at]).mean()

    def run(seed):
        params = initial(seed, widths)

        def step(carry, key):
            params, state = carry
            at = jax.random.randint(key, (64,), 0, len(y))
            updates, state = tx.update(jax.grad(loss)(params, at), state, params)
            return (optax.apply_updates(params, updates), state), None

        keys = jax.random.split(jax.random.key(seed + 1000), steps)
        return lax.scan(step, (params, tx.init(params)), keys)[0]

    # One compilation, one seed after the other: under vmap the convolutions would be grouped, and slow on CPU.
    return jax.tree.map(lambda *xs: jnp.stack(xs), *map(jax.jit(run), jnp.arange(seeds)))


def accuracy(params) -> float:
    """Of a network on the test images, in per cent."""
    _, _, x, y = digits()
    return 100 * float((network(params, x).argmax(1) == y).mean())


def study(sparsity: float, steps: int, seeds: int) -> list[tuple[str, float, float, float]]:
    """Name, mean and deviation of the accuracy, operations kept."""
    schedule = optax.cosine_decay_schedule(3e-3, steps)
    example = jnp.zeros((1, 8, 8, 1))
    groups = channels.find(network, initial(0), example)
    rows = []

    def add(name: str, scores: list[float], operations: float) -> None:
        rows.append((name, float(np.mean(scores)), float(np.std(scores)), operations))
        print(
            f"{name}: {np.mean(scores):.1f} ± {np.std(scores):.1f} at {operations:.3f}", flush=True
        )

    dense, _ = trained(optax.adam(schedule), steps, seeds)
    one = lambda tree, i: jax.tree.map(lambda v: v[i], tree)
    add("dense, all channels", [accuracy(one(dense, i)) for i in range(seeds)], 1.0)
    counts = {n: w - int(np.floor(sparsity * w)) for n, w in groups.widths.items()}
    a, b = counts["first/kernel:3"], counts["second/kernel:3"]
    small, _ = trained(optax.adam(schedule), steps, seeds, (a, b))
    share = groups.flops(counts) / groups.flops()
    add(
        "dense of the small size, from scratch",
        [accuracy(one(small, i)) for i in range(seeds)],
        share,
    )
    for name, options in METHODS.items():
        given = options | {"total_steps": steps, "sparsity": sparsity}
        if "groups" in jaxsparse.METHODS[name].options:
            given["groups"] = groups
        else:
            given["structure"] = groups
        tx = jaxsparse.make(name, optax.adam(schedule), **given)
        params, states = trained(tx, steps, seeds)
        scores, kept = [], []
        for i in range(seeds):
            cut = channels.shrink(
                network, groups, one(states, i), params=one(params, i), exact=False
            )
            scores.append(accuracy(cut.params))
            kept.append(cut.report.flops[1] / cut.report.flops[0])
        add(name, scores, float(np.mean(kept)))
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--sparsity", type=float, default=0.75)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=pathlib.Path)
    options = parser.parse_args(argv)
    rows = study(options.sparsity, options.steps, options.seeds)
    lines = ["| method | accuracy | operations kept |", "|---|---|---|"]
    lines += [f"| {n} | {m:.1f} ± {d:.1f} | {100 * o:.1f} % |" for n, m, d, o in rows]
    print("\n".join(lines))
    if options.out:
        options.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
