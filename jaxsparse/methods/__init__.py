"""Published methods, each a short recipe on the engines; `METHODS` lists them."""

from jaxsparse.methods import _recipe as recipe  # noqa: F401 - for recipes of your own
from jaxsparse.methods._registry import METHODS, Method, make
from jaxsparse.methods._registry import register as register
from jaxsparse.methods.autosparse import autosparse
from jaxsparse.methods.bi_mask import bdwp, bi_mask
from jaxsparse.methods.dense import dense
from jaxsparse.methods.magnitude_ste import magnitude_ste
from jaxsparse.methods.pruning import (
    global_magnitude,
    magnitude,
    one_shot,
    random_pruning,
    saliency,
)
from jaxsparse.methods.rigl import rigl
from jaxsparse.methods.set import set_
from jaxsparse.methods.slope import slope
from jaxsparse.methods.sr_ste import sr_ste
from jaxsparse.methods.st3 import st3, st3_sigma
from jaxsparse.methods.static import static
from jaxsparse.methods.str import str_

__all__ = [
    "METHODS",
    "Method",
    "autosparse",
    "bdwp",
    "bi_mask",
    "dense",
    "global_magnitude",
    "magnitude",
    "magnitude_ste",
    "make",
    "one_shot",
    "random_pruning",
    "rigl",
    "saliency",
    "set_",
    "slope",
    "sr_ste",
    "st3",
    "st3_sigma",
    "static",
    "str_",
]
