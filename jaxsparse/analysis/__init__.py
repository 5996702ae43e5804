"""What a sparse network costs and what training did to it: operations, plots, reports.

`flops` counts operations, `memory` bytes; `plots` draws the course of a training, `figures` the network
itself (both with matplotlib, imported when a figure is made); `report` puts text, tables and plots into
one page.
"""

from jaxsparse.analysis import figures, flops, memory, plots, report

__all__ = ["figures", "flops", "memory", "plots", "report"]
