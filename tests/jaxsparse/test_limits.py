"""Limits that users met in sparsity libraries before this one, and where a test says that they are
not here:

 1. hooks that one can forget: `test_contracts.py` (exact zeros after `optax.apply_updates` alone);
 2. the method must be the outermost wrapper: `test_contracts.py`, `test_masking.py`;
 3. restarts for a list of known optimizers: `test_compose.py` (every inner optimizer there is);
 4. extra arguments are lost: `test_contracts.py`, and `reduce_on_plateau` in `test_compose.py`;
 5. nested dicts only: `test_frameworks.py`;
 6. a sort of every leaf: here;
 7. masks gather sharded leaves: `test_selection_tpu.py`, `test_sharding.py`;
 8. `vmap` makes every step an update: `test_compose.py`;
 9. a stack of layers is one leaf: `test_frameworks.py`, `test_structures.py`;
10. NaN passes a mask, -0.0 appears: `test_masking.py`, `test_contracts.py`;
11. the first forward pass is dense: `test_contracts.py`;
12. the target is reached only if an interval divides another: `test_schedules.py`;
13. one constant key: `test_compose.py`, `test_leaves.py`;
14. a byte per mask entry: `test_masking.py`, `test_sharding.py`;
15. ties keep the first rows: `test_goldens.py`, `test_selection.py`;
16. counts in float32 and int32: `test_counts.py`, `test_leaves.py`;
17. one structure for all leaves: here, and `test_leaves.py`;
18. the sparsity is a constant of the program: `test_contracts.py` (swept under `vmap`);
19. no speed-up ever: `tests/pallas_kernels`;
20. no way to test a change: `make test`, `.ci/run`.
"""

import math
import re

import contracts
import jax
import jax.numpy as jnp
import optax
import pytest

import jaxsparse
from jaxsparse import structures

# LAMP's score of a weight is a sum over the weights that rank no lower: a sort, at updates only.
SORTS = {"lamp"}


@pytest.mark.parametrize("name", sorted(jaxsparse.METHODS))
def test_no_method_sorts_a_leaf(name):
    params = {"kernel": jax.ShapeDtypeStruct((1024, 256), jnp.float32)}
    tx = contracts.subject(name).tx
    state = jax.eval_shape(tx.init, params)
    text = str(jax.make_jaxpr(tx.update)(params, state, params))
    sizes = [
        math.prod(map(int, shape.split(",")))
        for line in text.splitlines()
        if re.search(r"= (sort|top_k|approx_top_k)\[", line)
        for shape in re.findall(r"\[([\d,]+)\]", line.split("=")[0])
    ]
    # Only short vectors are sorted, with one entry per layer, group or unit.
    assert all(n <= 3 * 4096 for n in sizes) == (name not in SORTS), sizes


def test_layers_of_one_network_may_have_structures_of_their_own():
    """A head with ten outputs, whose groups of four would not fit, does not stop the others."""
    params = {"body": {"kernel": jnp.ones((8, 8))}, "head": {"kernel": jnp.ones((8, 10))}}
    kinds = {"body": structures.NM(2, 4, axis=-1), "head": structures.Unstructured()}
    masks = jaxsparse.get_masks(
        jaxsparse.static(optax.sgd(0.1), 0.5, structure=kinds, allocation="uniform").init(params)
    )
    assert masks["body"]["kernel"].reshape(8, 2, 4).sum(-1).tolist() == [[2, 2]] * 8
    assert int(masks["head"]["kernel"].sum()) == 40
