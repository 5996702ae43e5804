"""Exact selection: the k largest of one array, of each slice of it, of many arrays apart or together.

The only top-k of the project. Everywhere

- exactly k entries are chosen (all eligible ones if there are fewer), whatever the ties;
- `k` may be traced, and so may seeds: a new k needs no new compilation;
- scores are ranked by value: -0.0 equals 0.0, infinities are legal, and NaN ranks below everything
  and is never chosen, so that fewer than k are chosen when NaN leave fewer than k;
- ties go to the lower row-major position, or are broken by a seeded hash of the position
  (`ties="hash"`), which favours no row. Both are the same for any sharding on any number of devices;
- nothing is sorted or gathered (except in `topk_indices`, which lists places row by row): entries are counted against thresholds, pass after pass (see
  `_search`), and a pass over sharded arrays communicates counters. Inside `shard_map` a function
  ranks what its device holds;
- gradients are not defined: scores are taken as constants.

Scores may be any real dtype. They may also be given as operands of an elementwise function,
`topk_mask((w, g), k, score=lambda w, g: abs(w * g))`, which is then evaluated in each pass and never
stored: on CPU, storing an array of the size of the data costs more than the search.
"""

from jaxsparse._counts import kept_count, no_less, scale_count
from jaxsparse.selection._arguments import equal_scores
from jaxsparse.selection._hash import as_seed, hash_at, mix, position_hash
from jaxsparse.selection.indices import topk_indices
from jaxsparse.selection.quantile import quantile
from jaxsparse.selection.topk import count, topk_mask, topk_masks

__all__ = [
    "as_seed",
    "count",
    "equal_scores",
    "kept_count",
    "mix",
    "no_less",
    "hash_at",
    "position_hash",
    "quantile",
    "scale_count",
    "topk_indices",
    "topk_mask",
    "topk_masks",
]
