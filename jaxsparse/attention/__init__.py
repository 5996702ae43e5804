r"""Choosing what to attend to: block predictors, budgets, measures, and caches of bounded size.

A predictor is a function `(q, k, v, state) -> BlockMask` with a bound on its cost. It makes lists of blocks under
`jit`; `pallas_kernels.block_sparse_attention` reads only these.

    from jaxsparse import attention
    choose = attention.minference(density=0.1)
    out, info = attention.attend(q, k, v, choose, with_info=True)

Predictors share their parts: pooling (`pool`), rules that say how many blocks a row keeps (`top_k`, `density`,
`top_p`, `threshold`), blocks that are kept in any case (`Layout`), budgets over heads and layers (`budgets`), and
exact measures (`block_mass`, `recall`, `error_bound`).
"""

from jaxsparse.attention import budgets, pool, select, tokens
from jaxsparse.attention.adaspa import AdaSpa, AdaSpaState, adaspa
from jaxsparse.attention.cache import Cache, rebalance
from jaxsparse.attention.dsv import LowRank, dsv, dsv_loss, head_sparsity, pays
from jaxsparse.attention.functions import as_fn, attend, dot_product_attention
from jaxsparse.attention.layout import Layout, Sizes
from jaxsparse.attention.mass import block_mass
from jaxsparse.attention.measure import (
    Info,
    attend_with_info,
    density,
    error_bound,
    recall,
    relative_error,
)
from jaxsparse.attention.minference import (
    PUBLISHED,
    AShape,
    TopBlocks,
    VerticalSlash,
    candidates,
    flexprefill,
    minference,
    search_patterns,
)
from jaxsparse.attention.moba import moba
from jaxsparse.attention.mra import mra, mra_attention
from jaxsparse.attention.nsa import Compressor, mean_blocks, nsa, nsa_attention
from jaxsparse.attention.policies import (
    Policy,
    ada_snapkv,
    dynamickv,
    h2o,
    keep_all,
    snapkv,
    streaming_llm,
    zipvl,
)
from jaxsparse.attention.predictor import Predictor, State, by_scores, dense_cost
from jaxsparse.attention.quest import Pages, append_page, pages, quest
from jaxsparse.attention.seer import SeerGate, rotary, seer, seer_loss, seer_target
from jaxsparse.attention.select import threshold, top_k, top_p
from jaxsparse.attention.sparge import sparge, tune_sparge
from jaxsparse.attention.static import dense, dense_below, oracle, static, streaming
from jaxsparse.attention.vertical_slash import vertical_slash_attention

__all__ = [
    "AShape",
    "AdaSpa",
    "AdaSpaState",
    "Cache",
    "Compressor",
    "Info",
    "Layout",
    "LowRank",
    "PUBLISHED",
    "Pages",
    "Policy",
    "Predictor",
    "SeerGate",
    "Sizes",
    "State",
    "TopBlocks",
    "VerticalSlash",
    "ada_snapkv",
    "adaspa",
    "append_page",
    "as_fn",
    "attend",
    "attend_with_info",
    "block_mass",
    "budgets",
    "by_scores",
    "candidates",
    "dense",
    "dense_below",
    "dense_cost",
    "density",
    "dot_product_attention",
    "dsv",
    "dsv_loss",
    "dynamickv",
    "error_bound",
    "flexprefill",
    "h2o",
    "head_sparsity",
    "keep_all",
    "mean_blocks",
    "minference",
    "moba",
    "mra",
    "mra_attention",
    "nsa",
    "nsa_attention",
    "oracle",
    "pages",
    "pays",
    "pool",
    "quest",
    "rebalance",
    "recall",
    "relative_error",
    "rotary",
    "search_patterns",
    "seer",
    "seer_loss",
    "seer_target",
    "select",
    "snapkv",
    "sparge",
    "static",
    "streaming",
    "streaming_llm",
    "threshold",
    "tokens",
    "top_k",
    "top_p",
    "vertical_slash_attention",
    "tune_sparge",
    "zipvl",
]
