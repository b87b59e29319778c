"""Splits in time: nothing of one part within the gap of another, nothing empty, nothing twice."""

import numpy as np
import pandas as pd
import pytest

from solarchip_hf.data.splits import chronological_split, split_labels


def irregular(count, seed=0):
    """Times in random order over about two years, with repeats and holes."""
    rng = np.random.default_rng(seed)
    hours = np.concatenate([rng.integers(0, 8000, count // 2), rng.integers(10000, 18000, count - count // 2)])
    return pd.Series(pd.Timestamp("2015-01-01", tz="UTC") + pd.to_timedelta(rng.permutation(hours), unit="h"))


def check(times, parts, gap):
    times = pd.DatetimeIndex(times).tz_localize(None)
    everything = np.concatenate(list(parts.values()))
    assert len(everything) == len(set(everything.tolist()))
    names = list(parts)
    for before, after in [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]:
        distance = times[parts[after]].to_numpy()[None, :] - times[parts[before]].to_numpy()[:, None]
        assert distance.min() >= pd.Timedelta(gap).to_timedelta64()
    for positions in parts.values():
        assert len(positions)
        assert (np.diff(times[positions].to_numpy()) >= np.timedelta64(0)).all()


@pytest.mark.parametrize("gap", ["0D", "27D", "41D"])
@pytest.mark.parametrize("seed", range(3))
def test_no_observation_lies_within_the_gap_of_another_part(gap, seed):
    times = irregular(700, seed)
    check(times, chronological_split(times, gap=gap), gap)
    borders = {"train": "2015-09-01", "validation": "2016-06-01", "test": None}
    parts = chronological_split(times, borders, gap=gap)
    check(times, parts, gap)
    assert times.iloc[parts["train"]].max() < pd.Timestamp("2015-09-01", tz="UTC")
    assert times.iloc[parts["validation"]].max() < pd.Timestamp("2016-06-01", tz="UTC")


def test_shares_are_kept_and_no_more_is_dropped_than_the_gap_asks():
    times = pd.date_range("2010-05-01", periods=5000, freq="D", tz="UTC")
    parts = chronological_split(times, {"train": 0.8, "test": 0.2})
    assert parts["train"].tolist() == list(range(4000))
    assert parts["test"].tolist() == list(range(4026, 5000))  # 27 days after the last of train
    without = chronological_split(times, {"train": 0.8, "test": 0.2}, gap="0D")
    assert sum(map(len, without.values())) == 5000


def test_one_moment_is_never_on_two_sides():
    times = pd.to_datetime(["2015-01-01"] * 5 + ["2015-03-01"] * 5 + ["2015-06-01"] * 5)
    parts = chronological_split(times, {"train": 0.5, "test": 0.5}, gap="1D")
    assert parts["train"].tolist() == list(range(10))
    assert parts["test"].tolist() == list(range(10, 15))


def test_labels_agree_with_positions_and_mark_the_gap():
    times = irregular(300)
    labels = split_labels(times)
    for name, positions in chronological_split(times).items():
        assert set(np.flatnonzero(labels == name)) == set(positions)
    assert (labels == "gap").sum() == 300 - sum(len(p) for p in chronological_split(times).values()) > 0
    with pytest.raises(ValueError, match="other than 'gap'"):
        split_labels(times, {"gap": 0.5, "train": 0.5})


def test_naive_and_zoned_times_and_arrays_give_the_same():
    zoned = irregular(200)
    expected = chronological_split(zoned)
    naive = zoned.dt.tz_localize(None)
    for times in (naive, naive.to_numpy(), zoned.tolist(), zoned.dt.tz_convert("Asia/Tokyo"), pd.DatetimeIndex(zoned)):
        parts = chronological_split(times)
        assert all((parts[name] == expected[name]).all() for name in expected)


@pytest.mark.parametrize(
    ("parts", "gap", "message"),
    [
        ({"train": 0.7, "test": 0.7}, "27D", "add up to 1"),
        ({"train": 1.5, "test": -0.5}, "27D", "positive shares"),
        ({"train": 0.5, "test": "2016-01-01"}, "27D", "either shares or end times"),
        ({"train": None, "test": None}, "27D", "None for the last part only"),
        ({"train": "2016-01-01", "test": "2015-01-01"}, "27D", "that increase"),
        ({"train": "2010-01-01", "test": None}, "27D", "got none in 'train'"),
        ({"train": 0.5, "test": 0.5}, "900D", "got none in 'test'"),
        ({}, "27D", "at least one name"),
        (None, "-1D", "zero or more"),
    ],
)
def test_ill_posed_splits_are_refused(parts, gap, message):
    with pytest.raises(ValueError, match=message):
        chronological_split(irregular(300), parts, gap=gap)


def test_missing_times_are_refused():
    times = irregular(10)
    times.iloc[3] = pd.NaT
    with pytest.raises(ValueError, match="1 missing"):
        chronological_split(times)
    with pytest.raises(ValueError, match="got none"):
        chronological_split([])
