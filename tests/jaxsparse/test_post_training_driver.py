"""What `prune` does besides a method: gradients, corrections, stages, resumption, meshes; narrow models, rotated
streams, adapters, and databases of levels."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxsparse import channels
from jaxsparse import post_training as pt
from jaxsparse.post_training import (
    calibration,
    correction,
    gradients,
    models,
    slicegpt,
)
from jaxsparse.post_training.narrow import densities
from jaxsparse.structures import Unstructured


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def chain(p, x):
    """Two residual blocks [8, 16], [16, 8]."""
    for i in range(2):
        x = x + jnp.tanh(x @ p[f"layers/{i}/up/kernel"]) @ p[f"layers/{i}/down/kernel"]
    return x


def loss(outputs, x):
    return jnp.mean(jnp.square(outputs - jnp.roll(x, 1, axis=0)))


@pytest.fixture(scope="module")
def case():
    params = {}
    for i in range(2):
        params[f"layers/{i}/up/kernel"] = normal(i, 8, 16)
        params[f"layers/{i}/down/kernel"] = normal(10 + i, 16, 8) / 4
    return (chain, params), [normal(20 + i, 6, 8) for i in range(3)]


def stream_of(model, batches):
    return calibration.Stream(models.of(model), batches, None, None, None)


# -- Gradients -----------------------------------------------------------------------------------------


def test_gradients_of_a_loss_and_of_a_block_are_those_of_the_functions(case):
    model, batches = case
    stream = stream_of(model, batches)
    leaves = jax.tree.leaves(model[1])
    found = gradients.LossGradients(stream, loss)(1, leaves)
    name = "layers/1/up/kernel"
    for i, x in enumerate(batches):
        slope = jax.grad(lambda p, x=x: loss(chain(p, x), x))(model[1])[name]
        np.testing.assert_allclose(found[name][0, i], slope, rtol=1e-4, atol=1e-6)
    assert sorted(found) == ["layers/1/down/kernel", name]
    region = gradients.regional(stream, 0, leaves)["layers/0/up/kernel"]
    for i, x in enumerate(batches):
        first = lambda w, x=x: jnp.linalg.norm(
            x + jnp.tanh(x @ w) @ model[1]["layers/0/down/kernel"]
        )
        slope = jax.grad(first)(model[1]["layers/0/up/kernel"])
        np.testing.assert_allclose(region[0, i], slope, rtol=1e-4, atol=1e-5)


def test_a_method_sees_the_gradients_at_the_pruned_blocks_before_it(case):
    model, batches = case
    result = pt.prune(model, batches, "obd", sparsity=0.5, loss=loss, errors=False)
    first = {k: v for k, v in result.params.items() if "layers/0" in k}
    at = model[1] | first
    g = [jax.grad(lambda p, x=x: loss(chain(p, x), x))(at) for x in batches]
    for name in ("layers/1/up/kernel", "layers/1/down/kernel"):
        rows = jnp.stack([x[name] for x in g])
        expected = pt.obd_core(model[1][name], rows, 0.5)
        assert np.array_equal(result.masks[name], expected.mask)


def test_without_propagation_gradients_are_those_of_the_dense_model(case):
    model, batches = case
    options = dict(sparsity=0.5, loss=loss, errors=False, propagate=False)
    result = pt.prune(model, batches, "obd", **options)
    for name, w in model[1].items():
        slopes = [jax.grad(lambda p, x=x: loss(chain(p, x), x))(model[1])[name] for x in batches]
        expected = pt.obd_core(w, jnp.stack(slopes), 0.5)
        assert np.array_equal(result.masks[name], expected.mask), name
    staged = pt.prune(model, batches, "obd", stages=2, **options)
    assert staged.sparsity == 0.5


def test_stages_end_at_the_sparsity_with_gradients_taken_anew(case):
    model, batches = case
    one, two = (
        pt.prune(model, batches, "chita", sparsity=0.5, loss=loss, stages=n) for n in (1, 2)
    )
    assert one.sparsity == two.sparsity == 0.5
    assert not np.array_equal(one.params["layers/0/up/kernel"], two.params["layers/0/up/kernel"])
    with pytest.raises(ValueError, match="stages=2: a positive number, above 1 for methods"):
        pt.prune(model, batches, "wanda", sparsity=0.5, stages=2)
    with pytest.raises(ValueError, match=r"stages=2: structure=NM.*no stages"):
        pt.prune(model, batches, "chita", structure="2:4", loss=loss, stages=2)
    with pytest.raises(ValueError, match="loss: 'woodfisher' reads gradients"):
        pt.prune(model, batches, "woodfisher", sparsity=0.5)
    with pytest.raises(ValueError, match="gradients of 'layers/0/.*' hold NaN"):
        nan = lambda y, x: jnp.sum(y) * jnp.nan
        pt.prune(model, batches, "obd", sparsity=0.5, loss=nan)


def test_tuning_a_block_draws_it_towards_the_dense_one(case):
    model, batches = case
    run = lambda **o: pt.prune(model, batches, "wanda_plus_plus", sparsity=0.5, **o)
    plain, tuned = run(), run(rounds=3, learning_rate=1e-3)
    assert tuned.sparsity == 0.5 and tuned.output_error < plain.output_error
    for name, mask in tuned.masks.items():
        assert not np.asarray(tuned.params[name])[~np.asarray(mask)].any()
    with pytest.raises(ValueError, match="rounds: 'wanda' has no such option"):
        pt.prune(model, batches, "wanda", sparsity=0.5, rounds=3)


# -- Correction of the pruned prefix -------------------------------------------------------------------


def test_corrected_weights_are_the_least_squares_answer_to_the_dense_outputs():
    x, y, w = (
        np.asarray(normal(i, *s), np.float64) for i, s in enumerate(((90, 6), (90, 6), (6, 4)))
    )
    y = x + 0.3 * y
    expected = np.linalg.lstsq(x, y @ w, rcond=None)[0]
    drift = x.T @ (y - x)
    f32 = lambda a: jnp.asarray(a, jnp.float32)
    found = correction.corrected(f32(w), f32(x.T @ x), f32(drift), 1.0, damping=0.0)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    half = correction.corrected(f32(w), f32(x.T @ x), f32(drift), 0.5, damping=0.0)
    np.testing.assert_allclose(half, (w + expected) / 2, atol=1e-4)


def test_the_drift_of_a_block_is_what_its_inputs_lost_and_correction_lowers_the_error():
    wide = {f"layers/{i}/kernel": normal(i, 12, 12) for i in range(3)}

    def straight(p, x):
        for i in range(3):
            x = jnp.tanh(x @ p[f"layers/{i}/kernel"] / 3)
        return x

    batches = [normal(30 + i, 40, 12) for i in range(2)]
    stream = stream_of((straight, wide), batches)
    ahead, dense = stream.fork(), jax.tree.leaves(wide)
    cut = [dense[0] * 0.5, *dense[1:]]
    for s, p in ((stream, cut), (ahead, dense)):
        s.advance(0, s.outputs(0, p))
    found = stream.drift(1, cut, ahead, dense)["layers/1/kernel"][0]
    x = jnp.concatenate(batches)
    here, there = (jnp.tanh(x @ p[0] / 3) for p in (cut, dense))
    np.testing.assert_allclose(found, here.T @ (there - here), rtol=1e-3, atol=1e-3)
    run = lambda **o: pt.prune((straight, wide), batches, "sparsegpt", sparsity=0.6, **o)
    assert run(correct=1.0).output_error < run().output_error
    with pytest.raises(ValueError, match="correct=2: a number in"):
        run(correct=2)
    with pytest.raises(ValueError, match="correct=0.5: .* 0 without propagate=True"):
        run(correct=0.5, propagate=False)


# -- Resumption ------------------------------------------------------------------------------------------


class Killed(Exception):
    pass


@pytest.mark.parametrize("options", [{}, {"propagate": False}, {"correct": 0.5}])
def test_a_run_goes_on_at_the_block_where_it_was_killed_to_the_bit(case, tmp_path, options):
    model, batches = case
    run = lambda **o: pt.prune(model, batches, "sparsegpt", sparsity=0.5, block=4, **options, **o)
    whole = run()

    def kill(done, total):
        if done == 1:
            raise Killed

    with pytest.raises(Killed):
        run(checkpoint=tmp_path, progress=kill)
    assert [p.name for p in sorted(tmp_path.glob("block*"))] == ["block_00000.npz"]
    before = (tmp_path / "block_00000.npz").stat().st_mtime_ns
    again = run(checkpoint=tmp_path)
    assert (tmp_path / "block_00000.npz").stat().st_mtime_ns == before
    for name in model[1]:
        assert np.array_equal(whole.params[name], again.params[name])
        assert np.array_equal(whole.masks[name], again.masks[name])
    assert whole.output_error == again.output_error
    same = lambda r: (r.name, r.shape, r.sparsity, r.masked, r.pruned, r.damping, r.note)
    assert list(map(same, whole.layers)) == list(map(same, again.layers))
    (tmp_path / "block_00001.npz").write_bytes(b"PK half a file")  # broken: done again
    third = run(checkpoint=tmp_path)
    assert np.array_equal(third.params["layers/1/up/kernel"], whole.params["layers/1/up/kernel"])
    with pytest.raises(ValueError, match="holds a run with another sparsities"):
        pt.prune(model, batches, "sparsegpt", sparsity=0.4, block=4, checkpoint=tmp_path, **options)
    with pytest.raises(ValueError, match="holds a run with another data"):
        run_other = [b + 1 for b in batches]
        pt.prune(
            model, run_other, "sparsegpt", sparsity=0.5, block=4, checkpoint=tmp_path, **options
        )
    for other, what in (
        (dict(mask=lambda b: jnp.arange(6) > 0), "mask"),
        (dict(blocks=".*"), "blocks"),
        (dict(targets="layers/0"), "sparsities"),
    ):
        with pytest.raises(ValueError, match=f"holds a run with another {what}"):
            run(checkpoint=tmp_path, **other)
    assert json.loads((tmp_path / "run.json").read_text())["method"] == "sparsegpt"


# -- Meshes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_sharded_models_are_pruned_where_they_are_with_the_same_masks(case, method):
    model, _ = case
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "model"))
    at = lambda *spec: NamedSharding(mesh, PartitionSpec(*spec))
    batch = normal(40, 16, 8)
    place = lambda name: at(None, "model") if "up" in name else at("model", None)
    params = {k: jax.device_put(v, place(k)) for k, v in model[1].items()}
    options = dict(sparsity=0.5, block=8) if method == "sparsegpt" else dict(sparsity=0.5)
    one = pt.prune(model, [batch], method, **options)
    eight = pt.prune((chain, params), [jax.device_put(batch, at("data"))], method, **options)
    for name in params:
        assert np.array_equal(one.masks[name], eight.masks[name])
        np.testing.assert_allclose(one.params[name], eight.params[name], atol=1e-4)
        assert eight.params[name].sharding == params[name].sharding


# -- Allocation ----------------------------------------------------------------------------------------


def test_a_budget_by_what_the_loss_feels_is_met_and_needs_a_loss(case):
    model, batches = case
    result = pt.prune(
        model, batches, "wanda", sparsity=0.5, allocation="ecoflap", loss=loss, errors=False,
        structure=Unstructured(),
    )  # fmt: skip
    found = {r.name: r.sparsity for r in result.layers}
    assert result.sparsity == pytest.approx(0.5, abs=0.01)
    assert found["layers/0/up/kernel"] == found["layers/0/down/kernel"]
    assert found["layers/0/up/kernel"] != found["layers/1/up/kernel"]
    assert max(found.values()) <= 0.61
    with pytest.raises(ValueError, match="loss: allocation='ecoflap' asks how much"):
        pt.prune(model, batches, "wanda", sparsity=0.5, allocation="ecoflap")


def test_a_database_of_levels_keeps_the_budget_and_gives_models(case):
    model, batches = case
    base = pt.level_database(
        model, batches, "sparsegpt", sparsity=0.5, step=16, levels=(-2, -1, 0, 1, 2), block=4
    )
    assert base.levels == ((-2, -1, 0, 1, 2),) * 4
    count = lambda p: sum(int(jnp.sum(x == 0)) for x in jax.tree.leaves(p))
    assert count(base.params(base.uniform)) == 256
    assert count(base.params((1, -1, 2, -2))) == 256
    assert all(list(row) == sorted(row) for row in base.errors)
    direct = pt.prune(model, batches, "sparsegpt", sparsity=0.5, propagate=False, block=4)
    name = base.names[2]
    np.testing.assert_allclose(base.params(base.uniform)[name], direct.params[name], atol=1e-5)
    dense = [chain(model[1], x) for x in batches]
    score = jax.jit(lambda p: sum(jnp.sum((chain(p, x) - y) ** 2) for x, y in zip(batches, dense)))
    fitness = lambda levels, generation, round_: float(score(base.params(levels)))
    levels, history = pt.evolve(base.levels, fitness, generations=4, offspring=6)
    assert sum(levels) == 0 and history[-1] <= fitness(base.uniform, 0, 0)
    assert base.model(levels)[0] is chain
    with pytest.raises(ValueError, match=r"has no level 7; it has \[-2"):
        base.params((7, 0, 0, 0))
    with pytest.raises(ValueError, match="levels: 1 for 4 kernels"):
        base.params((0,))
    with pytest.raises(ValueError, match="'wanda' makes .* zeros where a level has"):
        pt.level_database(model, batches, "wanda", sparsity=0.5, step=3, levels=(0, 1))
    with pytest.raises(ValueError, match="method='obd': levels are made from Gram"):
        pt.level_database(model, batches, "obd", sparsity=0.5, step=3)


# -- Adapters ------------------------------------------------------------------------------------------


def test_adapters_train_within_the_mask_and_merged_equals_adapted(case):
    model, batches = case
    result = pt.prune(model, batches, "wanda", sparsity=0.5)
    lora = pt.adapter(result, rank=3, alpha=6.0)
    assert lora.scale == 2.0 and len(lora.init) == 4
    np.testing.assert_array_equal(lora(lora.init, batches[0]), chain(result.params, batches[0]))
    wanted = [chain(model[1], x) for x in batches]
    distance = lambda f: sum(jnp.mean((lora(f, x) - y) ** 2) for x, y in zip(batches, wanted))
    tx = optax.adam(1e-2)
    factors, state = lora.init, tx.init(lora.init)
    step = jax.jit(jax.value_and_grad(distance))
    first = None
    for _ in range(30):
        value, slopes = step(factors)
        first = value if first is None else first
        updates, state = tx.update(slopes, state)
        factors = optax.apply_updates(factors, updates)
    assert value < 0.7 * first
    merged = lora.merge(factors)
    assert merged[0] is chain
    np.testing.assert_allclose(
        chain(merged[1], batches[0]), lora(factors, batches[0]), rtol=1e-6, atol=1e-6
    )
    for name, mask in result.masks.items():
        after = np.asarray(merged[1][name])
        assert not after[~np.asarray(mask)].any()
        assert not np.array_equal(after, result.params[name])


def test_gradients_of_adapters_are_those_of_the_masked_product(case):
    model, batches = case
    result = pt.prune(model, batches, "wanda", sparsity=0.5)
    name = "layers/1/down/kernel"
    lora = pt.adapter(result, rank=2, alpha=3.0, targets=name)
    assert list(lora.init) == [name]
    f = {name: pt.Factors(normal(1, 1, 16, 2), normal(2, 1, 2, 8))}
    train = lambda f: jnp.sum(jnp.sin(lora(f, batches[0])))
    slopes = jax.grad(train)(f)[name]
    dense = jax.grad(lambda p: jnp.sum(jnp.sin(chain(p, batches[0]))))(lora.params(f))[name]
    g = 1.5 * jnp.where(result.masks[name], dense, 0)
    np.testing.assert_allclose(slopes.a[0], g @ f[name].b[0].T, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(slopes.b[0], f[name].a[0].T @ g, rtol=1e-4, atol=1e-5)


def test_adapters_know_kept_zeros_stacks_and_what_they_cannot_do(case):
    (_, params), _ = case
    w, mask = params["layers/0/up/kernel"].at[0, 0].set(0.0), jnp.ones((8, 16), bool)
    plain = (lambda p, x: x @ p["kernel"], {"kernel": w})
    lora = pt.adapter(plain, {"kernel": mask}, rank=1)
    moved = jax.tree.map(lambda x: x + 1.0, lora.init)
    assert lora.params(moved)["kernel"][0, 0] != 0  # kept, though it was 0
    stacked = {"kernel": normal(3, 2, 8, 8)}
    deep = lambda p, x: jnp.tanh(x @ p["kernel"][0]) @ p["kernel"][1]
    result = pt.prune((deep, stacked), [normal(4, 9, 8)], "wanda", sparsity=0.5)
    two = pt.adapter(result, rank=1)
    assert sorted(two.init) == ["kernel[0]", "kernel[1]"]
    changed = two.params(jax.tree.map(lambda x: x + 1.0, two.init))["kernel"]
    assert np.array_equal(np.asarray(changed) != stacked["kernel"] * result.masks["kernel"],
                          result.masks["kernel"])  # fmt: skip
    with pytest.raises(ValueError, match="rank=0: give an integer of at least 1"):
        pt.adapter(result, rank=0)
    with pytest.raises(ValueError, match="masks: a model has none"):
        pt.adapter(plain)
    with pytest.raises(ValueError, match="no matrix"):
        pt.adapter((deep, stacked), result.masks)
    with pytest.raises(ValueError, match="targets='attention': matches no kernel"):
        pt.adapter(result, targets="attention")


# -- Channels ------------------------------------------------------------------------------------------


class Hidden(nnx.Module):
    def __init__(self, rngs, bias=True):
        self.up = nnx.Linear(6, 10, use_bias=False, rngs=rngs)
        self.gate = nnx.Linear(6, 10, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(10, 6, use_bias=bias, rngs=rngs)

    def __call__(self, x):
        return x + self.down(nnx.silu(self.gate(x)) * self.up(x))


class Deep(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([Hidden(rngs, bias=i == 0) for i in range(2)])

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.fixture(scope="module")
def deep():
    batches = [normal(50 + i, 20, 6) + 0.5 for i in range(2)]
    return Deep(nnx.Rngs(0)), batches, channels.find(Deep(nnx.Rngs(0)), batches[0])


def inner(model, x):
    """What enters `down` of each layer."""
    found = []
    for layer in model.layers:
        found.append(nnx.silu(layer.gate(x)) * layer.up(x))
        x = layer(x)
    return found


def test_channels_are_judged_as_the_cards_say(deep):
    model, batches, _ = deep
    x = jnp.concatenate(batches)
    hidden = [np.asarray(h, np.float64) for h in inner(model, x)]
    down = [np.asarray(layer.down.kernel[...], np.float64) for layer in model.layers]
    standard = lambda a: (a - a.mean()) / a.std()
    flap = [standard(h.var(0) * (d**2).sum(1)) for h, d in zip(hidden, down)]
    sp = [standard(np.mean(np.abs(d), 1) * np.sqrt((h**2).sum(0))) for h, d in zip(hidden, down)]
    for criterion, scores in (("flap", flap), ("wanda_sp", sp)):
        small = pt.narrow(model, batches, criterion, sparsity=0.3, bias=False)
        cut = np.sort(np.concatenate(scores))[6]
        expected = [np.flatnonzero(s >= cut) for s in scores]
        found = list(small.kept.values())
        assert sum(map(len, found)) == 14
        assert all(np.array_equal(a, b) for a, b in zip(found, expected))
    layer, h = model.layers[0], hidden[0]
    share = lambda a: a / a.sum(0, keepdims=True)
    makers = [np.asarray(m.kernel[...], np.float64) for m in (layer.up, layer.gate)]
    size = np.sqrt((h**2).sum(0))
    score = share(np.abs(down[0]) * size[:, None]).mean(1) + sum(
        share(np.abs(m).T).mean(1) for m in makers
    )
    even = pt.narrow(model, batches, "cfsp", sparsity=0.3, slope=0.0)
    first = next(iter(even.kept.values()))
    assert np.array_equal(first, np.sort(np.argsort(score * size)[3:]))
    assert [len(k) for k in even.kept.values()] == [7, 7]


def test_the_bias_of_what_is_gone_makes_the_mean_output_exact(deep):
    model, batches, _ = deep
    small = pt.narrow(model, batches[:1], "flap", sparsity=0.4)
    assert small.model.layers[1].down.bias is not None and model.layers[1].down.bias is None
    x = batches[0]
    before = model.layers[0](x).mean(0)
    np.testing.assert_allclose(small.model.layers[0](x).mean(0), before, atol=1e-5)
    plain = pt.narrow(model, batches[:1], "flap", sparsity=0.4, bias=False)
    error = lambda m: float(jnp.sum((m(x) - model(x)) ** 2))
    assert error(small.model) < error(plain.model)
    assert small.model.layers[0].up.kernel.shape[1] < 10
    params = {"up": normal(1, 6, 10), "down": normal(2, 10, 6)}
    function = lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"]
    narrow_ = pt.narrow((function, params), batches, "wanda_sp", sparsity=0.5)
    assert narrow_.params["up"].shape == (6, 5)
    with pytest.raises(ValueError, match="bias=True: 'down' has no bias beside it"):
        pt.narrow((function, params), batches, "flap", sparsity=0.5)


def test_budgets_of_blocks_by_how_far_they_turn_their_input():
    found = densities([0.1, 0.2, 0.5], 0.3, 10.0)
    assert np.mean(found) == pytest.approx(0.7) and found[0] < found[1] < found[2] < 1
    assert np.mean(densities([0.0, 0.0, 5.0], 0.1, 50.0)) == pytest.approx(0.9)
    assert max(densities([0.0, 0.0, 5.0], 0.1, 50.0)) < 1


def test_narrow_says_what_it_cannot_do(deep):
    model, batches, groups = deep
    with pytest.raises(ValueError, match="criterion='magnitude': use 'flap'"):
        pt.narrow(model, batches, "magnitude", sparsity=0.5)
    with pytest.raises(ValueError, match="sparsity=1: must be in"):
        pt.narrow(model, batches, sparsity=1)
    with pytest.raises(ValueError, match="batches: there are none"):
        pt.narrow(model, [], sparsity=0.5)
    with pytest.raises(ValueError, match="no channels that one kernel reads"):
        pt.narrow(
            (lambda p, x: x @ p["k"], {"k": jnp.ones((3, 2))}), [jnp.ones((1, 3))], sparsity=0.5
        )
    assert len(groups) == 2


# -- SliceGPT --------------------------------------------------------------------------------------------


def residual(width=16, rank=None):
    """Embedding, two branches and a head; with `rank` the stream lies in a space of that many dimensions."""
    space = jnp.eye(width) if rank is None else normal(9, rank, width) / rank**0.5
    lift = (lambda x: x) if rank is None else (lambda x: x[..., :rank] @ space)
    branches = []
    for i in range(2):
        params = {
            "up": normal(i, width, 24) / 4, "down": lift(normal(5 + i, 24, width)) / 5,
            "bias": lift(normal(7 + i, 1, width))[0] / 5,
        }  # fmt: skip
        function = lambda p, z: jnp.tanh(z @ p["up"]) @ p["down"] + p["bias"]
        branches.append(pt.Branch(function, params, ("up",), ("down", "bias")))
    return lift(normal(3, 11, width)), branches, normal(4, width, 7)


def plain(embedding, branches, head, tokens):
    x = embedding[tokens]
    for b in branches:
        x = x + b.function(b.params, slicegpt.rms_norm(x, x.shape[-1]))
    return slicegpt.rms_norm(x, x.shape[-1]) @ head


def test_a_rotated_stream_of_which_nothing_is_cut_computes_the_same():
    parts = residual()
    tokens = [jax.random.randint(jax.random.key(i), (4, 9), 0, 11) for i in range(2)]
    same = pt.slice_stream(*parts, tokens, 0.0)
    assert same.shortcuts[0].shape == (16, 16)
    assert not np.allclose(same.branches[0].params["up"], parts[1][0].params["up"], atol=0.1)
    np.testing.assert_allclose(same(tokens[0]), plain(*parts, tokens[0]), atol=1e-4)


def test_a_stream_of_few_directions_is_cut_to_them_without_loss():
    parts = residual(rank=5)
    tokens = [jax.random.randint(jax.random.key(0), (30, 9), 0, 11)]
    small = pt.slice_stream(*parts, tokens, 0.5)
    assert small.embedding.shape == (11, 8) and small.branches[0].params["up"].shape == (8, 24)
    np.testing.assert_allclose(small(tokens[0]), plain(*parts, tokens[0]), atol=1e-3)
    assert max(map(abs, small.dropped)) < 1e-4
    # The share that is said to be lost is what the eigenvalues of the dropped directions hold.
    dense = residual()
    cut = pt.slice_stream(*dense, tokens, 0.5)
    x = np.asarray(dense[0][tokens[0]], np.float64).reshape(-1, 16)
    values = np.linalg.eigvalsh(x.T @ x)
    assert cut.dropped[0] == pytest.approx(values[:8].sum() / values.sum(), rel=1e-3)
    assert cut.parameters() < pt.slice_stream(*dense, tokens, 0.0).parameters()
    with pytest.raises(ValueError, match="leaves less than round_to=8 of 16"):
        pt.slice_stream(*dense, tokens, 0.9)
    with pytest.raises(ValueError, match="sparsity=-0.1: must be in"):
        pt.slice_stream(*dense, tokens, -0.1)
    with pytest.raises(ValueError, match="batches: there are none"):
        pt.slice_stream(*dense, [], 0.5)


def test_layer_norms_become_norms_without_means_and_scales():
    e, w, scale, k = normal(1, 5, 8), normal(2, 6, 8), normal(3, 8), normal(4, 8, 3)
    norm = lambda x: (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5)
    h = normal(5, 5, 6)
    before = (norm(e + h @ w) * scale) @ k
    x = slicegpt.center(e) + h @ slicegpt.center(w)
    after = slicegpt.rms_norm(x, 8) @ slicegpt.fold_scale(scale, k)
    np.testing.assert_allclose(after, before, atol=1e-5)
