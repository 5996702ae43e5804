"""EauDeQN: a deep Q-network that finds out by itself how sparse it can be.

  python -m experiments.applications.eau_de_qn

K online networks regress on the targets of one target network, on the same batches. At every target update
the one with the smallest loss becomes the target. One online network is then its exact copy;
the others are copies pruned further, each to a sparsity drawn above its own. So sparsity rises as fast as
learning allows, and stops when pruned copies learn worse. (Vincent et al., Eau de Q-network: adaptive
distillation of neural networks in deep reinforcement learning, 2025.)

The environment is a walk through four rooms in plain JAX: 13 x 13 cells, four moves that slip in one of ten
steps, a reward of 1 at the goal, discount 0.97. The increase of a new sparsity is drawn from a cubic
schedule, s + (1 - s)(1 - (1 - speed)^3) u with u uniform in [0, 1]: our choice, the paper's abstract does
not fix one. So are two more: magnitudes are ranked over the whole network, and only the last fifth of the
steps between two target updates counts for the loss. Here these are 100, there thousands: a copy that has
just been pruned must have the time to settle, or it never wins.
"""

import argparse
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from experiments.report.page import markdown_table
from jaxsparse import masking
from jaxsparse.allocations import Global
from jaxsparse.choose import choose
from jaxsparse.leaves import SparseLeaves, find

SIDE, ACTIONS, DISCOUNT, SLIP, HORIZON = 13, 4, 0.97, 0.1, 80
GOAL = (10, 10)
MOVES = jnp.array([(-1, 0), (1, 0), (0, -1), (0, 1)])


def walls() -> np.ndarray:
    """True where one cannot go, `[SIDE, SIDE]`: the border, and two walls with two doors each."""
    w = np.zeros((SIDE, SIDE), bool)
    w[[0, -1]] = w[:, [0, -1]] = w[6] = w[:, 6] = True
    for door in ((6, 3), (6, 9), (2, 6), (9, 6)):
        w[door] = False
    return w


WALLS = jnp.asarray(walls())


def observe(cell: Array) -> Array:
    """One-hot row and column, `[2 SIDE]`."""
    return jnp.concatenate([jax.nn.one_hot(cell[0], SIDE), jax.nn.one_hot(cell[1], SIDE)])


def start(key: Array) -> Array:
    """A free cell, int32 `[2]`."""
    free = ~WALLS.ravel()
    cell = jax.random.categorical(key, jnp.where(free, 0.0, -jnp.inf))
    return jnp.stack([cell // SIDE, cell % SIDE])


def move(key: Array, cell: Array, action: Array) -> tuple[Array, Array, Array]:
    """The next cell, the reward, and whether the goal is reached."""
    slip, other = jax.random.split(key)
    random = jax.random.randint(other, (), 0, ACTIONS)
    action = jnp.where(jax.random.uniform(slip) < SLIP, random, action)
    there = cell + MOVES[action]
    there = jnp.where(WALLS[there[0], there[1]], cell, there)
    done = jnp.all(there == jnp.array(GOAL))
    return there, done.astype(jnp.float32), done


def init_network(key: Array, hidden: int):
    """Two hidden layers."""
    sizes = [2 * SIDE, hidden, hidden, ACTIONS]
    init = jax.nn.initializers.he_normal()
    return {
        str(i): {"kernel": init(jax.random.fold_in(key, i), (n, m)), "bias": jnp.zeros(m)}
        for i, (n, m) in enumerate(zip(sizes, sizes[1:]))
    }


def q_values(params, x: Array) -> Array:
    """`[..., 2 SIDE]` to `[..., ACTIONS]`."""
    for i in range(3):
        x = x @ params[str(i)]["kernel"] + params[str(i)]["bias"]
        x = jax.nn.relu(x) if i < 2 else x
    return x


class Population(NamedTuple):
    """The target, and K online networks with leading axes K."""

    target: Any
    params: Any
    masks: list[Array]
    opt: Any
    sparsity: Array
    loss: Array


def next_sparsities(key: Array, sparsity: Array, count: int, speed: Any) -> Array:
    """Those of the networks that follow a winner: the first its own, the others drawn above it."""
    u = jax.random.uniform(key, (count,)).at[0].set(0.0)
    return sparsity + (1 - sparsity) * (1 - (1 - speed) ** 3) * u


def select(key: Array, population: Population, plan: SparseLeaves, speed: Any) -> Population:
    """The target update: the winner becomes the target, and parent of all online networks. Its
    optimizer state goes with it; masks of its children lie within its own."""
    winner = jnp.argmin(population.loss)
    pick = lambda tree: jax.tree.map(lambda x: x[winner], tree)
    params, masks, opt = pick(population.params), pick(population.masks), pick(population.opt)
    count = population.loss.shape[0]
    sparsity = next_sparsities(key, population.sparsity[winner], count, speed)

    def child(s):
        ranked = [jnp.abs(w) for w in plan.take(params)]
        pruned = choose(plan.leaves, ranked, Global(), s, where=masks)
        return masking.apply(params, plan.scatter(pruned)), pruned

    children, child_masks = jax.vmap(child)(sparsity)
    copies = jax.tree.map(lambda x: jnp.broadcast_to(x, (count, *x.shape)), opt)
    return Population(params, children, child_masks, copies, sparsity, jnp.zeros(count))


def train(
    *,
    networks: int = 5,
    steps: int = 12_000,
    hidden: int = 64,
    target_every: int = 100,
    speed: float = 0.02,
    environments: int = 16,
    batch: int = 64,
    buffer: int = 8192,
    learning_rate: float = 1e-3,
    prune_until: float = 0.8,
    settle: float = 0.8,
    seed: int = 0,
) -> tuple[Population, Array]:
    """Returns the population at the end and the sparsity of the target at every target update.

    `networks=1` is a deep Q-network: its only online network is a copy of the target.
    """
    key = jax.random.key(seed)
    keys = jax.random.split(key, networks + 2)
    # All begin dense and equal, as copies of the target.
    target = init_network(keys[-1], hidden)
    plan = find(target)
    tx = optax.adam(learning_rate)
    repeat = lambda tree: jax.tree.map(lambda x: jnp.broadcast_to(x, (networks, *x.shape)), tree)
    masks = [jnp.ones((networks, *leaf.shape), bool) for leaf in plan.leaves]
    population = Population(
        target,
        repeat(target),
        masks,
        repeat(tx.init(target)),
        jnp.zeros(networks),
        jnp.zeros(networks),
    )
    cells = jax.vmap(start)(jax.random.split(keys[-2], environments))
    memory = {
        "x": jnp.zeros((buffer, 2 * SIDE)),
        "next": jnp.zeros((buffer, 2 * SIDE)),
        "action": jnp.zeros(buffer, jnp.int32),
        "reward": jnp.zeros(buffer),
        "done": jnp.zeros(buffer),
    }

    def loss_fn(params, goal, x, action):
        q = jnp.take_along_axis(q_values(params, x), action[:, None], 1)[:, 0]
        return jnp.mean(optax.huber_loss(q, goal))

    def learn(params, masks, opt, goal, x, action):
        loss, grads = jax.value_and_grad(loss_fn)(params, goal, x, action)
        trees = plan.scatter(masks)
        updates, opt = tx.update(masking.apply(grads, trees), opt, params)
        return masking.apply(optax.apply_updates(params, updates), trees), opt, loss

    def step(carry, i):
        population, cells, age, memory = carry
        k = jax.random.split(jax.random.fold_in(key, i), 7)
        # One of the online networks acts, with a decaying share of random moves.
        actor = jax.random.randint(k[0], (), 0, networks)
        acting = jax.tree.map(lambda x: x[actor], population.params)
        x = jax.vmap(observe)(cells)
        epsilon = jnp.maximum(0.1, 1 - i / (0.3 * steps))
        random = jax.random.randint(k[1], (environments,), 0, ACTIONS)
        explore = jax.random.uniform(k[2], (environments,)) < epsilon
        action = jnp.where(explore, random, jnp.argmax(q_values(acting, x), -1))
        there, reward, done = jax.vmap(move)(jax.random.split(k[3], environments), cells, action)
        at = (i * environments + jnp.arange(environments)) % buffer
        new = {
            "x": x,
            "next": jax.vmap(observe)(there),
            "action": action,
            "reward": reward,
            "done": done,
        }
        memory = {
            name: memory[name].at[at].set(new[name].astype(memory[name].dtype)) for name in memory
        }
        age = age + 1
        over = done | (age >= HORIZON)
        fresh = jax.vmap(start)(jax.random.split(k[4], environments))
        cells, age = jnp.where(over[:, None], fresh, there), jnp.where(over, 0, age)

        # All online networks on one batch: only so are their losses comparable.
        rows = jax.random.randint(k[5], (batch,), 0, jnp.minimum((i + 1) * environments, buffer))
        b = {name: value[rows] for name, value in memory.items()}
        best = jnp.max(q_values(population.target, b["next"]), -1)
        goal = b["reward"] + DISCOUNT * (1 - b["done"]) * best
        params, opt, loss = jax.vmap(learn, (0, 0, 0, None, None, None))(
            population.params, population.masks, population.opt, goal, b["x"], b["action"]
        )
        counts = i % target_every >= settle * target_every
        total = population.loss + jnp.where(counts, loss, 0.0)
        population = population._replace(params=params, opt=opt, loss=total)
        pace = jnp.where(i < prune_until * steps, speed, 0.0)
        population = jax.lax.cond(
            (i + 1) % target_every == 0,
            lambda p: select(k[6], p, plan, pace),
            lambda p: p,
            population,
        )
        zeros = sum(jnp.sum(w == 0) for w in plan.take(population.target))
        return (population, cells, age, memory), zeros / sum(x.size for x in plan.leaves)

    carry = (population, cells, jnp.zeros(environments, jnp.int32), memory)
    run = jax.jit(lambda carry: jax.lax.scan(step, carry, jnp.arange(steps)))
    (population, *_), sparsity = run(carry)
    return population, sparsity[target_every - 1 :: target_every]


def evaluate(params, episodes: int = 256, seed: int = 1) -> float:
    """The mean discounted return of the greedy policy from random cells."""

    def episode(key):
        first, key = jax.random.split(key)

        def step(carry, t):
            cell, alive = carry
            action = jnp.argmax(q_values(params, observe(cell)))
            cell, reward, done = move(jax.random.fold_in(key, t), cell, action)
            return (cell, alive & ~done), DISCOUNT**t * reward * alive

        return jnp.sum(jax.lax.scan(step, (start(first), True), jnp.arange(HORIZON))[1])

    return float(
        jnp.mean(jax.jit(jax.vmap(episode))(jax.random.split(jax.random.key(seed), episodes)))
    )


def main(argv: list[str] | None = None) -> list[list[Any]]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=12_000)
    parser.add_argument("--networks", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=2)
    args = parser.parse_args(argv)
    rows = []
    for name, count in (("DQN", 1), (f"EauDeQN, {args.networks} networks", args.networks)):
        found = []
        for seed in range(args.seeds):
            population, sparsity = train(networks=count, steps=args.steps, seed=seed)
            found.append((evaluate(population.target), float(sparsity[-1])))
        returns, sparsities = np.array(found).T
        listed = lambda xs, form: ", ".join(form.format(x) for x in xs)
        rows.append([name, listed(returns, "{:.3f}"), listed(sparsities, "{:.1%}")])
    untrained = evaluate(init_network(jax.random.key(0), 64))
    rows.append(["untrained", f"{untrained:.3f}", "0.0%"])
    print(f"Discounted return of the greedy policy, {args.steps} steps, by seed:\n")
    print(markdown_table(["method", "return", "sparsity of the target"], rows))
    return rows


if __name__ == "__main__":
    main()
