"""The metric against scikit-learn, against tables worked by hand, through `evaluate.load`, and its doctest."""

import doctest
import json
from importlib.resources import files
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn import metrics

import solarchip_hf.evaluation as evaluation
from solarchip_hf.evaluation.flare_skill.skill_scores import (
    best_threshold,
    exceedance,
    flare_scores,
    flatten_scores,
    gerrity_score,
    gerrity_weights,
    reliability_bins,
    roc_auc,
    table_scores,
)

evaluate = pytest.importorskip("evaluate")
FOLDER = Path(str(files("solarchip_hf.evaluation") / "flare_skill"))


@pytest.fixture(scope="module")
def metric(tmp_path_factory):
    return evaluate.load(str(FOLDER), cache_dir=str(tmp_path_factory.mktemp("metrics")))


@pytest.fixture
def forecasts():
    """5000 class forecasts with some skill, and what happened."""
    rng = np.random.default_rng(0)
    references = rng.choice(4, size=5000, p=[0.5, 0.33, 0.13, 0.04])
    logits = rng.normal(size=(5000, 4)) + 1.2 * np.eye(4)[references] + np.log([0.5, 0.33, 0.13, 0.04])
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return probabilities, references


@pytest.mark.parametrize("threshold", [0.5, 0.1, 0.33])
def test_equals_scikit_learn(metric, forecasts, threshold):
    probabilities, references = forecasts
    above, observed = exceedance(probabilities)[:, 1], references >= 2
    above = np.round(above, 2)  # ties for the ROC curve, and forecasts equal to the threshold
    scores = metric.compute(predictions=above, references=observed.astype(int), threshold=threshold)
    warned = above >= threshold
    expected = {
        "pod": metrics.recall_score(observed, warned),
        "far": 1 - metrics.precision_score(observed, warned),
        "csi": metrics.jaccard_score(observed, warned),
        "acc": metrics.accuracy_score(observed, warned),
        "hss": metrics.cohen_kappa_score(observed, warned),
        "tss": metrics.balanced_accuracy_score(observed, warned, adjusted=True),
        "auc": metrics.roc_auc_score(observed, above),
        "brier": metrics.brier_score_loss(observed, above),
    }
    assert {name: scores[name] for name in expected} == pytest.approx(expected, abs=1e-12)
    assert scores["tss"] > 0.1  # not an empty comparison
    assert scores["undefined"] == 0
    tn, fp, fn, tp = metrics.confusion_matrix(observed, warned).ravel()
    assert (scores["tp"], scores["fp"], scores["fn"], scores["tn"]) == (tp, fp, fn, tn)


def test_table_by_hand():
    # Finley's tornado forecasts of 1884: 28 hits, 72 false alarms, 23 misses, 2680 correct rejections.
    scores = table_scores(28, 72, 23, 2680)
    assert scores["pod"] == pytest.approx(28 / 51)
    assert scores["pofd"] == pytest.approx(72 / 2752)
    assert scores["far"] == pytest.approx(0.72)
    assert scores["csi"] == pytest.approx(28 / 123)
    assert scores["acc"] == pytest.approx(2708 / 2803)
    assert scores["bias"] == pytest.approx(100 / 51)
    assert scores["tss"] == pytest.approx(0.523, abs=5e-4)
    assert scores["hss"] == pytest.approx(0.355, abs=5e-4)


def test_brier_skill_names_its_climatology():
    scores = flare_scores([0.8, 0.4, 0.1, 0.3], [1, 0, 0, 1], climatology=0.2)
    brier = (0.04 + 0.16 + 0.01 + 0.49) / 4
    assert scores["brier"] == pytest.approx(brier)
    assert scores["bss_sample"] == pytest.approx(1 - brier / 0.25)
    assert scores["bss_training"] == pytest.approx(1 - brier / ((0.64 + 0.04 + 0.04 + 0.64) / 4))
    assert scores["bss"] == scores["bss_training"]
    assert scores["bss_reference"] == "training"
    scores = flare_scores([0.8, 0.4, 0.1, 0.3], [1, 0, 0, 1])
    assert scores["bss"] == scores["bss_sample"]
    assert scores["bss_reference"] == "sample"
    assert "bss_training" not in scores


def test_gmgs_by_hand():
    # Observed 8, 4, 4: P = 1/2, 3/4, a = 1, 1/3, b = 1/2.
    expected = [[2 / 3, -1 / 3, -1], [-1 / 3, 2 / 3, 0], [-1, 0, 2]]
    np.testing.assert_allclose(gerrity_weights([8, 4, 4]), expected, atol=1e-12)
    table = [[6, 1, 0], [2, 2, 1], [0, 1, 3]]  # forecast by row, observed by column
    assert gerrity_score(table) == pytest.approx((4 - 1 / 3 - 2 / 3 + 4 / 3 + 6) / 16)
    # Equitable: constant and random forecasts get 0, perfect ones 1.
    assert gerrity_score([[8, 4, 4], [0, 0, 0], [0, 0, 0]]) == pytest.approx(0, abs=1e-12)
    assert gerrity_score(np.diag([8, 4, 4])) == pytest.approx(1)
    assert np.isnan(gerrity_score([[8, 2, 0], [0, 2, 0], [0, 0, 0]]))


def test_gmgs_is_the_mean_tss_of_its_boundaries(metric, forecasts):
    probabilities, references = forecasts
    scores = metric.compute(predictions=probabilities, references=references)
    chosen = probabilities.argmax(axis=1)
    each = [metrics.balanced_accuracy_score(references >= k, chosen >= k, adjusted=True) for k in (1, 2, 3)]
    assert scores["gmgs"] == pytest.approx(np.mean(each), abs=1e-12)
    assert scores["gmgs"] > 0.2
    np.testing.assert_array_equal(scores["class_table"], metrics.confusion_matrix(references, chosen).T)


def test_classes_are_scored_by_boundary(metric, forecasts):
    probabilities, references = forecasts
    thresholds = {"C+": 0.5, "M+": 0.25, "X+": 0.06}
    climatology = [0.4, 0.4, 0.15, 0.05]
    scores = metric.compute(
        predictions=probabilities, references=references, threshold=thresholds, climatology=climatology
    )
    total = 0.0
    for k, (name, base) in enumerate({"C+": 0.6, "M+": 0.2, "X+": 0.05}.items(), start=1):
        above = probabilities[:, k:].sum(axis=1)
        alone = metric.compute(
            predictions=above, references=references >= k, threshold=thresholds[name], climatology=base
        )
        for score in ("tss", "hss", "pod", "far", "csi", "acc", "bss", "bss_training", "bss_sample", "auc", "brier"):
            assert scores[name][score] == pytest.approx(alone[score], abs=1e-9), (name, score)
        total += alone["brier"]
    assert scores["rps"] == pytest.approx(total)
    assert scores["headline"] == "M+"
    assert scores["tss"] == scores["M+"]["tss"]
    flat = flatten_scores(scores)
    assert flat["x_plus_auc"] == scores["X+"]["auc"]
    assert all(isinstance(value, float) for value in flat.values())
    json.dumps(scores)
    # As decisions by threshold, the table is cut where the boundaries are.
    by_threshold = flare_scores(probabilities, references, threshold=thresholds, decision="threshold")
    assert np.sum(by_threshold["class_table"][3]) == by_threshold["X+"]["tp"] + by_threshold["X+"]["fp"]


def test_undefined_is_nan_and_counted(metric):
    scores = metric.compute(predictions=[0.1, 0.2, 0.3], references=[0, 0, 0])
    for name in ("pod", "tss", "far", "csi", "bias", "bss", "auc", "hss"):
        assert np.isnan(scores[name]), name
    assert scores["acc"] == 1.0
    assert scores["pofd"] == 0.0
    assert set(scores["undefined_scores"]) == {
        "pod", "tss", "far", "csi", "bias", "bss", "bss_sample", "auc", "hss",
    }  # fmt: skip
    assert scores["undefined"] == 9
    no_warning = metric.compute(predictions=[0.1, 0.2, 0.3], references=[0, 0, 1])
    assert no_warning["undefined_scores"] == ["far"]
    assert no_warning["pod"] == no_warning["tss"] == 0.0


def test_what_evaluate_users_pass(metric):
    torch = pytest.importorskip("torch")
    lists = flatten_scores(metric.compute(predictions=[0.9, 0.2, 0.6], references=[1, 0, 0]))
    tensor = torch.tensor([0.9, 0.2, 0.6], dtype=torch.float64)
    assert flatten_scores(metric.compute(predictions=tensor, references=torch.tensor([1, 0, 0]))) == lists
    metric.add_batch(predictions=[0.9, 0.2], references=[1, 0])
    metric.add(prediction=0.6, reference=0)
    assert flatten_scores(metric.compute()) == lists
    assert lists["tss"] == 0.5
    classes = metric.compute(predictions=[[0.8, 0.2], [0.3, 0.7]], references=[0, 1])
    assert classes["1+"]["acc"] == 1.0
    # columns of a table that was filtered, as labels[labels.covered] is: no row is called 0
    table = pd.DataFrame({"p": [0.9, 0.2, 0.6], "flare": [1, 0, 0]}, index=pd.date_range("2012-01-01", periods=3))
    scores = metric.compute(predictions=table["p"], references=table["flare"].astype("boolean"))
    assert flatten_scores(scores) == lists


def test_probabilities_of_a_bfloat16_model(metric):
    torch = pytest.importorskip("torch")
    logits = torch.randn(200, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    exact = logits.softmax(dim=1)
    rounded = exact.bfloat16()
    assert (rounded.double().sum(dim=1) - 1).abs().max() > 1e-3
    references = torch.arange(200) % 4
    expected = metric.compute(predictions=exact, references=references)
    scores = metric.compute(predictions=rounded, references=references)
    assert scores["rps"] == pytest.approx(expected["rps"], abs=2e-3)


@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        ([0.1, 0.7], [0.5, 1], "whole numbers"),
        ([None, 0.7], [0, 1], "probabilities in"),
        ([[0.1], [0.7]], [0, 1], r"shape \(2, 1\)"),
        ([0.1, 0.7, 0.2], [0, 1], "shapes"),
        ([0.1, 0.7], ["M", "C"], "expected numbers"),
        ([], [], "at least one"),
    ],
)
def test_the_metric_refuses_and_goes_on(metric, predictions, references, message):
    with pytest.raises(ValueError, match=message):
        metric.compute(predictions=predictions, references=references)
    assert metric.compute(predictions=[0.9, 0.2, 0.6], references=[1, 0, 0])["tss"] == 0.5


@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        ([0.1, 1.7], [0, 1], "turn logits into probabilities"),
        ([0.1, float("nan")], [0, 1], "probabilities in"),
        ([0.1, 0.2], [0, -1], "not covered"),
        ([[0.5, 0.6], [0.1, 0.9]], [0, 1], "sum to 1"),
        ([[0.5, 0.5], [0.1, 0.9]], [0, 2], "0..1"),
        ([], [], "at least one"),
    ],
)
def test_bad_input_is_refused(predictions, references, message):
    with pytest.raises(ValueError, match=message):
        flare_scores(predictions, references)


def test_bad_options_are_refused():
    probabilities, references = np.full((4, 4), 0.25), [0, 1, 2, 3]
    with pytest.raises(ValueError, match="boundaries"):
        flare_scores(probabilities, references, threshold={"M+": 0.5})
    with pytest.raises(ValueError, match="3"):
        flare_scores(probabilities, references, threshold=[0.5, 0.5])
    with pytest.raises(ValueError, match="class frequencies"):
        flare_scores(probabilities, references, climatology=0.2)
    with pytest.raises(ValueError, match="argmax"):
        flare_scores(probabilities, references, decision="best")
    with pytest.raises(ValueError, match="headline"):
        flare_scores(probabilities, references, headline="M")
    with pytest.raises(ValueError, match="zero or more"):
        flare_scores(probabilities, references, climatology=[0.5, 0.6, -0.1, 0.0])
    for threshold in (float("nan"), 50, "half", None):
        with pytest.raises(ValueError, match="threshold: expected"):
            flare_scores([0.1, 0.9], [0, 1], threshold=threshold)
    for climatology in (float("nan"), 20, [0.8, 0.2]):
        with pytest.raises(ValueError, match="climatology: expected"):
            flare_scores([0.1, 0.9], [0, 1], climatology=climatology)


def test_reliability_bins():
    bins = reliability_bins([0.0, 0.05, 0.3, 0.35, 1.0], [0, 1, 0, 1, 1], num_bins=10)
    assert bins["count"] == [2, 0, 0, 2, 0, 0, 0, 0, 0, 1]
    assert bins["observed_frequency"][0] == 0.5
    assert bins["mean_probability"][3] == pytest.approx(0.325)
    assert np.isnan(bins["observed_frequency"][1])


def test_best_threshold_equals_a_search(forecasts):
    probabilities, references = forecasts
    above, observed = np.round(exceedance(probabilities)[:400, 1], 2), references[:400] >= 2
    for score in ("tss", "hss", "csi"):
        threshold, value = best_threshold(above, observed, score)
        found = [flare_scores(above, observed, t)[score] for t in np.linspace(0.0, 1.0, 1001)]
        assert value == pytest.approx(np.nanmax(found))
        assert flare_scores(above, observed, threshold)[score] == pytest.approx(value)
    with pytest.raises(ValueError, match="events and non-events"):
        best_threshold([0.1, 0.2], [0, 0])


def test_auc_counts_ties_by_half():
    assert roc_auc([0.5, 0.5, 0.5, 0.5], [0, 1, 0, 1]) == 0.5
    assert np.isnan(roc_auc([0.1, 0.2], [1, 1]))


def test_doctest_runs():
    from solarchip_hf.evaluation.flare_skill import flare_skill

    test = doctest.DocTestParser().get_doctest(flare_skill._KWARGS_DESCRIPTION, {}, "flare_skill", None, 0)
    assert len(test.examples) >= 6
    results = doctest.DocTestRunner().run(test)
    assert results.failed == 0


def test_metric_card_stands_beside_the_metric():
    card = (FOLDER / "README.md").read_text()
    for name in ("tss", "hss", "gmgs", "bss_training", "undefined"):
        assert f"`{name}`" in card


def test_lazy_names():
    assert evaluation.flare_scores is flare_scores
    for name in evaluation.__all__:
        assert getattr(evaluation, name) is not None
    with pytest.raises(AttributeError, match="no attribute"):
        _ = evaluation.nothing
