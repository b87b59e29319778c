"""Features of the past do not move when the future does, and planted leaks are caught."""

import numpy as np
import pandas as pd
import pytest

from solarchip_hf.data.flare_events import read_flare_events
from solarchip_hf.data.flare_labels import label_flares, past_features, trailing_day_rates
from solarchip_hf.data.leakage import LeakageError, check_feature_table, check_past_features

SPAN = ("2010-01-01", "2023-06-27")


@pytest.fixture(scope="module")
def events(shared_data):
    table = read_flare_events(shared_data / "swpc_flares_2010_2023.csv")
    return table[table["start_time"] < pd.Timestamp("2013-01-01", tz="UTC")].reset_index(drop=True)


@pytest.fixture(scope="module")
def times():
    return pd.date_range("2010-03-01 00:30", "2012-12-01", freq="7h", tz="UTC")


def history(times, events):
    return past_features(times, events, coverage=SPAN).join(trailing_day_rates(times, events, coverage=SPAN))


def test_permuting_the_future_changes_no_past_feature(events, times):
    assert check_past_features(history, times, events) >= 24


def test_derived_coverage_does_not_leak_either(events, times):
    assert check_past_features(past_features, times, events, num_times=4) >= 12


def test_events_after_t_may_as_well_not_exist(events, times):
    t = times[2000]
    known = events[events["end_time"] <= t]
    whole, cut = history(times[:2001], events), history(times[:2001], known)
    pd.testing.assert_series_equal(whole.iloc[-1], cut.iloc[-1])


@pytest.mark.parametrize("column", ["label", "c_plus", "target_cumulative"])
def test_a_label_copied_into_a_feature_is_caught(events, times, column):
    def leaky(times, events):
        table = past_features(times, events, coverage=SPAN)
        table["past_secret"] = label_flares(times, events, coverage=SPAN)[column].astype(float)
        return table

    with pytest.raises(LeakageError, match="past_secret"):
        check_past_features(leaky, times, events)


def test_a_feature_that_knows_a_flare_at_its_start_is_caught(events):
    # Counting by start time knows the class of a flare that is still rising: wrong by minutes, and found.
    times = events["start_time"].iloc[::50]

    def hasty(times, events):
        early = events.assign(peak_time=events["start_time"], end_time=events["start_time"])
        return past_features(times, early, windows=("1D",), coverage=SPAN)

    with pytest.raises(LeakageError, match="past_"):
        check_past_features(hasty, times, events, num_times=20)


def test_the_check_cannot_pass_on_nothing(events, times):
    with pytest.raises(ValueError, match="past_"):
        check_past_features(lambda times, events: pd.DataFrame({"a": np.zeros(len(times))}), times, events)
    with pytest.raises(ValueError, match="nothing could be tested"):
        check_past_features(past_features, [pd.Timestamp("2020-01-01")], events)


def test_a_table_with_the_target_in_it_is_refused(events, times):
    targets = label_flares(times, events, coverage=SPAN)
    features = history(times, events)
    check_feature_table(features, targets)
    check_feature_table(features.assign(unsigned_flux=np.random.default_rng(0).normal(size=len(times))), targets)
    with pytest.raises(LeakageError, match="target_flux"):
        check_feature_table(features.assign(target_flux=0.0), targets)
    with pytest.raises(LeakageError, match="label"):
        check_feature_table(features.join(targets[["label"]]), targets)
    disguises = {
        "renamed": targets["label"].map({0: 7.0, 1: -2.0, 2: 40.0, 3: 0.0}),
        "text": targets["label"].map({0: "quiet", 1: "small", 2: "large", 3: "huge"}),
        "one_threshold": targets["m_plus"].astype(float) + np.random.default_rng(1).uniform(0, 0.5, len(times)),
        "flux": -targets["target_flux"].fillna(0),
    }
    for name, column in disguises.items():
        with pytest.raises(LeakageError, match=name):
            check_feature_table(features.assign(**{name: column}), targets)
    with pytest.raises(ValueError, match="equal lengths"):
        check_feature_table(features.iloc[1:], targets)
