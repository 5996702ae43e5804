"""RigL at 90 % on ImageNet with ResNet-50, as in the RigL paper: 100 epochs of 4096 images.

Made for a pod slice. Set --config.parallel=pmap or fsdp, and --config.data_dir to the prepared data.
"""

from experiments.configs import base


def get_config():
    c = base.get_config()
    c.dataset, c.model = "imagenet2012", "resnet"
    c.image_size = 224
    c.model_options.depth = 50
    c.model_options.dtype = "bfloat16"
    c.batch_size = 4096
    c.steps = 31_250
    c.optimizer, c.learning_rate, c.weight_decay = "sgd", 1.6, 1e-4
    c.warmup_steps = 1560
    c.label_smoothing = 0.1
    c.eval_every = c.checkpoint_every = 1250
    c.reader_processes = 16
    c.parallel = "pmap"
    return c
