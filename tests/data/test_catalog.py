"""The catalogue: every file of the real folder right, faults named, incremental, and not to be stopped."""

import gzip
import importlib
import os
import shutil
import signal
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd
import pytest
from small_archive import write_aia, write_hmi

from solarchip_hf.data import catalog
from solarchip_hf.data.catalog import CATALOG_SCHEMA, find_image_files, read_catalog, scan_archive
from solarchip_hf.data.isolation import WorkerDied, map_isolated

STATE = ["path", "usable", "reason"]
SLOT = datetime(2015, 1, 1, tzinfo=UTC)


@pytest.fixture(scope="module")
def real(sdo_folder):
    table = scan_archive(sdo_folder, progress=False)
    table["name"] = table["path"].str.rsplit("/", n=1).str[-1]
    return table.set_index("name")


def test_real_folder_has_a_row_for_every_image_file(real, sdo_folder):
    expected = [p.name for p in sdo_folder.rglob("*") if p.suffix in (".fits", ".jp2")]
    assert sorted(real.index) == sorted(expected)
    assert list(real.reset_index(drop=True).columns) == CATALOG_SCHEMA.names
    assert not any(name.endswith(".npz") for name in real.index)


@pytest.mark.parametrize("wavelength", [131, 171, 193, 211, 304, 335, 1600, 1700])
def test_real_synoptics_are_aia_of_2024(real, wavelength):
    row = real.loc[f"AIAsynoptic{wavelength:04d}.fits"]
    assert row.modality == f"aia{wavelength}"
    assert row.usable
    assert row.full_disk
    assert row.near_real_time
    assert row.reason == ""
    assert abs(row.time - pd.Timestamp("2024-10-04T16:17:50Z")) < pd.Timedelta("10s")
    assert row.time_nominal == pd.Timestamp("2024-10-04T16:18Z")
    assert (row.width, row.height) == (1024, 1024)
    assert row.plate_scale == pytest.approx(2.4, abs=1e-5)
    assert row.rsun_arcsec == pytest.approx(959.651, abs=0.01)
    assert row.b0 == pytest.approx(6.525, abs=0.01)
    assert row.quality == 2**30
    assert 0.9 < row.exposure < 3


def test_a_row_that_is_read_by_itself_makes_a_table(sdo_folder):
    path = str(sdo_folder / "AIAsynoptic0171.fits")
    table = catalog.catalog_frame(
        [catalog.read_facts(path), catalog.unusable_facts("away.fits", "gone") | {"file_size": 5}]
    )
    assert list(table["file_size"]) == [0, 5]
    assert list(table["mtime_ns"]) == [0, 0]
    assert dict(table.dtypes) == dict(catalog.catalog_frame([]).dtypes)
    assert table.loc[0, "modality"] == "aia171"
    assert table.loc[0, "usable"]


REAL_OTHERS = {
    "2011_06_25__00_59_43_71__SDO_AIA_AIA_1700.jp2": "aia1700",
    "2014_01_01__00_00_11_34__SDO_AIA_AIA_171.jp2": "aia171",
    "2014_02_03__02_08_47_34__SDO_AIA_AIA_171.jp2": "aia171",
    "2014_02_03__03_30_23_34__SDO_AIA_AIA_171.jp2": "aia171",
    "2015_12_21__00_10_34_34__SDO_AIA_AIA_171.jp2": "aia171",
    "2021_01_06__00_01_41_13__SDO_AIA_AIA_304.jp2": "aia304",
    "2021_06_01__00_01_21_347__SDO_AIA_AIA_171.jp2": "aia171",
    "2021_06_01__00_01_29_132__SDO_AIA_AIA_304.jp2": "aia304",
    "2022_01_01__00_03_52_835__SDO_AIA_AIA_193.jp2": "aia193",
    "2022_08_02__10_47_53_000__SDO_HMI_HMI_magnetogram.jp2": "hmi",
    "2024_04_16__11_15_41_129__SDO_AIA_AIA_304.jp2": "aia304",
    "aia_171_level1.fits": "aia171",
}


@pytest.mark.parametrize(("name", "modality"), REAL_OTHERS.items())
def test_real_other_images_are_recognised(real, name, modality):
    row = real.loc[name]
    assert row.modality == modality
    assert row.usable
    assert row.full_disk
    assert row.approximate == name.endswith(".jp2")
    if row.approximate:  # the file's name holds the start of the exposure
        assert abs(row.time - pd.to_datetime(name[:20], format="%Y_%m_%d__%H_%M_%S", utc=True)) < pd.Timedelta("25s")


REAL_REFUSED = {
    "2023_01_31__03_39_23_200__SDO_HMI_HMI_continuum.jp2": "CONTINUUM",
    "resampled_hmi.fits": "CONTINUUM",
    "aia_171_cutout.fits": "partial disk",
    "hmi.sharp_cea_720s.1449.20120306_202400_TAI.magnetogram.fits": "CRLN-CEA",
    "hmi.sharp_cea_720s.377.20110215_020000_TAI.magnetogram.fits": "CRLN-CEA",
    "mdi.fd_m_96m_lev182.20101015_000000_TAI.data.fits": "MDI",
    "html_not_fits.fits": "HTML",
    "truncated_aia20200207_162100_0193.fits": "truncated",
}


@pytest.mark.parametrize(("name", "reason"), REAL_REFUSED.items())
def test_real_others_are_refused_with_their_reason(real, name, reason):
    row = real.loc[name]
    assert not row.usable
    assert reason in row.reason
    partial = name.startswith(("hmi.sharp", "aia_171_cutout"))
    assert (row.modality is None) != name.startswith("aia_171_cutout")
    if partial:
        assert not row.full_disk


def test_nothing_of_the_real_folder_is_left_untested(real):
    named = {*REAL_OTHERS, *REAL_REFUSED} | {n for n in real.index if n.startswith("AIAsynoptic")}
    assert named == set(real.index)


def test_hmi_slot_is_its_tai_date(tmp_path):
    write_hmi(tmp_path, SLOT)
    row = scan_archive(tmp_path, progress=False).iloc[0]
    assert row.time == pd.Timestamp("2014-12-31T23:59:25Z")  # 35 s before the TAI stamp in 2015
    assert row.time_nominal == pd.Timestamp("2015-01-01T00:00Z")
    assert abs(row.rotation) == pytest.approx(180.0)


def test_planted_faults_are_named_and_good_files_are_not(tmp_path):
    good = write_aia(tmp_path, SLOT, 171)
    with open(good, "rb") as source, gzip.open(tmp_path / "zipped.fits.gz", "wb") as target:
        shutil.copyfileobj(source, target)
    (tmp_path / "empty.fits").touch()
    (tmp_path / "page.fits").write_text("<html><body>404 Not Found</body></html>")
    (tmp_path / "cut.fits").write_bytes(good.read_bytes()[:-3000])
    (tmp_path / "notes.txt").write_text("left alone")
    (tmp_path / "cut.fits.gz").write_bytes((tmp_path / "zipped.fits.gz").read_bytes()[:400])
    whole = (tmp_path / "zipped.fits.gz").read_bytes()
    (tmp_path / "late.fits.gz").write_bytes(whole[:-2000])  # its header is whole, its pixels are not
    (tmp_path / "padded.fits.gz").write_bytes(whole + bytes(512))  # as a tape leaves it
    write_aia(tmp_path, SLOT, 171, name="eclipse.fits", QUALITY=1 << 13)
    write_aia(tmp_path, SLOT, 171, name="nrt.fits", QUALITY=1 << 30)
    write_aia(tmp_path, SLOT, 171, name="other.fits", TELESCOP="GOES", INSTRUME="SUVI")
    write_hmi(tmp_path, SLOT, name="continuum.fits", CONTENT="CONTINUUM INTENSITY")
    table = scan_archive(tmp_path, progress=False)
    table.index = [os.path.basename(path) for path in table["path"]]
    usable = set(table.index[table["usable"]])
    assert usable == {good.name, "zipped.fits.gz", "padded.fits.gz", "nrt.fits"}
    expected = {
        "empty.fits": "empty",
        "page.fits": "HTML",
        "cut.fits": "truncated",
        "cut.fits.gz": "gzip",
        "late.fits.gz": "gzip",
        "eclipse.fits": "eclipse",
        "other.fits": "INSTRUME",
        "continuum.fits": "CONTINUUM",
    }
    assert set(table.index) - usable == set(expected)
    for name, word in expected.items():
        assert word.lower() in table.loc[name, "reason"].lower(), (name, table.loc[name, "reason"])
    assert table.attrs["report"]["unusable"] == len(expected)
    assert (table.loc[list(usable), "reason"] == "").all()


def test_second_scan_reads_only_what_is_new_or_changed(tmp_path):
    archive, index = tmp_path / "archive", tmp_path / "catalog.parquet"
    first = write_aia(archive, SLOT, 171)
    second = write_aia(archive, SLOT, 193)
    doomed = write_aia(archive, SLOT, 211)
    before = scan_archive(archive, index, progress=False)
    assert before.attrs["report"]["read"] == 3
    again = scan_archive(archive, index, progress=False)
    assert again.attrs["report"] == {**before.attrs["report"], "read": 0, "kept": 3}
    pd.testing.assert_frame_equal(again, before)
    pd.testing.assert_frame_equal(read_catalog(index), before)

    third = write_aia(archive, SLOT, 304)
    second.unlink()
    write_aia(archive, SLOT, 193, EXPTIME=1.5)
    os.utime(second, ns=(10**18, 10**18))
    doomed.unlink()
    after = scan_archive(archive, index, progress=False)
    assert after.attrs["report"] == {"files": 3, "read": 2, "kept": 1, "gone": 1, "usable": 3, "unusable": 0}
    assert set(after["path"]) == {str(first), str(second), str(third)}
    assert after.set_index("path").loc[str(second), "exposure"] == 1.5


def test_an_index_of_an_older_version_is_read_again(tmp_path, monkeypatch):
    archive, index = tmp_path / "archive", tmp_path / "catalog.parquet"
    write_aia(archive, SLOT, 171)
    with monkeypatch.context() as older:
        older.setattr("solarchip_hf.data.catalog.INDEX_VERSION", 1)
        scan_archive(archive, index, progress=False)
    assert scan_archive(archive, index, progress=False).attrs["report"]["read"] == 1
    assert scan_archive(archive, index, progress=False).attrs["report"]["read"] == 0


def test_a_scan_that_breaks_off_goes_on_from_its_index(tmp_path, monkeypatch):
    archive, index = tmp_path / "archive", tmp_path / "catalog.parquet"
    for wavelength in (94, 131, 171, 193, 211):
        write_aia(archive, SLOT, wavelength)
    monkeypatch.setattr(catalog, "_SAVE_EVERY", 2)
    whole = catalog._merged
    calls = []

    def break_off(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return whole(*arguments)

    monkeypatch.setattr(catalog, "_merged", break_off)
    with pytest.raises(KeyboardInterrupt):
        scan_archive(archive, index, progress=False)
    monkeypatch.undo()
    resumed = scan_archive(archive, index, progress=False)
    assert resumed.attrs["report"]["kept"] == 4
    assert resumed.attrs["report"]["read"] == 1
    assert resumed["usable"].all()
    assert resumed["modality"].tolist() == ["aia94", "aia131", "aia171", "aia193", "aia211"]


def test_index_of_others_is_refused(tmp_path):
    write_aia(tmp_path / "archive", SLOT, 171)
    foreign = tmp_path / "foreign.parquet"
    pd.DataFrame({"a": [1]}).to_parquet(foreign)
    with pytest.raises(ValueError, match="without its mark"):
        scan_archive(tmp_path / "archive", foreign, progress=False)
    (tmp_path / "text.parquet").write_text("no parquet at all")
    with pytest.raises(ValueError, match="written by scan_archive"):
        scan_archive(tmp_path / "archive", tmp_path / "text.parquet", progress=False)
    with pytest.raises(NotADirectoryError, match="expected a folder"):
        scan_archive(tmp_path / "absent")


def test_files_that_kill_or_stall_their_reader_do_not_stop_a_scan(tmp_path, deadly):
    archive = tmp_path / "archive"
    good = [write_aia(archive, SLOT, wavelength) for wavelength in (94, 171, 193, 304)]
    write_aia(archive, SLOT, 211, name=deadly)
    os.mkfifo(archive / "stalls.fits")  # opening it waits for a writer that never comes
    table = scan_archive(archive, workers=2, timeout=5, progress=False)
    table.index = [os.path.basename(path) for path in table["path"]]
    assert set(table.index[table["usable"]]) == {path.name for path in good}
    assert f"status {-signal.SIGKILL}" in table.loc[deadly, "reason"]
    assert "too long" in table.loc["stalls.fits", "reason"]


def test_the_start_of_a_reader_does_not_count_as_time_of_a_file(tmp_path, monkeypatch):
    module = tmp_path / "slow_to_load.py"
    module.write_text("def answer(item):\n    return item + 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    function = importlib.import_module("slow_to_load").answer
    module.write_text("import time\ntime.sleep(3)\n" + module.read_text())  # in the reader's process only
    assert list(map_isolated(function, [1], timeout=1.5)) == [(1, 2)]


def test_names_of_every_kind(tmp_path):
    archive, index = tmp_path / "ünï 日本" / "a b", tmp_path / "catalog.parquet"
    good = write_aia(archive, SLOT, 171, name="späce ñ.fits")
    data = good.read_bytes()
    Path(os.fsdecode(os.fsencode(archive) + b"/latin-\xe9.fits")).write_bytes(data)  # no UTF-8
    (archive / "link.fits").symlink_to(good)
    (archive / "loop").symlink_to(archive)
    (archive / "gone.fits").symlink_to(archive / "nothing")
    table = scan_archive(tmp_path, index, progress=False)
    names = {os.path.basename(path): (usable, reason) for path, usable, reason in table[STATE].to_numpy()}
    assert set(names) == {"späce ñ.fits", "link.fits", r"latin-\xe9.fits"}
    assert names["späce ñ.fits"] == names["link.fits"] == (True, "")
    assert names[r"latin-\xe9.fits"][0] is False
    assert "No such file" in names[r"latin-\xe9.fits"][1]
    pd.testing.assert_frame_equal(scan_archive(tmp_path, index, progress=False), table)


def test_isolated_calls_give_values_errors_and_deaths():
    results = dict(map_isolated(os.path.getsize, [__file__, "/nowhere"], workers=2))
    assert results[__file__] == os.path.getsize(__file__)
    assert isinstance(results["/nowhere"], FileNotFoundError)
    ((_, death),) = map_isolated(os._exit, [3])
    assert isinstance(death, WorkerDied)
    assert death.returncode == 3


def test_scan_of_nothing_is_an_empty_table_of_the_same_columns(tmp_path):
    table = scan_archive(tmp_path, progress=False)
    assert not len(table)
    assert list(table.columns) == CATALOG_SCHEMA.names


def test_a_folder_that_cannot_be_read_does_not_stop_a_scan(tmp_path, monkeypatch, caplog):
    good = write_aia(tmp_path, SLOT, 171)
    with monkeypatch.context() as patch:
        patch.chdir(tmp_path)
        for _ in range(18):  # beyond 4096 characters the system refuses the path, whoever asks
            os.mkdir("d" * 250)
            os.chdir("d" * 250)
        Path("lost.fits").touch()
    table = scan_archive(tmp_path, progress=False)
    assert [Path(path).name for path in table["path"]] == [good.name]
    assert "was left out: the folder cannot be read" in caplog.text


def test_files_are_found_once_in_order_and_a_named_one_whatever_its_ending(tmp_path):
    names = ["b.fits", "a.jp2", "deep/c.fits.gz", "note.txt"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = find_image_files([tmp_path / "note.txt", tmp_path, str(tmp_path / "b.fits")])
    assert [file.relative_to(tmp_path).as_posix() for file in found] == [
        "note.txt",
        "a.jp2",
        "b.fits",
        "deep/c.fits.gz",
    ]
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        find_image_files([tmp_path / "gone"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no file ending in"):
        find_image_files([tmp_path / "empty"])
