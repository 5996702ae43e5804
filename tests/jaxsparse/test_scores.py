"""Scores see a view of a leaf; functions of (w, g) are adapted, and what they declare stays."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsparse
from jaxsparse import scores
from jaxsparse.scores import View

W, G = jnp.asarray([[1.0, -2.0], [3.0, 4.0]]), jnp.asarray([[4.0, 1.0], [-2.0, 0.5]])
VIEW = View(None, W, G)


def test_the_scores_that_have_names():
    assert scores.magnitude(VIEW).tolist() == [[1, 2], [3, 4]]
    assert scores.gradient(VIEW).tolist() == [[4, 1], [2, 0.5]]
    assert scores.saliency(VIEW).tolist() == [[4, 2], [6, 2]]
    assert scores.random(VIEW).tolist() == [[0, 0], [0, 0]]
    assert {n: (scores.ties(s), scores.needs_gradient(s)) for n, s in scores.NAMED.items()} == {
        "magnitude": ("position", False), "gradient": ("hash", True), "saliency": ("hash", True),
        "random": ("hash", False),
    }  # fmt: skip


def test_functions_of_weights_and_gradients_are_adapted_and_views_are_passed_on():
    def of_both(w, g):
        return w * g

    def gradient_may_miss(w, g=None):
        return w if g is None else g

    def with_option(view, power=2):
        return view.w**power

    assert jnp.array_equal(scores.resolve(of_both)(VIEW), W * G)
    assert jnp.array_equal(scores.resolve(lambda w, g: g)(VIEW), G)
    assert jnp.array_equal(scores.resolve(gradient_may_miss)(VIEW), G)
    assert jnp.array_equal(scores.resolve(with_option)(VIEW), W**2)
    assert jnp.array_equal(scores.resolve(functools.partial(with_option, power=3))(VIEW), W**3)
    assert jnp.array_equal(scores.resolve(jax.jit(of_both))(VIEW), W * G)
    adapted = scores.resolve(scores.declare(ties="hash", needs_gradient=True)(of_both))
    assert scores.ties(adapted) == "hash" and scores.needs_gradient(adapted)
    assert scores.resolve(adapted) is adapted


def test_a_view_changes_by_name():
    assert VIEW.replace(w=G).w is G and VIEW.replace(w=G).g is G and VIEW.w is W


def test_statistics_reach_the_score_of_their_leaf_by_tree_and_by_path():
    rng = np.random.default_rng(0)
    p = {"a": {"kernel": jnp.asarray(rng.normal(size=(6, 4)), jnp.float32), "bias": jnp.ones(4)},
         "b": {"kernel": jnp.asarray(rng.normal(size=(4, 6)), jnp.float32), "bias": jnp.ones(6)}}  # fmt: skip
    norms = {"a/kernel": np.arange(1.0, 7), "b/kernel": np.arange(4.0, 0, -1)}

    def wanda(view):
        return jnp.abs(view.w) * view.stats[:, None]

    tree = {k: {"kernel": norms[f"{k}/kernel"], "bias": None} for k in "ab"}
    for stats in (norms, tree):
        _, masks = jaxsparse.prune(p, 0.5, score=wanda, stats=stats)
        for k in "ab":
            s = np.abs(p[k]["kernel"]) * np.asarray(norms[f"{k}/kernel"], np.float32)[:, None]
            best = np.sort(s.ravel())[-12]
            assert np.array_equal(masks[k]["kernel"], s >= best)
    with pytest.raises(ValueError, match="stats: no leaf matches 'c/kernel'; paths look like"):
        jaxsparse.prune(p, 0.5, score=wanda, stats={"c/kernel": 1})
    with pytest.raises(
        ValueError, match=r"score: 'a/kernel' has shape \(6, 4\), its scores \(4,\)"
    ):
        jaxsparse.prune(p, 0.5, score=lambda view: jnp.abs(view.w).sum(0))


def test_gradients_of_another_model_are_named():
    with pytest.raises(ValueError, match="updates: 'kernel' has shape"):
        jaxsparse.prune({"kernel": W}, 0.5, score="saliency", grads={"kernel": W[0]})
    with pytest.raises(ValueError, match="score='size': give a function of a View"):
        scores.resolve("size")
