"""SmolLM2 made smaller: what goes together, and what solving makes up for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments.models import smollm2
from experiments.studies import shrink_smollm2 as study
from jaxsparse import channels

TINY = smollm2.Config(3, 24, 20, 6, 3, 50)


@pytest.fixture(scope="module")
def tiny():
    return smollm2.SmolLM2(TINY, nnx.Rngs(0))


@pytest.fixture(scope="module")
def tokens():
    return list(jax.random.randint(jax.random.key(1), (4, 2, 32), 0, 50))


def test_rotary_positions_let_whole_groups_of_heads_go(tiny, tokens):
    found = channels.find(tiny, tokens[0])
    group = found["layers/1/attention/query/kernel:1.0"]
    assert group.width == 3
    assert {f"layers/1/attention/{n}/kernel" for n in ("query", "key", "value", "out")} == {
        m.path for m in group.members
    }
    exact = channels.zero_invariance(tiny, found)
    assert all(d < 1e-5 for name, d in exact.items() if "embed" not in name)
    assert exact["embed/embedding:1"] > 1e-3  # the norms take their statistics over it


@pytest.mark.parametrize("kind", study.KINDS)
def test_what_goes_is_smaller_and_solving_brings_the_stream_back(tiny, tokens, kind):
    goals = study.streams(tiny, tokens)
    model, blocks, stays = study.smaller(tiny, kind, 1 / 3, tokens)
    assert study.size(model) < study.size(tiny)
    last = [*(b - 1 for b in blocks[1:]), 2]
    after = [goals[g] for b, e in zip(blocks, last) for g in (2 * b, 2 * e + 1)]
    error = lambda m: np.linalg.norm(study.streams(m, tokens)[-1][0] - goals[-1][0][..., stays])
    before = error(model)
    study.solve(model, tokens, after, stays)
    assert error(model) < 0.9 * before


def test_nothing_gone_is_solved_to_itself(tiny, tokens):
    same = nnx.clone(tiny)
    study.solve(same, tokens, study.streams(tiny, tokens), np.arange(24))
    np.testing.assert_allclose(same(tokens[0]), tiny(tokens[0]), atol=1e-4)


def test_blocks_that_turn_the_stream_least_go_first(tokens):
    model = smollm2.SmolLM2(TINY, nnx.Rngs(0))
    for kernel in (model.layers[1].attention.out.kernel, model.layers[1].down.kernel):
        kernel.set_value(jnp.zeros_like(kernel[...]))
    _, blocks, _ = study.smaller(model, "layers", 1 / 3, tokens)
    assert blocks == [0, 2]


def test_an_unknown_kind_is_refused(tiny, tokens):
    with pytest.raises(ValueError, match="kind='heads': use one of hidden"):
        study.smaller(tiny, "heads", 0.5, tokens)


@pytest.mark.slow
def test_solving_helps_real_layers(capsys):
    rows = study.study(2, ["groups", "hidden"], [1 / 3], sequences=8, length=64)
    assert all(r["solved"] < r["plain"] for r in rows[1:])
    assert "| groups of heads | 33% | 98% |" in study.table(rows)
