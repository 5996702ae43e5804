"""Where sparse networks come from: masks at initialisation and between rounds, masks over fixed weights,
initial variances, averages of siblings, edges of graphs. Pure functions; the runs over whole trainings
(lottery tickets, soups) are in `experiments.tickets`."""

from jaxsparse.tickets.averages import Soup, average, greedy_soup
from jaxsparse.tickets.fixed_weights import fish_mask, interleaved_masks, three_valued
from jaxsparse.tickets.graphs import Layered, edge_scores, keep_edges, layered, small_world
from jaxsparse.tickets.masks import (
    keep,
    prune_round,
    prune_within,
    shuffle_within_layers,
    sketch,
)
from jaxsparse.tickets.nested import (
    Prefixes,
    from_prefixes,
    nested_masks,
    subnet_gradient,
    to_prefixes,
)
from jaxsparse.tickets.signal import (
    Variances,
    critical_variances,
    initializers,
    rescale_energy,
    stability,
    variance_map,
)
from jaxsparse.tickets.spectrum import Sampled, sample_spectrum, spectral_error

__all__ = [
    "Layered",
    "Prefixes",
    "Sampled",
    "Soup",
    "Variances",
    "average",
    "critical_variances",
    "edge_scores",
    "fish_mask",
    "from_prefixes",
    "greedy_soup",
    "initializers",
    "interleaved_masks",
    "keep",
    "keep_edges",
    "layered",
    "nested_masks",
    "prune_round",
    "prune_within",
    "rescale_energy",
    "sample_spectrum",
    "shuffle_within_layers",
    "sketch",
    "small_world",
    "spectral_error",
    "stability",
    "subnet_gradient",
    "three_valued",
    "to_prefixes",
    "variance_map",
]
