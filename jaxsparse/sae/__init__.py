"""Sparse autoencoders of a network's activations: one scaffold and the whole family.

    model = sae.TopK(d_model=384, d_sae=6144, k=32, rngs=nnx.Rngs(0))
    tx = sae.unit_norm_decoder(optax.adam(3e-4))        # atoms of norm 1 after every update
    loss, metrics = model.loss(x)                       # x: [tokens, d_model]

Modules are Flax NNX; in Linen, `flax.nnx.bridge.ToLinen(sae.TopK, kwargs=...)`. Every family is a
transcoder with `d_out=`, and a skip transcoder with `skip=True`.
"""

from jaxsparse.sae import hooks, saelens
from jaxsparse.sae.activations import Activations, Stored
from jaxsparse.sae.batch_topk import (
    BatchTopK,
    FeatureChoice,
    MatryoshkaBatchTopK,
    MutualChoice,
    zipf_budgets,
)
from jaxsparse.sae.crosscoder import Crosscoder
from jaxsparse.sae.dashboard import dashboard, top_examples
from jaxsparse.sae.decode import sparse_decode, topk_encode
from jaxsparse.sae.evaluation import (
    Evaluation,
    Recovered,
    Recovery,
    evaluate,
    loss_recovered,
    max_cosines,
)
from jaxsparse.sae.optimizer import resample, unit_norm_decoder
from jaxsparse.sae.relu import Gated, JumpReLU, ReLU, jump_relu, step
from jaxsparse.sae.scaffold import SAE, Statistic, geometric_median, input_scale, warm_up
from jaxsparse.sae.sharding import shardings
from jaxsparse.sae.topk import GradientTopK, KSparse, MatryoshkaTopK, TopK, aux_k, k_schedule

__all__ = [
    "SAE",
    "Activations",
    "BatchTopK",
    "Crosscoder",
    "Evaluation",
    "FeatureChoice",
    "Gated",
    "GradientTopK",
    "JumpReLU",
    "KSparse",
    "MatryoshkaBatchTopK",
    "MatryoshkaTopK",
    "MutualChoice",
    "ReLU",
    "Recovered",
    "Recovery",
    "Statistic",
    "Stored",
    "TopK",
    "aux_k",
    "dashboard",
    "evaluate",
    "geometric_median",
    "hooks",
    "input_scale",
    "jump_relu",
    "k_schedule",
    "loss_recovered",
    "max_cosines",
    "resample",
    "saelens",
    "shardings",
    "sparse_decode",
    "step",
    "top_examples",
    "topk_encode",
    "unit_norm_decoder",
    "warm_up",
    "zipf_budgets",
]
