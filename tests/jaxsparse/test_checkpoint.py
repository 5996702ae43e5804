"""A run that is saved with Orbax and restored goes on as if it had not stopped."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxsparse
from jaxsparse.testing import close, gradients, masks_of, parameters, same, target

METHODS = {
    "rigl": lambda: jaxsparse.rigl(optax.adam(1e-2), 0.75, total_steps=8, update_every=2),
    "packed": lambda: jaxsparse.set_(
        optax.sgd(1e-2, momentum=0.9), 0.75, total_steps=8, update_every=2, pack_masks=True
    ),
    "st3": lambda: jaxsparse.st3(optax.adam(1e-2), 0.75, total_steps=8, begin_step=0, end_step=4),
    "autosparse": lambda: jaxsparse.autosparse(
        optax.adam(1e-2), total_steps=8, threshold_init=-1.0
    ),
    "wrapped": lambda: optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.apply_if_finite(jaxsparse.magnitude(optax.adam(1e-2), 0.5, total_steps=8), 3),
    ),
}


def stepper(tx):
    def step(p, s):
        updates, s = tx.update(gradients(p, target(p)), s, p)
        return optax.apply_updates(p, updates), s

    return jax.jit(step)


def run(step, p, s, steps):
    for _ in range(steps):
        p, s = step(p, s)
    return p, s


def saved(tmp_path, tree):
    path = tmp_path / "checkpoint"
    with ocp.StandardCheckpointer() as writer:
        writer.save(path, tree)
    return path


def restored(path, like):
    with ocp.StandardCheckpointer() as reader:
        return reader.restore(path, like)


@pytest.mark.parametrize("name", METHODS)
def test_a_restored_run_continues_bit_for_bit(name, tmp_path):
    tx = METHODS[name]()
    step = stepper(tx)
    middle = run(step, parameters(), tx.init(parameters()), 3)
    path = saved(tmp_path, middle)
    end = run(step, *middle, 3)
    fresh = (parameters(7), tx.init(parameters(7)))
    again = run(step, *restored(path, fresh), 3)
    same(end, again, "parameters and state")


def test_a_run_is_restored_on_another_number_of_devices(tmp_path):
    tx = METHODS["rigl"]()
    step = stepper(tx)
    middle = run(step, parameters(), tx.init(parameters()), 3)
    path = saved(tmp_path, middle)
    end = run(step, *middle, 3)

    mesh = Mesh(np.array(jax.devices()[:4]), ("x",))
    place = lambda x: NamedSharding(mesh, P("x") if x.ndim == 2 else P())
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place(x)), middle
    )
    p, s = restored(path, abstract)
    assert p["dense"]["kernel"].sharding.num_devices == 4
    same(middle, (p, s), "what was restored")
    p, s = run(step, p, s, 3)
    same(masks_of(end[1]), masks_of(s), "masks")
    close(end[0], p, "parameters")


def test_a_checkpoint_of_another_method_is_an_error(tmp_path):
    other = METHODS["st3"]()
    path = saved(tmp_path, (parameters(), other.init(parameters())))
    tx = METHODS["rigl"]()
    with pytest.raises(ValueError):
        restored(path, (parameters(), tx.init(parameters())))


def test_the_state_of_another_method_is_an_error_that_says_so():
    params = parameters()
    rigl, st3 = METHODS["rigl"](), METHODS["st3"]()
    with pytest.raises(ValueError, match="opt_state: .*another method"):
        st3.update(params, rigl.init(params), params)
    with pytest.raises(ValueError, match="opt_state: .*another method"):
        rigl.update(params, st3.init(params), params)
    with pytest.raises(ValueError, match="opt_state: .*init"):
        rigl.update(params, optax.adam(1e-3).init(params), params)


def test_the_state_of_another_model_is_an_error_that_names_the_leaf():
    tx = METHODS["rigl"]()
    params = parameters()
    wide = jax.tree.map(lambda x: jnp.concatenate([x, x]), params)
    with pytest.raises(ValueError, match="opt_state: .*another model.*'conv/kernel'"):
        tx.update(wide, tx.init(params), wide)
    with pytest.raises(ValueError, match="opt_state: .*another model"):
        tx.update({"kernel": jnp.ones((4, 4))}, tx.init(params), {"kernel": jnp.ones((4, 4))})
