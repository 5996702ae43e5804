"""The study of when sparse codes are found."""

import jax
import numpy as np
import pytest

from experiments.studies import phase_transition as study


def test_the_threshold_is_the_published_one():
    # Donoho and Tanner's weak threshold: at delta = 0.5 rho is about 0.386, at 0.1 about 0.189.
    shares = np.linspace(0.001, 0.6, 2000)
    delta = np.array([study.threshold(s) for s in shares])
    rho = lambda d: float(np.interp(d, delta, shares / delta))
    assert rho(0.5) == pytest.approx(0.386, abs=0.005)
    assert rho(0.1) == pytest.approx(0.189, abs=0.005)
    assert study.threshold(0.0) < 1e-3 and study.threshold(1.0) == pytest.approx(1.0)


def test_easy_codes_are_found_and_hopeless_ones_are_not(tmp_path):
    with jax.enable_x64(True):
        run = lambda k: study.successes(jax.random.key(0), rows=12, columns=20, k=k, trials=3)
        assert (np.asarray(run(1)) == 1).all()
        assert (np.asarray(run(11)) < 1).all()
    result = dict(delta=[0.3, 0.6], rho=[0.2, 0.8])
    study.plot(
        result | dict(found=dict.fromkeys(study.SOLVERS, [[1.0, 0.0]] * 2)), tmp_path / "a.png"
    )
    assert (tmp_path / "a.png").stat().st_size > 1000
