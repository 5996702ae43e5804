r"""What pruning does to single classes and examples: populations of dense networks next to pruned ones.

Overall accuracy hides that a few classes and examples lose much. Predictions of K networks of each kind on one test
set are all that is read: integers `[networks, examples]`. (Hooker et al., What do compressed deep neural networks
forget?, 2021.)
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jaxsparse.analysis import plots

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def _checked(predictions, labels=None) -> np.ndarray:
    found = np.asarray(predictions)
    if found.ndim != 2 or not np.issubdtype(found.dtype, np.integer):
        raise ValueError(
            f"predictions: {found.dtype}{list(found.shape)}; give class numbers [networks, examples]"
        )
    if labels is not None and np.shape(labels) != found.shape[1:]:
        raise ValueError(f"labels: {np.shape(labels)}; there are {found.shape[1]} examples")
    return found


def modal_labels(predictions) -> np.ndarray:
    """The label that most networks give to each example; of equally many the lowest.

    Args:
      predictions: integers `[networks, examples]`.

    Returns:
      Integers `[examples]`.

    >>> modal_labels(np.array([[0, 2], [1, 2], [1, 0]])).tolist()
    [1, 2]

    Raises:
      ValueError: predictions of another shape or type.
    """
    found = _checked(predictions)
    counts = np.stack([(found == c).sum(axis=0) for c in range(int(found.max(initial=0)) + 1)])
    return counts.argmax(axis=0)


def identified_exemplars(dense, pruned) -> np.ndarray:
    """The examples whose modal label differs between the two populations (pruning identified exemplars, PIEs),
    bool `[examples]`. With one network each it is their disagreement, not this.

    >>> identified_exemplars(np.array([[0, 1], [0, 1]]), np.array([[0, 0], [0, 0]])).tolist()
    [False, True]

    Raises:
      ValueError: as `modal_labels`; other numbers of examples.
    """
    a, b = _checked(dense), _checked(pruned)
    if a.shape[1] != b.shape[1]:
        raise ValueError(
            f"predictions of {a.shape[1]} and {b.shape[1]} examples: give one test set"
        )
    return modal_labels(a) != modal_labels(b)


class ClassImpact(NamedTuple):
    """Per class: the change of recall less that of accuracy, and the p value of Welch's t-test over the networks."""

    change: np.ndarray
    p: np.ndarray

    def significant(self, level: float = 0.05) -> np.ndarray:
        """The classes whose change is significant, each for itself: at 5 % one of twenty is by chance."""
        return self.p <= level


def class_impact(dense, pruned, labels, *, classes: int | None = None) -> ClassImpact:
    r"""$\beta_c = (recall^s_c - recall^0_c) - (acc^s - acc^0)$: which classes lose more, or less, than all do.

    For each class the numbers $recall_c - acc$ of the networks of both populations are compared (Welch).

    Args:
      dense, pruned: predictions `[networks, examples]`, at least two networks each (the authors take 30).
      labels: the truth, `[examples]`.
      classes: their number; None: one more than the largest label.

    Returns:
      Changes and p values, `[classes]`; NaN for a class without an example.

    >>> labels = np.array([0, 0, 1, 1])
    >>> found = class_impact([[0, 0, 1, 1], [0, 0, 1, 0]], [[0, 0, 0, 0], [0, 0, 0, 1]], labels)
    >>> found.change.round(3).tolist()
    [0.25, -0.25]

    Raises:
      ValueError: fewer than two networks; shapes that do not fit.
    """
    import scipy.stats

    truth = np.asarray(labels)
    number = int(truth.max(initial=0)) + 1 if classes is None else classes
    rows = []
    for found in (_checked(dense, truth), _checked(pruned, truth)):
        if found.shape[0] < 2:
            raise ValueError(
                "predictions: give at least two networks of each kind, [networks, examples]"
            )
        right = found == truth
        of = [truth == c for c in range(number)]
        recall = [right[:, m].mean(axis=1) if m.any() else np.full(len(found), np.nan) for m in of]
        rows.append(np.stack(recall, axis=1) - right.mean(axis=1, keepdims=True))
    a, b = rows
    change = b.mean(axis=0) - a.mean(axis=0)
    spread = a.var(axis=0) + b.var(axis=0)
    with warnings.catch_warnings():  # of classes in which all networks are the same, see below
        warnings.simplefilter("ignore", RuntimeWarning)
        test: Any = scipy.stats.ttest_ind(a, b, axis=0, equal_var=False)
        p = np.asarray(test.pvalue)
    p = np.where(spread == 0, np.where(change == 0, 1.0, 0.0), p)  # no network differs from another
    return ClassImpact(change, np.where(np.isnan(change), np.nan, p))


def impact_bars(
    impact: ClassImpact,
    names: Sequence[str] | None = None,
    *,
    level: float = 0.05,
    title: str = "Recall of each class, less the change of accuracy",
) -> Figure:
    """A bar per class, worst first; those that are significant are filled.

    >>> impact = ClassImpact(np.array([-0.1, 0.05]), np.array([0.01, 0.4]))
    >>> len(impact_bars(impact, ["cat", "dog"]).axes)
    1
    """
    order = np.argsort(impact.change)
    label = list(map(str, range(len(order)))) if names is None else list(names)
    values = {label[c]: 100 * float(impact.change[c]) for c in order}
    marked = [bool(impact.significant(level)[c]) for c in order]
    return plots.signed_bars(values, marked, title=title, xlabel="points (filled: significant)")


def calibration_error(probabilities, labels, *, bins: int = 15) -> float:
    r"""The expected calibration error: the mean of |accuracy - confidence| over bins of confidence, by their size.

    Args:
      probabilities: `[examples, classes]`.
      labels: `[examples]`.
      bins: of equal width on [0, 1].

    >>> round(calibration_error([[0.9, 0.1], [0.9, 0.1]], [0, 1]), 3)
    0.4

    Raises:
      ValueError: shapes that do not fit, no bins.
    """
    p, truth = np.asarray(probabilities, np.float64), np.asarray(labels)
    if p.ndim != 2 or truth.shape != p.shape[:1] or bins < 1:
        raise ValueError(
            f"probabilities {p.shape}, labels {truth.shape}, bins={bins}: give [examples, classes], "
            "[examples], and at least one bin"
        )
    confidence, right = p.max(axis=1), p.argmax(axis=1) == truth
    which = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = [abs(right[which == b].sum() - confidence[which == b].sum()) for b in range(bins)]
    return float(sum(gaps) / len(truth))
