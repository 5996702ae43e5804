"""How one training step runs on many devices: one class per strategy, chosen by name.

A strategy places the state, compiles the step and shapes the batches; the step function itself is the
same under all of them. `to_save` and `from_saved` turn the placed state into the *logical* state (whole
arrays, as the step function of one device sees them) and back. Checkpoints hold the logical state, so
that a run can go on under another strategy, or on another number of devices or hosts.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from jaxsparse.targets import path_name

Batch = Mapping[str, np.ndarray]
# What a layer that stores blocks or weights has beside its values: whole on every device.
BESIDE_VALUES = ("places", "rows", "outputs", "scores", "sketch", "due")


class Single:
    """One device, `jax.jit`."""

    axis_name: str | None = None  # the device axis that the step function sees
    mesh: Any = None  # the `Mesh` whose axis `data` shares the batch, if there is one

    def __init__(self, *, batch_size: int, microbatches: int = 0, tensor: int = 1):
        if jax.process_count() > 1:
            raise ValueError("parallel='none' runs on one device: with several hosts, pmap or fsdp")
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

    def __init__(self, *, batch_size: int, microbatches: int = 0, tensor: int = 1):
        self.local = jax.local_devices()
        _check_split(batch_size, microbatches, jax.device_count())
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
    of them as divide one of its axes. With `tensor` > 1, so many devices also share each layer of a
    Transformer."""

    # Which axis of a Transformer's kernel is split over `tensor`: outputs, then inputs (Megatron).
    TENSOR = {"query": -1, "key": -1, "value": -1, "up": -1, "out": -2, "down": -2, "head": -1}

    def __init__(
        self,
        *,
        batch_size: int,
        microbatches: int = 0,
        tensor: int = 1,
        devices: np.ndarray | None = None,
    ):
        placed = np.asarray(jax.devices() if devices is None else devices)
        if placed.size % tensor:
            raise ValueError(f"tensor={tensor} does not divide {placed.size} devices")
        _check_split(batch_size, microbatches, placed.size // tensor)
        self.mesh = Mesh(placed.reshape(-1, tensor), ("data", "tensor"))
        # The same devices, their number in prime factors, of which an axis of a leaf takes some.
        self.factors = _prime_factors(placed.size // tensor)
        self.names = tuple(f"data{i}" for i in range(len(self.factors)))
        self.parts = Mesh(placed.reshape(*self.factors, tensor), (*self.names, "tensor"))
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
        part = path.rpartition("/")[2]
        if part in BESIDE_VALUES:
            return PartitionSpec()
        if part == "values" and len(shape) >= 3:
            # Blocks are shared by the devices, and their rows by those that do not divide them.
            free = self.names
            for i in (-3, -2):
                (axes[i],) = self._fit([free], [shape[i]])
                free = tuple(name for name in free if name not in _names(axes[i]))
            return PartitionSpec(*axes)
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
        return math.prod(self.parts.shape[name] for name in _names(axis))

    def _fit(self, spec, shape) -> PartitionSpec:
        """Without the mesh axes that do not divide the shape."""

        def fit(axis, n):
            kept: tuple[str, ...] = ()
            for name in _names(axis):
                if n % self._size((*kept, name)) == 0:
                    kept = (*kept, name)
            return kept[0] if len(kept) == 1 else kept or None

        return PartitionSpec(*(fit(axis, n) for axis, n in zip(spec, shape)))


def _names(axis: str | Sequence[str] | None) -> tuple[str, ...]:
    """The mesh axes in an entry of a `PartitionSpec`."""
    return (axis,) if isinstance(axis, str) else tuple(axis or ())


def _prime_factors(n: int) -> tuple[int, ...]:
    """In ascending order; `()` for 1."""
    factor = next((f for f in range(2, math.isqrt(n) + 1) if n % f == 0), n)
    return () if n == 1 else (factor, *_prime_factors(n // factor))


STRATEGIES: Mapping[str, type[Single]] = {"none": Single, "pmap": Pmap, "fsdp": Fsdp}


def create(name: str, *, batch_size: int, microbatches: int = 0, tensor: int = 1) -> Single:
    """The strategy of that name, on all devices.

    Args:
      name: a key of `STRATEGIES`.
      batch_size: rows of the global batch.
      microbatches: how many equal pieces it is cut in, or 0; see `microbatches.mean_over_microbatches`.
      tensor: of fsdp, how many devices share each layer of a Transformer.

    Raises:
      ValueError: the devices do not divide the batch or the microbatches, or `tensor` not them.
    """
    return STRATEGIES[name](batch_size=batch_size, microbatches=microbatches, tensor=tensor)


def _check_split(batch_size: int, microbatches: int, parts: int) -> None:
    """The same rows on each device, and whole microbatches."""
    if batch_size % parts:
        raise ValueError(f"batch_size={batch_size} does not divide over {parts} devices")
    if microbatches % parts:
        raise ValueError(
            f"microbatches={microbatches} does not divide over {parts} devices: give a multiple, and "
            "a number of devices that is a power of two"
        )


def _settled(out):
    """On CPU, waits for the result: virtual devices share few threads, and two programs with
    collectives that are under way at once can wait for each other for ever."""
    return jax.block_until_ready(out) if jax.default_backend() == "cpu" else out


def _drop_axis(x):
    return x.reshape(x.shape[1:])


def _first_copy(x):
    return _drop_axis(x.addressable_shards[0].data)
