"""A model as a flat list of equations, and the weights in it that inputs are multiplied with.

Calibration needs the input of every kernel, whatever module it is in. Here it is found in the traced
model: an operand of `dot_general` or of a convolution that is a parameter, possibly transposed, reshaped,
sliced or cast on the way, is a kernel, and the other operand is its input. That holds for `nn.Dense` and
`nnx.Linear` as for attention projections, einsums, experts, tied embeddings and plain functions, edits
nothing of the user's, and its failure is visible: a parameter that was to be pruned and is no such operand
is an error that says how it is used. A table that is only looked up in (an embedding that is not tied) has no
input: its rows are the outputs of a matrix that reads unit vectors.

Calls (`jit`, `remat`, custom derivatives) are opened, and a `scan` over stacked layers is written out
layer by layer, so that all kernels stand in one list in the order of their use. The list is cut between
blocks of the model where little is alive; equal blocks have equal text, and so are compiled once.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, jaxpr_as_fun

_CALLS = {
    *("jit", "pjit", "closed_call", "core_call", "checkpoint", "remat", "remat2"),
    *("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"),
}
_BODIES = ("jaxpr", "call_jaxpr", "fun_jaxpr")
_CASTS = {"convert_element_type", "copy", "copy_p", "optimization_barrier", "sharding_constraint"}
_VIEWS = {"transpose", "reshape", "squeeze", "expand_dims", "slice", "rev"}


@dataclasses.dataclass(frozen=True)
class Constant:
    """A number that stands in an equation."""

    value: Any

    def __repr__(self) -> str:
        return f"{self.value!r}:{jnp.result_type(self.value)}"


Ref = int | Constant


@dataclasses.dataclass(frozen=True)
class Equation:
    """An equation of a jaxpr between numbered values; `body` is the jaxpr that it stands in."""

    eqn: JaxprEqn
    body: Jaxpr
    inputs: tuple[Ref, ...]
    outputs: tuple[int, ...]

    @property
    def name(self) -> str:
        """Of the primitive."""
        return self.eqn.primitive.name

    @property
    def params(self) -> dict[str, Any]:
        """Of the primitive."""
        return self.eqn.params

    def run(self, values: Sequence[Any]) -> list:
        """The outputs, for values of the inputs."""
        given = {v: x for v, x in zip(self.eqn.invars, values) if not isinstance(v, Literal)}
        alone = self.body.replace(
            eqns=[self.eqn], constvars=[], invars=list(given), outvars=list(self.eqn.outvars)
        )
        return list(jaxpr_as_fun(ClosedJaxpr(alone, []))(*given.values()))


@dataclasses.dataclass(frozen=True)
class View:
    """A value that is a parameter seen in another form: the leaf and the equations on the way."""

    leaf: int
    steps: tuple[Equation, ...] = ()

    def __call__(self, x: Any) -> Any:
        """The value, for the leaf `x`."""
        for step in self.steps:
            (x,) = step.run([x])
        return x

    def shape_only(self) -> View:
        """Without casts: a linear map that moves entries."""
        return View(self.leaf, tuple(s for s in self.steps if s.name not in _CASTS))

    def text(self) -> str:
        """Equal for equal views."""
        steps = self.shape_only().steps
        return "; ".join(f"{s.name}{_text_of(s.params)}" for s in steps)


@dataclasses.dataclass(frozen=True)
class Geometry:
    """How a contraction is a product of matrices: `[stack, in, out]` of the kernel, `[stack, tokens, in]`
    of its input.

    Attributes:
      stack, inputs, outputs: axes of the kernel.
      input_stack, input_inputs: the axes of the input that go with `stack` and `inputs`.
      convolution: the parameters of a convolution, whose inputs are patches; else None.
      lookup: whether rows are looked up and nothing is multiplied. Every entry of a row is then read by itself, as
        by inputs that are the unit vectors and their opposites, of which no entry is dearer than another.
    """

    stack: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    input_stack: tuple[int, ...] = ()
    input_inputs: tuple[int, ...] = ()
    convolution: Any = None
    lookup: bool = False

    def matrix(self, w: Array) -> Array:
        """The kernel as `[stack, in, out]`."""
        size = lambda axes: math.prod(w.shape[a] for a in axes)
        moved = w.transpose(*self.stack, *self.inputs, *self.outputs)
        moved = moved.reshape(size(self.stack), size(self.inputs), size(self.outputs))
        groups = self.convolution.params["feature_group_count"] if self.convolution else 1
        if groups == 1:
            return moved
        return jnp.moveaxis(moved[0].reshape(moved.shape[1], groups, -1), 1, 0)

    def rows(self, x: Array, kernel_shape: tuple[int, ...]) -> tuple[Array, tuple[int, ...]]:
        """The inputs as `[stack, tokens, in]`, and the axes of the tokens before they were merged."""
        if self.convolution:
            return self._patches(x, kernel_shape), ()
        if self.lookup:
            units = jnp.eye(kernel_shape[1], dtype=jnp.float32)
            return jnp.concatenate([units, -units])[None], ()
        free = [a for a in range(x.ndim) if a not in (*self.input_stack, *self.input_inputs)]
        size = lambda axes: math.prod(x.shape[a] for a in axes)
        moved = x.transpose(*self.input_stack, *free, *self.input_inputs)
        moved = moved.reshape(size(self.input_stack), size(free), size(self.input_inputs))
        return moved, tuple(x.shape[a] for a in free)

    def _patches(self, x: Array, kernel_shape: tuple[int, ...]) -> Array:
        p = self.convolution.params
        numbers = p["dimension_numbers"]
        window = [kernel_shape[a] for a in numbers.rhs_spec[2:]]
        channels = x.shape[numbers.lhs_spec[1]]
        patches = jax.lax.conv_general_dilated_patches(
            x.astype(jnp.float32),
            window,
            p["window_strides"],
            p["padding"],
            lhs_dilation=p["lhs_dilation"],
            rhs_dilation=p["rhs_dilation"],
            dimension_numbers=numbers,
            precision=jax.lax.Precision.HIGHEST,
        )
        patches = jnp.moveaxis(patches, numbers.out_spec[1], -1)  # [..., channels * window]
        groups = p["feature_group_count"]
        patches = patches.reshape(-1, groups, channels // groups, math.prod(window))
        return patches.transpose(1, 0, 3, 2).reshape(
            groups, -1, math.prod(window) * channels // groups
        )


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A parameter, or a part of one, that inputs are multiplied with.

    Attributes:
      name: the path of the leaf; `path[i]` for the i-th of its parts.
      path: the path of the leaf.
      view: from the leaf to the operand.
      geometry: of its contraction.
      uses: for each contraction, the equation and which of its inputs is the input of the kernel.
    """

    name: str
    path: str
    view: View
    geometry: Geometry
    uses: tuple[tuple[int, int], ...]

    def take(self, leaf: Array) -> Array:
        """`[stack, in, out]` of the leaf."""
        return self.geometry.matrix(self.view.shape_only()(leaf))

    def put(self, leaf: Array, matrix: Array) -> Array:
        """The leaf with another matrix in this place. Taking moves entries and nothing else, so that its
        transpose puts them back."""
        back = jax.linear_transpose(self.take, leaf)
        (value,), (here,) = back(matrix.astype(leaf.dtype)), back(jnp.ones_like(self.take(leaf)))
        return jnp.where(here > 0, value, leaf)

    def shape(self, leaf: Any) -> tuple[int, int, int]:
        """`(stack, in, out)`."""
        return jax.eval_shape(self.take, leaf).shape


@dataclasses.dataclass
class Program:
    """A traced model.

    Attributes:
      equations: in the order in which they run; views of parameters are not among them.
      inputs: the numbers of the leaves of the batch.
      outputs: what the model returns.
      constants: values by number.
      views: the values that are parameters.
      others: for each leaf, the names of the primitives that use it otherwise.
      used, found: the products with a leaf.
      lookups: for each table, its view and where its rows are looked up.
    """

    equations: list[Equation] = dataclasses.field(default_factory=list)
    inputs: list[int] = dataclasses.field(default_factory=list)
    outputs: list[Ref] = dataclasses.field(default_factory=list)
    constants: dict[int, Any] = dataclasses.field(default_factory=dict)
    views: dict[int, View] = dataclasses.field(default_factory=dict)
    shapes: list[Any] = dataclasses.field(default_factory=list)
    others: dict[int, list[str]] = dataclasses.field(default_factory=dict)
    used: dict[tuple, list[tuple[int, int]]] = dataclasses.field(default_factory=dict)
    found: dict[tuple, tuple[View, Geometry]] = dataclasses.field(default_factory=dict)
    lookups: dict[int, tuple[View, list[tuple[int, int]]]] = dataclasses.field(default_factory=dict)

    def new(self, aval: Any) -> int:
        """A number for a value."""
        self.shapes.append(aval)
        return len(self.shapes) - 1


def trace(function: Callable, params: Any, batch: Any, targets: set[int]) -> Program:
    """The program of `function(params, batch)`.

    Args:
      function: traceable.
      params: a tree of arrays.
      batch: a tree of arrays.
      targets: the indices of the leaves of `params` that are looked for; a `scan` over one of them is
        written out.

    Returns:
      The program.
    """
    closed = jax.make_jaxpr(function)(params, batch)
    program = Program()
    numbers = [program.new(v.aval) for v in closed.jaxpr.invars]
    leaves = len(jax.tree.leaves(params))
    program.views = {number: View(i) for i, number in enumerate(numbers[:leaves])}
    program.inputs = numbers[leaves:]
    program.outputs = _inline(program, closed, numbers, targets)
    return program


def _inline(program: Program, body: ClosedJaxpr | Jaxpr, inputs: Sequence[Ref], targets) -> list:
    """Appends the equations of `body` and returns the numbers of its outputs."""
    consts = body.consts if isinstance(body, ClosedJaxpr) else []
    jaxpr = body.jaxpr if isinstance(body, ClosedJaxpr) else body
    numbers: dict[Any, Ref] = dict(zip(jaxpr.invars, inputs))
    for variable, value in zip(jaxpr.constvars, consts):
        number = program.new(variable.aval)
        program.constants[number] = value
        numbers[variable] = number
    read = lambda v: Constant(v.val) if isinstance(v, Literal) else numbers[v]
    for eqn in jaxpr.eqns:
        name, values = eqn.primitive.name, [read(v) for v in eqn.invars]
        inner = next((eqn.params[k] for k in _BODIES if k in eqn.params), None)
        if name in _CALLS and isinstance(inner, ClosedJaxpr | Jaxpr):
            outputs = _inline(program, inner, values, targets)
        elif name == "scan" and _leaves_of(program, values) & targets:
            outputs = _unroll(program, eqn.params, values, targets)
        else:
            outputs = _append(program, eqn, jaxpr, values)
        numbers |= dict(zip(eqn.outvars, outputs))
    return [read(v) for v in jaxpr.outvars]


def _leaves_of(program: Program, values: Sequence[Ref]) -> set[int]:
    return {program.views[v].leaf for v in values if isinstance(v, int) and v in program.views}


def _append(program: Program, eqn: JaxprEqn, body: Jaxpr, values: list[Ref]) -> list[int]:
    outputs = [program.new(v.aval) for v in eqn.outvars]
    equation = Equation(eqn, body, tuple(values), tuple(outputs))
    first = program.views.get(values[0]) if values and isinstance(values[0], int) else None
    if first and len(values) == len(outputs) == 1 and _is_view(equation, program):
        program.views[outputs[0]] = View(first.leaf, (*first.steps, equation))
        return outputs
    at = len(program.equations)
    program.equations.append(equation)
    kernel = _contraction(program, equation)
    for side, value in enumerate(values):
        view = program.views.get(value) if isinstance(value, int) else None
        if view is None:
            continue
        if kernel is None or side != kernel[0]:
            program.others.setdefault(view.leaf, []).append(eqn.primitive.name)
            if side == 0 and _is_lookup(program, equation):
                program.lookups.setdefault(view.leaf, (view, []))[1].append((at, 1))
            continue
        geometry = kernel[1]
        axes = (geometry.stack, geometry.inputs, geometry.outputs)
        key = (view.leaf, view.text(), axes)
        program.found.setdefault(key, (view, geometry))
        program.used.setdefault(key, []).append((at, 1 - side))
    return outputs


def _is_view(equation: Equation, program: Program) -> bool:
    name = equation.name
    if name == "convert_element_type":
        return jnp.issubdtype(equation.params["new_dtype"], jnp.floating)
    if name == "broadcast_in_dim":
        (x,) = equation.inputs
        size = lambda number: math.prod(program.shapes[number].shape)
        return isinstance(x, int) and size(x) == size(equation.outputs[0])
    return name in _CASTS | _VIEWS


def _is_lookup(program: Program, equation: Equation) -> bool:
    """Whether whole rows of a matrix are looked up."""
    if equation.name != "gather" or not isinstance(equation.inputs[0], int):
        return False
    numbers, shape = equation.params["dimension_numbers"], program.shapes[equation.inputs[0]].shape
    rows = (tuple(numbers.start_index_map), tuple(numbers.collapsed_slice_dims)) == ((0,), (0,))
    return rows and len(shape) == 2 and tuple(equation.params["slice_sizes"]) == (1, shape[1])


def _contraction(program: Program, equation: Equation) -> tuple[int, Geometry] | None:
    """Which input of a product is a parameter, and the geometry; None where none is, or both are."""
    name = equation.name
    if name not in ("dot_general", "conv_general_dilated"):
        return None
    is_view = [isinstance(v, int) and v in program.views for v in equation.inputs[:2]]
    if sum(is_view) != 1:
        return None
    side = is_view.index(True)
    operand: Any = equation.inputs[side]
    ndim = len(program.shapes[operand].shape)
    if name == "dot_general":
        contract, stack = equation.params["dimension_numbers"]
        taken = (*contract[side], *stack[side])
        outputs = tuple(a for a in range(ndim) if a not in taken)
        other = 1 - side
        return side, Geometry(
            tuple(stack[side]), tuple(contract[side]), outputs,
            tuple(stack[other]), tuple(contract[other]),
        )  # fmt: skip
    if side == 0 or equation.params["batch_group_count"] != 1:
        return None
    out, channel, *window = equation.params["dimension_numbers"].rhs_spec
    return side, Geometry((), (*window, channel), (out,), convolution=equation)


def _unroll(program: Program, params: dict[str, Any], values: list[Ref], targets) -> list[Ref]:
    """A scan, step by step."""
    consts, carry = params["num_consts"], params["num_carry"]
    fixed, state, rows = (
        values[:consts],
        values[consts : consts + carry],
        values[consts + carry :],
    )
    length, stacked = params["length"], {}
    order = range(length - 1, -1, -1) if params["reverse"] else range(length)
    for i in order:
        pick = functools.partial(jax.lax.index_in_dim, index=i, keepdims=False)
        here = [_call(program, pick, [x], targets)[0] for x in rows]
        out = _inline(program, params["jaxpr"], [*fixed, *state, *here], targets)
        state, stacked[i] = out[:carry], out[carry:]
    columns = zip(*(stacked[i] for i in range(length)))
    return [
        *state,
        *(_call(program, lambda *x: jnp.stack(x), list(c), targets)[0] for c in columns),
    ]


def _call(program: Program, function: Callable, values: list[Ref], targets) -> list[Ref]:
    avals = [v.value if isinstance(v, Constant) else program.shapes[v] for v in values]
    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) if hasattr(a, "shape") else a for a in avals]
    return _inline(program, jax.make_jaxpr(function)(*shapes), values, targets)


def kernels(program: Program, paths: Sequence[str], leaves: Sequence[Any], targets) -> list[Kernel]:
    """The kernels of the targets, in the order of their use.

    Args:
      program: from `trace`.
      paths, leaves: of all parameters.
      targets: indices of those that are to be found.

    Raises:
      ValueError: a target that no input is multiplied with, or in several ways; the message says how it
        is used.
    """
    tables = targets & program.lookups.keys() - {leaf for leaf, *_ in program.found}
    lookup = Geometry((), (1,), (0,), lookup=True)
    looked = {(leaf, "", "lookup"): program.lookups[leaf] for leaf in tables}
    read = program.found | {key: (view, lookup) for key, (view, _) in looked.items()}
    used = program.used | {key: uses for key, (_, uses) in looked.items()}
    keys = [key for key in read if key[0] in targets]
    keys.sort(key=lambda key: used[key])
    parts = {leaf: [k for k in keys if k[0] == leaf] for leaf in targets}
    if missing := sorted(leaf for leaf, found in parts.items() if not found):
        reasons = []
        for leaf in missing:
            how = sorted(set(program.others.get(leaf, [])))
            said = f"only used by {', '.join(how)}" if how else "not used in this call"
            reasons.append(f"{paths[leaf]!r} is {said}")
        raise ValueError(
            f"targets: no input is multiplied with {len(missing)} of the chosen leaves, so there is no "
            f"statistic for them: {'; '.join(reasons[:4])}; leave them out by targets=[(pattern, False)]"
        )
    found = []
    for key in keys:
        view, geometry = read[key]
        path, several = paths[view.leaf], len(parts[view.leaf]) > 1
        name = f"{path}[{parts[view.leaf].index(key)}]" if several else path
        found.append(Kernel(name, path, view, geometry, tuple(used[key])))
    for leaf, several in parts.items():
        if len(several) > 1:
            _check_apart([k for k in found if k.view.leaf == leaf], leaves[leaf])
    return found


def _check_apart(parts: list[Kernel], leaf: Any) -> None:
    shape = jax.ShapeDtypeStruct(leaf.shape, jnp.float32)
    ones = lambda k: jax.linear_transpose(k.take, shape)(jnp.ones(k.shape(shape), jnp.float32))[0]
    if bool(jnp.any(sum(ones(k) for k in parts) > 1)):
        raise ValueError(
            f"targets: {parts[0].path!r} is multiplied with inputs in several ways (as itself and "
            f"transposed, or in parts that overlap), which no one statistic describes; leave it out by "
            f"targets=[({parts[0].path!r}, False)]"
        )


# -- Blocks --------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Segment:
    """Equations from `start` to `stop`, the kernels they use, and the values that cross their borders:
    `takes` from before (parameters, constants and the batch included), `gives` to those after."""

    start: int
    stop: int
    kernels: tuple[Kernel, ...]
    takes: tuple[int, ...]
    gives: tuple[int, ...]


def block_of(kernel: Kernel, blocks: str | None) -> str:
    """The block of a kernel: what `blocks` matches of its name, by default up to the first number, as in
    `layers/3` of `layers/3/attention/query/kernel`; for parts of a stacked leaf the number of the part."""
    if blocks is not None:
        match = re.search(blocks, kernel.name)
        return match.group(0) if match else kernel.name
    if part := re.search(r"\[\d+\]$", kernel.name):
        return f"{kernel.path.split('/')[0]}{part.group(0)}"
    match = re.match(r"(?:.*?/)??[^/]*\d+(?=/)", kernel.name)
    return match.group(0) if match else kernel.name


def segments(program: Program, found: Sequence[Kernel], blocks: str | None = None) -> list[Segment]:
    """The program cut between blocks, where the fewest bytes are alive.

    Args:
      program: from `trace`.
      found: its kernels.
      blocks: a regular expression for names of blocks, see `block_of`.

    Returns:
      Segments that cover the program; blocks that interleave stay in one.
    """
    spans: dict[str, list[int]] = {}
    for kernel in found:
        at = [use[0] for use in kernel.uses]
        span = spans.setdefault(block_of(kernel, blocks), [min(at), max(at)])
        spans[block_of(kernel, blocks)] = [min(span[0], *at), max(span[1], *at)]
    merged: list[list[int]] = []
    for low, high in sorted(spans.values()):
        if merged and low <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], high)
        else:
            merged.append([low, high])
    total = len(program.equations)
    alive = _alive(program)
    edges = [high + 1 for _, high in merged]
    nexts = [*(low for low, _ in merged[1:]), total]
    cuts = [min(range(a, b + 1), key=lambda p: alive[p]) for a, b in zip(edges, nexts)]
    if len(merged) > 1:  # the first block begins as far before its first kernel as the second
        cuts.append(max(merged[0][0] - (merged[1][0] - cuts[0]), 0))
    bounds = sorted({0, *cuts, total})
    return [_segment(program, found, a, b) for a, b in zip(bounds, bounds[1:])]


def _last_uses(program: Program) -> dict[int, int]:
    last = {}
    for i, equation in enumerate(program.equations):
        last |= {v: i for v in equation.inputs if isinstance(v, int)}
    return last | {v: len(program.equations) for v in program.outputs if isinstance(v, int)}


def _alive(program: Program) -> list[int]:
    """Bytes that are alive before each equation, parameters apart."""
    last, change = _last_uses(program), [0] * (len(program.equations) + 2)
    made = [(-1, v) for v in program.inputs]
    made += [(i, v) for i, equation in enumerate(program.equations) for v in equation.outputs]
    for i, v in made:
        if last.get(v, i) > i:
            aval = program.shapes[v]
            size = math.prod(aval.shape) * getattr(aval.dtype, "itemsize", 8)
            change[i + 1] += size
            change[last[v] + 1] -= size
    alive, total = [], 0
    for delta in change[: len(program.equations) + 1]:
        total += delta
        alive.append(total)
    return alive


def _segment(program: Program, found: Sequence[Kernel], start: int, stop: int) -> Segment:
    inside, takes = set(), []
    for equation in program.equations[start:stop]:
        for v in equation.inputs:
            if isinstance(v, int) and v not in inside and v not in takes:
                takes.append(v)
        inside |= set(equation.outputs)
    last = _last_uses(program)
    made = [v for e in program.equations[start:stop] for v in e.outputs]
    gives = tuple(v for v in made if last.get(v, -1) >= stop)
    mine = tuple(k for k in found if start <= k.uses[0][0] < stop)
    return Segment(start, stop, mine, tuple(takes), gives)


def text(program: Program, segment: Segment) -> str:
    """What a segment computes, equal for equal blocks."""
    names = {v: i for i, v in enumerate(segment.takes)}
    lines = []
    for equation in program.equations[segment.start : segment.stop]:
        inputs = [f"v{names[v]}" if isinstance(v, int) else repr(v) for v in equation.inputs]
        names |= {v: len(names) + i for i, v in enumerate(equation.outputs)}
        lines.append(f"{equation.name}{_text_of(equation.params)} {inputs}")
    for k in segment.kernels:
        at = [(e - segment.start, side) for e, side in k.uses]
        geometry = dataclasses.replace(k.geometry, convolution=None)
        lines.append(f"{at} {geometry}")
    lines.append(str([names[v] for v in segment.gives]))
    return "\n".join(lines)


def _text_of(params: dict[str, Any]) -> str:
    return str(sorted((k, str(v)) for k, v in params.items()))


def run(program: Program, segment: Segment, values: Sequence[Any], watch: Callable) -> list:
    """The values that a segment gives, for those that it takes.

    Args:
      program: whose segment it is.
      segment: what is run.
      values: one for each of `segment.takes`.
      watch: called with a kernel, its input and its operand, for every use of a kernel.
    """
    env: dict[int, Any] = dict(zip(segment.takes, values))
    uses = {at: (k, side) for k in segment.kernels for at, side in k.uses}
    for i in range(segment.start, segment.stop):
        equation = program.equations[i]
        inputs = [v.value if isinstance(v, Constant) else env[v] for v in equation.inputs]
        if i in uses:
            kernel, side = uses[i]
            watch(kernel, inputs[side], inputs[1 - side])
        env |= dict(zip(equation.outputs, equation.run(inputs)))
    return [env[v] for v in segment.gives]
