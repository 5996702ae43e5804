#!/usr/bin/env python3
# ruff: noqa: SIM115, B007, B023, UP031, UP032
# pyright: basic, reportOperatorIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportOptionalMemberAccess=false, reportAssignmentType=false, reportGeneralTypeIssues=false, reportIndexIssue=false
"""tpu_static: what the real TPU compiler says about a JAX function, without a TPU.

Give it a factory ``module:function`` returning ``(fn, args)`` and a topology
name.  It compiles ``fn`` ahead of time for that TPU with libtpu's own compiler
(XLA and Mosaic, i.e. Pallas TPU kernels included), then reads the compiler's
dumps and reports memory, XLA's cost figures, collectives, and for every Mosaic
kernel its loops, its cycles, what its MXUs do, its HBM traffic and its spills.

    python tpu_static.py mypkg.bench:make_bsr --topology v5e:2x2 --kw '{"nnz": 64}'
    python tpu_static.py path/to/file.py:make_bsr --json out.json

    from tpu_static import analyze
    r = analyze("mypkg.bench:make_bsr", topology="v5e:2x2", kwargs={"nnz": 64})

The factory may return ``(fn, args)`` or ``(fn, args, meta)``.  ``args`` are
``jax.ShapeDtypeStruct``s or concrete arrays; one without a sharding is put on
the first device.  Concrete integer arrays that reach a kernel as scalar-prefetch
operands are also used to run the kernel's scalar code (see "cycles").  ``meta``
may hold ``useful_flops``, from which ``useful`` (efficiency against the device's
bf16 peak, cycles per 128x128x128 tile of useful work) is computed.  If the factory has a parameter ``devices`` it is given the topology's device list, for
sharded programs.

How a kernel's cycles are found
-------------------------------
The dump ``*-packed-bundles-post-ra.txt`` is the compiler's final schedule, after
register allocation, with every latency spelled out as an empty bundle: one line
is one cycle of one TensorCore.  (``*-final_bundles.txt`` is the same code after
the empty bundles have been handed to the hardware's interlocks: counting final
bundles underestimates the cycles, by 1.1x for big tiles and 1.7x for small ones.)  This module
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
          peak.  Against public hardware figures (TPU_STATIC.md has the table): TPU
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
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import importlib
import importlib.util
import inspect
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time

VERSION = 1

# Public per-TensorCore figures (as in jax's TpuInfo); rows x mxu^2 x mxus x 2 x clock
# is the bf16 peak.  v7x: the clock is inferred from the peak.
CHIPS = {
    "TPU v4": dict(
        gen="v4",
        cores=2,
        mxus=4,
        mxu=128,
        rows=1,
        clock=1.05e9,
        hbm=1.23e12 / 2,
        vmem=16 << 20,
        granule=512,
    ),
    "TPU v5 lite": dict(
        gen="v5e", cores=1, mxus=4, mxu=128, rows=1, clock=1.5e9, hbm=8.2e11, vmem=128 << 20
    ),
    "TPU v5": dict(
        gen="v5p", cores=2, mxus=4, mxu=128, rows=1, clock=1.75e9, hbm=2.46e12 / 2, vmem=64 << 20
    ),
    "TPU v6 lite": dict(
        gen="v6e", cores=1, mxus=2, mxu=256, rows=2, clock=1.75e9, hbm=1.64e12, vmem=128 << 20
    ),
    "TPU7x": dict(
        gen="v7x", cores=2, mxus=2, mxu=256, rows=2, clock=2.2e9, hbm=7.4e12 / 2, vmem=64 << 20
    ),
}
DMA_LATENCY_S = 0.44e-6  # fitted, see the docstring
GRANULE = 32  # bytes per DMA granule in the listings (v4: see CHIPS)
DELAY_SLOTS = 4  # bundles executed after a branch before it takes effect
DUMP_FILTER = (
    "packed-bundles-post-ra|final_bundles|utilization|static-bundle-profile|post-delay-converter"
)


# --------------------------------------------------------------------------
# Child: compile, write meta.json and module.hlo into the dump directory.
# --------------------------------------------------------------------------


def _load_factory(spec):
    mod, _, fn = spec.rpartition(":")
    if not mod:
        raise ValueError("factory must be module:function or file.py:function")
    if mod.endswith(".py"):
        sys.path.insert(0, os.path.dirname(os.path.abspath(mod)))
        s = importlib.util.spec_from_file_location("_tpu_static_target", mod)
        m = importlib.util.module_from_spec(s)
        sys.modules["_tpu_static_target"] = m
        s.loader.exec_module(m)
    else:
        m = importlib.import_module(mod)
    for part in fn.split("."):
        m = getattr(m, part)
    return m


def _find_kernels(closed, flat_args):
    """Walk the jaxpr; for each pallas_call give its static facts and, where they
    can be computed from the concrete arguments, its scalar-prefetch values."""
    import jax
    import numpy as np
    from jax.extend.core import Literal

    out = []
    UNK = None

    def size(v):
        return int(np.prod(getattr(v, "shape", ()) or (1,)))

    def subjaxprs(e):
        for v in e.params.values():
            for w in v if isinstance(v, (tuple, list)) else (v,):
                if hasattr(w, "eqns") or hasattr(w, "jaxpr"):
                    yield w.jaxpr if hasattr(w, "jaxpr") else w

    def has_kernel(e):
        return e.primitive.name == "pallas_call" or any(
            has_kernel(q) for j in subjaxprs(e) for q in j.eqns
        )

    def sub(p):
        for k in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
            if k in p:
                return p[k]
        return None

    def walk(jaxpr, consts, vals):
        env = {}

        def read(a):
            if isinstance(a, Literal):
                return a.val
            return env.get(a, UNK)

        for v, c in zip(jaxpr.constvars, consts):
            env[v] = c
        for v, c in zip(jaxpr.invars, vals):
            env[v] = c
        for e in jaxpr.eqns:
            name, ins, res = e.primitive.name, [read(a) for a in e.invars], None
            if name == "pallas_call":
                out.append(describe(e, ins))
            elif (
                all(i is not UNK for i in ins)
                and not has_kernel(e)
                and all(size(v.aval) <= 1 << 24 for v in e.outvars)
            ):
                try:
                    res = jax.jit(
                        lambda *a, e=e: (
                            e.primitive.bind(
                                *e.primitive.get_bind_params(e.params)[0],
                                *a,
                                **e.primitive.get_bind_params(e.params)[1],
                            )
                            if name.startswith("custom_")
                            else e.primitive.bind(*a, **e.params)
                        )
                    )(*ins)
                    if not e.primitive.multiple_results:
                        res = [res]
                except Exception:
                    res = None
            elif name in (
                "scan",
                "while",
                "cond",
                "shard_map",
                "custom_vjp_call",
                "custom_jvp_call",
                "custom_vjp_call_jaxpr",
            ):
                for v in e.params.values():
                    for w in v if isinstance(v, (tuple, list)) else (v,):
                        if not (hasattr(w, "eqns") or hasattr(w, "jaxpr")):
                            continue
                        j = w.jaxpr if hasattr(w, "jaxpr") else w
                        n = len(j.invars)
                        known = (
                            ins
                            if (
                                n == len(ins) and name not in ("scan", "while", "cond", "shard_map")
                            )
                            else [UNK] * n
                        )
                        r = walk(j, getattr(w, "consts", ()), known)
                        if known is ins:
                            res = r
                            break
            elif sub(e.params) is not None:
                w = sub(e.params)
                j = w.jaxpr if hasattr(w, "jaxpr") else w
                if len(j.invars) == len(ins):
                    res = walk(j, getattr(w, "consts", ()), ins)
            for i, v in enumerate(e.outvars):
                env[v] = res[i] if res is not None else UNK
        return [read(a) for a in jaxpr.outvars]

    def describe(e, ins):
        p = e.params
        gm = p["grid_mapping"]
        nd = getattr(gm, "num_dynamic_grid_bounds", 0)
        ni = gm.num_index_operands
        blocks = []
        for bm in gm.block_mappings:
            shp = []
            for b in bm.block_shape:
                b = getattr(b, "block_size", b)
                shp.append(b if isinstance(b, int) else None)
            blocks.append(dict(block=shp))
        scratch = []
        for a in getattr(gm, "scratch_avals", ()):
            scratch.append(str(a))
        prefetch = {}
        for i, v in enumerate(ins):  # any small integer operand may end up in SMEM
            if v is None:
                continue
            try:
                a = np.asarray(v)
            except Exception:
                continue
            if a.size <= 1 << 22 and a.dtype.kind in "iub":
                prefetch[i] = a
        nm = p.get("name") or ""
        if not nm:
            ni_ = p.get("name_and_src_info")
            nm = getattr(ni_, "name", "") if ni_ is not None else ""
        if not nm:
            nm = getattr(getattr(p["jaxpr"], "debug_info", None), "func_name", "") or "kernel"
        return dict(
            name=str(nm),
            grid=[g if isinstance(g, int) else None for g in gm.grid],
            num_prefetch=ni,
            num_dynamic=nd,
            blocks=blocks,
            scratch=scratch,
            operands=[str(getattr(a, "aval", a)) for a in e.invars],
            cost_estimate=str(p.get("cost_estimate")),
            _prefetch=prefetch,
        )

    try:
        walk(closed.jaxpr, closed.consts, flat_args)
    except Exception as err:  # a report without kernel facts is still a report
        out.append(dict(error=f"{type(err).__name__}: {err}"))
    return out


def _child(job):
    t0 = time.time()
    out = dict(ok=False)
    work = job["work"]
    try:
        sys.path[:0] = job.get("paths", [])
        import jax
        import numpy as np
        from jax.experimental import topologies
        from jax.sharding import SingleDeviceSharding

        out["jax"] = jax.__version__
        try:
            import importlib.metadata as im

            out["libtpu"] = im.version("libtpu")
        except Exception:
            pass
        topo = topologies.get_topology_desc(platform="tpu", topology_name=job["topology"])
        dev = topo.devices[0]
        out.update(device_kind=dev.device_kind, num_devices=len(topo.devices))
        factory = _load_factory(job["factory"])
        kw = dict(job.get("kwargs") or {})
        if "devices" in inspect.signature(factory).parameters:
            kw["devices"] = topo.devices

        @contextlib.contextmanager
        def as_tpu():
            """Let code that asks for the device kind at trace time see the target."""
            try:
                from jax.sharding import AbstractMesh, Mesh, use_abstract_mesh

                one = Mesh(np.array([dev]), ("_",)).abstract_mesh
                ctx = use_abstract_mesh(AbstractMesh((), (), abstract_device=one.abstract_device))
            except Exception:
                ctx = contextlib.nullcontext()
            with ctx:
                yield

        with as_tpu():
            r = factory(**kw)
        fn, args = r[0], r[1]
        out["meta"] = r[2] if len(r) > 2 else {}
        rep = SingleDeviceSharding(dev)

        def spec(a):
            sh = getattr(a, "sharding", None) if isinstance(a, jax.ShapeDtypeStruct) else None
            a_ = a if hasattr(a, "dtype") else np.asarray(a)
            return jax.ShapeDtypeStruct(a_.shape, a_.dtype, sharding=sh or rep)

        specs = jax.tree.map(spec, args)
        flat = [None if isinstance(a, jax.ShapeDtypeStruct) else a for a in jax.tree.leaves(args)]
        out["setup_s"] = time.time() - t0
        t1 = time.process_time()  # of the processor: other work on the machine does not count
        jitted = fn if hasattr(fn, "lower") else jax.jit(fn)
        with as_tpu():
            lowered = jitted.lower(*specs)
        compiled = lowered.compile()
        out["compile_s"] = time.process_time() - t1
        text = compiled.as_text()
        with open(os.path.join(work, "module.hlo"), "w") as f:
            f.write(text)
        ma = compiled.memory_analysis()
        out["memory"] = {
            k: int(getattr(ma, k + "_size_in_bytes"))
            for k in ("argument", "output", "temp", "alias", "generated_code")
        }
        ca = compiled.cost_analysis() or {}
        if isinstance(ca, (list, tuple)):
            ca = ca[0] if ca else {}
        out["xla_cost"] = {
            k: float(ca[k])
            for k in ("flops", "bytes accessed", "optimal_seconds", "transcendentals")
            if k in ca
        }
        out["ok"] = True
        try:
            with as_tpu():
                closed = jax.make_jaxpr(fn)(*specs)
            ks = _find_kernels(closed, flat)
        except Exception as err:
            ks = [dict(error=f"{type(err).__name__}: {err}")]
        for i, k in enumerate(ks):
            pf = k.pop("_prefetch", {})
            k["bound_prefetch"] = sorted(pf)
            if pf:
                np.savez(
                    os.path.join(work, f"prefetch_{i}.npz"), **{str(a): v for a, v in pf.items()}
                )
        out["pallas_calls"] = ks
    except Exception as err:
        out["error"] = f"{type(err).__name__}: {err}"[:20000]
    with open(os.path.join(work, "meta.json"), "w") as f:
        json.dump(out, f)


# --------------------------------------------------------------------------
# HLO text: estimated cycles, collectives, Mosaic calls.
# --------------------------------------------------------------------------

_DT = {
    "pred": 1,
    "s4": 0.5,
    "u4": 0.5,
    "s8": 1,
    "u8": 1,
    "s16": 2,
    "u16": 2,
    "bf16": 2,
    "f16": 2,
    "s32": 4,
    "u32": 4,
    "f32": 4,
    "s64": 8,
    "u64": 8,
    "f64": 8,
    "c64": 8,
}
_COLL = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "ragged-all-to-all",
    "collective-broadcast",
)


def _shape_bytes(s):
    n = 0
    for dt, dims in re.findall(r"\b([a-z]+\d*\w*)\[([\d,]*)\]", s):
        if dt in _DT or dt.startswith("f8"):
            k = 1
            for d in filter(None, dims.split(",")):
                k *= int(d)
            n += k * _DT.get(dt, 1)
    return int(n)


def _trip_count(line, comps):
    """A while loop `i < constant`, taken to count up from 0 by 1 as scan does."""
    c = re.search(r"condition=%?([\w.\-]+)", line)
    body = " ".join(comps.get(c.group(1), {}).get("lines", [])) if c else ""
    m = re.search(r"ROOT .*? compare\(%?([\w.\-]+), %?([\w.\-]+)\), direction=LT", body)
    k = re.search(r"%?" + re.escape(m.group(2)) + r" = \S+ constant\((\d+)\)", body) if m else None
    return int(k.group(1)) if k else None


_COSTLY = (
    "fusion",
    "sort",
    "scatter",
    "gather",
    "convolution",
    "dot",
    "reduce",
    "reduce-window",
    "select-and-scatter",
    "cholesky",
    "triangular-solve",
    "fft",
    "copy",
    "transpose",
)


def parse_hlo(text):
    """XLA's own estimate, multiplied by known trip counts of while loops."""
    comps, cur = {}, None
    for line in text.splitlines():
        m = re.match(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$", line)
        if m:
            cur = m.group(2)
            comps[cur] = dict(entry=bool(m.group(1)), lines=[])
        elif line == "}" or line.startswith("} //"):
            cur = None
        elif cur:
            ls = comps[cur]["lines"]
            if ls and not re.match(r"\s+(?:ROOT )?%?[\w.\-]+ = ", line):
                ls[-1] += " " + line.strip()  # attributes may span lines
            else:
                ls.append(line)
    entry = next((c for c, v in comps.items() if v["entry"]), None)
    tot = dict(
        estimated_cycles=0, instructions_with_cycles=0, unknown_trip_loops=0, without_estimate=0
    )
    colls, mosaic, items, mult_of, est_of = [], [], [], {}, {}
    seen = set()

    def visit(name, mult):
        if name not in comps:
            return
        seen.add(name)
        for line in comps[name]["lines"]:
            m = re.match(r"\s*(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\(", line)
            if not m:
                continue
            nm, shape, op = m.groups()
            mult_of[nm] = mult_of.get(nm, 0) + mult
            ec = re.search(r'"estimated_cycles":"?(\d+)', line)
            if ec:
                c = int(ec.group(1))
                if c > 1 << 50:  # XLA's "no estimate" (a saturated 64-bit integer)
                    tot["without_estimate"] += 1
                    c = 0
                est_of[nm] = est_of.get(nm, 0) + c * mult
                tot["estimated_cycles"] += c * mult
                tot["instructions_with_cycles"] += 1
                items.append((c * mult, nm, op, mult))
            elif op in _COSTLY and "S(6)" not in shape:
                tot["without_estimate"] += 1
            base = op[:-6] if op.endswith("-start") else op
            if base in _COLL:
                g = re.search(r"replica_groups=(\{\{.*?\}\}|\[[^ ]*)", line)
                b = _shape_bytes(shape)
                if op.endswith("-start"):
                    b = _shape_bytes(shape.split(")")[0].split(",", 1)[-1]) if "(" in shape else b
                colls.append(
                    dict(
                        name=nm,
                        op=base,
                        shape=re.sub(r"\{[^}]*\}", "", shape)[:120],
                        bytes=b,
                        times=mult,
                        groups=g.group(1)[:80] if g else None,
                        estimated_cycles=int(ec.group(1)) if ec else None,
                    )
                )
            if 'custom_call_target="tpu_custom_call"' in line:
                vm = re.search(r'"used_scoped_memory_configs":\[(.*?)\]', line)
                mem = {}
                if vm:
                    for sp, sz in re.findall(
                        r'"memory_space":"(\d+)","offset":"\d+","size":"(\d+)"', vm.group(1)
                    ):
                        mem[sp] = mem.get(sp, 0) + int(sz)
                mosaic.append(dict(name=nm, vmem_bytes=mem.get("1"), times=mult))
            if op == "while":
                b = re.search(r"body=%?([\w.\-]+)", line)
                t = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', line)
                n = int(t.group(1)) if t else _trip_count(line, comps)
                if n is None:
                    tot["unknown_trip_loops"] += 1
                if b:
                    visit(b.group(1), mult * (1 if n is None else n))
            elif op == "conditional":
                for b in re.findall(
                    r"(?:branch_computations=\{|true_computation=|false_computation=)"
                    r"([^,}]*(?:,[^,}]*)*)",
                    line,
                ):
                    for c in re.findall(r"%?([\w.\-]+)", b):
                        visit(c, mult)
            elif op in ("call", "async-start"):
                b = re.search(r"(?:to_apply|calls)=%?([\w.\-]+)", line)
                if b:
                    visit(b.group(1), mult)

    if entry:
        visit(entry, 1)
    items.sort(reverse=True)
    return dict(
        **tot,
        top=[dict(cycles=c, name=n, op=o, times=t) for c, n, o, t in items[:12]],
        collectives=colls,
        mosaic=mosaic,
        mult_of=mult_of,
        est_of=est_of,
    )


# --------------------------------------------------------------------------
# Bundle listing.
# --------------------------------------------------------------------------


class Op:
    __slots__ = ("dest", "reg", "opcode", "guard", "args", "raw", "note")


class Bundle:
    __slots__ = ("addr", "mark", "depth", "ops")


_HEAD = re.compile(r"^ *(0x[0-9a-f]+|0) +(?:([A-Z]{2}) *)?: *((?:> *)*)\{", re.M)
_OP = re.compile(r"%(\w+) = ([a-zA-Z][\w.\-]*)\s*(.*)$", re.S)
_NAMED = re.compile(r"/\*(size_in_granules|dst_syncflagno)=\*/\s*(\S+?)(?=[,\s]|$)")


def _strip_comments(s):
    """Remove /* ... */, which nest in these listings.  Returns text, comments."""
    out, notes, depth, i, start = [], [], 0, 0, 0
    for m in re.finditer(r"/\*|\*/", s):
        if m.group() == "/*":
            if depth == 0:
                out.append(s[i : m.start()])
                start = m.end()
            depth += 1
        elif depth:
            depth -= 1
            if depth == 0:
                notes.append(s[start : m.start()])
                i = m.end()
    if depth == 0:
        out.append(s[i:])
    return "".join(out), " ".join(notes)


def parse_bundles(text):
    k = text.find("= control target key end")
    text = text[k + len("= control target key end") :] if k >= 0 else text
    heads = list(_HEAD.finditer(text))
    out = []
    for i, h in enumerate(heads):
        body = text[h.end() : heads[i + 1].start() if i + 1 < len(heads) else len(text)]
        b = Bundle()
        b.addr, b.mark, b.depth, b.ops = int(h.group(1), 16), h.group(2), h.group(3).count(">"), []
        for raw in _split_ops(body):
            txt, note = _strip_comments(raw)
            m = _OP.match(txt.strip())
            if not m:
                continue
            o = Op()
            o.dest, o.opcode, rest, o.note, o.raw = m.group(1), m.group(2), m.group(3), note, raw
            r = re.search(r"_((?:s|p|v|vm)\d+)$", o.dest)
            o.reg = r.group(1) if r else None
            rest = re.sub(r"^\[thread:\$?\d+\]\s*", "", rest.strip())
            g = re.match(r"\((!?)%\w*?_?(p\d+)(?:,\s*[^()]*)?\)\s*,?\s*", rest)
            o.guard = (g.group(1), g.group(2)) if g else None
            if g:
                rest = rest[g.end() :]
            elif o.opcode == "sld":  # loads carry their predicate last
                g = re.search(r"\s*\((!?)%\w*?_?(p\d+)\)\s*$", rest)
                if g:
                    o.guard, rest = (g.group(1), g.group(2)), rest[: g.start()]
            o.args = rest
            b.ops.append(o)
        out.append(b)
    return out


def _split_ops(body):
    """Cut a bundle's text at top-level ';;', dropping what follows its '}'."""
    parts, depth, brace, last = [], 0, 0, 0
    for m in re.finditer(r"/\*|\*/|;;|\{|\}", body):
        t = m.group()
        if t == "/*":
            depth += 1
        elif t == "*/":
            depth = max(0, depth - 1)
        elif depth:
            continue
        elif t == ";;":
            parts.append(body[last : m.start()])
            last = m.end()
        elif t == "{":
            brace += 1
        elif brace:
            brace -= 1
        else:
            parts.append(body[last : m.start()])
            return parts
    parts.append(body[last:])
    return parts


# --------------------------------------------------------------------------
# Scalar execution of the listing.
# --------------------------------------------------------------------------


class _Unknown:
    """Absorbs arithmetic; as a bool it reads True and is counted."""

    hits = 0

    def _u(self, *_):
        return self

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = _u
    __lshift__ = __rlshift__ = __rshift__ = __rrshift__ = __xor__ = __rxor__ = _u
    __lt__ = __le__ = __gt__ = __ge__ = __eq__ = __ne__ = _u
    __neg__ = __floordiv__ = __rfloordiv__ = __mod__ = __rmod__ = _u
    __hash__ = object.__hash__

    def __and__(self, o):
        return o if (o is False or (o == 0 and o is not self)) else self

    __rand__ = __and__

    def __or__(self, o):
        return True if o is True else self

    __ror__ = __or__

    def __bool__(self):
        _Unknown.hits += 1
        return True

    def __repr__(self):
        return "?"


U = _Unknown()


def _N(p):
    return p if p is U else (not p)


def _SEL(p, a, b):
    if p is U:
        return a if (a is not U and b is not U and a == b) else U
    return a if p else b


def _U32(x):
    return x if x is U else x & 0xFFFFFFFF


def _S32(x):
    if x is U:
        return x
    x &= 0xFFFFFFFF
    return x - (1 << 32) if x & 0x80000000 else x


class _Dma:
    """HBM as one channel shared equally by the copies under way; each copy also
    takes a fixed latency.  Copies that do not touch HBM take the latency only."""

    def __init__(self, bytes_per_cycle, latency, granule=GRANULE):
        self.bpc, self.lat, self.granule = bytes_per_cycle, latency, granule
        self.now = 0.0
        self.active = []  # [bytes left, record]; record = [granules, end or None]
        self.flags = collections.defaultdict(collections.deque)
        self.n = collections.Counter()
        self.bytes = collections.Counter()
        self.stall = 0.0

    def _advance(self, t, until=None):
        """Drain the channel to time t, or until the given record has ended."""
        while self.active and (self.now < t or until is not None):
            if until is not None and until[1] is not None:
                return
            k = len(self.active)
            least = min(a[0] for a in self.active)
            dt = least * k / self.bpc
            if until is None and self.now + dt > t:
                d = (t - self.now) * self.bpc / k
                for a in self.active:
                    a[0] -= d
                self.now = t
                return
            self.now += dt
            rest = []
            for a in self.active:
                a[0] -= least
                if a[0] <= 1e-6:
                    a[1][1] = self.now + self.lat
                else:
                    rest.append(a)
            self.active = rest
        if until is None and self.now < t:
            self.now = t

    def start(self, t, kind, granules, flag):
        if granules is U:
            granules = 0
        b = granules * self.granule
        self.n[kind] += 1
        self.bytes[kind] += b
        rec = [granules, t + self.lat]
        if "hbm" in kind and b:
            self._advance(t)
            rec[1] = None
            self.active.append([b, rec])
        self.flags[flag if flag is not U else "?"].append(rec)

    def wait(self, t, flag, granules):
        q = self.flags.get(flag if flag is not U else "?")
        if not q:
            return 0.0
        self._advance(t)
        need = granules if granules is not U else 1 << 60
        done = t
        while q and need > 0:
            r = q[0]
            if r[1] is None:
                self._advance(self.now, r)
            done = max(done, r[1])
            if r[0] <= need:
                need -= r[0]
                q.popleft()
            else:
                r[0] -= need
                need = 0
        s = done - t
        self.stall += s
        return s


_CMP = dict(eq="==", ne="!=", lt="<", le="<=", gt=">", ge=">=")


class Kernel:
    """One kernel's listing, made executable."""

    def __init__(self, bundles, util_rows, unit_names, rates, mxus=4):
        self.b, self.mxus = bundles, mxus
        self.rows, self.units, self.rates = util_rows, unit_names, rates
        self.alloc = {}
        self.unknown_ops = collections.Counter()
        self._blocks()

    # -- static structure
    def _blocks(self):
        b = self.b
        self.index = {x.addr: i for i, x in enumerate(b)}
        self.branch = {}
        leaders = {0}
        for i, x in enumerate(b):
            for o in x.ops:
                if o.opcode.startswith("sbr"):
                    t = re.search(r"target bundleno = (\d+)", o.args)
                    tgt = int(t.group(1)) if t else None
                    ti = self.index.get(tgt) if tgt is not None else None
                    if ti is None and tgt is not None and tgt >= len(b):
                        ti = len(b)
                    self.branch[i] = (o.guard, ti)
                    if ti is not None and ti < len(b):
                        leaders.add(ti)
                    leaders.add(min(i + DELAY_SLOTS + 1, len(b)))
        leaders.discard(len(b))
        self.leaders = sorted(leaders)
        self.blocks = {}
        ls = set(leaders)
        for L in self.leaders:
            i = L
            while True:
                if i in self.branch:
                    end = min(i + DELAY_SLOTS, len(b) - 1)
                    self.blocks[L] = (end, i)
                    break
                if i + 1 >= len(b) or i + 1 in ls:
                    self.blocks[L] = (i, None)
                    break
                i += 1
        self.loops = []
        for i, (_g, t) in self.branch.items():
            if t is not None and t <= i:
                self.loops.append((t, min(i + DELAY_SLOTS, len(b) - 1), i))
        self.loops.sort(key=lambda l: (l[0], -l[1]))

    def loop_of(self, i):
        best = None
        for k, (s, e, _) in enumerate(self.loops):
            if s <= i <= e and (best is None or e - s < self.loops[best][1] - self.loops[best][0]):
                best = k
        return best

    def stats(self, lo, hi):
        """Instruction counts of bundles lo..hi inclusive."""
        c = collections.Counter()
        for i in range(lo, hi + 1):
            if i < len(self.rows):
                for n, v in zip(self.units, self.rows[i]):
                    if v:
                        c[n] += v
            for o in self.b[i].ops:
                op = o.opcode
                if op.startswith("vmatmul"):
                    kind = (
                        "x8"
                        if re.search(r"\.(s8|u8|f8|s4|u4)", op)
                        else "packed"
                        if ".bf16" in op and ".lmr" not in op
                        else "plain"
                    )
                    c["vmatmul_" + kind] += 1
                    m = re.search(r"mxu(\d)", op)
                    if m:
                        c["mxu{}_busy".format(m.group(1))] += self.rates[kind]
                    else:  # v7x names the accumulator only: share equally
                        for q in range(self.mxus):
                            c["mxu%d_busy" % q] += self.rates[kind] / self.mxus
                elif op.startswith("vmatpush"):
                    c["vmatpush"] += 1
        return c

    # -- code generation
    def _reg(self, name):
        m = re.search(r"_((s|p)(\d+))$", name)
        if not m:
            m = re.match(r"((s|p)(\d+))$", name)
        if not m:
            return "U"
        return ("S[%s]" if m.group(2) == "s" else "P[%s]") % m.group(3)

    def _base(self, sym):
        if sym not in self.alloc:
            self.alloc[sym] = (len(self.alloc) + 1) << 22
        return self.alloc[sym]

    def _val(self, a):
        a = a.strip()
        if a.startswith("%"):
            return self._reg(a[1:])
        if re.fullmatch(r"-?\d+", a):
            v = int(a)
            return str(v - (1 << 32) if v >= 1 << 31 else v)
        if re.fullmatch(r"\$?0x[0-9a-fA-F]+", a):
            return str(int(a.lstrip("$"), 16))
        m = re.fullmatch(r"\[(.*)\]", a, re.S)
        if m:
            return self._addr(m.group(1))
        if a.startswith("#allocation"):
            return str(self._base(a[1:]))
        if a in ("true", "false"):
            return a.capitalize()
        return "U"

    def _addr(self, s):
        s = s.strip()
        m = re.fullmatch(r"\w+:\[?(.*?)\]?", s, re.S)
        if m:
            s = m.group(1)
        terms = [self._val(t.strip().strip("[]")) for t in s.split("+") if t.strip()]
        return "(" + "+".join(terms) + ")" if terms else "U"

    def _split_args(self, s):
        out, depth, cur = [], 0, ""
        for ch in s:
            if ch in "[(":
                depth += 1
            elif ch in "])":
                depth -= 1
            if ch == "," and depth == 0:
                out.append(cur)
                cur = ""
            else:
                cur += ch
        if cur.strip():
            out.append(cur)
        return [x.strip() for x in out]

    def _expr(self, o):
        """Python expression for a scalar op's result, or None if it has none."""
        op, a = o.opcode, self._split_args(o.args)
        v = [self._val(x) for x in a]
        b2 = {"sadd": "+", "ssub": "-", "smul": "*", "sand": "&", "sor": "|", "sxor": "^"}
        root = op.split(".")[0]
        if op.startswith("scmp."):
            _, rel, ty = op.split(".")[:3]
            w = "_U32" if ty == "u32" else "_S32"
            if rel in ("eq", "ne"):
                w = "_U32"
            return f"({w}({v[0]}) {_CMP[rel]} {w}({v[1]}))"
        if root in b2 and len(v) >= 2:
            return f"({v[0]} {b2[root]} {v[1]})"
        if root == "sshll":
            return f"({v[0]} << {v[1]})"
        if root == "sshrl":
            return f"(_U32({v[0]}) >> {v[1]})"
        if root == "sshra":
            return f"({v[0]} >> {v[1]})"
        if root in ("smin", "smax"):
            f = "<" if root == "smin" else ">"
            w = "_U32" if ".u32" in op else ""
            return f"_SEL({w}({v[0]}) {f} {w}({v[1]}), {v[0]}, {v[1]})"
        if op == "smov" or op == "pmov":
            return v[-1]
        if op == "scalar_select":
            return f"_SEL({v[0]}, {v[1]}, {v[2]})"
        if root in ("por", "pand", "pxor", "pnand", "pnor") and len(v) >= 2:
            e = f"({v[0]} {'|' if 'or' in root and root != 'pxor' else '&' if 'and' in root else '^'} {v[1]})"
            return f"_N({e})" if root in ("pnand", "pnor") else e
        if root == "pneg":
            return f"_N({v[0]})"
        if op.startswith("scalar_lea"):
            return "(" + "+".join(v) + ")"
        if op.startswith("int_to_ptr"):
            m = re.search(r"%\w+$", o.args.strip())
            return self._val(m.group()) if m else "U"
        if op == "sld":
            if "core id" in o.note:
                return "0"
            return f"M.get({self._addr(o.args.strip()[1:-1])}, U)"
        if op.startswith("inlined_call_operand"):
            m = re.search(r"index: (\d+)", o.args)
            if m and "no memory space" in o.args:  # a scalar handed over in a register
                v = (self.operands or {}).get(int(m.group(1)))
                return str(int(v.reshape(-1)[0])) if v is not None and v.size == 1 else "U"
            # a recognisable base address; HBM addresses may be shifted left by 4 before use
            return str((1 << 52) + (int(m.group(1)) << 44)) if m else "U"
        if root in ("spop", "scalar_parameter_address", "sc", "reloc", "scvt", "srdreg"):
            return "U"
        if op == "sphi":
            return None
        return "?"

    def compile(self):
        src = ["def make(S,P,M,D,R,ev,U,_N,_SEL,_U32,_S32):"]
        names = []
        for L in self.leaders:
            end, br = self.blocks[L]
            body, _off, extra = [], 0, 0
            has_br = False
            for i in range(L, end + 1):
                t = i - L
                pre, post = [], []
                k = 0
                for o in self.b[i].ops:
                    op = o.opcode
                    g = None
                    if o.guard:
                        r = "P[{}]".format(o.guard[1][1:])
                        g = f"_N({r})" if o.guard[0] else r
                    if op.startswith("sbr"):
                        if i == br:
                            pre.append(f"br = {g if g else 'True'}")
                            has_br = True
                        continue
                    if op.startswith("dma.") and op != "dma.done.wait":
                        named = dict(_NAMED.findall(o.raw))
                        gran = self._val(named.get("size_in_granules", "0").rstrip(","))
                        flag = self._val(named.get("dst_syncflagno", "0").rstrip(","))
                        a = self._split_args(o.args)
                        srcv = self._val(a[0]) if a else "U"
                        dstv = self._val(a[2]) if len(a) > 2 else "U"
                        call = f"ev.dma({t}, {op[4:]!r}, {gran}, {flag}, {srcv}, {dstv}, {i})"
                        pre.append(f"if {g}: {call}" if g else call)
                        continue
                    if op == "dma.done.wait":
                        a = self._split_args(o.args)
                        call = f"ev.wait({t}, {self._val(a[0])}, {self._val(a[1]) if len(a) > 1 else 'U'})"
                        pre.append(f"if {g}: {call}" if g else call)
                        continue
                    if op == "sst":
                        m = re.match(
                            r"\[(.*?\]?)\]\s*(?:\((!?)%\w*?_(p\d+)\),?)?\s*(.*)$", o.args, re.S
                        )
                        if m:
                            if m.group(3):
                                r = "P[{}]".format(m.group(3)[1:])
                                g = f"_N({r})" if m.group(2) else r
                            pre.append(
                                f"a{k} = {self._addr(m.group(1))}; x{k} = {self._val(m.group(4).lstrip(', '))}"
                            )
                            st = f"M[a{k}] = x{k}"
                            if g:
                                pre.append(f"g{k} = {g}")
                                st = f"if g{k}: {st}"
                            post.append(st)
                            k += 1
                        continue
                    if op == "vdelay":
                        m = re.search(r"\d+", o.args)
                        extra += max(0, int(m.group()) - 1) if m else 0
                        continue
                    if not o.reg or o.reg[0] not in "sp":
                        continue
                    if op.startswith("v") and op not in ("vpush",):
                        # vector op with a scalar/predicate result
                        e = "U"
                    else:
                        e = self._expr(o)
                    if e is None:
                        continue
                    if e == "?":
                        self.unknown_ops[op] += 1
                        e = "U"
                    d = self._reg(o.dest)
                    if op.startswith("int_to_ptr"):
                        if e != d:
                            post.append(f"{d} = {e}")
                        continue
                    pre.append(f"x{k} = {e}")
                    if g:
                        pre.append(f"g{k} = {g}")
                        post.append(f"if g{k} is U: {d} = U")
                        post.append(f"elif g{k}: {d} = x{k}")
                    else:
                        post.append(f"{d} = x{k}")
                    k += 1
                body += pre + post
            body.append(f"ev.t += {end - L + 1 + extra}")
            nxt = end + 1
            if has_br:
                tgt = self.branch[br][1]
                tgt = len(self.b) if tgt is None else tgt
                if tgt <= br:  # back-edge: an unknown exit test ends the loop
                    body.append(f"return {tgt} if (br is not U and br) else ev.unk({nxt}, br)")
                else:  # an unknown skip runs the region
                    body.append(f"return {tgt} if (br is not U and br) else ev.unk({nxt}, br)")
            else:
                body.append(f"return {nxt}")
            names.append(f"f{L}")
            src.append(f"  def f{L}():")
            src += ["    " + s for s in body]
        src.append("  return {" + ",".join(f"{L}:f{L}" for L in self.leaders) + "}")
        ns = {}
        exec(compile("\n".join(src), "<bundles>", "exec"), ns)
        return ns["make"]

    def run(self, bpc, latency, operands=None, granule=GRANULE, max_blocks=20_000_000, max_s=120.0):
        """Execute.  operands: {operand index: numpy array} for SMEM operands."""
        self.operands = operands
        make = self.compile()
        S, P, M = [U] * 64, [U] * 32, {}
        dma = _Dma(bpc, latency, granule)

        class Ev:
            t = 0
            stall = 0.0
            unk_branches = collections.Counter()
            bound = {}

            def dma(self, off, kind, gran, flag, src, dst, i):
                dma.start(self.t + off + self.stall, kind, gran, flag)
                if kind.endswith("_to_smem") and src is not U and dst is not U:
                    sh = 48 if src >> 56 == 1 else 44
                    idx = (src >> sh) & 255
                    arr = (operands or {}).get(idx)
                    if arr is not None and src >> (sh + 8) == 1 and src & ((1 << sh) - 1) == 0:
                        for j, v in enumerate(_smem_words(arr)):
                            M[dst + j] = v
                        self.bound[idx] = True

            def wait(self, off, flag, gran):
                self.stall += dma.wait(self.t + off + self.stall, flag, gran)

            def unk(self, nxt, br):
                if br is U:
                    self.unk_branches[nxt] += 1
                return nxt

        ev = Ev()
        ev.unk_branches = collections.Counter()
        ev.bound = {}
        fns = make(S, P, M, dma, None, ev, U, _N, _SEL, _U32, _S32)
        nloops = len(self.loops)
        blk_loop = {L: self.loop_of(L) for L in self.leaders}
        back = {}
        for k, (s, e, i) in enumerate(self.loops):
            back[(i)] = k
        blk_back = {}
        for L, (end, br) in self.blocks.items():
            if br is not None and br in back:
                blk_back[L] = back[br]
        parents = {}
        for k, (s, e, _) in enumerate(self.loops):
            ps = [j for j, (a, c, _) in enumerate(self.loops) if j != k and a <= s and c >= e]
            parents[k] = ps
        cnt = collections.Counter()
        sig = [[] for _ in range(nloops)]
        mark = [None] * nloops
        paths = [dict() for _ in range(nloops)]
        iters = [0] * nloops
        pc, n, n_end, t_end = 0, 0, len(self.b), time.process_time() + max_s
        _Unknown.hits = 0
        trunc = False
        while pc < n_end:
            L = pc
            k = blk_loop[L]
            if k is not None:
                if mark[k] is None:
                    mark[k] = (ev.t, ev.stall)
                    for j in parents[k]:
                        if mark[j] is None:
                            mark[j] = (ev.t, ev.stall)
                if len(sig[k]) < 400:
                    sig[k].append(L)
            cnt[L] += 1
            pc = fns[L]()
            kb = blk_back.get(L)
            if kb is not None:
                key = tuple(sig[kb])
                c0, s0 = mark[kb]
                p = paths[kb].get(key)
                if p is None and len(paths[kb]) < 200:
                    paths[kb][key] = p = [0, 0, 0.0]
                if p is not None:
                    p[0] += 1
                    p[1] += ev.t - c0
                    p[2] += ev.stall - s0
                iters[kb] += 1
                sig[kb] = []
                mark[kb] = (ev.t, ev.stall) if pc == self.loops[kb][0] else None
            n += 1
            if n >= max_blocks or (n & 4095) == 0 and time.process_time() > t_end:
                trunc = True
                break
        total = collections.Counter()
        per_block = {}
        for L, c in cnt.items():
            end, _ = self.blocks[L]
            per_block[L] = st = self.stats(L, end)
            for u, v in st.items():
                total[u] += v * c
        # loops
        loops = []
        for k, (s, e, i) in enumerate(self.loops):
            if not iters[k]:
                loops.append(dict(start=s, end=e, bundles=e - s + 1, iterations=0))
                continue
            pl = []
            for key, (c, cyc, st) in sorted(paths[k].items(), key=lambda kv: -kv[1][1])[:4]:
                u = collections.Counter()
                for L in key:
                    u.update(per_block[L])
                busy = max((u[f"mxu{m}_busy"] for m in range(8)), default=0)
                cy = cyc / c
                own = sum(self.blocks[L][0] - L + 1 for L in key)
                pl.append(
                    dict(
                        times=c,
                        cycles=cy,
                        own_cycles=own,
                        stall=st / c,
                        mxu_busy=busy,
                        mxu_util=busy / cy if cy else 0,
                        vmatmul=sum(v for q, v in u.items() if q.startswith("vmatmul_")),
                        units={q: u[q] for q in self.units if u[q]},
                    )
                )
            ex = None
            for x in self.b[max(0, s) : e + 1]:
                for o in x.ops:
                    if "loop exit test" in o.note:
                        mm = re.search(r"(\d+)\s*$", o.args)
                        ex = int(mm.group(1)) if mm else None
            nest = sum(1 for j in parents[k])
            loops.append(
                dict(
                    start=s,
                    end=e,
                    bundles=e - s + 1,
                    depth=nest,
                    iterations=iters[k],
                    exit_constant=ex,
                    cycles=sum(p[1] for p in paths[k].values()),
                    paths=pl,
                )
            )
        busy = [total[f"mxu{m}_busy"] for m in range(8)]
        return dict(
            cycles=ev.t,
            stall=ev.stall,
            blocks_run=n,
            truncated=trunc,
            unknown_branches={
                hex(self.b[min(a, len(self.b) - 1)].addr): c for a, c in ev.unk_branches.items()
            },
            unknown_reads=_Unknown.hits,
            unknown_ops=dict(self.unknown_ops),
            dma_count=dict(dma.n),
            dma_bytes=dict(dma.bytes),
            mxu_busy=busy,
            counts={k: v for k, v in total.items() if not k.endswith("_busy")},
            bound_operands=sorted(ev.bound),
            loops=loops,
        )


def _smem_words(arr):
    """SMEM image of an integer operand, as 32-bit words.  One-dimensional 32-bit
    arrays are linear; others are cut into (8,128) tiles (fewer rows if the array
    has fewer), types under 32 bits packing consecutive rows into a word, lowest
    row in the lowest bits.  One-dimensional arrays of such types are read as rows
    of 128.  (Read off the address arithmetic of test kernels.)"""
    import numpy as np

    a = np.asarray(arr)
    if a.dtype == bool:
        a = a.astype(np.int32)
    bits = a.dtype.itemsize * 8
    if bits > 32:
        a, bits = a.astype(np.int32), 32
    pack = 32 // bits
    if a.ndim <= 1:
        if pack == 1:
            return [int(x) for x in a.reshape(-1)]
        a = a.reshape(-1)  # runs of 128 elements, `pack` of them to a row of words
        a = np.pad(a, (0, -a.size % (128 * pack))).reshape(-1, 128)
    r, c = a.shape[-2:]
    tr = 8
    while tr // 2 >= max(r, pack):
        tr //= 2
    a = a.reshape((-1, r, c)).astype(np.int64) & ((1 << bits) - 1)
    a = np.pad(a, ((0, 0), (0, -r % tr), (0, -c % 128)))
    n, r, c = a.shape
    a = a.reshape(n, r // tr, tr // pack, pack, c // 128, 128)
    w = sum(a[:, :, :, q] << (bits * q) for q in range(pack))  # n, R, tr/pack, C, 128
    w = np.transpose(w, (0, 1, 3, 2, 4)).reshape(-1)
    w = np.where(w >= 1 << 31, w - (1 << 32), w)
    return [int(x) for x in w]


# --------------------------------------------------------------------------
# Putting it together (parent side).
# --------------------------------------------------------------------------


def _read_util(path):
    rows, units, caps, on = [], [], [], False
    if not path or not os.path.exists(path):
        return [], [], []
    lines = open(path).read().splitlines()
    for i, l in enumerate(lines):
        if l.startswith("== CAPA"):
            units = [x.strip() for x in lines[i + 1].split(",")]
            caps = [int(x) for x in lines[i + 2].split()]
        elif l.startswith("== UTIL"):
            on = True
        elif on and l.strip():
            rows.append([int(x) for x in l.split()])
    return rows, units, caps


def _allocations(path):
    """VMEM and SMEM the kernel's own code allocates, by purpose."""
    out = collections.Counter()
    for l in open(path):
        m = re.search(
            r"#allocation\d+\w* \[shape = '[^']*', space=(vmem|smem), size = 0x([0-9a-f]+)(.*)", l
        )
        if m and "fixed_abs" not in m.group(3):
            t = re.search(r"tag = '([^']*)", m.group(3))
            t = t.group(1) if t else ""
            kind = (
                "input windows"
                if t.startswith("input window")
                else "output windows"
                if t.startswith("output window")
                else "scratch"
                if t.startswith("scratch")
                else "spills"
                if "spill" in t or "_spill" in l
                else "other"
            )
            out[f"{m.group(1)} {kind}"] += int(m.group(2), 16)
    return dict(out)


def _rates(dump, gen):
    """Cycles one MXU is held by one vmatmul, from the compiler's own profile."""
    r = dict(packed=8 if gen in ("v6e", "v7x") else 16, plain=8, x8=16)
    best = 0
    for f in os.listdir(dump):
        if not f.endswith("static-bundle-profile.txt"):
            continue
        for blk in open(os.path.join(dump, f)).read().split("\nHLO:"):
            m = re.search(r"SCALAR_ALU: \(\d+/(\d+)\)", blk)
            n = int(m.group(1)) // 2 if m else 0
            if n > best and n > 500:
                best = n
                for key, lab in (
                    ("packed", "matmul_packed"),
                    ("plain", "matmul"),
                    ("x8", "matmul_x8_packed"),
                ):
                    q = re.search(r"MXU_0 {}: \(\d+/(\d+)\)".format(lab), blk)
                    if q and int(q.group(1)):
                        r[key] = max(1, round(n / int(q.group(1))))
    return r


def _kernel_files(dump):
    ks = collections.OrderedDict()
    for f in sorted(os.listdir(dump)):
        m = re.match(
            r"(\d+)-(.+)-(\d+)-(packed-bundles-post-ra|final_bundles|"
            r"pre-delay_hlo-static-per-bundle-utilization|"
            r"post-delay-converter)\.txt$",
            f,
        )
        if m:
            ks.setdefault((m.group(1), m.group(2)), {})[m.group(4)] = os.path.join(dump, f)
    return ks


def _analyze_kernel(name, files, chip, rates, operands=None, max_s=120.0):
    bundles = parse_bundles(open(files["packed-bundles-post-ra"]).read())
    rows, units, caps = _read_util(files.get("pre-delay_hlo-static-per-bundle-utilization"))
    final = (
        len(_HEAD.findall(open(files["final_bundles"]).read()))
        if "final_bundles" in files
        else None
    )
    k = Kernel(bundles, rows, units, rates, chip["mxus"])
    r = dict(
        name=name,
        scheduled_bundles=len(bundles),
        final_bundles=final,
        unit_capacity=dict(zip(units, caps)),
    )
    static = k.stats(0, len(bundles) - 1)
    r["static"] = dict(
        vmem_spill=static.get("VSTORE:SPILL", 0),
        vmem_fill=static.get("VLOAD:FILL", 0),
        vmatmul=sum(v for q, v in static.items() if q.startswith("vmatmul_")),
        vmatpush=static.get("vmatpush", 0),
        smem_spill=sum(
            1 for b in bundles for o in b.ops if o.opcode == "sst" and "_spill" in o.args
        ),
        smem_fill=sum(
            1 for b in bundles for o in b.ops if o.opcode == "sld" and "_spill" in o.args
        ),
    )
    if "post-delay-converter" in files:
        r["allocations"] = _allocations(files["post-delay-converter"])
    bpc = chip["hbm"] / chip["clock"]
    sim = k.run(
        bpc, DMA_LATENCY_S * chip["clock"], operands, chip.get("granule", GRANULE), max_s=max_s
    )
    r["split_over_cores"] = any(
        o.opcode == "sld" and "core id" in o.note for b in bundles for o in b.ops
    )
    scale = 1.0
    if sim["truncated"]:
        tops = [
            l
            for l in sim["loops"]
            if l.get("exit_constant") and l.get("depth") == 0 and l["iterations"]
        ]
        if tops:
            l = max(tops, key=lambda l: l["cycles"])
            scale = max(1.0, l["exit_constant"] / l["iterations"])
    sim["extrapolated_by"] = scale
    cyc = sim["cycles"] * scale
    hbm = sum(v for q, v in sim["dma_bytes"].items() if "hbm" in q) * scale
    busy = max(sim["mxu_busy"]) * scale
    r["sim"] = sim
    r["cycles"] = cyc
    r["cycles_dma"] = cyc + sim["stall"] * scale
    r["hbm_bytes"] = hbm
    r["cycles_hbm"] = max(cyc, hbm / bpc)
    r["hbm_bound_cycles"] = hbm / bpc
    r["mxu_busy_cycles"] = busy
    r["mxu_util"] = busy / cyc if cyc else 0.0
    r["mxu_util_dma"] = busy / r["cycles_dma"] if r["cycles_dma"] else 0.0
    r["unit_util"] = {
        u: sim["counts"].get(u, 0) / (c * sim["cycles"])
        for u, c in zip(units, caps)
        if c and sim["cycles"]
    }
    hot = None
    for l in sim["loops"]:
        if l.get("iterations"):
            own = sum(p["own_cycles"] * p["times"] for p in l["paths"])
            if hot is None or own > hot[0]:
                hot = (own, l)
    if hot:
        l = hot[1]
        p = max(l["paths"], key=lambda p: p["own_cycles"] * p["times"])
        r["hot_loop"] = dict(
            start=l["start"],
            end=l["end"],
            bundles=l["bundles"],
            depth=l["depth"],
            iterations=l["iterations"],
            step_cycles=p["cycles"],
            step_times=p["times"],
            step_stall=p["stall"],
            step_mxu_busy=p["mxu_busy"],
            step_mxu_util=p["mxu_util"],
            vmatmul=p["vmatmul"],
            unit_util={
                u: p["units"].get(u, 0) / (c * p["cycles"])
                for u, c in zip(units, caps)
                if c and p["cycles"]
            },
        )
    return r


def analyze(
    factory,
    topology="v5e:2x2",
    kwargs=None,
    paths=(),
    flags="",
    keep=None,
    all_kernels=False,
    python=None,
    timeout=1800,
    max_s=120.0,
):
    """Compile in a subprocess and report.  Never raises for a compile error."""
    dump = keep or tempfile.mkdtemp(prefix="tpu_static_")
    dump = os.path.abspath(dump)
    os.makedirs(dump, exist_ok=True)
    try:
        for f in os.listdir(dump):
            if (
                re.match(r"\d+-.*\.(txt|html)$", f)
                or f in ("meta.json", "module.hlo")
                or f.startswith("prefetch_")
            ):
                os.unlink(os.path.join(dump, f))
        env = dict(os.environ)
        env.update(
            JAX_PLATFORMS="cpu",
            TPU_SKIP_MDS_QUERY="1",
            TF_CPP_MIN_LOG_LEVEL="3",
            TPU_MIN_LOG_LEVEL="3",
            TPU_STDERR_LOG_LEVEL="3",
            # no device is opened: several compilers may run side by side
            ALLOW_MULTIPLE_LIBTPU_LOAD="1",
            JAX_ENABLE_COMPILATION_CACHE="false",
        )
        env["LIBTPU_INIT_ARGS"] = " ".join(
            filter(
                None,
                [
                    env.get("LIBTPU_INIT_ARGS", ""),
                    f"--xla_jf_dump_to={dump}",
                    "--xla_jf_dump_llo_text=true",
                    "--xla_jf_dump_hlo_text=true",
                    "--xla_jf_emit_annotations=true",
                    f"--xla_jf_dump_llo_pass_label_regex={DUMP_FILTER}",
                    flags,
                ],
            )
        )
        job = dict(
            work=dump,
            factory=factory,
            topology=topology,
            kwargs=kwargs or {},
            paths=list(paths) + [os.getcwd()],
        )
        with open(os.path.join(dump, "child.log"), "wb") as log:
            try:
                rc = subprocess.run(
                    [python or sys.executable, os.path.abspath(__file__), "--child"],
                    input=json.dumps(job).encode(),
                    stdout=log,
                    stderr=log,
                    env=env,
                    timeout=timeout,
                ).returncode
            except subprocess.TimeoutExpired:
                rc = "timeout"
        mp = os.path.join(dump, "meta.json")
        if not os.path.exists(mp):
            tail = open(os.path.join(dump, "child.log"), errors="replace").read()[-3000:]
            return dict(
                ok=False,
                factory=factory,
                topology=topology,
                error=f"compiler process ended ({rc}): {tail}",
            )
        rep = json.load(open(mp))
        rep = dict(tool=VERSION, factory=factory, topology=topology, kwargs=kwargs or {}, **rep)
        if not rep["ok"]:
            return rep
        chip = CHIPS.get(rep["device_kind"])
        if chip is None:
            rep["note"] = "no figures for this chip; kernel cycles not computed"
            return rep
        chips = (
            math.prod(int(d) for d in re.findall(r"\d+", topology.split(":")[-1]))
            if ":" in topology
            else rep["num_devices"]
        )
        chip = dict(chip, cores=max(1, chip["cores"] * chips // rep["num_devices"]))
        rep["chip"] = dict(
            chip,
            peak_bf16_flops_per_core=2
            * chip["mxus"]
            * chip["mxu"] ** 2
            * chip["rows"]
            * chip["clock"],
        )
        hlo = parse_hlo(open(os.path.join(dump, "module.hlo")).read())
        mosaic, mult_of, est_of = hlo.pop("mosaic"), hlo.pop("mult_of"), hlo.pop("est_of")
        rep["hlo"] = hlo
        rates = _rates(dump, chip["gen"])
        rep["mxu_cycles_per_vmatmul"] = rates
        files = _kernel_files(dump)
        byname = {}
        for (_, nm), f in files.items():
            byname[nm] = f
        # pair jaxpr kernels with HLO calls of the same base name, in order
        pools = collections.defaultdict(list)
        for i, k in enumerate(rep.get("pallas_calls", [])):
            if "name" in k:
                pools[re.sub(r"\W", "_", k["name"])].append(i)
        kernels = []
        order = sorted(
            mosaic,
            key=lambda m: (
                re.sub(r"\.\d+$", "", m["name"]),
                int((re.search(r"\.(\d+)$", m["name"]) or [0, "0"])[1]),
            ),
        )
        want = [m["name"] for m in order]
        paired = {}
        for nm in want:
            base = re.sub(r"\W", "_", re.sub(r"(\.\d+|\.clone|\.remat\d*)+$", "", nm))
            if pools.get(base):
                paired[nm] = pools[base].pop(0)
        rest_k = sorted(i for v in pools.values() for i in v)
        rest_n = [m["name"] for m in mosaic if m["name"] not in paired]
        if len(rest_k) == len(rest_n):  # unnamed kernels: pair in program order
            paired.update(zip(rest_n, rest_k))
        extra = [nm for nm in byname if nm not in want and nm in mult_of] if all_kernels else []
        for nm in want + extra:
            f = byname.get(nm)
            info, ops = None, None
            if nm in paired:
                i = paired[nm]
                info = rep["pallas_calls"][i]
                pf = os.path.join(dump, f"prefetch_{i}.npz")
                if os.path.exists(pf):
                    import numpy as np

                    with np.load(pf) as z:
                        ops = {int(a): z[a] for a in z.files}
            if f is None or "packed-bundles-post-ra" not in f:
                kernels.append(
                    dict(
                        name=nm,
                        mosaic=nm in want,
                        note="no listing (deduplicated with another kernel?)",
                    )
                )
                continue
            try:
                r = _analyze_kernel(nm, f, chip, rates, ops, max_s)
            except Exception as err:
                r = dict(name=nm, error=f"{type(err).__name__}: {err}")
            mo = next((m for m in mosaic if m["name"] == nm), None)
            r["mosaic"] = mo is not None
            if mo:
                r["vmem_bytes"], r["times"] = mo["vmem_bytes"], mo["times"]
            else:
                r["times"], r["estimated_cycles"] = mult_of.get(nm, 1), est_of.get(nm)
            if info:
                r["grid"], r["scratch"], r["blocks"] = info["grid"], info["scratch"], info["blocks"]
            kernels.append(r)
        rep["kernels"] = kernels
        tot = dict(cycles=0.0, cycles_dma=0.0, cycles_hbm=0.0, hbm_bytes=0.0, mxu_busy=0.0)
        for k in kernels:
            if k.get("mosaic") and "cycles" in k:
                n = k.get("times") or 1
                for q, s in (
                    ("cycles", "cycles"),
                    ("cycles_dma", "cycles_dma"),
                    ("cycles_hbm", "cycles_hbm"),
                    ("hbm_bytes", "hbm_bytes"),
                    ("mxu_busy", "mxu_busy_cycles"),
                ):
                    tot[q] += k[s] * n
        rep["mosaic_total"] = tot
        rep["total_cycles"] = tot["cycles"] + hlo["estimated_cycles"]
        rep["total_cycles_dma"] = tot["cycles_dma"] + hlo["estimated_cycles"]
        if all_kernels:  # XLA's fusions by their schedules where they have one
            sch = [k for k in kernels if not k.get("mosaic") and "cycles" in k]
            left = hlo["estimated_cycles"] - sum(k["estimated_cycles"] or 0 for k in sch)
            for q in ("cycles", "cycles_dma", "cycles_hbm"):
                rep["schedule_total_" + q] = tot[q] + left + sum(k[q] * k["times"] for k in sch)
        fl = (rep.get("meta") or {}).get("useful_flops")
        if fl:
            # of the whole device: a kernel not split over a 2-core device gets at most half
            ideal = fl / (2 * chip["mxus"] * chip["mxu"] ** 2 * chip["rows"] * chip["cores"])
            rep["useful"] = dict(
                ideal_cycles=ideal,
                tiles_128=fl / (2 * 128**3),
                efficiency=ideal / rep["total_cycles"] if rep["total_cycles"] else None,
                efficiency_dma=ideal / rep["total_cycles_dma"] if rep["total_cycles_dma"] else None,
                cycles_per_128_tile=rep["total_cycles"] / (fl / (2 * 128**3)),
                cycles_per_128_tile_dma=rep["total_cycles_dma"] / (fl / (2 * 128**3)),
                ideal_cycles_per_128_tile=128**3
                / (chip["mxus"] * chip["mxu"] ** 2 * chip["rows"] * chip["cores"]),
            )
        return rep
    finally:
        if not keep:
            shutil.rmtree(dump, ignore_errors=True)


def _si(x):
    for s, d in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(x) >= d:
            return f"{x / d:.3g}{s}"
    return f"{x:.3g}"


def table(rep):
    """Short human-readable table."""
    L = [
        f"{rep['factory']} {json.dumps(rep['kwargs']) if rep.get('kwargs') else ''} on {rep['topology']}"
        f" ({rep.get('device_kind', '?')}, jax {rep.get('jax', '?')}, libtpu {rep.get('libtpu', '?')})"
    ]
    if not rep.get("ok"):
        return "\n".join(L + ["DOES NOT COMPILE", rep.get("error", "")[:4000]])
    m = rep["memory"]
    L.append(
        f"compiles in {rep['compile_s']:.1f} s of CPU; HBM bytes: arguments {_si(m['argument'])} "
        f"output {_si(m['output'])} temp {_si(m['temp'])}; code {_si(m['generated_code'])}"
    )
    c = rep["xla_cost"]
    h = rep.get("hlo", {})
    L.append(
        "XLA part: "
        + ", ".join(f"{k} {_si(v)}" for k, v in c.items())
        + f"; estimated_cycles {_si(h.get('estimated_cycles', 0))}"
        + (
            f" (+{h['unknown_trip_loops']} loops of unknown trip count)"
            if h.get("unknown_trip_loops")
            else ""
        )
        + (
            f" (+{h['without_estimate']} instructions without estimate)"
            if h.get("without_estimate")
            else ""
        )
    )
    for q in h.get("collectives", []):
        L.append(f"  collective {q['op']:<20} {_si(q['bytes'])}B x{q['times']} {q['shape']}")
    for k in rep.get("kernels", []):
        if "cycles" not in k:
            L.append(f"  kernel {k['name']}: {k.get('error') or k.get('note')}")
            continue
        s = k["static"]
        L.append(
            f"  kernel {k['name']}{'' if k['mosaic'] else ' (XLA)'} grid={k.get('grid')} "
            f"VMEM={_si(k.get('vmem_bytes') or 0)}B {k.get('allocations', '')}"
        )
        L.append(
            f"    cycles {_si(k['cycles'])}  with HBM floor {_si(k['cycles_hbm'])}  with DMA model "
            f"{_si(k['cycles_dma'])}  HBM {_si(k['hbm_bytes'])}B  MXU busy {100 * k['mxu_util']:.1f}%"
        )
        L.append(
            f"    code {k['final_bundles']} bundles ({k['scheduled_bundles']} scheduled), spills/fills "
            f"vmem {s['vmem_spill']}/{s['vmem_fill']} smem {s['smem_spill']}/{s['smem_fill']}"
            + (
                f"  UNKNOWN branches {sum(k['sim']['unknown_branches'].values())}"
                if k["sim"]["unknown_branches"]
                else ""
            )
            + (
                f"  extrapolated x{k['sim']['extrapolated_by']:.2f}"
                if k["sim"]["truncated"]
                else ""
            )
        )
        if "hot_loop" in k:
            q = k["hot_loop"]
            u = " ".join(f"{a} {100 * v:.0f}%" for a, v in q["unit_util"].items() if v >= 0.005)
            L.append(
                f"    hot loop [{q['start']:#x}..{q['end']:#x}] {q['bundles']} bundles x{q['iterations']}, "
                f"usual step {q['step_cycles']:.0f} cycles (x{q['step_times']}), MXU busy "
                f"{100 * q['step_mxu_util']:.1f}%; slots: {u}"
            )
    if "total_cycles" in rep:
        clk = rep["chip"]["clock"]
        L.append(
            f"total cycles {_si(rep['total_cycles'])} ({rep['total_cycles'] / clk * 1e3:.4g} ms at "
            f"{clk / 1e9:.2f} GHz); with DMA model {_si(rep['total_cycles_dma'])} "
            f"({rep['total_cycles_dma'] / clk * 1e3:.4g} ms)"
        )
    if "schedule_total_cycles" in rep:
        L.append(
            f"with XLA's fusions by schedule: cycles {_si(rep['schedule_total_cycles'])}, with HBM floor "
            f"{_si(rep['schedule_total_cycles_hbm'])}, with DMA model {_si(rep['schedule_total_cycles_dma'])}"
        )
    if "useful" in rep:
        u = rep["useful"]
        L.append(
            f"useful work: ideal {_si(u['ideal_cycles'])} cycles, efficiency {100 * u['efficiency']:.1f}% "
            f"(DMA model {100 * u['efficiency_dma']:.1f}%); cycles per useful 128^3 tile "
            f"{u['cycles_per_128_tile']:.1f} / {u['cycles_per_128_tile_dma']:.1f} "
            f"(ideal {u['ideal_cycles_per_128_tile']:.1f})"
        )
    return "\n".join(L)


def main(argv=None):
    if argv is None and sys.argv[1:] == ["--child"]:
        _child(json.loads(sys.stdin.read()))
        return 0
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
        a.path,
        a.flags,
        a.keep,
        a.all_kernels,
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
