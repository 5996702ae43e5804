"""Where sparse networks come from: masks at initialisation and between rounds, masks over fixed weights,
initial variances, averages of siblings, edges of graphs. Pure functions; the runs over whole trainings
(lottery tickets, soups) are in `experiments.tickets`."""

from jaxsparse.tickets.averages import Soup, average, greedy_soup
from jaxsparse.tickets.fixed_weights import fish_mask, interleaved_masks, three_valued
from jaxsparse.tickets.graphs import Layered, edge_scores, keep_edges, layered, small_world
from jaxsparse.tickets.masks import (
    Sampled,
    keep,
    prune_round,
    sample_spectrum,
    shuffle_within_layers,
    sketch,
    spectral_error,
)
from jaxsparse.tickets.signal import (
    Variances,
    critical_variances,
    initializers,
    rescale_energy,
    stability,
    variance_map,
)

__all__ = [
    "Layered",
    "Sampled",
    "Soup",
    "Variances",
    "average",
    "critical_variances",
    "edge_scores",
    "fish_mask",
    "greedy_soup",
    "initializers",
    "interleaved_masks",
    "keep",
    "keep_edges",
    "layered",
    "prune_round",
    "rescale_energy",
    "sample_spectrum",
    "shuffle_within_layers",
    "sketch",
    "small_world",
    "spectral_error",
    "stability",
    "three_valued",
    "variance_map",
]
