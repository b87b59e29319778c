"""The report over seeds: means and errors by hand, the claim, and what cannot be scored."""

import json

import numpy as np
import pandas as pd
import pytest

from solarchip_hf.evaluation.flare_seeds import (
    load_forecasts,
    load_tries,
    recalibrated,
    save_forecasts,
    seed_report,
)


class Part:
    """What the report reads of `FlareObservations`."""

    def __init__(self, classes, start):
        self.classes = np.asarray(classes)
        self.times = pd.date_range(start, periods=len(classes), freq="1D", tz="UTC")
        self.labels = pd.DataFrame({"label": self.classes}, index=self.times)
        self.labels.attrs["source"] = "synthetic"

    def __len__(self):
        return len(self.classes)


@pytest.fixture(scope="module")
def parts():
    random = np.random.default_rng(0)
    draw = lambda count: random.choice(4, count, p=[0.2, 0.5, 0.25, 0.05])  # noqa: E731
    return {
        "train": Part(draw(400), "2012-01-01"),
        "validation": Part(draw(200), "2014-01-01"),
        "test": Part(draw(240), "2015-01-01"),
    }


def forecasts(parts, knowledge, seed):
    """Between the class frequencies and the truth, with noise."""
    random = np.random.default_rng(seed)
    result = {}
    for name in ("validation", "test"):
        truth = np.eye(4)[parts[name].classes]
        noise = random.dirichlet([2, 5, 2.5, 0.5], len(truth))
        result[name] = knowledge * truth + (1 - knowledge) * noise
    return result


@pytest.fixture(scope="module")
def arms(parts):
    return {
        "good": [forecasts(parts, 0.4, seed) for seed in range(4)],
        "poor": [forecasts(parts, 0.05, seed) for seed in range(10, 14)],
        "truth": [forecasts(parts, 0.9, 99)],
    }


def test_means_and_errors_are_those_of_the_seeds(parts, arms, tmp_path):
    report = seed_report(tmp_path, parts, arms, claim=("good", "poor"), ceiling="truth", num_resamples=40)
    base = (parts["train"].classes >= 2).mean()
    events = parts["test"].classes >= 2
    bss = [1 - ((f["test"][:, 2:].sum(1) - events) ** 2).mean() / ((base - events) ** 2).mean() for f in arms["good"]]
    row = report["scores"]["M+"]["good"]["bss"]
    assert row["seeds"] == pytest.approx(bss)
    assert row["mean"] == pytest.approx(np.mean(bss))
    assert row["standard_error"] == pytest.approx(np.std(bss, ddof=1) / 2)
    assert row["low"] < row["mean"] < row["high"]
    assert report["scores"]["M+"]["truth"]["tss"]["standard_error"] is None
    assert report["claim"]["holds"]
    gap = report["claim"]["bss"]
    assert gap["difference"] > gap["between_the_error_bars"] > 0
    assert report["synthetic"]
    saved = json.loads((tmp_path / "seeds.json").read_text())
    assert saved["scores"]["C+"].keys() == arms.keys()
    text = (tmp_path / "seeds.md").read_text()
    assert "**Synthetic** data" in text
    assert "The claim holds" in text
    assert (tmp_path / "figures" / "seeds.png").stat().st_size > 5000


def test_a_claim_of_single_seeds_does_not_hold(parts, arms, tmp_path):
    few = {name: forecasts[:1] for name, forecasts in arms.items()}
    report = seed_report(tmp_path, parts, few, claim=("good", "poor"), num_resamples=10)
    assert report["claim"]["bss"]["difference"] > 0
    assert report["claim"]["bss"]["between_the_error_bars"] is None
    assert report["claim"]["holds"] is False
    assert "calibration and thresholds use all labels of the validation part" in (tmp_path / "seeds.md").read_text()


def test_what_was_chosen_on_validation_is_said(parts, arms, tmp_path):
    report = seed_report(tmp_path, parts, arms, choices="Best of 7 tries each.", num_resamples=10)
    assert report["protocol"]["choices"] == "Best of 7 tries each."
    assert "whatever else is chosen there. Best of 7 tries each.\n" in (tmp_path / "seeds.md").read_text()


def test_what_was_tried_stands_beside_the_scores(parts, arms, tmp_path):
    tries = [{"learning_rate": 1e-3, "score": 0.2, "step": 8, "chosen": True}, {"score": None, "chosen": False}]
    save_forecasts(tmp_path / "0.safetensors", {"good": arms["good"][0]}, {"good": tries})
    save_forecasts(tmp_path / "1.safetensors", {"good": arms["good"][1]})
    kept = [load_tries(tmp_path / f"{seed}.safetensors") for seed in (0, 1)]
    assert kept == [{"good": tries}, {}]
    assert load_forecasts(tmp_path / "0.safetensors")["good"].keys() == {"validation", "test"}
    told = {"good": [seed.get("good") for seed in kept]}
    seed_report(tmp_path, parts, {"good": arms["good"][:2]}, tries=told, num_resamples=10)
    assert json.loads((tmp_path / "seeds.json").read_text())["tries"] == {"good": [tries, None]}


def test_no_interval_passes_the_range_of_its_score(parts, arms, tmp_path):
    report = seed_report(tmp_path, parts, arms, num_resamples=60)
    rows = [row for scores in report["scores"].values() for row in scores.values()]
    for name, least in (("tss", -1.0), ("auc", 0.0), ("bss", -np.inf)):
        known = [row[name] for row in rows if row[name]["low"] is not None]
        assert min(row["low"] for row in known) >= least
        assert max(row["high"] for row in known) <= 1.0, name
    # at stake: unbounded, the interval of the arm that knows nearly all would pass 1
    assert report["scores"]["M+"]["truth"]["auc"]["high"] == 1.0


def test_recalibration_mends_a_forecast_that_exaggerates(parts):
    honest = forecasts(parts, 0.3, 5)
    bold = {}
    for name, probabilities in honest.items():
        sharp = probabilities**6
        bold[name] = sharp / sharp.sum(axis=1, keepdims=True)
    bold["test"][7] = np.nan
    bold["test"][8] = [1, 0, 0, 0]
    mended = recalibrated(bold, parts["validation"].classes)
    assert np.isnan(mended["test"][7]).all()
    known = np.delete(np.arange(240), 7)
    assert np.isfinite(mended["test"][known]).all()
    np.testing.assert_allclose(mended["test"][known].sum(axis=1), 1, atol=1e-6)
    events = parts["test"].classes[known] >= 2
    brier = {
        name: ((forecast["test"][known][:, 2:].sum(1) - events) ** 2).mean()
        for name, forecast in (("bold", bold), ("mended", mended))
    }
    base = (parts["validation"].classes >= 2).mean()
    assert brier["mended"] < 0.9 * brier["bold"]
    assert brier["mended"] < ((base - events) ** 2).mean()


def test_a_constant_becomes_the_frequencies_of_validation(parts):
    flat = {name: np.tile([0.7, 0.1, 0.1, 0.1], (len(parts[name]), 1)) for name in ("validation", "test")}
    mended = recalibrated(flat, parts["validation"].classes)["test"]
    assert np.ptp(mended, axis=0).max() < 1e-6
    observed = np.bincount(parts["validation"].classes, minlength=4) / len(parts["validation"])
    np.testing.assert_allclose(mended[0], observed, atol=0.02)


def test_forecasts_are_kept_as_they_were(parts, tmp_path):
    kept = {"a/b arm": forecasts(parts, 0.2, 1), "other": forecasts(parts, 0.2, 2)}
    save_forecasts(tmp_path / "new" / "0.safetensors", kept)
    again = load_forecasts(tmp_path / "new" / "0.safetensors")
    assert again.keys() == kept.keys()
    for arm in kept:
        for part in kept[arm]:
            np.testing.assert_array_equal(again[arm][part], kept[arm][part])
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["0.safetensors"]


def test_a_claim_that_fails_is_said_to_fail(parts, arms, tmp_path):
    report = seed_report(tmp_path, parts, arms, claim=("poor", "good"), num_resamples=10)
    assert not report["claim"]["holds"]
    assert "does **not** hold" in (tmp_path / "seeds.md").read_text()


def test_samples_that_an_arm_cannot_forecast_are_left_out_for_all(parts, arms, tmp_path):
    gappy = {name: values.copy() for name, values in arms["poor"][0].items()}
    gappy["test"][:60] = np.nan
    report = seed_report(tmp_path, parts, {**arms, "gappy": [gappy]}, num_resamples=10)
    assert report["left_out"] == {"validation": 0, "test": 60}
    events = parts["test"].classes[60:] >= 2
    base = (parts["train"].classes >= 2).mean()
    above = arms["good"][0]["test"][60:, 2:].sum(1)
    expected = 1 - ((above - events) ** 2).mean() / ((base - events) ** 2).mean()
    assert report["scores"]["M+"]["good"]["bss"]["seeds"][0] == pytest.approx(expected)
    gappy["test"][:] = np.nan
    with pytest.raises(ValueError, match="test part that all of them forecast, got none"):
        seed_report(tmp_path, parts, {"gappy": [gappy]})
    with pytest.raises(ValueError, match="claim"):
        seed_report(tmp_path, parts, arms, claim=("good", "unheard of"))


def test_a_test_part_without_events_leaves_the_claim_open(parts, arms, tmp_path):
    quiet = {**parts, "test": Part(np.minimum(parts["test"].classes, 1), "2015-01-01")}
    report = seed_report(tmp_path, quiet, arms, claim=("good", "poor"), num_resamples=10)
    assert report["scores"]["M+"]["good"]["tss"]["mean"] is None
    assert not report["claim"]["holds"]
    assert report["claim"]["tss"]["difference"] is None
    json.loads((tmp_path / "seeds.json").read_text(), parse_constant=lambda name: pytest.fail(name))
