"""A TopK autoencoder on rows of a planted dictionary; every field of `experiments.train_sae`."""

from ml_collections import config_dict


def get_config() -> config_dict.ConfigDict:
    c = config_dict.ConfigDict()

    # The family, a class of jaxsparse.sae, and its arguments besides the sizes.
    c.family = "TopK"
    c.options = config_dict.ConfigDict({"k": 3}, convert_dict=False)
    c.d_sae = 64
    c.dead_after = 100_000  # tokens of silence after which a latent is dead

    # Data: "planted", or "smollm2" with a layer of its first `layers` blocks.
    c.data = "planted"
    c.tokens = 20_000  # rows of activations to train on
    c.scale = True  # inputs to unit mean square while training, folded back for evaluation
    c.width = 16  # planted
    c.atoms = 32
    c.active = (1, 5)
    c.noise = 0.0
    c.site = "layers/3"  # smollm2: a block's output is the residual stream, layers/3/down that of its MLP
    c.text = "prose"  # smollm2: articles of Python's reference, or "code": modules of its standard library
    c.layers = 4  # of the network that is run
    c.length = 128  # tokens of a sequence; the first is left out
    c.eval_sequences = 16  # of the other half of the text

    # Training.
    c.seed = 0
    c.steps = 3000
    c.batch_size = 256
    c.learning_rate = 3e-3  # to zero over the last fifth
    c.optimizer = "adam"  # adam, adamw, lion, muon
    c.clip_norm = 1.0
    c.unit_norm = True  # atoms of norm 1 after every update
    c.sparsity_warmup = 500  # steps over which a penalty grows
    c.resample_every = 0  # steps between two resamplings of dead latents; 0: never

    c.mesh = (1, 1)  # devices over which a batch is split, and latents

    c.log_every = 100
    c.checkpoint_every = 1000
    c.keep_checkpoints = 2
    return c
