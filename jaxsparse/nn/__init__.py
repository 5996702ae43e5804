"""Flax NNX modules that compute sparsely."""

from jaxsparse.nn._linear import Pattern, Scores, Trained
from jaxsparse.nn.attention import BlockCache, BlockSparseAttention, top_blocks
from jaxsparse.nn.bayesian import BayesianLinear, VariationalDropoutLinear, dropout_kl
from jaxsparse.nn.bit_planes import BitPlaneLinear, csq_loss, csq_temperature, split_bits
from jaxsparse.nn.block_sparse_linear import BlockSparseLinear, BlockSparsePointwise
from jaxsparse.nn.compact import Compacted, compact
from jaxsparse.nn.condensed import CondensedLinear, condense
from jaxsparse.nn.consensus import ConsensusGate, consensus_loss
from jaxsparse.nn.delta import DeltaActivation
from jaxsparse.nn.fire_together import FiringGate, firing_loss, strong_filters
from jaxsparse.nn.gates import (
    HardConcreteGate,
    enumerated_gradient,
    score_function_gradient,
    straight_through_gradient,
)
from jaxsparse.nn.graph_network import GraphNetwork
from jaxsparse.nn.nm_linear import NMLinear
from jaxsparse.nn.pixelfly import PixelflyLinear
from jaxsparse.nn.refit import Refit, refit
from jaxsparse.nn.searched_activations import CANDIDATES, ScaledActivation
from jaxsparse.nn.sparse_activations import (
    ClippedReLU,
    ClippedSoftThreshold,
    clipped_relu,
    clipped_soft_threshold,
)
from jaxsparse.nn.sparse_ift import (
    SparseDoped,
    SparseFactorized,
    SparseParallel,
    SparseWide,
    folded_decay,
)
from jaxsparse.nn.spatial_mask import Positions, SpatialSparsity, conv_at
from jaxsparse.nn.store import store
from jaxsparse.nn.stored import StoredState, check_stored, full_gradients, stored, stored_blocks
from jaxsparse.nn.two_view import (
    Backward,
    SLoPeLinear,
    TwoViewConv,
    TwoViewLinear,
    refresh,
    refresh_model,
    two_view_matmul,
)
from jaxsparse.nn.unit_choice import UnitChoice

__all__ = [
    "BayesianLinear",
    "BitPlaneLinear",
    "BlockCache",
    "BlockSparseAttention",
    "top_blocks",
    "BlockSparseLinear",
    "BlockSparsePointwise",
    "ClippedReLU",
    "ClippedSoftThreshold",
    "Compacted",
    "CondensedLinear",
    "ConsensusGate",
    "GraphNetwork",
    "HardConcreteGate",
    "NMLinear",
    "clipped_relu",
    "clipped_soft_threshold",
    "Pattern",
    "Refit",
    "Scores",
    "StoredState",
    "Trained",
    "check_stored",
    "compact",
    "condense",
    "consensus_loss",
    "csq_loss",
    "csq_temperature",
    "dropout_kl",
    "enumerated_gradient",
    "folded_decay",
    "full_gradients",
    "refit",
    "store",
    "stored",
    "stored_blocks",
    "Backward",
    "SLoPeLinear",
    "SparseDoped",
    "SparseFactorized",
    "SparseParallel",
    "SparseWide",
    "TwoViewConv",
    "TwoViewLinear",
    "refresh",
    "refresh_model",
    "VariationalDropoutLinear",
    "score_function_gradient",
    "split_bits",
    "straight_through_gradient",
    "two_view_matmul",
    "CANDIDATES",
    "DeltaActivation",
    "FiringGate",
    "PixelflyLinear",
    "Positions",
    "ScaledActivation",
    "SpatialSparsity",
    "UnitChoice",
    "conv_at",
    "firing_loss",
    "strong_filters",
]
