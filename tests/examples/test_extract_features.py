"""The command that turns files into features: what it writes, and what it refuses."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from solarchip_hf import SolarChipConfig, SolarChipImageProcessor, SolarChipModel, SyntheticSun

SCRIPT = Path(__file__).parents[2] / "examples" / "extract_features.py"


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "vit-tiny"
    torch.manual_seed(0)
    SolarChipModel(SolarChipConfig.from_name("vit-tiny", modalities=["hmi", "171"])).save_pretrained(folder)
    SolarChipImageProcessor(modalities=["hmi", "171"], size=128).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    folder = tmp_path_factory.mktemp("archive")
    sun = SyntheticSun(seed=0, start="2014-02-01", days=2, size=128)
    sun.write_archive(folder, sun.times("1D"), ["hmi", "aia171"], progress=False)
    return folder


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    return stop.value.code


def test_folder_to_safetensors(monkeypatch, capsys, model_folder, archive, tmp_path):
    target = tmp_path / "features.safetensors"
    assert run(monkeypatch, model_folder, archive, "--output", target, "--tokens", "--batch_size", 3) == 0
    with safe_open(target, "pt") as stored:
        files = json.loads(stored.metadata()["files"])
        pooled, tokens = stored.get_tensor("pooler_output"), stored.get_tensor("last_hidden_state")
    assert pooled.shape == (4, 128)
    assert tokens.shape == (4, 65, 128)
    assert torch.equal(tokens[:, 0], pooled)
    assert pooled.isfinite().all()
    assert pooled.std(0).mean() > 1e-3  # different images, different features
    assert sorted(record["modality"] for record in files) == ["aia171", "aia171", "hmi", "hmi"]
    assert "finite: True" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == [target]  # nothing half-written is left


def test_bad_files_do_not_stop_the_good_ones(monkeypatch, capsys, model_folder, archive, tmp_path):
    page = tmp_path / "page.fits"
    page.write_text("<!DOCTYPE html><html><body>404</body></html>")
    good = next(archive.rglob("hmi*.fits"))
    assert run(monkeypatch, model_folder, page, good) == 1
    said = capsys.readouterr()
    assert "pooler_output: (1, 128)" in said.out
    assert "page.fits" in said.err
    assert "HTML" in said.err
    assert run(monkeypatch, model_folder, page) == 2
    assert "No file could be used" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [("nowhere/at-all", "x.fits"), ("nowhere/at-all", ".")])
def test_what_cannot_be_used_is_said_in_a_sentence(monkeypatch, capsys, tmp_path, arguments):
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, *arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith("extract_features.py: ")
    assert "Traceback" not in said
