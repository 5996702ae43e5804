"""What the contract tests need to know of the methods of the registry: options for a short run, and
the number of weights that must be kept after each step."""

import functools
import math

import pytest

import jaxsparse
from jaxsparse.testing import Subject

# Tests compile much and run little: with these XLA on CPU takes half the time.
QUICK = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}

# What an engine decides, one method of each engine shows; where the others would compile anew for it,
# they are slow tests.
KINDS = (
    *("ac_dc", "autosparse", "deep_r", "global_magnitude", "magnitude_ste", "rigl", "saliency"),
    *("slope", "snfs", "st3", "static", "top_kast"),
)


def kinds(names=None):
    """The names of methods as cases of a test, slow but for `KINDS`."""
    names = sorted(jaxsparse.METHODS) if names is None else names
    return [n if n in KINDS else pytest.param(n, marks=pytest.mark.slow) for n in names]


STEPS, BEGIN, END, EVERY = 12, 0, 8, 2
SPARSITY, OTHER = 0.75, 0.5
SIZES = {"conv/kernel": 2 * 2 * 8 * 8, "dense/kernel": 8 * 16}

# The options of a run of STEPS steps; a method takes those that it has.
COMMON = dict(
    sparsity=SPARSITY,
    total_steps=STEPS,
    begin_step=BEGIN,
    end_step=END,
    update_every=EVERY,
    allocation="uniform",
)
# What a method needs besides, or cannot be given.
SPECIAL = {
    "ac_dc": dict(switches=(2, 4, END)),
    "app": dict(stages=4),
    "hypersparse": dict(penalty=1e-4),
    "mdgf": dict(begin_step=None),
    "global_magnitude": dict(allocation=None),
    "magnitude_ste": dict(end_step=0),
    "st3": dict(update_every=1),
    "st3_sigma": dict(update_every=1),
    "sr_ste": dict(sparsity=None, structure=jaxsparse.structures.NM(2, 4)),
    "autosparse": dict(threshold_init=-1.0),
    "str": dict(threshold_init=-1.0),
    "hspg": dict(begin_step=END),
    "hesso": dict(periods=2),
    "l0": dict(strength=1e-3),
    "turbo_vbi": dict(examples=100, begin_step=None),
}
# Methods on groups: dense until the cut, of whole channels.
CUT = (
    *("depgraph", "hspg", "mask_sparsity", "polarization", "slimming", "ssl", "wgsef"),
    *("gsm", "iss_p"),
)
# At step 0 nothing has been trained that these could rank.
STARTS_SPARSE = ("dsr", "dst_ee", "rigl", "rigl_itop", "set", "set_itop", "snfs", "srigl")


def options(name):
    """The options of `name` for a short run."""
    method = jaxsparse.METHODS[name]
    chosen = {k: v for k, v in COMMON.items() if k in method.options}
    if name in STARTS_SPARSE:
        chosen["begin_step"] = EVERY
    return {k: v for k, v in (chosen | SPECIAL.get(name, {})).items() if v is not None}


@functools.cache
def subject(name):
    """The method `name` under test, with its options; made once, so that tests share its runs."""
    method, chosen = jaxsparse.METHODS[name], options(name)
    sweeps = {"sparsity": (SPARSITY, OTHER)} if "sparsity" in chosen else {}
    if "seed" in method.options:
        sweeps["seed"] = (0, 1)
    return Subject(
        lambda inner, **o: method.fn(inner, **{**chosen, **o}),
        steps=STEPS,
        sweeps=sweeps,
        compiler_options=QUICK,
    )


def _ramp(t):
    """The cubic curve at the last update no later than t."""
    t = min(t, END)
    last = max(s for s in range(t + 1) if (s - BEGIN) % EVERY == 0 or s == END)
    return 1 - (1 - last / END) ** 3


def _per_layer(sparsity):
    return {path: n - math.floor(sparsity * n + 1e-9) for path, n in SIZES.items()}


def expected(name, t, sparsity=None):
    """The weights that `name` keeps after step t, by path or in total; None: not determined."""
    method, chosen = jaxsparse.METHODS[name], options(name)
    if not method.controls_sparsity:
        return None
    s = sparsity or chosen.get("sparsity", 0.5)
    total = sum(SIZES.values())
    if name in ("st3", "st3_sigma"):
        # At every step; the quantile interpolates between two magnitudes and is itself pruned.
        now = s * (1 - (1 - min(t / END, 1)) ** 3)
        return total if now == 0 else total - 1 - math.floor((total - 1) * now + 1e-6)
    if name == "movement":  # on the cubic curve at every step
        return _per_layer(s * (1 - (1 - min(t / END, 1)) ** 3))
    if not method.exact_budget or name == "app":
        return None
    if name in ("snfs", "dsr"):  # the budget moves between layers
        return sum(_per_layer(s).values())
    if name == "ac_dc":
        return SIZES if t < 2 or 4 <= t < END else _per_layer(s)
    if name == "group_slimming":  # one threshold over layers whose channels differ in size
        return None
    if name == "hesso":  # 8 channels of 32 weights and 16 of 8, in two periods
        done = 0 if t < 3 else 1 if t < END else 2
        left = lambda n: n - math.floor(s * n + 1e-9) * done // 2
        return {"conv/kernel": 32 * left(8), "dense/kernel": 8 * left(16)}
    if name in CUT:
        return SIZES if t < END else _per_layer(s)
    if name == "hypersparse":
        return total if t < END else total - math.floor(s * total + 1e-9)
    if name in ("global_magnitude", "lamp") or chosen.get("allocation") == "global":
        return total - math.floor(s * _ramp(t) * total + 1e-9)
    if name != "one_shot" and method.dynamics == "gradual":
        return _per_layer(s * _ramp(t))
    return _per_layer(s)
