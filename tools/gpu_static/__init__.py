"""What the real GPU compiler says about a JAX function, without a GPU.

XLA and Triton (Pallas kernels included) compile it ahead of time for a described H100 or A100; the
report has the bytes of the program, the launches with their grid and shared memory, and for every
kernel its registers, spills and instructions. Needs the extra `gpu-static`
(`pip install --no-deps jax-cuda12-pjrt nvidia-cuda-nvcc-cu12`, the first in the version of jax) and
`JAX_PLATFORMS=cpu`: the plugin then registers without a driver. Seconds a kernel.

    python -m tools.gpu_static mypkg.bench:make --target h100 --kw '{"n": 512}' --no-spills

    from tools.gpu_static import analyze
    report = analyze(function, arguments, target="a100")

The factory returns `(function, arguments)`, arrays or `jax.ShapeDtypeStruct`s; with a parameter
`devices` it is given the described devices, for sharded programs.

What the figures are worth
--------------------------
exact     compiles or the compiler's message; bytes of arguments, outputs, temporaries; grid, threads
          and shared memory of a launch (too much is an error of the compiler); collectives.
exact     registers and spills, if `ptxas` of the same major version assembles the code in the end.
static    instructions are counted in the text, not as often as they run: that a loop has tensor-core
          instructions is certain, how much time they take is not.
none      races between programs, numbers, time: a GPU is needed.

One process per target: the compiler keeps kernels between targets, and some casts end the process on
an A100. Devices below sm_80 (T4) take plain XLA programs only.
"""

from tools.gpu_static.analyze import TARGETS, analyze, as_if_on, devices, why_not

__all__ = ["TARGETS", "analyze", "as_if_on", "devices", "why_not"]
