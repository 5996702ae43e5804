"""Published methods, each a short recipe on the engines; `METHODS` lists them."""

from jaxsparse.engines.setup import Setup as Setup
from jaxsparse.engines.setup import setup as setup
from jaxsparse.methods.ac_dc import ac_dc
from jaxsparse.methods.app import app, cumulative_error
from jaxsparse.methods.autosparse import autosparse
from jaxsparse.methods.bdwp import bdwp
from jaxsparse.methods.bi_mask import bi_mask
from jaxsparse.methods.deep_r import deep_r
from jaxsparse.methods.dense import dense
from jaxsparse.methods.depgraph import depgraph
from jaxsparse.methods.dsr import dsr
from jaxsparse.methods.dst_ee import dst_ee
from jaxsparse.methods.edge_popup import edge_popup, signed_constant
from jaxsparse.methods.granet import granet
from jaxsparse.methods.group_slimming import group_slimming
from jaxsparse.methods.gsm import gsm
from jaxsparse.methods.hesso import hesso
from jaxsparse.methods.hspg import hspg
from jaxsparse.methods.hypersparse import art_stop, hypersparse, hypersparse_loss
from jaxsparse.methods.iss_p import iss_p
from jaxsparse.methods.itop import exploration_rate, itop, rigl_itop, set_itop
from jaxsparse.methods.l0 import hard_concrete, l0
from jaxsparse.methods.lamp import lamp
from jaxsparse.methods.lottery_jackpots import lottery_jackpots
from jaxsparse.methods.magnitude_ste import magnitude_ste
from jaxsparse.methods.mask_sparsity import mask_sparsity
from jaxsparse.methods.mdgf import mdgf
from jaxsparse.methods.mest import mest, mest_soft
from jaxsparse.methods.movement import movement, soft_movement
from jaxsparse.methods.one_shot import one_shot
from jaxsparse.methods.polarization import polarization
from jaxsparse.methods.pq import gini_index, pq_index
from jaxsparse.methods.pruning import global_magnitude, magnitude, random_pruning, saliency
from jaxsparse.methods.registry import METHODS, Method, make
from jaxsparse.methods.registry import register as register
from jaxsparse.methods.rigl import rigl
from jaxsparse.methods.sap import sap
from jaxsparse.methods.sdgf import sdgf, sdgf_stages
from jaxsparse.methods.set import set_
from jaxsparse.methods.slimming import slimming
from jaxsparse.methods.slope import slope
from jaxsparse.methods.snfs import snfs
from jaxsparse.methods.sr_ste import sr_ste
from jaxsparse.methods.srigl import srigl
from jaxsparse.methods.ssl import ssl
from jaxsparse.methods.ssvi import ssvi
from jaxsparse.methods.st3 import st3, st3_sigma
from jaxsparse.methods.static import static
from jaxsparse.methods.str import str_
from jaxsparse.methods.top_kast import top_kast
from jaxsparse.methods.turbo_vbi import turbo_vbi
from jaxsparse.methods.wgsef import wgsef

__all__ = [
    "METHODS",
    "Method",
    "ac_dc",
    "app",
    "art_stop",
    "autosparse",
    "bdwp",
    "bi_mask",
    "cumulative_error",
    "deep_r",
    "dense",
    "depgraph",
    "dsr",
    "dst_ee",
    "edge_popup",
    "exploration_rate",
    "gini_index",
    "global_magnitude",
    "granet",
    "group_slimming",
    "gsm",
    "hard_concrete",
    "hesso",
    "hspg",
    "hypersparse",
    "hypersparse_loss",
    "iss_p",
    "itop",
    "l0",
    "lamp",
    "lottery_jackpots",
    "magnitude",
    "magnitude_ste",
    "make",
    "mask_sparsity",
    "mdgf",
    "mest",
    "mest_soft",
    "movement",
    "one_shot",
    "polarization",
    "pq_index",
    "random_pruning",
    "rigl",
    "rigl_itop",
    "saliency",
    "sap",
    "sdgf",
    "sdgf_stages",
    "set_",
    "set_itop",
    "signed_constant",
    "slimming",
    "slope",
    "snfs",
    "soft_movement",
    "sr_ste",
    "srigl",
    "ssl",
    "ssvi",
    "st3",
    "st3_sigma",
    "static",
    "str_",
    "top_kast",
    "turbo_vbi",
    "wgsef",
]
