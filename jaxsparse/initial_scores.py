r"""What a weight is worth before training: scores of a loss, or of the network alone.

    scores = snip(loss, params, batches)
    params, masks = jaxsparse.prune(params, 0.9, score=given, stats=scores, allocation="global")
    tx = jaxsparse.static(optax.adamw(1e-3), masks=masks)

`snip` and `grasp` are functions `(loss, params, batches)`, run once; `synflow` finds its masks in rounds,
without data. Scores are trees like the parameters; the higher, the sooner a weight is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax import Array

from jaxsparse.allocations import Global
from jaxsparse.choose import check_sparsity, choose
from jaxsparse.leaves import find
from jaxsparse.scores import View
from jaxsparse.typing import Targets

Loss = Callable[[Any, Any], Array]  # (params, batch) -> mean loss of the batch


def given(view: View) -> Array:
    """The score that `stats=` holds for this leaf, as in the example above."""
    return view.stats


def _mean(function: Callable[[Any], Any], batches: Iterable[Any]):
    """The mean of a tree over the batches, and their number."""
    total, number = None, 0
    for batch in batches:
        new = function(batch)
        total = new if total is None else optax.tree.add(total, new)
        number += 1
    if total is None:
        raise ValueError("batches: give at least one")
    return optax.tree.scale(1 / number, total)


def snip(loss: Loss, params, batches: Iterable[Any]):
    r"""Connection sensitivity, $|w\, \partial L / \partial w|$: how much the loss changes, to first order,
    if the weight is removed. The gradient is averaged over the batches before its magnitude is taken.

    Args:
      loss: `(params, batch) -> scalar`, the mean over the batch; in evaluation mode.
      params: the parameters, at initialisation.
      batches: one or more.

    Returns:
      A tree like `params`.

    (Lee et al., SNIP: single-shot network pruning based on connection sensitivity, 2019.)

    >>> scores = snip(lambda p, x: jnp.sum(p["w"] * x), {"w": jnp.array([1.0, -2.0])}, [jnp.ones(2)])
    >>> scores["w"].tolist()
    [1.0, 2.0]

    Raises:
      ValueError: no batch.
    """
    grad = jax.jit(jax.grad(loss))
    g = _mean(lambda batch: grad(params, batch), batches)
    return jax.tree.map(lambda w, g: jnp.abs(w * g), params, g)


def grasp(loss: Loss, params, batches: Iterable[Any]):
    r"""Preservation of the gradient's flow, $w \odot H g$ with $g = \partial L/\partial w$: removing a
    weight changes $\tfrac12 \|g\|^2$ by $-w\,(Hg)$ to first order, so that those go first whose removal
    raises it most. Signed: a magnitude would be another method.

    Args:
      loss: `(params, batch) -> scalar`; the authors divide the logits by 200 in it.
      params: the parameters, at initialisation.
      batches: read twice, so a list; the authors take 10 to 25 examples of each class.

    Returns:
      A tree like `params`.

    (Wang et al., Picking winning tickets before training by preserving gradient flow, 2020.)

    >>> quadratic = lambda p, a: 0.5 * p["w"] @ a @ p["w"]
    >>> a = jnp.array([[2.0, 0.0], [0.0, 1.0]])
    >>> grasp(quadratic, {"w": jnp.array([1.0, 3.0])}, [a])["w"].tolist()  # w A A w
    [4.0, 9.0]

    Raises:
      ValueError: no batch.
    """
    batches = list(batches)
    grad = jax.grad(loss)
    compiled = jax.jit(grad)
    g = _mean(lambda batch: compiled(params, batch), batches)

    @jax.jit
    def curvature(g, batch):
        return jax.jvp(lambda p: grad(p, batch), (params,), (g,))[1]

    hg = _mean(lambda batch: curvature(g, batch), batches)
    return jax.tree.map(lambda w, h: w * h, params, hg)


def fisher(
    forward: Callable[[Any, Array], Array],
    params,
    batches: Iterable[Any],
    *,
    labels: Literal["given", "expected"] = "given",
    power: int = 2,
):
    r"""The diagonal of the Fisher information, $\frac1n \sum_n (\partial \log p(y_n | x_n) / \partial w)^2$: of
    single examples, whose squares add up; the square of a batch's gradient is another thing.

    Args:
      forward: `(params, x) -> logits [batch, classes]`, in evaluation mode, each example for itself.
      params: the parameters.
      batches: pairs `(x, y)`, labels as integers; with "expected" y is not read.
      labels: "given": y of the data (the empirical Fisher information); "expected": the sum over all
        classes, each with its probability under the model.
      power: 2, or 1 for the mean of magnitudes.

    Returns:
      A tree like `params`.

    (Sung, Nair & Raffel, Training neural networks with fixed sparse masks, 2021.)

    >>> logits = lambda p, x: jnp.stack([0.0 * x[:, 0], x @ p["w"]], axis=1)  # a logistic regression
    >>> x, y = jnp.array([[1.0, 2.0]]), jnp.array([1])
    >>> fisher(logits, {"w": jnp.zeros(2)}, [(x, y)])["w"].tolist()  # (1/2 - y)^2 x^2
    [0.25, 1.0]

    Raises:
      ValueError: no batch, another `labels` or `power`.
    """
    if labels not in ("given", "expected"):
        raise ValueError(f"labels={labels!r}: use 'given' or 'expected'")
    if power not in (1, 2):
        raise ValueError(f"power={power}: use 2, or 1 for magnitudes")

    def log_p(p, x, c):
        return jax.nn.log_softmax(forward(p, x[None])[0].astype(jnp.float32))[c]

    def one(total, example):
        x, y = example
        size = lambda c: jax.tree.map(lambda g: jnp.abs(g) ** power, jax.grad(log_p)(params, x, c))
        if labels == "given":
            return optax.tree.add(total, size(y)), None
        chances = jax.nn.softmax(forward(params, x[None])[0].astype(jnp.float32))
        each = jax.lax.map(
            lambda c: optax.tree.scale(chances[c], size(c)), jnp.arange(chances.size)
        )
        return optax.tree.add(total, jax.tree.map(lambda s: jnp.sum(s, axis=0), each)), None

    @jax.jit
    def mean(batch):
        total, _ = jax.lax.scan(one, optax.tree.zeros_like(params), batch)
        return optax.tree.scale(1 / batch[0].shape[0], total)

    return _mean(mean, batches)


def flow(forward: Callable[[Any, Array], Array], params, x: Array):
    r"""Synaptic flow, $|w|\, \partial R / \partial |w|$ with R the sum of the outputs of the network whose
    parameters are replaced by their magnitudes, for an input of ones.

    Leaves are scaled by powers of 2, so that deep products neither overflow nor vanish. Without biases
    the flow of a network is a product over its layers, and this changes no ranking.

    Args:
      forward: `(params, x) -> outputs`, in evaluation mode.
      params: the parameters, masked where a mask is tried.
      x: an input; its shape and dtype are used.
    """

    def size(w):
        if not jnp.issubdtype(w.dtype, jnp.floating):
            return w
        w = jnp.abs(w)
        inputs = max(w.size // w.shape[-1], 1) if w.ndim > 1 else 1
        typical = jnp.sum(w) / jnp.maximum(jnp.sum(w > 0), 1) * inputs
        scale = jnp.exp2(jnp.round(jnp.log2(jnp.where(typical > 0, typical, 1.0))))
        return w / scale.astype(w.dtype) if w.ndim > 1 else w

    sizes = jax.tree.map(size, params)
    floats, treedef = jax.tree.flatten(sizes)
    which = [i for i, w in enumerate(floats) if jnp.issubdtype(w.dtype, jnp.floating)]

    def total(values):
        leaves = list(floats)
        for i, w in zip(which, values):
            leaves[i] = w
        return jnp.sum(forward(treedef.unflatten(leaves), jnp.ones_like(x)).astype(jnp.float32))

    slopes = jax.grad(total)([floats[i] for i in which])
    scores = [jnp.zeros(w.shape) for w in floats]
    for i, slope in zip(which, slopes):
        scores[i] = floats[i] * slope
    return treedef.unflatten(scores)


def synflow(
    forward: Callable[[Any, Array], Array],
    params,
    x: Array,
    sparsity: float,
    *,
    rounds: int = 100,
    targets: Targets = None,
):
    r"""Masks by synaptic flow, without data: in round i of n the weights of highest `flow` are kept, over
    all layers together, at the density $(1 - S)^{i/n}$. Thin layers survive, since every layer of a
    network without biases carries the same flow.

    Args:
      forward: `(params, x) -> outputs`, in evaluation mode.
      params: the parameters, at initialisation.
      x: an input; its shape and dtype are used.
      sparsity: S in [0, 1), over all sparse leaves.
      rounds: n; 1 prunes at once, and loses thin layers.
      targets: as for every method.

    Returns:
      The tree of masks, None at dense leaves, for `jaxsparse.static(masks=...)`.

    (Tanaka et al., Pruning neural networks without any data by iteratively conserving synaptic flow,
    2020.)

    >>> net = lambda p, x: jax.nn.relu(x @ p["a"]["kernel"]) @ p["b"]["kernel"]
    >>> params = {"a": {"kernel": jnp.ones((4, 8))}, "b": {"kernel": jnp.ones((8, 1))}}
    >>> masks = synflow(net, params, jnp.ones((1, 4)), 0.5, rounds=3)
    >>> sum(int(m.sum()) for m in jax.tree.leaves(masks))
    20

    Raises:
      ValueError: a sparsity not in [0, 1), fewer rounds than one.
    """
    sparsity = check_sparsity(sparsity)
    if rounds < 1:
        raise ValueError(f"rounds={rounds}: must be at least 1")
    sparse = find(params, targets)
    weights = sparse.take(params)

    def one(masks, i):
        held = [jnp.where(m, w, jnp.zeros((), w.dtype)) for m, w in zip(masks, weights)]
        scores = sparse.take(flow(forward, sparse.put(params, held), x))
        density = (1.0 - sparsity) ** (i / rounds)
        way = (1.0 - density) / max(sparsity, 1e-9)
        fraction = jnp.where(i >= rounds, 1.0, way)
        kept = choose(sparse.leaves, scores, Global(), sparsity, fraction=fraction, where=masks)
        return kept, None

    start = [jnp.ones(w.shape, bool) for w in weights]
    steps = jnp.arange(1, rounds + 1, dtype=jnp.float32)
    masks, _ = jax.jit(lambda start: jax.lax.scan(one, start, steps))(start)
    return sparse.scatter(masks)
