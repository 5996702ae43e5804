"""What a sparse network costs and what training did to it: operations, plots, reports.

`flops` counts operations, `plots` draws with matplotlib (imported when a plot is made), `report` puts
text, tables and plots into one page.
"""

from jaxsparse.analysis import flops, plots, report

__all__ = ["flops", "plots", "report"]
