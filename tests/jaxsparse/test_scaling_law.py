"""The scaling law of sparse models, on the 48 published T5 losses (Frantar et al., 2024)."""

import numpy as np
import pytest

from jaxsparse.analysis.scaling_law import T5, fit, objective, optimal_sparsity, pruning_cost

SPARSITIES = [0.0, 0.5, 0.75, 0.875]
NONZEROS = [1.3271, 5.3084, 21.2337, 84.9347]  # millions
STEPS = [2.5, 5.0, 10.0]  # 10^5
LOSSES = np.array([
    [[3.1256, 2.8417, 2.7468, 2.6938], [2.5545, 2.3919, 2.3210, 2.2855],
     [2.1760, 2.0477, 1.9879, 1.9726], [1.8828, 1.8178, 1.7683, 1.7610]],
    [[3.0798, 2.7804, 2.7035, 2.6491], [2.4999, 2.3246, 2.2691, 2.2343],
     [2.1030, 1.9841, 1.9227, 1.9033], [1.7999, 1.7230, 1.6853, 1.6745]],
    [[3.0334, 2.7383, 2.6680, 2.6270], [2.4508, 2.2850, 2.2256, 2.1988],
     [2.0540, 1.9240, 1.8660, 1.8510], [1.7401, 1.6539, 1.6110, 1.6030]],
])  # fmt: skip


def table():
    d, n, s = np.meshgrid(STEPS, NONZEROS, SPARSITIES, indexing="ij")
    return s.ravel(), n.ravel(), d.ravel(), LOSSES.ravel()


def test_the_published_coefficients_have_the_published_errors():
    s, n, d, y = table()
    value, _ = objective(T5, s, n, d, y)
    assert value == pytest.approx(7.6036e-6, abs=1e-9)
    error = np.abs(np.log(T5(s, n, d)) - np.log(y))
    assert error.max() == pytest.approx(0.0268, abs=5e-5)
    assert error.mean() == pytest.approx(0.0081, abs=5e-5)
    assert float(T5(0.75, 48 * 12 * 1024**2 / 1e6, 5)) == pytest.approx(1.46830, abs=5e-6)


def test_the_fit_is_as_good_as_the_published_one():
    result = fit(*table())
    assert result.loss <= 7.7e-6
    assert result.loss == result.starts[0] and (np.diff(result.starts) >= 0).all()
    value, _ = objective(result.law, *table())
    assert value == pytest.approx(result.loss)


def test_a_fit_of_a_law_predicts_that_law():
    s, n, d, _ = table()
    result = fit(s, n, d, T5(s, n, d), starts=12)
    np.testing.assert_allclose(result.law(0.75, 600.0, 5.0), T5(0.75, 600.0, 5.0), rtol=2e-3)


@pytest.mark.parametrize("log", [True, False])
def test_the_gradient_is_that_of_finite_differences(log):
    s, n, d, y = table()
    x = np.array(T5) * 1.01
    _, gradient = objective(x, s, n, d, y, delta=0.01, log=log)
    for i in range(7):
        h = 1e-6 * np.eye(7)[i]
        up, down = (objective(x + sign * h, s, n, d, y, delta=0.01, log=log)[0] for sign in (1, -1))
        assert gradient[i] == pytest.approx((up - down) / 2e-6, rel=1e-4, abs=1e-9)


def test_sparsity_helps_at_a_fixed_number_of_nonzeros_with_diminishing_returns():
    losses = T5(np.linspace(0, 0.95, 20), 20.0, 5.0)
    assert (np.diff(losses) < 0).all()
    # per halving of the density
    halved = T5(1 - 0.5 ** np.arange(6), 20.0, 5.0)
    assert (np.diff(-np.diff(halved)) < 0).all()


def test_the_cost_of_gradual_pruning_is_the_mean_density():
    t = (np.arange(200_000) + 0.5) / 200_000
    progress = np.clip((t - 0.25) / 0.5, 0, 1)
    for s in (0.0, 0.5, 0.875):
        density = 1 - s * (1 - (1 - progress) ** 3)
        assert pruning_cost(s) == pytest.approx(density.mean(), abs=1e-6)


def test_the_optimal_sparsity_grows_with_the_compute_and_is_a_minimum():
    found = [optimal_sparsity(T5, 20.0, c) for c in (1e-3, 1.0, 100.0, 1000.0)]
    assert found[0] == 0.0 and found == sorted(found) and found[-1] > 0.5
    best, c, n = found[2], 100.0, 20.0
    loss = lambda s: float(T5(s, n, c * (1 - s) / (n * pruning_cost(s))))
    assert loss(best) <= min(loss(best - 0.02), loss(best + 0.02))


def test_bad_arguments_are_named():
    s, n, d, y = table()
    with pytest.raises(ValueError, match=r"must be in \[0, 1\)"):
        T5(1.0, 1.0, 1.0)
    with pytest.raises(ValueError, match="nonzeros and data must be positive"):
        T5(0.5, 0.0, 1.0)
    with pytest.raises(ValueError, match="1-d arrays of one length"):
        fit(s[:-1], n, d, y)
    with pytest.raises(ValueError, match="6 measurements"):
        fit(s[:6], n[:6], d[:6], y[:6])
    with pytest.raises(ValueError, match="loss: must be positive"):
        fit(s, n, d, -y)
    with pytest.raises(ValueError, match="starts=0"):
        fit(s, n, d, y, starts=0)
    with pytest.raises(ValueError, match="begin=0.8"):
        pruning_cost(0.5, begin=0.8)
    with pytest.raises(ValueError, match="compute=-1"):
        optimal_sparsity(T5, 1.0, -1.0)
    with pytest.raises(ValueError, match="sparsity=1"):
        pruning_cost(1)
