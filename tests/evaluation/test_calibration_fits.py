"""Fitted calibrations: they find what was planted, equal scikit-learn, survive JSON, and know when they know little."""

import json

import numpy as np
import pytest
import torch
from scipy.special import expit, logit, softmax
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression

from solarchip_hf.evaluation import ValidationScore, choose_thresholds, fit_calibration
from solarchip_hf.evaluation.flare_skill.skill_scores import exceedance, table_scores
from solarchip_hf.models.calibration import METHODS, calibrated_probabilities, check_calibration


@pytest.fixture(scope="module")
def sample() -> tuple[np.ndarray, np.ndarray]:
    """3000 logits whose true probabilities are those of the logits divided by 2.5."""
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 3, (3000, 4)) + np.array([1.0, 1.5, 0.0, -2.0])
    probabilities = softmax(logits / 2.5, axis=1)
    labels = (rng.random((3000, 1)) > np.cumsum(probabilities, axis=1)).sum(axis=1)
    return logits, labels


def probabilities_of(logits, calibration) -> np.ndarray:
    return calibrated_probabilities(torch.from_numpy(logits), calibration).double().numpy()


def test_temperature_finds_the_planted_one(sample):
    assert fit_calibration(*sample, "temperature")["temperature"] == pytest.approx(2.5, rel=0.05)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_mends_overconfidence_on_unseen_data(sample, method):
    logits, labels = sample
    calibration = json.loads(json.dumps(fit_calibration(logits[:2000], labels[:2000], method, fitted_on="a part")))
    check_calibration(calibration, 4)
    assert (calibration["fitted_on"], calibration["samples"]) == ("a part", 2000)
    observed = labels[2000:, None] >= np.arange(1, 4)
    raw, mended = (exceedance(probabilities_of(logits[2000:], c)) for c in (None, calibration))
    brier = ((raw - observed) ** 2).mean(axis=0), ((mended - observed) ** 2).mean(axis=0)
    assert (brier[1] < brier[0] - 0.01).sum() >= 2
    assert (brier[1] < brier[0]).all()
    assert abs(mended.mean(axis=0) - observed.mean(axis=0)).max() < 0.03


def test_platt_equals_logistic_regression(sample):
    logits, labels = sample
    found = fit_calibration(logits, labels, "platt")
    above = exceedance(softmax(logits, axis=1))
    for k in range(3):
        # Platt's smoothed targets differ from 0 and 1 by less than 1/400 here
        reference = LogisticRegression(C=1e8).fit(logit(above[:, k])[:, None], labels > k)
        assert found["slope"][k] == pytest.approx(reference.coef_[0, 0], rel=0.03)
        assert found["intercept"][k] == pytest.approx(reference.intercept_[0], abs=0.05)


def test_isotonic_equals_scikit_learn_between_the_knots_too(sample):
    logits, labels = sample
    found = fit_calibration(logits, labels, "isotonic")
    above = exceedance(softmax(logits, axis=1))
    reference = np.stack(
        [
            IsotonicRegression(y_min=1 / 3002, y_max=3001 / 3002, out_of_bounds="clip")
            .fit(above[:, k], labels > k)
            .predict(above[:, k])
            for k in range(3)
        ],
        axis=1,
    )
    ours = exceedance(probabilities_of(logits, found))
    error = np.abs(ours - np.minimum.accumulate(reference, axis=1))
    assert (error < 2e-3).mean() > 0.999  # on a step of the curve float32 may fall to the other side
    assert error.max() < 0.03


def test_platt_undoes_a_shift_of_the_class_balance(sample):
    logits, labels = sample
    shifted = logits / 2.5 + np.log([0.2, 0.5, 3.0, 20.0])  # as class weights do
    mended = exceedance(probabilities_of(shifted, fit_calibration(shifted, labels, "platt")))
    kept = exceedance(probabilities_of(shifted, fit_calibration(shifted, labels, "temperature")))
    rates = (labels[:, None] >= np.arange(1, 4)).mean(axis=0)
    assert abs(mended.mean(axis=0) - rates).max() < 0.01
    assert abs(kept.mean(axis=0) - rates).max() > 0.1


@pytest.mark.parametrize("method", METHODS)
def test_a_boundary_without_events_gets_a_small_finite_probability_and_no_threshold(sample, method):
    logits, labels = sample[0][:200], np.minimum(sample[1][:200], 2)
    calibration = fit_calibration(logits, labels, method)
    assert set(calibration["thresholds"]) == {"c_plus", "m_plus"}
    probabilities = probabilities_of(logits, calibration)
    assert np.isfinite(probabilities).all()
    if method != "temperature":
        assert 0 < probabilities[:, 3].mean() < 0.02
    if method == "platt":
        assert calibration["slope"][2] == 1.0


def test_a_useless_network_is_given_no_slope():
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 4, 400)
    logits = -2.0 * np.eye(4)[labels] + rng.normal(0, 0.3, (400, 4))  # wrong on purpose
    calibration = fit_calibration(logits, labels, "platt")
    assert calibration["slope"][1] == 0
    assert exceedance(probabilities_of(logits, calibration))[:, 1].std() < 1e-6


def test_thresholds_have_the_largest_tss(sample):
    logits, labels = sample
    probabilities = softmax(logits, axis=1)
    found = choose_thresholds(probabilities, labels)
    above = exceedance(probabilities)

    def tss(k, threshold):
        warned, observed = above[:, k] >= threshold, labels > k
        counts = [(warned & observed).sum(), (warned & ~observed).sum()]
        return table_scores(*counts, (~warned & observed).sum(), (~warned & ~observed).sum())["tss"]

    for k, name in enumerate(("c_plus", "m_plus", "x_plus")):
        assert tss(k, found[name]) == pytest.approx(max(tss(k, t) for t in above[:, k]), abs=1e-9)
        assert tss(k, found[name]) > 0.1


def test_validation_score_judges_what_calibration_will_deliver(sample):
    logits, labels = sample
    score = ValidationScore(labels, "M+")
    plain, shifted = score(logits, labels), score(logits + np.log([0.2, 0.5, 3.0, 20.0]), labels)
    assert plain["bss"] > 0.2
    assert shifted["bss"] == pytest.approx(plain["bss"], abs=0.05)
    assert shifted["auc"] > 0.7
    above = exceedance(softmax(logits, axis=1))[:, 1]
    fit = LogisticRegression(C=1e8).fit(logit(above)[:, None], labels > 1)
    probability = expit(fit.decision_function(logit(above)[:, None]))
    base = (labels > 1).mean()
    reference = 1 - ((probability - (labels > 1)) ** 2).mean() / ((base - (labels > 1)) ** 2).mean()
    assert plain["bss"] == pytest.approx(reference, abs=2e-3)


def test_validation_score_without_events_is_undefined_where_it_must_be():
    score = ValidationScore([0, 1, 2, 3, -1], "M+")
    assert score.climatology == 0.5
    scores = score(np.random.default_rng(0).normal(size=(10, 4)), np.zeros(10, dtype=int))
    assert np.isnan(scores["tss"])
    assert np.isnan(scores["auc"])
    assert np.isfinite(scores["bss"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "beta"}, "temperature, platt, isotonic"),
        ({"labels": np.full(3000, -1)}, "labels in 0..3"),
        ({"labels": np.zeros(10, dtype=int)}, "logits"),
        ({"logits": np.full((3000, 4), np.nan)}, "finite logits"),
    ],
)
def test_bad_input_is_refused(sample, change, message):
    arguments = {"logits": sample[0], "labels": sample[1], "method": "platt", **change}
    with pytest.raises(ValueError, match=message):
        fit_calibration(**arguments)


def test_an_unknown_boundary_is_refused():
    with pytest.raises(ValueError, match="C\\+, M\\+, X\\+"):
        ValidationScore([0, 1], "B+")
    with pytest.raises(ValueError, match="at least one known label"):
        ValidationScore([-1, -1])
