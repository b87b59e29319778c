"""The command that generates FITS files from FITS files: what it writes, and what it refuses."""

import hashlib
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits

from solarchip_hf import SyntheticSun

SCRIPT = Path(__file__).parents[2] / "examples" / "translate.py"
QUICK = ("--num_samples", 2, "--num_inference_steps", 2, "--device", "cpu")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A pipeline of one source and one of two, with random weights."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "translation"))
    from tiny_pipeline import tiny_pipeline

    folder = tmp_path_factory.mktemp("pipelines")
    tiny_pipeline().save_pretrained(folder / "one")
    tiny_pipeline(sources=("hmi", "aia171"), target="aia304").save_pretrained(folder / "two")
    return folder


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    folder = tmp_path_factory.mktemp("archive")
    sun = SyntheticSun(seed=0, start="2014-06-01", days=2, size=128)
    sun.write_archive(folder, sun.times("1D"), ["hmi", "aia171"], progress=False)
    return folder


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    return stop.value.code


def test_files_to_fits_and_figure(monkeypatch, capsys, saved, archive, tmp_path):
    first, second = sorted(archive.rglob("hmi*.fits"))
    page = tmp_path / "page.fits"
    page.write_text("<!DOCTYPE html><html><body>404</body></html>")
    output = tmp_path / "generated"
    assert run(monkeypatch, saved / "one", first, page, "--output", output, *QUICK, "--write_samples") == 1
    said = capsys.readouterr()
    assert "page.fits" in said.err
    assert "HTML" in said.err
    stem = f"{first.stem}_to_aia171"
    names = [
        f"{stem}.fits",
        f"{stem}.png",
        *(f"{stem}_{part}.fits" for part in ("sample01", "sample02", "uncertainty")),
    ]
    assert sorted(path.name for path in output.iterdir()) == names
    mean, *samples, spread = (fits.getdata(output / name) for name in names if name.endswith(".fits"))
    np.testing.assert_allclose(mean, np.mean(samples, axis=0), rtol=1e-5)
    np.testing.assert_allclose(spread, np.std(samples, axis=0, ddof=1), rtol=1e-4, atol=1e-4)
    assert (output / f"{stem}.png").read_bytes().startswith(b"\x89PNG")
    # Again: refused; another name for the second file, the same samples for the first
    assert run(monkeypatch, saved / "one", first, "--output", output, *QUICK) == 2
    assert "is there already" in capsys.readouterr().err
    options = ("--output", tmp_path / "again", *QUICK, "--no_figure")
    assert run(monkeypatch, saved / "one", second, first, *options) == 0
    assert len(list((tmp_path / "again").iterdir())) == 4
    assert np.array_equal(fits.getdata(tmp_path / "again" / f"{stem}.fits"), mean, equal_nan=True)


def test_several_sources_are_paired_by_their_headers(monkeypatch, capsys, saved, archive, tmp_path):
    options = ("--output", tmp_path, *QUICK, "--no_figure", "--scheduler", "ddim")
    assert run(monkeypatch, saved / "two", archive, *options) == 0
    written = sorted(tmp_path.glob("*_to_aia304.fits"))
    assert len(written) == 2
    for path in written:
        header = fits.getheader(path)
        assert header["SCHEDULR"] == "DDIMScheduler"
        assert header["SRCFIL1"].split(".")[2][:8] == header["SRCFIL2"][3:11]  # of one day
    capsys.readouterr()
    only = sorted(archive.rglob("hmi*.fits"))
    assert run(monkeypatch, saved / "two", *only, *options) == 2
    said = capsys.readouterr().err
    assert all(f"{path}: expected a file of aia171 of its own within 1 h of it, got none" in said for path in only)


def test_a_missing_file_shifts_no_pair_and_is_reported(monkeypatch, capsys, saved, archive, tmp_path):
    first, second = sorted(archive.rglob("hmi*.fits"))
    passbands = sorted(archive.rglob("*_0171.fits"))
    options = ("--output", tmp_path / "out", *QUICK, "--no_figure")
    assert run(monkeypatch, saved / "two", first, second, passbands[1], *options) == 1
    written = [path for path in (tmp_path / "out").iterdir() if path.name.endswith("_to_aia304.fits")]
    assert [path.name for path in written] == [f"{second.stem}_to_aia304.fits"]
    assert fits.getheader(written[0])["SRCFIL2"] == passbands[1].name
    said = capsys.readouterr().err
    assert f"refused  {first}: " in said
    assert str(second) not in said


def test_two_sources_of_one_name_do_not_replace_each_other(monkeypatch, capsys, saved, archive, tmp_path):
    first, second = sorted(archive.rglob("hmi*.fits"))
    other = tmp_path / "other" / first.name
    other.parent.mkdir()
    other.write_bytes(second.read_bytes())
    options = ("--output", tmp_path / "out", *QUICK, "--no_figure", "--overwrite")
    assert run(monkeypatch, saved / "one", first, other, *options) == 1
    assert f"{other}: expected a name of its own, got that of {first}" in capsys.readouterr().err
    assert fits.getheader(tmp_path / "out" / f"{first.stem}_to_aia171.fits")["SRCSHA1"] == sha256(first)


@pytest.mark.parametrize(
    ("pipeline", "inputs", "said"),
    [
        ("nowhere/at/all", "archive", "expected the folder of a saved pipeline"),
        ("one", "nothing.fits", "no such file or folder"),
    ],
)
def test_what_cannot_be_used_is_said_in_a_sentence(
    monkeypatch, capsys, saved, archive, tmp_path, pipeline, inputs, said
):
    given = archive if inputs == "archive" else tmp_path / inputs
    assert run(monkeypatch, saved / pipeline, given, "--output", tmp_path / "out", *QUICK) == 2
    message = capsys.readouterr().err
    assert "translate.py: " in message
    assert said in message
    assert "Traceback" not in message
    assert not (tmp_path / "out").exists()
