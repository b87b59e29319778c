"""Splits in time: nothing of one part within the gap of another, nothing empty, nothing twice."""

import numpy as np
import pandas as pd
import pytest

from solarchip_hf.data.splits import blocked_folds, chronological_split, split_labels


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


def test_times_of_every_kind():
    times = pd.date_range("2012-01-01", periods=1000, freq="D")
    expected = chronological_split(times)
    texts = [f"{time:%Y-%m-%dT%H:%M:%S}" + (".000" if row % 2 else "") for row, time in enumerate(times)]
    table = pd.DataFrame({"time_nominal": times.tz_localize("UTC"), "path": "file"})
    for given in (times.to_numpy(), list(times), times.tz_localize("Asia/Tokyo"), texts, table, table["time_nominal"]):
        for name, positions in chronological_split(given).items():
            assert positions.tolist() == expected[name].tolist()
    with pytest.raises(ValueError, match="time_nominal"):
        chronological_split(table[["path"]])


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


def cycle(days=3000, seed=0):
    """Daily times over a cycle, and large flares that come in clusters round its maximum only."""
    rng = np.random.default_rng(seed)
    times = pd.Series(pd.date_range("2010-05-01", periods=days, freq="D", tz="UTC"))
    chance = 0.4 * np.exp(-(((np.arange(days) - days / 3) / (days / 6)) ** 2)) * np.repeat(
        rng.random(days // 30 + 1) < 0.5, 30
    )[:days]  # fmt: skip
    return times, rng.random(days) < chance


@pytest.mark.parametrize("gap", ["27D", "41D"])
@pytest.mark.parametrize("seed", range(3))
def test_folds_hold_both_classes_and_keep_their_distance(gap, seed):
    times, flares = cycle(seed=seed)
    shuffled = np.random.default_rng(seed).permutation(len(times))
    times, flares = times.iloc[shuffled], flares[shuffled]
    folds = blocked_folds(times, flares, folds=5, gap=gap)
    moments = times.dt.tz_localize(None).to_numpy()
    assert sorted(np.concatenate([fold.test for fold in folds]).tolist()) == list(range(len(times)))
    rates = [flares[fold.test].mean() for fold in folds]
    assert min(rates) > 0.5 * flares.mean()
    assert max(rates) < 2 * flares.mean()
    for fold in folds:
        assert not fold.missing
        assert fold.test_counts == {0: int((~flares[fold.test]).sum()), 1: int(flares[fold.test].sum())}
        assert fold.train_counts == {0: int((~flares[fold.train]).sum()), 1: int(flares[fold.train].sum())}
        distance = np.abs(moments[fold.test][:, None] - moments[fold.train][None, :]).min()
        assert distance >= pd.Timedelta(gap).to_timedelta64()
        inside = np.zeros(len(times), dtype=bool)
        for first, last in fold.spans:
            inside |= ((times >= first) & (times <= last)).to_numpy()
        assert set(np.flatnonzero(inside)) == set(fold.test)
        # no more is lost than the gaps ask for
        lost = len(times) - len(fold.train) - len(fold.test)
        assert lost <= 2 * pd.Timedelta(gap).days * len(fold.spans)


def test_folds_of_one_long_block_would_not_hold_both_classes():
    _, flares = cycle()
    parts = [flares[part] for part in np.array_split(np.arange(3000), 5)]
    assert not all(part.any() for part in parts)  # what the dealing out of blocks is for


def test_folds_that_lack_a_class_say_so():
    times = pd.date_range("2015-01-01", periods=1500, freq="D", tz="UTC")
    flares = np.zeros(1500, dtype=bool)
    flares[100:110] = True  # one cluster: it can be in one fold only
    with pytest.warns(UserWarning, match=r"fold 1 lacks \{'test': \[1\]\}.*skill there is undefined"):
        folds = blocked_folds(times, flares, folds=3)
    holder = [fold for fold in folds if flares[fold.test].any()]
    assert len(holder) == 1
    assert holder[0].missing == {"train": [1]}
    assert all(fold.missing == {"test": [1]} for fold in folds if fold is not holder[0])
    with pytest.warns(UserWarning, match="all 1500 observations are of one class"):
        blocked_folds(times, np.zeros(1500), folds=3)


def test_folds_leave_out_what_has_no_known_class_and_take_several():
    times, flares = cycle()
    label = np.where(flares, 2, np.arange(3000) % 2)
    label[::50] = -1
    folds = blocked_folds(times, label, folds=4, block="81D")
    assert sorted(np.concatenate([fold.test for fold in folds]).tolist()) == np.flatnonzero(label >= 0).tolist()
    assert all(not fold.missing and set(fold.test_counts) == {0, 1, 2} for fold in folds)
    unknown = pd.Series(flares, dtype="boolean").mask(np.arange(3000) % 7 == 0)
    assert sum(len(fold.test) for fold in blocked_folds(times, unknown)) == int(unknown.notna().sum())
    plain = blocked_folds(times, folds=2, block="365D")
    assert [fold.missing for fold in plain] == [{}, {}]
    assert max(len(fold.test) for fold in plain) - min(len(fold.test) for fold in plain) <= 365


def test_ill_posed_folds_are_refused():
    times, flares = cycle(300)
    with pytest.raises(ValueError, match="at least 5 blocks of 135 days"):
        blocked_folds(times, flares)
    with pytest.raises(ValueError, match="folds: expected 2 or more"):
        blocked_folds(times, flares, folds=1)
    with pytest.raises(ValueError, match="each of 300"):
        blocked_folds(times, flares[:10])
    with pytest.raises(ValueError, match="something to fit on"):
        blocked_folds(times, folds=2, block="27D", gap="41D")
    with pytest.raises(ValueError, match="whole numbers"):
        blocked_folds(times, np.full(300, 0.5))
