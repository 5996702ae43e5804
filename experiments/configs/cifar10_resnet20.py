"""RigL at 90 % on CIFAR-10 with ResNet-20. TFDS downloads the data set."""

from experiments.configs import base


def get_config():
    c = base.get_config()
    c.dataset, c.model = "cifar10", "resnet"
    c.model_options.depth = 20
    c.optimizer, c.learning_rate, c.weight_decay = "sgd", 0.1, 5e-4
    c.steps = 78_000  # 200 epochs of 390 steps
    c.warmup_steps = 400
    c.eval_every = c.checkpoint_every = 1950
    c.reader_threads = 8
    return c
