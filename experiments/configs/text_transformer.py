"""RigL at 80 % on the source of Python's standard library, character by character."""

from experiments.configs import base


def get_config():
    c = base.get_config()
    c.dataset, c.model = "stdlib_text", "transformer"
    c.model_options.dim = 128
    c.model_options.depth = 4
    c.model_options.heads = 4
    c.model_options.scan_layers = True
    c.model_options.remat = False
    c.length = 128
    c.batch_size = 32
    c.sparsity = 0.8
    c.steps = 3000
    c.clip_norm = 1.0
    c.weight_decay = 0.1
    return c
