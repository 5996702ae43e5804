"""EfficientNet-Lite0: what its photographs show, and that hidden channels can be removed and made up for."""

import io
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments.models import efficientnet
from experiments.models.efficientnet import EfficientNet, Stage
from experiments.studies import shrink_efficientnet
from jaxsparse import channels

TINY = (Stage(1, 6, 3, 1, 1), Stage(2, 8, 3, 2, 3))


@pytest.fixture(scope="module")
def tiny():
    model = EfficientNet(stages=TINY, stem=4, head=12, classes=5, rngs=nnx.Rngs(0))
    return nnx.view(model, use_running_average=True)


def test_files_of_tensors_are_read_and_others_refused():
    """The bytes of a file as PyTorch wrote them before 1.6, made by hand."""

    class Storage:
        def __reduce__(self):
            return (eval, ("1",))

    with pytest.raises(pickle.UnpicklingError, match="eval is no part of a file of tensors"):
        efficientnet.read(io.BytesIO(pickle.dumps(Storage(), protocol=2)))


def test_hidden_channels_are_those_of_blocks_and_removing_them_is_exact(tiny):
    groups = shrink_efficientnet.hidden_groups(tiny, 16)
    assert list(groups.widths.values()) == [4, 18, 24]
    keep = {name: np.arange(0, g.width, 2) for name, g in groups.items()}
    small = channels.shrink(tiny, groups, keep=keep, exact=False)
    assert small.report.zeroed < 1e-5
    assert small.model.blocks[1].depthwise.conv.feature_group_count == 9


def test_solving_the_next_layer_brings_the_outputs_back(tiny):
    groups = shrink_efficientnet.hidden_groups(tiny, 16)
    x = np.asarray(jax.random.normal(jax.random.key(0), (6, 16, 16, 3)))
    keep = {name: np.arange(g.width - 3) for name, g in groups.items()}
    small = channels.shrink(tiny, groups, keep=keep, exact=False)
    wanted = [
        np.asarray(y) for _, y in shrink_efficientnet.inputs_and_outputs(tiny, jnp.asarray(x))
    ]
    gap = lambda m: [
        np.linalg.norm(np.asarray(y) - w) / np.linalg.norm(w)
        for (_, y), w in zip(shrink_efficientnet.inputs_and_outputs(m, jnp.asarray(x)), wanted)
    ]
    before = gap(small.model)
    shrink_efficientnet.reconstruct(tiny, small.model, x)
    after = gap(small.model)
    assert sum(after) < 0.9 * sum(before), (before, after)


@pytest.mark.slow
def test_the_trained_network_names_what_is_in_the_photographs():
    model = efficientnet.load()
    samples = efficientnet.samples()
    x = np.stack([efficientnet.scaled(image) for image, _ in samples.values()])
    found = np.asarray(shrink_efficientnet.logits(model, jnp.asarray(x))).argmax(1)
    wrong = {n: int(f) for (n, (_, known)), f in zip(samples.items(), found) if f not in known}
    assert not wrong
    assert sum(p.size for p in jax.tree.leaves(nnx.state(model, nnx.Param))) == 4_652_008
