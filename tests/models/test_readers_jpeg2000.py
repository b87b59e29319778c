"""Helioviewer's JPEG2000 files: header from the XML box, pixels back to physical units."""

import io
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest
from PIL import Image

from solarchip_hf.models.headers import SolarImageError
from solarchip_hf.models.jpeg2000 import (
    QUICKLOOK_MODALITIES,
    decode_quicklook,
    median_note,
    quicklook_table,
    read_jpeg2000,
)
from solarchip_hf.models.modalities import MODALITY_NAMES
from solarchip_hf.models.readers import read_image, require_modality

XML = """<?xml version="1.0" encoding="UTF-8"?><meta><fits>
<TELESCOP>SDO</TELESCOP><INSTRUME>AIA_3</INSTRUME><WAVELNTH>{wavelength}</WAVELNTH>
<T_OBS>2021-06-01T00:01:22.347</T_OBS><DATE-OBS>2021-06-01T00:01:21.347</DATE-OBS><EXPTIME>2.0</EXPTIME>
<DATAMEDN>{median}</DATAMEDN><QUALITY>1073741824</QUALITY><CTYPE1>HPLN-TAN</CTYPE1><CTYPE2>HPLT-TAN</CTYPE2>
<CRPIX1>32.5</CRPIX1><CRPIX2>32.5</CRPIX2><CRVAL1>0.0</CRVAL1><CRVAL2>0.0</CRVAL2><CDELT1>40</CDELT1><CDELT2>40</CDELT2>
<CROTA2>0.0</CROTA2><RSUN_OBS>946.5</RSUN_OBS><NOTE>&lt;a&gt; &amp; b</NOTE><SATVALS>nan</SATVALS>
</fits><helioviewer><HV_ROTATION>0.0</HV_ROTATION></helioviewer></meta>"""

XML_171 = XML.format(wavelength=171, median=150)


def jp2_bytes(levels, xml=XML_171):
    """A lossless JPEG2000 file with an XML box before its codestream, as Helioviewer writes."""
    stream = io.BytesIO()
    Image.fromarray(levels).save(stream, "JPEG2000", irreversible=False)
    content = stream.getvalue()
    place = content.index(b"jp2c") - 4
    body = xml.encode()
    return content[:place] + (len(body) + 8).to_bytes(4, "big") + b"xml " + body + content[place:]


LEVELS = (np.arange(64 * 64).reshape(64, 64) // 16).astype(np.uint8)  # brighter downwards: the south of a picture

REAL = [
    ("2011_06_25__00_59_43_71__SDO_AIA_AIA_1700.jp2", "aia1700", "2011-06-25T01:00"),
    ("2021_06_01__00_01_21_347__SDO_AIA_AIA_171.jp2", "aia171", "2021-06-01T00:02"),
    ("2022_01_01__00_03_52_835__SDO_AIA_AIA_193.jp2", "aia193", "2022-01-01T00:04"),
    ("2024_04_16__11_15_41_129__SDO_AIA_AIA_304.jp2", "aia304", "2024-04-16T11:16"),
]


@pytest.mark.parametrize(("name", "modality", "slot"), REAL)
def test_real_aia_pictures_agree_with_their_headers(sdo_folder, name, modality, slot):
    image = read_image(sdo_folder / name)
    assert (image.modality, image.unit, image.shape) == (modality, "DN/s", (4096, 4096))
    assert image.time_nominal == datetime.fromisoformat(slot).replace(tzinfo=UTC)
    assert (image.approximate, image.full_disk, image.near_real_time, image.usable) == (True, True, True, True)
    assert image.notes == ()  # no complaint about the median
    exposure = image.header["EXPTIME"]
    if modality != "aia1700":  # whose median lies off the disk, below the darkest level
        assert np.median(image.data[::4, ::4]) == pytest.approx(image.header["DATAMEDN"] / exposure, rel=0.3)
        assert image.data[::4, ::4].mean() == pytest.approx(image.header["DATAMEAN"] / exposure, rel=0.3)
    assert image.data.dtype == np.float32
    assert image.rsun_arcsec == image.header["RSUN_OBS"]


def test_every_real_picture_has_facts(sdo_folder):
    paths = sorted(sdo_folder.glob("*.jp2"))
    assert len(paths) == 12
    for path in paths:
        facts = read_image(path, header_only=True)
        assert facts.shape == (4096, 4096)
        expected = path.stem.rpartition("_")[2]
        named = {"magnetogram": "hmi", "continuum": None}.get(expected, f"aia{expected}")
        assert facts.modality == named, path.name
        named_time = datetime.strptime(path.name[:20], "%Y_%m_%d__%H_%M_%S").replace(tzinfo=UTC)  # DATE-OBS
        assert timedelta(0) < facts.time - named_time < timedelta(seconds=25), path.name
        assert np.isnan(facts.data[0, 0])


def test_real_magnetogram_is_turned_the_right_way_and_ends_at_the_limb(sdo_folder):
    path = sdo_folder / "2022_08_02__10_47_53_000__SDO_HMI_HMI_magnetogram.jp2"
    image = read_image(path)
    assert (image.modality, image.unit, image.quality) == ("hmi", "G", 1024)
    assert image.time == datetime(2022, 8, 2, 10, 48, 15, 509000, tzinfo=UTC)
    assert image.time_nominal == datetime(2022, 8, 2, 10, 48, 45, tzinfo=UTC)
    y, x = np.mgrid[:4096:8, :4096:8] + 1 - 2048.5
    beyond = np.hypot(x, y) * image.cdelt[0] - image.rsun_arcsec
    clear = np.abs(beyond) > 0.01  # arcsec: a pixel centre on the limb itself may fall either way
    assert clear.mean() > 0.999
    assert np.array_equal(np.isnan(image.data[::8, ::8])[clear], beyond[clear] > 0)
    assert (np.nanmin(image.data), np.nanmax(image.data)) == (-250.0, 250.0)
    with Image.open(path) as picture:
        levels = np.asarray(picture)
    middle = slice(1800, 2300)
    np.testing.assert_allclose(
        image.data[::-1][middle, middle], levels[middle, middle] / 255 * 500.0 - 250.0, atol=1e-3
    )


def test_real_continuum_picture_is_no_magnetogram(sdo_folder):
    image = read_image(sdo_folder / "2023_01_31__03_39_23_200__SDO_HMI_HMI_continuum.jp2", header_only=True)
    assert (image.modality, image.usable, image.unit) == (None, False, "")
    assert image.reason == "CONTENT: expected 'MAGNETOGRAM', got 'CONTINUUM INTENSITY'"
    with pytest.raises(SolarImageError, match="CONTINUUM INTENSITY"):
        require_modality(image, "hmi")


def test_rows_are_turned_to_fits_order():
    image = read_image(jp2_bytes(LEVELS))
    np.testing.assert_allclose(image.data, decode_quicklook(LEVELS[::-1], "aia171"))
    assert image.data[0].mean() > image.data[-1].mean()
    assert image.modality == "aia171"
    assert image.header["NOTE"] == "<a> & b"
    assert image.header["SATVALS"] is None
    assert "HV_ROTATION" not in image.header


def test_median_beyond_30_percent_is_noted():
    median = float(np.median(decode_quicklook(LEVELS[::-1], "aia171")[::4, ::4]))
    for factor, noted in ((1.0, False), (1.2, False), (1.6, True), (0.5, True)):
        image = read_image(jp2_bytes(LEVELS, XML.format(wavelength=171, median=2.0 * median * factor)))
        assert any("off the header's DATAMEDN" in note for note in image.notes) is noted, factor
    assert median_note(image.data, {}, "aia171") == ""


@pytest.mark.parametrize("modality", sorted(QUICKLOOK_MODALITIES))
def test_stretches_rise_from_end_to_end(modality):
    table = quicklook_table(modality)
    assert (np.diff(table) > 0).all()
    ends = {"hmi": (-250, 250), "aia171": (2.65, 1566), "aia304": (0.8, 250), "aia1700": (220, 5000)}
    if modality in ends:
        assert (table[0], table[255]) == pytest.approx(ends[modality])
    levels = np.array([[0, 128, 255]], np.uint8)
    assert np.array_equal(decode_quicklook(levels, modality), table[levels])


def test_channel_without_a_known_stretch():
    assert set(MODALITY_NAMES) - QUICKLOOK_MODALITIES == {"aia4500"}
    content = jp2_bytes(LEVELS, XML.format(wavelength=4500, median=1))
    for header_only in (True, False):
        with pytest.raises(SolarImageError, match="got AIA as aia4500"):
            read_image(content, header_only=header_only)
    euvi = jp2_bytes(LEVELS, XML_171.replace("AIA_3", "EUVI"))
    assert read_image(euvi).modality is None
    with pytest.raises(SolarImageError, match="got EUVI as aia171"):
        read_image(euvi, modality="aia171")  # the stretch of another instrument's picture is another one
    with pytest.raises(ValueError, match="aia4500"):
        quicklook_table("aia4500")


@pytest.mark.parametrize("share", [0.01, 0.3, 0.6, 0.9, 0.999])
def test_truncated(share):
    content = jp2_bytes(LEVELS)
    cut = content[: max(int(len(content) * share), 12)]
    for header_only in (True, False):
        with pytest.raises(SolarImageError, match="truncated"):
            read_image(cut, header_only=header_only)


def test_truncated_real_file(sdo_folder):
    content = (sdo_folder / REAL[1][0]).read_bytes()
    with pytest.raises(SolarImageError, match="truncated"):
        read_image(content[: len(content) // 2])


@pytest.mark.parametrize(
    ("xml", "said"),
    [
        ("<meta><fits><A>1</A></meta>", "XML that does not parse"),
        ("<meta><other/></meta>", "a root element 'meta' without it"),
        ("", "no XML box"),
    ],
)
def test_header_that_is_none(xml, said):
    with pytest.raises(SolarImageError, match=said):
        read_image(jp2_bytes(LEVELS, xml))


def test_colour_picture_is_refused():
    with pytest.raises(SolarImageError, match="8-bit grey"):
        read_jpeg2000(jp2_bytes(np.zeros((64, 64, 3), np.uint8)), "colour.jp2")


def test_picture_without_a_header():
    picture = Image.fromarray(LEVELS)
    for options in ({}, {"modality": "aia171"}, {"quicklook": True}):
        with pytest.raises(SolarImageError, match="Pass modality= and quicklook=True"):
            read_image(picture, **options)
    image = read_image(picture, modality="aia171", quicklook=True)
    assert (image.modality, image.unit, image.approximate, image.full_disk) == ("aia171", "DN/s", True, True)
    assert np.array_equal(image.data, decode_quicklook(LEVELS[::-1], "aia171"))
    assert any("assumed" in note for note in image.notes)
    assert (image.time, image.usable) == (None, True)
    with pytest.raises(SolarImageError, match="8-bit grey"):
        read_image(picture.convert("RGBA"), modality="aia171", quicklook=True)
