"""SDOML's Zarr and Surya's NetCDF, written in their published layout, become the same rows as FITS files."""

import json
import runpy
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import h5netcdf
import numcodecs
import numpy as np
import pandas as pd
import pytest
import zarr
from small_archive import write_archive

from solarchip_hf import SolarChipImageProcessor
from solarchip_hf.data import (
    load_observations,
    pair_observations,
    prepare_dataset,
    read_catalog,
    scan_archive,
    scan_sdoml,
    scan_surya,
)
from solarchip_hf.data.catalog import CATALOG_SCHEMA
from solarchip_hf.models.geometry import disk_mask
from solarchip_hf.models.headers import SolarImageError

EXAMPLE = Path(__file__).parents[2] / "examples" / "prepare_data.py"
START = datetime(2015, 1, 1, tzinfo=UTC)
SIZE = 32
QUIET = {"workers": 0, "progress": False}


def sun(number, scale, size=SIZE):
    """A picture that no flip or turn leaves alone, different for every number."""
    y, x = np.mgrid[0:size, 0:size] / size
    return ((1 + x + 3 * y * y + 0.1 * number) * scale).astype(np.float32)


def write_sdoml(store, group, images, attributes):
    """One array of SDOML v2: Zarr format 2, chunks along time, Blosc with zstd, keywords as lists."""
    root = zarr.open_group(store, mode="a", zarr_format=2)
    array = root.create_array(
        group,
        shape=images.shape,
        chunks=(3, SIZE, SIZE),
        dtype="f4",
        compressors=numcodecs.Blosc(cname="zstd", clevel=5),
    )
    array[...] = images
    array.attrs.update(attributes)


@pytest.fixture(scope="module")
def sdoml(tmp_path_factory):
    """Seven days of 131, 1700, Bx and Bz in two stores; the last image comes first in AIA's arrays."""
    folder = tmp_path_factory.mktemp("sdoml")
    order = [6, 0, 1, 2, 3, 4, 5]
    for channel, seconds in (("131A", 6), ("1700A", 124)):
        times = [START + timedelta(days=day, seconds=seconds) for day in order]
        attributes = {
            "T_OBS": [f"{time:%Y-%m-%dT%H:%M:%S}.57Z" for time in times],
            "EXPTIME": [2.9] * 7,
            "QUALITY": [0] * 6 + [1 << 14],
            "DEG_COR": [0.75 + 0.01 * day for day in order],
            "WAVELNTH": [int(channel[:-1])] * 7,
            "DSUN_OBS": [1.4711e11] * 7,
            "RSUN_OBS": [976.0] * 7,
            "CDELT1": [0.6] * 7,
            "CRPIX1": [2048.5] * 7,
            "CROTA2": [179.9] * 7,
            "ORIGIN": ["SDO/JSOC-SDP"] * 7,
        }
        write_sdoml(folder / "aia.zarr", f"2015/{channel}", np.stack([sun(day, 10) for day in order]), attributes)
    times = [START + timedelta(days=day) for day in range(7)]
    attributes = {
        "T_REC": [f"{time:%Y.%m.%d_%H:%M:%S}_TAI" for time in times],
        "T_OBS": [f"{time:%Y.%m.%d_%H:%M:%S}_TAI" for time in times],
        "QUALITY": [0] * 7,
        "DSUN_OBS": [1.4711e11] * 7,
    }
    for channel in ("Bx", "Bz"):
        write_sdoml(folder / "hmi.zarr", f"2015/{channel}", np.stack([sun(day, 100) for day in range(7)]), attributes)
    return folder


@pytest.fixture(scope="module")
def surya(tmp_path_factory):
    """Four hours of two AIA channels and HMI, one file not present, one that is an HTML page, and the index."""
    folder = tmp_path_factory.mktemp("surya")
    lines = ["path,timestep,present"]
    for hour in range(6):
        time = START + timedelta(hours=hour)
        name = f"2015/01/{time:%Y%m%d_%H%M}.nc"
        lines.append(f"{name},{time:%Y-%m-%d %H:%M:%S},{int(hour != 4)}")
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if hour == 5:
            path.write_text("<html>not here</html>")
            continue
        with h5netcdf.File(path, "w") as content:
            content.dimensions = {"y": SIZE, "x": SIZE}
            for variable, scale in (("aia131", 10), ("aia1600", 50), ("hmi_m", 100), ("hmi_bx", 1), ("hmi_v", 1)):
                content.create_variable(variable, ("y", "x"), "f4", data=sun(hour, scale))
    (folder / "index.csv").write_text("\n".join(lines) + "\n")
    return folder


def test_sdoml_catalogue_has_the_columns_of_a_scan_and_true_facts(sdoml):
    table = scan_sdoml([sdoml / "aia.zarr", sdoml / "hmi.zarr"], progress=False)
    assert list(table.columns) == CATALOG_SCHEMA.names
    assert table["modality"].value_counts().to_dict() == {"aia131": 7, "aia1700": 7, "hmi": 7}  # Bx is none of ours
    assert table["time"].is_monotonic_increasing
    bad = table[~table["usable"]]
    assert set(bad["modality"]) == {"aia131", "aia1700"}
    assert bad["reason"].str.contains("bit 14").all()
    aia = table[table["modality"] == "aia131"].iloc[-1]
    assert aia["path"] == f"{sdoml / 'aia.zarr'}::2015/131A::0"  # the seventh day is the first in its array
    assert aia["time"] == pd.Timestamp("2015-01-07T00:00:06.570Z")
    assert aia["time_nominal"] == pd.Timestamp("2015-01-07T00:00:00Z")
    assert (aia["unit"], aia["exposure"]) == ("DN/s", 2.9)
    assert "DN/s divided by SDOML's own degradation factor" in aia["notes"]
    assert "DEG_COR = 0.81" in aia["notes"]
    # the radius of the day, not the 976 arcsec of the keyword; the plate scale with it
    assert aia["rsun_arcsec"] == pytest.approx(975.87, abs=0.02)
    assert aia["plate_scale"] == pytest.approx(2457.6 / SIZE * aia["rsun_arcsec"] / 976.0)
    assert (aia["rotation"], aia["crpix_x"], aia["full_disk"]) == (0.0, (SIZE + 1) / 2, True)
    hmi = table[table["modality"] == "hmi"].iloc[0]
    assert hmi["time_nominal"] == pd.Timestamp("2015-01-01T00:00:00Z")
    assert hmi["time"] == pd.Timestamp("2014-12-31T23:59:25Z")  # TAI
    assert "Bz of HMI's vector field" in hmi["notes"]
    assert (
        scan_sdoml(sdoml / "aia.zarr", modalities=["131"], years=[2015], progress=False)["modality"].eq("aia131").all()
    )
    with pytest.raises(ValueError, match="groups YEAR/CHANNEL"):
        scan_sdoml(sdoml / "aia.zarr", years=[2012], progress=False)
    with pytest.raises(FileNotFoundError, match="expected a Zarr group"):
        scan_sdoml(sdoml / "nothing.zarr", progress=False)


def same_rows(folder, files, expected):
    """A dataset has the columns of one made of FITS files, and at 976 arcsec the very pixels of its source."""
    dataset, reference = load_observations(folder), load_observations(files)
    strip = dict.fromkeys(("hmi", "aia131", "aia1600", "aia1700", "aia171"), "")
    shape = {c for c in dataset.metadata.columns if c.partition("_")[0] not in strip}
    assert shape == {c for c in reference.metadata.columns if c.partition("_")[0] not in strip}
    own = {c.partition("_")[2] for c in dataset.metadata.columns if c.startswith("aia131_")}
    assert own == {c.partition("_")[2] for c in reference.metadata.columns if c.startswith("aia171_")}
    assert dataset.metadata.dtypes["time"] == reference.metadata.dtypes["time"]
    inside = disk_mask(SIZE, 0.95)
    for position, (name, image) in enumerate(expected):
        stored = dataset.physical(position)[name]
        assert stored.dtype == np.float16
        np.testing.assert_allclose(stored[inside], image[inside], rtol=2e-3)
        item = dataset[position]
        assert item["pixel_values"].shape == (3, SIZE, SIZE)
        assert np.isfinite(item["pixel_values"].numpy()).all()
    return dataset


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A dataset made of FITS files."""
    archive, out = tmp_path_factory.mktemp("fits"), tmp_path_factory.mktemp("prepared")
    write_archive(archive, days=2)
    prepare_dataset(archive, out, SolarChipImageProcessor(size=SIZE), **QUIET)
    return out


def test_sdoml_is_prepared_into_the_same_rows(sdoml, files, tmp_path):
    pairs = pair_observations(scan_sdoml([sdoml / "aia.zarr", sdoml / "hmi.zarr"], progress=False))
    assert len(pairs) == 7
    assert pairs["observed"].tolist() == [3, 3, 3, 3, 3, 1, 3]  # bad quality on the sixth day
    processor = SolarChipImageProcessor(size=SIZE, photometry="dn_per_s")
    manifest = prepare_dataset(pairs, tmp_path, processor, **QUIET)
    assert manifest["failures"] == 0
    assert manifest["images"] == {"hmi": 7, "aia131": 6, "aia1700": 6}
    dataset = same_rows(tmp_path, files, [("aia131", sun(day, 10)) for day in range(5)])
    np.testing.assert_allclose(
        dataset.physical(6)["hmi"][disk_mask(SIZE, 0.9)], sun(6, 100)[disk_mask(SIZE, 0.9)], rtol=2e-3
    )
    assert dataset.metadata.loc[2, "aia131_source"] == "aia.zarr::2015/131A::3"
    assert manifest["settings"]["unit_notes"].keys() == {"hmi", "aia131", "aia1700"}
    assert dataset.statistics["degradation"] == "sdoml: corrected at the source"
    assert dataset.statistics["modalities"]["aia131"]["unit"] == "DN/s"
    assert "SDOML v2: DN/s divided by" in dataset.statistics["source"]
    assert prepare_dataset(pairs, tmp_path, processor, **QUIET) == manifest


def test_what_an_archive_corrected_is_not_mixed_with_what_it_did_not(sdoml, surya, files, tmp_path):
    pairs = pair_observations(scan_sdoml([sdoml / "aia.zarr", sdoml / "hmi.zarr"], progress=False))
    table = {"name": "mine", "factors": {"aia131": {"2010-05-01": 1.0, "2020-01-01": 0.5}}}
    with pytest.raises(ValueError, match="corrected twice"):
        prepare_dataset(pairs, tmp_path / "twice", SolarChipImageProcessor(size=SIZE, degradation=table), **QUIET)
    archive = tmp_path / "archive"
    write_archive(archive, days=7)
    both = pd.concat(
        [scan_archive(archive, progress=False), scan_sdoml(sdoml / "aia.zarr", progress=False)], ignore_index=True
    )
    with pytest.raises(ValueError, match=r"one kind of source, got \['files', 'sdoml'\]"):
        prepare_dataset(pair_observations(both), tmp_path / "mixed", SolarChipImageProcessor(size=SIZE), **QUIET)
    prepare_dataset(pairs, tmp_path / "sdoml", SolarChipImageProcessor(size=SIZE), **QUIET)
    processor = load_observations(tmp_path / "sdoml").processor
    with pytest.raises(SolarImageError, match="corrected at the source"):
        processor.to_physical(next(archive.glob("aia/*_1700.fits")), "aia1700")  # raw counts are another quantity
    saved = SolarChipImageProcessor.from_pretrained(tmp_path / "sdoml")
    assert saved.degradation["name"] == "sdoml: corrected at the source"


def test_a_store_behind_a_url_is_read_by_fsspec(sdoml, tmp_path):
    import fsspec

    memory = fsspec.filesystem("memory")
    for name in ("aia.zarr", "hmi.zarr"):
        memory.put(str(sdoml / name), f"/bucket/{name}", recursive=True)
    stores = [f"memory://bucket/{name}" for name in ("aia.zarr", "hmi.zarr")]
    pairs = pair_observations(scan_sdoml(stores, progress=False))
    assert pairs.loc[0, "aia131"] == "memory://bucket/aia.zarr::2015/131A::1"
    manifest = prepare_dataset(pairs[:2], tmp_path / "url", SolarChipImageProcessor(size=SIZE), **QUIET)
    assert manifest["failures"] == 0
    local = pair_observations(scan_sdoml([sdoml / "aia.zarr", sdoml / "hmi.zarr"], progress=False))
    prepare_dataset(local[:2], tmp_path / "local", SolarChipImageProcessor(size=SIZE), **QUIET)
    remote, here = load_observations(tmp_path / "url"), load_observations(tmp_path / "local")
    np.testing.assert_array_equal(remote[1]["pixel_values"], here[1]["pixel_values"])
    assert remote.metadata.loc[0, "aia131_source"] == "memory://bucket/aia.zarr::2015/131A::1"


def test_surya_catalogue_lists_what_is_there_and_says_what_is_not(surya):
    table = scan_surya(surya / "index.csv", progress=False)
    assert list(table.columns) == CATALOG_SCHEMA.names
    good, bad = table[table["usable"]], table[~table["usable"]]
    assert good["modality"].value_counts().to_dict() == {"aia131": 4, "aia1600": 4, "hmi": 4}
    assert len(bad) == 2
    assert bad["reason"].str.contains("marked absent").sum() == 1
    assert bad["reason"].str.contains("expected a NetCDF file").sum() == 1
    assert set(good["time_nominal"]) == {pd.Timestamp(START) + timedelta(hours=hour) for hour in range(4)}
    assert good["notes"].str.contains("Surya core-sdo").all()
    assert good.loc[good["modality"] == "hmi", "unit"].eq("G").all()
    folder = scan_surya(surya, progress=False)
    assert folder["usable"].sum() == 15  # without the index, the file that it marks absent counts
    assert set(good["path"]) < set(folder.loc[folder["usable"], "path"])
    with pytest.raises(FileNotFoundError, match="Surya's index"):
        scan_surya(surya / "absent.csv", progress=False)
    (surya / "wrong.csv").write_text("file,when\na,b\n")
    with pytest.raises(ValueError, match="path, timestep, present"):
        scan_surya(surya / "wrong.csv", progress=False)


def test_surya_is_prepared_into_the_same_rows(surya, files, tmp_path):
    pairs = pair_observations(scan_surya(surya / "index.csv", progress=False))
    assert pairs["observed"].tolist() == [3, 3, 3, 3]
    manifest = prepare_dataset(pairs, tmp_path, SolarChipImageProcessor(size=SIZE, photometry="dn_per_s"), **QUIET)
    assert manifest["failures"] == 0
    dataset = same_rows(tmp_path, files, [("aia1600", sun(hour, 50)) for hour in range(4)])
    assert dataset.statistics["degradation"] == "surya: corrected at the source"
    assert dataset.metadata["aia131_exposure"].isna().all()
    refused = prepare_dataset(
        pairs, tmp_path / "dn", SolarChipImageProcessor(size=SIZE, photometry="dn"), **QUIET
    )  # counts need an exposure, which the files lack: only the magnetograms are left
    assert refused["images"] == {"hmi": 4, "aia131": 0, "aia1600": 0}
    failures = pd.read_parquet(tmp_path / "dn" / "failures.parquet")
    assert failures["reason"].str.contains("EXPTIME").all()
    assert json.loads((tmp_path / "manifest.json").read_text()) == manifest


def test_readers_without_their_package_say_how_to_get_it(sdoml, surya, monkeypatch):
    monkeypatch.setitem(sys.modules, "zarr", None)
    monkeypatch.setitem(sys.modules, "h5netcdf", None)
    with pytest.raises(ImportError, match=r"package zarr.*pip install 'solarchip_hf\[archives\]'"):
        scan_sdoml(sdoml / "aia.zarr", progress=False)
    with pytest.raises(ImportError, match=r"package h5netcdf.*pip install 'solarchip_hf\[archives\]'"):
        scan_surya(surya, progress=False)


def test_the_command_scans_them_too(sdoml, surya, tmp_path, capsys):
    main = runpy.run_path(str(EXAMPLE))["main"]
    index = str(tmp_path / "catalog.parquet")
    main(["scan", str(sdoml / "aia.zarr"), str(sdoml / "hmi.zarr"), "--format", "sdoml", "--index", index])
    assert "21 files: 21 read now" in capsys.readouterr().out
    assert read_catalog(index)["usable"].sum() == 19
    main(["pair", index, "--output", str(tmp_path / "pairs.parquet")])
    assert "used in 7 observations (6 complete)" in capsys.readouterr().out
    main(["scan", str(surya / "index.csv"), "--format", "surya", "--index", index])
    assert "aia1600" in capsys.readouterr().out
