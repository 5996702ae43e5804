"""A kernel's schedule as a program: basic blocks, loops, and Python that does their scalar arithmetic."""

from __future__ import annotations

import collections
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from tools.tpu_static.bundles import NAMED, Bundle

DELAY_SLOTS = 4  # bundles executed after a branch before it takes effect


_CMP = dict(eq="==", ne="!=", lt="<", le="<=", gt=">", ge=">=")


class Program:
    """One kernel's listing, made executable: its scalar half becomes a Python function per basic block.

    Args:
      bundles: the listing.
      rows, units: what each bundle uses of each unit of the core, and the names of the units.
      rates: cycles that a matrix unit is held by an instruction, by kind.
      mxus: matrix units of the core.
      operands: integer arrays that the kernel is given, by operand number.
    """

    def __init__(
        self,
        bundles: Sequence[Bundle],
        rows: Sequence[Sequence[int]],
        units: Sequence[str],
        rates: Mapping[str, int],
        mxus: int = 4,
        operands: Mapping[int, np.ndarray] | None = None,
    ):
        self.b, self.mxus = bundles, mxus
        self.rows, self.units, self.rates = rows, units, rates
        self.operands = operands or {}
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

    def loop_of(self, i: int) -> int | None:
        """The innermost loop of a bundle."""
        best = None
        for k, (s, e, _) in enumerate(self.loops):
            if s <= i <= e and (best is None or e - s < self.loops[best][1] - self.loops[best][0]):
                best = k
        return best

    def stats(self, lo: int, hi: int) -> dict[str, float]:
        """Instruction counts of bundles lo..hi inclusive."""
        c = collections.defaultdict[str, float](int)
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
                        c[f"mxu{m.group(1)}_busy"] += self.rates[kind]
                    else:  # v7x names the accumulator only: share equally
                        for q in range(self.mxus):
                            c[f"mxu{q}_busy"] += self.rates[kind] / self.mxus
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
            w = "unsigned" if ty == "u32" else "signed"
            if rel in ("eq", "ne"):
                w = "unsigned"
            return f"({w}({v[0]}) {_CMP[rel]} {w}({v[1]}))"
        if root in b2 and len(v) >= 2:
            return f"({v[0]} {b2[root]} {v[1]})"
        if root == "sshll":
            return f"({v[0]} << {v[1]})"
        if root == "sshrl":
            return f"(unsigned({v[0]}) >> {v[1]})"
        if root == "sshra":
            return f"({v[0]} >> {v[1]})"
        if root in ("smin", "smax"):
            f = "<" if root == "smin" else ">"
            w = "unsigned" if ".u32" in op else ""
            return f"select({w}({v[0]}) {f} {w}({v[1]}), {v[0]}, {v[1]})"
        if op == "smov" or op == "pmov":
            return v[-1]
        if op == "scalar_select":
            return f"select({v[0]}, {v[1]}, {v[2]})"
        if root in ("por", "pand", "pxor", "pnand", "pnor") and len(v) >= 2:
            e = f"({v[0]} {'|' if 'or' in root and root != 'pxor' else '&' if 'and' in root else '^'} {v[1]})"
            return f"negate({e})" if root in ("pnand", "pnor") else e
        if root == "pneg":
            return f"negate({v[0]})"
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
                v = self.operands.get(int(m.group(1)))
                return str(int(v.reshape(-1)[0])) if v is not None and v.size == 1 else "U"
            # a recognisable base address; HBM addresses may be shifted left by 4 before use
            return str((1 << 52) + (int(m.group(1)) << 44)) if m else "U"
        if root in ("spop", "scalar_parameter_address", "sc", "reloc", "scvt", "srdreg"):
            return "U"
        if op == "sphi":
            return None
        return "?"

    def functions(self) -> Callable[..., Any]:
        """`make(S, P, M, ev, ...)`, which gives the function of each basic block by its first bundle. Each
        changes scalar registers S, predicates P and scalar memory M, tells `ev` of copies and waits, and
        returns the bundle to go on with."""
        src = ["def make(S,P,M,ev,U,negate,select,unsigned,signed):"]
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
                        r = f"P[{o.guard[1][1:]}]"
                        g = f"negate({r})" if o.guard[0] else r
                    if op.startswith("sbr"):
                        if i == br:
                            pre.append(f"br = {g if g else 'True'}")
                            has_br = True
                        continue
                    if op.startswith("dma.") and op != "dma.done.wait":
                        named = dict(NAMED.findall(o.raw))
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
                                r = f"P[{m.group(3)[1:]}]"
                                g = f"negate({r})" if m.group(2) else r
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
