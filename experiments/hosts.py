"""What the processes of a run on several hosts share: joining, agreeing, and whole arrays."""

import os
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


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
