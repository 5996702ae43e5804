"""How one training step runs on many devices: one class per strategy, chosen by `config.parallel`.

A strategy places the state, compiles the step and shapes the batches; the step function itself is the
same under all of them. `to_save` and `from_saved` turn the placed state into the *logical* state (whole
arrays, as the step function of one device sees them) and back. Checkpoints hold the logical state, so
that a run can go on under another strategy, or on another number of devices or hosts.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from jaxsparse.targets import path_name

Batch = Mapping[str, np.ndarray]


class Single:
    """One device, `jax.jit`."""

    axis_name: str | None = None

    def __init__(self, config):
        if jax.process_count() > 1:
            raise ValueError("parallel='none' runs on one device: with several hosts, pmap or fsdp")
        self.sharding = SingleDeviceSharding(jax.local_devices()[0])

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
    """Sharded parameters through `jax.jit`: every large leaf of the parameters, and all leaves of the
    optimizer state that belong to it, is split over the devices that split the batch. With
    `config.tensor` > 1, so many devices also share each layer of a Transformer."""

    # Which axis of a Transformer's kernel is split over `tensor`: outputs, then inputs (Megatron).
    TENSOR = {"query": -1, "key": -1, "value": -1, "up": -1, "out": -2, "down": -2, "head": -1}
    SMALL = 1024  # leaves with fewer entries are replicated

    def __init__(self, config, devices=None):
        devices = np.asarray(jax.devices() if devices is None else devices)
        if config.tensor < 1 or devices.size % config.tensor:
            raise ValueError(f"tensor={config.tensor} does not divide {devices.size} devices")
        _check_batch(config, devices.size // config.tensor)
        self.mesh = Mesh(devices.reshape(-1, config.tensor), ("data", "tensor"))
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
        return {k: jax.make_array_from_process_local_data(self.rows, v) for k, v in batch.items()}

    def shardings(self, state: Any) -> Any:
        """A sharding for each leaf of a state (its shapes suffice)."""
        leaves = jax.tree_util.tree_flatten_with_path(state.params)[0]
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
                        return NamedSharding(self.mesh, self._fit(spec, x.shape))
            return self.whole

        return jax.tree_util.tree_map_with_path(of, state)

    def spec(self, path: str, shape: tuple[int, ...]) -> PartitionSpec:
        """How a parameter is split. Only its two last axes are: axes before them are layers that a
        scan walks through, or the window of a convolution."""
        if np.prod(shape) < self.SMALL:
            return PartitionSpec()
        axes: list[str | None] = [None] * len(shape)
        name = next((p for p in reversed(path.split("/")) if p in self.TENSOR), None)
        if len(shape) >= 2 and name is not None:
            axes[self.TENSOR[name]] = "tensor"
        axes = list(self._fit(PartitionSpec(*axes), shape))
        free = [i for i in range(max(0, len(shape) - 2), len(shape)) if axes[i] is None]
        size = self.mesh.shape["data"]
        divisible = [i for i in free if shape[i] % size == 0]
        if divisible:
            axes[max(divisible, key=lambda i: shape[i])] = "data"
        return PartitionSpec(*axes)

    def _fit(self, spec, shape):
        """Without the mesh axes that do not divide the shape."""
        fits = lambda axis, n: axis is not None and n % self.mesh.shape[axis] == 0
        return PartitionSpec(*(axis if fits(axis, n) else None for axis, n in zip(spec, shape)))


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


def _settled(out):
    """On CPU, waits for the result: virtual devices share few threads, and two programs with
    collectives that are under way at once can wait for each other for ever."""
    return jax.block_until_ready(out) if jax.default_backend() == "cpu" else out


def _drop_axis(x):
    return x.reshape(x.shape[1:])


def _first_copy(x):
    return _drop_axis(x.addressable_shards[0].data)
