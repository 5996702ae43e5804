"""Studies over many runs: `compare` (a grid of methods), `teacher` (recovering a sparse teacher), `catalogue` (the
table of all methods), `compact_and_serve` (from training to sparse layers)."""
