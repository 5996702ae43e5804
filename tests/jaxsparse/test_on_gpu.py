"""What the core becomes on a GPU: compiled for an H100 that is not here."""

import json
import os
import re
import subprocess
import sys

import pytest

from tools import gpu_static

CHILD = """
import json, sys
import jax, jax.numpy as jnp, optax
import jaxsparse
from jax.sharding import SingleDeviceSharding
from jaxsparse.selection import topk_masks
from tools.gpu_static import as_if_on, devices

S, (device,) = jax.ShapeDtypeStruct, devices("h100")
leaves = [S((4096, 4096), "float32"), S((4096, 1024), "float32"), S((1024,), "float32")]
select = lambda together: lambda *x: topk_masks(x, 99 if together else [99, 99, 9], together=together)
tx = jaxsparse.rigl(optax.adamw(1e-3), sparsity=0.9, total_steps=1000)
params = {name: S((4096, 4096), "float32") for name in "abc"}

def step(grads, state, params):
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

def compiled(function, *args):
    put = lambda x: S(x.shape, x.dtype, sharding=SingleDeviceSharding(device))
    with as_if_on(device):
        program = jax.jit(function).lower(*jax.tree.map(put, args)).compile()
    print(json.dumps([program.memory_analysis().temp_size_in_bytes, program.as_text()]))

{
    "selection": lambda: [compiled(select(together), *leaves) for together in (False, True)],
    "rigl": lambda: compiled(step, params, jax.eval_shape(tx.init, params), params),
}[sys.argv[1]]()
"""


@pytest.mark.slow
@pytest.mark.parametrize("what", ["selection", "rigl"])
def test_without_sort_or_host_or_64_bits_and_with_temporaries_below_one_leaf(what):
    if (reason := gpu_static.why_not()) is not None:
        pytest.skip(reason)
    done = subprocess.run(
        [sys.executable, "-c", CHILD, what],
        env=os.environ | dict(JAX_PLATFORMS="cpu", XLA_FLAGS="", TF_CPP_MIN_LOG_LEVEL="3"),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    programs = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(programs) == (2 if what == "selection" else 1)
    for temporaries, text in programs:
        assert temporaries < 4096 * 4096 * 4  # of one leaf, in bytes
        assert " fusion(" in text
        assert not re.search(r" sort\(|cub|infeed|outfeed| send\(| recv\(|S\(5\)", text)
        assert not re.search(r"\b[suf]64\[", text)
        assert "custom_call_target" not in text
    if what == "rigl":  # the step and the update are one program
        assert " conditional(" in programs[0][1]
