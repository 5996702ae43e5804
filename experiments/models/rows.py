"""Where activations live when parameters are sharded."""

import jax
from jax.sharding import NamedSharding


def split_rows(x: jax.Array, rows: NamedSharding | None) -> jax.Array:
    """`x` with its first axis split over devices as the batch is; `None`, or a batch that does not
    divide over them, leaves it to the compiler.

    Parameters and batch are split over the same devices, and a product of the two can be had in two
    ways: gather the weights, or gather the batch and leave the outputs split. Left alone, XLA may take
    the second, and every device works on the whole batch. Told so once per layer, it gathers weights,
    one layer at a time.
    """
    if rows is None or x.shape[0] % rows.mesh.shape[rows.spec[0]]:
        return x
    return jax.lax.with_sharding_constraint(x, rows)
