"""Pruning of a trained model with calibration data.

    from jaxsparse import post_training as pt

    result = pt.prune(model, batches, "sparsegpt", sparsity=0.5)
    result.model, result.masks, print(result)

The methods know arrays only: a layer `[in, out]` and what was seen of its inputs (`_layer.py` says what
they share), one file each. `program.py` finds the kernels of a traced model and their inputs,
`calibration.py` runs it block by block, `driver.py` brings both together.
"""

from jaxsparse.post_training._layer import Pruned, relative_error
from jaxsparse.post_training._registry import METHODS, Method
from jaxsparse.post_training.alps import alps_core
from jaxsparse.post_training.calibration import calibrate
from jaxsparse.post_training.driver import LayerReport, Result, prune
from jaxsparse.post_training.dsnot import dsnot_core
from jaxsparse.post_training.exact_obs import exact_obs_core
from jaxsparse.post_training.magnitude import magnitude_core
from jaxsparse.post_training.obs import (
    inverse_fisher,
    obd_saliency,
    obs_remove,
    obs_saliency,
)
from jaxsparse.post_training.owl import OWL
from jaxsparse.post_training.refit import refit_core
from jaxsparse.post_training.ria import permute_inputs, ria_core
from jaxsparse.post_training.sparsegpt import Int, sparsegpt_core
from jaxsparse.post_training.statistics import Gram, Inputs, Norms
from jaxsparse.post_training.wanda import wanda_core

__all__ = [
    "METHODS",
    "OWL",
    "Gram",
    "Inputs",
    "LayerReport",
    "Method",
    "Norms",
    "Result",
    "calibrate",
    "prune",
    "Int",
    "Pruned",
    "alps_core",
    "dsnot_core",
    "exact_obs_core",
    "inverse_fisher",
    "magnitude_core",
    "obd_saliency",
    "obs_remove",
    "obs_saliency",
    "permute_inputs",
    "refit_core",
    "relative_error",
    "ria_core",
    "sparsegpt_core",
    "wanda_core",
]
