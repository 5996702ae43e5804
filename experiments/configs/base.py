"""Every field that the training job reads, with its default and what it means.

A config file calls `get_config()` of this file and changes what its experiment needs; the command line
changes single fields: --config.sparsity=0.95 --config.options.allocation=erk
"""

from ml_collections import config_dict


def get_config() -> config_dict.ConfigDict:
    c = config_dict.ConfigDict()

    # The method, a key of jaxsparse.METHODS, and the sparsity it is asked for (not used by methods
    # that learn it, nor with N:M structures, which fix it), in the structure that the zeros have. Options
    # that stay None are left at the method's own default; one that the method does not have is an error.
    c.method = "rigl"
    c.sparsity = 0.9
    # 2:4, block:16x16, channel, fan_in, unstructured; see jaxsparse.structures.parse
    c.structure = config_dict.placeholder(str)
    # masks: dense arrays and masks. stored: rigl, set, magnitude and static with structure=block:HxW train
    # the blocks that are kept and nothing else (jaxsparse.stored); for mlp, vit and transformer.
    c.storage = "masks"
    # With storage=stored, rigl and blocks: growth by the momentum of gradients and not by the last one
    # (rule="momentum" of jaxsparse.stored), of which so many times so many numbers are kept for each block.
    c.sketch = config_dict.placeholder(int)
    c.options = config_dict.ConfigDict()
    c.options.update_every = config_dict.placeholder(int)
    c.options.begin_step = config_dict.placeholder(int)
    c.options.end_step = config_dict.placeholder(int)
    # Of gradual pruning: that of its first step.
    c.options.initial_sparsity = config_dict.placeholder(float)
    c.options.drop_fraction = config_dict.placeholder(float)
    c.options.allocation = config_dict.placeholder(str)  # uniform, er, erk, global, lamp, ...
    c.options.targets = config_dict.placeholder(str)  # regular expression: which leaves
    c.options.seed = config_dict.placeholder(int)  # of random masks; None: c.seed
    c.options.pack_masks = config_dict.placeholder(bool)

    # Data: see experiments/datasets.
    c.dataset = "mnist1d"
    c.data_dir = config_dict.placeholder(str)  # None: ~/tensorflow_datasets
    c.image_size = config_dict.placeholder(int)  # None: the data set's own
    c.length = 256  # characters per example of stdlib_text
    c.reader_threads = 2
    c.reader_processes = 0

    # Model: see experiments/models. model_options are the arguments of its class.
    c.model = "mlp"
    c.model_options = config_dict.ConfigDict()

    # Training.
    c.seed = 0
    c.batch_size = 128  # of all devices together
    c.steps = 4000
    c.optimizer = "adamw"  # adamw, sgd, lion, muon
    c.learning_rate = 1e-3  # the peak, after a linear warm-up
    c.decay = "cosine"  # to zero at the last step: cosine, linear
    c.warmup_steps = 100
    c.cycles = 1  # warm-ups and decays, one after the other in equal parts of the run: rewinds
    c.weight_decay = 0.0  # not on vectors (biases, scales)
    c.momentum = 0.9  # of sgd
    c.label_smoothing = 0.0
    c.clip_norm = config_dict.placeholder(float)

    # Devices: none (one device), pmap (replicas), fsdp (sharded parameters). See parallel.py.
    c.parallel = "none"
    c.tensor = 1  # fsdp: devices that share each layer of a Transformer
    # A power of two, such as 8: the batch is cut in so many pieces and their gradients are added in one
    # fixed order, for the same bits on 1, 2, 4 or 8 devices. Batch normalisation is by piece. 0: off.
    c.microbatches = 0

    # Book-keeping, in steps.
    c.log_every = 100
    c.eval_every = 500
    c.checkpoint_every = 500
    c.keep_checkpoints = 3
    c.max_loss = 1e4  # a larger loss, or one that is not finite, stops the run
    return c
