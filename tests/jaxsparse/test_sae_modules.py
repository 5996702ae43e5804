"""Sparse autoencoders against NumPy in plain loops, and the identities of their cards."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

from jaxsparse import sae
from jaxsparse.selection import topk_indices

D, F, B, K = 6, 20, 10, 3
RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(B, D)), jnp.float32)


def make(kind, **options):
    """An autoencoder with biases that are not 0."""
    model = kind(D, F, rngs=nnx.Rngs(1), **options)
    model.b_enc[...] = jnp.asarray(RNG.normal(size=F) * 0.1, jnp.float32)
    model.b_dec[...] = jnp.asarray(RNG.normal(size=model.d_out) * 0.1, jnp.float32)
    return model


def pre(model, x=X):
    return np.asarray((x - model.b_dec[...]) @ model.encoder() + model.b_enc[...])


def topk_rows(z, k):
    """Stable: ties to the lower position; then a ReLU."""
    f = np.zeros_like(z)
    for b, row in enumerate(z):
        for i in sorted(range(len(row)), key=lambda i: (-row[i], i))[:k]:
            f[b, i] = max(row[i], 0.0)
    return f


def test_indices_are_exact_with_ties_nan_and_zeros_of_both_signs():
    z = jnp.array([[1.0, 1.0, 1.0, 1.0], [-0.0, 0.0, -1.0, jnp.nan], [jnp.nan] * 4])
    indices, chosen = topk_indices(z, 2)
    assert indices[:2].tolist() == [[0, 1], [0, 1]]
    assert chosen.tolist() == [[True, True], [True, True], [False, False]]
    with pytest.raises(ValueError, match="k=5: give an integer from 1 to 4"):
        topk_indices(z, 5)


@pytest.mark.parametrize("sparse", [True, False])
def test_topk_loss_and_code_are_those_of_loops(sparse):
    model = make(sae.TopK, k=K, sparse=sparse)
    f = topk_rows(pre(model), K)
    np.testing.assert_allclose(model.encode(X), f, rtol=1e-5, atol=1e-6)
    guess = f @ np.asarray(model.W_dec[...]) + np.asarray(model.b_dec[...])
    loss, metrics = model.loss(X)
    np.testing.assert_allclose(loss, np.mean(np.sum((X - guess) ** 2, -1)), rtol=1e-5)
    np.testing.assert_allclose(metrics["l0"], (f > 0).sum(-1).mean())
    assert model.since_fired[...].tolist() == np.where((f > 0).any(0), 0, B).tolist()


def test_sparse_and_dense_decoding_have_the_same_gradients():
    gradients = []
    for sparse in (True, False):
        model = make(sae.TopK, k=K, sparse=sparse, dead_after=B)
        model.W_dec[...] = jax.random.normal(jax.random.key(2), (F, D))
        model.b_enc[...] = model.b_enc[...].at[:8].add(-50.0)  # dead, for AuxK
        model.b_dec[...] = jnp.full(D, 0.1)
        model.b_enc[...] = jnp.round(model.b_enc[...], 1).at[8:].set(0.05)
        model.since_fired[...] = jnp.full(F, B)
        gradients.append(nnx.grad(lambda m: m.loss(X)[0])(model))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), *gradients)


def test_gradients_flow_through_selected_entries_only():
    model = make(sae.TopK, k=1)
    z = jnp.asarray(pre(model))
    chosen = np.asarray(model.activate(z)) > 0
    slope = jax.grad(lambda z: jnp.sum(model.activate(z)))(z)
    assert (np.asarray(slope) == chosen).all()
    assert (np.asarray(make(sae.TopK, k=F).activate(z)) == np.maximum(z, 0)).all()


def test_aux_k_is_zero_without_candidates_and_for_a_perfect_model():
    z = jnp.abs(jnp.asarray(RNG.normal(size=(B, F)), jnp.float32))
    atoms = jnp.asarray(RNG.normal(size=(F, D)), jnp.float32)
    candidates = jnp.arange(F) >= F - 2
    perfect = z[:, -2:] @ atoms[-2:]
    assert float(sae.aux_k(z, jnp.zeros(F, bool), 4, atoms, X, X)) == 0.0
    np.testing.assert_allclose(sae.aux_k(z, candidates, 4, atoms, perfect, X), 0.0, atol=1e-8)
    silent = sae.aux_k(-z, candidates, 4, atoms, X, X)  # no positive candidate: nothing is modelled
    np.testing.assert_allclose(silent, np.mean(np.sum(X**2, -1)), rtol=1e-5)
    slope = jax.grad(lambda z: sae.aux_k(z, candidates, 4, atoms, X, X))(z)
    assert (np.asarray(slope)[:, :-2] == 0).all() and (np.asarray(slope)[:, -2:] != 0).any()


def test_counters_are_zero_where_a_latent_fired_and_stop_at_the_largest_integer():
    model = make(sae.ReLU)
    model.count(jnp.arange(F) == 3, 7)
    assert model.since_fired[...].tolist() == [0 if i == 3 else 7 for i in range(F)]
    model.since_fired[...] = jnp.full(F, 2**31 - 2)
    model.count(jnp.zeros(F, bool), 7)
    assert (model.since_fired[...] == 2**31 - 1).all()


def rescaled(model, c):
    """Encoder, biases and thresholds by c, atoms by 1/c."""
    other = nnx.clone(model)
    for name in {"b_enc", "threshold", "b_mag"} & set(vars(other)):
        getattr(other, name)[...] = getattr(other, name)[...] * c
    other.W_enc[...] = other.W_enc[...] * c
    other.W_dec[...] = other.W_dec[...] / c[:, None]
    return other


def test_scale_freedom_holds_for_relu_jump_and_gated_and_not_for_topk():
    c = jnp.asarray(np.exp(RNG.normal(size=F)), jnp.float32)
    for kind in (sae.ReLU, sae.JumpReLU, sae.Gated):
        model = make(kind)
        np.testing.assert_allclose(rescaled(model, c)(X), model(X), atol=1e-5)
    april = make(sae.ReLU, variant="april")
    np.testing.assert_allclose(rescaled(april, c).loss(X)[0], april.loss(X)[0], rtol=1e-5)
    classic = make(sae.ReLU)
    assert abs(rescaled(classic, c).loss(X)[0] - classic.loss(X)[0]) > 1e-3
    topk, ranked = make(sae.TopK, k=K), make(sae.TopK, k=K, by_norm=True)
    assert np.abs(rescaled(topk, c)(X) - topk(X)).max() > 1e-2
    np.testing.assert_allclose(rescaled(ranked, c)(X), ranked(X), atol=1e-5)


def kinds():
    return [
        make(sae.ReLU),
        make(sae.TopK, k=K),
        make(sae.JumpReLU, threshold=0.2),
        make(sae.Gated),
        make(sae.KSparse, k=K),
        make(sae.MatryoshkaTopK, ks=(2, 5)),
        make(sae.BatchTopK, k=K, threshold_from=0),
        make(sae.FeatureChoice, k=K, threshold_from=0),
        make(sae.GradientTopK, k=K, beta=0.5),
        make(sae.TopK, k=K, d_out=4, skip=True),
    ]


def test_folding_the_scale_of_inputs_leaves_reconstructions_as_they_are():
    for model in kinds():
        if isinstance(model, sae.BatchTopK):
            model.loss(4.0 * X)  # a threshold
        if model.W_skip is not None:
            model.W_skip[...] = jnp.ones_like(model.W_skip[...])
            folded = model.fold_scale(4.0, 3.0)
            np.testing.assert_allclose(folded(X), model(4.0 * X) / 3.0, atol=1e-5)
        else:
            folded = model.fold_scale(4.0)
            np.testing.assert_allclose(folded(X), model(4.0 * X) / 4.0, atol=1e-5)
    with pytest.raises(ValueError, match="scale=0"):
        make(sae.ReLU).fold_scale(0.0)
    scale = sae.input_scale(X)
    np.testing.assert_allclose(np.mean(np.linalg.norm(scale * X, axis=1)), D**0.5, rtol=1e-5)


@pytest.mark.parametrize(
    "inner",
    [
        optax.adam(1e-2),
        optax.lion(1e-2),
        optax.contrib.muon(1e-2),
        optax.adamw(1e-2, weight_decay=0.5),
    ],
    ids=["adam", "lion", "muon", "adamw"],
)
def test_atoms_have_norm_one_after_every_update(inner):
    model = make(sae.ReLU)  # starts at norm 0.1
    params, rest = nnx.split(model, nnx.Param, ...)[1:]
    tx = sae.unit_norm_decoder(inner)
    state = tx.init(params)
    gradient = jax.tree.map(lambda p: jnp.cos(jnp.arange(p.size)).reshape(p.shape), params)

    @jax.jit
    def move(params, state):
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(3):
        params, state = move(params, state)
        norms = np.linalg.norm(np.asarray(params["W_dec"][...], np.float64), axis=1)
        np.testing.assert_allclose(norms, 1.0, atol=1e-6)


def test_the_wrapper_names_what_is_wrong():
    tx = sae.unit_norm_decoder(optax.sgd(0.1))
    with pytest.raises(ValueError, match="name='W_dec': no leaf"):
        tx.init({"kernel": jnp.ones((2, 2))})
    with pytest.raises(ValueError, match="params=None"):
        tx.update({"W_dec": jnp.ones((2, 2))}, tx.init({"W_dec": jnp.ones((2, 2))}))


def test_the_threshold_gradient_of_the_step_is_a_density():
    """E[d L0 / d theta] = -p(theta), by the closed form of the kernel's mean."""
    z = jnp.asarray(np.random.default_rng(1).normal(size=(200_000, 1)), jnp.float32)
    theta = jnp.array([0.7])
    slope = jax.grad(lambda t: jnp.mean(sae.step(z, t, 0.2)))(theta)
    np.testing.assert_allclose(slope, -np.exp(-0.245) / np.sqrt(2 * np.pi), atol=0.01)
    value, pull = jax.vjp(lambda z, t: sae.jump_relu(z, t, 0.2), z[:5], theta)
    assert (value == jnp.where(z[:5] > 0.7, z[:5], 0)).all()
    assert pull(jnp.ones((5, 1)))[1].shape == (1,)
    far = jax.grad(lambda t: jnp.sum(sae.jump_relu(jnp.array([[5.0]]), t, 0.2)))(theta)
    assert float(far[0]) == 0.0
    near = jax.grad(lambda t: jnp.sum(sae.jump_relu(jnp.array([[0.75]]), t, 0.2)))(theta)
    np.testing.assert_allclose(near, [-0.7 / 0.2], rtol=1e-6)


def test_the_straight_through_gradient_of_inputs_is_that_of_thresholds_turned_round():
    z, theta = X[:, :4], jnp.array([0.1, 0.4, 0.7, 1.0])
    g = jnp.asarray(RNG.normal(size=z.shape), jnp.float32)
    for function, plain in ((sae.step, 0.0), (sae.jump_relu, g * (z > theta))):
        of = lambda inputs, f=function: lambda z, t: f(z, t, 0.6, inputs)
        _, pull = jax.vjp(of(True), z, theta)
        dz, dt = pull(g)
        np.testing.assert_allclose(jnp.sum(dz - plain, 0), -dt, rtol=1e-5, atol=1e-6)
        assert (np.abs(dt) > 0).any()
        _, pull = jax.vjp(of(False), z, theta)
        np.testing.assert_allclose(pull(g)[0], plain * jnp.ones_like(z))
        np.testing.assert_allclose(pull(g)[1], dt)


@pytest.mark.parametrize("way, reached", [("all", True), ("threshold", False)])
def test_the_penalty_alone_reaches_its_target_through_all_that_precedes_the_thresholds(
    way, reached
):
    model = sae.JumpReLU(D, 64, l0=30.0, target_l0=4.0, straight_through=way, rngs=nnx.Rngs(0))
    x = jnp.asarray(np.random.default_rng(1).normal(size=(256, D)), jnp.float32)
    tx = optax.adam(5e-3)
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params):
        value, metrics = nnx.merge(graph, params, rest, copy=True).loss(x)
        return value, metrics["l0"]

    def one(carry, _):
        params, slots = carry
        (_, l0), slope = jax.value_and_grad(loss, has_aux=True)(params)
        updates, slots = tx.update(slope, slots)
        return (optax.apply_updates(params, updates), slots), l0

    l0 = jax.jit(lambda p: jax.lax.scan(one, (p, tx.init(p)), length=150)[1])(params)
    assert l0[0] > 20 and (l0[-1] < 6) == reached, l0


def test_a_threshold_below_zero_counts_as_zero_and_still_moves():
    model = make(sae.JumpReLU, l0=1.0, bandwidth=0.5)
    model.threshold[...] = jnp.full(F, -0.3)
    np.testing.assert_array_equal(model.encode(X), np.maximum(pre(model), 0))
    slopes = nnx.grad(lambda m: m.loss(X)[0])(model)["threshold"][...]
    assert (np.asarray(slopes) < 0).any()  # a descent step raises it


def test_gated_is_a_jump_relu_and_its_auxiliary_loss_leaves_the_decoder_alone():
    model = make(sae.Gated, l1=0.0)
    model.r[...] = jnp.asarray(RNG.normal(size=F) * 0.2, jnp.float32)
    model.b_mag[...] = jnp.abs(model.b_enc[...]) + 0.2
    theta = np.asarray(model.jump_thresholds())
    assert (theta >= 0).all()
    e = pre(model) - np.asarray(model.b_enc[...])
    size = np.exp(np.asarray(model.r[...])) * e + np.asarray(model.b_mag[...])
    np.testing.assert_allclose(model.encode(X), np.where(size > theta, size, 0), atol=1e-5)
    model.b_enc[...] = jnp.full(F, -1e3).at[0].set(5.0)  # one latent is on
    with_target = nnx.grad(lambda m: m.loss(X)[1]["auxiliary"])(model)
    assert float(jnp.abs(with_target["W_dec"][...]).max()) == 0.0
    assert float(jnp.abs(with_target["b_dec"][...]).max()) > 0.0  # through the encoder's input only


def test_k_sparse_is_linear_tied_and_its_schedule_ends_half_way():
    model = make(sae.KSparse, k=K, alpha=2)
    assert "W_enc" not in nnx.state(model, nnx.Param)
    z = pre(model)
    order = np.argsort(-z, axis=1, kind="stable")
    f = np.zeros_like(z)
    np.put_along_axis(f, order[:, :K], np.take_along_axis(z, order[:, :K], 1), 1)
    np.testing.assert_allclose(model.activate(jnp.asarray(z)), f)
    assert ((np.asarray(model.encode(X)) != 0).sum(1) == 2 * K).all()
    schedule = sae.k_schedule(10, 3, 20)
    assert [int(schedule(s)) for s in (0, 9, 10, 19)] == [10, 4, 3, 3]
    assert float(model.loss(X, k=jnp.asarray(5))[1]["l0"]) == 5.0


def test_k_sparse_finds_the_support_of_an_incoherent_dictionary():
    rng = np.random.default_rng(3)
    atoms = rng.normal(size=(60, 2000))
    atoms /= np.linalg.norm(atoms, axis=1, keepdims=True)
    model = sae.KSparse(2000, 60, k=3, rngs=nnx.Rngs(0))
    model.W_dec[...] = jnp.asarray(atoms, jnp.float32)
    for _ in range(4):
        places = rng.choice(60, 3, replace=False)
        code = model.encode(jnp.asarray(rng.uniform(0.6, 1, 3) @ atoms[places], jnp.float32)[None])
        assert set(np.flatnonzero(code[0])) == set(places)


def test_batch_topk_keeps_its_budget_whatever_the_order_of_tokens():
    model = make(sae.BatchTopK, k=K, threshold_from=0, threshold_decay=0.5)
    z = jnp.abs(jnp.asarray(RNG.normal(size=(B, F)), jnp.float32))
    f = np.asarray(model.activate(z))
    kept = np.sort(np.asarray(z).ravel())[-K * B :]
    assert (f > 0).sum() == K * B and f[f > 0].min() == kept[0]
    turned = np.asarray(model.activate(z[::-1]))
    np.testing.assert_array_equal(turned[::-1], f)
    model.track(jnp.asarray(f))
    np.testing.assert_allclose(model.threshold[...], kept[0])
    model.track(jnp.asarray(2 * f))
    np.testing.assert_allclose(model.threshold[...], 1.5 * kept[0], rtol=1e-6)
    jump = model.to_jump_relu()
    np.testing.assert_allclose(jump(X), model(X), atol=1e-6)
    with pytest.raises(ValueError, match="threshold_from=1000"):
        make(sae.BatchTopK, k=K).to_jump_relu()


def test_feature_choice_gives_every_latent_its_budget():
    model = make(sae.FeatureChoice, k=4, exponent=1.0)
    z = jnp.abs(jnp.asarray(RNG.normal(size=(60, F)), jnp.float32))
    budgets = model.budgets(60)
    f = np.asarray(model.activate(z))
    assert (f > 0).sum(0).tolist() == budgets.tolist() and budgets.min() >= 1
    for i in range(F):
        assert f[:, i][f[:, i] > 0].min() >= np.sort(np.asarray(z)[:, i])[-budgets[i]]
    total = lambda f: float(np.sum(np.asarray(f)))
    mutual = make(sae.BatchTopK, k=4).activate(z)
    token = make(sae.TopK, k=4).activate(z)
    assert total(mutual) >= max(total(token), total(f))
    assert sae.zipf_budgets(64, 768, exponent=0.0).tolist() == [12] * 64
    starved = sae.zipf_budgets(64, 30)
    assert starved.sum() == 30 and starved.min() == 0


def test_matryoshka_codes_are_nested_and_one_level_is_relu():
    model = make(sae.MatryoshkaTopK, ks=(2, 5), weights="reverse")
    codes = [np.asarray(f) for f in model.codes(jnp.asarray(pre(model)))]
    for small, large in zip(codes, codes[1:]):
        assert ((small != 0) <= (large != 0)).all()
    np.testing.assert_allclose(codes[0], topk_rows(pre(model), 2), atol=1e-6)
    guess = lambda f: f @ np.asarray(model.W_dec[...]) + np.asarray(model.b_dec[...])
    losses = [np.mean(np.sum((X - guess(f)) ** 2, -1)) for f in codes]
    np.testing.assert_allclose(model.loss(X)[0], np.dot([3, 2, 1], losses) / 6, rtol=1e-5)
    relu, one = make(sae.ReLU, l1=0.0), make(sae.MatryoshkaTopK, ks=(F,))
    for name in ("W_enc", "W_dec", "b_enc", "b_dec"):
        getattr(one, name)[...] = getattr(relu, name)[...]
    np.testing.assert_allclose(one.loss(X)[0], relu.loss(X)[0], rtol=1e-6)


def test_prefix_matryoshka_with_one_group_is_batch_topk_and_groups_add_up():
    one, plain = make(sae.MatryoshkaBatchTopK, k=K, groups=(F,)), make(sae.BatchTopK, k=K)
    for name in ("b_enc", "b_dec"):
        getattr(one, name)[...] = getattr(plain, name)[...]
    np.testing.assert_allclose(one.loss(X)[0], plain.loss(X)[0], rtol=1e-5)
    two = make(sae.MatryoshkaBatchTopK, k=K, groups=(8, 12), weights=(3.0, 1.0))
    f = np.asarray(two.activate(jnp.asarray(pre(two))))
    atoms, bias = np.asarray(two.W_dec[...]), np.asarray(two.b_dec[...])
    part = lambda n: np.mean(np.sum((X - f[:, :n] @ atoms[:n] - bias) ** 2, -1))
    np.testing.assert_allclose(two.loss(X)[0], 0.75 * part(8) + 0.25 * part(F), rtol=1e-5)


def test_gradient_topk_keeps_a_small_direction_that_the_loss_needs():
    model = make(sae.GradientTopK, k=1, beta=100.0)
    model.W_dec[...] = jnp.eye(F, D)
    z = jnp.zeros((1, F)).at[0, 0].set(1.0).at[0, 1].set(0.1)
    gradient = jnp.zeros((1, D)).at[0, 1].set(1.0)
    assert np.flatnonzero(model.select(z, gradient)).tolist() == [1]
    assert np.flatnonzero(model.activate(z)).tolist() == [0]
    model.beta = 1.0
    scaled = nnx.clone(model)
    scaled.beta = 0.25
    g = jnp.asarray(RNG.normal(size=(B, D)), jnp.float32)
    z = jnp.asarray(pre(model))
    np.testing.assert_array_equal(model.select(z, g), scaled.select(z, 4 * g))
    with pytest.raises(ValueError, match="gradient: shape None"):
        model.loss(X)


def test_transcoders_do_not_subtract_the_bias_and_the_skip_alone_is_a_linear_map():
    linear = jnp.asarray(RNG.normal(size=(D, 4)), jnp.float32)
    plain, skip = make(sae.TopK, k=K, d_out=4), make(sae.TopK, k=K, d_out=4, skip=True)
    for name in ("b_enc", "b_dec"):
        getattr(skip, name)[...] = getattr(plain, name)[...]
    np.testing.assert_allclose(skip(X), plain(X), atol=1e-6)
    moved = nnx.clone(plain)
    moved.b_dec[...] = moved.b_dec[...] + 1.0
    np.testing.assert_allclose(moved.encode(X), plain.encode(X))
    skip.W_skip[...], skip.W_dec[...] = linear, jnp.zeros((F, 4))
    skip.b_dec[...] = jnp.zeros(4)
    np.testing.assert_allclose(skip.loss(X, X @ linear)[0], 0.0, atol=1e-9)
    with pytest.raises(ValueError, match="target=None"):
        skip.loss(X)


def test_crosscoders_of_one_source_are_april_and_of_equal_models_share_everything():
    cross = sae.Crosscoder(D, F, sources=2, l1=0.3, rngs=nnx.Rngs(0))
    x = sae.Crosscoder.flat(jnp.stack([X, X[::-1]], axis=1))
    f = np.maximum(np.asarray(x @ cross.W_enc[...] + cross.b_enc[...]), 0)
    atoms = np.asarray(cross.W_dec[...])
    sizes = np.linalg.norm(atoms[:, :D], axis=1) + np.linalg.norm(atoms[:, D:], axis=1)
    expected = np.mean(np.sum((x - f @ atoms) ** 2, -1)) + 0.3 * np.mean(f @ sizes)
    np.testing.assert_allclose(cross.loss(x)[0], expected, rtol=1e-5)
    np.testing.assert_allclose(cross.shares(), 0.5, atol=1e-6)
    one = sae.Crosscoder(D, F, sources=1, l1=0.3, rngs=nnx.Rngs(0))
    april = sae.ReLU(D, F, l1=0.3, variant="april", rngs=nnx.Rngs(0))
    for name in ("W_enc", "W_dec"):
        getattr(april, name)[...] = getattr(one, name)[...]
    np.testing.assert_allclose(one.loss(X)[0], april.loss(X)[0], rtol=1e-6)


def test_resampling_changes_dead_latents_and_their_slots_alone():
    model = make(sae.ReLU, dead_after=5)
    tx = optax.adam(1e-2)
    params = nnx.state(model, nnx.Param)
    state = tx.init(params)
    _, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
    model.since_fired[...] = jnp.where(jnp.arange(F) < 4, 9, 0)
    new, anew = sae.resample(model, state, tx, X, key=jax.random.key(0))
    np.testing.assert_array_equal(new.W_dec[4:], model.W_dec[4:])
    np.testing.assert_array_equal(new.W_enc[:, 4:], model.W_enc[:, 4:])
    np.testing.assert_allclose(np.linalg.norm(new.W_dec[:4], axis=1), 1.0, rtol=1e-5)
    alive = np.linalg.norm(model.W_enc[:, 4:], axis=0).mean()
    np.testing.assert_allclose(np.linalg.norm(new.W_enc[:, :4], axis=0), 0.2 * alive, rtol=1e-5)
    mu, before = anew[0].mu, state[0].mu
    assert (mu["W_dec"][:4] == 0).all() and (mu["W_dec"][4:] == before["W_dec"][4:]).all()
    assert (mu["W_enc"][:, :4] == 0).all() and (mu["b_enc"][4:] != 0).all()
    assert (mu["b_dec"][...] == before["b_dec"][...]).all()
    assert not new.dead.any()


def test_a_relu_autoencoder_shrinks_as_its_closed_form_says():
    """min ||x - f||^2 + lambda |f| over f >= 0 with orthonormal atoms: f = relu(x - lambda / 2)."""
    x, l1 = jnp.array([[1.0, 0.3, 0.1, -0.5]]), 0.4
    cost = lambda f: jnp.sum((x - f) ** 2) + l1 * jnp.sum(f)
    f = jnp.ones((1, 4))
    for _ in range(60):
        f = jnp.maximum(f - 0.25 * jax.grad(cost)(f), 0)
    np.testing.assert_allclose(f, [[0.8, 0.1, 0.0, 0.0]], atol=1e-6)


def test_the_geometric_median_ignores_an_outlier():
    x = np.concatenate([RNG.normal(size=(30, 2)), [[1e4, 1e4]]])
    m = np.asarray(sae.geometric_median(jnp.asarray(x, jnp.float32)), np.float64)
    cost = lambda p: np.linalg.norm(x - p, axis=1).sum()
    for step in ([0.05, 0], [-0.05, 0], [0, 0.05], [0, -0.05]):
        assert cost(m) < cost(m + step)


def test_modules_work_in_linen():
    class Model(linen.Module):
        @linen.compact
        def __call__(self, x):
            arguments = {"d_model": D, "d_sae": F, "k": K}
            return nnx.bridge.ToLinen(sae.TopK, kwargs=arguments, name="sae")(x)

    variables = Model().init(jax.random.key(0), X)
    assert Model().apply(variables, X).shape == X.shape
    assert variables["params"]["sae"]["W_dec"].shape == (F, D)


def test_arguments_that_cannot_be_are_named():
    for kind, options, message in [
        (sae.TopK, {"k": F + 1}, f"k={F + 1}: give an integer from 1 to d_sae={F}"),
        (sae.ReLU, {"variant": "may"}, "variant='may'"),
        (sae.ReLU, {"skip": True}, "skip=True"),
        (sae.MatryoshkaTopK, {"ks": (5, 2)}, "ks="),
        (sae.MatryoshkaBatchTopK, {"k": 2, "groups": (3, 3)}, "groups="),
        (sae.JumpReLU, {"bandwidth": 0.0}, "bandwidth=0"),
        (sae.JumpReLU, {"straight_through": "z"}, "straight_through='z': give"),
    ]:
        with pytest.raises(ValueError, match=message):
            kind(D, F, rngs=nnx.Rngs(0), **options)
    with pytest.raises(ValueError, match="x: shape"):
        make(sae.ReLU).loss(X[:, :3])
