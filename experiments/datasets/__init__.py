"""Data sets by name, always through TFDS, in `array_record` files, without TensorFlow.

`digits`, `mnist1d` and `stdlib_text` are builders in this folder that need no download: they are
prepared at first use. Any other name is looked up in TFDS. `loading.py` turns records to batches.
"""

from experiments.datasets.loading import Dataset, batches, evaluation_batches, load

__all__ = ["Dataset", "batches", "evaluation_batches", "load"]
