"""The command that tunes a flare forecast: from files to a report, resumed, and refusing in words."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import AutoImageProcessor, AutoModelForImageClassification

from flare_world import TINY, flare_world
from solarchip_hf.models.calibration import calibrated_probabilities

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "finetune_flare.py"
QUICK = ["--num_train_epochs", "2", "--num_resamples", "10", "--workers", "0", "--use_cpu", "--disable_tqdm", "true"]


@pytest.fixture(scope="module")
def finetune(load_example):
    return load_example("finetune_flare")


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return flare_world(tmp_path_factory.getbasetemp())


def test_from_files_to_a_calibrated_model_and_its_report(finetune, root, tmp_path, capsys):
    output = tmp_path / "solarchip" / "flare"
    arguments = ["--data_dir", str(root / "archive"), "--events", str(root / "flares.csv"), "--note", "blobs"]
    arguments += ["--model_name", str(root / "pretrained"), "--modalities", "hmi", "--class_weights", "balanced"]
    arguments += ["--cache_dir", str(tmp_path / "cache"), "--output_dir", str(output), "--tuning", "staged"]
    assert finetune.main([*arguments, "--frozen_epochs", "2", "--learning_rate", "3e-3", *QUICK]) == 0
    said = capsys.readouterr().out
    for words in ("240 files, 240 usable", "train: 71 observations", "validation: ", "test: ", "| persistence |"):
        assert words in said
    model = AutoModelForImageClassification.from_pretrained(output)
    processor = AutoImageProcessor.from_pretrained(output)
    assert model.config.modalities == processor.modalities == ["hmi"]
    assert model.config.calibration["method"] == "platt"
    assert len(model.config.class_weights) == 4
    report = json.loads((output / "report.json").read_text())
    assert report["run"]["training"]["score_name"] == "bss"
    assert report["run"]["model"]["class_weights"] == ["balanced"]
    assert list(report["scores"]["M+"])[:2] == ["staged", "staged, uncalibrated"]
    assert (output / "report.md").exists()
    # what was written is what the saved model gives for the file itself
    table = pd.read_csv(output / "forecasts.csv", parse_dates=["time"])
    row = table[table["part"] == "test"].iloc[2]
    file = next((root / "archive").glob(f"hmi.M_720s.{row['time']:%Y%m%d}_*.fits"))
    with torch.no_grad():
        logits = model(**processor([file], return_tensors="pt")).logits
    given = calibrated_probabilities(logits, model.config.calibration)[0].numpy()
    np.testing.assert_allclose(given, row[["0AB", "C", "M", "X"]].to_numpy(dtype=float), atol=2e-3)


def test_from_scratch_on_a_prepared_dataset_with_a_share_of_the_labels(finetune, root, tmp_path, capsys):
    config = tmp_path / "run.yaml"
    config.write_text(f"data_dir: {root / 'prepared'}\nevents: [{root / 'flares.csv'}]\nmodel_name: vit-tiny\n")
    arguments = [str(config), "--from_scratch", "--tuning", "full", "--label_fraction", "0.4", "--ordinal"]
    arguments += ["--config_overrides", json.dumps(TINY), "--output_dir", str(tmp_path / "out"), *QUICK]
    arguments += ["--validation_start", "2013-07-01", "--test_start", "2013-12-01", "--calibration", "temperature"]
    arguments += ["--horizon", "48h", "--latency", "30min"]
    assert finetune.main(arguments) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["samples"]["test"]["first"] >= "2013-12-01"
    assert 5 < report["samples"]["train"]["count"] < 35
    assert report["run"]["arguments"]["backbone_learning_rate"] == report["run"]["arguments"]["learning_rate"]
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    assert model.config.ordinal
    assert model.config.modalities == ["hmi", "aia171"]
    assert "temperature" in model.config.calibration
    assert model.config.forecast_window == {"horizon": "48h", "latency": "30min", "by": "start"}
    assert report["run"]["data"]["data_dir"] == "prepared"
    assert str(root) not in json.dumps(report)
    assert "A share of 0.4 of the training labels" in (tmp_path / "out" / "report.md").read_text()
    assert "Model, forecasts, report and figures are in" in capsys.readouterr().out


def test_sigterm_leaves_a_checkpoint_and_the_run_goes_on(finetune, root, tmp_path, capsys):
    output = tmp_path / "out"
    arguments = ["--data_dir", str(root / "prepared"), "--events", str(root / "flares.csv"), *QUICK]
    arguments += ["--model_name", str(root / "pretrained"), "--output_dir", str(output), "--tuning", "full"]

    def send():
        deadline = time.monotonic() + 100
        while not list(output.glob("checkpoint-*")) and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # should the signal come too late
    sender = threading.Thread(target=send)
    try:
        sender.start()
        assert finetune.main([*arguments, "--num_train_epochs", "300"]) == 0
    finally:
        sender.join()
        signal.signal(signal.SIGTERM, before)
    assert "--resume_from_checkpoint last goes on" in capsys.readouterr().out
    assert not (output / "report.md").exists()
    steps = max(int(path.name.split("-")[1]) for path in output.glob("checkpoint-*"))
    rest = ["--num_train_epochs", str(steps // 5 + 2), "--resume_from_checkpoint", "last"]
    assert finetune.main([*arguments, *rest]) == 0
    assert f"checkpoint-{steps}" in capsys.readouterr().out
    assert (output / "report.md").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "data_dir: expected a folder"),
        (["--data_dir", "/nowhere"], "data_dir: expected a folder"),
        (["{data}"], "events: expected the CSV file"),
        (["{data}", "--events", "missing.csv"], "'missing.csv'"),
        (["{data}", "{text}"], "expected the columns of the NOAA/NCEI flare report"),
        (["{empty}", "{events}"], "full-disk images of SDO"),
        (["{data}", "{events}", "--model_name", "vit-tiny"], "--from_scratch"),
        (["{data}", "{events}", "--model_name", "vit-huge", "--from_scratch"], "vit-tiny, vit-small"),
        (["{data}", "{events}", "--model_name", "nowhere/at-all"], "no such folder here"),
        (["{data}", "{events}", "--modalities", "304"], "modalities: expected some of"),
        (["{data}", "{events}", "--modalities", "soho"], "'soho'"),
        (["{data}", "{events}", "--model_name", "vit-tiny", "--from_scratch"], "expected images of 128 px"),
        (["{data}", "{events}", "--tuning", "head"], "tuning"),
        (["{data}", "{events}", "--calibration", "beta"], "temperature, platt, isotonic"),
        (["{data}", "{events}", "--boundary", "M"], "C+, M+, X+"),
        (["{data}", "{events}", "--class_weights", "heavy"], "'balanced' or a number"),
        (["{data}", "{events}", "--class_weights", "1", "2"], "class_weights"),
        (["{data}", "{events}", "--label_fraction", "0"], "fraction in (0, 1]"),
        (["{data}", "{events}", "--shares", "0.5", "0.5"], "shares: expected three"),
        (["{data}", "{events}", "--gap", "200D"], "none in 'validation'"),
        (["{data}", "{events}", "--gap", "a while"], "gap: expected a time of zero"),
        (["{data}", "{events}", "--test_start", "2013-12-01"], "both or none"),
        (["{data}", "{events}", "--horizon", "0h"], "horizon: expected a positive time"),
        (
            ["{data}", "{events}", "--validation_start", "2013", "--test_start", "2014", "--shares", ".6", ".2", ".2"],
            "shares, test_start: expected one of them",
        ),
        (["{data}", "{events}", "--validation_start", "2013-02-31", "--test_start", "2014-01-01"], "validation_start:"),
        (["{data}", "{events}", "--coverage", "2001-01-01", "2001-02-01"], "a flare list that covers"),
        (["{data}", "{events}", "--by", "end"], "expected 'start' or 'peak'"),
        (["{data}", "{events}", "--config_overrides", "x=1"], "config_overrides: expected a JSON object"),
        (["{data}", "{events}", "--config_overrides", '{"focal_gama": 1}'], "focal_gama"),
        (["{data}", "{events}", "--augmentation", "published"], "augmentation"),
        (["{data}", "{events}", "--resume_from_checkpoint", "nowhere"], "resume_from_checkpoint: expected"),
        (["{data}", "{events}", "--learning_rate", "1e30", "--max_grad_norm", "0"], "the training has diverged. Lower"),
        (["missing.yaml"], "missing.yaml"),
    ],
)
def test_bad_input_is_a_sentence_and_exit_code_2(finetune, root, tmp_path, arguments, message, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.csv").write_text("a,b\n1,2\n")
    places = {
        "{data}": ["--data_dir", str(root / "prepared")],
        "{empty}": ["--data_dir", str(tmp_path / "empty")],
        "{events}": ["--events", str(root / "flares.csv")],
        "{text}": ["--events", "text.csv"],
    }
    given = ["--model_name", str(root / "pretrained"), "--output_dir", "out", *QUICK]
    if arguments and arguments[0].endswith(".yaml"):
        given = []
    words = [word for argument in arguments for word in places.get(argument, [argument])]
    words = [words.pop(0), *given, *words] if not given and words else [*given, *words]
    try:
        code = finetune.main(words)
    except SystemExit as stop:  # argparse's own
        code = stop.code
    said = capsys.readouterr().err
    assert code == 2
    assert message in said
    assert "Traceback" not in said
    assert not (tmp_path / "out" / "report.md").exists()


def test_help_groups_our_arguments_before_those_of_transformers(finetune, capsys):
    with pytest.raises(SystemExit) as stop:
        finetune.main(["--help"])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    places = [said.index(name) for name in ("the model:", "the data:", "calibration and report:", "training (with")]
    assert places == sorted(places)
    assert max(said.index(name) for name in ("--events", "--label_fraction", "--boundary")) < places[-1]
    assert said.index("--tuning {linear") > places[-1]


@pytest.mark.parametrize("name", ["flare.yaml", "flare_probe.yaml"])
def test_configurations_of_the_repository_parse(finetune, name):
    config = str(ROOT / "examples" / "configs" / name)
    model, data, judge, args = finetune.parse_arguments([config, "--use_cpu", "--seed", "7"])
    assert args.seed == 7
    assert args.tuning in ("staged", "attentive")
    assert (judge.calibration, data.gap) == ("platt", None)
    assert model.model_name == "solarchip/vit-base"
