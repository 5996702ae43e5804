"""What a sparse network costs and what training did to it: operations, plots, reports.

`flops` counts operations, `memory` bytes; `plots` draws the course of a training, `figures` the network
itself (both with matplotlib, imported when a figure is made); `report` puts text, tables and plots into
one page. `dynamics` compares masks, `essential` finds how much of a trained network can go at once,
`scaling_law` fits loss to sparsity, size and data (with scipy, imported when a law is fitted).
"""

from jaxsparse.analysis import (
    dynamics,
    essential,
    figures,
    flops,
    memory,
    plots,
    report,
    scaling_law,
)

__all__ = [
    "dynamics",
    "essential",
    "figures",
    "flops",
    "memory",
    "plots",
    "report",
    "scaling_law",
]
