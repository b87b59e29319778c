"""The report of a flare forecast: every row on the same samples, thresholds from validation, numbers that recount."""

import json

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import brier_score_loss, confusion_matrix, roc_auc_score

from flare_world import flare_world, labelled_world
from solarchip_hf.data import LeakageError, split_flares
from solarchip_hf.evaluation import (
    baseline_forecasts,
    calibrated_report,
    magnetogram_statistics,
    magnetogram_table,
    write_flare_report,
)

OPTIONS = {"num_resamples": 20, "seed": 1}
BASELINES = ["climatology", "trailing 365 d rate", "persistence", "past-rate logistic", "magnetogram forest"]


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    dataset = labelled_world(flare_world(tmp_path_factory.getbasetemp()))
    return split_flares(dataset, {"train": 0.5, "validation": 0.25, "test": 0.25})


@pytest.fixture(scope="module")
def baselines(parts):
    return baseline_forecasts(parts)


def noisy(part, seed: int, share: float = 0.6) -> np.ndarray:
    """Probabilities that know something of the labels."""
    rng = np.random.default_rng(seed)
    return share * (0.8 * np.eye(4)[part.classes] + 0.05) + (1 - share) * rng.dirichlet(np.ones(4), len(part))


@pytest.fixture(scope="module")
def forecasts(parts):
    return {"model": {name: noisy(parts[name], i) for i, name in enumerate(("validation", "test"))}}


@pytest.fixture(scope="module")
def folder(parts, forecasts, baselines, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    extra = {"true hazard": noisy(parts["test"], 9, 0.9)}
    write_flare_report(
        folder, parts, forecasts, extra_forecasts=extra, baselines=baselines, note="blobs", run={"a": 1}, **OPTIONS
    )
    return folder


@pytest.fixture(scope="module")
def report(folder):
    return json.loads((folder / "report.json").read_text())


def test_every_rival_stands_in_every_table(report, folder):
    rows = ["model", *BASELINES, "true hazard"]
    for boundary in ("C+", "M+", "X+"):
        assert list(report["scores"][boundary]) == rows
        assert list(report["tables"][boundary]) == rows
    assert list(report["classes"]) == rows
    assert list(report["by_angle"]) == rows
    assert list(report["differences"]) == rows[1:]
    assert report["left_out"]["baselines"] == {}
    text = (folder / "report.md").read_text()
    for name in rows:
        assert text.count(f"| {name} |") >= 6
    for title in ("M+: ", "By year", "distance from the disk's centre", "changed windows", "Reliability", "Classes"):
        title = "distance" if title.startswith("distance") else title
        assert title in text
    assert report["run"] == {"a": 1}
    assert 2 < report["protocol"]["num_blocks"] < 5
    assert "such blocks: the intervals are rough" in text
    for figure in report["figures"]:
        assert (folder / figure).read_bytes().startswith(b"\x89PNG")
        assert f"]({figure})" in text
    assert len(report["figures"]) == 2


def test_numbers_recount(report, parts, forecasts):
    observed = parts["test"].classes >= 2
    above = forecasts["model"]["test"][:, 2:].sum(axis=1)
    row = report["scores"]["M+"]["model"]
    assert row["count"] == len(observed)
    assert row["auc"] == pytest.approx(roc_auc_score(observed, above))
    base = (parts["train"].classes >= 2).mean()
    brier = brier_score_loss(observed, above)
    assert row["bss_training"] == pytest.approx(1 - brier / ((base - observed) ** 2).mean())
    assert row["bss_sample"] == pytest.approx(1 - brier / observed.var())
    assert row["bss_training_low"] <= row["bss_training"] <= row["bss_training_high"]
    # the threshold is the best on validation, found by trying every one
    threshold = row["threshold"]
    reached = parts["validation"].classes >= 2
    own = forecasts["model"]["validation"][:, 2:].sum(axis=1)
    tss = {t: (own[reached] >= t).mean() - (own[~reached] >= t).mean() for t in own}
    assert (own[reached] >= threshold).mean() - (own[~reached] >= threshold).mean() == pytest.approx(max(tss.values()))
    tn, fp, fn, tp = confusion_matrix(observed, above >= threshold).ravel()
    table = report["tables"]["M+"]["model"]
    assert [table[key] for key in ("tp", "fp", "fn", "tn")] == [tp, fp, fn, tn]
    assert row["tss"] == pytest.approx(tp / (tp + fn) - fp / (fp + tn))
    half = above >= 0.5
    assert row["tss_half"] == pytest.approx(half[observed].mean() - half[~observed].mean())
    changed = observed != (parts["test"].labels["label_day_before"].to_numpy() >= 2)
    warned = above >= threshold
    expected = warned[changed & observed].mean() - warned[changed & ~observed].mean()
    assert row["tss_changed"] == pytest.approx(expected)
    assert report["changed_windows"]["M+"] == {"changed": int(changed.sum()), "known": len(observed)}
    years = {year: parts["test"].times.year == int(year) for year in report["by_year"]}
    for year, rows in report["by_year"].items():
        assert rows["model"]["count"] == years[year].sum()
    angles = report["by_angle"]["model"]
    assert sum(row["events"] for row in angles) == observed.sum()
    assert sum(row["hits"] for row in angles) == tp


def test_differences_are_paired(report):
    for name, row in report["differences"].items():
        gain = report["scores"]["M+"]["model"]["bss_training"] - report["scores"]["M+"][name]["bss_training"]
        assert row["bss"] == pytest.approx(gain)
        assert row["bss_low"] <= row["bss"] <= row["bss_high"]


def test_an_oracle_stands_without_validation_and_it_is_said(report, folder):
    assert report["thresholds"]["M+"]["true hazard"] == {"value": 0.5, "from": "not from validation: no forecast of it"}
    assert report["thresholds"]["M+"]["model"]["from"] == "validation"
    assert report["scores"]["M+"]["true hazard"]["bss_training"] > report["scores"]["M+"]["model"]["bss_training"]
    assert "0.500*" in (folder / "report.md").read_text()


def test_baselines_know_nothing_of_the_test_part(parts, baselines):
    changed = dict(parts)
    changed["test"] = parts["test"].select(range(len(parts["test"])))
    changed["test"].labels = parts["test"].labels.assign(label=3)
    again, _ = baseline_forecasts(changed)
    assert list(again) == BASELINES
    for name, forecast in again.items():
        for part in ("validation", "test"):
            np.testing.assert_array_equal(forecast[part], baselines[0][name][part])
            np.testing.assert_allclose(forecast[part].sum(axis=1), 1)


def test_a_label_among_the_features_is_caught(parts):
    planted = dict(parts)
    planted["train"] = parts["train"].select(range(len(parts["train"])))
    planted["train"].history = parts["train"].history.assign(past_secret=parts["train"].classes * 2.0)
    with pytest.raises(LeakageError, match="past_secret"):
        baseline_forecasts(planted)


def test_samples_without_history_are_left_out_for_all_alike(parts, forecasts, tmp_path):
    short = dict(parts)
    short["test"] = parts["test"].select(range(len(parts["test"])))
    history = parts["test"].history.copy()
    history.iloc[:5] = np.nan
    short["test"].history = history
    report = write_flare_report(tmp_path, short, forecasts, figures=False, **OPTIONS)
    assert report["left_out"]["test samples without all forecasts"] == 5
    counts = {row["count"] for row in report["scores"]["M+"].values()}
    assert counts == {len(parts["test"]) - 5}
    assert "5 samples that not every forecast covers" in (tmp_path / "report.md").read_text()


def test_without_magnetograms_the_forest_is_left_out_with_a_reason(parts, forecasts, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise ValueError("observations: expected magnetograms on the rsun grid, got ['aia171'] on the rsun grid.")

    monkeypatch.setattr("solarchip_hf.evaluation.flare_rivals.magnetogram_table", refuse)
    report = write_flare_report(tmp_path, parts, forecasts, figures=False, **OPTIONS)
    assert "magnetogram forest" not in report["scores"]["M+"]
    assert "expected magnetograms" in report["left_out"]["baselines"]["magnetogram forest"]


def test_magnetogram_statistics_are_of_the_right_rows(parts):
    part = parts["test"].select([3, 0, 7])
    aia = part.observations
    table = magnetogram_table(part)
    for row in range(3):
        expected = magnetogram_statistics(aia.physical(row)["hmi"]).iloc[0]
        pd.testing.assert_series_equal(table.iloc[row], expected, check_names=False)
    assert table["unsigned_flux"].std() > 0


def test_a_class_that_never_occurs_gives_dashes_not_zeros(parts, forecasts, baselines, tmp_path):
    calm = {name: part.select(part.classes < 3) for name, part in parts.items()}
    kept = {name: part.classes < 3 for name, part in parts.items()}
    own = {"model": {name: forecasts["model"][name][kept[name]] for name in ("validation", "test")}}
    rivals = {n: {p: f[p][kept[p]] for p in ("validation", "test")} for n, f in baselines[0].items()}
    report = write_flare_report(tmp_path, calm, own, baselines=(rivals, {}), **OPTIONS)
    row = report["scores"]["X+"]["model"]
    assert row["tss"] is None
    assert row["auc"] is None
    assert report["classes"]["model"]["gmgs"] is None
    assert report["thresholds"]["X+"]["model"]["from"] == "not from validation: one class only there"
    json.loads((tmp_path / "report.json").read_text(), parse_constant=lambda text: pytest.fail(text))
    assert "nan" not in (tmp_path / "report.md").read_text().lower()


def test_an_older_report_is_replaced(parts, forecasts, baselines, tmp_path):
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "flare_old.png").write_bytes(b"old")
    (tmp_path / "figures" / "training.png").write_bytes(b"another's")
    write_flare_report(tmp_path, parts, forecasts, baselines=baselines, **OPTIONS)
    names = {path.name for path in (tmp_path / "figures").iterdir()}
    assert names == {"flare_reliability.png", "flare_roc.png", "training.png"}
    assert not list(tmp_path.rglob("*.part"))


def test_logits_are_calibrated_and_forecasts_written(parts, baselines, tmp_path):
    logits = {name: 6 * np.log(noisy(parts[name], i, 0.1)) for i, name in enumerate(("validation", "test"))}
    calibration, report = calibrated_report(
        tmp_path, parts, logits, name="probe", method="temperature", baselines=baselines, figures=False, **OPTIONS
    )
    assert calibration["temperature"] > 1.5
    assert report["run"]["calibration"]["temperature"] == pytest.approx(calibration["temperature"])
    assert f"validation, {len(parts['validation'])} observations" in calibration["fitted_on"]
    assert list(report["scores"]["M+"])[:2] == ["probe", "probe, uncalibrated"]
    assert "calibrated by temperature on validation" in (tmp_path / "report.md").read_text()
    table = pd.read_csv(tmp_path / "forecasts.csv", parse_dates=["time"])
    assert table["part"].value_counts().to_dict() == {name: len(parts[name]) for name in ("validation", "test")}
    own = table[table["part"] == "test"]
    assert own["label"].tolist() == parts["test"].classes.tolist()
    assert list(own["time"]) == list(parts["test"].times)
    np.testing.assert_allclose(own[["0AB", "C", "M", "X"]].sum(axis=1), 1, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"headline": "B+"}, "C\\+, M\\+, X\\+"),
        ({"forecasts": {"model": {"test": np.zeros((3, 4))}}}, "model: expected probabilities of shape"),
        ({"forecasts": {"model": {"validation": np.zeros((3, 4))}}}, "a forecast of the test part"),
        ({"extra_forecasts": {"oracle": "logits"}}, "oracle: expected rows of probabilities"),
        ({"parts": "no validation"}, "expected train, validation and test"),
    ],
)
def test_bad_input_is_refused(parts, forecasts, baselines, tmp_path, change, message):
    arguments = {"parts": parts, "forecasts": forecasts, "baselines": baselines, **change}
    if change.get("parts"):
        arguments["parts"] = {name: parts[name] for name in ("train", "test")}
    if change.get("extra_forecasts"):
        arguments["extra_forecasts"] = {"oracle": np.full((len(parts["test"]), 4), 3.0)}
    with pytest.raises(ValueError, match=message):
        write_flare_report(tmp_path / "out", arguments.pop("parts"), arguments.pop("forecasts"), **arguments)
    assert not (tmp_path / "out").exists()
