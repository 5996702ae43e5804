"""Scripts that try to break the training job: `kills` and `devices`. Their tables are in docs/results."""
