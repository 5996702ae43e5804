"""What a sparse network costs and what training did to it: operations, plots, reports.

`flops` counts operations and the bytes that they move, `memory` the bytes that are kept; `plots` draws
the course of a training, `figures` the network itself (both with matplotlib, imported when a figure is
made); `page` puts text, tables and plots into one page, and `report(workdir)` makes that of a training
run. `dynamics` compares masks, `essential` finds how much of a trained network can go at once,
`scaling_law` fits loss to sparsity, size and data (with scipy, imported when a law is fitted).
"""

from jaxsparse.analysis import (
    dynamics,
    essential,
    figures,
    flops,
    memory,
    page,
    plots,
    scaling_law,
)
from jaxsparse.analysis.training import report

__all__ = [
    "dynamics",
    "essential",
    "figures",
    "flops",
    "memory",
    "page",
    "plots",
    "report",
    "scaling_law",
]
