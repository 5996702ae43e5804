"""How one training step runs on many devices: one class per strategy, chosen by `config.parallel`.

A strategy places the state, compiles the step and shapes the batches; the step function itself is the
same under all of them. `to_save` and `from_saved` turn the placed state into the *logical* state (whole
arrays, as the step function of one device sees them) and back. Checkpoints hold the logical state, so
that a run can go on under another strategy, or on another number of devices or hosts.

`initialize` joins the processes of many hosts; `mean_over_microbatches` is the mean of gradients that has
the same bits on any number of devices.
"""

import math
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from jaxsparse.targets import path_name

Batch = Mapping[str, np.ndarray]


class Single:
    """One device, `jax.jit`."""

    axis_name: str | None = None  # the device axis that the step function sees
    mesh: Any = None  # the `Mesh` whose axis `data` shares the batch, if there is one

    def __init__(self, config):
        if jax.process_count() > 1:
            raise ValueError("parallel='none' runs on one device: with several hosts, pmap or fsdp")
        _check_microbatches(config, 1)
        self.whole = self.sharding = SingleDeviceSharding(jax.local_devices()[0])

    def init(self, init: Callable[[], Any]) -> Any:
        """The first state, in place."""
        return jax.jit(init, out_shardings=self.sharding)()

    def compile(self, step: Callable, donate: bool = False) -> Callable:
        """`step(state, batch) -> (state, numbers)` if it may take the state's memory (`donate`), or
        `-> numbers`. The numbers are those of the whole batch, on every host."""
        return jax.jit(step, donate_argnums=(0,) if donate else ())

    def put(self, batch: Batch) -> Any:
        """This host's rows of a batch, to the devices."""
        return jax.device_put(dict(batch), self.sharding)

    def to_save(self, state: Any) -> Any:
        return state

    def from_saved(self, state: Any) -> Any:
        return state

    def saved_shape(self, state: Any) -> Any:
        """Shapes, types and shardings of the logical state, for restoring."""
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
            self.to_save(state),
        )


class Pmap(Single):
    """Replicated data parallelism through `jax.pmap`: each device has a copy of the state and a part
    of the batch; the step averages the gradients over `axis_name`, so the copies stay equal."""

    axis_name = "batch"

    def __init__(self, config):
        self.local = jax.local_devices()
        _check_batch(config, jax.device_count())
        _check_microbatches(config, jax.device_count())
        self.rows = NamedSharding(Mesh(self.local, "batch"), PartitionSpec("batch"))
        self.whole = NamedSharding(Mesh(jax.devices(), "batch"), PartitionSpec())

    def init(self, init):
        return jax.pmap(lambda _: init())(self._one_per_device())

    def compile(self, step, donate=False):
        compiled = jax.pmap(step, self.axis_name, donate_argnums=(0,) if donate else ())

        def call(state, batch):
            out = _settled(compiled(state, batch))
            if not donate:
                return jax.tree.map(_first_copy, out)
            return out[0], jax.tree.map(_first_copy, out[1])

        return call

    def put(self, batch):
        n = len(self.local)
        split = {k: v.reshape(n, v.shape[0] // n, *v.shape[1:]) for k, v in batch.items()}
        return jax.device_put(split, self.rows)

    def to_save(self, state):
        """The copies as one replicated array per leaf; nothing moves."""

        def merge(x):
            copies = [_drop_axis(shard.data) for shard in x.addressable_shards]
            return jax.make_array_from_single_device_arrays(x.shape[1:], self.whole, copies)

        return jax.tree.map(merge, state)

    def from_saved(self, state):
        local = jax.tree.map(lambda x: x.addressable_data(0), state)
        return jax.pmap(lambda state, _: state, in_axes=(None, 0))(local, self._one_per_device())

    def _one_per_device(self):
        return jax.device_put(np.zeros(len(self.local), np.int32), self.rows)


class Fsdp(Single):
    """Sharded parameters through `jax.jit`: every leaf of the parameters, and all leaves of the
    optimizer state that belong to it, is split over the devices that split the batch, or over as many
    of them as divide one of its axes. With `config.tensor` > 1, so many devices also share each layer
    of a Transformer."""

    # Which axis of a Transformer's kernel is split over `tensor`: outputs, then inputs (Megatron).
    TENSOR = {"query": -1, "key": -1, "value": -1, "up": -1, "out": -2, "down": -2, "head": -1}

    def __init__(self, config, devices=None):
        devices = np.asarray(jax.devices() if devices is None else devices)
        if config.tensor < 1 or devices.size % config.tensor:
            raise ValueError(f"tensor={config.tensor} does not divide {devices.size} devices")
        _check_batch(config, devices.size // config.tensor)
        _check_microbatches(config, devices.size // config.tensor)
        if config.microbatches and config.tensor > 1:
            raise ValueError(
                f"microbatches={config.microbatches}: not with tensor={config.tensor}, whose devices "
                "add parts of one product in an order of their own"
            )
        self.mesh = Mesh(devices.reshape(-1, config.tensor), ("data", "tensor"))
        # The same devices, their number in prime factors, of which an axis of a leaf takes some.
        self.factors = _prime_factors(devices.size // config.tensor)
        self.names = tuple(f"data{i}" for i in range(len(self.factors)))
        self.parts = Mesh(devices.reshape(*self.factors, config.tensor), (*self.names, "tensor"))
        self.rows = NamedSharding(self.mesh, PartitionSpec("data"))
        self.whole = NamedSharding(self.mesh, PartitionSpec())
        self.state_shardings: Any = None

    def init(self, init):
        self.state_shardings = self.shardings(jax.eval_shape(init))
        return jax.jit(init, out_shardings=self.state_shardings)()

    def compile(self, step, donate=False):
        out = (self.state_shardings, self.whole) if donate else self.whole
        compiled = jax.jit(step, donate_argnums=(0,) if donate else (), out_shardings=out)
        return lambda state, batch: _settled(compiled(state, batch))

    def put(self, batch):
        make = jax.make_array_from_process_local_data
        with jax.transfer_guard_host_to_device("allow"):  # with several hosts it counts as implicit
            return {k: make(self.rows, v) for k, v in batch.items()}

    def shardings(self, state: Any) -> Any:
        """A sharding for each leaf of a state (its shapes suffice)."""
        leaves = jax.tree_util.tree_flatten_with_path((state.params, state.stats))[0]
        leaves = [(path[1:], x) for path, x in leaves]
        specs = {
            path_name(path): (x.shape, self.spec(path_name(path), x.shape)) for path, x in leaves
        }

        def of(path, x):
            parts = path_name(path).split("/")
            for i in range(len(parts)):
                # A moment, a raw weight, a mask (packed: one entry `bits` below the leaf's path).
                for tail in (parts[i:], parts[i:-1]):
                    shape, spec = specs.get("/".join(tail), ((), None))
                    if spec is not None and len(shape) == len(x.shape):
                        return NamedSharding(self.parts, self._fit(spec, x.shape))
            return self.whole

        return jax.tree_util.tree_map_with_path(of, state)

    def spec(self, path: str, shape: tuple[int, ...]) -> PartitionSpec:
        """How a parameter is split. Only its two last axes are: axes before them are layers that a
        scan walks through, or the window of a convolution."""
        axes: list[Any] = [None] * len(shape)
        name = next((p for p in reversed(path.split("/")) if p in self.TENSOR), None)
        if len(shape) >= 2 and name is not None:
            axes[self.TENSOR[name]] = "tensor"
        axes = list(self._fit(axes, shape))
        free = [i for i in range(max(0, len(shape) - 2), len(shape)) if axes[i] is None]
        fits = {i: self._fit([self.names], shape[i : i + 1])[0] for i in free}
        if fits:
            # Two axes would always do, but XLA then takes half as long again for a convolution.
            best = max(free, key=lambda i: (self._size(fits[i]), shape[i]))
            axes[best] = fits[best]
        return PartitionSpec(*axes)

    def _size(self, axis) -> int:
        """Into how many parts an entry of a `PartitionSpec` splits."""
        names = (axis,) if isinstance(axis, str) else axis or ()
        return math.prod(self.parts.shape[name] for name in names)

    def _fit(self, spec, shape) -> PartitionSpec:
        """Without the mesh axes that do not divide the shape."""

        def fit(axis, n):
            names, kept = (axis,) if isinstance(axis, str) else axis or (), ()
            for name in names:
                if n % self._size((*kept, name)) == 0:
                    kept = (*kept, name)
            return kept[0] if len(kept) == 1 else kept or None

        return PartitionSpec(*(fit(axis, n) for axis, n in zip(spec, shape)))


def _prime_factors(n: int) -> tuple[int, ...]:
    """In ascending order; `()` for 1."""
    factor = next((f for f in range(2, math.isqrt(n) + 1) if n % f == 0), n)
    return () if n == 1 else (factor, *_prime_factors(n // factor))


STRATEGIES = {"none": Single, "pmap": Pmap, "fsdp": Fsdp}


def create(config) -> Single:
    """The strategy that the config names.

    Raises:
      ValueError: if there is no such strategy, or its devices do not divide the batch.
    """
    if config.parallel not in STRATEGIES:
        raise ValueError(
            f"parallel={config.parallel!r} is not known; choose from {', '.join(STRATEGIES)}"
        )
    return STRATEGIES[config.parallel](config)


def _check_batch(config, parts):
    if config.batch_size % parts:
        raise ValueError(f"batch_size={config.batch_size} does not divide over {parts} devices")


def _check_microbatches(config, parts):
    """A balanced tree needs powers of two, and whole microbatches on each device."""
    count = config.microbatches
    if not count:
        return
    if count < 0 or count & (count - 1) or config.batch_size % count:
        raise ValueError(
            f"microbatches={count}: must be a power of two that divides "
            f"batch_size={config.batch_size}, or 0"
        )
    if count % parts:
        raise ValueError(
            f"microbatches={count} does not divide over {parts} devices: give a multiple, and a "
            "number of devices that is a power of two"
        )


def mean_over_microbatches(
    fn: Callable[..., Any], count: int, axis_name: str | None = None
) -> Callable[..., Any]:
    """The mean of `fn(*args, microbatch)` over the `count` microbatches of the global batch, with the
    same bits on any number of devices.

    Floating-point sums depend on their order, and a sum over devices has another order than the sum on
    one. Here `fn` sees the same `count` pieces at the same shapes wherever they are, and the results are
    added along one balanced binary tree: pieces 0 and 1, 2 and 3, then those sums, and so on. A device
    adds the subtree of its own pieces, one at a time (it holds log2 of their number at once); devices
    add the rest by recursive doubling, where each exchanges sums with the one whose number differs in
    one bit. As a + b = b + a, all of them end with the same bits.

    XLA on CPU also rounds a product and the sum after it once or twice, depending on what it fuses them
    with: for the same bits there, add --xla_cpu_max_isa=AVX (no fused multiply-add) to XLA_FLAGS.

    Args:
      fn: returns a tree of floating-point arrays.
      count: a power of two, and a multiple of the number of devices along `axis_name`.
      axis_name: the axis of `pmap` or `shard_map` that shares the batch; `None` if it is whole.

    Returns:
      `mean(*args, batch)`, where `batch` is what this device has of the global batch.
    """

    def mean(*args):
        *fixed, batch = args
        devices = 1 if axis_name is None else lax.axis_size(axis_name)
        local = count // devices
        pieces = jax.tree.map(lambda x: x.reshape(local, -1, *x.shape[1:]), batch)

        # The barriers keep the compiler from merging `fn` with what is around it, which differs with
        # the number of devices, and with it the rounding.
        def one(piece):
            return lax.optimization_barrier(fn(*lax.optimization_barrier((*fixed, piece))))

        total = _tree_sum(one, pieces, local)
        joined, split = _joined(total)
        for bit in range(devices.bit_length() - 1):
            pairs = [(i, i ^ (1 << bit)) for i in range(devices)]
            other = lax.ppermute(joined, axis_name, pairs)
            joined = jax.tree.map(jnp.add, joined, other)
        return lax.optimization_barrier(jax.tree.map(lambda x: x / count, split(joined)))

    return mean


def _joined(tree):
    """All leaves of one type as one vector, and the way back: between hosts a message costs more than
    what is in it."""
    leaves, structure = jax.tree.flatten(tree)
    dtypes = sorted({x.dtype for x in leaves}, key=str)
    of = {d: [i for i, x in enumerate(leaves) if x.dtype == d] for d in dtypes}
    vectors = [jnp.concatenate([leaves[i].ravel() for i in of[d]]) for d in dtypes]

    def split(vectors):
        out = list(leaves)
        for d, vector in zip(dtypes, vectors):
            ends = np.cumsum([leaves[i].size for i in of[d]])
            for i, part in zip(of[d], jnp.split(vector, ends[:-1])):
                out[i] = part.reshape(leaves[i].shape)
        return jax.tree.unflatten(structure, out)

    return vectors, split


def _tree_sum(fn, pieces, count):
    """The sum of `fn` over the `count` leading entries of `pieces`, along a balanced binary tree.

    Counts in binary: `sums[l]` is a finished subtree of 2^l pieces that waits for its sibling.
    """
    if count == 1:
        return fn(jax.tree.map(lambda x: x[0], pieces))
    levels = count.bit_length() - 1
    shapes = jax.eval_shape(fn, jax.tree.map(lambda x: x[0], pieces))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    def body(carry, inputs):
        (sums, _), (i, piece) = carry, inputs
        total, rises, kept = fn(piece), jnp.array(True), []
        for level, waiting in enumerate(sums):
            has_sibling = (i >> level) & 1 == 1
            stays, joins = rises & ~has_sibling, rises & has_sibling
            kept.append(jax.tree.map(lambda w, t: jnp.where(stays, t, w), waiting, total))  # noqa: B023
            total = jax.tree.map(lambda w, t: jnp.where(joins, w + t, t), waiting, total)  # noqa: B023
            rises = joins
        return (kept, total), None

    (_, total), _ = lax.scan(body, ([zeros] * levels, zeros), (jnp.arange(count), pieces))
    return total


def initialize(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    distributed: bool | None = None,
) -> None:
    """Joins the processes of a run on several hosts, through `jax.distributed`; before any other use
    of JAX.

    Args:
      coordinator_address: `host:port` of the first process.
      num_processes: how many processes there are.
      process_id: the number of this one.
      distributed: `True` lets JAX find what is not given (Cloud TPU, SLURM, Open MPI, Kubernetes),
        `False` is one process, and `None` is `True` if one of the above is given or a job manager's
        variables name several processes.

    Raises:
      ValueError: if something is missing that JAX cannot find either.
    """
    given = {
        "coordinator_address": coordinator_address,
        "num_processes": num_processes,
        "process_id": process_id,
    }
    if distributed is None:
        distributed = any(v is not None for v in given.values()) or _several_processes()
    if not distributed:
        if any(v is not None for v in given.values()):
            raise ValueError(f"distributed=False: contradicts {_named(given)}")
        return
    try:
        jax.distributed.initialize(**given)
    except ValueError as error:
        raise ValueError(
            f"the processes cannot be joined with {_named(given)}: {error} Where JAX does not find them "
            "(it knows Cloud TPU, SLURM, Open MPI, Kubernetes), give each process all of "
            "--coordinator_address=host:port --num_processes=N --process_id=i"
        ) from error


def _several_processes() -> bool:
    """Whether a job manager has started several copies of this program."""
    number = lambda name: int(os.environ.get(name) or 1)
    names = os.environ.get("TPU_PROCESS_ADDRESSES") or os.environ.get("TPU_WORKER_HOSTNAMES", "")
    return (
        bool(os.environ.get("JAX_COORDINATOR_ADDRESS"))
        or number("SLURM_STEP_NUM_TASKS") > 1
        or number("OMPI_COMM_WORLD_SIZE") > 1
        or ("," in names and " " not in names)  # libtpu writes a warning here where there is no TPU
    )


def _named(given):
    return ", ".join(f"{k}={v!r}" for k, v in given.items() if v is not None) or "no address"


def all_agree(ok: bool) -> bool:
    """Whether `ok` holds on every process."""
    if jax.process_count() == 1:
        return ok
    with jax.transfer_guard("allow"):
        return bool(np.all(multihost_utils.process_allgather(np.array(ok))))


def to_host(tree: Any) -> Any:
    """Whole arrays in this host's memory, one leaf after the other, of arrays on many hosts."""

    def fetch(x):
        if x.is_fully_addressable:
            return x
        if x.is_fully_replicated:
            return x.addressable_data(0)
        return multihost_utils.process_allgather(x, tiled=True)

    return jax.tree.map(fetch, tree)


def _settled(out):
    """On CPU, waits for the result: virtual devices share few threads, and two programs with
    collectives that are under way at once can wait for each other for ever."""
    return jax.block_until_ready(out) if jax.default_backend() == "cpu" else out


def _drop_axis(x):
    return x.reshape(x.shape[1:])


def _first_copy(x):
    return _drop_axis(x.addressable_shards[0].data)
