"""Reliability curves: calibrated forecasts lie on the diagonal, and the parts of the Brier score add up."""

import json

import numpy as np
import pandas as pd
import pytest
from sklearn.calibration import calibration_curve

from solarchip_hf.evaluation.reliability import reliability_curve


@pytest.fixture(scope="module")
def calibrated():
    rng = np.random.default_rng(0)
    probabilities = rng.beta(0.6, 2.0, size=4000)
    return probabilities, (rng.random(4000) < probabilities).astype(int)


@pytest.mark.parametrize("strategy", ["uniform", "quantile"])
def test_equals_scikit_learn(calibrated, strategy):
    probabilities, observed = calibrated
    curve = reliability_curve(probabilities, observed, strategy=strategy)
    frequency, mean = calibration_curve(observed, probabilities, n_bins=10, strategy=strategy)
    filled = curve.count > 0
    np.testing.assert_allclose(curve.mean_probability[filled], mean, atol=2e-3 if strategy == "quantile" else 1e-12)
    np.testing.assert_allclose(curve.observed_frequency[filled], frequency, atol=5e-3 if strategy == "quantile" else 0)
    assert curve.count.sum() == 4000


def test_calibrated_beats_overconfident(calibrated):
    probabilities, observed = calibrated
    honest = reliability_curve(probabilities, observed)
    bold = reliability_curve(np.where(probabilities > 0.3, 0.95, 0.01), observed)
    assert honest.expected_calibration_error < 0.03 < bold.expected_calibration_error
    assert honest.reliability < 0.002 < bold.reliability


def test_murphy_parts_add_up_to_the_brier_score():
    rng = np.random.default_rng(1)
    probabilities = rng.choice([0.05, 0.25, 0.55, 0.85], size=3000)
    observed = rng.random(3000) < probabilities**1.5
    curve = reliability_curve(probabilities, observed)
    brier = np.mean((probabilities - observed) ** 2)
    assert curve.reliability - curve.resolution + curve.uncertainty == pytest.approx(brier, abs=1e-12)
    assert curve.resolution > 0.05


def test_intervals_hold_the_diagonal(calibrated):
    probabilities, observed = calibrated
    times = pd.date_range("2011-01-01", periods=4000, freq="D")
    curve = reliability_curve(probabilities, observed, num_bins=5, times=times, num_resamples=300, level=0.99)
    filled = curve.count > 50
    assert filled.sum() >= 4
    assert (curve.low[filled] <= curve.mean_probability[filled]).all()
    assert (curve.high[filled] >= curve.mean_probability[filled]).all()
    assert (curve.high - curve.low)[filled].max() < 0.25
    assert json.loads(json.dumps(curve.to_dict()))["base_rate"] == curve.base_rate


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="equal, positive length"):
        reliability_curve([], [])
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        reliability_curve([1.2, 0.1], [0, 1])
    with pytest.raises(ValueError, match="unknown windows"):
        reliability_curve([0.2, 0.1], [-1, 1])
    with pytest.raises(ValueError, match="'uniform' or 'quantile'"):
        reliability_curve([0.2, 0.1], [0, 1], strategy="even")
    assert reliability_curve([0.2, 0.2], [0, 1], strategy="quantile").count.tolist() == [2]
