"""Pairing: real groups found, nearest files, no file twice, duplicates by the stated rule, every file accounted for."""

import numpy as np
import pandas as pd
import pytest

from solarchip_hf.data.catalog import scan_archive
from solarchip_hf.data.pairing import pair_observations


def catalog(*rows):
    """A catalogue of (modality, time) or (modality, time, overrides)."""
    table = []
    for number, (modality, time, *rest) in enumerate(rows):
        stamp = pd.Timestamp(time, tz="UTC")
        row = {
            "path": f"/archive/{number:03d}.fits",
            "modality": modality,
            "time": stamp,
            "time_nominal": stamp.round("12min" if modality == "hmi" else "2min"),
            "full_disk": True,
            "usable": True,
            "instrument": "X",
            "quality": 0,
            "near_real_time": False,
            "approximate": False,
            "rsun_arcsec": 960.0,
            "b0": 1.0,
            "l0": 2.0,
        }
        table.append(row | (rest[0] if rest else {}))
    return pd.DataFrame(table)


def accounted(pairs, files):
    """Every file is used once or dropped for one reason."""
    report = pairs.attrs["report"]
    paths = pairs[pairs.attrs["modalities"]].to_numpy(dtype=object).ravel()
    used = [path for path in paths if path is not None]
    assert len(used) == len(set(used)) == report["used"]
    assert report["used"] + sum(report["dropped"].values()) == report["files"] == files
    assert all(count > 0 for count in report["dropped"].values())


@pytest.fixture(scope="module")
def real(sdo_folder):
    return scan_archive(sdo_folder, progress=False)


def test_real_groups_are_found_within_a_minute(real):
    pairs = pair_observations(real, "1min", "aia171")
    accounted(pairs, len(real))
    of_2024 = pairs[pairs["time"].dt.year == 2024].squeeze()
    present = {name for name in pairs.attrs["modalities"] if of_2024[name] is not None}
    assert present == {"aia131", "aia171", "aia193", "aia211", "aia304", "aia335", "aia1600", "aia1700"}
    for name in present:
        assert of_2024[name].endswith(f"AIAsynoptic{name[3:].zfill(4)}.fits")
        assert abs(of_2024[f"{name}_difference"]) < 18
    assert of_2024["time_nominal"] == pd.Timestamp("2024-10-04T16:18Z")
    assert not of_2024["approximate"]
    of_2021 = pairs[pairs["time"].dt.year == 2021].squeeze()
    assert of_2021["observed"] == 2
    assert of_2021["aia304"].endswith("2021_06_01__00_01_29_132__SDO_AIA_AIA_304.jp2")
    assert of_2021["aia304_difference"] == pytest.approx(8.2, abs=0.5)
    assert of_2021["approximate"]
    assert (pairs["observed"] > 1).sum() == 2


def test_missing_anchor_names_what_there_is(real):
    with pytest.raises(ValueError, match=r"got 'hmi' with none.*aia171 \(7\).*Pass one as anchor="):
        pair_observations(real[real["modality"] != "hmi"])


def test_anchor_that_is_only_unusable_is_missing(real):
    continuum_only = real[real["path"].str.contains("resampled_hmi|AIAsynoptic0171")]
    with pytest.raises(ValueError, match=r"1 no modality of ours.*aia171 \(1\)"):
        pair_observations(continuum_only)


def test_hmi_on_tai_and_1700_two_minutes_late_meet_in_one_row():
    pairs = pair_observations(
        catalog(
            ("hmi", "2014-12-31T23:59:25", {"time_nominal": pd.Timestamp("2015-01-01", tz="UTC")}),
            ("aia171", "2015-01-01T00:00:01"),
            ("aia1700", "2015-01-01T00:02:01"),
        )
    )
    assert len(pairs) == 1
    row = pairs.iloc[0]
    assert row["time_nominal"] == pd.Timestamp("2015-01-01T00:00Z")
    assert row["aia171_difference"] == 36.0
    assert row["aia1700_difference"] == 156.0
    assert row["hmi_difference"] == 0.0
    assert row["observed"] == 3


def test_tolerance_is_inclusive_and_what_is_missing_is_none():
    rows = catalog(
        ("hmi", "2015-01-01T00:00:00"),
        ("aia171", "2015-01-01T00:06:00"),
        ("aia193", "2015-01-01T00:06:01"),
    )
    pairs = pair_observations(rows)
    accounted(pairs, 3)
    assert pairs.loc[0, "aia171"] == "/archive/001.fits"
    assert pairs.loc[0, "aia193"] is None
    assert np.isnan(pairs.loc[0, "aia193_difference"])
    assert pairs.attrs["report"]["missing"] == {"hmi": 0, "aia171": 0, "aia193": 1}
    assert pairs.attrs["report"]["dropped"] == {"no anchor of its own within the tolerance": 1}


def test_a_file_serves_its_nearest_anchor_only_and_the_other_takes_the_next():
    rows = catalog(
        ("aia171", "2015-01-01T00:00:00"),
        ("aia171", "2015-01-01T00:04:00"),
        ("aia193", "2015-01-01T00:01:54"),  # nearest to both
        ("aia193", "2015-01-01T00:07:00"),
        ("aia211", "2015-01-01T00:03:00"),
    )
    pairs = pair_observations(rows, anchor="aia171")
    accounted(pairs, 5)
    assert pairs["aia193"].tolist() == ["/archive/002.fits", "/archive/003.fits"]
    assert pairs["aia211"].tolist() == [None, "/archive/004.fits"]


def test_matching_equals_a_plain_loop_where_slots_do_not_compete():
    rng = np.random.default_rng(0)
    start = pd.Timestamp("2015-01-01")
    rows = [("hmi", start + pd.Timedelta(hours=i)) for i in range(200)]
    for name in ("aia171", "aia304"):
        keep = rng.random(200) < 0.8
        offsets = rng.uniform(-600, 600, 200)
        rows += [(name, start + pd.Timedelta(hours=i, seconds=offsets[i])) for i in range(200) if keep[i]]
    table = catalog(*rows)
    pairs = pair_observations(table.sample(frac=1, random_state=0), "6min")
    accounted(pairs, len(table))
    for name in ("aia171", "aia304"):
        files = table[table["modality"] == name]
        for row in pairs.itertuples():
            away = (files["time"] - row.time).abs()
            expected = files.loc[away.idxmin(), "path"] if away.min() <= pd.Timedelta("6min") else None
            assert getattr(row, name) == expected


def test_duplicates_are_resolved_by_the_stated_rule():
    at = "2015-01-01T00:00:10"
    rows = catalog(
        ("hmi", "2015-01-01T00:00:00"),
        ("aia171", at, {"near_real_time": True}),
        ("aia171", at, {"approximate": True}),
        ("aia171", at, {"quality": 256}),
        ("aia171", at),
        ("aia171", at, {"path": "/archive/zzz.fits"}),
        ("aia193", at, {"near_real_time": True, "quality": 1 << 30}),
        ("aia193", at, {"approximate": True}),
    )
    pairs = pair_observations(rows)
    accounted(pairs, 8)
    assert pairs.loc[0, "aia171"] == "/archive/004.fits"
    assert pairs.loc[0, "aia193"] == "/archive/007.fits"
    assert pairs.attrs["report"]["dropped"] == {"duplicate of the same moment": 5}


def test_one_anchor_a_slot_and_quicklooks_only_fill_gaps():
    rows = catalog(
        ("hmi", "2015-01-01T00:00:05"),
        ("hmi", "2015-01-01T00:01:00"),  # the same slot, further away
        ("aia171", "2015-01-01T00:00:06", {"approximate": True}),
        ("aia171", "2015-01-01T00:05:00"),
        ("aia193", "2015-01-01T00:00:06", {"approximate": True}),
    )
    pairs = pair_observations(rows)
    accounted(pairs, 5)
    assert pairs["hmi"].tolist() == ["/archive/000.fits"]
    assert pairs.loc[0, "aia171"] == "/archive/003.fits"
    assert pairs.loc[0, "aia193"] == "/archive/004.fits"
    without = pair_observations(rows, approximate=False)
    accounted(without, 5)
    assert "aia193" not in without
    assert without.attrs["report"]["dropped"]["quick-look"] == 2


def test_unusable_partial_and_foreign_files_are_dropped_and_counted():
    rows = catalog(
        ("hmi", "2015-01-01T00:00:00"),
        ("aia171", "2015-01-01T00:00:00", {"usable": False}),
        ("aia193", "2015-01-01T00:00:00", {"full_disk": False, "usable": False}),
        (None, "2015-01-01T00:00:00", {"usable": False}),
        (None, "2015-01-01T00:00:00", {"usable": False, "instrument": None}),
        ("aia304", "2015-01-01T00:00:00", {"near_real_time": True}),
    )
    pairs = pair_observations(rows, near_real_time=False)
    accounted(pairs, 6)
    assert pairs.attrs["modalities"] == ["hmi"]
    assert pairs.attrs["report"]["dropped"] == {
        "unreadable": 1,
        "no modality of ours": 1,
        "partial disk": 1,
        "not usable (quality, exposure or time)": 1,
        "near real time": 1,
    }


def test_dropped_files_are_listed_one_by_one():
    rows = catalog(
        ("hmi", "2015-01-01T00:00:00"),
        ("hmi", "2015-01-01T00:00:00", {"near_real_time": True}),
        ("aia171", "2015-01-01T00:00:00", {"usable": False}),
        ("aia193", "2015-01-01T00:00:00"),
        ("aia304", "2015-01-02T00:00:00"),
        ("hmi", "2015-01-03T00:00:00"),
    )
    pairs, dropped = pair_observations(
        rows, modalities=["hmi", "aia304", "aia193"], min_observed=2, return_dropped=True
    )
    accounted(pairs, 6)
    assert dict(zip(dropped["path"], dropped["dropped"], strict=True)) == {
        "/archive/001.fits": "duplicate of the same moment",
        "/archive/002.fits": "not usable (quality, exposure or time)",
        "/archive/004.fits": "no anchor of its own within the tolerance",
        "/archive/005.fits": "observation with fewer than 2 modalities",
    }
    assert pairs.loc[0, ["hmi", "aia193"]].tolist() == ["/archive/000.fits", "/archive/003.fits"]


def test_rows_with_too_few_modalities_can_be_dropped():
    rows = catalog(("hmi", "2015-01-01"), ("hmi", "2015-01-02"), ("aia171", "2015-01-02"), ("aia193", "2015-01-02"))
    pairs = pair_observations(rows, min_observed=2, modalities=["hmi", "0171"])
    accounted(pairs, 4)
    assert pairs["time_nominal"].tolist() == [pd.Timestamp("2015-01-02", tz="UTC")]
    assert pairs.attrs["modalities"] == ["hmi", "aia171"]


def test_table_survives_parquet_with_its_report(tmp_path):
    pairs = pair_observations(catalog(("hmi", "2015-01-01"), ("aia171", "2015-01-01")))
    pairs.to_parquet(tmp_path / "pairs.parquet")
    again = pd.read_parquet(tmp_path / "pairs.parquet")
    assert again.attrs == pairs.attrs
    assert again["hmi"].tolist() == pairs["hmi"].tolist()
    assert again["time"].tolist() == pairs["time"].tolist()


def test_ill_posed_calls_are_refused():
    rows = catalog(("hmi", "2015-01-01"), ("aia171", "2015-01-01"))
    with pytest.raises(ValueError, match="tolerance: expected a positive time"):
        pair_observations(rows, "0min")
    with pytest.raises(ValueError, match="without \\['usable'\\]"):
        pair_observations(rows.drop(columns="usable"))
    with pytest.raises(ValueError, match="expected the anchor 'hmi' among them"):
        pair_observations(rows, modalities=["aia171"])
    with pytest.raises(ValueError, match="expected one of hmi"):
        pair_observations(rows, anchor="xrt")
