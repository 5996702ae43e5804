"""Pruning of a trained model with calibration data.

    from jaxsparse import post_training as pt

    result = pt.prune(model, batches, "sparsegpt", sparsity=0.5)
    result.model, result.masks, print(result)

The methods know arrays only: a layer `[in, out]` and what was seen of its inputs (`_layer.py` says what
they share), one file each. `program.py` finds the kernels of a traced model and their inputs,
`calibration.py` runs it block by block, `driver.py` brings both together. Whole channels go by `narrow`,
the width of a residual stream by `slice_stream`; `adapter` trains on without losing a zero.
"""

from jaxsparse.post_training._layer import Pruned, relative_error
from jaxsparse.post_training._registry import METHODS, Method
from jaxsparse.post_training.adapters import Adapter, Factors, adapter
from jaxsparse.post_training.alps import alps_core
from jaxsparse.post_training.budgets import ECoFLaP, knapsack, water_fill
from jaxsparse.post_training.calibration import calibrate
from jaxsparse.post_training.chita import chita_core
from jaxsparse.post_training.correction import corrected
from jaxsparse.post_training.driver import prune
from jaxsparse.post_training.dsnot import dsnot_core
from jaxsparse.post_training.evopress import Database, evolve, level_database
from jaxsparse.post_training.exact_obs import exact_obs_core
from jaxsparse.post_training.fisher import obd_core, woodfisher_core
from jaxsparse.post_training.gqsa import gqsa_core
from jaxsparse.post_training.magnitude import magnitude_core
from jaxsparse.post_training.narrow import narrow
from jaxsparse.post_training.net_trim import net_trim_core
from jaxsparse.post_training.obs import (
    inverse_fisher,
    obd_saliency,
    obs_remove,
    obs_saliency,
)
from jaxsparse.post_training.owl import OWL
from jaxsparse.post_training.refit import refit_core
from jaxsparse.post_training.report import LayerReport, Result
from jaxsparse.post_training.ria import permute_inputs, ria_core
from jaxsparse.post_training.slicegpt import Branch, Sliced, fold_scale, slice_stream
from jaxsparse.post_training.sparsegpt import Int, sparsegpt_core
from jaxsparse.post_training.statistics import Gram, Inputs, Norms, Tokens
from jaxsparse.post_training.wanda import wanda_core
from jaxsparse.post_training.wanda_plus_plus import wanda_plus_plus_core

__all__ = [
    "METHODS",
    "OWL",
    "Adapter",
    "Branch",
    "Database",
    "ECoFLaP",
    "Factors",
    "Gram",
    "Inputs",
    "Int",
    "LayerReport",
    "Method",
    "Norms",
    "Pruned",
    "Result",
    "Sliced",
    "Tokens",
    "adapter",
    "alps_core",
    "calibrate",
    "chita_core",
    "corrected",
    "dsnot_core",
    "evolve",
    "exact_obs_core",
    "fold_scale",
    "gqsa_core",
    "inverse_fisher",
    "knapsack",
    "level_database",
    "magnitude_core",
    "narrow",
    "net_trim_core",
    "obd_core",
    "obd_saliency",
    "obs_remove",
    "obs_saliency",
    "permute_inputs",
    "prune",
    "refit_core",
    "relative_error",
    "ria_core",
    "slice_stream",
    "sparsegpt_core",
    "wanda_core",
    "wanda_plus_plus_core",
    "water_fill",
    "woodfisher_core",
]
