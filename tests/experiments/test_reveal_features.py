"""Dynamic feature selection, held to the planted problem whose greedy order is known."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.studies import reveal_features as study


class Fixed:
    """A network that gives the same rows whatever it sees, and remembers what that was."""

    def __init__(self, row):
        self.row, self.seen = jnp.asarray(row), []

    def __call__(self, x, mask):
        self.seen.append(np.asarray(mask))
        return jnp.broadcast_to(self.row, (len(x), *self.row.shape))


def test_a_subset_has_any_number_of_features_equally_often():
    counts = np.asarray(study.random_subsets(jax.random.key(0), (6000, 3))).sum(1)
    assert np.bincount(counts.astype(int), minlength=4) / 6000 == pytest.approx(0.25, abs=0.03)


def test_each_feature_is_revealed_once_and_the_best_first():
    policy = Fixed([0.3, 2.0, -1.0, 1.0])
    order, masks = study.reveal(policy, jnp.zeros((5, 4)), 3)
    assert (np.asarray(order) == [1, 3, 0]).all()
    assert np.asarray(masks.sum(-1)).tolist() == [[1] * 5, [2] * 5, [3] * 5]
    with pytest.raises(ValueError, match="budget=5: must be from 1 to the 4 features"):
        study.reveal(policy, jnp.zeros((5, 4)), 5)


def test_the_loss_is_a_mean_over_steps_and_the_hard_mask_repeats_nothing():
    policy, predictor = Fixed(jnp.array([50.0, 0.0, 0.0])), Fixed(jnp.array([1.0, 0.0]))
    x, y = jnp.ones((7, 3)), jnp.zeros(7, int)
    loss = study.policy_loss(policy, predictor, x, y, jax.random.key(0), budget=3, temperature=0.1)
    assert float(loss) == pytest.approx(np.log1p(np.exp(-1.0)), rel=1e-5)  # not its sum
    assert [m.sum(1).tolist() for m in policy.seen] == [[0] * 7, [1] * 7, [2] * 7]
    assert all((m[:, 0] == 1).all() for m in policy.seen[1:])  # the likeliest came first
    assert set(np.unique(policy.seen)) == {0.0, 1.0}  # no gradient passes from step to step
    # The soft mask never hides what is known, and may name it again.
    assert all((s >= h - 1e-6).all() for s, h in zip(predictor.seen, policy.seen))


def test_the_best_fixed_subset_by_counting():
    # One bit is right where it is named (1/3), else half the time; three bits vote.
    expected = [1 / 3 + 2 / 3 / 2, 2 / 3, 2 / 3 + 1 / 3 / 2, 1.0]
    assert [study.best_fixed(n) for n in (1, 2, 3, 4)] == pytest.approx(expected)
    x, y = map(np.asarray, study.planted(50, 0))
    assert all(label == row[int(row[0])] for row, label in zip(x, y))
    assert set(itertools.chain(*x[:, 1:].tolist())) == {0.0, 1.0}


@pytest.mark.slow
def test_the_policy_asks_for_a_bit_then_the_name_then_the_bit_that_it_names():
    policy, predictor = study.fit(*study.planted(8192, 0), budget=4, classes=2, steps=1000)
    x, y = study.planted(1000, 1)
    order, masks = study.reveal(policy, x, 4)
    order = np.asarray(order)
    assert (order[:, 0] != 0).all() and (order[:, 1] == 0).mean() > 0.99
    named = np.asarray(x[:, 0], int)
    open_ = order[:, 0] != named
    assert (order[open_, 2] == named[open_]).mean() > 0.99
    assert float((predictor(x, masks[2]).argmax(-1) == y).mean()) > 0.99
