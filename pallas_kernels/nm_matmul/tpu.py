"""N:M product for a few rows of x (decoding) as a Pallas TPU kernel.

No TPU has sparse matrix units: what N:M saves is bytes, and it pays where reading the weights is
what takes the time. The kernel reads values and packed codes of a tile of outputs, rebuilds the
weights of each place r of the groups in VMEM (select where the code is r), and multiplies them by
the columns r, M + r, 2M + r, ... of x, which are set apart before the kernel (x is small).
"""

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels._dispatch import target_platform
from pallas_kernels._formats import Array
from pallas_kernels._tpu import LANES, compiler_params, in_32_bits, result
from pallas_kernels.nm_matmul.format import NMSparse, code_bits

MAX_ROWS = 64  # beyond, the product is not bound by reading the weights


def why_not(x: Array, w: NMSparse, interpret: bool) -> str | None:
    """The reason why this kernel cannot multiply x by w, or None."""
    rows = x.size // x.shape[-1]
    groups = w.shape[0] // w.m
    unit = 8 * 32 // code_bits(w.m)
    if target_platform() != "tpu" and not interpret:
        return f"it runs on TPU, not on {target_platform()} (interpret=True emulates it)"
    if x.dtype != jnp.bfloat16:
        return f"it takes bfloat16, not {x.dtype}"
    if rows > MAX_ROWS:
        return f"it is made for up to {MAX_ROWS} rows of x, not {rows} (dense is faster there)"
    if w.share != 1:
        return f"it takes the element-wise form, not share={w.share}"
    if groups % unit or w.shape[1] % LANES:
        return (
            f"it takes a multiple of {unit * w.m} rows and 128 columns for m={w.m}, not {w.shape}"
        )
    if w.shape[0] > 1 << 15:
        return f"it takes up to {1 << 15} rows of w, so that a tile fits, not {w.shape[0]}"
    return None


@in_32_bits
def matmul(
    x: Array,
    w: NMSparse,
    *,
    precision: lax.PrecisionLike = None,
    out_dtype=None,
    interpret: bool = False,
) -> Array:
    """`x @ w` for `x [rows, in]`."""
    tokens, (_, width) = x.shape[0], w.shape
    out_dtype = jnp.dtype(out_dtype or x.dtype)
    x = jnp.pad(x, ((0, -tokens % 16), (0, 0)))
    groups, packed = w.values.shape[1], w.codes.shape[1]
    x = x.reshape(-1, groups, w.m).transpose(2, 0, 1)  # [m, rows, groups]
    # About a megabyte of values at a time: enough to hide the latency of reading them.
    most = max(LANES, (1 << 20) // (2 * w.n * groups))
    tile = next(t for t in range(most // LANES * LANES, 0, -LANES) if width % t == 0)
    y = pl.pallas_call(
        functools.partial(_kernel, m=w.m, precision=precision),
        grid=(width // tile,),
        in_specs=[
            pl.BlockSpec(x.shape, lambda t: (0, 0, 0)),
            pl.BlockSpec((w.n, groups, tile), lambda t: (0, 0, t)),
            pl.BlockSpec((w.n, packed, tile), lambda t: (0, 0, t)),
        ],
        out_specs=pl.BlockSpec((x.shape[1], tile), lambda t: (0, t)),
        out_shape=result((x.shape[1], width), out_dtype, x),
        scratch_shapes=[pltpu.VMEM((w.m, groups, tile), x.dtype)],
        name="nm_matmul",
        cost_estimate=pl.CostEstimate(
            flops=2 * x.shape[1] * w.shape[0] * width,
            transcendentals=0,
            bytes_accessed=w.values.size * 2 + w.codes.size * 4,
        ),
        compiler_params=compiler_params(("parallel",), 48 << 20),
        interpret=interpret,
    )(x, w.values, w.codes)
    return y[:tokens]


def _kernel(x_ref, values_ref, codes_ref, y_ref, weights_ref, *, m, precision):
    n, rows = codes_ref.shape[:2]
    bits = code_bits(m)
    for part in range(32 // bits):  # the codes of one run of groups
        at = slice(part * rows, (part + 1) * rows)
        codes = [(codes_ref[p] >> (part * bits)) & ((1 << bits) - 1) for p in range(n)]
        values = [values_ref[p, at].astype(jnp.float32) for p in range(n)]
        for r in range(m):
            total = jnp.where(codes[0] == r, values[0], 0.0)
            for p in range(1, n):
                total = jnp.where(codes[p] == r, values[p], total)
            weights_ref[r, at] = total.astype(weights_ref.dtype)
    y = jnp.zeros(y_ref.shape, jnp.float32)
    for r in range(m):
        y += jnp.dot(
            x_ref[r], weights_ref[r], precision=precision, preferred_element_type=jnp.float32
        )
    y_ref[...] = y.astype(y_ref.dtype)
