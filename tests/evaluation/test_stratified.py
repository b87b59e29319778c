"""Skill by year, by change, by place, and rivals side by side."""

import numpy as np
import pandas as pd
import pytest

from solarchip_hf.data import flare_events, flare_labels
from solarchip_hf.evaluation.flare_skill.skill_scores import binary_scores
from solarchip_hf.evaluation.stratified import (
    SCORE_BOUNDS,
    changed_windows,
    recall_by_angle,
    score_forecasts,
    scores_by_group,
    shuffle_within,
)

SPAN = ("2010-01-01", "2023-06-27")


@pytest.fixture(scope="module")
def real(shared_data):
    """Labels at 00:00 of every covered day from 2011 to 2022."""
    events = flare_events.read_flare_events(shared_data / "swpc_flares_2010_2023.csv")
    days = pd.date_range("2011-01-01", "2022-12-31", freq="D", tz="UTC")
    return flare_labels.label_flares(days, events, coverage=SPAN)


def test_the_cycle_alone_looks_like_skill(real):
    observed = (real["label"] >= 2).to_numpy()
    years = real.index.year
    yearly = pd.Series(observed).groupby(years).transform("mean").to_numpy()
    best = max(binary_scores(yearly, observed, t)["tss"] for t in np.unique(yearly))
    assert 0.4 < best < 0.55  # a forecast that knows the year and nothing else
    assert abs(binary_scores(shuffle_within(yearly, years), observed, 0.1)["tss"]) > 0.3
    # Within a year, it has none.
    table = scores_by_group(yearly, observed, years)
    assert np.nanmax(np.abs(table["auc"] - 0.5)) == 0.0
    quiet = table.loc[2019]
    assert quiet["base_rate"] == 0
    assert np.isnan(quiet["tss"])
    assert np.isnan(quiet["auc"])
    assert list(table.index) == list(range(2011, 2023))


def test_changed_windows(real):
    labels = real["label"].to_numpy()
    changed = changed_windows(real.index, labels)
    slow = [pd.NA] + [(labels[k] >= 2) != (labels[k - 1] >= 2) for k in range(1, len(labels))]
    assert changed.tolist()[1:] == slow[1:]
    assert changed.isna().tolist()[0]
    # Persistence fails on exactly these.
    persistence = np.concatenate([[0], labels[:-1] >= 2]).astype(float)
    rows = changed.to_numpy(dtype=bool, na_value=False)
    assert binary_scores(persistence[rows], labels[rows] >= 2)["tss"] == -1.0
    # Neither the first day, nor one whose day before is absent or unknown.
    holed = changed_windows(real.index[[0, 1, 3, 4]], [2, 0, -1, 2])
    assert holed.isna().tolist() == [True, False, True, True]
    with pytest.raises(ValueError, match="no repetition"):
        changed_windows(real.index[[0, 0]], [0, 1])


def test_shuffling_keeps_each_years_forecasts(real):
    forecast = np.arange(len(real), dtype=float)
    shuffled = shuffle_within(forecast, real.index.year)
    assert not np.array_equal(shuffled, forecast)
    for year in np.unique(real.index.year):
        rows = real.index.year == year
        np.testing.assert_array_equal(np.sort(shuffled[rows]), forecast[rows])


def test_recall_by_place(real):
    angles = flare_events.disk_angle(real["target_location"])
    observed = (real["label"] >= 2).to_numpy()
    table = recall_by_angle(np.where(angles < 45, 0.9, 0.1), observed, angles)
    assert table["pod"].tolist()[:3] == [1.0, 0.0, 0.0]
    assert table["events"].sum() == observed.sum()
    assert (table["events"] > 20).all()  # some large flares have no place in the list: their own row


def test_no_interval_passes_the_range_of_its_score():
    times = pd.date_range("2012-01-01", periods=160, freq="D", tz="UTC")
    labels = np.where(np.arange(160) % 3 == 0, 2, 0)
    sharp = np.where(labels >= 2, 0.9, 0.1)
    sharp[[31, 120]] = 0.6, 0.4  # a false alarm and a miss
    table = score_forecasts(
        {"sharp": sharp, "wrong": 1 - sharp},
        labels,
        times,
        climatology=[0.6, 0.1, 0.2, 0.1],
        scores=tuple(SCORE_BOUNDS),
        num_resamples=100,
    )
    for score, (least, largest) in SCORE_BOUNDS.items():
        assert (table[f"{score}_low"] >= least).all(), score
        assert (table[f"{score}_high"] <= largest).all(), score
    # each end is reached, so that something is at stake
    assert table.loc["sharp", ["acc_high", "csi_high"]].tolist() == [1, 1]
    assert table.loc["wrong", ["tss_low", "acc_low"]].tolist() == [-1, 0]


def test_rivals_on_the_same_samples(real):
    labels = real["label"].to_numpy()
    rng = np.random.default_rng(0)
    persistence = np.concatenate([[0], labels[:-1]])
    climatology = np.bincount(labels, minlength=4) / len(labels)
    forecasts = {
        "climatology": np.tile(climatology, (len(labels), 1)),
        "persistence": np.eye(4)[persistence],
        "oracle": 0.9 * (labels >= 2) + 0.05,
        "noise": rng.random(len(labels)),
    }
    table = score_forecasts(
        forecasts,
        labels,
        real.index,
        climatology=climatology,
        thresholds=dict.fromkeys(forecasts, 0.5),
        num_resamples=60,
    )
    assert list(table.index) == list(forecasts)
    assert table.loc["climatology", "bss_sample"] == pytest.approx(0, abs=1e-12)
    assert table.loc["climatology", "tss"] == 0
    assert 0.35 < table.loc["persistence", "tss"] < 0.55
    assert table.loc["persistence", "tss_changed"] == -1
    assert table.loc["persistence", "tss_low"] < table.loc["persistence", "tss"] < table.loc["persistence", "tss_high"]
    assert table.loc["oracle", "tss"] == table.loc["oracle", "tss_half"] == 1
    assert 0.05 < table.loc["oracle", "tss_shuffled"] < 0.3  # what knowing the year's share gives
    assert table.loc["noise", "tss_low"] < 0 < table.loc["noise", "tss_high"]
    assert table.loc["noise", "auc_low"] < 0.5 < table.loc["noise", "auc_high"]
    with pytest.raises(ValueError, match="unknown windows"):
        score_forecasts(forecasts, np.full(len(labels), -1), real.index, climatology=climatology)
