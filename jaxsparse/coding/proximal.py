r"""Proximal solvers of $\min_x \frac12\|A x - y\|^2 + \lambda R(x)$, for a batch of signals at once.

A fixed number of steps, so that everything runs under `jit` and `vmap`; with a number that is not traced
they can be differentiated. Signals are `[..., m]`, codes `[..., n]`. Results have the dtype of the signals.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxsparse._checks import check_count
from jaxsparse.coding.operators import (
    Dense,
    Dictionary,
    Operator,
    as_operator,
    check_codes,
    check_matrix,
    check_positive,
    check_signals,
    check_steps,
    check_strength,
)
from jaxsparse.coding.thresholds import keep_largest, soft

Prox = Callable[[Array, Array | float], Array]


def lasso_objective(
    dictionary: Dictionary, signals: Array, codes: Array, strength: Array | float
) -> Array:
    r"""$\frac12\|A x - y\|^2 + \lambda\|x\|_1$ of each signal.

    scikit-learn's `Lasso(alpha)` minimises this divided by m, with $\lambda = m \cdot alpha$.

    Args:
      dictionary: `[m, n]`, or an operator.
      signals: `[..., m]`.
      codes: `[..., n]`.
      strength: $\lambda$, a number or one for each signal `[..., 1]`.

    Returns:
      `[...]`.

    Raises:
      ValueError: shapes that do not fit, a negative strength, NaN in the signals.

    >>> float(lasso_objective(jnp.eye(2), jnp.array([1.0, 0.0]), jnp.array([0.5, 0.0]), 1.0))
    0.625
    """
    op, signals, strength = _checked(dictionary, signals, codes, strength)
    rest = op.forward(codes) - signals
    return 0.5 * jnp.sum(rest * rest, -1) + strength * jnp.sum(jnp.abs(codes), -1)


def duality_gap(
    dictionary: Dictionary, signals: Array, codes: Array, strength: Array | float
) -> Array:
    r"""How far the LASSO objective is above its minimum at most: a certificate that needs no other solver.

    With $r = y - A x$ and $\theta = r \min(1, \lambda / \|A^T r\|_\infty)$, which is feasible for the dual
    problem, the gap is $\frac12\|r\|^2 + \lambda\|x\|_1 - \frac12\|y\|^2 + \frac12\|y - \theta\|^2$.

    Args:
      dictionary: `[m, n]`, or an operator.
      signals: `[..., m]`.
      codes: `[..., n]`.
      strength: $\lambda$, a number or one for each signal `[..., 1]`.

    Returns:
      `[...]`; 0 at the solution, up to rounding.

    Raises:
      ValueError: shapes that do not fit, a negative strength, NaN in the signals.

    >>> y = jnp.array([2.0, 0.1])
    >>> float(duality_gap(jnp.eye(2), y, soft(y, 0.5), 0.5)) < 1e-6
    True
    """
    op, signals, strength = _checked(dictionary, signals, codes, strength)
    r = signals - op.forward(codes)
    return gap_of(signals, r, op.adjoint(r), codes, strength)


def gap_of(
    signals: Array, r: Array, correlation: Array, codes: Array, strength: Array | float
) -> Array:
    """`duality_gap` where the residual r and its products with the atoms are known; a strength is a number or `[...]`."""
    largest = jnp.max(jnp.abs(correlation), -1)
    scale = jnp.minimum(1, strength / jnp.maximum(largest, jnp.finfo(r.dtype).tiny))
    # 1/2 |y|^2 - 1/2 |y - theta|^2 = theta . (y - theta / 2): no difference of large numbers.
    theta = r * scale[..., None]
    dual = jnp.sum(theta * (signals - theta / 2), -1)
    return 0.5 * jnp.sum(r * r, -1) + strength * jnp.sum(jnp.abs(codes), -1) - dual


def ista(
    dictionary: Dictionary,
    signals: Array,
    strength: Array | float,
    *,
    steps: Array | int = 100,
    prox: Prox = soft,
    init: Array | None = None,
) -> Array:
    r"""Proximal gradient: $x \leftarrow prox_{\lambda/L}(x - A^T(A x - y)/L)$ with $L = \|A\|_2^2$.

    The objective never increases, and $F(x_k) - F^* \le L\|x_0 - x^*\|^2 / 2k$. With `prox=hard` it is
    iterative hard thresholding of the l0 penalty.

    Args:
      dictionary: `[m, n]`, atoms in columns, or an operator with a bound of its norm.
      signals: `[..., m]`.
      strength: $\lambda$, a number or one for each signal `[..., 1]`.
      steps: how many; may be traced, then without gradients.
      prox: of (values, threshold): `soft`, `soft_nonnegative`, `hard`, or another.
      init: `[..., n]`; None: 0.

    Returns:
      The codes `[..., n]`, with exact zeros.

    Raises:
      ValueError: shapes that do not fit, a negative strength or number of steps, NaN in the signals.

    >>> [f"{x:.2f}" for x in ista(jnp.eye(2), jnp.array([2.0, 0.1]), 0.5, steps=20)]
    ['1.50', '0.00']

    Source: Daubechies, Defrise, De Mol, 2004; bounds by Beck & Teboulle, 2009.
    """
    op, signals, x, lipschitz = _start(dictionary, signals, strength, init, steps)
    step = lambda _, x: prox(
        x - op.adjoint(op.forward(x) - signals) / lipschitz, strength / lipschitz
    )
    return jax.lax.fori_loop(0, steps, step, x)


def fista(
    dictionary: Dictionary,
    signals: Array,
    strength: Array | float,
    *,
    steps: Array | int = 100,
    prox: Prox = soft,
    init: Array | None = None,
    restart: bool = True,
) -> Array:
    r"""Accelerated proximal gradient: the step of `ista` at $z$, then
    $t^+ = (1 + \sqrt{1 + 4t^2})/2$ and $z = x^+ + \frac{t - 1}{t^+}(x^+ - x)$.

    $F(x_k) - F^* \le 2L\|x_0 - x^*\|^2/(k+1)^2$ (without restarts). It is not monotone. With `restart` the momentum of
    a signal starts anew where $\langle z - x^+, x^+ - x\rangle > 0$, which makes it converge linearly near the solution.

    Args:
      dictionary: `[m, n]`, atoms in columns, or an operator with a bound of its norm.
      signals: `[..., m]`.
      strength: $\lambda$, a number or one for each signal `[..., 1]`.
      steps: how many; may be traced, then without gradients.
      prox: of (values, threshold): `soft`, `soft_nonnegative`, or another of a convex function.
      init: `[..., n]`; None: 0.
      restart: momentum that leads upwards is dropped, for each signal apart.

    Returns:
      The codes `[..., n]`, with exact zeros.

    Raises:
      ValueError: shapes that do not fit, a negative strength or number of steps, NaN in the signals.

    >>> [f"{x:.2f}" for x in fista(jnp.eye(2), jnp.array([2.0, 0.1]), 0.5, steps=20)]
    ['1.50', '0.00']

    Source: Beck & Teboulle, 2009; the restart is that of O'Donoghue & Candès, 2015.
    """
    op, signals, x, lipschitz = _start(dictionary, signals, strength, init, steps)

    def step(_, carry):
        x, z, t = carry
        new = prox(z - op.adjoint(op.forward(z) - signals) / lipschitz, strength / lipschitz)
        if restart:
            upwards = jnp.sum((z - new) * (new - x), -1, keepdims=True) > 0
            t = jnp.where(upwards, 1, t)
        after = (1 + jnp.sqrt(1 + 4 * t * t)) / 2
        return new, new + (t - 1) / after * (new - x), after

    t = jnp.ones((*x.shape[:-1], 1), x.dtype)
    return jax.lax.fori_loop(0, steps, step, (x, x, t))[0]


def iht(
    dictionary: Dictionary,
    signals: Array,
    k: int,
    *,
    steps: Array | int = 100,
    init: Array | None = None,
) -> Array:
    r"""Iterative hard thresholding of $\min \|A x - y\|^2$ s.t. $\|x\|_0 \le k$:
    $x \leftarrow H_k(x - A^T(A x - y)/L)$, $H_k$ keeps the k largest entries.

    The residual never increases. Every iterate has at most k entries.

    Args:
      dictionary: `[m, n]`, atoms in columns, or an operator with a bound of its norm.
      signals: `[..., m]`.
      k: how many atoms, from 1 to n.
      steps: how many; may be traced, then without gradients.
      init: `[..., n]`; None: 0.

    Returns:
      The codes `[..., n]`.

    Raises:
      ValueError: k out of range, shapes that do not fit, NaN in the signals.

    >>> [f"{x:.2f}" for x in iht(jnp.eye(3), jnp.array([1.0, 3.0, -2.0]), 1, steps=50)]
    ['0.00', '3.00', '0.00']

    Source: Blumensath & Davies, 2009.
    """
    op, signals, x, lipschitz = _start(dictionary, signals, 0.0, init, steps)
    check_count("k", k, most=op.columns, arrays=True)
    step = lambda _, x: keep_largest(x - op.adjoint(op.forward(x) - signals) / lipschitz, k)
    return jax.lax.fori_loop(0, steps, step, x)


def admm(
    dictionary: Array,
    signals: Array,
    strength: Array | float = 0.0,
    *,
    rho: Array | float = 1.0,
    steps: Array | int = 100,
    prox: Prox = soft,
    relaxation: float = 1.6,
) -> Array:
    r"""ADMM on $\frac12\|A x - y\|^2 + \lambda R(z)$, $x = z$:

    $x = (A^T A + \rho I)^{-1}(A^T y + \rho(z - u))$, $\hat x = \alpha x + (1-\alpha) z$,
    $z = prox_{\lambda/\rho}(\hat x + u)$, $u \leftarrow u + \hat x - z$.

    The system is factored once, by the smaller of $A^T A$ and $A A^T$. For the l0 constraint give a projection:
    `prox=lambda v, t: keep_largest(v, k)`; the problem is then not convex, and the result one of its stationary points.

    Args:
      dictionary: `[m, n]`, atoms in columns.
      signals: `[..., m]`.
      strength: $\lambda$, a number or one for each signal `[..., 1]`.
      rho: $\rho$; the solution does not depend on it, the speed does.
      steps: how many; may be traced.
      prox: of (values, threshold).
      relaxation: $\alpha$, between 1 and 2.

    Returns:
      $z$ `[..., n]`, which has the exact zeros.

    Raises:
      ValueError: shapes that do not fit, a negative strength or number of steps, rho not positive, a relaxation not
        between 0 and 2, NaN in the signals.

    >>> [f"{x:.2f}" for x in admm(jnp.eye(2), jnp.array([2.0, 0.1]), 0.5, steps=50)]
    ['1.50', '0.00']

    Source: Boyd et al., "Distributed optimization and statistical learning via ADMM", 2011.
    """
    check_matrix(dictionary)
    signals = check_signals(dictionary, signals)
    check_strength(strength, signals, each=dictionary.shape[1])
    check_positive("rho", rho)
    check_steps("steps", steps)
    if not 0 < relaxation < 2:
        raise ValueError(f"relaxation={relaxation}: must be between 0 and 2, usually 1 to 1.8")
    a = jnp.asarray(dictionary, signals.dtype)
    m, n = a.shape
    times = lambda x, y: jnp.matmul(x, y, precision="highest")
    # The inverse, as one product a step is faster than two triangular solves of many right-hand sides.
    if n <= m:
        inverse = jnp.linalg.inv(times(a.T, a) + rho * jnp.eye(n, dtype=a.dtype))
        solve = lambda b: times(b, inverse)
    else:
        inner = jnp.linalg.solve(times(a, a.T) + rho * jnp.eye(m, dtype=a.dtype), a)
        solve = lambda b: (b - times(times(b, a.T), inner)) / rho
    start = times(signals, a)

    def step(_, carry):
        z, u = carry
        x = solve(start + rho * (z - u))
        x = relaxation * x + (1 - relaxation) * z
        new = prox(x + u, strength / rho)
        return new, u + x - new

    zero = jnp.zeros_like(start)
    return jax.lax.fori_loop(0, steps, step, (zero, zero))[0]


def _light(dictionary: Dictionary) -> Dense | Operator:
    """An operator without its norm, which products do not need."""
    if isinstance(dictionary, Dense | Operator):
        return dictionary
    check_matrix(dictionary)
    return Dense(jnp.asarray(dictionary), jnp.zeros(()))


def _checked(
    dictionary: Dictionary, signals: Array, codes: Array, strength: Array | float
) -> tuple[Dense | Operator, Array, Array | float]:
    """The operator, the signals, and the strength as a number or `[...]`."""
    op = _light(dictionary)
    signals = check_signals(op, signals)
    check_codes(op, signals, codes)
    check_strength(strength, signals)
    return op, signals, jnp.asarray(strength)[..., 0] if np.ndim(strength) else strength


def _start(
    dictionary: Dictionary,
    signals: Array,
    strength: Array | float,
    init: Array | None,
    steps: Array | int,
) -> tuple[Dense | Operator, Array, Array, Array]:
    """Checked arguments: the operator, the signals, the first codes and the Lipschitz constant."""
    op = as_operator(dictionary)
    signals = check_signals(op, signals)
    check_strength(strength, signals, each=op.columns)
    check_steps("steps", steps)
    shape = (*signals.shape[:-1], op.columns)
    if init is not None and np.shape(init) != shape:
        raise ValueError(
            f"init has shape {np.shape(init)}: codes of these signals have shape {shape}"
        )
    x = jnp.zeros(shape, signals.dtype) if init is None else jnp.asarray(init, signals.dtype)
    # A dictionary of zeros has norm 0: any step is right, as its gradient is 0.
    lipschitz = jnp.asarray(op.norm, signals.dtype) ** 2
    return op, signals, x, jnp.maximum(lipschitz, jnp.finfo(signals.dtype).tiny)
