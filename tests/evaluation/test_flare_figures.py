"""Figures are drawn, saved, and show the numbers they should."""

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from sklearn import metrics

from solarchip_hf.evaluation.figures import reliability_figure, roc_curve, roc_figure
from solarchip_hf.evaluation.reliability import reliability_curve


@pytest.fixture(scope="module")
def forecast():
    rng = np.random.default_rng(0)
    probabilities = np.round(rng.beta(0.6, 2.0, size=600), 2)
    return probabilities, rng.random(600) < probabilities


def test_reliability_figure(forecast, tmp_path):
    times = pd.date_range("2011-01-01", periods=600, freq="D")
    curves = {
        "with intervals": reliability_curve(*forecast, times=times, num_resamples=40),
        "without": reliability_curve(forecast[0] ** 2, forecast[1]),
    }
    figure = reliability_figure(curves, tmp_path / "figures" / "reliability.png", title="synthetic")
    assert {text.get_text() for text in figure.axes[0].get_legend().get_texts()} >= set(curves)
    with Image.open(tmp_path / "figures" / "reliability.png") as image:
        assert np.asarray(image.convert("L")).std() > 10
    with pytest.raises(ValueError, match="at least one"):
        reliability_figure({})


def test_roc_curve_equals_scikit_learn(forecast):
    pofd, pod = roc_curve(*forecast)
    expected_pofd, expected_pod, _ = metrics.roc_curve(forecast[1], forecast[0], drop_intermediate=False)
    np.testing.assert_allclose(pofd, expected_pofd)
    np.testing.assert_allclose(pod, expected_pod)


def test_roc_figure(forecast, tmp_path):
    probabilities, observed = forecast
    forecasts = {"model": probabilities, "noise": np.random.default_rng(1).random(600)}
    figure = roc_figure(forecasts, observed, tmp_path / "roc.png", thresholds={"model": 0.3})
    marks = [line for line in figure.axes[0].lines if line.get_marker() == "o"]
    assert len(marks) == 1
    assert marks[0].get_ydata()[0] == pytest.approx((probabilities[observed] >= 0.3).mean())
    assert (tmp_path / "roc.png").stat().st_size > 5000
    with pytest.raises(ValueError, match="non-events"):
        roc_figure(forecasts, np.ones(600, dtype=bool))
