"""Adam's bias correction by the age of the slots, for weights that start late."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from jaxsparse._control import is_concrete
from jaxsparse.typing import Scalar

_OLDEST = 65_535  # steps in which every correction is over, the most that uint16 holds


class ByAge(NamedTuple):
    """The state of `scale_by_age`: `age` holds, for every weight, the steps since its slots started."""

    count: Array
    age: Any


def scale_by_age(b1: Scalar = 0.9, b2: Scalar = 0.999) -> optax.GradientTransformation:
    r"""Adam's bias correction by the age a of each weight's slots, in place of the number t of steps:

    $$d \leftarrow d\, \frac{1 - \beta_1^t}{1 - \beta_1^a} \sqrt{\frac{1 - \beta_2^a}{1 - \beta_2^t}}.$$

    The slots of a grown weight start anew while Adam's count goes on, so that its first step would be
    $(1 - \beta_1)/\sqrt{1 - \beta_2} = 3.16$ learning rates; so would that of an adapter which trains
    late. After this it is one learning rate. It stands anywhere after Adam in a chain, best directly:
    the age begins with the first update that is not 0, and decay is one. Ages are slots, too, and
    start anew with the others.

    The long first steps of grown weights are no mistake as such: on small networks RigL and SET reached
    more with them (docs/results/length_and_age.md).

    Args:
      b1, b2: the betas of Adam.

    >>> adam = optax.chain(optax.adam(1e-3), scale_by_age())
    >>> import jaxsparse
    >>> tx = jaxsparse.rigl(adam, sparsity=0.9, total_steps=10_000)

    Raises:
      ValueError: a beta out of [0, 1).
    """
    for name, beta in (("b1", b1), ("b2", b2)):
        if is_concrete(beta) and not 0 <= beta < 1:
            raise ValueError(f"{name}={beta}: must be in [0, 1), as the beta of Adam")

    def init_fn(params):
        age = jax.tree.map(lambda p: jnp.zeros_like(p, jnp.uint16), params)
        return ByAge(jnp.zeros((), jnp.int32), age)

    def update_fn(updates, state: Any, params=None):
        count = jnp.asarray(optax.safe_increment(state.count))

        def older(age, d):
            started = (age > 0) | (d != 0)
            return jnp.where(started & (age < _OLDEST), age + jnp.uint16(1), age)

        def corrected(d, age):
            a, t = jnp.maximum(age, 1).astype(jnp.float32), count.astype(jnp.float32)
            factor = (1 - b1**t) / (1 - b1**a) * jnp.sqrt((1 - b2**a) / (1 - b2**t))
            over = (a == t) | (age == _OLDEST)
            return d * jnp.where(over, 1.0, factor).astype(d.dtype)

        age = jax.tree.map(older, state.age, updates)
        return jax.tree.map(corrected, updates, age), ByAge(count, age)

    return optax.GradientTransformation(init_fn, update_fn)
