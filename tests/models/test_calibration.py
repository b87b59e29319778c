"""Calibrated probabilities from logits: against plain formulas, in order, and refused where they make no sense."""

import numpy as np
import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from scipy.special import expit, softmax
from tiny_models import tiny_config

from solarchip_hf import SolarChipConfig, SolarChipForImageClassification
from solarchip_hf.models.calibration import calibrated_probabilities, check_calibration, exceedance_logits

LOGITS = torch.randn(50, 4, generator=torch.Generator().manual_seed(0)) * 3
PLATT = {"method": "platt", "slope": [0.5, 1.0, 2.0], "intercept": [0.2, -0.3, -1.0]}
ISOTONIC = {
    "method": "isotonic",
    "x": [[0.1, 0.4, 0.9], [0.2, 0.7], [0.5]],
    "y": [[0.05, 0.5, 0.6], [0.1, 0.4], [0.03]],
}


def test_none_is_softmax():
    result = calibrated_probabilities(LOGITS)
    assert result.dtype == torch.float32
    np.testing.assert_allclose(result.numpy(), softmax(LOGITS.numpy(), axis=1), atol=1e-6)


def test_temperature_divides_the_logits():
    result = calibrated_probabilities(LOGITS, {"method": "temperature", "temperature": 2.5})
    np.testing.assert_allclose(result.numpy(), softmax(LOGITS.numpy() / 2.5, axis=1), atol=1e-6)
    assert not np.allclose(result.numpy(), softmax(LOGITS.numpy(), axis=1), atol=1e-2)


def above_of(probabilities: np.ndarray) -> np.ndarray:
    return np.cumsum(probabilities[:, ::-1], axis=1)[:, ::-1][:, 1:]


def test_log_odds_of_reaching_a_class_do_not_cancel():
    above = above_of(softmax(LOGITS.double().numpy(), axis=1))
    np.testing.assert_allclose(exceedance_logits(LOGITS).numpy(), np.log(above / (1 - above)), rtol=1e-4, atol=1e-4)
    extreme = torch.tensor([[0.0, -200.0, -200.0, -200.0], [-200.0, -200.0, -200.0, 0.0]])
    odds = exceedance_logits(extreme)
    assert odds.isfinite().all()
    assert odds[0, 2] == pytest.approx(-200)
    assert odds[1, 0] == pytest.approx(200)


@pytest.mark.parametrize("calibration", [PLATT, ISOTONIC], ids=lambda calibration: calibration["method"])
def test_boundaries_are_calibrated_apart_and_stay_in_order(calibration):
    raw = above_of(softmax(LOGITS.double().numpy(), axis=1))
    if calibration["method"] == "platt":
        wanted = expit(np.log(raw / (1 - raw)) * calibration["slope"] + calibration["intercept"])
    else:
        wanted = np.stack([np.interp(raw[:, k], calibration["x"][k], calibration["y"][k]) for k in range(3)], axis=1)
    crossing = (np.diff(wanted, axis=1) > 1e-6).any()
    assert crossing  # somewhere X+ would exceed M+, or M+ would exceed C+
    result = calibrated_probabilities(LOGITS, calibration).numpy()
    np.testing.assert_allclose(above_of(result), np.minimum.accumulate(wanted, axis=1), atol=2e-5)
    assert result.min() >= 0
    np.testing.assert_allclose(result.sum(axis=1), 1, atol=1e-6)


def test_half_precision_logits_are_taken():
    result = calibrated_probabilities(LOGITS.bfloat16(), PLATT)
    assert result.dtype == torch.float32
    np.testing.assert_allclose(result, calibrated_probabilities(LOGITS, PLATT), atol=0.05)


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        ({"method": "beta"}, "temperature, platt, isotonic"),
        ({}, "temperature, platt, isotonic"),
        ({"method": "temperature"}, "calibration.temperature: expected above 0"),
        ({"method": "temperature", "temperature": -1.0}, "expected above 0"),
        ({"method": "temperature", "temperature": float("nan")}, "expected above 0"),
        ({"method": "platt", "slope": [1.0, 1.0], "intercept": [0.0, 0.0, 0.0]}, "slope: expected 3 finite"),
        ({"method": "platt", "slope": [1.0, -1.0, 1.0], "intercept": [0.0, 0.0, 0.0]}, "none below 0"),
        ({**ISOTONIC, "x": ISOTONIC["x"][:2]}, "expected 3 lists of knots"),
        ({**ISOTONIC, "x": [[0.4, 0.1, 0.9], *ISOTONIC["x"][1:]]}, "x that rises"),
        ({**ISOTONIC, "y": [[0.5, 0.05, 0.6], *ISOTONIC["y"][1:]]}, "y that never falls"),
        ({**ISOTONIC, "y": [[0.5, 0.6], *ISOTONIC["y"][1:]]}, "equally many"),
        ({**PLATT, "thresholds": {"m_plus": 1.2}}, "m_plus=1.2"),
    ],
)
def test_what_makes_no_sense_is_refused_also_by_the_configuration(calibration, message):
    with pytest.raises(ValueError, match=message):
        check_calibration(calibration, 4)
    with pytest.raises(StrictDataclassError, match=message):
        SolarChipConfig(calibration=calibration)
    with pytest.raises(ValueError, match=message):
        calibrated_probabilities(LOGITS, calibration)


def test_logits_of_another_number_of_classes_are_refused():
    with pytest.raises(ValueError, match="expected 2 finite numbers"):
        calibrated_probabilities(LOGITS[:, :3], PLATT)
    with pytest.raises(ValueError, match=r"logits: expected \(N, K\)"):
        calibrated_probabilities(LOGITS[0])


def test_it_travels_with_the_checkpoint(tmp_path):
    model = SolarChipForImageClassification(tiny_config(calibration={**PLATT, "thresholds": {"m_plus": 0.3}})).eval()
    model.save_pretrained(tmp_path)
    again = SolarChipForImageClassification.from_pretrained(tmp_path)
    assert again.config.calibration == {**PLATT, "thresholds": {"m_plus": 0.3}}
    torch.testing.assert_close(
        calibrated_probabilities(LOGITS, again.config.calibration), calibrated_probabilities(LOGITS, PLATT)
    )


def test_a_linear_head_is_linear_in_the_tokens():
    config = tiny_config(classifier_head="linear", classifier_dropout=0.0)
    torch.manual_seed(0)
    head = SolarChipForImageClassification(config).eval().classifier
    with torch.no_grad():
        features = torch.randn(6, 3, config.classifier_hidden_size)
        observed = torch.ones(6, 3, dtype=torch.bool)
        first, second = head(features, observed)[0], head(2 * features, observed)[0]
        bias = head(0 * features, observed)[0]
        mlp = SolarChipForImageClassification(tiny_config(classifier_dropout=0.0)).eval().classifier
        curved = mlp(2 * features, observed)[0] - mlp(0 * features, observed)[0]
    assert first.std() > 1e-3
    torch.testing.assert_close(second - bias, 2 * (first - bias))
    straight = 2 * (mlp(features, observed)[0] - mlp(0 * features, observed)[0])
    assert not torch.allclose(curved, straight, atol=1e-3)
    assert not hasattr(head, "dense")


def test_thresholds_of_unknown_boundaries_are_refused():
    with pytest.raises(ValueError, match="expected some of c_plus, m_plus, x_plus, got 'm'"):
        check_calibration({"method": "temperature", "temperature": 1.0, "thresholds": {"m": 0.2}}, 4)
    check_calibration({"method": "temperature", "temperature": 1.0, "thresholds": {"2_plus": 0.2}}, 3)
