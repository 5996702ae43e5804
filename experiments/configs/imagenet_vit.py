"""RigL at 80 % on ImageNet with ViT-S/16. Made for a pod slice."""

from experiments.configs import base


def get_config():
    c = base.get_config()
    c.dataset, c.model = "imagenet2012", "vit"
    c.image_size = 224
    c.model_options.patch = 16
    c.model_options.dim = 384
    c.model_options.depth = 12
    c.model_options.heads = 6
    c.model_options.dtype = "bfloat16"
    c.sparsity = 0.8
    c.batch_size = 1024
    c.steps = 112_600  # 90 epochs
    c.warmup_steps = 10_000
    c.weight_decay, c.clip_norm = 0.1, 1.0
    c.eval_every = c.checkpoint_every = 5000
    c.reader_processes = 16
    c.parallel = "fsdp"
    return c
