"""Labels ahead, history behind: against slow recounts on the real list, and windows made by hand."""

import numpy as np
import pandas as pd
import pytest

from solarchip_hf.data.flare_events import read_flare_events
from solarchip_hf.data.flare_labels import (
    known_times,
    label_calendar_days,
    label_flares,
    past_features,
    trailing_day_rates,
)

# Days whose largest flare stands in two rows of different class, of which the reader keeps the more complete one.
DAYS_OF_TWO_ROWS = ("2015-02-20", "2022-10-09")
SPAN = ("2010-01-01", "2023-06-27")


@pytest.fixture(scope="module")
def swpc(shared_data):
    return read_flare_events(shared_data / "swpc_flares_2010_2023.csv")


@pytest.fixture(scope="module")
def ncei(shared_data):
    return read_flare_events(shared_data / "goes_flare_report_excerpt.csv")


def flares(*rows, scale="GOES-R"):
    """Events from (start, peak, end, class)."""
    table = pd.DataFrame(rows, columns=["start_time", "peak_time", "end_time", "goes_class"])
    return read_flare_events(table, scale=scale)


def test_daily_labels_equal_a_slow_recount(swpc, shared_data):
    days = pd.date_range("2010-01-01", "2023-06-28", freq="D")
    labels = label_calendar_days(days, swpc, coverage=SPAN)
    # The recount reads the file by itself, a line at a time, and knows nothing of the package.
    best = {}
    for line in (shared_data / "swpc_flares_2010_2023.csv").read_text().splitlines()[1:]:
        start, _, _, goes_class, *_ = line.split(",")
        rank = ("ABCMX".index(goes_class[0]), float(goes_class[1:]))
        best[start[:10]] = max(best.get(start[:10], (-1, 0.0)), rank)
    checked = 0
    for day, label, name, covered in zip(days, labels["label"], labels["target_class"], labels["covered"], strict=True):
        key = str(day.date())
        if key > "2023-06-26":
            assert (label, name, covered) == (-1, "", False)
            continue
        rank = best.get(key)
        expected = 0 if rank is None else max(0, rank[0] - 1)
        assert label == expected, key
        found = ("ABCMX".index(name[0]), float(name[1:])) if name else None
        if key not in DAYS_OF_TWO_ROWS:
            assert found == rank, key
        checked += 1
    assert checked == 4925
    assert np.bincount(labels["label"][labels["covered"]]).tolist() == [2547, 1741, 576, 61]


def test_rolling_windows_equal_a_slow_recount(swpc):
    rng = np.random.default_rng(0)
    times = pd.Timestamp("2011-01-01", tz="UTC") + pd.to_timedelta(rng.integers(0, 4000 * 1440, 300), unit="min")
    for by, horizon, latency in (("start", "24h", "0h"), ("peak", "12h", "3h")):
        labels = label_flares(pd.Series(times), swpc, horizon, by=by, coverage=SPAN, latency=latency)
        for row, t in enumerate(times):
            begin, end = t + pd.Timedelta(latency), t + pd.Timedelta(latency) + pd.Timedelta(horizon)
            moment = swpc["start_time"]
            if by == "peak":
                sane = (swpc["peak_time"] <= swpc["end_time"]) & (
                    swpc["peak_time"] - swpc["start_time"] <= pd.Timedelta("12h")
                )
                moment = swpc["peak_time"].where(sane, swpc["start_time"])
            inside = swpc[(moment > begin) & (moment <= end)]
            flux = inside["flux"].max() if len(inside) else 0.0
            assert labels["label"][row] == sum(bool(flux >= threshold) for threshold in (1e-6, 1e-5, 1e-4))
            assert np.nan_to_num(labels["target_flux"][row]) == flux
            large = inside[inside["flux"] >= 1e-6]["flux"].sum() / 1e-6
            assert labels["target_cumulative"][row] == pytest.approx(large, abs=1e-5)
            going = (swpc["start_time"] <= t) & (swpc["end_time"] > t)
            going &= swpc["end_time"] - swpc["start_time"] <= pd.Timedelta("12h")
            assert not going.any() or labels["ongoing"][row]
    assert labels["ongoing"].any()


def test_the_flare_across_midnight(ncei):
    # B6.2 starts 2011-03-30 23:52, peaks 23:59, ends on the 31st; moved by 10 minutes, it peaks on the 31st.
    days = ["2011-03-30", "2011-03-31"]
    span = ("2011-03-17", "2011-04-01")
    alone = ncei[ncei["start_time"] == pd.Timestamp("2011-03-30 23:52", tz="UTC")].copy()
    assert label_calendar_days(days, alone, coverage=span)["target_class"].tolist() == ["B6.2", ""]
    later = alone.assign(
        start_time=alone["start_time"] + pd.Timedelta("5min"), peak_time=alone["peak_time"] + pd.Timedelta("2min")
    )
    assert label_calendar_days(days, later, by="start", coverage=span)["target_class"].tolist() == ["B6.2", ""]
    assert label_calendar_days(days, later, by="peak", coverage=span)["target_class"].tolist() == ["", "B6.2"]
    # Among the others, both days have C flares.
    assert label_calendar_days(days, ncei, coverage=span)["target_class"].tolist() == ["C2.7", "C3.8"]


def test_window_is_open_at_t_and_closed_at_its_end():
    events = flares(
        ("2012-01-01 00:00", "2012-01-01 00:05", "2012-01-01 00:10", "M1.0"),
        ("2012-01-02 00:00", "2012-01-02 00:05", "2012-01-02 00:10", "X1.0"),
    )
    span = ("2011-12-01", "2012-02-01")
    labels = label_flares(["2011-12-31", "2012-01-01", "2012-01-02"], events, coverage=span)
    assert labels["target_class"].tolist() == ["M1.0", "X1.0", ""]
    assert labels["label"].tolist() == [2, 3, 0]
    assert labels["m_plus"].tolist() == [True, True, False]
    assert labels["x_plus"].tolist() == [False, True, False]
    assert labels["target_cumulative"].tolist() == [10.0, 100.0, 0.0]
    assert labels["ongoing"].tolist() == [False, True, True]
    # The calendar day is closed at its beginning instead.
    assert label_calendar_days(["2012-01-01"], events, coverage=span)["target_class"].tolist() == ["M1.0"]
    # With a latency of a minute the flare at the window's end is out of reach of the first, and the last window moves.
    assert label_flares(["2011-12-31"], events, "24h", coverage=span, latency="1min")["label"].tolist() == [2]
    assert label_flares(["2012-01-01"], events, "24h", coverage=span, latency="1h")["label"].tolist() == [3]
    assert label_flares(["2012-01-01"], events, "23h", coverage=span)["label"].tolist() == [0]
    by_peak = label_flares(["2012-01-01"], events, by="peak", coverage=span)
    assert by_peak["target_class"].tolist() == ["M1.0"]


def test_uncovered_is_unknown_not_quiet(swpc):
    times = ["2009-12-31", "2010-01-01", "2023-06-25 23:00", "2023-06-26 01:00", "2030-01-01"]
    labels = label_flares(times, swpc, coverage=SPAN)
    assert labels["covered"].tolist() == [False, True, True, False, False]
    assert labels["label"].tolist()[0] == labels["label"].tolist()[-1] == -1
    assert labels["m_plus"].isna().tolist() == [True, False, False, True, True]
    assert labels["target_class"][~labels["covered"]].eq("").all()
    assert labels["target_flux"][~labels["covered"]].isna().all()
    # Without being told, only what lies between the first and the last flare is known.
    derived = label_flares(["2010-01-01 12:01", "2010-01-01 12:02", "2023-06-25 22:16", "2023-06-25 22:17"], swpc)
    assert derived["covered"].tolist() == [False, True, True, False]
    assert not label_flares(times, swpc.iloc[:0])["covered"].any()


def test_coverage_with_a_hole(swpc):
    spans = [("2012-01-01", "2012-03-01"), ("2012-04-01", "2012-06-01"), ("2012-05-01", "2012-07-01")]
    times = ["2012-02-28", "2012-02-29 12:00", "2012-03-15", "2012-03-31 12:00", "2012-04-01", "2012-05-31 12:00"]
    assert label_flares(times, swpc, coverage=spans)["covered"].tolist() == [True, False, False, False, True, True]
    with pytest.raises(ValueError, match="start before end"):
        label_flares(times, swpc, coverage=("2013-01-01", "2012-01-01"))
    array = np.array(spans, dtype="datetime64[ns]")
    assert label_flares(times, swpc, coverage=array)["covered"].tolist() == [True, False, False, False, True, True]
    for wrong in (["2012-01-01", "2012-02-01", "2012-03-01"], [("2012-01-01",)], "2012"):
        with pytest.raises(ValueError, match="coverage: expected a pair"):
            label_flares(times, swpc, coverage=wrong)


def test_nominal_slots_keep_the_day(swpc):
    nominal = pd.date_range("2011-01-01", "2015-12-31", freq="D")
    right = label_calendar_days(nominal, swpc, coverage=SPAN)
    with pytest.warns(UserWarning, match="TAI slots"):
        wrong = label_calendar_days(nominal - pd.Timedelta("37s"), swpc, coverage=SPAN)
    days = right["m_plus"].to_numpy(dtype=bool)
    lost = days & ~wrong["m_plus"].to_numpy(dtype=bool)
    assert 0.4 < lost.sum() / days.sum() < 0.7  # half of the M days would lose theirs


def test_times_of_every_kind(swpc):
    span = {"coverage": SPAN}
    naive = label_flares(["2014-01-06 12:00"], swpc, **span)
    assert naive.index[0] == pd.Timestamp("2014-01-06 12:00", tz="UTC")
    aware = label_flares([pd.Timestamp("2014-01-06 21:00", tz="Asia/Tokyo")], swpc, **span)
    numpy = label_flares(np.array(["2014-01-06T12:00"], dtype="datetime64[s]"), swpc, **span)
    single = label_flares("2014-01-06 12:00", swpc, **span)
    for other in (aware, numpy, single):
        pd.testing.assert_frame_equal(naive, other)
    series = pd.Series(pd.to_datetime(["2014-01-06 12:00"]), index=["row"])
    assert label_flares(series, swpc, **span).index.tolist() == ["row"]


def test_times_that_are_no_iso_are_refused_in_a_sentence(swpc):
    with pytest.raises(
        ValueError, match=r"^times: expected times in ISO 8601, such as .*1 Jan 2014.*[^\n]$"
    ) as refused:
        label_flares(["1 Jan 2014"], swpc, coverage=SPAN)
    assert "\n" not in str(refused.value)
    events = swpc.head(3).assign(start_time=["2012-01-01 00:00", "01/02/2012", "2012-01-03"])
    with pytest.raises(ValueError, match=r"^start_time: expected times in ISO 8601"):
        label_flares(["2012-01-01"], events, coverage=SPAN)


def test_events_made_by_hand():
    events = pd.DataFrame(
        {
            "start_time": ["2012-01-01 00:00", "2012-01-02T00:00:00.5"],
            "peak_time": [None, "2012-01-02T00:05:00"],
            "end_time": [None, "2012-01-02T00:10:00Z"],
            "goes_class": ["M1.0", "X1.0"],
            "flux": [1e-5, 1e-4],
        }
    )
    labels = label_flares(["2011-12-31", "2012-01-01"], events, coverage=("2011-12-01", "2012-02-01"))
    assert labels["target_class"].tolist() == ["M1.0", ""]
    assert labels["target_location"].isna().all()
    assert labels.attrs["scale"] == ""
    for function in (label_flares, label_calendar_days, past_features, trailing_day_rates):
        with pytest.raises(ValueError, match="read_flare_events"):
            function(["2012-01-01"], events.drop(columns=["flux", "end_time"]))


def test_bad_arguments(swpc, ncei):
    with pytest.raises(ValueError, match="'start' or 'peak'"):
        label_flares(["2014-01-01"], swpc, by="end")
    with pytest.raises(ValueError, match="horizon: expected a positive time"):
        label_flares(["2014-01-01"], swpc, "0h")
    mixed = pd.concat([swpc, ncei])
    for function in (label_flares, label_calendar_days, past_features, trailing_day_rates):
        with pytest.raises(ValueError, match="one irradiance scale"):
            function(["2014-01-01"], mixed)
    drawn = pd.concat([ncei, ncei.assign(source="synthetic")])
    with pytest.raises(ValueError, match="real or synthetic"):
        label_flares(["2014-01-01"], drawn)


def test_a_hundred_thousand_times_are_quick(swpc):
    times = pd.date_range("2010-01-01", periods=100_000, freq="h")
    labels = label_flares(times, swpc, coverage=SPAN)
    assert len(labels) == 100_000
    assert labels["label"].max() == 3
    assert labels["target_location"].notna().any()


def test_past_features_by_hand():
    events = flares(
        ("2012-01-10 00:00", "2012-01-10 00:10", "2012-01-10 00:30", "M2.0"),
        ("2012-01-10 10:00", "2012-01-10 10:10", "2012-01-10 10:30", "C5.0"),
        ("2012-01-10 23:50", "2012-01-11 00:10", "2012-01-11 00:30", "X1.0"),
    )
    features = past_features(
        ["2012-01-11 00:00", "2012-01-11 00:29", "2012-01-11 00:30"],
        events,
        windows=("1D", "3D"),
        coverage=("2011-12-01", "2012-02-01"),
    )
    # The X flare is in progress until 00:30: before its end neither class nor end is known.
    assert features["past_x_rate_1d"].tolist() == [0.0, 0.0, 1.0]
    assert features["past_m_rate_1d"].tolist() == [1.0, 1.0, 1.0]  # at 00:30 the M flare leaves the window
    assert features["past_c_rate_1d"].tolist() == [2.0, 2.0, 2.0]
    assert features["past_c_rate_3d"].tolist() == pytest.approx([2 / 3, 2 / 3, 1.0])
    assert features["past_label_1d"].tolist() == [2.0, 2.0, 3.0]
    np.testing.assert_allclose(features["past_log_flux_1d"], [np.log10(2e-5), np.log10(2e-5), -4])
    np.testing.assert_allclose(features["past_days_since_m"], [23.5 / 24, (23.5 + 29 / 60) / 24, 0], atol=1e-9)
    late = past_features(["2012-01-11 00:30"], events, windows=("1D",), latency="1h", coverage=("2011-12-01", "2013"))
    assert late["past_x_rate_1d"].tolist() == [0.0]
    # Ten days into the coverage 27 days of history are unknown, not quiet.
    young = past_features(["2012-01-11"], events, coverage=("2012-01-01", "2012-02-01"))
    assert young["past_m_rate_27d"].isna().all()
    assert young["past_days_since_m"].isna().all()
    assert young["past_m_rate_7d"].notna().all()


def test_trailing_rate_equals_a_slow_recount(swpc):
    times = pd.date_range("2010-01-05 07:00", "2016-01-01", periods=40, tz="UTC")
    rates = trailing_day_rates(times, swpc, coverage=SPAN)
    known = pd.to_datetime(known_times(swpc), utc=True)
    large = {str(day.date()) for day in known[(swpc["flux"] >= 1e-5).to_numpy()]}
    for t, share, counted in zip(times, rates["past_m_days_365d"], rates["past_days_counted_365d"], strict=True):
        days = [t.floor("D") - pd.Timedelta(days=k) for k in range(1, 366)]
        days = [day for day in days if day >= pd.Timestamp(SPAN[0], tz="UTC")]
        assert counted == len(days)
        if len(days) < 27:
            assert np.isnan(share)
        else:
            assert share == pytest.approx(sum(str(day.date()) in large for day in days) / len(days))
    assert rates["past_m_days_365d"].notna().sum() >= 39
