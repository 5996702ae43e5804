"""A TopK autoencoder on the residual stream after four blocks of SmolLM2-135M."""

from experiments.configs import sae_planted


def get_config():
    c = sae_planted.get_config()
    c.data = "smollm2"
    c.d_sae, c.options.k = 2304, 32
    c.tokens, c.batch_size, c.steps = 55_000, 1024, 1000
    c.learning_rate = 1e-3
    c.checkpoint_every = 250
    return c
