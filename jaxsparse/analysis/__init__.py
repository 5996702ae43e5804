"""What a sparse network costs and what training did to it: operations, bytes, figures.

What pruning does to classes and examples is in `impact`, constraints against it in `constraints`, many networks at once in
`populations`.

`flops` counts operations and the bytes that they move, `memory` the bytes that are kept; `plots` draws
the course of a training, `figures` the network itself (both with matplotlib, imported when a figure is
made). `summary` is the table of `jaxsparse.summarize`, `dynamics` compares masks, `connectivity`
looks along the line between two networks, `essential` finds how much of a trained network can go at once,
`scaling_law` fits loss to sparsity, size and data (with scipy, imported when a law is fitted).
"""

from jaxsparse.analysis import (
    connectivity,
    constraints,
    dynamics,
    essential,
    figures,
    flops,
    impact,
    memory,
    plots,
    populations,
    scaling_law,
    summary,
)

__all__ = [
    "connectivity",
    "constraints",
    "dynamics",
    "essential",
    "figures",
    "flops",
    "impact",
    "memory",
    "plots",
    "populations",
    "scaling_law",
    "summary",
]
