"""Flare lists: real files of NOAA/SWPC and NOAA/NCEI, their faults, and HEK's layout."""

import json
import logging

import numpy as np
import pandas as pd
import pytest

from solarchip_hf.data.flare_events import (
    EVENT_COLUMNS,
    disk_angle,
    flux_to_label,
    format_goes_class,
    parse_goes_class,
    read_flare_events,
    to_utc,
)


@pytest.fixture(scope="module")
def swpc(shared_data):
    return read_flare_events(shared_data / "swpc_flares_2010_2023.csv")


@pytest.fixture(scope="module")
def ncei(shared_data):
    return read_flare_events(shared_data / "goes_flare_report_excerpt.csv")


def test_swpc_list_is_read_whole_and_its_faults_are_counted(swpc):
    report = swpc.attrs["report"]
    assert report["rows_read"] == 22302
    assert report["duplicate_rows"] == 11
    assert report["identical_rows"] == 2
    assert report["peak_after_end"] == 6
    assert report["longer_than_12h"] == 14
    assert report["missing_location"] == 3380
    assert report["missing_region"] == 3037
    assert report["long_lived_regions"] == {"12005": 241.1, "12369": 186.3, "12984": 148.5}
    assert report["rows_kept"] == len(swpc) == 22302 - 11
    assert not swpc.duplicated(["start_time", "peak_time"]).any()
    assert json.loads(json.dumps(report)) == report  # may be written beside a result


def test_schema(swpc, ncei):
    for events in (swpc, ncei):
        assert tuple(events.columns) == EVENT_COLUMNS
        assert all(str(events[name].dtype) == "datetime64[ns, UTC]" for name in EVENT_COLUMNS[:3])
        assert events["flux"].dtype == np.float64
        assert str(events["noaa_ar"].dtype) == "Int64"
        assert events["start_time"].is_monotonic_increasing
    assert set(swpc["scale"]) == {"operational"}
    assert set(ncei["scale"]) == {"GOES-R"}
    assert set(swpc["source"]) == {"NOAA/SWPC"}
    assert set(ncei["source"]) == {"NOAA/NCEI"}


def test_x_flares_a_year(swpc):
    large = swpc[swpc["flux"] >= 1e-4]["start_time"].dt.year.value_counts()
    assert [int(large.get(year, 0)) for year in range(2010, 2024)] == [0, 8, 7, 12, 16, 2, 0, 4, 0, 0, 0, 2, 7, 8]


def test_the_more_complete_of_two_rows_of_one_flare_is_kept(swpc):
    # Two rows share this start and peak: B6.6 with a location, B7.1 without.
    row = swpc[swpc["start_time"] == pd.Timestamp("2015-02-20 21:56", tz="UTC")]
    assert row["goes_class"].tolist() == ["B6.6"]
    assert row["location"].tolist() == ["S20W87"]
    # Equally complete rows, C3.7 twice: the first is kept.
    row = swpc[swpc["start_time"] == pd.Timestamp("2023-02-14 05:08", tz="UTC")]
    assert row["end_time"].tolist() == [pd.Timestamp("2023-02-14 05:26", tz="UTC")]
    # Equally complete rows, C3.3 and C3.4 with a location on the first only.
    row = swpc[swpc["start_time"] == pd.Timestamp("2022-10-09 08:05", tz="UTC")]
    assert row["goes_class"].tolist() == ["C3.3"]


def test_faults_are_said_aloud(shared_data, caplog):
    with caplog.at_level(logging.WARNING):
        read_flare_events(shared_data / "swpc_flares_2010_2023.csv")
    assert "22291 of 22302" in caplog.text
    assert "'peak_after_end': 6" in caplog.text


def test_ncei_classes_agree_with_irradiances(shared_data, ncei):
    raw = pd.read_csv(shared_data / "goes_flare_report_excerpt.csv")
    irradiance = raw.sort_values("start_time")["xrsb_irrad"].to_numpy()
    assert len(ncei) == len(raw) == 20
    # A class has two figures and is truncated: it lies below the irradiance by less than a tenth of its decade.
    decade = 10 ** np.floor(np.log10(irradiance))
    assert (irradiance - ncei["flux"].to_numpy() > -1e-12).all()
    assert (irradiance - ncei["flux"].to_numpy() < 0.1 * decade).all()
    assert [format_goes_class(value) for value in irradiance] == ncei["goes_class"].tolist()


def test_ncei_oddities(ncei):
    no_end = ncei[ncei["end_time"].isna()]
    assert no_end["start_time"].tolist() == [pd.Timestamp("2011-03-23 16:48", tz="UTC")]
    assert no_end["location"].tolist() == ["S20E69"]
    assert no_end["noaa_ar"].tolist() == [11176]  # 1176 in the report
    assert ncei["noaa_ar"].isna().sum() == 6
    midnight = ncei[ncei["start_time"] == pd.Timestamp("2011-03-30 23:52", tz="UTC")].iloc[0]
    assert midnight["end_time"].day == 31


def test_classes_are_numbers_not_text():
    flux = parse_goes_class(["X9.3", "X13.3", "M1.0", "c", " b2.5 ", "A0.9"])
    np.testing.assert_array_equal(flux, [9.3e-4, 13.3e-4, 1e-5, 1e-6, 2.5e-7, 0.9e-8])
    assert flux[1] > flux[0]
    assert np.isnan(parse_goes_class(["", "D1.0", None, "M", "1.0", "M-1"])[[0, 1, 2, 4, 5]]).all()
    assert parse_goes_class("M2.0").shape == ()
    # Every class that a list can hold survives the round trip, thresholds included.
    names = [f"{letter}{tenths // 10}.{tenths % 10}" for letter in "BCM" for tenths in range(10, 100)]
    names += [f"X{tenths // 10}.{tenths % 10}" for tenths in range(10, 450)]
    assert [format_goes_class(value) for value in parse_goes_class(names)] == names
    assert format_goes_class(float("nan")) == ""
    np.testing.assert_array_equal(flux_to_label([np.nan, 9.9e-7, 1e-6, 9.9e-6, 1e-5, 1e-4]), [0, 0, 1, 1, 2, 3])


def test_bad_rows_are_dropped_and_counted(tmp_path):
    path = tmp_path / "flares.csv"
    path.write_text(
        "start_time,peak_time,end_time,goes_class,location,noaa_ar\n"
        "2012-01-01 01:00,2012-01-01 01:05,2012-01-01 01:10,M1.0,N10W20,1389\n"
        "not a time,2012-01-01 02:05,2012-01-01 02:10,M1.0,,\n"
        "2012-01-01 03:00,2012-01-01 03:05,2012-01-01 03:10,huge,,0\n"
        "2012-01-01 05:00,2012-01-01 04:55,2012-01-01 04:50,C1.0,,0\n"
    )
    events = read_flare_events(path)
    report = events.attrs["report"]
    assert report["unreadable_times"] == report["unreadable_classes"] == 1
    assert report["end_before_start"] == report["peak_before_start"] == report["peak_after_end"] == 1
    assert events["goes_class"].tolist() == ["M1.0", "C1.0"]
    assert events["noaa_ar"].iloc[0] == 11389
    assert events["noaa_ar"].isna().iloc[1]


def test_classes_of_other_spellings(tmp_path):
    path = tmp_path / "flares.csv"
    rows = [f"2012-01-01 0{hour}:00,,,{text}" for hour, text in enumerate(["c", "M2", "m3.", "X10+", "x28.0", "B9.87"])]
    path.write_text("start_time,peak_time,end_time,goes_class\n" + "\n".join(rows) + "\n")
    events = read_flare_events(path)
    assert events["goes_class"].tolist() == ["C1.0", "M2.0", "M3.0", "X10.0", "X28.0", "B9.87"]
    np.testing.assert_array_equal(events["flux"], [1e-6, 2e-5, 3e-5, 1e-3, 2.8e-3, 9.87e-7])
    assert events.attrs["report"]["saturated_classes"] == 1
    assert tuple(events.columns) == EVENT_COLUMNS


def test_a_saved_table_reads_back_the_same(ncei, tmp_path):
    ncei.to_csv(tmp_path / "events.csv", index=False)
    again = read_flare_events(tmp_path / "events.csv")
    pd.testing.assert_frame_equal(again, ncei)


def test_scales_are_not_joined(shared_data):
    paths = [shared_data / "swpc_flares_2010_2023.csv", shared_data / "goes_flare_report_excerpt.csv"]
    with pytest.raises(ValueError, match="one irradiance scale"):
        read_flare_events(paths)


def test_files_of_one_source_are_joined(shared_data, tmp_path, ncei):
    lines = (shared_data / "goes_flare_report_excerpt.csv").read_text().splitlines(keepends=True)
    parts = [tmp_path / "a.csv", tmp_path / "b.csv"]
    parts[0].write_text("".join(lines[:12]))
    parts[1].write_text("".join([lines[0], *lines[11:]]))  # one row in both files
    joined = read_flare_events(parts)
    assert joined.attrs["report"]["identical_rows"] == 1
    pd.testing.assert_frame_equal(joined, ncei)


def test_unknown_columns_are_refused(tmp_path):
    (tmp_path / "x.csv").write_text("when,what\n2012-01-01,M1.0\n")
    with pytest.raises(ValueError, match=r"x\.csv: expected the columns"):
        read_flare_events(tmp_path / "x.csv")


def test_a_file_that_is_no_list_is_refused(sdo_folder, tmp_path):
    image = next(sdo_folder.rglob("*.fits"))
    with pytest.raises(ValueError, match=r"\.fits: expected a flare list as CSV"):
        read_flare_events(image)
    (tmp_path / "empty.csv").touch()
    with pytest.raises(ValueError, match=r"empty\.csv: expected a flare list as CSV"):
        read_flare_events(tmp_path / "empty.csv")


def test_hek_table_keeps_one_recognition_method():
    time = pytest.importorskip("astropy.time").Time
    table = pytest.importorskip("astropy.table").Table(
        {
            "event_starttime": time(["2011-02-15T01:44:00", "2011-02-15T01:44:08", "2011-02-16T14:19:00"]),
            "event_peaktime": time(["2011-02-15T01:56:00", "2011-02-15T01:56:08", "2011-02-16T14:25:00"]),
            "event_endtime": time(["2011-02-15T02:06:00", "2011-02-15T02:10:00", "2011-02-16T14:29:00"]),
            "fl_goescls": ["X2.2", "", "M1.6"],
            "ar_noaanum": [11158, 0, 11158],
            "hgs_x": [12.0, 11.0, 30.0],
            "hgs_y": [-20.0, -19.0, -20.0],
            "frm_name": ["SWPC", "Flare Detective - Trigger Module", "SWPC"],
        }
    )
    events = read_flare_events(table)
    assert events["goes_class"].tolist() == ["X2.2", "M1.6"]
    assert events["location"].tolist() == ["S20W12", "S20W30"]
    assert events["start_time"].iloc[0] == pd.Timestamp("2011-02-15 01:44", tz="UTC")
    assert set(events["scale"]) == {"operational"}
    assert set(events["source"]) == {"HEK"}
    assert events.attrs["report"]["other_recognition_methods"] == 1
    records = [dict(zip(table.colnames, map(str, row), strict=True)) for row in table]
    pd.testing.assert_frame_equal(read_flare_events(records), events)
    hidden = time(["2011-02-15T02:06:00", "2011-02-15T02:10:00", "2011-02-16T14:29:00"])
    hidden[2] = np.ma.masked
    table["event_endtime"] = hidden
    table = type(table)(table, masked=True)
    table["ar_noaanum"].mask = [False, False, True]
    events = read_flare_events(table)
    assert events["end_time"].isna().tolist() == [False, True]
    assert events["noaa_ar"].isna().tolist() == [False, True]


def test_times_and_places():
    naive, aware = to_utc("2012-01-01 00:00"), to_utc([pd.Timestamp("2012-01-01 09:00", tz="Asia/Tokyo")])
    assert (naive == aware).all()
    with pytest.raises(ValueError, match="1 missing"):
        to_utc(["2012-01-01", None])
    np.testing.assert_allclose(disk_angle(["N00E90", "N00W00", "S60E60", None])[:3], [90, 0, 75.522], atol=1e-3)
    assert np.isnan(disk_angle([None])).all()


def test_synthetic_list_says_so():
    sun = pytest.importorskip("solarchip_hf.data.synthetic_sun").SyntheticSun(seed=0, days=120)
    report = sun.flares()
    events = read_flare_events(report)
    assert len(events) > 20
    assert set(events["source"]) == {"synthetic"}
    assert events["noaa_ar"].notna().all()
    assert events["location"].notna().all()
    # Never mixed with another scale without a word: science-quality by construction.
    assert set(events["scale"]) == {"GOES-R"}
