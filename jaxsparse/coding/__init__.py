r"""Sparse coding: codes found for a dictionary, dictionaries learned, inverse problems solved.

Signals are `[..., m]`, a dictionary is `[m, n]` with atoms in columns, codes are `[..., n]`: a signal is about
$A x$. Every function is pure, takes a batch of signals, runs a fixed number of steps, and works under `jit` and
`vmap`. Where a dictionary is said to be a matrix or an operator, `Operator` takes functions: $A$, its adjoint, and
a bound of its norm.

    from jaxsparse import coding
    codes = coding.fista(dictionary, signals, 0.1, steps=200)
    coding.duality_gap(dictionary, signals, codes, 0.1).max()   # a certificate
    codes = coding.omp(dictionary, signals, k=8)
"""

from jaxsparse.coding.audio import declip, inpaint
from jaxsparse.coding.bayes import Posterior, sbl, sbl_cost
from jaxsparse.coding.completion import complete
from jaxsparse.coding.dictionary import Learned, ksvd, masked_loss, refit_atoms
from jaxsparse.coding.greedy import gradient_pursuit, omp
from jaxsparse.coding.kronecker import KroneckerPosterior, kronecker_sbl
from jaxsparse.coding.operators import Dense, Operator, dense, norm_bound
from jaxsparse.coding.proximal import admm, duality_gap, fista, iht, ista, lasso_objective
from jaxsparse.coding.thresholds import (
    fused,
    group_soft,
    hard,
    keep_largest,
    select_soft,
    soft,
    soft_nonnegative,
)
from jaxsparse.coding.unrolled import (
    Alista,
    Coupled,
    Hyper,
    Lista,
    alista,
    alista_init,
    analytic_weights,
    coupled_init,
    hyperlista,
    lista,
    lista_cpss,
    lista_init,
    nmse,
)

__all__ = [
    "Alista",
    "Coupled",
    "Dense",
    "Hyper",
    "KroneckerPosterior",
    "Learned",
    "Lista",
    "Operator",
    "Posterior",
    "admm",
    "alista",
    "alista_init",
    "analytic_weights",
    "complete",
    "coupled_init",
    "declip",
    "dense",
    "duality_gap",
    "fista",
    "fused",
    "gradient_pursuit",
    "group_soft",
    "hard",
    "hyperlista",
    "iht",
    "inpaint",
    "ista",
    "keep_largest",
    "kronecker_sbl",
    "ksvd",
    "lasso_objective",
    "lista",
    "lista_cpss",
    "lista_init",
    "masked_loss",
    "nmse",
    "norm_bound",
    "omp",
    "refit_atoms",
    "sbl",
    "sbl_cost",
    "select_soft",
    "soft",
    "soft_nonnegative",
]
