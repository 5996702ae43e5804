"""Calibration and pruning of whole models: every kind of layer, the traps, and the block by block run."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jaxsparse
from jaxsparse import post_training as pt
from jaxsparse import targets
from jaxsparse.post_training import calibration, driver, models
from jaxsparse.structures import NM, FanIn

KEY = jax.random.key(0)


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


class Block(nnx.Module):
    """A residual block with the parts of a transformer's."""

    def __init__(self, rngs, width=8):
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.up = nnx.Linear(width, 2 * width, rngs=rngs)
        self.down = nnx.Linear(2 * width, width, rngs=rngs)

    def __call__(self, x):
        return x + self.down(jax.nn.gelu(self.up(self.norm(x))))


class Net(nnx.Module):
    def __init__(self, rngs, depth=4, width=8):
        self.embed = nnx.Embed(16, width, rngs=rngs)
        self.layers = nnx.List([Block(rngs, width) for _ in range(depth)])
        self.norm = nnx.LayerNorm(width, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.embed.attend(self.norm(x))


def net(depth=4):
    return Net(nnx.Rngs(0), depth)


def token_batches():
    return [jax.random.randint(jax.random.key(i), (3, 7), 0, 16) for i in range(3)]


def gram_of(x):
    """The sum over tokens of x xᵀ, in float64."""
    x = np.asarray(x, np.float64).reshape(-1, x.shape[-1])
    return x.T @ x


def weights_of(result_or_params, path):
    tree = getattr(result_or_params, "params", result_or_params)
    return np.asarray(dict(targets.named_leaves(tree))[path])


# -- Calibration: every kind of layer ------------------------------------------------------------------


def test_inputs_of_a_network_are_those_that_its_layers_see():
    model, tokens = net(2), token_batches()
    stats = pt.calibrate(model, tokens, pt.Gram())
    x, expected = model.embed(jnp.concatenate(tokens)), {}
    for i, layer in enumerate(model.layers):
        h = layer.norm(x)
        expected[f"layers/{i}/up/kernel"] = h
        expected[f"layers/{i}/down/kernel"] = jax.nn.gelu(layer.up(h))
        x = layer(x)
    assert list(stats) == list(expected)
    for name, h in expected.items():
        np.testing.assert_allclose(stats[name].gram[0], gram_of(h), rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(stats[name].sum[0], h.sum((0, 1)), rtol=1e-4, atol=1e-4)
        assert float(stats[name].count[0]) == 63
    norms = pt.calibrate(model, tokens, pt.Norms())
    for name in norms:
        assert norms[name].gram is None
        np.testing.assert_allclose(norms[name].squares, stats[name].squares, rtol=1e-5)


def outputs_squared(gram, matrix):
    """What the outputs' squares add up to, `[stack]`, were `matrix` the kernel."""
    return np.einsum("sio,sij,sjo->s", matrix, gram, matrix)


class Everything(nn.Module):
    """One layer of each kind of Linen, without biases."""

    @nn.compact
    def __call__(self, x):
        y = nn.Dense(6, use_bias=False, name="dense")(x)
        y = nn.DenseGeneral((2, 4), axis=-1, use_bias=False, name="split")(y)
        y = nn.DenseGeneral(8, axis=(-2, -1), use_bias=False, name="merge")(y)
        y = nn.Einsum((8, 5), "bti,io->bto", use_bias=False, name="einsum")(y)
        y = nn.remat(nn.Dense)(8, use_bias=False, name="remat")(y)
        y = nn.Conv(6, (3,), strides=2, use_bias=False, name="conv1d")(y)
        y = y[:, :, None, :]
        y = nn.Conv(4, (2, 1), kernel_dilation=(2, 1), use_bias=False, name="conv2d")(y)
        return nn.Conv(4, (1, 1), feature_group_count=2, use_bias=False, name="grouped")(y)


def test_the_statistic_of_every_layer_of_linen_gives_the_norm_of_its_outputs():
    model, x = Everything(), normal(1, 2, 9, 7)
    params = model.init(KEY, x)["params"]
    stats = pt.calibrate((model, params), [x], pt.Gram(), targets="kernel")
    _, seen = model.apply({"params": params}, x, capture_intermediates=True)
    whole = models.of((model, params))
    stream = calibration.Stream(whole, [x], "kernel", None, None)
    assert len(stream.kernels) == 8
    for kernel in stream.kernels:
        name = kernel.name.removesuffix("/kernel")
        matrix = kernel.take(params[name]["kernel"])
        (y,) = seen["intermediates"][name]["__call__"]
        expected = outputs_squared(stats[kernel.name].gram, matrix).sum()
        np.testing.assert_allclose(expected, np.sum(np.square(y)), rtol=1e-4)
        assert jnp.array_equal(
            kernel.put(params[name]["kernel"] * 0, matrix), params[name]["kernel"]
        )


@pytest.mark.parametrize(
    "kernel,groups,strides,padding,dilation",
    [((3, 2), 1, (1, 1), "SAME", (1, 1)), ((2, 3), 2, (2, 1), "VALID", (1, 2)),
     ((1, 3), 4, (1, 2), "SAME", (2, 1))],
)  # fmt: skip
def test_patches_stand_in_the_order_of_the_kernel(kernel, groups, strides, padding, dilation):
    conv = nnx.Conv(
        4, 8, kernel, strides, padding=padding, feature_group_count=groups,
        kernel_dilation=dilation, use_bias=False, rngs=nnx.Rngs(0),
    )  # fmt: skip
    x = normal(2, 2, 8, 9, 4)
    stats = pt.calibrate(conv, [x], pt.Gram())["kernel"]
    assert stats.gram.shape[0] == groups
    stream = calibration.Stream(models.of(conv), [x], None, None, None)
    for seed in range(2):  # any kernel, so that only the right order passes
        w = normal(seed, *conv.kernel.shape)
        conv.kernel[...] = w
        expected = outputs_squared(stats.gram, stream.kernels[0].take(w)).sum()
        np.testing.assert_allclose(expected, jnp.sum(conv(x) ** 2), rtol=1e-4)


def test_attention_of_nnx_and_linen_is_seen_projection_by_projection():
    x = normal(3, 2, 5, 8)
    attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=nnx.Rngs(0))
    stats = pt.calibrate(attention, [x], pt.Gram())
    assert sorted(stats) == ["key/kernel", "out/kernel", "query/kernel", "value/kernel"]
    for name in ("key/kernel", "query/kernel", "value/kernel"):
        np.testing.assert_allclose(stats[name].gram[0], gram_of(x), rtol=1e-4, atol=1e-4)
    q, k, v = (getattr(attention, n)(x) for n in ("query", "key", "value"))
    p = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) / 2.0)
    heads = jnp.einsum("bhqk,bkhd->bqhd", p, v).reshape(2, 5, 8)
    np.testing.assert_allclose(stats["out/kernel"].gram[0], gram_of(heads), rtol=1e-4, atol=1e-4)
    linen = nn.MultiHeadDotProductAttention(2)
    params = linen.init(KEY, x)["params"]
    assert len(pt.calibrate((linen, params), [x], pt.Gram())) == 4


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.Dense(8)(jax.nn.relu(nn.Dense(6)(x))), None


class Scanned(nn.Module):
    """Stacked layers whose author lists "params" alone: an interceptor's statistics would be lost."""

    @nn.compact
    def __call__(self, x):
        stack = nn.scan(
            nn.remat(Layer), variable_axes={"params": 0}, split_rngs={"params": True}, length=3
        )
        return stack(name="layers")(x, None)[0]


def test_every_layer_of_a_scan_has_a_statistic_of_its_own():
    model, x = Scanned(), normal(4, 5, 8)
    params = model.init(KEY, x)["params"]
    rule = [("kernel", targets.stacked(1))]
    stats = pt.calibrate((model, params), [x], pt.Gram(), targets=rule)
    assert sorted(stats) == [f"layers/Dense_{d}/kernel[{i}]" for d in (0, 1) for i in range(3)]
    h = x
    for i in range(3):
        one = jax.tree.map(lambda p, i=i: p[i], params["layers"])
        found = stats[f"layers/Dense_1/kernel[{i}]"].gram[0]  # the inner one
        np.testing.assert_allclose(found, gram_of(h), rtol=1e-4, atol=1e-4)
        h, _ = Layer().apply({"params": one}, h, None)
    result = pt.prune((model, params), [x], "wanda", sparsity=0.5, targets=rule)
    assert jax.tree.structure(result.params) == jax.tree.structure(params)  # no statistic stays
    mask = np.asarray(result.masks["layers"]["Dense_0"]["kernel"])
    assert mask.shape == (3, 6, 8) and (mask.sum(1) == 3).all()
    assert not weights_of(result, "layers/Dense_0/kernel")[~mask].any()
    assert jnp.array_equal(
        result.params["layers"]["Dense_0"]["bias"], params["layers"]["Dense_0"]["bias"]
    )


def test_layers_of_nnx_that_are_stacked_by_vmap_and_run_by_scan():
    @nnx.vmap(in_axes=0, out_axes=0)
    def make(key):
        return Block(nnx.Rngs(key))

    class Stack(nnx.Module):
        def __init__(self):
            self.blocks = make(jax.random.split(KEY, 3))

        def __call__(self, x):
            step = nnx.scan(lambda x, block: block(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
            return step(x, self.blocks)

    model, x = Stack(), normal(5, 4, 8)
    stats = pt.calibrate(model, [x], pt.Gram(), targets=[("kernel", targets.stacked(1))])
    assert len(stats) == 6
    first = nnx.state(model.blocks.norm)
    assert jax.tree.leaves(first)[0].shape == (3, 8)
    h = nnx.LayerNorm(8, rngs=nnx.Rngs(0))(x)
    np.testing.assert_allclose(
        stats["blocks/up/kernel[0]"].gram[0], gram_of(h), rtol=1e-4, atol=1e-4
    )


def test_experts_have_a_statistic_each_and_one_without_tokens_is_pruned_by_magnitude():
    w = normal(6, 3, 8, 4)
    route = jax.nn.one_hot(jnp.array([0, 0, 1, 0, 1, 1]), 3)  # the third expert sees nothing

    def mixture(params, x):
        return jnp.einsum(
            "te,ted->td", route, jnp.einsum("te,ti,eio->teo", route, x, params["experts"])
        )

    def dispatched(params, x):
        return jnp.einsum("eti,eio->eto", jnp.einsum("te,ti->eti", route, x), params["experts"])

    x = normal(7, 6, 8)
    params = {"experts": w}
    rule = [("experts", True)]
    stats = pt.calibrate((dispatched, params), [x], pt.Gram(), targets=rule)["experts"]
    assert stats.gram.shape == (3, 8, 8) and stats.count.tolist() == [3, 3, 0]
    np.testing.assert_allclose(
        stats.gram[1], gram_of(x[jnp.array([2, 4, 5])]), rtol=1e-4, atol=1e-4
    )
    result = pt.prune((dispatched, params), [x], "sparsegpt", sparsity=0.5, targets=rule)
    mask = np.asarray(result.masks["experts"])
    assert (~mask).sum((1, 2)).tolist() == [16, 16, 16]
    assert np.array_equal(mask[2], pt.magnitude_core(w[2], 0.5).mask)
    assert np.array_equal(result.params["experts"][2], np.where(mask[2], w[2], 0))
    assert "1 of 3 saw no token" in str(result)
    assert mixture(params, x).shape == (6, 4)


def test_a_shared_module_adds_what_it_sees_and_parts_of_one_leaf_are_kernels_of_their_own():
    w, x = normal(8, 8, 8), normal(9, 5, 8)
    twice = lambda p, x: jnp.tanh(x @ p["kernel"]) @ p["kernel"]
    stats = pt.calibrate((twice, {"kernel": w}), [x], pt.Gram())
    both = gram_of(x) + gram_of(jnp.tanh(x @ w))
    np.testing.assert_allclose(stats["kernel"].gram[0], both, rtol=1e-4, atol=1e-4)

    def fused(p, x):
        q, k = p["kernel"][:, :3], p["kernel"][:, 3:]
        return (x @ q).sum() + (2 * x @ k).sum()

    parts = pt.calibrate((fused, {"kernel": w}), [x], pt.Gram())
    np.testing.assert_allclose(4 * parts["kernel[0]"].gram, parts["kernel[1]"].gram, rtol=1e-5)
    pruned = pt.prune((fused, {"kernel": w}), [x], "wanda", sparsity=0.5)
    assert (np.asarray(pruned.masks["kernel"]).sum(0) == 4).all()


def test_a_tied_embedding_is_pruned_where_it_is_asked_for():
    model, tokens = net(1), token_batches()
    stats = pt.calibrate(model, tokens, pt.Gram(), targets="embed/embedding")
    assert list(stats) == ["embed/embedding"] and stats["embed/embedding"].gram.shape == (1, 8, 8)
    result = pt.prune(model, tokens, "wanda", sparsity=0.5, targets="embed/embedding")
    assert (np.asarray(result.masks["embed"]["embedding"]).sum(1) == 4).all()
    dense, sparse = (jnp.concatenate([m(t) for t in tokens]) for m in (model, result.model))
    expected = float(jnp.sum((dense - sparse) ** 2) / jnp.sum(dense**2))
    assert result.output_error == pytest.approx(expected, rel=1e-3)  # lookups are sparse, too


@pytest.mark.parametrize("method", ["magnitude", "wanda", "ria", "dsnot", "sparsegpt"])
@pytest.mark.parametrize("structure", ["fan_in", "2:4"])
def test_a_table_that_is_looked_up_in_keeps_the_largest_entries_of_every_row(method, structure):
    table = normal(0, 12, 8)
    function = lambda p, t: jnp.tanh(p["embedding"][t]) @ p["kernel"]
    model = (function, {"embedding": table, "kernel": normal(1, 8, 4)})
    batches = [{"t": jnp.array([[0, 1, 2], [3, 0, 0]])}]
    result = pt.prune(
        model, batches, method, sparsity=0.5, structure=structure, targets="embedding",
        mask=lambda b: b["t"] > 0,
    )  # fmt: skip
    size = np.abs(np.asarray(table)).reshape(12, -1, 8 if structure == "fan_in" else 4)
    least = np.sort(size, axis=-1)[..., size.shape[-1] // 2, None]
    mask = np.asarray(result.masks["embedding"])
    if method != "ria":  # which weighs an entry by those of its column as well
        assert np.array_equal(mask, (size >= least).reshape(12, 8))
    assert (mask.reshape(size.shape).sum(-1) == size.shape[-1] // 2).all()
    np.testing.assert_allclose(result.params["embedding"], np.where(mask, table, 0), rtol=1e-5)
    assert "rows are looked up: by magnitude" in str(result)


def test_a_table_that_is_looked_up_in_and_the_kernels_after_it_are_pruned_in_one_go():
    model = nnx.Sequential(nnx.Embed(12, 8, rngs=nnx.Rngs(0)), nnx.Linear(8, 4, rngs=nnx.Rngs(1)))
    tokens = [jnp.array([[0, 1, 2], [3, 4, 5]])]
    result = pt.prune(model, tokens, "sparsegpt", sparsity=0.5, targets="embedding|kernel")
    assert [r.name for r in result.layers] == ["layers/0/embedding", "layers/1/kernel"]
    expected = float(jnp.sum((model(tokens[0]) - result.model(tokens[0])) ** 2))
    expected /= float(jnp.sum(model(tokens[0]) ** 2))
    assert result.output_error == pytest.approx(expected, rel=1e-3)


# -- Calibration: traps ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "function,how",
    [
        (lambda p, t: p["kernel"][:, t], "gather"),
        (lambda p, t: jnp.ones(t.shape), "not used in this call"),
        (lambda p, t: jnp.ones((2, 4)) @ (p["kernel"] * 2.0), "mul"),
        (lambda p, t: p["kernel"] @ p["kernel"].T, "dot_general"),
    ],
)
def test_a_target_without_a_statistic_is_an_error_that_says_how_it_is_used(function, how):
    model = (function, {"kernel": jnp.ones((4, 3))})
    with pytest.raises(ValueError, match=f"'kernel' is .*{how}"):
        pt.calibrate(model, [jnp.array([0, 1])], pt.Gram())


def test_a_leaf_that_is_used_as_itself_and_transposed_is_refused():
    model = (lambda p, x: jnp.tanh(x @ p["kernel"]) @ p["kernel"].T, {"kernel": normal(0, 4, 3)})
    with pytest.raises(ValueError, match="'kernel' is multiplied with inputs in several ways"):
        pt.calibrate(model, [normal(1, 5, 4)], pt.Gram())


def test_padding_enters_no_statistic():
    model, tokens = net(2), token_batches()[0]
    keep = np.ones((3, 7), bool)
    keep[0, 4:] = keep[2, 2:] = False
    dirty = jnp.where(keep, tokens, 5)
    batch = {"tokens": dirty, "mask": keep}
    found = pt.calibrate(
        model, [batch], pt.Gram(), mask=lambda b: b["mask"], forward=lambda m, b: m(b["tokens"])
    )
    x = model.embed(dirty)[keep]
    expected = gram_of(model.layers[0].norm(x))
    name = "layers/0/up/kernel"
    np.testing.assert_allclose(found[name].gram[0], expected, rtol=1e-4, atol=1e-4)
    assert float(found[name].count[0]) == keep.sum()
    with pytest.raises(ValueError, match=r"mask: has shape \(4,\)"):
        pt.calibrate(model, [dirty], pt.Gram(), mask=lambda b: np.ones(4, bool))


def test_sums_add_over_batches_runs_and_devices():
    model, tokens = net(2), token_batches()
    whole = pt.calibrate(model, [jnp.concatenate(tokens)], pt.Gram())
    uneven = pt.calibrate(
        model, [tokens[0][:1], jnp.concatenate([tokens[0][1:], *tokens[1:]])], pt.Gram()
    )
    runs = [pt.calibrate(model, [t], pt.Gram()) for t in tokens]
    added = jax.tree.map(lambda *x: sum(x), *runs)
    eight = jnp.concatenate(tokens + tokens)[:16]
    mesh = Mesh(np.array(jax.devices()), "data")
    sharded = jax.device_put(eight, NamedSharding(mesh, PartitionSpec("data")))
    for a, b in ((whole, uneven), (whole, added)):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4), a, b)
    a, b = (pt.calibrate(model, [t], pt.Gram()) for t in (eight, sharded))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4), a, b)
    statistic = jax.shard_map(
        lambda x: jax.lax.psum(pt.Gram()(x), "data"), mesh=mesh,
        in_specs=PartitionSpec(None, "data"), out_specs=PartitionSpec(),
    )  # fmt: skip
    x = normal(0, 1, 16, 4)
    np.testing.assert_allclose(statistic(x).gram, pt.Gram()(x).gram, rtol=1e-5)


def test_statistics_of_bfloat16_models_are_float32_and_weights_stay_bfloat16():
    x = normal(1, 512, 8).astype(jnp.bfloat16)
    model = (lambda p, x: x @ p["kernel"], {"kernel": normal(2, 8, 4).astype(jnp.bfloat16)})
    stats = pt.calibrate(model, [x], pt.Gram())["kernel"]
    assert stats.gram.dtype == jnp.float32
    np.testing.assert_allclose(stats.gram[0], gram_of(x), rtol=1e-4, atol=1e-2)
    result = pt.prune(model, [x], "sparsegpt", sparsity=0.5)
    assert result.params["kernel"].dtype == jnp.bfloat16
    assert jnp.array_equal(result.params["kernel"] != 0, result.masks["kernel"])


def test_nothing_of_the_users_model_changes():
    model, tokens = net(2), token_batches()
    before = jax.tree.map(jnp.copy, nnx.state(model))
    kinds = [type(m) for _, m in nnx.iter_modules(model)]
    compiled = nnx.jit(lambda m, t: m(t))
    compiled(model, tokens[0])  # what is compiled before makes no difference
    seen = pt.calibrate(model, tokens, pt.Gram(), forward=compiled)
    result = pt.prune(model, tokens, "sparsegpt", sparsity=0.5)
    assert len(seen) == 4 and result.model is not model
    jax.tree.map(np.testing.assert_array_equal, before, nnx.state(model))
    assert kinds == [type(m) for _, m in nnx.iter_modules(model)]


def test_inputs_that_are_not_finite_are_named():
    model = (lambda p, x: x @ p["kernel"], {"kernel": jnp.ones((3, 2))})
    with pytest.raises(ValueError, match="inputs of 'kernel' hold NaN or infinity"):
        pt.prune(model, [jnp.array([[1.0, jnp.nan, 2.0]])], "wanda", sparsity=0.5)
    broken = (model[0], {"kernel": jnp.ones((3, 2)).at[1, 0].set(jnp.nan)})
    for run in (pt.prune, functools.partial(pt.level_database, step=1)):
        with pytest.raises(ValueError, match="weights of 'kernel' hold NaN or infinity"):
            run(broken, [jnp.ones((1, 3))], "wanda", sparsity=0.5)
    with pytest.raises(ValueError, match="batches: there are none"):
        pt.calibrate(model, [], pt.Gram())


def test_a_model_that_changes_itself_is_told_to_stop():
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(nnx.Linear(4, 4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs))
    with pytest.raises(ValueError, match=r"as dropout and batch norms do .* call model.eval\(\)"):
        pt.prune(model, [normal(0, 5, 4)], "wanda", sparsity=0.5)
    model.eval()
    assert pt.prune(model, [normal(0, 5, 4)], "wanda", sparsity=0.5).sparsity == 0.5


# -- The driver ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_block_by_block_equals_running_the_whole_model_again_for_every_block(method):
    model, tokens = net(3), token_batches()
    result = pt.prune(model, tokens, method, sparsity=0.5)
    slow = nnx.clone(model)
    for i in range(3):
        stats = pt.calibrate(slow, tokens, pt.Gram())  # what this block sees after pruned ones
        for name in ("up", "down"):
            x = jax.tree.map(lambda a: a[0], stats[f"layers/{i}/{name}/kernel"])
            kernel = getattr(slow.layers[i], name).kernel
            core = pt.METHODS[method]
            kernel[...] = core.core(kernel[...], *core.what(x), 0.5).weights
    for name in ("layers/0/up/kernel", "layers/2/up/kernel", "layers/2/down/kernel"):
        expected = weights_of(nnx.state(slow, nnx.Param), name)
        np.testing.assert_allclose(weights_of(result, name), expected, atol=1e-4)
    one_pass = pt.prune(model, tokens, method, sparsity=0.5, propagate=False)
    stats = pt.calibrate(model, tokens, pt.Gram())
    x = jax.tree.map(lambda a: a[0], stats["layers/2/up/kernel"])
    expected = core.core(model.layers[2].up.kernel[...], *core.what(x), 0.5).weights
    np.testing.assert_allclose(weights_of(one_pass, "layers/2/up/kernel"), expected, atol=1e-4)
    if method == "sparsegpt":
        assert not np.allclose(
            weights_of(one_pass, "layers/2/up/kernel"), slow.layers[2].up.kernel[...]
        )


def test_equal_blocks_are_compiled_once():
    model, tokens = net(4), token_batches()
    stream = calibration.Stream(models.of(model), tokens, None, None, None)
    with_kernels = [i for i, s in enumerate(stream.segments) if s.kernels]
    assert len(with_kernels) == 4
    params = jax.tree.leaves(stream.model.params)
    for at in range(len(stream.segments) - 1):
        stream.advance(at, stream.statistics(at, params, pt.Gram())[1])
        # What is alive between two blocks is their one activation.
        assert all(len(alive) == 1 for alive in stream.alive)
    (given,) = stream.results(1, params)
    np.testing.assert_allclose(given, model(tokens[1]), rtol=1e-5, atol=1e-5)
    assert len(stream._compiled) == len(stream.segments) - 3


def test_the_result_says_what_was_done_and_trains_on():
    model, tokens = net(2), token_batches()
    result = pt.prune(model, tokens, "sparsegpt", sparsity=0.5)
    assert result.sparsity == 0.5
    table = str(result)
    assert "layers/0/up/kernel" in table and "8x16" in table
    assert "dense (embedding): embed/embedding" in table
    assert [r.sparsity for r in result.layers] == [0.5] * 4
    assert all(0 < r.pruned < r.masked < 1 for r in result.layers)
    dense, sparse = (jnp.concatenate([m(t) for t in tokens]) for m in (model, result.model))
    expected = float(jnp.sum((dense - sparse) ** 2) / jnp.sum(dense**2))
    assert result.output_error == pytest.approx(expected, rel=1e-3)
    params = result.params
    tx = jaxsparse.static(optax.adamw(1e-2), masks="from_params")
    state = tx.init(params)
    grads = jax.tree.map(jnp.ones_like, params)
    updates, state = tx.update(grads, state, params)
    after = optax.apply_updates(params, updates)
    kept = weights_of(result.masks, "layers/1/up/kernel")
    assert np.array_equal(weights_of(after, "layers/1/up/kernel") != 0, kept)


def small_model():
    """A function of two kernels [8, 16] and [16, 8], batches, and a loss of its outputs."""
    params = {f"layers/{i}/kernel": normal(i, *s) for i, s in enumerate(((8, 16), (16, 8)))}
    function = lambda p, x: jnp.tanh(x @ p["layers/0/kernel"]) @ p["layers/1/kernel"]
    loss = lambda outputs, x: jnp.mean(jnp.square(outputs - jnp.roll(x, 1, axis=0)))
    return (function, params), [normal(20 + i, 5, 8) for i in range(3)], loss


@pytest.mark.parametrize("name", sorted(pt.METHODS))
@pytest.mark.parametrize("structure", [None, "2:4"])
def test_every_method_on_a_model_is_exactly_sparse_and_deterministic(name, structure):
    model, batches, loss = small_model()
    options = dict(structure=structure) if structure else dict(sparsity=0.5)
    options |= dict(group=4) if name == "gqsa" else {}
    if name == "gqsa" and structure:
        with pytest.raises(ValueError, match=r"structure=NM.*gqsa drops Block\(4, 1\)"):
            pt.prune(model, batches, name, loss=loss, **options)
        return
    first, second = (
        pt.prune(model, batches, name, loss=loss, errors=False, **options) for _ in range(2)
    )
    for path in model[1]:
        w, mask = np.asarray(first.params[path]), np.asarray(first.masks[path])
        assert np.array_equal(w, second.params[path])
        assert np.isfinite(w).all() and not w[~mask].any() and mask.sum() == mask.size // 2
        if structure:
            assert (mask.reshape(-1, 4, mask.shape[1]).sum(1) == 2).all()


def test_masks_are_the_same_on_one_and_on_eight_devices():
    model, tokens = net(2), jnp.concatenate(token_batches())[:8]
    mesh = Mesh(np.array(jax.devices()), "data")
    sharded = jax.device_put(tokens, NamedSharding(mesh, PartitionSpec("data")))
    one, eight = (pt.prune(model, [t], "wanda", sparsity=0.5) for t in (tokens, sharded))
    jax.tree.map(np.testing.assert_array_equal, one.masks, eight.masks)


def test_refit_is_an_option_of_every_method_and_makes_no_layer_worse():
    model, tokens = net(1), token_batches()
    plain = pt.prune(model, tokens, "wanda", sparsity=0.5)
    refit = pt.prune(model, tokens, "wanda", sparsity=0.5, refit=True)
    jax.tree.map(np.testing.assert_array_equal, plain.masks, refit.masks)
    for a, b in zip(plain.layers, refit.layers):
        assert b.pruned < a.pruned == pytest.approx(a.masked)
    norms_only = pt.prune(model, tokens, "wanda", sparsity=0.5, errors=False)
    assert norms_only.layers[0].pruned is None
    jax.tree.map(np.testing.assert_array_equal, plain.masks, norms_only.masks)


def test_sparsity_is_allocated_by_path_by_shape_and_by_outliers():
    model, tokens = net(3), token_batches()
    of = lambda **o: {r.name: r.sparsity for r in pt.prune(model, tokens, "wanda", **o).layers}
    by_path = of(sparsity=0.5, allocation={"layers/0": 0.25})
    assert by_path["layers/0/up/kernel"] == 0.25 and by_path["layers/1/up/kernel"] == 0.5
    owl = of(sparsity=0.5, allocation=pt.OWL(spread=0.2))
    assert len({owl[f"layers/{i}/up/kernel"] for i in range(3)}) > 1
    assert np.mean(list(owl.values())) == pytest.approx(0.5, abs=0.08)
    with pytest.raises(ValueError, match="layers are pruned one after the other"):
        of(sparsity=0.5, allocation="global")


def test_owl_gives_blocks_with_outliers_more_and_meets_the_budget():
    rule = pt.OWL()
    found = rule.sparsities([0.01, 0.02, 0.03, 0.08], [10, 10, 10, 10], 0.7)
    np.testing.assert_allclose(found, [0.757, 0.734, 0.711, 0.597], atol=1e-3)
    assert max(found) - min(found) == pytest.approx(0.16)
    sizes = np.array([1, 5, 2])
    assert sizes @ np.array(rule.sparsities([3, 1, 2], sizes, 0.6)) / 8 == pytest.approx(0.6)
    assert rule.sparsities([2, 2], [1, 3], 0.6) == [0.6, 0.6]
    w, squares = normal(0, 8, 4), jnp.arange(1.0, 9)
    scores = np.abs(w) * np.sqrt(np.arange(1.0, 9))[:, None]
    expected = np.mean(scores > 2 * scores.mean())
    assert pt.OWL(threshold=2.0).outliers([(w, squares)]) == pytest.approx(expected)


def test_few_tokens_and_raised_damping_are_said():
    model = (lambda p, x: x @ p["kernel"], {"kernel": normal(0, 16, 4)})
    result = pt.prune(model, [normal(1, 3, 16)], "sparsegpt", sparsity=0.5)
    assert "3 tokens for 16 inputs" in str(result)
    exact = pt.prune(model, [jnp.ones((3, 16)) * 1e3], "sparsegpt", sparsity=0.5, damping=1e-12)
    assert "damping raised" in str(exact)
    assert np.isfinite(weights_of(exact, "kernel")).all()


def test_a_method_of_ones_own_is_a_core_and_what_it_sees():
    def loudest(w, squares, sparsity, *, structure=None, power=1.0):
        return pt.wanda_core(w, squares**power, sparsity, structure=structure)

    method = pt.Method("loudest", loudest, lambda x: (x.squares,))
    model, tokens = net(1), token_batches()
    own = pt.prune(model, tokens, method, sparsity=0.5, power=1.0)
    wanda = pt.prune(model, tokens, "wanda", sparsity=0.5)
    jax.tree.map(np.testing.assert_array_equal, own.masks, wanda.masks)
    with pytest.raises(ValueError, match="block: 'loudest' has no such option; it has power"):
        pt.prune(model, tokens, method, sparsity=0.5, block=3)


def test_bad_arguments_are_named():
    model, tokens = net(1), token_batches()
    with pytest.raises(ValueError, match="method='gptq': give one of"):
        pt.prune(model, tokens, "gptq", sparsity=0.5)
    with pytest.raises(ValueError, match="sparsity is missing"):
        pt.prune(model, tokens, "wanda")
    with pytest.raises(ValueError, match=r"'layers/0/up/kernel' \(8, 16\): .*m=5"):
        pt.prune(model, tokens, "wanda", structure=NM(2, 5))
    with pytest.raises(ValueError, match="targets: no leaf matches 'attention'"):
        pt.prune(model, tokens, "wanda", sparsity=0.5, targets="attention")
    with pytest.raises(ValueError, match="model=dict"):
        pt.prune({}, tokens, "wanda", sparsity=0.5)
    assert driver.prune is pt.prune and FanIn() == FanIn()
