"""Pruning of a trained model with calibration data.

The cores know arrays only: a layer `[in, out]` and what was seen of its inputs (`_layer.py` says what
they share), one file per method.
"""

from jaxsparse.post_training._layer import Pruned, relative_error
from jaxsparse.post_training.alps import alps_core
from jaxsparse.post_training.dsnot import dsnot_core
from jaxsparse.post_training.exact_obs import exact_obs_core
from jaxsparse.post_training.magnitude import magnitude_core
from jaxsparse.post_training.obs import (
    inverse_fisher,
    obd_saliency,
    obs_remove,
    obs_saliency,
)
from jaxsparse.post_training.refit import refit_core
from jaxsparse.post_training.ria import permute_inputs, ria_core
from jaxsparse.post_training.sparsegpt import Int, sparsegpt_core
from jaxsparse.post_training.wanda import wanda_core

__all__ = [
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
