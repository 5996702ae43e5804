"""Scripts that try to break the training job: `kills`, `devices`, `rehearsal`. Their tables are in docs/results."""
