"""RigL at 80 % with a decoder-only Transformer of a billion parameters. Made for a pod slice.

18 layers of 2048, stacked; computed in bfloat16, each layer anew in the backward pass. With a vocabulary of
32768 tokens it has 1.04e9 parameters; on `stdlib_text`, the text that needs no download, the vocabulary is
that of its characters and the model has 0.91e9.
"""

from experiments.configs import base


def get_config():
    c = base.get_config()
    c.dataset, c.model = "stdlib_text", "transformer"
    c.model_options.dim = 2048
    c.model_options.depth = 18
    c.model_options.heads = 16
    c.model_options.scan_layers = True
    c.model_options.remat = True
    c.model_options.dtype = "bfloat16"
    c.sparsity = 0.8
    c.batch_size = 512
    c.steps = 20_000
    c.warmup_steps = 1000
    c.learning_rate, c.weight_decay, c.clip_norm = 3e-4, 0.1, 1.0
    c.eval_every = c.checkpoint_every = 1000
    c.parallel = "fsdp"
    return c
