"""Time stamps, cards, pointing, radius and quality words of headers."""

import json
import pickle
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone

import numpy as np
import pytest
from astropy.io import fits
from astropy.time import Time
from astropy.wcs import WCS

from solarchip_hf.models.header_cards import calendar_time, number, parse_time, plain_cards, text, try_time
from solarchip_hf.models.headers import SolarImage, SolarImageError
from solarchip_hf.models.pointing import earth_sun_distance, read_pointing
from solarchip_hf.models.quality import decode_quality, parse_quality
from solarchip_hf.models.readers import read_image

BASE = {
    "INSTRUME": "AIA_3",
    "CTYPE1": "HPLN-TAN",
    "CTYPE2": "HPLT-TAN",
    "CUNIT1": "arcsec",
    "CUNIT2": "arcsec",
    "CRPIX1": 50.0,
    "CRPIX2": 60.0,
    "CRVAL1": 3.0,
    "CRVAL2": -2.0,
    "CDELT1": 2.4,
    "CDELT2": 2.4,
    "CROTA2": 0.0,
    "RSUN_OBS": 959.65,
    "DSUN_OBS": 149596840624.3,
    "CRLT_OBS": 6.5,
    "CRLN_OBS": 160.9,
}
NOON = datetime(2014, 3, 1, 12, tzinfo=UTC)


def pointing(**changes):
    header = {name: value for name, value in (BASE | changes).items() if value is not None}
    return read_pointing(header, "test.fits", NOON)


def test_error_is_one_sentence_and_crosses_processes():
    error = SolarImageError("a.fits", "CONTENT", "'MAGNETOGRAM'", "'DOPPLERGRAM'", "Fetch hmi.M_720s.")
    assert str(error) == "a.fits: CONTENT: expected 'MAGNETOGRAM', got 'DOPPLERGRAM'. Fetch hmi.M_720s."
    assert isinstance(error, ValueError)
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error)
    assert (again.fieldname, again.advice) == (error.fieldname, error.advice)


def test_solar_image_is_small_and_picklable():
    facts = dict.fromkeys(("modality", "time", "time_nominal", "exposure", "quality"))
    image = SolarImage(
        data=np.zeros((3, 4), np.float32),
        source="x",
        instrument="AIA",
        near_real_time=False,
        unit="DN",
        crpix=(1.0, 1.0),
        crval=(0.0, 0.0),
        cdelt=(1.0, 1.0),
        rotation=((1.0, 0.0), (0.0, 1.0)),
        rsun_arcsec=960.0,
        **facts,
    )
    assert image.shape == (3, 4)
    assert pickle.loads(pickle.dumps(image)).rsun_arcsec == 960.0


def test_times_of_a_record_are_utc(sdo_folder):
    image = read_image(sdo_folder / "AIAsynoptic0171.fits", header_only=True)
    naive = replace(image, time=image.time.replace(tzinfo=None))
    elsewhere = replace(image, time=image.time.astimezone(timezone(timedelta(hours=9))))
    for changed in (naive, elsewhere):
        assert changed.time == image.time
        assert changed.time.tzinfo is UTC


@pytest.mark.parametrize(
    ("stamp", "expected"),
    [
        ("2024.01.01_00:00:00_TAI", "2023-12-31T23:59:23"),
        ("2012.06.30_23:59:59_TAI", "2012-06-30T23:59:25"),
        ("2014-01-01T00:00:12.34Z", "2014-01-01T00:00:12.340"),
        ("2024-10-04T16:17:57.354", "2024-10-04T16:17:57.354"),
        ("2010.10.15_00:03:30.000_TAI", "2010-10-15T00:02:56"),
        ("2011-02-15", "2011-02-15T00:00:00"),
        ("2013/03/10 12:00", "2013-03-10T12:00:00"),
        ("2016-12-31T23:59:60", "2017-01-01T00:00:00"),
        ("2020.02.07_16:21:05_UTC", "2020-02-07T16:21:05"),
    ],
)
def test_time_stamps(stamp, expected):
    assert parse_time(stamp) == datetime.fromisoformat(expected).replace(tzinfo=UTC)


@pytest.mark.parametrize("year", range(1996, 2027, 2))
def test_tai_agrees_with_astropy(year):
    for month in (1, 7):
        stamp = f"{year}.{month:02d}.01_00:10:00_TAI"
        reference = Time(f"{year}-{month:02d}-01T00:10:00", scale="tai").utc.to_datetime(timezone=UTC)
        assert abs(parse_time(stamp) - reference) < timedelta(milliseconds=1)


def test_a_bare_stamp_follows_the_default_scale():
    bare = "2020-01-01T00:00:00"
    assert parse_time(bare) - parse_time(bare, default_scale="TAI") == timedelta(seconds=37)
    assert parse_time(bare + "Z", default_scale="TAI") == parse_time(bare)


@pytest.mark.parametrize(
    "stamp", ["-4712.01.01_11:59:28_TAI", "", "yesterday", "2024-13-01", "1980.01.01_00:00:00_TAI"]
)
def test_nonsense_times_are_refused(stamp):
    with pytest.raises(ValueError, match=r"time stamp|month"):
        parse_time(stamp)


def test_a_date_alone_takes_its_time_of_day_from_the_card_beside_it():
    header = {"DATE-OBS": "2014-03-01", "TIME-OBS": "06:30:15.5"}
    assert try_time(header, "DATE-OBS") == datetime(2014, 3, 1, 6, 30, 15, 500000, tzinfo=UTC)
    assert try_time({"date_obs": "2014/03/01", "time_obs": "06:30"}, "DATE_OBS") == datetime(
        2014, 3, 1, 6, 30, tzinfo=UTC
    )
    whole = {"DATE-OBS": "2014-03-01T12:00:00", "TIME-OBS": "06:30:00"}
    assert try_time(whole, "DATE-OBS") == NOON
    assert try_time({"DATE-OBS": "2014-03-01"}, "DATE-OBS") == datetime(2014, 3, 1, tzinfo=UTC)


def test_calendar_time_keeps_the_date_of_the_slot():
    assert calendar_time("2024.01.01_00:00:00_TAI") == (datetime(2024, 1, 1), "TAI")


def test_cards_are_plain_and_case_blind():
    header = fits.Header([("A", 1), ("B", " x "), ("C", "nan"), ("D", None), ("TFORM1", "1J"), ("ZIMAGE", True)])
    assert number(header, "A") == number({"a": np.float32(1)}, "A") == 1.0
    assert number(header, "C", "A") == 1.0
    assert number({"A": True}, "A") is None
    assert text(header, "D", "B") == "x"
    meta = {"crval1": np.float64(3.5), "bad": float("nan"), "mask": np.True_, "keycomments": {"a": "b"}, "tform1": "x"}
    cards = plain_cards(meta)
    assert cards == {"CRVAL1": 3.5, "BAD": None, "MASK": True}
    assert json.loads(json.dumps(cards)) == cards


ROTATED = np.cos(np.radians(179.93)), np.sin(np.radians(179.93))


@pytest.mark.parametrize(
    "changes",
    [
        {"CROTA2": 0.0},
        {"CROTA2": 179.93},
        {"CROTA2": -30.0, "CDELT1": 2.0, "CDELT2": 3.0},
        {"CROTA2": None, "PC1_1": ROTATED[0], "PC1_2": -ROTATED[1], "PC2_1": ROTATED[1], "PC2_2": ROTATED[0]},
        {"CROTA2": None, "PC1_2": 0.1, "PC2_1": -0.1},
        {"CROTA2": None, "CDELT1": None, "CDELT2": None, "CD1_1": -2.4, "CD1_2": 0.1, "CD2_1": 0.1, "CD2_2": 2.4},
        {
            "CUNIT1": "deg",
            "CUNIT2": "deg",
            "CDELT1": 2.4 / 3600,
            "CDELT2": 2.4 / 3600,
            "CRVAL1": 0.001,
            "CRVAL2": -0.0005,
            "CROTA2": 10.0,
        },
        {"CRPIX1": -300.5, "CRPIX2": 4000.0},
    ],
)
def test_linear_wcs_agrees_with_astropy(changes):
    header = {name: value for name, value in (BASE | changes).items() if value is not None}
    found = pointing(**changes)
    wcs = WCS(fits.Header(header))
    ours = np.diag(found.cdelt) @ np.array(found.rotation) / 3600
    np.testing.assert_allclose(ours, wcs.pixel_scale_matrix, atol=1e-12)
    assert found.crpix == tuple(wcs.wcs.crpix)
    np.testing.assert_allclose(np.array(found.crval) / 3600, wcs.wcs.crval, atol=1e-12)
    (x, y), half = found.disk_extent()
    sky = wcs.all_pix2world([[x, y]], 1)[0]
    # the tangent projection departs from the linear part by less than 0.04 arcsec
    assert abs((sky[0] + 180) % 360 - 180) < 1e-5
    assert abs(sky[1]) < 1e-5
    assert half[0] > 0


def test_pc_counts_where_crota2_contradicts_it():
    found = pointing(CROTA2=179.9, PC1_1=1.0, PC2_2=1.0)
    np.testing.assert_allclose(found.rotation, np.eye(2), atol=1e-12)
    assert any("contradicts" in note for note in found.notes)


@pytest.mark.parametrize(
    ("changes", "card"),
    [
        ({"CRPIX1": None}, "CRPIX1"),
        ({"CRPIX2": "nan"}, "CRPIX2"),
        ({"CDELT1": None}, "CDELT1"),
        ({"CDELT2": 0.0}, "CDELT1"),
        ({"CUNIT1": "parsec"}, "CUNIT1"),
        ({"INSTRUME": "HMI_SIDE1", "CROTA2": None}, "CROTA2"),
        ({"PC1_1": 0.0, "PC2_2": 0.0}, "CDELT1"),
    ],
)
def test_broken_wcs_is_refused_by_card(changes, card):
    with pytest.raises(SolarImageError, match=r"test\.fits: ") as caught:
        pointing(**changes)
    assert caught.value.fieldname == card


def test_missing_rotation_of_aia_is_noted():
    assert any("north assumed up" in note for note in pointing(CROTA2=None).notes)


def test_r_sun_is_never_used():
    assert pointing(R_SUN=1600.78).rsun_arcsec == 959.65


@pytest.mark.parametrize("nonsense", [0.0, None, -959.0, 1600.78, "nan"])
def test_radius_from_distance(nonsense):
    found = pointing(RSUN_OBS=nonsense)
    assert found.rsun_arcsec == pytest.approx(959.6514, abs=2e-3)  # what JSOC wrote for this DSUN_OBS
    assert any("computed from DSUN_OBS" in note for note in found.notes)


@pytest.mark.parametrize("day", ["2011-01-03", "2014-04-10", "2019-07-04", "2024-10-04", "2026-12-01"])
def test_radius_from_date_agrees_with_sunpy(day):
    sun = pytest.importorskip("sunpy.coordinates.sun")
    time = datetime.fromisoformat(day).replace(tzinfo=UTC)
    distance = sun.earth_distance(Time(time)).to_value("m")
    assert earth_sun_distance(time) == pytest.approx(distance, rel=2e-4)
    header = BASE | {"RSUN_OBS": 0.0, "DSUN_OBS": 1.0}
    found = read_pointing(header, "test.fits", time)
    assert found.rsun_arcsec == pytest.approx(np.degrees(np.arcsin(6.96e8 / distance)) * 3600, rel=2e-4)
    assert any("computed from the date" in note for note in found.notes)


def test_radius_without_any_source_is_refused():
    with pytest.raises(SolarImageError, match="RSUN_OBS"):
        read_pointing(BASE | {"RSUN_OBS": 0.0, "DSUN_OBS": 0.0}, "test.fits", None)


@pytest.mark.parametrize(
    ("changes", "full"),
    [
        ({"CRPIX1": 512.5, "CRPIX2": 512.5, "CRVAL1": 0.0, "CRVAL2": 0.0}, True),
        ({"CRPIX1": 512.5, "CRPIX2": 512.5, "CRVAL1": 0.0, "CRVAL2": 0.0, "CROTA2": 45.0}, True),
        ({"CRPIX1": 402.0, "CRPIX2": 512.5}, True),
        ({"CRPIX1": 395.0, "CRPIX2": 512.5}, False),
        ({"CRPIX1": 512.5, "CRPIX2": 512.5, "CDELT1": 1.8, "CDELT2": 1.8}, False),
        ({"CRPIX1": 512.5, "CRPIX2": 2000.0}, False),
        # the reference pixel far outside, and yet the Sun in the middle
        ({"CRPIX1": -487.5, "CRPIX2": 512.5, "CRVAL1": -2400.0, "CRVAL2": 0.0}, True),
    ],
)
def test_full_disk(changes, full):
    assert pointing(**changes).full_disk((1024, 1024)) is full


def test_quality_bits_belong_to_the_instrument():
    near_real_time = 1 << 30
    assert decode_quality("AIA", near_real_time) == ((), ())
    assert decode_quality("HMI", near_real_time)[0]
    for bit in (9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 20, 21, 31):
        assert len(decode_quality("AIA", 1 << bit)[0]) == 1, bit
    for bit in (*range(17, 32), 7, 9):
        assert len(decode_quality("HMI", 1 << bit)[0]) == 1, bit
    for bit in (3, 8):
        assert decode_quality("AIA", 1 << bit)[0] == ()
        assert len(decode_quality("AIA", 1 << bit)[1]) == 1
    for bit in (5, 8, 11, 14):
        assert decode_quality("HMI", 1 << bit)[0] == ()
        assert len(decode_quality("HMI", 1 << bit)[1]) == 1
    assert decode_quality("HMI", 1 << 10) == ((), ())
    assert decode_quality("MDI", 0xFFFFFFFF) == ((), ())
    assert decode_quality("AIA", None) == ((), ())


@pytest.mark.parametrize(
    ("card", "word"),
    [
        (0, 0),
        (1073741824, 1 << 30),
        (-2147483648, 1 << 31),
        ("0x00000400", 1024),
        (1024.0, 1024),
        ("", None),
        (None, None),
    ],
)
def test_quality_word(card, word):
    assert parse_quality(card) == word
