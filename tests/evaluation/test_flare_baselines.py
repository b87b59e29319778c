"""Baselines on the real flare list, and magnetogram statistics on fields whose answer is known."""

import numpy as np
import pandas as pd
import pytest

from solarchip_hf.data import flare_events, flare_labels
from solarchip_hf.evaluation.flare_baselines import (
    ClimatologyBaseline,
    MagnetogramForestBaseline,
    PastRateLogisticBaseline,
    PersistenceBaseline,
    TrailingRateBaseline,
    classes_from_exceedance,
    magnetogram_statistics,
)
from solarchip_hf.evaluation.flare_skill.skill_scores import best_threshold, exceedance, flare_scores
from solarchip_hf.models.geometry import RSUN_PIXELS_1024

SPAN = ("2010-01-01", "2023-06-27")


@pytest.fixture(scope="module")
def parts(shared_data):
    """Features and labels of the real list: training to 2014, validation 2015, test 2016 and later, gaps of 27 days."""
    events = flare_events.read_flare_events(shared_data / "swpc_flares_2010_2023.csv")
    times = pd.date_range("2010-06-01", "2022-12-31", freq="D", tz="UTC")
    features = flare_labels.past_features(times, events, coverage=SPAN)
    features = features.join(flare_labels.trailing_day_rates(times, events, coverage=SPAN))
    labels = flare_labels.label_flares(times, events, coverage=SPAN)["label"]
    spans = {"train": ("2010", "2014-12-04"), "validation": ("2015", "2015-12-04"), "test": ("2016", "2022")}
    return {name: (features.loc[a:b], labels.loc[a:b].to_numpy()) for name, (a, b) in spans.items()}


def test_baselines_on_the_real_list_rank_as_the_field_found(parts):
    rivals = {
        "climatology": ClimatologyBaseline(),
        "trailing": TrailingRateBaseline(),
        "persistence": PersistenceBaseline(),
        "logistic": PastRateLogisticBaseline(),
    }
    scores = {}
    frequencies = np.bincount(parts["train"][1], minlength=4) / len(parts["train"][1])
    for name, rival in rivals.items():
        rival.fit(*parts["train"])
        features, labels = parts["validation"]
        threshold, _ = best_threshold(exceedance(rival.predict_proba(features))[:, 1], labels >= 2)
        features, labels = parts["test"]
        probabilities = rival.predict_proba(features)
        assert probabilities.shape == (len(labels), 4)
        np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-9)
        assert probabilities.min() >= 0
        scores[name] = flare_scores(probabilities, labels, threshold=[0.5, threshold, 0.5], climatology=frequencies)[
            "M+"
        ]
    assert scores["climatology"]["bss_training"] == pytest.approx(0, abs=1e-12)
    assert scores["climatology"]["auc"] == 0.5
    assert scores["trailing"]["auc"] > 0.7  # the phase of the cycle alone
    assert scores["persistence"]["tss"] > 0.3
    assert scores["logistic"]["auc"] > max(scores["persistence"]["auc"], scores["trailing"]["auc"])
    assert scores["logistic"]["bss_training"] > scores["persistence"]["bss_training"] > 0
    assert scores["logistic"]["bss_sample"] > 0.1


def test_uncalibrated_persistence_repeats_the_label(parts):
    features, labels = parts["test"]
    forecast = PersistenceBaseline(calibrated=False).fit(*parts["train"]).predict_proba(features)
    np.testing.assert_array_equal(forecast.argmax(axis=1), features["past_label_1d"])
    assert set(np.unique(forecast)) == {0.0, 1.0}
    assert (labels == forecast.argmax(axis=1)).mean() > 0.6


def test_climatology_is_the_training_part(parts):
    forecast = ClimatologyBaseline().fit(*parts["train"]).predict_proba(parts["test"][0])
    expected = np.bincount(parts["train"][1], minlength=4) / len(parts["train"][1])
    np.testing.assert_array_equal(forecast[[0, -1]], [expected, expected])


def test_a_class_without_examples_gets_nothing(parts):
    features, labels = parts["train"]
    few = labels < 3
    for baseline in (PastRateLogisticBaseline(), MagnetogramForestBaseline(num_trees=5)):
        forecast = baseline.fit(features[few], labels[few]).predict_proba(features)
        assert forecast[:, 3].max() == 0
        np.testing.assert_allclose(forecast.sum(axis=1), 1)


def test_missing_history_is_refused(parts):
    features, labels = parts["train"]
    holed = features.copy()
    holed.iloc[:3, 0] = np.nan
    with pytest.raises(ValueError, match="3 of"):
        PastRateLogisticBaseline().fit(holed, labels)
    with pytest.raises(ValueError, match="past_label_1d"):
        PersistenceBaseline().fit(features.drop(columns="past_label_1d"), labels)
    with pytest.raises(ValueError, match="label -1"):
        ClimatologyBaseline().fit(features, np.where(labels == 3, -1, labels))
    with pytest.raises(ValueError, match="label a row"):
        ClimatologyBaseline().fit(features, labels[1:])


def test_rare_never_exceeds_common():
    classes = classes_from_exceedance([[0.5, 0.7, 0.1], [0.2, 0.1, 0.3]])
    np.testing.assert_allclose(classes, [[0.5, 0, 0.4, 0.1], [0.8, 0.1, 0, 0.1]])


def disk(size, value=0.0):
    offset = np.arange(size) - (size - 1) / 2
    inside = np.hypot(offset[:, None], offset[None, :]) <= RSUN_PIXELS_1024 * size / 1024
    return np.where(inside, value, np.nan)


def test_statistics_of_known_fields():
    size = 256
    pixel_mm = 695.7 / (RSUN_PIXELS_1024 * size / 1024)
    empty = magnetogram_statistics(disk(size)).iloc[0]
    assert empty.drop("valid_fraction").eq(0).all()
    assert empty["valid_fraction"] == 1
    # A uniform line-of-sight field of 200 G: flux integral B / mu^2 over the disk within 70 degrees, in closed form
    # 2 pi R^2 B ln(1 / cos 70), and an area of 1 - cos 70 of the hemisphere.
    uniform = magnetogram_statistics(disk(size, 200.0)).iloc[0]
    flux = 2 * np.pi * 6.957e10**2 * 200 * np.log(1 / np.cos(np.radians(70)))
    assert uniform["unsigned_flux"] == pytest.approx(flux, rel=0.02)
    assert uniform["net_flux"] == pytest.approx(uniform["unsigned_flux"])
    assert uniform["strong_area"] == pytest.approx(1e6 * (1 - np.cos(np.radians(70))), rel=0.02)
    assert uniform["pil_length"] == uniform["gradient_max"] == 0
    # Two touching squares of opposite sign at the centre: one inversion line, 10 pixels long and 4 wide as dilated.
    bipole = disk(size)
    bipole[123:133, 118:128], bipole[123:133, 128:138] = 500.0, -500.0
    two = magnetogram_statistics(bipole).iloc[0]
    assert two["net_flux"] == pytest.approx(0, abs=1e-3 * two["unsigned_flux"])
    assert two["unsigned_flux"] == pytest.approx(200 * 500 * (pixel_mm * 1e8) ** 2, rel=0.01)
    assert two["max_field"] == 500
    # Steepest at the line's ends, where the field also falls to 0 along the line: central differences 500 and 250.
    assert two["pil_gradient_max"] == pytest.approx(np.hypot(500, 250) / pixel_mm, rel=1e-6)
    assert two["pil_length"] == pytest.approx(24 * pixel_mm)  # the dilated squares overlap in 12 x 2 pixels
    # The same squares apart have the same flux and no line.
    apart = disk(size)
    apart[123:133, 108:118], apart[123:133, 138:148] = 500.0, -500.0
    far = magnetogram_statistics(apart).iloc[0]
    assert far["pil_length"] == far["schrijver_r"] == 0
    assert far["unsigned_flux"] == pytest.approx(two["unsigned_flux"], rel=0.02)
    assert two["schrijver_r"] > 20


def test_statistics_of_a_real_magnetogram(sdo_folder):
    # SDOML's grid has the canonical solar radius; it stores 0 off the disk.
    field = np.load(sdo_folder / "HMI20130131_0000_bz.npz")["x"].astype(np.float32)
    day = magnetogram_statistics(field, index=["2013-01-31"])
    assert 5e22 < day["unsigned_flux"].iloc[0] < 5e23  # a Sun of cycle maximum
    assert day["strong_flux"].iloc[0] < day["unsigned_flux"].iloc[0]
    assert 1e3 < day["strong_area"].iloc[0] < 4e4
    assert abs(day["net_flux"].iloc[0]) < 0.2 * day["unsigned_flux"].iloc[0]
    assert day["pil_gradient_max"].iloc[0] > 10
    # Neither polarity nor orientation matters, but for the sign of the net flux.
    other = magnetogram_statistics(np.stack([-field, field[::-1], field.T]))
    for name in day.columns.drop("net_flux"):
        np.testing.assert_allclose(other[name], day[name].iloc[0], rtol=1e-6, err_msg=name)
    np.testing.assert_allclose(other["net_flux"], day["net_flux"].iloc[0] * np.array([-1, 1, 1]), rtol=1e-6)
    holed = field.copy()
    holed[:250] = np.nan
    assert magnetogram_statistics(holed)["valid_fraction"].iloc[0] == pytest.approx(0.52, abs=0.05)


def test_forest_learns_from_statistics():
    rng = np.random.default_rng(0)
    size, fields, labels = 64, [], []
    for _ in range(160):
        label = int(rng.integers(0, 4))
        field = disk(size) + rng.normal(0, 3, (size, size))
        for _ in range(label):  # more bipoles, larger flares
            y, x = rng.integers(22, 40, 2)
            field[y : y + 3, x : x + 3], field[y : y + 3, x + 3 : x + 6] = 600, -600
        fields.append(field)
        labels.append(label)
    features, labels = magnetogram_statistics(np.stack(fields)), np.array(labels)
    forest = MagnetogramForestBaseline(num_trees=40, min_samples_leaf=3).fit(features[:100], labels[:100])
    scores = flare_scores(forest.predict_proba(features[100:]), labels[100:])
    assert scores["gmgs"] > 0.5
    again = MagnetogramForestBaseline(num_trees=40, min_samples_leaf=3).fit(features[:100], labels[:100])
    np.testing.assert_array_equal(forest.predict_proba(features[100:]), again.predict_proba(features[100:]))


def test_bad_magnetograms_are_refused():
    with pytest.raises(ValueError, match="none; drop the observation"):
        magnetogram_statistics(np.full((32, 32), np.nan))
    with pytest.raises(ValueError, match=r"expected \(N, N\)"):
        magnetogram_statistics(np.zeros((32, 16)))


def test_past_rates_leave_the_table_as_it_is():
    """A table of one block, as pandas joins it, is read and not written."""
    table = pd.DataFrame(np.random.default_rng(0).random((40, 2)), columns=["past_m_rate_1d", "past_log_flux_1d"])
    table = pd.concat([table.iloc[:20], table.iloc[20:]])
    before = table.copy()
    baseline = PastRateLogisticBaseline().fit(table[:20], np.arange(20) % 4)
    assert np.isfinite(baseline.predict_proba(table[20:])).all()
    pd.testing.assert_frame_equal(table, before)
