"""How one training step runs on many devices: one small class per strategy, chosen by `config.parallel`.

A strategy places the state, compiles the step and shapes the batches; the step function itself is the
same under all of them. `to_save` and `from_saved` turn the placed state into the *logical* state (one
copy, whole arrays) and back. Checkpoints hold the logical state, so that a run can go on under another
strategy or on another number of devices.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

Batch = Mapping[str, np.ndarray]


class Single:
    """One device, `jax.jit`."""

    axis_name = None

    def __init__(self, config):
        self.sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        self.num_devices = 1

    def init(self, init: Callable[[], Any]) -> Any:
        """The first state, in place."""
        return jax.jit(init, out_shardings=self.sharding)()

    def compile(self, step: Callable, donate: bool = False) -> Callable:
        """`step(state, batch) -> (state, numbers)`, or `-> numbers` of the whole batch."""
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


STRATEGIES = {"none": Single}


def create(config) -> Single:
    """The strategy that the config names.

    Raises:
      ValueError: if there is no such strategy.
    """
    if config.parallel not in STRATEGIES:
        raise ValueError(
            f"parallel={config.parallel!r} is not known; choose from {', '.join(STRATEGIES)}"
        )
    return STRATEGIES[config.parallel](config)
