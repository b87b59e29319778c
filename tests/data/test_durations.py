"""Lengths of time, and what is none."""

import numpy as np
import pandas as pd
import pytest

from solarchip_hf.data.durations import read_duration, read_time, write_duration


@pytest.mark.parametrize("value", ["6min", pd.Timedelta("6min"), "0 days 00:06:00"])
def test_what_pandas_takes_is_read(value):
    assert read_duration(value, "tolerance") == pd.Timedelta(minutes=6)


@pytest.mark.parametrize("value", ["sixmin", "-1h", "0h", None, "NaT", object()])
def test_what_is_none_is_refused_by_name(value):
    with pytest.raises(ValueError, match="latency: expected a positive time such as '6min'"):
        read_duration(value, "latency")


def test_none_at_all_where_it_will_do():
    assert read_duration("0h", "gap", zero=True) == pd.Timedelta(0)
    with pytest.raises(ValueError, match="gap: expected a time of zero or more"):
        read_duration("-1s", "gap", zero=True)


@pytest.mark.parametrize(
    "value",
    ["2014-06-01", "2014.06.01", "20140601", "1 Jun 2014", "2014-06-01T02:00+02:00", np.datetime64("2014-06-01")],
)
def test_dates_of_every_kind(value):
    assert read_time(value, "start") == pd.Timestamp("2014-06-01", tz="UTC")


@pytest.mark.parametrize("value", ["2014-13-01", "fortnight", "14-06-01", "10:30", "", None, 2014, 1.5e9, "27D"])
def test_what_is_no_date_is_refused_by_name(value):
    with pytest.raises(ValueError, match="start: expected a date or a time in UTC, such as '2014-06-01'"):
        read_time(value, "start")


@pytest.mark.parametrize(
    ("value", "text"), [("1D", "24h"), ("0h", "0h"), ("90min", "90min"), ("1 days 00:00:00", "24h")]
)
def test_lengths_are_written_as_they_are_read(value, text):
    assert write_duration(pd.Timedelta(value)) == text
    assert read_duration(text, "horizon", zero=True) == pd.Timedelta(value)
