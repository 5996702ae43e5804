"""The report of a training run: `result` is what a run leaves for it, `training` makes the page, `page` renders."""

from experiments.report.training import report

__all__ = ["report"]
