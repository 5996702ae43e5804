"""Compiles functions for a GPU that is not here, in a process of their own."""

import json
import os
import subprocess
import sys

import pytest

from tools import gpu_static

CHILD = """
import json, sys
import jax, jax.numpy as jnp
from pallas_kernels import *
from tools import gpu_static

S = jax.ShapeDtypeStruct
target, definitions, cases = json.loads(sys.stdin.read())
exec(definitions)
for name, *arguments in cases:
    print(json.dumps(gpu_static.analyze(*globals()[name](*arguments), target, spills=False)))
"""


def compiled_for_gpu(target, definitions, cases):
    """A report of `tools.gpu_static` for each case, `[name of a definition, *arguments]`.

    A definition returns a function and what it is called with. Spills are errors.
    """
    if (reason := gpu_static.why_not()) is not None:
        pytest.skip(reason)
    done = subprocess.run(
        [sys.executable, "-c", CHILD],
        input=json.dumps([target, definitions, cases]),
        env=os.environ | dict(JAX_PLATFORMS="cpu", XLA_FLAGS="", TF_CPP_MIN_LOG_LEVEL="3"),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]
