"""Pruning of a trained model: at once, by a score of its weights and of calibration data."""

from jaxsparse.post_training.one_shot import prune

__all__ = ["prune"]
