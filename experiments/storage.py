"""How a run stores its sparse layers: dense under masks, or as blocks or single weights, by `config.storage`."""

import functools
import inspect
from collections.abc import Iterator, Mapping
from typing import Any, cast

import jax
import optax
from flax import nnx
from jax.sharding import NamedSharding

import jaxsparse
from jaxsparse.choose import unit_budgets
from jaxsparse.leaves import find
from jaxsparse.nn import (
    BlockSparseLinear,
    BlockSparsePointwise,
    CondensedLinear,
    Trained,
    full_gradients,
)
from jaxsparse.nn.compact import replace_module

STORAGES = ("masks", "stored")
# Methods that can be trained as stored, and the rule of `jaxsparse.stored` that each is.
RULES = {"rigl": "rigl", "set": "set", "magnitude": "magnitude", "static": "static"}
# Options of a method that its rule has, too, and the seed.
OPTIONS = ("update_every", "begin_step", "end_step", "initial_sparsity", "drop_fraction", "seed")


def of_relations(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What of a config, by dotted names, does not go with stored layers, as (name, what)."""
    if values["sketch"] is not None:
        needed = {"storage": "stored", "method": "rigl"}
        for name, value in needed.items():
            if values[name] != value:
                yield "sketch", f"growth by momentum needs {name}={value}, not {values[name]!r}"
    if values["storage"] == "masks":
        return
    if values["method"] not in RULES:
        yield "method", f"cannot be trained as stored; {', '.join(RULES)} can"
    structure = str(values["structure"])
    if not structure.startswith("block:") and structure != "fan_in":
        yield "structure", "storage=stored needs blocks, such as block:16x16, or fan_in"
    if values["sketch"] is not None and not structure.startswith("block:"):
        yield "sketch", f"growth by momentum needs blocks, such as block:16x16, not {structure}"
    if structure == "fan_in" and values["parallel"] == "fsdp":
        yield "parallel", "must be none or pmap with storage=stored and single weights (fan_in)"
    if values["model"] not in ("mlp", "vit", "transformer", "resnet"):
        yield (
            "model",
            "storage=stored knows linear layers and 1 x 1 convolutions: mlp, vit, transformer, resnet",
        )
    if values.get("model_options.two_view"):
        yield "model_options.two_view", "must be False with storage=stored"
    if values.get("options.allocation") in ("global", "lamp"):
        yield "options.allocation", "storage=stored needs budgets of layers: uniform, er or erk"
    if values.get("options.pack_masks"):
        yield "options.pack_masks", "there are no masks with storage=stored"


def store_layers(
    model: nnx.Module,
    config,
    rngs: nnx.Rngs,
    rows: NamedSharding | None = None,
    *,
    axis_name: str | None = None,
    targets: jaxsparse.targets.Targets = None,
) -> nnx.Module:
    """The model with its sparse linear layers stored as blocks, or as weights of each output, at random
    places, as many in each layer as the masked method keeps, with initial values as large as under masks.

    Args:
      model: a model as under masks; layers that are stacked for a scan stay so.
      config: of the run.
      rngs: of the new layers.
      rows: how the batch is split over devices.
      axis_name: the device axis under `jax.pmap`.
      targets: which leaves are sparse.

    Raises:
      ValueError: a layer that blocks do not tile; `options.targets` leaves it dense.
    """
    structure = jaxsparse.structures.parse(config.structure)
    leaves = find(nnx.to_pure_dict(nnx.state(model, nnx.Param)), targets, structure)
    modules = {"/".join(map(str, path)): (path, m) for path, m in nnx.iter_modules(model)}
    method = jaxsparse.METHODS[config.method]
    name = (
        config.options.allocation or inspect.signature(method.fn).parameters["allocation"].default
    )
    sparsity = config.sparsity
    if config.method == "magnitude":
        sparsity = config.options.initial_sparsity or 0.0
    budgets = unit_budgets(list(leaves), jaxsparse.allocations.resolve(name), sparsity)
    for leaf, number in zip(leaves, budgets):
        path, linear = modules.get(leaf.path.rpartition("/")[0], ((), None))
        if not (type(linear) is nnx.Linear or _is_pointwise(linear, structure)):
            raise ValueError(
                f"config.storage='stored': {leaf.path!r} is not the kernel of a linear layer, or of a 1 x 1 "
                "convolution in blocks; keep it dense with config.options.targets"
            )
        density = number * leaf.slices * leaf.unit_size / leaf.layer_size
        sketch = None if config.sketch is None else (config.sketch, config.sketch)
        make = functools.partial(
            _layer, cast(Any, linear), structure, density, rows, axis_name, sketch
        )
        if leaf.lead:
            (many,) = leaf.stack_shape
            layer = nnx.split_rngs(splits=many)(nnx.vmap(make, in_axes=0, out_axes=0))(rngs)
        else:
            layer = make(rngs)
        layer.values[...] *= density**0.5
        model = replace_module(model, path, layer)
    return model


def _is_pointwise(module: Any, structure) -> bool:
    """Whether it is a convolution that multiplies every position for itself, to be stored in blocks."""
    return (
        type(module) is nnx.Conv
        and isinstance(structure, jaxsparse.structures.Block)
        and set(module.kernel_size) == {1}
        and module.feature_group_count == 1
        and module.padding in ("SAME", "VALID")
        and module.mask is None
    )


def _layer(
    linear: nnx.Linear | nnx.Conv,
    structure,
    density: float,
    rows: NamedSharding | None,
    axis_name: str | None,
    sketch: tuple[int, int] | None,
    rngs: nnx.Rngs,
) -> BlockSparseLinear | CondensedLinear:
    """A layer with the sizes of a dense one (or of each of a stack of them)."""
    options: Any = dict(
        density=density,
        use_bias=linear.bias is not None,
        dtype=linear.dtype,
        param_dtype=linear.param_dtype,
        rngs=rngs,
    )
    sizes = linear.in_features, linear.out_features
    if not isinstance(structure, jaxsparse.structures.Block):
        return CondensedLinear(*sizes, **options)
    block_shape = structure.height, structure.width
    options.update(block_shape=block_shape, rows=rows, axis_name=axis_name, sketch=sketch)
    if isinstance(linear, nnx.Linear):
        return BlockSparseLinear(*sizes, **options)
    strides, space = linear.strides, len(linear.kernel_size)
    strides = (strides,) * space if isinstance(strides, int) else strides or (1,) * space
    return BlockSparsePointwise(*sizes, strides=tuple(strides), **options)


def dense(config):
    """The config of the same run without sparsity, for its operations."""
    other = config.copy_and_resolve_references()
    other.storage, other.method, other.structure = "masks", "dense", None
    other.options, other.sketch = {}, None
    return other


def make_stored(config, inner: optax.GradientTransformation, *, seed: Any, sparsity: Any):
    """The transformation of a stored run: `jaxsparse.stored` with the options of the config."""
    rule = RULES[config.method] if config.sketch is None else "momentum"
    options = {k: v for k in OPTIONS if (v := config.options.get(k)) is not None}
    options.setdefault("seed", config.seed if seed is None else seed)
    if rule == "magnitude":
        options["sparsity"] = config.sparsity if sparsity is None else sparsity
    if rule == "static":
        options = {}
    return jaxsparse.stored(inner, rule=rule, total_steps=config.steps, **options)  # pyright: ignore


def wrt(config) -> Any:
    """The variables of a model that its optimizer is given."""
    return nnx.Param if config.storage == "masks" else Trained


def value_and_grad(loss):
    """`jax.value_and_grad(loss, has_aux=True)` of parameters that may hold integers."""

    def run(params):
        value, grads = jax.value_and_grad(loss, has_aux=True, allow_int=True)(params)
        return value, full_gradients(grads)

    return run


def gradient_norm(grads) -> jax.Array:
    """The norm of the gradients of weights: scores and sketches of blocks are none."""
    named = jaxsparse.targets.named_leaves(grads)
    probes = ("scores", "sketch")
    return optax.global_norm([g for path, g in named if path.rpartition("/")[2] not in probes])


def kept(params) -> dict[str, jax.Array] | None:
    """The blocks, or weights, of stored layers, by path; None for parameters without any."""
    names = {path.rpartition("/")[2] for path, _ in jaxsparse.targets.named_leaves(params)}
    some = "due" in names and names & {"places", "rows"}
    return jaxsparse.nn.stored_blocks(params) if some else None
