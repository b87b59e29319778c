"""FITS files, HDUs and Maps to `SolarImage`: real files, synthetic ones, damaged ones."""

import gzip
import io
import json
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest
from astropy import units as u
from astropy.io import fits

from solarchip_hf.models.headers import SolarImageError
from solarchip_hf.models.readers import read_image, require_modality

AIA_CARDS = {
    "TELESCOP": "SDO/AIA",
    "INSTRUME": "AIA_3",
    "WAVELNTH": 171,
    "T_OBS": "2024-01-01T00:02:10.34Z",
    "DATE-OBS": "2024-01-01T00:02:09.34",
    "EXPTIME": 1.9996,
    "QUALITY": 0,
    "CTYPE1": "HPLN-TAN",
    "CTYPE2": "HPLT-TAN",
    "CUNIT1": "arcsec",
    "CUNIT2": "arcsec",
    "CRPIX1": 20.5,
    "CRPIX2": 20.5,
    "CRVAL1": 0.0,
    "CRVAL2": 0.0,
    "CDELT1": 60.0,
    "CDELT2": 60.0,
    "CROTA2": 0.0,
    "RSUN_OBS": 975.5,
    "DSUN_OBS": 1.4710e11,
    "CRLT_OBS": -3.0,
    "CRLN_OBS": 10.0,
}
HMI_CARDS = AIA_CARDS | {
    "TELESCOP": "SDO/HMI",
    "INSTRUME": "HMI_COMBINED",
    "WAVELNTH": 6173.0,
    "CONTENT": "MAGNETOGRAM",
    "BUNIT": "Mx/cm^2",
    "T_REC": "2024.01.01_00:00:00_TAI",
    "T_OBS": "2024.01.01_00:00:04_TAI",
    "DATE-OBS": "2023-12-31T23:58:19.5",
    "CROTA2": 179.93,
    "QLOOK": 0,
}
GRID = (np.arange(40 * 40).reshape(40, 40) % 977 - 300).astype(np.int32)


def fits_bytes(data=GRID, *, compress=False, base=AIA_CARDS, empty_primary=None, raw_cards=None, **changes):
    """A FITS file with the cards of `base`; `raw_cards` are set in the stored header, bypassing astropy's scaling."""
    header = fits.Header()
    for name, value in (base | {key.replace("__", "-"): value for key, value in changes.items()}).items():
        if value is not None:
            header[name] = value
    if compress:
        units = [fits.PrimaryHDU(), fits.CompImageHDU(data, header, compression_type="RICE_1", tile_shape=(1, 40))]
    elif empty_primary is not None:
        units = [fits.PrimaryHDU(header=fits.Header(empty_primary)), fits.ImageHDU(data, header)]
    else:
        units = [fits.PrimaryHDU(data, header)]
    stream = io.BytesIO()
    fits.HDUList(units).writeto(stream)
    if raw_cards:
        stream.seek(0)
        with fits.open(stream, disable_image_compression=True, do_not_scale_image_data=True) as stored:
            stored[-1].data  # noqa: B018 (loads before the cards change)
            stored[-1].header.update(raw_cards)
            changed = io.BytesIO()
            stored.writeto(changed)
        stream = changed
    return stream.getvalue()


# file, modality, unit, shape, plate scale, whole disk, near real time, usable, nominal slot
REAL = [
    *(
        (f"AIAsynoptic{w:04d}.fits", f"aia{w}", "DN", (1024, 1024), 2.4, True, True, True, "2024-10-04T16:18")
        for w in (131, 171, 193, 211, 304, 335, 1600, 1700)
    ),
    ("aia_171_level1.fits", "aia171", "DN", (128, 128), 19.183648, True, False, True, "2011-02-15T00:00"),
    ("aia_171_cutout.fits", "aia171", "DN", (705, 769), 0.599489, False, False, False, "2013-03-10T12:00:12"),
    ("resampled_hmi.fits", None, "DN/s", (100, 100), 20.655759, True, False, False, "2014-03-01T00:01:30"),
    (
        "mdi.fd_m_96m_lev182.20101015_000000_TAI.data.fits",
        *(None, "G", (1024, 1024), 1.986008, True, False, False, "2010-10-15T00:00"),
    ),
    (
        "hmi.sharp_cea_720s.377.20110215_020000_TAI.magnetogram.fits",
        *(None, "G", (377, 744), None, False, False, False, "2011-02-15T02:00"),
    ),
    (
        "hmi.sharp_cea_720s.1449.20120306_202400_TAI.magnetogram.fits",
        *(None, "G", (460, 1167), None, False, False, False, "2012-03-06T20:24"),
    ),
]


@pytest.mark.parametrize(("name", "modality", "unit", "shape", "scale", "full", "nrt", "usable", "slot"), REAL)
def test_real_files(sdo_folder, name, modality, unit, shape, scale, full, nrt, usable, slot):
    image = read_image(sdo_folder / name)
    assert (image.modality, image.unit, image.shape) == (modality, unit, shape)
    assert (image.full_disk, image.near_real_time, image.usable) == (full, nrt, usable)
    assert bool(image.reason) is not usable
    assert image.time_nominal == datetime.fromisoformat(slot).replace(tzinfo=UTC)
    assert abs(image.time - image.time_nominal) < timedelta(minutes=4)
    assert image.source == str(sdo_folder / name)
    assert not image.approximate
    if scale is not None:
        assert image.cdelt == pytest.approx((scale, scale), rel=1e-6)
    assert 940 < image.rsun_arcsec < 980
    assert image.data.dtype == np.float32
    with fits.open(sdo_folder / name) as units:
        reference = units[-1].data
    np.testing.assert_allclose(image.data, reference, rtol=1e-6, equal_nan=True)
    assert json.loads(json.dumps(image.header)) == image.header

    facts = read_image(sdo_folder / name, header_only=True)
    assert facts.shape == shape
    assert facts.data.strides == (0, 0)
    assert np.isnan(facts.data[0, 0])
    for field in ("modality", "time", "time_nominal", "unit", "crpix", "full_disk", "reason", "notes", "header"):
        assert getattr(facts, field) == getattr(image, field), field


def test_real_facts_in_detail(sdo_folder):
    image = read_image(sdo_folder / "AIAsynoptic0171.fits")
    assert image.time == datetime(2024, 10, 4, 16, 17, 58, 354000, tzinfo=UTC)
    assert (image.exposure, image.quality, image.instrument) == (1.999577, 1 << 30, "AIA")
    assert (image.b0, image.l0) == (6.52521038, 160.941788)
    assert image.rsun_arcsec == pytest.approx(959.651437)
    assert image.observer_distance == pytest.approx(149596840624.29)
    assert (image.crpix, image.crval, image.rotation) == ((512.5, 512.5), (0.0, 0.0), ((1.0, 0.0), (0.0, 1.0)))
    assert "R_SUN" in image.header
    assert "ZCMPTYPE" not in image.header
    assert "TFORM1" not in image.header
    level1 = read_image(sdo_folder / "aia_171_level1.fits")
    assert level1.crval == pytest.approx((-4.532172, 2.865575), abs=1e-5)
    assert level1.rotation[1][0] == pytest.approx(np.sin(np.radians(0.019413)))


@pytest.mark.parametrize(
    ("name", "card", "said"),
    [
        ("resampled_hmi.fits", "CONTENT", "expected 'MAGNETOGRAM', got 'CONTINUUM INTENSITY'"),
        (
            "mdi.fd_m_96m_lev182.20101015_000000_TAI.data.fits",
            "INSTRUME",
            "pass modality='hmi' to read it all the same",
        ),
        ("hmi.sharp_cea_720s.377.20110215_020000_TAI.magnetogram.fits", "CTYPE1", "'CRLN-CEA'"),
        ("aia_171_cutout.fits", "full disk", "with the disk cut off"),
    ],
)
def test_require_modality_says_why_not(sdo_folder, name, card, said):
    image = read_image(sdo_folder / name, header_only=True)
    with pytest.raises(SolarImageError, match=said) as caught:
        require_modality(image)
    assert caught.value.fieldname == card
    assert name in str(caught.value)


def test_mdi_is_read_when_told_so(sdo_folder):
    path = sdo_folder / "mdi.fd_m_96m_lev182.20101015_000000_TAI.data.fits"
    told = read_image(path, modality="hmi")
    assert (told.modality, told.usable, told.unit, told.exposure) == ("hmi", True, "G", None)
    assert told.time == datetime(2010, 10, 15, 0, 2, 56, tzinfo=UTC)
    assert any("because modality= says so" in note for note in told.notes)
    assert require_modality(told) == require_modality(read_image(path, header_only=True), "hmi") == "hmi"
    with pytest.raises(SolarImageError, match="INSTRUME"):
        read_image(path, modality="aia171")


def test_being_told_does_not_turn_a_continuum_image_or_a_patch_into_a_magnetogram(sdo_folder):
    with pytest.raises(SolarImageError, match="CONTINUUM INTENSITY"):
        read_image(sdo_folder / "resampled_hmi.fits", modality="hmi")
    with pytest.raises(SolarImageError, match="CRLN-CEA"):
        read_image(sdo_folder / "hmi.sharp_cea_720s.377.20110215_020000_TAI.magnetogram.fits", modality="hmi")
    with pytest.raises(SolarImageError, match="WAVELNTH: expected an image of aia193, got aia171"):
        read_image(sdo_folder / "AIAsynoptic0171.fits", modality="193")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("broken/html_not_fits.fits", "got an HTML or XML page"),
        ("broken/truncated_aia20200207_162100_0193.fits", "at least 4208704 bytes as the header says, got 32484 bytes"),
        ("HMI20130131_0000_bz.npz", "pass it with modality="),
    ],
)
@pytest.mark.parametrize("header_only", [False, True])
def test_real_broken_files(sdo_folder, name, said, header_only):
    with pytest.raises(SolarImageError, match=said) as caught:
        read_image(sdo_folder / name, header_only=header_only)
    assert str(sdo_folder / name) in str(caught.value)


def test_damaged_heap_of_a_real_file(sdo_folder):
    content = bytearray((sdo_folder / "aia_171_cutout.fits").read_bytes())
    content[-40000] ^= 0xFF
    with pytest.raises(SolarImageError, match="DATASUM"):
        read_image(bytes(content))
    sums = content.find(b"DATASUM ")
    content[sums : sums + 8] = b"OLDSUM  "  # without the sum the decoder must notice
    content[-60000:-40000] = b"\xff" * 20000
    with pytest.raises(SolarImageError, match="compressed data"):
        read_image(bytes(content))


@pytest.mark.parametrize("share", [0.001, 0.2, 0.9, 0.999])
@pytest.mark.parametrize("header_only", [False, True])
def test_truncated_anywhere(share, header_only):
    content = fits_bytes(compress=True)
    whole = content.rstrip(b"\0")  # cutting only the padding is harmless
    with pytest.raises(SolarImageError, match=r"truncated|empty|begins with"):
        read_image(whole[: int(len(whole) * share)], header_only=header_only)


def test_file_without_its_last_padding_is_read():
    content = fits_bytes(GRID)
    assert np.array_equal(read_image(content[: len(content) - (-GRID.nbytes % 2880)]).data, GRID)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "an empty file"),
        (b"<!DOCTYPE html><html>404</html>", "an HTML or XML page"),
        (b"\x89HDF\r\n\x1a\n", "HDF5"),
        (b"\x89PNG\r\n", "PNG"),
        (b"\x00" * 5000, "5000 bytes that begin with"),
        (b"SIMPLE  =                    T" + b" " * 6000, "an END card"),
        (gzip.compress(b"SIMPLE  =")[:-4], "a whole gzip file"),
        (b"\x1f\x8bnot gzip at all", "a whole gzip file"),
        (gzip.compress(b"<html>"), "an HTML or XML page"),
    ],
)
@pytest.mark.parametrize("header_only", [False, True])
def test_not_fits(content, said, header_only, tmp_path):
    path = tmp_path / "file.fits"
    path.write_bytes(content)
    for source in (content, path, str(path)):
        with pytest.raises(SolarImageError, match=said):
            read_image(source, header_only=header_only)


def test_random_damage_gives_an_image_or_a_sentence():
    content = fits_bytes(compress=True)
    header_end = content.index(b"END     ", content.index(b"XTENSION"))
    random = np.random.default_rng(7)
    refused = 0
    for trial in range(150):
        damaged = bytearray(content)
        for place in random.integers(0, header_end, size=random.choice([1, 5, 20])):
            damaged[place] = random.choice([random.integers(256), ord("9"), ord("'"), ord(" "), ord("-")])
        try:
            assert read_image(bytes(damaged), header_only=bool(trial % 2)).shape[0] > 0
        except SolarImageError:
            refused += 1
    assert 20 < refused < 150


@pytest.mark.parametrize("shape", [(3, 40, 40), (1, 40, 40), (40,)])
def test_cubes_and_spectra_are_refused(shape):
    with pytest.raises(SolarImageError, match=r"NAXIS: expected a two-dimensional image, got \d axes"):
        read_image(fits_bytes(np.zeros(shape, np.int16)))
    with pytest.raises(SolarImageError, match="NAXIS"):
        read_image(fits.ImageHDU(np.zeros(shape, np.int16)))


def test_file_of_tables_only():
    table = fits.BinTableHDU.from_columns([fits.Column("a", "J", array=[1, 2])])
    stream = io.BytesIO()
    fits.HDUList([fits.PrimaryHDU(), table]).writeto(stream)
    with pytest.raises(SolarImageError, match="2 HDUs without an image"):
        read_image(stream.getvalue())


@pytest.mark.parametrize("compress", [False, True])
def test_scaled_integers_with_blank(compress):
    stored = GRID.copy()
    stored[3, 4] = -(2**31)
    content = fits_bytes(stored, compress=compress, raw_cards={"BSCALE": 0.1, "BZERO": 5.0, "BLANK": -(2**31)})
    image = read_image(content)
    expected = stored * 0.1 + 5.0
    expected[3, 4] = np.nan
    np.testing.assert_allclose(image.data, expected, rtol=1e-6, atol=1e-6)
    assert image.data.dtype == np.float32
    assert image.data.flags.writeable


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.float32, np.float64])
def test_every_pixel_type(dtype, compress):
    data = np.abs(GRID).astype(dtype)
    content = fits_bytes(data, compress=compress)
    image = read_image(content)
    tolerance = 0.5 if compress and data.dtype.kind == "f" else 0  # Rice quantises floats
    np.testing.assert_allclose(image.data, data, atol=tolerance)
    assert image.data.dtype == np.float32
    assert image.data.dtype.isnative


def test_float_data_with_blank_and_infinities():
    data = GRID.astype(np.float64)
    data[0, 0], data[1, 1], data[2, 2] = np.nan, np.inf, 1e300
    image = read_image(fits_bytes(data, raw_cards={"BLANK": 5}))
    assert np.isnan(image.data[[0, 1, 2], [0, 1, 2]]).all()
    assert np.isfinite(image.data).sum() == data.size - 3  # BLANK means nothing in float data
    assert 5 in image.data


def test_gzip_and_image_in_the_second_unit(tmp_path):
    content = fits_bytes(GRID, empty_primary={})
    plain = read_image(content)
    path = tmp_path / "image.fits.gz"
    path.write_bytes(gzip.compress(content))
    for source in (path, gzip.compress(content)):
        assert np.array_equal(read_image(source).data, plain.data)
        assert read_image(source, header_only=True).header == plain.header
    assert np.array_equal(plain.data, GRID)


def test_gzip_that_grows_beyond_every_image_is_refused(monkeypatch):
    content = gzip.compress(fits_bytes(GRID, empty_primary={}))
    monkeypatch.setattr("solarchip_hf.models.fits_files._MOST_INFLATED", 2**12)
    with pytest.raises(SolarImageError, match="at most 4096 bytes in gzip"):
        read_image(content)


def test_keywords_in_the_empty_primary_header():
    content = fits_bytes(GRID, base={}, empty_primary=list(AIA_CARDS.items()))
    assert read_image(content).modality == "aia171"


def test_cards_that_do_not_parse():
    content = fits_bytes(GRID, CRDER1=1.0, ODDCARD=2.0, OBS_VR=1.0)
    content = content.replace(b"CRDER1  =                  1.0", b"CRDER1  =                  nan")
    content = content.replace(b"ODDCARD =                  2.0", b"ODDCARD =              2.0.0.0")
    content = content.replace(b"OBS_VR  =                  1.0", b"OBS_VR  =                 -NaN")
    image = read_image(content)
    assert image.header["CRDER1"] is None
    assert image.header["OBS_VR"] is None
    assert "ODDCARD" not in image.header
    assert image.notes == ("Cards that do not parse were left out: ODDCARD.",)


def test_aia_time_and_slot():
    image = read_image(fits_bytes())
    assert image.time == datetime(2024, 1, 1, 0, 2, 10, 340000, tzinfo=UTC)
    assert image.time_nominal == datetime(2024, 1, 1, 0, 2, tzinfo=UTC)
    late = read_image(fits_bytes(T_OBS="2023-12-31T23:59:31Z", DATE__OBS="2023-12-31T23:59:30"))
    assert late.time_nominal == datetime(2024, 1, 1, tzinfo=UTC)
    hourly = read_image(fits_bytes(WAVELNTH=4500, T_OBS="2024-01-01T00:07:10Z", DATE__OBS="2024-01-01T00:07:09"))
    assert hourly.time_nominal == datetime(2024, 1, 1, tzinfo=UTC)
    level_1 = {"LVL_NUM": 1.0, "DATE__OBS": "2024-01-01T00:02:09.34"}
    assert read_image(fits_bytes(**level_1)).time_nominal == datetime(2024, 1, 1, 0, 2, 12, tzinfo=UTC)
    assert read_image(fits_bytes(**level_1, WAVELNTH=1600)).time_nominal == datetime(2024, 1, 1, 0, 2, 0, tzinfo=UTC)
    without = read_image(fits_bytes(T_OBS=None, DATE__OBS=None, DATE_OBS="2024-01-01T00:02:09"))
    assert without.time == datetime(2024, 1, 1, 0, 2, 9, 999800, tzinfo=UTC)
    assert any("T_OBS is missing" in note for note in without.notes)
    timeless = read_image(fits_bytes(T_OBS="-4712.01.01_11:59:28_TAI", DATE__OBS=None))
    assert (timeless.time, timeless.time_nominal, timeless.usable) == (None, None, False)
    assert "no observation time" in timeless.reason


def test_hmi_time_is_tai_and_its_slot_the_new_day():
    image = read_image(fits_bytes(base=HMI_CARDS))
    assert image.modality == "hmi"
    assert image.time == datetime(2023, 12, 31, 23, 59, 27, tzinfo=UTC)
    assert image.time_nominal == datetime(2024, 1, 1, tzinfo=UTC)
    assert image.rotation[0][0] == pytest.approx(np.cos(np.radians(179.93)))
    assert (image.exposure, image.unit) == (None, "G")
    assert read_image(fits_bytes(base=HMI_CARDS, T_REC=None)).time_nominal == datetime(2024, 1, 1, tzinfo=UTC)
    unknown = "-4712.01.01_11:59:28_TAI"
    assert read_image(fits_bytes(base=HMI_CARDS, T_REC=unknown)).time_nominal == datetime(2024, 1, 1, tzinfo=UTC)
    lost = read_image(fits_bytes(base=HMI_CARDS, T_REC=unknown, T_OBS=unknown))
    assert lost.time_nominal == datetime(2024, 1, 1, tzinfo=UTC)
    bare = read_image(fits_bytes(base=HMI_CARDS, T_OBS="2024-01-01T00:00:04"))
    assert bare.time == image.time
    started = read_image(fits_bytes(base=HMI_CARDS, T_OBS=None, CADENCE=720.0))
    assert abs(started.time - image.time) < timedelta(seconds=1)


def test_quality_and_near_real_time():
    assert read_image(fits_bytes(QUALITY=1 << 30)).usable
    assert read_image(fits_bytes(QUALITY=1 << 30)).near_real_time
    eclipse = read_image(fits_bytes(QUALITY=(1 << 30) + (1 << 13)))
    assert (eclipse.usable, eclipse.reason) == (False, "QUALITY bit 13: eclipse")
    assert read_image(fits_bytes(QUALITY=1 << 8)).notes == ("QUALITY bit 8: some pixels are missing",)
    assert read_image(fits_bytes(QUALITY=-(2**31))).quality == 1 << 31
    hmi = read_image(fits_bytes(base=HMI_CARDS, QUALITY=1 << 10, QLOOK=1))
    assert (hmi.usable, hmi.near_real_time, hmi.quality) == (True, True, 1024)
    assert not read_image(fits_bytes(base=HMI_CARDS, QUALITY=1 << 30)).usable


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"EXPTIME": 0.0}, "EXPTIME: expected more than 0 s, got 0"),
        ({"IMG_TYPE": "DARK"}, "dark image"),
        ({"CRPIX1": 1.0}, "partial disk"),
        ({"INSTRUME": "EUVI", "TELESCOP": "STEREO"}, "INSTRUME: expected AIA or HMI of SDO, got EUVI"),
        ({"WAVELNTH": 172}, "WAVELNTH: expected one of 94"),
        ({"BUNIT": "K"}, "BUNIT: expected DN or DN/s, got 'K'"),
    ],
)
def test_unusable_with_a_reason(changes, said):
    image = read_image(fits_bytes(**changes))
    assert not image.usable
    assert said in image.reason


@pytest.mark.parametrize("data", [np.zeros((40, 40), np.int16), np.full((40, 40), np.nan, np.float32)])
def test_blank_image(data):
    image = read_image(fits_bytes(data))
    assert not image.usable
    assert image.reason.startswith("blank image")


def test_one_bright_pixel_is_no_blank_image():
    data = np.zeros((40, 40), np.int16)
    data[3, 5] = 1  # off the coarse grid
    assert read_image(fits_bytes(data)).usable


@pytest.mark.parametrize(
    ("written", "unit"),
    [
        (None, "DN"),
        ("", "DN"),
        ("DN", "DN"),
        ("ct", "DN"),
        ("DN/s", "DN/s"),
        ("DN / s", "DN/s"),
        ("ct / s", "DN/s"),
        ("DN/pix", "DN"),
        ("counts / pixel", "DN"),
        ("DN/pix/s", "DN/s"),
        ("DN / (pix s)", "DN/s"),
    ],
)
def test_units_of_aia(written, unit):
    assert read_image(fits_bytes(BUNIT=written)).unit == unit


@pytest.mark.parametrize("written", [None, "Gauss", "G", "Mx/cm^2", "Mx / cm2"])
def test_units_of_hmi(written):
    image = read_image(fits_bytes(base=HMI_CARDS, BUNIT=written))
    assert (image.unit, image.modality) == ("G", "hmi")


@pytest.mark.parametrize("content", ["CONTINUUM INTENSITY", "DOPPLERGRAM", "HMI observable", None])
def test_hmi_products_that_are_no_magnetograms(content):
    image = read_image(fits_bytes(base=HMI_CARDS, CONTENT=content))
    assert image.modality is None
    with pytest.raises(SolarImageError, match="CONTENT: expected 'MAGNETOGRAM'"):
        require_modality(image)
    if content is None:
        assert require_modality(image, "hmi") == "hmi"
    else:
        with pytest.raises(SolarImageError, match=content):
            require_modality(image, "hmi")


def test_sharp_in_helioprojective_axes():
    image = read_image(fits_bytes(base=HMI_CARDS, HARPNUM=377))
    with pytest.raises(SolarImageError, match="the SHARP patch of HARP 377"):
        require_modality(image, "hmi")


def test_other_instrument_as_told():
    content = fits_bytes(INSTRUME="EUVI", TELESCOP="STEREO", WAVELNTH=195, BUNIT="DN")
    assert read_image(content).modality is None
    assert read_image(content, modality="aia193").modality == "aia193"
    with pytest.raises(SolarImageError, match="INSTRUME"):
        read_image(content, modality="aia304")
    with pytest.raises(SolarImageError, match="INSTRUME"):
        read_image(fits_bytes(INSTRUME="SOT", TELESCOP="HINODE", BUNIT="K"), modality="aia171")


def test_a_reprojected_map_has_lost_its_instrument_and_unit(sdo_folder):
    sunpy_map = pytest.importorskip("sunpy.map")
    aia = sunpy_map.Map(sdo_folder / "AIAsynoptic0171.fits").resample([64, 64] * u.pix)
    moved = aia.reproject_to(aia.rotate(20 * u.deg).wcs)
    assert not {"instrume", "telescop", "bunit"} & set(moved.meta)
    with pytest.raises(SolarImageError, match=r"no INSTRUME or TELESCOP card\. Pass modality= if you know"):
        require_modality(read_image(moved))
    told = read_image(moved, modality="171")
    assert (told.modality, told.unit, told.usable) == ("aia171", "DN", True)
    assert "BUNIT is missing too: taken as DN, the archive's unit of aia171." in told.notes
    # a unit that is there counts, and another instrument's is not guessed
    assert read_image(fits_bytes(INSTRUME=None, TELESCOP=None, BUNIT="DN/s"), modality="171").unit == "DN/s"
    assert read_image(fits_bytes(INSTRUME="EUVI", TELESCOP="STEREO", WAVELNTH=None), modality="171").unit == ""


def test_as_is_export_without_cards():
    with pytest.raises(SolarImageError, match=r"CRPIX1: expected .* got no such card.*as-is"):
        read_image(fits_bytes(base={}))


def test_hdus():
    content = fits_bytes(compress=True)
    with fits.open(io.BytesIO(content)) as units:
        from_list, from_unit = read_image(units), read_image(units[1])
        assert read_image(units, header_only=True).shape == (40, 40)
        with pytest.raises(SolarImageError, match="NAXIS"):
            read_image(units[0])
    plain = read_image(content)
    for image in (from_list, from_unit):
        assert np.array_equal(image.data, plain.data)
        assert (image.modality, image.time, image.crpix) == (plain.modality, plain.time, plain.crpix)


@pytest.mark.parametrize("scaled_by_astropy", [True, False])
@pytest.mark.parametrize("compress", [True, False])
def test_hdus_with_scaling(scaled_by_astropy, compress):
    stored = GRID.copy()
    stored[3, 4] = -(2**31)
    content = fits_bytes(stored, compress=compress, raw_cards={"BSCALE": 0.5, "BZERO": 0.0, "BLANK": -(2**31)})
    with fits.open(io.BytesIO(content), do_not_scale_image_data=not scaled_by_astropy) as units:
        image = read_image(units)
    assert np.array_equal(image.data, read_image(content).data, equal_nan=True)
    assert np.isnan(image.data[3, 4])
    assert image.data[0, 1] == stored[0, 1] * 0.5


def test_unsigned_hdu_and_hdu_in_memory():
    data = np.abs(GRID).astype(np.uint16)
    with fits.open(io.BytesIO(fits_bytes(data))) as units:
        assert np.array_equal(read_image(units[0]).data, data)
    image = read_image(fits.ImageHDU(GRID, fits.Header(list(AIA_CARDS.items()))))
    assert np.array_equal(image.data, GRID)
    image.data[:] = 0
    assert GRID.any()  # the caller's array is left alone


def test_sunpy_map(sdo_folder):
    sunpy_map = pytest.importorskip("sunpy.map")
    for name in ("AIAsynoptic0171.fits", "aia_171_level1.fits"):
        file = read_image(sdo_folder / name)
        image = read_image(sunpy_map.Map(sdo_folder / name))
        np.testing.assert_allclose(image.data, file.data)
        for field in ("modality", "time", "time_nominal", "crpix", "crval", "exposure", "unit", "quality", "full_disk"):
            assert getattr(image, field) == getattr(file, field), field
        assert json.loads(json.dumps(image.header)) == image.header


@pytest.mark.filterwarnings("ignore::sunpy.util.SunpyUserWarning")
def test_turned_and_masked_map():
    sunpy_map = pytest.importorskip("sunpy.map")
    header = fits.Header(list(HMI_CARDS.items()))
    mask = np.zeros((40, 40), bool)
    mask[0, 0] = True
    upside_down = sunpy_map.Map(GRID.astype(float), header)
    turned = upside_down.rotate(order=1)
    image = read_image(turned)
    np.testing.assert_allclose(image.rotation, np.eye(2), atol=1e-6)
    assert (image.modality, image.shape) == ("hmi", turned.data.shape)
    masked = sunpy_map.Map(GRID.astype(float), header, mask=mask)
    assert np.isnan(read_image(masked).data).sum() == 1


def test_solar_image_goes_through():
    image = read_image(fits_bytes())
    assert read_image(image) is image
    assert read_image(image, modality="171").modality == "aia171"
    with pytest.raises(SolarImageError, match="aia193"):
        read_image(image, modality="aia193")


@pytest.mark.parametrize(
    ("source", "said"), [(np.zeros((4, 4)), "modality="), (3, "int"), ([], "list"), (None, "NoneType")]
)
def test_other_sources_are_refused(source, said):
    with pytest.raises(SolarImageError, match=said):
        read_image(source)


def test_paths(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_image(tmp_path / "nothing.fits")
    with pytest.raises(SolarImageError, match="a folder"):
        read_image(tmp_path)
    with pytest.raises(SolarImageError, match="a URL"):
        read_image("https://jsoc1.stanford.edu/data/aia/synoptic/image.fits")
    with pytest.raises(ValueError, match="expected one of hmi"):
        read_image(tmp_path / "nothing.fits", modality="aia172")
