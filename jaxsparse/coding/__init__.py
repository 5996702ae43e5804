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
from jaxsparse.coding.coverage import cover_greedily, cover_stream, coverage
from jaxsparse.coding.dictionary import Learned, ksvd, masked_loss, refit_atoms
from jaxsparse.coding.factors import (
    Factors,
    factorize,
    keep,
    keep_in_columns,
    keep_in_rows,
    keep_in_rows_or_columns,
    keep_support,
    palm,
)
from jaxsparse.coding.greedy import gradient_pursuit, omp
from jaxsparse.coding.kronecker import KroneckerPosterior, kronecker_sbl
from jaxsparse.coding.low_rank import (
    GrowingSVD,
    Separated,
    separate,
    singular_soft,
    truncated_svd,
)
from jaxsparse.coding.maintained import Maintained, maintain, reweigh
from jaxsparse.coding.movies import Cleaned, Movie, rdledm, red_psm, spline_matrix
from jaxsparse.coding.operators import Dense, Operator, dense, norm_bound
from jaxsparse.coding.predictive import Encoder, psd_codes, psd_init, psd_loss, unit_atoms
from jaxsparse.coding.proximal import admm, duality_gap, fista, iht, ista, lasso_objective
from jaxsparse.coding.retrieval import (
    Sliced,
    gated_inner_product,
    local_codes,
    search_cost,
    slice_terms,
    term_weights,
)
from jaxsparse.coding.segments import change_points, hausdorff, mean_cost
from jaxsparse.coding.signatures import (
    SignatureLasso,
    fit_signatures,
    signature,
    signature_features,
)
from jaxsparse.coding.thresholds import (
    fused,
    group_soft,
    hard,
    keep_largest,
    select_soft,
    soft,
    soft_nonnegative,
)
from jaxsparse.coding.transport import Transport, sinkhorn, sinkhorn_newton, transport_plan
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
from jaxsparse.coding.working_set import Certified, working_set

__all__ = [
    "Alista",
    "Certified",
    "Cleaned",
    "Coupled",
    "Dense",
    "Encoder",
    "Factors",
    "GrowingSVD",
    "Hyper",
    "KroneckerPosterior",
    "Learned",
    "Lista",
    "Maintained",
    "Movie",
    "Operator",
    "Posterior",
    "Separated",
    "SignatureLasso",
    "Sliced",
    "Transport",
    "admm",
    "alista",
    "alista_init",
    "analytic_weights",
    "change_points",
    "complete",
    "coupled_init",
    "cover_greedily",
    "cover_stream",
    "coverage",
    "declip",
    "dense",
    "duality_gap",
    "factorize",
    "fista",
    "fit_signatures",
    "fused",
    "gated_inner_product",
    "gradient_pursuit",
    "group_soft",
    "hard",
    "hausdorff",
    "hyperlista",
    "iht",
    "inpaint",
    "ista",
    "keep",
    "keep_in_columns",
    "keep_in_rows",
    "keep_in_rows_or_columns",
    "keep_largest",
    "keep_support",
    "kronecker_sbl",
    "ksvd",
    "lasso_objective",
    "lista",
    "lista_cpss",
    "lista_init",
    "local_codes",
    "maintain",
    "masked_loss",
    "mean_cost",
    "nmse",
    "norm_bound",
    "omp",
    "palm",
    "psd_codes",
    "psd_init",
    "psd_loss",
    "rdledm",
    "red_psm",
    "refit_atoms",
    "reweigh",
    "sbl",
    "sbl_cost",
    "search_cost",
    "select_soft",
    "separate",
    "signature",
    "signature_features",
    "singular_soft",
    "sinkhorn",
    "sinkhorn_newton",
    "slice_terms",
    "soft",
    "soft_nonnegative",
    "spline_matrix",
    "term_weights",
    "transport_plan",
    "truncated_svd",
    "unit_atoms",
    "working_set",
]
