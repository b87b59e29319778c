"""The search command: what it prints and draws, and what it refuses."""

import runpy
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from solarchip_hf import SolarChipConfig, SolarChipImageProcessor, SolarChipModel, SyntheticSun

SCRIPT = Path(__file__).parents[2] / "examples" / "search.py"


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("search")
    torch.manual_seed(0)
    fields = {"modalities": ["hmi", "171"], "image_size": 64, "patch_size": 16, "num_hidden_layers": 1}
    SolarChipModel(SolarChipConfig.from_name("vit-tiny", **fields)).save_pretrained(folder / "model")
    SolarChipImageProcessor(modalities=["hmi", "171"], size=64).save_pretrained(folder / "model")
    sun = SyntheticSun(seed=0, start="2014-02-01", days=80, size=64)
    sun.write_archive(folder / "archive", sun.times("10D"), ["hmi", "aia171"], progress=False)
    return folder


def run(monkeypatch, folder, *arguments):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
    monkeypatch.chdir(folder)
    try:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    except SystemExit as stop:
        return stop.code
    return 0


def test_nearest_observations_of_an_archive(monkeypatch, capsys, places, tmp_path):
    query = min((places / "archive").rglob("AIA*_0171.fits"))
    arguments = (places / "model", places / "archive", query, "-k", 3, "--embedding", "patch", "--note", "synthetic")
    assert run(monkeypatch, tmp_path, *arguments) == 0
    said = capsys.readouterr().out
    assert "0 images known, 8 added" in said
    answers = [line.split() for line in said.splitlines() if line.strip()[:1].isdigit()]
    assert [line[0] for line in answers] == ["1", "2", "3"]
    assert all(float(line[5].strip("(+")) >= 27 for line in answers)
    with Image.open(tmp_path / "nearest.png") as sheet:
        assert sheet.convert("L").entropy() > 1
    assert run(monkeypatch, tmp_path, *arguments, "--exclude_within", "0h", "--modality", "hmi") == 0
    said = capsys.readouterr().out
    assert "8 images known, 8 added" in said
    assert said.count("hmi.M_720s") == 3


def test_what_cannot_be_used_is_said_in_a_sentence(monkeypatch, capsys, places, tmp_path):
    query = min((places / "archive").rglob("AIA*_0171.fits"))
    page = tmp_path / "page.fits"
    page.write_text("<!DOCTYPE html><html></html>")
    for arguments, words in (
        ((places / "model", places / "archive", page), "HTML"),
        ((places / "model", places / "nowhere", query), "expected a prepared dataset"),
        ((places / "nowhere", places / "archive", query), "nowhere"),
        ((places / "model", places / "archive", query, "--exclude_within", "900D"), "Shorten --exclude_within"),
    ):
        assert run(monkeypatch, tmp_path, *arguments) == 2
        said = capsys.readouterr().err
        assert "search.py: " in said
        assert words in said
        assert "Traceback" not in said
    assert not (tmp_path / "nearest.png").exists()
