"""examples/forecast.py: files in; table, JSON, figures and Maps out; refusals in sentences."""

import json
import sys
from pathlib import Path

import pytest
import torch

from solarchip_hf import SolarChipConfig, SolarChipForImageClassification, SolarChipImageProcessor, SyntheticSun

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

import forecast  # noqa: E402


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    tower = {"image_size": 32, "patch_size": 8, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    calibration = {"method": "temperature", "temperature": 2.0, "thresholds": {"c_plus": 0.1, "m_plus": 0.9}}
    config = SolarChipConfig.from_name(
        "vit-tiny", modalities=["hmi", "aia171"], projection_dim=16, calibration=calibration, **tower
    )
    SolarChipForImageClassification(config).save_pretrained(folder)
    SolarChipImageProcessor(modalities=["hmi", "aia171"], size=32).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    folder = tmp_path_factory.mktemp("archive")
    times = ["2014-02-03", "2014-02-04", "2014-02-05"]
    SyntheticSun(seed=3, size=64).write_archive(folder, times, ["hmi", "aia171"], progress=False)
    return folder


def test_a_folder_becomes_table_json_figures_and_maps(model, archive, tmp_path, capsys):
    options = ["--output", str(tmp_path / "out.json"), "--figures", str(tmp_path / "figures")]
    options += ["--maps", str(tmp_path / "maps"), "--latest", "2", "--steps", "4", "--device", "cpu"]
    assert forecast.main([model, str(archive), *options]) == 0
    printed = capsys.readouterr().out
    assert printed.count("synthetic") == 2
    assert "C+" in printed.splitlines()[0]
    result = json.loads((tmp_path / "out.json").read_text())
    assert [item["valid_from"][:10] for item in result["forecasts"]] == ["2014-02-04", "2014-02-05"]
    for item in result["forecasts"]:
        assert {image["modality"] for image in item["images"]} == {"hmi", "aia171"}
        assert sum(item["probabilities"].values()) == pytest.approx(1)
        assert item["warnings"] == {"c_plus": True, "m_plus": False}
        assert abs(item["attribution"]["residual"]) < 0.1
        assert Path(item["figure"]).stat().st_size > 10_000
        assert set(item["maps"]) == {"hmi", "aia171"}
        assert all(Path(path).is_file() for path in item["maps"].values())
        # HMI's slot is a TAI one; the window counts from its digits in UTC
        assert item["time_nominal"] == item["valid_from"][:10].replace("-", ".") + "_00:00:00_TAI"
    assert not list(tmp_path.rglob("*.partial"))
    written = [line.removeprefix("written: ") for line in printed.splitlines() if line.startswith("written: ")]
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert sorted(written) == sorted(map(str, files))
    assert "The model has no threshold for X+" in printed


def test_what_cannot_be_used_is_said_and_the_rest_goes_on(model, archive, sdo_folder, capsys):
    magnetogram = next(archive.rglob("hmi*.fits"))
    broken = sdo_folder / "broken" / "html_not_fits.fits"
    other = sdo_folder / "AIAsynoptic0304.fits"
    assert forecast.main([model, str(magnetogram), str(broken), str(other), "--device", "cpu"]) == 1
    output = capsys.readouterr()
    assert output.out.count("synthetic") == 1
    assert "got an HTML or XML page" in output.err
    assert "expected one that the model knows (hmi, aia171), got aia304" in output.err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["no_such_file.fits"], "no_such_file.fits: no such file or folder"),
        (["ARCHIVE", "--latest", "0"], "--latest: expected at least 1, got 0"),
        (["ARCHIVE", "--output", "nowhere/out.json"], "--output: expected a place in a folder that exists"),
        (["ARCHIVE", "--attribution", "z", "--output", "out.json"], "--attribution: expected one of c_plus"),
        (["ARCHIVE", "--tolerance=-6min"], "tolerance: expected a positive time"),
    ],
)
def test_bad_input_ends_in_a_sentence(model, archive, arguments, sentence, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    arguments = [str(archive) if argument == "ARCHIVE" else argument for argument in arguments]
    assert forecast.main([model, *arguments, "--device", "cpu"]) == 2
    assert sentence in capsys.readouterr().err


def test_a_slot_of_aia_is_utc(model, archive, tmp_path):
    passband = str(next(archive.rglob("AIA*_0171.fits")))
    assert forecast.main([model, passband, "--output", str(tmp_path / "out.json"), "--steps", "2"]) == 0
    (item,) = json.loads((tmp_path / "out.json").read_text())["forecasts"]
    assert item["time_nominal"] == item["valid_from"]


def test_nothing_usable_is_status_2(model, sdo_folder, capsys):
    assert forecast.main([model, str(sdo_folder / "aia_171_cutout.fits"), "--device", "cpu"]) == 2
    assert "No observation could be used." in capsys.readouterr().err


def test_help_helps(capsys):
    with pytest.raises(SystemExit) as stop:
        forecast.main(["--help"])
    assert stop.value.code == 0
    assert "python examples/forecast.py" in capsys.readouterr().out
