"""A process that compiles a function ahead of time for a TPU: `python -m tools.tpu_static.compiling`, with a job
as JSON on its standard input.

It writes `meta.json`, `module.hlo` and the integers that kernels are given into the job's directory, where the
compiler leaves its dumps too.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import inspect
import json
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AbstractMesh, Mesh, SingleDeviceSharding, use_abstract_mesh

from tools.tpu_static.prefetch import find_kernels


def load_factory(spec: str) -> Callable[..., Any]:
    """The function that `module:function` or `file.py:function` names.

    >>> load_factory("math:prod")([2, 3])
    6

    Raises:
      ValueError: a text of another form, a file that is no module.
    """
    home, _, name = spec.rpartition(":")
    if not home:
        raise ValueError(f"factory={spec!r}: must be module:function or file.py:function")
    if home.endswith(".py"):
        sys.path.insert(0, str(pathlib.Path(home).absolute().parent))
        found = importlib.util.spec_from_file_location("_tpu_static_target", home)
        if found is None or found.loader is None:
            raise ValueError(f"factory={spec!r}: {home} cannot be imported")
        target: Any = importlib.util.module_from_spec(found)
        sys.modules["_tpu_static_target"] = target
        found.loader.exec_module(target)
    else:
        target = importlib.import_module(home)
    for part in name.split("."):
        target = getattr(target, part)
    return target


@contextlib.contextmanager
def as_if_on(device: Any):
    """Lets code that asks for the kind of device while it is traced see this one."""
    one = Mesh(np.array([device]), ("_",)).abstract_mesh
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=one.abstract_device)):
        yield


def compile_job(job: dict[str, Any]) -> None:
    """Does a job of `analyze`; an error becomes part of `meta.json`."""
    out: dict[str, Any] = {"ok": False}
    work = pathlib.Path(job["work"])
    try:
        _compile(job, work, out)
    except Exception as error:
        out["error"] = f"{type(error).__name__}: {error}"[:20000]
    (work / "meta.json").write_text(json.dumps(out))


def _compile(job: dict[str, Any], work: pathlib.Path, out: dict[str, Any]) -> None:
    started = time.time()
    sys.path[:0] = job["paths"]
    out["jax"] = jax.__version__
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        out["libtpu"] = importlib.metadata.version("libtpu")
    topology = topologies.get_topology_desc(platform="tpu", topology_name=job["topology"])
    device: Any = topology.devices[0]
    out |= {"device_kind": device.device_kind, "num_devices": len(topology.devices)}

    factory, kwargs = load_factory(job["factory"]), dict(job["kwargs"])
    if "devices" in inspect.signature(factory).parameters:
        kwargs["devices"] = topology.devices
    with as_if_on(device):
        fn, args, *meta = factory(**kwargs)
    out["meta"] = meta[0] if meta else {}

    def spec(x):
        sharding = getattr(x, "sharding", None) if isinstance(x, jax.ShapeDtypeStruct) else None
        x = x if hasattr(x, "dtype") else np.asarray(x)
        place = sharding or SingleDeviceSharding(device)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)

    specs = jax.tree.map(spec, args)
    concrete = [None if isinstance(x, jax.ShapeDtypeStruct) else x for x in jax.tree.leaves(args)]
    out["setup_s"] = time.time() - started
    begun = time.process_time()  # of the processor: other work on the machine does not count
    jitted: Any = fn if hasattr(fn, "lower") else jax.jit(fn)
    with as_if_on(device):
        lowered = jitted.lower(*specs)
    compiled = lowered.compile()
    out["compile_s"] = time.process_time() - begun
    (work / "module.hlo").write_text(compiled.as_text())
    memory = compiled.memory_analysis()
    parts = ("argument", "output", "temp", "alias", "generated_code")
    out["memory"] = {part: int(getattr(memory, f"{part}_size_in_bytes")) for part in parts}
    cost: Any = compiled.cost_analysis() or {}
    cost = cost[0] if isinstance(cost, list | tuple) and cost else cost
    known = ("flops", "bytes accessed", "optimal_seconds", "transcendentals")
    out["xla_cost"] = {key: float(cost[key]) for key in known if key in cost}
    out["ok"] = True

    try:
        with as_if_on(device):
            kernels = find_kernels(jax.make_jaxpr(fn)(*specs), concrete)
    except Exception as error:  # it compiles, and so has a report without these facts
        kernels: list[dict[str, Any]] = [{"error": f"{type(error).__name__}: {error}"}]
    for i, kernel in enumerate(kernels):
        integers = kernel.pop("prefetch", {})
        kernel["bound_prefetch"] = sorted(integers)
        if integers:
            np.savez(work / f"prefetch_{i}.npz", **{str(k): v for k, v in integers.items()})
    out["pallas_calls"] = kernels


if __name__ == "__main__":
    compile_job(json.load(sys.stdin))
