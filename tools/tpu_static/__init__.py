"""What the real TPU compiler says about a JAX function, without a TPU.

Give it a factory ``module:function`` returning ``(fn, args)`` and a topology
name.  It compiles ``fn`` ahead of time for that TPU with libtpu's own compiler
(XLA and Mosaic, i.e. Pallas TPU kernels included), then reads the compiler's
dumps and reports memory, XLA's cost figures, collectives, and for every Mosaic
kernel its loops, its cycles, what its MXUs do, its HBM traffic and its spills.

    python -m tools.tpu_static mypkg.bench:make_bsr --topology v5e:2x2 --kw '{"nnz": 64}'
    python -m tools.tpu_static path/to/file.py:make_bsr --json out.json

    from tools.tpu_static import analyze
    r = analyze("mypkg.bench:make_bsr", topology="v5e:2x2", kwargs={"nnz": 64})

The factory may return ``(fn, args)`` or ``(fn, args, meta)``.  ``args`` are
``jax.ShapeDtypeStruct``s or concrete arrays; one without a sharding is put on
the first device.  Concrete integer arrays that reach a kernel as scalar-prefetch
operands are also used to run the kernel's scalar code (see "cycles").  ``meta``
may hold ``useful_flops``, from which ``useful`` (efficiency against the device's bf16 peak, cycles per
128x128x128 tile of useful work) is computed.  If the factory has a parameter ``devices`` it is given the
topology's device list, for sharded programs.

How a kernel's cycles are found
-------------------------------
The dump ``*-packed-bundles-post-ra.txt`` is the compiler's final schedule, after
register allocation, with every latency spelled out as an empty bundle: one line
is one cycle of one TensorCore.  (``*-final_bundles.txt`` is the same code after
the empty bundles have been handed to the hardware's interlocks: counting final
bundles underestimates the cycles, by 1.1x for big tiles and 1.7x for small ones.)  `program`
translates the scalar half of that listing (address arithmetic, predicates,
branches, SMEM, DMA starts and waits) to Python and executes it, grid loop and
all, counting cycles and instructions along the path really taken.  So
``pl.when`` regions, pipeline prologue and epilogue, skipped copies of revisited
blocks and (where the scalar-prefetch operands were given as concrete arrays)
data-dependent block lists are counted as they would run.  What cannot be known
(a scalar that comes from a vector, an unbound operand) is "unknown"; an unknown
branch is taken as "run the region", an unknown copy as "copy", and counted in
``unknown_branches``.

Three totals come out:
  cycles          schedule only, every DMA arriving in time
  cycles_hbm      max(cycles, HBM bytes / HBM bandwidth): the roofline floor
  cycles_dma      HBM bandwidth shared equally by the DMAs under way, plus a fixed
                  latency each; a wait stalls until the DMA it waits for has ended

Trust, figure by figure
-----------------------
exact     compiles / the compiler's message; argument, output, temp bytes; VMEM a
          kernel asks for; code size; spills and fills (static counts); collectives
          and their shapes; number of MXU instructions; number of DMAs and bytes
          moved, if ``unknown_branches`` is empty.
good      ``cycles``, and ``cycles_dma`` of compute-bound kernels.  By hand: the MXU
          instructions of 128, 256 and 512 tiles are M*N*K / (16 rows x mxu^2), each
          holds an MXU 16 cycles (v4, v5) or 8 (v6e, v7x), which is the published
          peak.  Against public hardware figures: TPU
          v4, three small matmuls read by the chip's own cycle counter: a constant
          18 or 19 cycles of bracket apart; v5e, eleven grouped matmuls with
          data-dependent grids: median 1.4% off, ten within 4.5%, nearly all low;
          v5e, dense matmuls and one with a block-sparse output: within 5%; v7x
          attention: mostly 9 to 16% low, copies around the kernel included, the
          clock being a guess.
fair      ``cycles_dma`` of memory-bound kernels: the bandwidth is the data-sheet peak
          and one latency (0.44 us, fitted to one public v5e timing of 32 KiB
          copies) serves all chips.  Expect it 5 to 15% low on long streams, more on
          small strided copies.
fair      XLA's ``estimated_cycles``: XLA's cost model, not a schedule.  Within 10% of
          the schedule for big matmuls, 2x out either way on fusions that stream
          memory, absent (``without_estimate``) for sorts, some loops, collectives.
          ``optimal_seconds`` has the same source, leaves Mosaic kernels out, and can
          be a meaningless negative number.
weak      chip against chip; one core of a two-core chip (``split_over_cores`` says
          whether the compiler split the kernel); anything about ICI time.
none      launch and dispatch overhead, clock throttling, HBM refresh and contention
          between programs, host time, numerics.

So: compare two kernels compiled by the same libtpu for the same chip, read ratios
rather than milliseconds, and look at the table again when libtpu changes.

No TPU and no device lock are used, so it runs beside other users of libtpu.

The files, in the order of the work: `compiling` (a process that compiles and dumps), `prefetch` (what the kernels
of a function are given), `hlo` and `bundles` (readers of the dumps), `program` (a listing made executable, with
`unknown` values), `memory` (the DMA model), `simulate` (the run), `analyze` (the report), `table` (the report as
text), `chips` (figures of the hardware).
"""

from tools.tpu_static.analyze import analyze
from tools.tpu_static.chips import CHIPS, Chip
from tools.tpu_static.hlo import parse_hlo

__all__ = ["CHIPS", "Chip", "analyze", "parse_hlo"]
