"""The FITS files of the drawn Sun, read back by astropy and sunpy."""

import runpy
from pathlib import Path

import astropy.units as u
import numpy as np
import pandas as pd
import pytest
import sunpy.map
from astropy.coordinates import SkyCoord
from astropy.io import fits
from sunpy.coordinates import frames

from solarchip_hf.data import read_image
from solarchip_hf.data.synthetic_sun import SyntheticSun
from solarchip_hf.data.synthetic_sun.ephemeris import days_since_epoch, viewpoint
from solarchip_hf.data.synthetic_sun.observation import degradation
from solarchip_hf.models.photometry import degradation_factor, load_degradation

SLOT = "2014-02-01"


@pytest.fixture(scope="module")
def sun():
    return SyntheticSun(seed=0, start=SLOT, days=2, size=96)


@pytest.fixture(scope="module")
def archive(sun, tmp_path_factory):
    folder = tmp_path_factory.mktemp("archive")
    return folder, sun.write_archive(folder, progress=False)


def image_of(frame, modality, day=0):
    return frame[frame["modality"] == modality]["path"].iloc[day]


def test_names_and_folders_are_those_of_the_archives(archive):
    folder, frame = archive
    assert len(frame) == 22
    assert frame["written"].all()
    names = {Path(path).relative_to(folder).as_posix() for path in frame["path"]}
    assert "aia/2014/02/01/H0000/AIA20140201_0000_0171.fits" in names
    assert "aia/2014/02/01/H0000/AIA20140201_0002_1700.fits" in names
    assert "hmi/2014/02/02/hmi.M_720s.20140202_000000_TAI.fits" in names
    assert not list(folder.rglob("*.part"))


@pytest.mark.parametrize(
    ("modality", "real"), [("aia171", "AIAsynoptic0171.fits"), ("aia1600", "AIAsynoptic1600.fits")]
)
def test_aia_files_are_laid_out_like_real_synoptic_ones(archive, sdo_folder, modality, real):
    with fits.open(image_of(archive[1], modality)) as drawn, fits.open(sdo_folder / real) as observed:
        assert len(drawn) == len(observed) == 2
        assert isinstance(drawn[1], fits.CompImageHDU)
        header, model = drawn[1].header, observed[1].header
        for card in ("TELESCOP", "INSTRUME", "WAVELNTH", "WAVEUNIT", "WAVE_STR", "LVL_NUM", "CTYPE1", "CUNIT1"):
            assert header[card] == model[card], card
        for card in ("BSCALE", "CRVAL1", "CROTA2", "IMG_TYPE", "DSUN_REF", "RSUN_REF", "ACS_MODE"):
            assert header[card] == model[card], card
        assert "BUNIT" not in header
        assert header["CDELT1"] * header["NAXIS1"] == pytest.approx(model["CDELT1"] * model["NAXIS1"], rel=1e-6)
        assert header["CRPIX1"] == (header["NAXIS1"] + 1) / 2
        assert header["EXPTIME"] == pytest.approx(model["EXPTIME"], rel=0.01)
        assert header["RSUN_OBS"] == pytest.approx(973.9, abs=0.5)  # on 1 February
        assert header["R_SUN"] > 10 * header["RSUN_OBS"] / header["CDELT1"]  # of the detector's grid, a known trap
        assert drawn[1].data.dtype.kind == "f"


def test_hmi_files_are_turned_and_on_atomic_time(archive):
    with fits.open(image_of(archive[1], "hmi")) as hdus:
        header, image = hdus[1].header, hdus[1].data
    assert header["CROTA2"] == pytest.approx(179.93, abs=0.05)
    assert header["T_REC"] == "2014.02.01_00:00:00_TAI"
    assert header["T_OBS"].endswith("_TAI")
    assert header["DATE-OBS"].startswith("2014-01-31T23:58:5")
    assert header["CONTENT"] == "MAGNETOGRAM"
    assert header["BUNIT"] == "Gauss"
    disk = np.pi * (header["RSUN_OBS"] / header["CDELT1"]) ** 2
    assert np.isfinite(image).sum() == pytest.approx(disk, rel=0.01)
    assert np.isnan(image[0, 0])


def test_derotated_map_is_the_north_up_image(sun, archive):
    magnetogram = sunpy.map.Map(image_of(archive[1], "hmi"))
    expected = sun.observe(SLOT, ["hmi"])["hmi"]
    # the file's own WCS says where each pixel of the north-up image lies
    plate = sun.plate(SLOT, "hmi")
    x, y = plate.sky()
    arcsec = plate.radius * plate.scale
    pixels = magnetogram.world_to_pixel(
        SkyCoord(x * arcsec * u.arcsec, y * arcsec * u.arcsec, frame=magnetogram.coordinate_frame)
    )
    columns, rows = (np.rint(axis.to_value("pix")).astype(int).clip(0, 95) for axis in pixels)
    turned = magnetogram.data[rows, columns]
    both = np.isfinite(turned) & np.isfinite(expected) & (np.hypot(x, y) < 0.97)
    assert both.sum() > 5000
    right = np.corrcoef(turned[both], expected[both])[0, 1]
    upside_down = np.corrcoef(np.nan_to_num(magnetogram.data)[both], expected[both])[0, 1]
    assert right > 0.8
    assert abs(upside_down) < 0.3


def test_regions_lie_where_sunpy_expects_them(sun, archive):
    """A region's Carrington coordinates, put through the file's header by sunpy, point at its strong field."""
    magnetogram = sunpy.map.Map(image_of(archive[1], "hmi"))
    days = days_since_epoch(SLOT)
    l0 = viewpoint(days).l0
    young = [r for r in sun._history.alive(days) if days - r.emergence < 8 and r.flux_at(days) > 1.5]
    regions = [r for r in young if abs(r.meridian_distance(days)) < 60]
    assert regions
    for region in regions:
        place = SkyCoord(
            region.meridian_distance(days) * u.deg,
            region.latitude * u.deg,
            frame=frames.HeliographicStonyhurst(obstime=magnetogram.date),
        )
        column, row = (round(float(axis.value)) for axis in magnetogram.world_to_pixel(place))
        around = np.abs(magnetogram.data[row - 5 : row + 6, column - 5 : column + 6])
        assert np.nanmax(around) > 100
    assert magnetogram.carrington_longitude.to_value("deg") == pytest.approx(l0, abs=0.05)


def test_ephemeris_agrees_with_sunpy():
    from sunpy.coordinates import sun as almanac

    for date in ("2010-05-01", "2014-08-17T06:00", "2023-12-31T18:30"):
        view = viewpoint(days_since_epoch(date))
        assert view.b0 == pytest.approx(almanac.B0(date).deg, abs=0.02)
        assert (view.l0 - almanac.L0(date).deg + 180) % 360 - 180 == pytest.approx(0, abs=0.08)
        assert view.distance == pytest.approx(almanac.earth_distance(date).to_value("m"), rel=1e-4)
        assert view.carrington_rotation == int(almanac.carrington_rotation_number(date))


def test_files_say_that_they_are_synthetic_and_tell_nothing_of_flares(archive):
    forbidden = ("FLARE", "GOES", "HAZARD", "LABEL", "ENERGY", "NOAA", "STRESS", "HARP", "XRS", "CLASS")
    for path in archive[1]["path"]:
        with fits.open(path) as hdus:
            for hdu in hdus:
                text = repr(hdu.header).upper()
                assert not [word for word in forbidden if word in text]
            header = hdus[1].header
        assert "SYNTHETIC" in header["ORIGIN"]
        assert "synthetic" in str(header["HISTORY"]).lower()
        assert header["CREATOR"].endswith("SyntheticSun")


def test_pixels_survive_the_file_to_its_step(sun, archive):
    with fits.open(image_of(archive[1], "aia193")) as hdus:
        np.testing.assert_allclose(hdus[1].data, sun.observe(SLOT, ["193"])["aia193"], atol=0.0313)


def test_a_second_call_keeps_what_is_there_and_draws_what_is_missing(sun, archive):
    folder, frame = archive
    path = Path(image_of(frame, "aia304"))
    before = {p: Path(p).read_bytes() for p in frame["path"]}
    path.unlink()
    again = sun.write_archive(folder, progress=False)
    assert again.loc[again["written"], "path"].tolist() == [str(path)]
    assert {p: Path(p).read_bytes() for p in frame["path"]} == before


def test_processes_write_the_same_bytes(sun, archive, tmp_path):
    """The processes share nothing with this one, the seed of `hash` included."""
    frame = sun.write_archive(tmp_path, modalities=["hmi", "171"], workers=2, progress=False)
    assert frame["written"].all()
    for row in frame.itertuples():
        expected = image_of(archive[1], row.modality, int(row.time_nominal > pd.Timestamp(SLOT)))
        assert Path(row.path).read_bytes() == Path(expected).read_bytes()


def test_files_of_another_sun_are_not_taken_for_ours(archive):
    folder, frame = archive
    with pytest.raises(ValueError, match="overwrite=True"):
        SyntheticSun(seed=5, start=SLOT, days=1, size=96).write_archive(folder, modalities=["171"], progress=False)
    path = Path(image_of(frame, "aia94"))
    whole = path.read_bytes()
    try:
        path.write_bytes(b"<html>not a file</html>")
        with pytest.raises(ValueError, match="overwrite=True"):
            SyntheticSun(seed=0, start=SLOT, days=1, size=96).write_archive(folder, modalities=[94], progress=False)
    finally:
        path.write_bytes(whole)


def test_example_draws_an_archive_with_its_report_and_contact_sheet(tmp_path, capsys):
    script = Path(__file__).parents[2] / "examples" / "draw_synthetic_archive.py"
    example = runpy.run_path(str(script))
    arguments = ["--output", str(tmp_path / "archive"), "--start", "2014-02-01", "--end", "2014-02-02"]
    example["main"]([*arguments, "--size", "64", "--modalities", "hmi", "171"])
    assert "2 files written" in capsys.readouterr().out
    report = pd.read_csv(tmp_path / "archive" / "synthetic_flare_report_s20140201_e20140202.csv")
    assert len(report) > 0
    assert (tmp_path / "archive" / "contact_sheet_s20140201_e20140202.png").stat().st_size > 5_000


@pytest.mark.parametrize(
    ("given", "said"),
    [(["--end", "someday"], "someday"), (["--modalities", "999"], "999"), (["--end", "2013-01-01"], "after --start")],
)
def test_example_refuses_bad_input_in_a_sentence(tmp_path, capsys, given, said):
    example = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "draw_synthetic_archive.py"))
    assert example["main"](["--output", str(tmp_path / "archive"), *given]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "archive").exists()


def test_the_degradation_table_takes_out_what_was_drawn_in(tmp_path):
    sun = SyntheticSun(seed=3, start="2014-03-01", days=900, size=32)
    table = sun.degradation_table(["hmi", "aia131", "aia304"])
    assert list(table["factors"]) == ["aia131", "aia304"]
    for day in (0, 400, 899):
        time = sun.start + pd.Timedelta(day + 0.3, "D")
        frame = sun.write_archive(tmp_path / str(day), [time], ["aia131", "aia304"], progress=False)
        for path, name in zip(frame["path"], frame["modality"], strict=True):
            factor = degradation_factor(read_image(path), name, load_degradation(table))
            assert factor == pytest.approx(degradation(name, days_since_epoch(time)), rel=2e-3)
            assert factor < 0.9
