"""The image processor: every kind of input, what it refuses, statistics, and the way back to Maps."""

import io
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from astropy.io import fits
from transformers import AutoImageProcessor

from solarchip_hf import MODALITIES, MODALITY_NAMES, SolarChipImageProcessor, SolarImageError, read_image
from solarchip_hf.models.geometry import RSUN_PIXELS_1024, disk_mask
from solarchip_hf.models.header_cards import GENERATING_PROGRAM
from solarchip_hf.models.image_statistics import published_statistics

SIZE = 128


@pytest.fixture(scope="module")
def processor() -> SolarChipImageProcessor:
    return SolarChipImageProcessor(size=SIZE)


@pytest.fixture
def aia171(sdo_folder) -> Path:
    return sdo_folder / "AIAsynoptic0171.fits"


def statistics_for(processor: SolarChipImageProcessor, **changes) -> dict:
    rows = {name: {"mean": 1.5, "std": 0.5, "unit": MODALITIES[name].unit} for name in processor.modalities}
    return {**processor.statistics_key, "source": "a test", "modalities": rows, **changes}


def write_hmi(path: Path, data: np.ndarray, **cards) -> Path:
    """A magnetogram under a header as of hmi.M_720s, camera upside down, at the plate scale that fits the frame."""
    size = len(data)
    header = fits.Header()
    values = {
        "TELESCOP": "SDO/HMI", "INSTRUME": "HMI_SIDE1", "CONTENT": "MAGNETOGRAM", "BUNIT": "Gauss", "QUALITY": 0,
        "WAVELNTH": 6173.0, "CTYPE1": "HPLN-TAN", "CTYPE2": "HPLT-TAN", "CUNIT1": "arcsec", "CUNIT2": "arcsec",
        "CRPIX1": (size + 1) / 2, "CRPIX2": (size + 1) / 2, "CRVAL1": 0.0, "CRVAL2": 0.0, "CDELT1": 2066 / size,
        "CDELT2": 2066 / size, "CROTA2": 180.0, "RSUN_OBS": 965.0, "DSUN_OBS": 1.4875e11, "CRLT_OBS": -3.0,
        "CRLN_OBS": 120.0, "T_OBS": "2024.01.01_00:00:04_TAI", "T_REC": "2024.01.01_00:00:00_TAI",
        "DATE-OBS": "2023-12-31T23:58:19.60",
    }  # fmt: skip
    for card, value in {**values, **cards}.items():
        if value is not None:
            header[card] = value
    fits.PrimaryHDU(data.astype(np.float32), header).writeto(path)
    return path


def magnetogram(size: int = 256) -> np.ndarray:
    """Camera frame, upside down: a positive spot in the solar north-west, NaN off the disk."""
    y, x = np.mgrid[:size, :size] - (size - 1) / 2
    radius = 965.0 / (2066 / size)
    data = np.random.default_rng(0).normal(0, 5, (size, size))
    data += 800 * np.exp(-((x + 0.4 * radius) ** 2 + (y + 0.3 * radius) ** 2) / (2 * 6.0**2))
    data[np.hypot(x, y) > radius] = np.nan
    return data


# Inputs ---------------------------------------------------------------------------------------------------------------


def test_two_lines_of_the_readme(sdo_folder, aia171):
    processor = SolarChipImageProcessor()
    batch = processor([aia171, str(sdo_folder / "AIAsynoptic0304.fits")], return_tensors="pt")
    assert set(batch) == {"pixel_values", "modality_ids"}
    assert batch["pixel_values"].shape == (2, 1, 1024, 1024)
    assert batch["pixel_values"].dtype == torch.float32
    assert batch["modality_ids"].tolist() == [MODALITY_NAMES.index("aia171"), MODALITY_NAMES.index("aia304")]
    assert batch["modality_ids"].dtype == torch.int64
    assert torch.isfinite(batch["pixel_values"]).all()


def test_every_kind_of_input_gives_the_same(processor, aia171):
    import sunpy.map

    expected = processor(aia171, return_tensors="np")["pixel_values"]
    assert 0.3 < expected[0, 0][disk_mask(SIZE)].std() < 2
    with fits.open(aia171) as units:
        kinds = {
            "path as text": str(aia171),
            "bytes": aia171.read_bytes(),
            "HDU": units[1],
            "HDUList": units,
            "Map": sunpy.map.Map(units[1].data, units[1].header),
            "SolarImage": read_image(aia171),
        }
        for kind, image in kinds.items():
            batch = processor(image, return_tensors="np")
            np.testing.assert_allclose(batch["pixel_values"], expected, atol=1e-5, err_msg=kind)
            assert batch["modality_ids"].tolist() == [3], kind


def test_arrays_are_canonical_already(processor, aia171):
    _, physical = processor.to_physical(aia171)
    expected = processor(aia171, return_tensors="np")["pixel_values"]
    batch = np.stack([physical, physical])
    for kind, array in {"numpy": batch, "torch": torch.from_numpy(batch), "channel": batch[:, None]}.items():
        result = processor(array, modality=["171", "AIA_171"], return_tensors="np")
        np.testing.assert_allclose(result["pixel_values"], np.repeat(expected, 2, axis=0), atol=1e-6, err_msg=kind)
    single = processor(physical.astype(np.float64), modality=171, return_tensors=None)
    assert isinstance(single["pixel_values"], np.ndarray)
    np.testing.assert_allclose(single["pixel_values"], expected, atol=1e-6)
    larger = processor(np.kron(physical, np.ones((2, 2))), modality=171, return_tensors="np")
    np.testing.assert_allclose(larger["pixel_values"], expected, atol=2e-5)
    assert processor(np.ones((SIZE, SIZE), dtype=np.int16), modality="hmi")["modality_ids"].tolist() == [0]
    swapped = processor(np.asfortranarray(physical).astype(">f4"), modality=171, return_tensors="np")
    np.testing.assert_array_equal(swapped["pixel_values"], single["pixel_values"])
    masked = np.ma.masked_array(physical, mask=physical > 1000)
    holed = np.where(masked.mask, np.nan, physical)
    assert masked.mask.any()
    torch.testing.assert_close(
        processor(masked, modality=171)["pixel_values"], processor(holed, modality=171)["pixel_values"]
    )


def test_an_image_without_pixels_is_refused(processor, aia171):
    empty = np.full((SIZE, SIZE), np.nan)
    elsewhere = replace(read_image(aia171), crpix=(-5000.0, 512.5))
    for image, modality in ((empty, "171"), (read_image(aia171, header_only=True), None), (elsewhere, None)):
        with pytest.raises(SolarImageError, match="pixels: expected any finite one"):
            processor(image, modality=modality)
        assert not processor(image, modality=modality, require_usable=False)["pixel_values"].any()


def test_observations(processor, sdo_folder, aia171, tmp_path):
    hmi = write_hmi(tmp_path / "hmi.fits", magnetogram())
    pair = {"hmi": hmi, "0171": aia171, "aia304": None}
    batch, headers = processor([pair, {304: sdo_folder / "AIAsynoptic0304.fits"}], return_headers=True)
    assert batch["pixel_values"].shape == (2, 11, SIZE, SIZE)
    assert batch["observed"].dtype == torch.bool
    assert batch["observed"].nonzero().tolist() == [[0, 0], [0, 3], [1, 6]]
    assert [set(row) for row in headers] == [{"hmi", "aia171"}, {"aia304"}]
    assert not batch["pixel_values"][~batch["observed"]].any()
    alone = processor([hmi, aia171])["pixel_values"][:, 0]
    torch.testing.assert_close(batch["pixel_values"][0, [0, 3]], alone)
    assert processor(pair)["observed"].shape == (1, 11)


def test_hmi_stands_right_side_up(processor, tmp_path):
    batch, headers = processor([write_hmi(tmp_path / "hmi.fits", magnetogram())], return_headers=True)
    image = batch["pixel_values"][0, 0].numpy()
    row, column = np.unravel_index(image.argmax(), image.shape)
    radius, centre = RSUN_PIXELS_1024 * SIZE / 1024, (SIZE - 1) / 2
    assert row == pytest.approx(centre + 0.3 * radius, abs=1)  # north: higher rows
    assert column == pytest.approx(centre + 0.4 * radius, abs=1)  # west: higher columns
    assert headers[0].time.isoformat().startswith("2023-12-31T23:59:27")  # TAI is 37 s ahead
    assert headers[0].unit == "G"
    assert not image[~disk_mask(SIZE)].any()
    assert np.count_nonzero(image[disk_mask(SIZE)]) > 0.99 * disk_mask(SIZE).sum()


def test_quicklooks_only_when_told(processor, sdo_folder):
    from PIL import Image

    path = sdo_folder / "2021_06_01__00_01_21_347__SDO_AIA_AIA_171.jp2"
    from_file, headers = processor(path, return_headers=True)
    assert headers[0].approximate
    with Image.open(path) as picture:
        picture.load()
    with pytest.raises(SolarImageError, match="quicklook=True"):
        processor([picture])
    with pytest.raises(SolarImageError, match="quicklook=True"):
        processor(picture, modality="171")
    as_picture = processor(picture, modality="171", quicklook=True)["pixel_values"]
    assert np.corrcoef(as_picture.ravel(), from_file["pixel_values"].ravel())[0, 1] > 0.95
    levels = np.asarray(picture.resize((SIZE, SIZE)))[::-1]
    with pytest.raises(SolarImageError, match="8-bit grey levels"):
        processor(levels, modality="171")
    as_levels = processor(levels, modality="171", quicklook=True)["pixel_values"]
    assert np.corrcoef(as_levels.ravel(), from_file["pixel_values"].ravel())[0, 1] > 0.9
    grey = picture.convert("RGB")  # three equal channels, as many tools open a grey picture
    assert torch.equal(processor(grey, modality="171", quicklook=True)["pixel_values"], as_picture)
    coloured = Image.merge("RGB", (picture, picture, picture.point(lambda level: level // 2)))
    with pytest.raises(SolarImageError, match="Colour is not intensity"):
        processor(coloured, modality="171", quicklook=True)


# Refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("aia_171_cutout.fits", "whole solar disk"),
        ("resampled_hmi.fits", "CONTENT: expected 'MAGNETOGRAM'"),
        ("mdi.fd_m_96m_lev182.20101015_000000_TAI.data.fits", "MDI is another instrument"),
        ("hmi.sharp_cea_720s.377.20110215_020000_TAI.magnetogram.fits", "CTYPE1"),
        ("2023_01_31__03_39_23_200__SDO_HMI_HMI_continuum.jp2", "CONTINUUM"),
        ("broken/html_not_fits.fits", "HTML"),
        ("broken/truncated_aia20200207_162100_0193.fits", "truncated"),
    ],
)
def test_files_that_are_no_full_disk_channel(processor, sdo_folder, name, sentence):
    with pytest.raises(SolarImageError, match=sentence) as caught:
        processor(sdo_folder / name)
    assert name in str(caught.value)


def test_wrong_or_absent_modality(processor, aia171):
    with pytest.raises(SolarImageError, match="expected an image of aia193, got aia171"):
        processor(aia171, modality="193")
    with pytest.raises(SolarImageError, match=r"one that this processor has \(hmi, aia193\), got aia171"):
        SolarChipImageProcessor(modalities=["hmi", "193"], size=SIZE)(aia171)
    with pytest.raises(SolarImageError, match="modality= with an array"):
        processor(np.ones((SIZE, SIZE)))
    with pytest.raises(SolarImageError, match="square image"):
        processor(np.ones((SIZE, SIZE + 1)), modality="171")
    with pytest.raises(ValueError, match="modality: expected one, or 1 for 1 images, got 2"):
        processor([aia171], modality=["171", "193"])
    with pytest.raises(ValueError, match="expected none with mappings"):
        processor({"171": aia171}, modality="171")
    with pytest.raises(ValueError, match="got two"):
        processor({"171": aia171, "aia171": aia171})
    with pytest.raises(ValueError, match="empty list"):
        processor([])


def test_quality_and_header_cards(processor, tmp_path):
    data = magnetogram()
    with pytest.raises(SolarImageError, match="QUALITY"):
        processor(write_hmi(tmp_path / "bad.fits", data, QUALITY=2**30))
    assert processor(tmp_path / "bad.fits", require_usable=False)["modality_ids"].tolist() == [0]
    with pytest.raises(SolarImageError, match="CROTA2"):
        processor(write_hmi(tmp_path / "as_is.fits", data, CROTA2=None))
    with pytest.raises(SolarImageError, match="as-is"):
        processor(write_hmi(tmp_path / "bare.fits", data, CRPIX1=None))


def test_generated_images_are_told_by_their_cards(processor, tmp_path):
    cards = {"QUALITY": 2**31, "GENERATD": True, "CREATOR": GENERATING_PROGRAM, "MODEL": "solarchip/aia171-to-hmi"}
    path = write_hmi(tmp_path / "generated.fits", magnetogram(), **cards)
    with pytest.raises(SolarImageError, match="observed image, got one that the model solarchip/aia171-to-hmi") as told:
        processor(path)
    assert "generated" in str(told.value)
    assert "QUALITY" not in str(told.value)
    # a quality word that someone has cleared makes no observation of it
    cleared = write_hmi(tmp_path / "cleared.fits", magnetogram(), **{**cards, "QUALITY": 0})
    assert read_image(cleared).reason.startswith("generated image (MODEL: solarchip/aia171-to-hmi), which no")
    with pytest.raises(SolarImageError, match="generated"):
        processor({"hmi": cleared})
    assert processor(path, require_usable=False)["modality_ids"].tolist() == [0]


def test_images_of_one_observation_that_lie_hours_apart_bring_a_warning(sdo_folder, tmp_path, caplog):
    processor = SolarChipImageProcessor(size=SIZE, modalities=["hmi", "aia171", "aia304"])
    aia = {name: sdo_folder / f"AIAsynoptic{name}.fits" for name in ("0171", "0304")}
    near = write_hmi(tmp_path / "near.fits", magnetogram(), T_REC="2024.10.04_16:12:00_TAI", T_OBS=None)
    far = write_hmi(tmp_path / "far.fits", magnetogram(), T_REC="2024.10.04_12:00:00_TAI", T_OBS=None)
    with caplog.at_level("WARNING", logger="solarchip_hf"):
        processor([aia, {**aia, "hmi": near}, {"hmi": far}, {**aia, "hmi": np.zeros((SIZE, SIZE))}])
        assert not caplog.records
        batch = processor([aia, {**aia, "hmi": far}])
    assert batch["observed"].tolist() == [[False, True, True], [True, True, True]]
    assert "observation 1: expected images of one time, got hmi at 2024-10-04T12:00:00" in caplog.text


# Photometry -----------------------------------------------------------------------------------------------------------


def test_photometry_names_its_unit(aia171):
    image = read_image(aia171)
    dn, nominal, rate = (
        SolarChipImageProcessor(size=SIZE, photometry=name).to_physical(image) for name in ("dn", "nominal", "dn_per_s")
    )
    np.testing.assert_allclose(nominal[1], dn[1] * (2.0 / image.exposure), rtol=1e-5)
    np.testing.assert_allclose(rate[1], dn[1] / image.exposure, rtol=1e-5)
    assert [facts.unit for facts, _ in (dn, nominal, rate)] == ["DN", "DN", "DN/s"]
    assert nominal[0].exposure == image.exposure  # the fact of the header stays
    # a flare frame with half the exposure is the same Sun
    short = replace(image, data=image.data / 2, exposure=image.exposure / 2)
    np.testing.assert_allclose(SolarChipImageProcessor(size=SIZE).to_physical(short)[1], nominal[1], rtol=1e-5)
    # an image in DN/s leads to the same quantities
    per_second = replace(image, data=image.data / image.exposure, unit="DN/s")
    for name, expected in (("dn", dn), ("nominal", nominal), ("dn_per_s", rate)):
        found = SolarChipImageProcessor(size=SIZE, photometry=name).to_physical(per_second)[1]
        np.testing.assert_allclose(found, expected[1], rtol=1e-5)


def test_a_map_divided_by_its_exposure_time_is_a_rate(processor, aia171):
    import sunpy.map

    image = sunpy.map.Map(aia171)
    rate = image / image.exposure_time
    assert rate.meta["bunit"] == "1 / s"  # the file has no BUNIT
    torch.testing.assert_close(processor(rate)["pixel_values"], processor(image)["pixel_values"], atol=1e-5, rtol=0)


def test_missing_exposure_names_the_card(aia171):
    image = replace(read_image(aia171), exposure=None)
    with pytest.raises(SolarImageError, match="EXPTIME: expected an exposure time"):
        SolarChipImageProcessor(size=SIZE)(image)
    SolarChipImageProcessor(size=SIZE, photometry="dn")(image)


def test_degradation_is_named_and_bounded(aia171, tmp_path):
    table = tmp_path / "made_up.csv"
    table.write_text(
        "modality,date,factor\n0171,2024-01-01,0.8\n171,2025-01-01,0.6\n335,2024-01-01,0.01\n335,2025-01-01,0.01\n"
    )
    corrected = SolarChipImageProcessor(size=SIZE, degradation=table)
    assert corrected.statistics_key["degradation"] == "made_up"
    plain = SolarChipImageProcessor(size=SIZE)
    ratio = corrected.to_physical(aia171)[1] / plain.to_physical(aia171)[1]
    days = (np.datetime64("2024-10-04T16:17:58") - np.datetime64("2024-01-01")) / np.timedelta64(366, "D")
    assert np.nanmedian(ratio) == pytest.approx(1 / (0.8 - 0.2 * days), rel=1e-4)
    with pytest.raises(SolarImageError, match=r"throughput of at least 0.02 for aia335"):
        corrected.to_physical(aia171.with_name("AIAsynoptic0335.fits"))
    with pytest.raises(SolarImageError, match="a channel of the table 'made_up'"):
        corrected.to_physical(aia171.with_name("AIAsynoptic0193.fits"))
    old = {"name": "old", "factors": {"171": {"2010-05-01": 1.0, "2020-01-01": 0.7}}}
    with pytest.raises(SolarImageError, match=r"2010-05-01 to 2020-01-01, got 2024-10-04.*not extrapolated"):
        SolarChipImageProcessor(size=SIZE, degradation=old).to_physical(aia171)
    with pytest.raises(ValueError, match="no default is known"):
        corrected(aia171)
    saved = SolarChipImageProcessor.from_dict(json.loads(corrected.to_json_string()))
    assert saved.degradation == corrected.degradation


# Statistics and settings ----------------------------------------------------------------------------------------------


def test_default_statistics_are_marked_and_plausible(sdo_folder):
    processor = SolarChipImageProcessor(size=512)
    assert processor.statistics["source"].startswith("approximate")
    assert set(processor.statistics["modalities"]) == set(MODALITY_NAMES)
    for channel in ("0131", "0171", "0193", "0211", "0304", "0335", "1600", "1700"):
        values = processor(sdo_folder / f"AIAsynoptic{channel}.fits", return_tensors="np")["pixel_values"][0, 0]
        valid = values[processor.support(channel)]
        assert abs(valid.mean()) < 1, channel
        assert 0.4 < valid.std() < 1.3, channel
    deviations = [SolarChipImageProcessor(size=n).statistics["modalities"]["hmi"]["std"] for n in (128, 512, 1024)]
    assert deviations == sorted(deviations)
    assert deviations[2] > 1.3 * deviations[0]


def test_default_hmi_deviation_on_a_real_magnetogram(shared_data):
    field = np.load(shared_data / "sdo" / "HMI20130131_0000_bz.npz")["x"]
    for size in (128, 512):
        values = SolarChipImageProcessor(size=size)(field, modality="hmi", return_tensors="np")["pixel_values"][0, 0]
        assert 0.8 < values[disk_mask(size)].std() < 1.3


@pytest.mark.parametrize(
    ("key", "value"),
    [("photometry", "dn"), ("geometry", "none"), ("size", 64), ("scaling", "linear"), ("degradation", "V10")],
)
def test_statistics_of_other_settings_are_refused(processor, key, value):
    with pytest.raises(ValueError, match=f"statistics: expected {key}=.*got {key}={value!r}"):
        processor.with_statistics(statistics_for(processor, **{key: value}))


def test_incomplete_statistics_are_refused(processor):
    whole = statistics_for(processor)
    with pytest.raises(ValueError, match="an entry for 'aia193'"):
        processor.with_statistics(
            {**whole, "modalities": {k: v for k, v in whole["modalities"].items() if k != "aia193"}}
        )
    wrong_unit = {**whole["modalities"], "aia171": {"mean": 1.0, "std": 1.0, "unit": "DN/s"}}
    with pytest.raises(ValueError, match="unit 'DN' for 'aia171', got 'DN/s'"):
        processor.with_statistics({**whole, "modalities": wrong_unit})
    for row in ({"mean": 1.0, "std": 1.0}, {"mean": 1.0, "unit": "DN"}):
        with pytest.raises(ValueError, match="expected mean, std and unit for 'aia171'"):
            processor.with_statistics({**whole, "modalities": {**whole["modalities"], "aia171": row}})
    flat = {**whole["modalities"], "hmi": {"mean": 0.0, "std": 0.0, "unit": "G"}}
    with pytest.raises(ValueError, match="positive std for 'hmi'"):
        processor.with_statistics({**whole, "modalities": flat})


def test_statistics_are_copied_as_plain_numbers(processor):
    given = statistics_for(processor)
    given["modalities"]["aia171"] |= {"mean": np.float32(1.5), "std": np.float32(0.5)}
    other = processor.with_statistics(given)
    given["modalities"]["aia171"]["mean"] = 99.0
    assert json.loads(other.to_json_string())["statistics"]["modalities"]["aia171"]["mean"] == 1.5


def test_with_statistics_changes_the_scale_only(processor, aia171):
    other = processor.with_statistics(statistics_for(processor))
    _, physical = processor.to_physical(aia171)
    inside = processor.support("171")
    np.testing.assert_allclose(other.scale(physical, 171)[inside], (np.log1p(physical[inside]) - 1.5) / 0.5, atol=1e-5)
    assert other.statistics["source"] == "a test"
    assert processor.statistics["source"].startswith("approximate")


@pytest.mark.parametrize("scaling", ["asinh", "linear"])
def test_scalings_without_default_ask_for_statistics(aia171, scaling):
    bare = SolarChipImageProcessor(size=SIZE, scaling=scaling)
    _, physical = bare.to_physical(aia171)
    with pytest.raises(ValueError, match="no default is known"):
        bare.scale(physical, "171")
    full = bare.with_statistics(statistics_for(bare))
    back = full.unscale(full.scale(physical, "171"), "171")
    np.testing.assert_allclose(back[full.support("171")], physical[full.support("171")], rtol=1e-4, atol=1e-3)


def test_settings_are_checked():
    for settings, sentence in (
        ({"geometry": "carrington"}, "geometry: expected one of 'rsun'"),
        ({"photometry": "counts"}, "photometry: expected one of"),
        ({"scaling": "sqrt"}, "scaling: expected one of"),
        ({"off_disk": "black"}, "off_disk: expected one of"),
        ({"geometry": "none", "off_disk": "support"}, "off_disk: expected a policy that needs no fixed solar radius"),
        ({"size": {"height": 128, "width": 64}}, "size: expected one number"),
        ({"size": 0}, "size: expected a whole number"),
        ({"modalities": ["171", "aia171"]}, "modalities: expected a list of different channels"),
        ({"modalities": ["172"]}, "modality: expected one of"),
        ({"photometri": "dn"}, "SolarChipImageProcessor: .* got 'photometri'. Did you mean 'photometry'"),
        ({"size": "128"}, "size: expected a whole number of pixels, 8 or more, got '128'"),
        ({"modalities": "171"}, "modalities: expected a list of names, got the text '171'"),
        ({"degradation": "no/such/table.csv"}, "which is no file"),
        ({"degradation": {"name": "t", "factors": {"171": {"May 2010": 1.0, "2020-01-01": 0.9}}}}, "dates such as"),
        (
            {"preset": "published", "size": 128},
            "size: expected none beside preset='published', which sets it",
        ),
        ({"preset": "published", "photometry": "dn_per_s"}, "photometry: expected none beside preset"),
        ({"preset": "published", "statistics": {"source": "mine"}}, "statistics: expected none beside preset"),
        ({"preset": "best"}, "preset: expected one of 'published'"),
    ):
        with pytest.raises(ValueError, match=sentence):
            SolarChipImageProcessor(**settings)


def test_save_and_load(processor, aia171, tmp_path):
    trained = SolarChipImageProcessor(modalities=["hmi", "171"], size=SIZE, off_disk="disk")
    trained = trained.with_statistics(statistics_for(trained))
    trained.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert "rescale_factor" not in saved
    assert saved["statistics"]["source"] == "a test"
    loaded = SolarChipImageProcessor.from_pretrained(tmp_path)
    assert loaded.to_dict() == trained.to_dict()
    assert isinstance(AutoImageProcessor.from_pretrained(tmp_path), SolarChipImageProcessor)
    torch.testing.assert_close(loaded(aia171)["pixel_values"], trained(aia171)["pixel_values"])


def test_from_pretrained_overrides(aia171, tmp_path):
    SolarChipImageProcessor(size=SIZE).save_pretrained(tmp_path)
    changed = SolarChipImageProcessor.from_pretrained(tmp_path, modalities=["171", "hmi"], size=64, photometry="dn")
    assert (changed.modalities, changed.size, changed.photometry) == (["aia171", "hmi"], 64, "dn")
    assert changed.statistics["size"] == 64
    assert changed(aia171)["modality_ids"].tolist() == [0]
    for geometry, policy in (("none", "zero"), ("arcsec", "support")):
        other = SolarChipImageProcessor.from_pretrained(tmp_path, geometry=geometry)
        assert (other.geometry, other.off_disk, other.statistics["geometry"]) == (geometry, policy, geometry)
    assert SolarChipImageProcessor.from_pretrained(tmp_path, geometry="none", off_disk="keep").off_disk == "keep"
    with pytest.raises(ValueError, match="Did you mean 'off_disk'"):
        SolarChipImageProcessor.from_pretrained(tmp_path, offdisk="keep")
    with pytest.raises(ValueError, match="preset: expected none, since a saved"):
        SolarChipImageProcessor.from_pretrained(tmp_path, preset="published")
    trained = SolarChipImageProcessor(size=SIZE)
    trained.with_statistics(statistics_for(trained)).save_pretrained(tmp_path)
    assert SolarChipImageProcessor.from_pretrained(tmp_path, modalities=["171"]).modalities == ["aia171"]
    with pytest.raises(ValueError, match="statistics: expected size=64"):
        SolarChipImageProcessor.from_pretrained(tmp_path, size=64)
    assert SolarChipImageProcessor.from_pretrained(tmp_path, size=64, statistics=None).size == 64


def test_published_preset(aia171, tmp_path):
    published = SolarChipImageProcessor.published()
    assert published.to_dict() == SolarChipImageProcessor(preset="published").to_dict()
    assert published.statistics == published_statistics()
    hmi = write_hmi(tmp_path / "hmi.fits", magnetogram(1024))
    batch = published([aia171, hmi], return_tensors="np")["pixel_values"][:, 0]
    for values, raw, (mean, std) in zip(
        batch,
        (fits.getdata(aia171), fits.getdata(hmi)),
        ((4.05845461, 2.00199555), (-0.00336441, 1.44624682)),
        strict=True,
    ):
        raw = np.nan_to_num(np.asarray(raw, dtype=np.float64), nan=0.0)
        expected = (np.sign(raw) * np.log1p(np.abs(raw)) - mean) / std
        np.testing.assert_allclose(values, expected, atol=1e-5)


# Off the disk, and back -----------------------------------------------------------------------------------------------


def test_off_disk_policies(aia171, tmp_path):
    hmi = write_hmi(tmp_path / "hmi.fits", np.nan_to_num(magnetogram(), nan=3.0))  # values off the disk are cut too
    disk = disk_mask(SIZE)
    offset = np.arange(SIZE) - (SIZE - 1) / 2
    circle = np.hypot(offset[:, None], offset) <= SIZE / 2
    kept = {}
    for policy in ("support", "disk", "keep", "zero"):
        processor = SolarChipImageProcessor(size=SIZE, off_disk=policy)
        kept[policy] = processor([aia171, hmi], return_tensors="np")["pixel_values"][:, 0]
        assert np.isfinite(kept[policy]).all()
    assert not kept["support"][0][~circle].any()
    assert kept["support"][0][circle & ~disk].all()
    assert not kept["disk"][0][~disk].any()
    assert kept["keep"][0][~circle].all()
    for policy in ("support", "disk", "keep"):
        assert not kept[policy][1][~disk].any()
        np.testing.assert_array_equal(kept[policy][1][disk], kept["support"][1][disk])
    row = processor.statistics["modalities"]["hmi"]
    np.testing.assert_allclose(kept["zero"][1][~disk], -row["mean"] / row["std"], rtol=1e-5)


def test_scale_is_vectorised_and_inverted(processor, aia171):
    _, physical = processor.to_physical(aia171)
    stack = np.stack([physical, 2 * physical, physical - 3])[None]
    before = stack.copy()
    scaled = processor.scale(stack, "171")
    assert np.array_equal(stack, before, equal_nan=True)
    assert scaled.shape == (1, 3, SIZE, SIZE)
    assert scaled.dtype == np.float32
    np.testing.assert_array_equal(scaled[0, 1], processor.scale(stack[0, 1], "171"))
    back = processor.unscale(torch.from_numpy(scaled), "171")
    inside = processor.support("171") & np.isfinite(physical)
    np.testing.assert_allclose(back[..., inside], stack[..., inside], rtol=1e-4, atol=1e-3)
    assert np.isnan(back[..., ~processor.support("171")]).all()
    with pytest.raises(ValueError, match=r"images: expected \(..., 128, 128\), got \(64, 64\)"):
        processor.scale(np.ones((64, 64)), "171")


def test_missing_pixels_leave_no_trace_beyond_themselves(processor, aia171):
    image = read_image(aia171)
    data = image.data.copy()
    data[500:540, 500:540] = np.nan
    whole, holed = processor([image, replace(image, data=data)], return_tensors="np")["pixel_values"][:, 0]
    changed = np.abs(whole - holed) > 1e-6
    rows, columns = np.nonzero(changed)
    assert 9 <= changed.sum() <= 64
    assert max(np.ptp(rows), np.ptp(columns)) <= 7
    assert (holed[changed] == 0).sum() >= 9


def test_post_process_gives_physical_units(processor, sdo_folder, aia171):
    paths = [aia171, sdo_folder / "AIAsynoptic1700.fits"]
    batch = processor(paths)
    physical = processor.post_process(batch["pixel_values"], batch["modality_ids"])
    assert physical.shape == (2, SIZE, SIZE)
    for image, path in zip(physical, paths, strict=True):
        _, expected = processor.to_physical(path)
        inside = np.isfinite(image) & np.isfinite(expected)
        assert inside.mean() > 0.75
        np.testing.assert_allclose(image[inside], expected[inside], rtol=1e-4, atol=1e-3)
    with pytest.raises(ValueError, match="pixel_values: expected"):
        processor.post_process(batch["pixel_values"], [3])
    for ids in ([3, 11], [3, -1]):
        with pytest.raises(ValueError, match="modality_ids: expected positions in"):
            processor.post_process(batch["pixel_values"], ids)
    assert processor.post_process(batch["pixel_values"][:0], []).shape == (0, SIZE, SIZE)


def fitted_limb(data: np.ndarray, centre: tuple[float, float], radius: float) -> tuple[float, float, float]:
    """Centre (x, y) and radius of the steepest fall of brightness along rays, by least squares."""
    from scipy.ndimage import gaussian_filter, map_coordinates

    angles = np.linspace(0, 2 * np.pi, 360, endpoint=False)
    reach = np.arange(0.97 * radius, 1.03 * radius, 0.25)
    x = centre[0] + reach[:, None] * np.cos(angles)
    y = centre[1] + reach[:, None] * np.sin(angles)
    profile = map_coordinates(gaussian_filter(np.nan_to_num(data), 1.0), [y, x], order=1)
    edge = np.gradient(profile, axis=0).argmin(axis=0)
    x, y = x[edge, np.arange(360)], y[edge, np.arange(360)]
    system = np.stack([2 * x, 2 * y, np.ones_like(x)], axis=1)
    a, b, c = np.linalg.lstsq(system, x**2 + y**2, rcond=None)[0]
    return float(a), float(b), math.sqrt(c + a * a + b * b)


@pytest.mark.parametrize("geometry", ["rsun", "arcsec"])
def test_maps_put_the_limb_where_the_header_says(sdo_folder, geometry):
    import astropy.units as u
    from astropy.coordinates import SkyCoord
    from sunpy.map.sources import AIAMap

    processor = SolarChipImageProcessor(geometry=geometry)
    path = sdo_folder / "AIAsynoptic1700.fits"
    batch, headers = processor(path, return_headers=True)
    (solar_map,) = processor.post_process(batch["pixel_values"], batch["modality_ids"], headers)
    assert isinstance(solar_map, AIAMap)
    centre = solar_map.world_to_pixel(SkyCoord(0 * u.arcsec, 0 * u.arcsec, frame=solar_map.coordinate_frame))
    assert centre.x.value == pytest.approx(511.5, abs=1e-6)
    assert centre.y.value == pytest.approx(511.5, abs=1e-6)
    expected = (solar_map.rsun_obs / solar_map.scale.axis1).value
    if geometry == "rsun":
        assert expected == pytest.approx(RSUN_PIXELS_1024, rel=1e-6)
    x, y, radius = fitted_limb(solar_map.data, (511.5, 511.5), expected)
    assert (x, y) == pytest.approx((511.5, 511.5), abs=0.7)  # the file's own pointing is off by half a pixel in x
    image = read_image(path)
    raw_x, raw_y, raw_radius = fitted_limb(image.data, (511.5, 511.5), image.rsun_arcsec / image.cdelt[0])
    zoom = solar_map.scale.axis1.value / image.cdelt[0]
    assert ((x - 511.5) * zoom, (y - 511.5) * zoom) == pytest.approx((raw_x - 511.5, raw_y - 511.5), abs=0.1)
    assert radius * zoom == pytest.approx(raw_radius, abs=0.1)
    assert radius == pytest.approx(expected * 1.003, rel=0.003)  # the limb at 1700 lies .3% outside the photosphere's
    # what the original file's Map says of the same Sun
    original = fits.getheader(path, 1)
    assert solar_map.rsun_obs.to_value("arcsec") == pytest.approx(original["RSUN_OBS"])
    assert solar_map.wavelength.to_value("angstrom") == 1700
    assert str(solar_map.unit) == "DN"
    assert abs((solar_map.reference_date.utc.datetime - headers[0].time.replace(tzinfo=None)).total_seconds()) < 0.01
    assert solar_map.dsun.to_value("m") == pytest.approx(original["DSUN_OBS"], rel=1e-6)
    assert solar_map.observer_coordinate.lat.to_value("deg") == pytest.approx(original["CRLT_OBS"], abs=1e-3)


def test_hmi_maps(processor, tmp_path):
    from sunpy.map.sources import HMIMap

    batch, headers = processor(write_hmi(tmp_path / "hmi.fits", magnetogram()), return_headers=True)
    (solar_map,) = processor.post_process(batch["pixel_values"], batch["modality_ids"], headers)
    assert isinstance(solar_map, HMIMap)
    assert solar_map.unit.to_string() in ("G", "Mx / cm2")
    assert solar_map.rsun_obs.to_value("arcsec") == 965
    assert np.nanmax(solar_map.data) > 300
    assert abs((solar_map.reference_date.utc.datetime - headers[0].time.replace(tzinfo=None)).total_seconds()) < 0.01
    again, facts = processor(solar_map, return_headers=True)
    torch.testing.assert_close(again["pixel_values"], batch["pixel_values"], atol=1e-3, rtol=1e-3)
    assert abs((facts[0].time - headers[0].time).total_seconds()) < 0.01


def test_maps_of_other_photometry_and_of_none(aia171):
    rate = SolarChipImageProcessor(size=SIZE, photometry="dn_per_s")
    batch, headers = rate(aia171, return_headers=True)
    (solar_map,) = rate.post_process(batch["pixel_values"], batch["modality_ids"], headers)
    assert str(solar_map.unit) == "DN / s"
    torch.testing.assert_close(rate(solar_map)["pixel_values"], batch["pixel_values"], atol=1e-4, rtol=1e-4)
    published = SolarChipImageProcessor.published(["171"])
    batch, headers = published(aia171, return_headers=True)
    (solar_map,) = published.post_process(batch["pixel_values"], batch["modality_ids"], headers)
    np.testing.assert_allclose(solar_map.data, fits.getdata(aia171), rtol=1e-3, atol=1e-2)
    array, facts = rate(np.ones((SIZE, SIZE)), modality="171", return_headers=True)
    with pytest.raises(SolarImageError, match="DATE-OBS"):
        rate.post_process(array["pixel_values"], array["modality_ids"], facts)


def test_gzip_and_memory_agree(processor, aia171):
    import gzip

    packed = io.BytesIO()
    with gzip.GzipFile(fileobj=packed, mode="wb") as stream:
        stream.write(aia171.read_bytes())
    torch.testing.assert_close(processor(packed.getvalue())["pixel_values"], processor(aia171)["pixel_values"])
