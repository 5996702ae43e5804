"""The command `python -m tools.tpu_static`."""

from __future__ import annotations

import argparse
import json
import os
import sys

from tools.tpu_static.analyze import analyze
from tools.tpu_static.table import table


def main(argv: list[str] | None = None) -> int:
    ap = argparse.ArgumentParser(
        description="Static cost of a JAX function on a TPU, by the TPU compiler."
    )
    ap.add_argument("factory", help="module:function or file.py:function")
    ap.add_argument(
        "--topology", default="v5e:2x2", help="v5e:2x2, v5p:2x2x1, v6e:2x2, v4:2x2x1, ..."
    )
    ap.add_argument("--kw", default="{}", help="JSON keyword arguments for the factory")
    ap.add_argument("--path", action="append", default=[], help="prepend to sys.path")
    ap.add_argument("--json", help="write the report here ('-' for stdout)")
    ap.add_argument("--keep", help="keep the dumps in this directory")
    ap.add_argument("--flags", default="", help="extra libtpu flags")
    ap.add_argument(
        "--all-kernels", action="store_true", help="also run XLA's own fusions' listings"
    )
    ap.add_argument("--max-seconds", type=float, default=120.0, help="per kernel, then extrapolate")
    a = ap.parse_args(argv)
    rep = analyze(
        a.factory,
        a.topology,
        json.loads(a.kw),
        paths=a.path,
        flags=a.flags,
        keep=a.keep,
        all_kernels=a.all_kernels,
        max_s=a.max_seconds,
    )
    if a.json == "-":
        print(json.dumps(rep, indent=1))
    else:
        if a.json:
            with open(a.json, "w") as f:
                json.dump(rep, f, indent=1)
        print(table(rep))
    return 0 if rep.get("ok") else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BrokenPipeError:  # output cut short by a pager
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(1)
