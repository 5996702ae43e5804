"""The command `python -m tools.gpu_static`."""

from __future__ import annotations

import argparse
import inspect
import json

from tools.gpu_static.analyze import TARGETS, analyze, as_if_on, devices
from tools.tpu_static.compiling import load_factory


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Registers, shared memory and instructions of a JAX function on a GPU."
    )
    parser.add_argument("factory", help="module:function or file.py:function")
    parser.add_argument("--target", choices=sorted(TARGETS), default="h100")
    parser.add_argument("--kw", default="{}", help="JSON keyword arguments for the factory")
    parser.add_argument("--count", type=int, default=1, help="described devices, for a sharded one")
    parser.add_argument("--no-spills", action="store_true", help="a kernel that spills is an error")
    a = parser.parse_args(argv)
    factory, kwargs = load_factory(a.factory), json.loads(a.kw)
    described = devices(a.target, a.count)
    if "devices" in inspect.signature(factory).parameters:
        kwargs["devices"] = described
    with as_if_on(described[0]):
        function, arguments = factory(**kwargs)
    print(json.dumps(analyze(function, arguments, a.target, spills=not a.no_spills), indent=1))


if __name__ == "__main__":
    main()
