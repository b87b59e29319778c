"""What all commands share: a working example in --help, and wrong uses that end in one sentence and status 2."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from solarchip_hf import (
    SolarChipConfig,
    SolarChipForImageClassification,
    SolarChipForPreTraining,
    SolarChipImageProcessor,
    SyntheticSun,
)

EXAMPLES = Path(__file__).parents[2] / "examples"
COMMANDS = sorted(path.stem for path in EXAMPLES.glob("*.py"))
TOWER = {"image_size": 32, "patch_size": 8, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A backbone, a flare model, a pipeline, an archive of a day, and files that are none of these."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "translation"))
    from tiny_pipeline import tiny_pipeline

    folder = tmp_path_factory.mktemp("world")
    torch.manual_seed(0)
    names = ["hmi", "aia171"]
    for name, kind in (("backbone", SolarChipForPreTraining), ("flare", SolarChipForImageClassification)):
        config = SolarChipConfig.from_name("vit-tiny", modalities=names, projection_dim=16, **TOWER)
        kind(config).save_pretrained(folder / name)
        SolarChipImageProcessor(modalities=names, size=32).save_pretrained(folder / name)
    tiny_pipeline().save_pretrained(folder / "pipeline")
    SyntheticSun(seed=0, size=64).write_archive(folder / "archive", ["2014-02-03"], names, progress=False)
    next((folder / "archive").rglob("hmi*.fits")).rename(folder / "hmi.fits")
    (folder / "empty").mkdir()
    (folder / "note.txt").write_text("# Notes, no list\n\none, two\nthree, four, five, six\n")
    return folder


def call(load_example, monkeypatch, name, *arguments):
    """Exit status of a command."""
    module = load_example(name)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
    try:
        needs = name in ("pretrain", "finetune_flare", "train_prior", "train_controlnet")
        status = module.main(list(arguments)) if needs else module.main()
    except SystemExit as stop:
        return stop.code
    return 0 if status is None else status


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_an_example(load_example, monkeypatch, capsys, name):
    monkeypatch.setenv("COLUMNS", "80")
    assert call(load_example, monkeypatch, name, "--help") == 0
    lines = capsys.readouterr().out.splitlines()
    # whole, on a line of its own, so that it can be copied
    assert any(line.startswith("    ") and f" examples/{name}.py " in line for line in lines)


WRONG = [
    # the wrong kind of folder, a file, no folder
    ("translate", ["backbone", "hmi.fits", "--output", "new"], "got 'backbone', which is a pretrained model"),
    ("translate", ["flare", "hmi.fits", "--output", "new"], "tuned flare model. examples/forecast.py takes it"),
    ("evaluate_translation", ["backbone", "archive"], "got 'backbone', which is a pretrained model"),
    ("forecast", ["backbone", "hmi.fits"], "expected the folder of a tuned flare model"),
    ("forecast", ["pipeline", "hmi.fits"], "a translation pipeline. examples/translate.py takes it"),
    ("extract_features", ["pipeline", "hmi.fits"], "a translation pipeline. examples/translate.py takes it"),
    ("search", ["pipeline", "archive", "hmi.fits"], "a translation pipeline. examples/translate.py takes it"),
    ("forecast", ["hmi.fits", "flare"], "got 'hmi.fits', which is a file"),
    ("extract_features", ["empty", "hmi.fits"], "a folder without config.json"),
    ("extract_features", ["./nowhere", "hmi.fits"], "got './nowhere': no such folder"),
    ("forecast", ["nowhere/", "hmi.fits"], "got 'nowhere/': no such folder"),
    ("search", ["no/where/else", "archive", "hmi.fits"], "got 'no/where/else': no such folder"),
    ("translate", ["/nowhere", "hmi.fits", "--output", "new"], "got '/nowhere': no such folder"),
    (
        "finetune_flare",
        ["--data_dir", "archive", "--events", "note.txt", "--model_name", "../x"],
        "'../x': no such fol",
    ),
    (
        "train_prior",
        ["--data_dir", "archive", "--modalities", "171", "--autoencoder", "pipeline"],
        "a translation pipe",
    ),
    ("pretrain", ["--data_dir", "archive", "--model_name", "./x"], "got './x': no such folder"),
    # times and lengths of time
    ("draw_synthetic_archive", ["--output", "new", "--cadence", "fortnight"], "--cadence: expected a positive time"),
    ("draw_synthetic_archive", ["--output", "new", "--cadence", "1"], "--cadence: expected a positive time"),
    ("draw_synthetic_archive", ["--output", "new", "--start", "2014-13-01"], "--start: expected a date"),
    ("draw_synthetic_archive", ["--output", "new", "--end", "20"], "--end: expected a date"),
    ("download_sdo", ["new", "--start", "2014-02-30", "--end", "2014-03-01"], "--start: expected a date"),
    (
        "download_sdo",
        ["new", "--start", "2014", "--end", "2015", "--cadence", "6"],
        "cadence: expected a positive time",
    ),
    ("prepare_data", ["prepare", "archive", "new", "--train-end", "5"], "--train-end: expected a date"),
    ("prepare_data", ["prepare", "archive", "new", "--tolerance", "6"], "--tolerance: expected a positive time"),
    ("search", ["backbone", "archive", "hmi.fits", "--exclude_within", "27"], "--exclude_within: expected a time of"),
    ("evaluate_translation", ["pipeline", "archive", "--block", "a week"], "--block: expected a positive time"),
    ("pretrain", ["--data_dir", "archive", "--gap=-27D"], "gap: expected a time of zero or more"),
    (
        "finetune_flare",
        ["--data_dir", "archive", "--events", "note.txt", "--validation_start", "2014", "--test_start", "2014-13-01"],
        "test_start: expected a date",
    ),
    # files and folders that are something else
    (
        "finetune_flare",
        ["--data_dir", "archive", "--events", "note.txt", "--model_name", "backbone"],
        "events: note.txt",
    ),
    ("draw_synthetic_archive", ["--output", "note.txt"], "--output: expected a folder, got the file note.txt"),
    (
        "translate",
        ["pipeline", "hmi.fits", "--output", "note.txt"],
        "--output: expected a folder, got the file note.txt",
    ),
    ("prepare_data", ["prepare", "archive", "note.txt"], "output: expected a folder, got the file note.txt"),
    ("prepare_data", ["prepare", "note.txt", "new"], "source: expected the table that `pair` wrote"),
    ("prepare_data", ["prepare", "nothing.parquet", "new"], "source: expected the table that `pair` wrote"),
    ("download_sdo", ["note.txt", "--start", "2014-01-01", "--end", "2014-01-02"], "folder: expected the root"),
    ("forecast", ["flare", "hmi.fits", "--figures", "note.txt"], "--figures: expected a folder, got note.txt"),
    ("forecast", ["flare", "hmi.fits", "--maps", "no/where"], "--maps: expected a place in a folder that exists"),
    ("extract_features", ["flare", "hmi.fits", "--output", "empty"], "--output: expected a file in a folder"),
    ("search", ["backbone", "archive", "nothing.fits"], "query: expected a FITS or JPEG2000 file, got nothing.fits"),
    # numbers, names, devices
    ("search", ["backbone", "archive", "hmi.fits", "-k", "0"], "-k, --batch_size: expected at least 1, got 0 and 8"),
    ("forecast", ["flare", "hmi.fits", "--steps", "-4"], "--steps: expected at least 1, got -4"),
    ("extract_features", ["backbone", "hmi.fits", "--device", "gpu"], "--device: expected one that torch has"),
    ("forecast", ["flare", "hmi.fits", "--device", "gpu"], "--device: expected one that torch has"),
    ("translate", ["pipeline", "hmi.fits", "--output", "new", "--device", "gpu"], "--device: expected one that torch"),
    ("search", ["backbone", "archive", "hmi.fits", "--device", "cuda:99"], "--device: expected one that torch has"),
    ("push_to_hub", ["backbone", "--repo_id", "a/b/c", "--dry_run"], "'a/b/c'"),
    ("pretrain", ["--data_dir", "archive", "--image_size", "64"], "got --image_size 64. A field of the configuration"),
    ("pretrain", ["--data_dir", "archive", "--learning_rate", "-1"], "learning_rate, per_device_train_batch_size: exp"),
    (
        "pretrain",
        ["--data_dir", "archive", "--model_name", "vit-tiny", "--config_overrides", '{"image_size": 100}'],
        "pretrain.py: SolarChipViTConfig.image_size: expected a multiple of",
    ),
]


@pytest.mark.parametrize(("name", "arguments", "sentence"), WRONG, ids=lambda value: str(value)[:40])
def test_wrong_uses_end_in_one_sentence(load_example, monkeypatch, capsys, world, tmp_path, name, arguments, sentence):
    monkeypatch.chdir(world)
    before = sorted(world.rglob("*"))
    assert call(load_example, monkeypatch, name, *arguments) == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert said.splitlines()[-1].startswith(f"{name}.py: ")
    assert sorted(world.rglob("*")) == before  # nothing was begun


def test_a_missing_input_and_an_empty_folder_do_not_stop_the_others(load_example, monkeypatch, capsys, world, tmp_path):
    monkeypatch.chdir(world)
    quick = ["--output", str(tmp_path / "out"), "--num_samples", "1", "--num_inference_steps", "1", "--no_figure"]
    for name, model, rest, good in (
        ("forecast", "flare", [], "2014-02-03T00:00:00Z"),
        ("extract_features", "backbone", [], "pooler_output: (1, 32)"),
        ("translate", "pipeline", quick, "written: "),
    ):
        cpu = [*rest, "--device", "cpu"]
        assert call(load_example, monkeypatch, name, model, "nothing.fits", "hmi.fits", "empty", *cpu) == 1
        said = capsys.readouterr()
        assert good in said.out
        assert "refused  nothing.fits: no such file or folder." in said.err
        assert "refused  empty: no file ending in .fits" in said.err
        assert call(load_example, monkeypatch, name, model, "nothing.fits", "empty", *cpu) == 2
        said = capsys.readouterr().err
        assert f"{name}.py: nothing.fits: no such file or folder. empty: no file ending in" in said


def test_a_name_that_may_be_on_the_hub_is_asked_for_once(world):
    # nothing listens at port 9: an answer that comes at once, and that the Hub's client would ask for again and again
    environment = {
        **os.environ,
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(world / "hf"),
    }
    command = [sys.executable, str(EXAMPLES / "extract_features.py"), "solarchip/vit-nowhere", "hmi.fits"]
    result = subprocess.run(command, cwd=world, env=environment, capture_output=True, text=True)
    assert result.returncode == 2
    assert "got 'solarchip/vit-nowhere': no such folder here, and the Hub was not reachable (" in result.stderr
    assert "Retrying" not in result.stderr


def test_a_time_in_another_zone_is_converted(load_example, monkeypatch, capsys, tmp_path):
    span = ["--start", "2014-02-01T02:00+02:00", "--end", "2014-02-02", "--size", "32", "--modalities", "hmi"]
    assert call(load_example, monkeypatch, "draw_synthetic_archive", "--output", str(tmp_path / "new"), *span) == 0
    assert "1 files written" in capsys.readouterr().out
    assert next((tmp_path / "new").rglob("*.fits")).name == "hmi.M_720s.20140201_000000_TAI.fits"
