"""The contracts of a method as checks that anyone can run on a method of their own.

    from jaxsparse.testing import Subject, check_all

    def build(inner, **options):
        return my_method(inner, **{"sparsity": 0.75, "seed": 0, **options})

    check_all(Subject(build, sweeps={"sparsity": (0.75, 0.5), "seed": (0, 1)}))

A `Subject` trains a tiny network (a matrix, a convolution, a bias, a scale) on a quadratic, and the
checks compare what happened with what a method promises. They raise `AssertionError` with a
sentence that says what broke. The test suite runs them over every name in `jaxsparse.METHODS`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxsparse.state import apply_masks, find_states, get_masks, get_raw_params
from jaxsparse.targets import named_leaves

# Tests compile much and run little: this halves the time of XLA on CPU.
_QUICK = {"xla_backend_optimization_level": 0}


def parameters(seed: int = 0, dtype: Any = jnp.float32) -> dict:
    """The parameters of a tiny network: two kernels, a bias, a scale.

    >>> {path: x.shape for path, x in named_leaves(parameters())}
    {'conv/kernel': (2, 2, 8, 8), 'dense/bias': (16,), 'dense/kernel': (8, 16), 'norm/scale': (8,)}
    """
    a, b = jax.random.split(jax.random.key(seed))
    tree = {
        "conv": {"kernel": jax.random.normal(a, (2, 2, 8, 8))},
        "dense": {"kernel": jax.random.normal(b, (8, 16)), "bias": jnp.zeros(16)},
        "norm": {"scale": jnp.ones(8)},
    }
    return jax.tree.map(lambda x: x.astype(dtype), tree)


def target(params, seed: int = 1):
    """Where the quadratic that the network is trained on has its minimum."""
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return treedef.unflatten(
        [jax.random.normal(k, x.shape).astype(x.dtype) for k, x in zip(keys, leaves)]
    )


def gradients(params, goal):
    """The gradient of half the squared distance to `goal`; NaN where `goal` is."""
    return jax.tree.map(lambda p, t: p - t, params, goal)


class Run(NamedTuple):
    """What a training run went through, as NumPy arrays: parameters, masks (None: the method has
    none) and states after each step."""

    params: list
    masks: list
    states: list

    def weights(self, step: int = -1) -> dict[str, np.ndarray]:
        """The leaves after a step, by path."""
        return by_path(self.params[step])

    def kept(self, step: int = -1) -> dict[str, int]:
        """How many weights the masks keep after a step, by path of the sparse leaf."""
        return {p: int(m.sum()) for p, m in by_path(self.masks[step]).items()}


def by_path(tree) -> dict[str, np.ndarray]:
    """The leaves of a tree as NumPy arrays (keys as their data), by path."""

    def plain(x):
        is_key = isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(x) if is_key else x)

    return {path: plain(x) for path, x in named_leaves(tree)}


def masks_of(state):
    """The masks in a state; None if it holds no method with masks."""
    return get_masks(state) if find_states(state) else None


@dataclasses.dataclass(eq=False)
class Subject:
    """A method under test.

    Args:
      build: `build(inner, **options) -> optax.GradientTransformation`: the method with everything
        set; `options` override a sparsity or a seed in the checks that sweep them.
      inner: the optimizer of the weights.
      steps: the length of the run.
      sweeps: options that `build` can be given as traced arrays, such as
        `{"sparsity": (0.75, 0.5), "seed": (0, 1)}`: values for two runs, of which the first are
        those of `build(inner)`.
      compiler_options: of every compilation; by default XLA on CPU optimizes little.
    """

    build: Callable[..., optax.GradientTransformation]
    # Not Adam: its first steps make the sizes of all grown weights equal up to rounding, so that
    # which of them is dropped next would depend on how XLA fuses.
    inner: optax.GradientTransformation = dataclasses.field(
        default_factory=lambda: optax.sgd(0.1, momentum=0.9)
    )
    steps: int = 12
    sweeps: Mapping[str, tuple] = dataclasses.field(default_factory=dict)
    compiler_options: Mapping[str, Any] = dataclasses.field(default_factory=lambda: dict(_QUICK))
    traces: int = 0

    def jit(self, function: Callable) -> Any:
        """`jax.jit` with the compiler options."""
        return jax.jit(function, compiler_options=dict(self.compiler_options))

    @functools.cached_property
    def tx(self) -> optax.GradientTransformationExtraArgs:
        """The method around the inner optimizer."""
        return optax.with_extra_args_support(self.build(self.inner))

    @functools.cached_property
    def step(self) -> Callable:
        """`step(params, state, goal) -> (params, state)`, compiled; counts its traces."""

        def step(params, state, goal):
            self.traces += 1
            updates, state = self.tx.update(gradients(params, goal), state, params)
            return optax.apply_updates(params, updates), state

        return self.jit(step)

    @functools.cached_property
    def start(self) -> Any:
        """The state of `init`, compiled."""
        return self.jit(self.tx.init)(parameters())

    def train(self, params, state, goal, steps: int) -> Run:
        """`steps` compiled steps, one by one."""
        run = Run([], [], [])
        for _ in range(steps):
            params, state = self.step(params, state, goal)
            run.params.append(jax.device_get(params))
            run.states.append(jax.device_get(state))
            run.masks.append(jax.device_get(masks_of(state)))
        return run

    @functools.cached_property
    def run(self) -> Run:
        """The run from `parameters()`, not masked before the first step."""
        params = parameters()
        return self.train(params, self.start, target(params), self.steps)


def check_exact(subject: Subject, kept: Callable[[int], Mapping[str, int] | int] | None = None):
    """After every step pruned weights are +0.0 exactly, and as many are kept as asked.

    Args:
      kept: the number of weights kept after step t, by path or in total.
    """
    for t, (params, masks) in enumerate(zip(subject.run.params, subject.run.masks)):
        if masks is None:
            continue
        weights, found = by_path(params), by_path(masks)
        for path, m in found.items():
            assert m.dtype == bool and m.shape == weights[path].shape, f"the mask of {path!r}"
            out = weights[path][~m]
            assert not np.any(out), f"step {t}: pruned weights of {path!r} are not 0"
            assert not np.any(np.signbit(out)), f"step {t}: -0.0 in {path!r}"
        if kept is not None:
            want, have = kept(t), subject.run.kept(t)
            have = sum(have.values()) if isinstance(want, int) else have
            assert have == want, f"step {t}: {have} weights are kept, {want} are asked for"


def check_finite(subject: Subject):
    """The run stays finite, and moves the weights towards the minimum where it may."""
    start = by_path(parameters())
    for path, x in subject.run.weights().items():
        assert np.all(np.isfinite(x)), f"{path!r} is not finite"
        assert np.any(x != start[path]), f"{path!r} has not moved"


def check_first_forward(subject: Subject):
    """`apply_masks` gives a sparse network before the first update, and does not disturb it."""
    params, state = parameters(), subject.start
    if masks_of(state) is None:
        return
    sparse = by_path(apply_masks(params, state))
    for path, m in by_path(masks_of(state)).items():
        assert not np.any(sparse[path][~m]), f"apply_masks left pruned weights in {path!r}"


def check_compiles_once(subject: Subject):
    """Sparsity, masks and step change without a second compilation."""
    _ = subject.run
    assert subject.traces == 1, f"update was traced {subject.traces} times in {subject.steps} steps"


def check_state_is_stable(subject: Subject, dtypes=(jnp.bfloat16,)):
    """An update changes neither the structure, nor a shape or dtype of the state; the updates have
    the dtypes of the parameters, and `init` is traceable."""

    def describe(tree):
        return jax.tree.map(lambda x: (x.shape, x.dtype), tree)

    for dtype in dtypes:
        params = parameters(dtype=dtype)
        tx = optax.with_extra_args_support(subject.build(subject.inner))
        state = jax.eval_shape(tx.init, params)
        updates, new = jax.eval_shape(tx.update, params, state, params)
        assert jax.tree.structure(state) == jax.tree.structure(new), "the state changes structure"
        assert describe(state) == describe(new), f"{jnp.dtype(dtype).name}: the state changes"
        assert describe(updates) == describe(params), "updates differ from parameters in dtype"


def check_no_array_of_all_weights(subject: Subject):
    """No array that an update makes is as large as all weights together: of sharded weights it could
    fit on no device."""
    names = "abcd"
    params = {n: {"kernel": jax.ShapeDtypeStruct((64, 64), jnp.float32)} for n in names}
    tx = optax.with_extra_args_support(subject.build(subject.inner))
    state = jax.eval_shape(tx.init, params)
    limit = len(names) * 64 * 64
    for equation in _equations(jax.make_jaxpr(tx.update)(params, state, params).jaxpr):
        sizes = [getattr(x.aval, "size", 0) for x in equation.outvars]
        assert max(sizes, default=0) < limit, (
            f"{equation.primitive.name} makes {max(sizes)} numbers of {limit} weights"
        )


def _equations(jaxpr):
    """The equations of a jaxpr and of all within it."""
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from _equations(inner)


_COLLECTIVES = (
    "all-gather|all-reduce|all-to-all|collective-permute|collective-broadcast|reduce-scatter"
)


def exchanged(program: str) -> list[int]:
    """How many numbers each collective operation of a compiled program gives to a device.

    >>> exchanged("x = f32[4,8]{1,0} all-gather(y), dimensions={0}")
    [32]
    """
    shapes = re.findall(rf"= (.*?) (?:{_COLLECTIVES})(?:-start)?\(", program)
    sizes = lambda text: [
        math.prod(int(n) for n in dims.split(",") if n)
        for dims in re.findall(r"\w+\[([\d,]*)\]", text)
    ]
    return [sum(sizes(text)) for text in shapes]


def check_extra_args(subject: Subject):
    """Keyword arguments of `update` reach the inner optimizer."""
    seen = []

    def update(updates, state, params=None, **extra):
        seen.append(extra["value"])
        return updates, state

    probe = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    inner = optax.chain(optax.trace(0.9), probe)  # some methods read a momentum
    tx: Any = optax.with_extra_args_support(subject.build(inner))
    params = parameters()
    state = jax.eval_shape(tx.init, params)
    jax.eval_shape(lambda s: tx.update(params, s, params, value=1.0, unknown=2.0), state)
    assert seen and all(v == 1.0 for v in seen), "the inner optimizer did not get value="


def check_resumes(subject: Subject):
    """A state that went through host memory continues bit for bit."""
    half = subject.steps // 2
    params, state = subject.run.params[half - 1], subject.run.states[half - 1]
    params, state = jax.tree.map(jnp.asarray, (params, state))
    rest = subject.train(params, state, target(parameters()), subject.steps - half)
    same(subject.run.params[-1], rest.params[-1], "parameters after a restart")
    same(subject.run.states[-1], rest.states[-1], "the state after a restart")


def check_nan(subject: Subject):
    """A gradient that is NaN neither passes a mask nor moves one, and shows in the weights."""
    goal, run = target(parameters()), subject.run
    for t in (subject.steps // 2 - 1, subject.steps // 2):  # masks are updated after one of them
        kernel = run.weights(t)["dense/kernel"]
        where = np.unravel_index(np.argmax(np.abs(kernel)), kernel.shape)
        bad = jax.tree.map(lambda x: x, goal)
        bad["dense"]["kernel"] = goal["dense"]["kernel"].at[where].set(jnp.nan)
        after = subject.train(run.params[t], run.states[t], bad, 2)
        got = after.weights()["dense/kernel"]
        assert np.isnan(got[where]), "a NaN gradient of a kept weight vanished"
        if run.masks[t] is not None:
            same(run.masks[t], after.masks[-1], "masks after a NaN gradient")
            assert not np.any(got[~by_path(run.masks[t])["dense/kernel"]]), "NaN passed the mask"


def check_vmap_and_scan(
    subject: Subject, kept: Callable[..., Mapping[str, int] | int] | None = None
):
    """Two runs at once under `vmap`, as a `lax.scan`, with swept options, are what they are alone.

    Args:
      kept: the number of weights kept after step t of the second run, by path or in total.
    """
    params, goal = parameters(), target(parameters())

    def whole(options):
        tx = optax.with_extra_args_support(subject.build(subject.inner, **options))

        def step(carry, _):
            p, s = carry
            u, s = tx.update(gradients(p, goal), s, p)
            p = optax.apply_updates(p, u)
            return (p, s), (p, masks_of(s))

        return jax.lax.scan(step, (params, tx.init(params)), None, length=subject.steps)[1]

    swept = {k: jnp.asarray(v) for k, v in subject.sweeps.items()}
    many = swept or {"_": jnp.arange(2)}
    both = subject.jit(jax.vmap(lambda o: whole({k: v for k, v in o.items() if k != "_"})))(many)
    both = jax.device_get(both)
    for t in range(subject.steps):
        ps, ms = jax.tree.map(lambda x, t=t: x[0, t], both)
        same(subject.run.masks[t], ms, f"step {t}: masks under vmap and scan")
        close(subject.run.params[t], ps, f"step {t}: parameters under vmap and scan")
        if kept is not None and ms is not None:
            have = {p: int(m[1, t].sum()) for p, m in by_path(both[1]).items()}
            want = kept(t)
            have = sum(have.values()) if isinstance(want, int) else have
            assert have == want, f"step {t}: {have} weights are kept in the sweep, {want} asked"


def wrapped(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """`MultiSteps(chain(clip, apply_if_finite(masked(tx))), 2)`, for parameters as `parameters()`."""
    everything = jax.tree.map(lambda _: True, parameters())
    chain = optax.chain(
        optax.clip_by_global_norm(1e9),
        optax.apply_if_finite(optax.masked(tx, everything), 5),
    )
    return optax.MultiSteps(chain, every_k_schedule=2)  # type: ignore[return-value]


def check_traces_inside_wrappers(subject: Subject):
    """Inside wrappers of optax an update can be traced, and masks and weights can be read."""
    tx, params = wrapped(subject.build(subject.inner)), parameters()
    state = jax.eval_shape(tx.init, params)
    _, new = jax.eval_shape(tx.update, params, state, params)
    assert jax.tree.structure(state) == jax.tree.structure(new), "the state changes structure"
    if masks_of(subject.run.states[-1]) is not None:
        found = jax.eval_shape(lambda s: (get_masks(s), get_raw_params(s)), new)
        alone = (subject.run.masks[-1], get_raw_params(subject.run.states[-1]))
        assert jax.tree.structure(found) == jax.tree.structure(alone), "masks inside wrappers"


def check_composes(subject: Subject):
    """Inside wrappers of optax the method does what it does alone, and under `apply_if_finite` a
    gradient with NaN changes neither weights nor masks."""
    tx = wrapped(subject.build(subject.inner))

    @subject.jit
    def step(params, state, goal):
        updates, state = tx.update(gradients(params, goal), state, params)
        return optax.apply_updates(params, updates), state

    def twice(params, state, goal):
        return step(*step(params, state, goal), goal)

    params, goal = parameters(), target(parameters())
    state: Any = subject.jit(tx.init)(params)
    for t in range(6):
        params, state = twice(params, state, goal)
        same(subject.run.masks[t], masks_of(state), f"step {t}: masks inside wrappers")
        close(subject.run.params[t], params, f"step {t}: parameters inside wrappers")
    bad = jax.tree.map(lambda x: x.at[0].set(jnp.nan), goal)
    still, after = twice(params, state, bad)
    same(params, still, "parameters after a NaN gradient under apply_if_finite")
    same(masks_of(state), masks_of(after), "masks after a NaN gradient under apply_if_finite")


def check_without_jit(subject: Subject, steps: int = 5):
    """Steps outside of `jit` are what compiled ones are, and compile nothing after the second."""
    params, goal = parameters(), target(parameters())
    state = subject.tx.init(params)
    for t in range(steps):
        before = _compilations()
        updates, state = subject.tx.update(gradients(params, goal), state, params)
        params = optax.apply_updates(params, updates)
        made = _compilations() - before
        assert t < 2 or made == 0, f"step {t}: {made} programs were compiled outside of jit"
        same(subject.run.masks[t], masks_of(state), f"step {t}: masks without jit")
        close(subject.run.params[t], params, f"step {t}: parameters without jit")


_COMPILED: list[str] = []


@functools.cache
def _listen() -> None:
    def note(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            _COMPILED.append(event)

    jax.monitoring.register_event_duration_secs_listener(note)


def _compilations() -> int:
    """Programs that XLA has compiled since the first call."""
    _listen()
    return len(_COMPILED)


def check_ownership(subject: Subject):
    """A state, and what is read from it, hold no array of the caller: donating one deletes nothing
    else."""
    params = parameters()
    copies = jax.tree.map(np.asarray, jax.device_get(params))
    state = subject.tx.init(params)
    masks, raw = masks_of(state), None
    if masks is not None:
        raw = get_raw_params(state)
        first = apply_masks(params, state)
    else:
        first = jax.tree.map(jnp.copy, params)

    held = [x for x in jax.tree.leaves((first, state)) if isinstance(x, jax.Array)]
    for x in held:  # as a step does to what is donated to it
        x.delete()
    for what, tree in (("parameters", params), ("masks", masks), ("raw weights", raw)):
        gone = [x for x in jax.tree.leaves(tree) if x.is_deleted()]
        assert not gone, f"{what} were donated with the state"
    same(copies, params, "parameters of the caller")


def check_map_params(subject: Subject):
    """`optax.tree.map_params` maps the slots of the inner optimizer, with or without a second tree
    like the parameters, and takes masks and raw weights for no parameters."""
    params = parameters()
    state = jax.eval_shape(subject.tx.init, params)
    marked = optax.tree.map_params(
        subject.tx, lambda _, p: "slot", state, params, transform_non_params=lambda _: "other"
    )
    inner = jax.eval_shape(subject.inner.init, params)
    slots = optax.tree.map_params(
        subject.inner, lambda _: "slot", inner, transform_non_params=lambda _: "other"
    )
    count = lambda tree: jax.tree.leaves(tree).count("slot")
    assert count(marked) >= count(slots), "slots of the inner optimizer are not found"
    narrow = lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16)
    cast = optax.tree.map_params(subject.tx, narrow, state)
    for old, new in zip(find_states(state), find_states(cast)):
        kinds = lambda s: [x.dtype for x in jax.tree.leaves((s.masks, s.raw, s.shift, s.scale))]
        assert kinds(old) == kinds(new), "masks or raw weights were taken for parameters"


def same(a, b, what: str):
    """Asserts that two trees are equal bit for bit."""
    _compare(a, b, what, lambda x, y: np.array_equal(x, y, equal_nan=x.dtype.kind == "f"))


def close(a, b, what: str, rtol: float = 2e-5, atol: float = 1e-6):
    """Asserts that two trees are equal up to rounding, with the same zeros."""

    def alike(x, y):
        return np.array_equal(x == 0, y == 0) and np.allclose(
            x.astype(np.float64), y.astype(np.float64), rtol, atol, equal_nan=True
        )

    _compare(a, b, what, alike)


def _compare(a, b, what: str, alike: Callable[[Any, Any], bool]):
    one, two = by_path(a), by_path(b)
    assert one.keys() == two.keys(), f"{what}: leaves differ"
    for path, x in one.items():
        y = two[path]
        assert x.shape == y.shape and x.dtype == y.dtype, (
            f"{what}: {path!r} is {x.dtype}{x.shape} and {y.dtype}{y.shape}"
        )
        assert alike(x, y), f"{what}: {path!r} differs"


CHECKS: dict[str, Callable[[Subject], None]] = {
    check.__name__.removeprefix("check_"): check
    for check in (
        check_exact,
        check_finite,
        check_first_forward,
        check_compiles_once,
        check_state_is_stable,
        check_no_array_of_all_weights,
        check_extra_args,
        check_resumes,
        check_nan,
        check_vmap_and_scan,
        check_traces_inside_wrappers,
        check_composes,
        check_without_jit,
        check_ownership,
        check_map_params,
    )
}


def check_all(subject: Subject):
    """Every contract, in the order of `CHECKS`."""
    for check in CHECKS.values():
        check(subject)
