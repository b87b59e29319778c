"""The pretraining script on FITS files: real runs of a tiny model, a real launch of two processes, bad input."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from transformers import AutoImageProcessor, AutoModel

from solarchip_hf.data import SyntheticSun

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "pretrain.py"
TINY = {
    "image_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "decoder_num_hidden_layers": 1,
    "projection_dim": 16,
    "projection_centering": "tokens",
}


@pytest.fixture(scope="module")
def pretrain(load_example):
    return load_example("pretrain")


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> Path:
    """Twelve training days, then eight observations six hours apart, and a broken file."""
    folder = tmp_path_factory.mktemp("archive")
    times = pd.date_range("2014-01-01", periods=12, freq="2D").append(pd.date_range("2014-03-01", periods=8, freq="6h"))
    SyntheticSun(seed=0, size=64).write_archive(folder, times, ["hmi", "aia171"], progress=False)
    (folder / "AIA20140101_0000_0304.fits").write_text("<html><body>503</body></html>")
    return folder


@pytest.fixture(scope="module")
def config(archive, tmp_path_factory) -> Path:
    """A configuration file of a quick run."""
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    values = {
        "data_dir": str(archive),
        "cache_dir": str(path.parent / "prepared"),
        "workers": 0,
        "model_name": "vit-tiny",
        "modalities": ["hmi", "171"],
        "validation_start": "2014-02-25",
        "config_overrides": TINY,
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 8,
        "learning_rate": 1e-3,
        "logging_steps": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        "use_cpu": True,
        "disable_tqdm": True,
        "note": "SyntheticSun",
    }
    path.write_text(yaml.safe_dump(values))
    return path


def test_run_on_fits_files_leaves_a_model_that_auto_classes_load(pretrain, config, tmp_path, capsys, archive):
    output = tmp_path / "solarchip" / "vit-tiny"
    assert pretrain.main([str(config), "--output_dir", str(output)]) == 0
    said = capsys.readouterr().out
    assert re.search(r"41 files, 40 usable: (hmi 20, aia171 20|aia171 20, hmi 20)", said)
    assert re.search(r"skipped AIA20140101_0000_0304.fits: .*HTML", said)
    assert "12 training and 8 held-out observations of hmi, aia171" in said
    for method in ("patch similarity", "untrained class token", "header geometry (R, B0)", "8 x 8 activity maps"):
        assert method in said

    processor, model = AutoImageProcessor.from_pretrained(output), AutoModel.from_pretrained(output)
    files = [next(archive.rglob("hmi*.fits")), next(archive.rglob("AIA*0171.fits"))]
    outputs = model(**processor([str(file) for file in files], return_tensors="pt"))
    assert outputs.last_hidden_state.shape == (2, 17, 32)
    assert outputs.last_hidden_state.isfinite().all()

    facts = json.loads((output / "metrics.json").read_text())
    assert facts["data"] == "SyntheticSun"
    assert facts["metrics"]["eval_retrieval_chance@1"] == pytest.approx(1 / 8)
    assert {row["gallery"] for row in facts["retrieval"]} == {8}
    assert "| patch similarity | hmi / aia171 |" in (output / "retrieval.md").read_text()
    assert {path.name for path in (output / "figures").iterdir()} >= {
        "reconstruction_0.png",
        "similarity.png",
        "retrieval.png",
        "training.png",
    }

    # the prepared dataset serves as input too, and a finished run resumes from its last checkpoint
    prepared = next((config.parent / "prepared").glob("*/manifest.json")).parent
    arguments = [str(config), "--output_dir", str(output), "--data_dir", str(prepared), "--max_steps", "6"]
    assert pretrain.main([*arguments, "--resume_from_checkpoint", "last"]) == 0
    said = capsys.readouterr().out
    assert "checkpoint-4" in said
    assert "files," not in said
    state = json.loads((output / "checkpoint-6" / "trainer_state.json").read_text())
    assert [line["step"] for line in state["log_history"] if "loss" in line] == [2, 4, 6]


def test_too_few_observations_for_a_split_are_all_used_and_it_is_said(pretrain, config, tmp_path, capsys, archive):
    some = tmp_path / "archive"
    some.mkdir()
    for pattern in ("AIA20140101_0000_0171.fits", "hmi*20140101*", "AIA20140103_0000_0171.fits", "hmi*20140103*"):
        for file in archive.rglob(pattern):
            (some / file.name).symlink_to(file)
    arguments = [str(config), "--data_dir", str(some), "--output_dir", str(tmp_path / "out"), "--max_steps", "1"]
    assert pretrain.main([*arguments, "--cache_dir", str(tmp_path / "cache"), "--save_strategy", "no"]) == 0
    said = capsys.readouterr().out
    assert "No held-out part" in said
    assert "Training on all 2 observations" in said
    assert "Batches of 2 a process instead of 4" in said
    assert (tmp_path / "out" / "figures" / "reconstruction_1.png").exists()


def test_two_processes_launched_by_accelerate(config, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    launch = [sys.executable, "-m", "accelerate.commands.launch"]
    launch += ["--config_file", str(ROOT / "examples" / "accelerate" / "cpu_ddp.yaml"), "--main_process_port", port]
    command = [*launch, str(SCRIPT), str(config), "--output_dir", str(tmp_path / "out"), "--max_steps", "2"]
    command += ["--cache_dir", str(tmp_path / "cache")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("12 training and 8 held-out observations") == 1
    assert "patch similarity" in result.stdout
    facts = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert facts["metrics"]["eval_retrieval_chance@1"] == pytest.approx(1 / 8)
    model = AutoModel.from_pretrained(tmp_path / "out")
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def start_ranks(arguments: list[str], world_size: int) -> list[subprocess.Popen]:
    """The script as processes of one run, started as by SLURM: without a launcher that would die of a signal itself."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    started = []
    for rank in range(world_size):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1"}
        if world_size > 1:
            environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        command = [sys.executable, str(SCRIPT), *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        started.append(subprocess.Popen(command, env=environment, text=True, bufsize=1, **pipes))
    return started


@pytest.mark.timeout(600)
@pytest.mark.parametrize("world_size", [1, 2])
def test_sigterm_to_every_process_saves_the_step_and_the_run_resumes(config, tmp_path, world_size):
    out = tmp_path / "out"
    arguments = [str(config), "--output_dir", str(out), "--max_steps", "1000", "--logging_steps", "1"]
    arguments += ["--save_strategy", "no", "--retrieval_gallery", "0"]
    arguments += ["--per_device_train_batch_size", str(4 // world_size)]
    processes = start_ranks(arguments, world_size)
    lines = []
    for line in processes[0].stdout:
        lines.append(line)
        if "'cls_loss'" in line and "'loss'" in line:  # a step has been taken
            for process in processes:
                process.send_signal(signal.SIGTERM)
            break
    rest = [process.communicate(timeout=250)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * world_size, "".join([*lines, *rest])
    stopped = int(re.search(r"Stopped behind step (\d+); --resume_from_checkpoint last", rest[0]).group(1))
    assert f"SIGTERM: saving step {stopped} and stopping" in rest[0]
    assert stopped < 1000
    assert [path.name for path in out.glob("checkpoint-*")] == [f"checkpoint-{stopped}"]
    assert not (out / "metrics.json").exists()  # only a finished run writes it

    arguments[arguments.index("1000")] = str(stopped + 2)
    processes = start_ranks([*arguments, "--resume_from_checkpoint", "last"], world_size)
    said = [process.communicate(timeout=250)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * world_size, "".join(said)
    assert f"Resuming from {out / f'checkpoint-{stopped}'}" in said[0]
    facts = json.loads((out / "metrics.json").read_text())["metrics"]
    assert facts["eval_reconstruction_mae_hmi_G"] > 0
    assert facts["eval_reconstruction_mae_aia171_DN"] > 0
    assert AutoModel.from_pretrained(out).config.modalities == ["hmi", "aia171"]


def test_processes_that_diverge_end_with_a_sentence(config, tmp_path):
    arguments = [str(config), "--output_dir", str(tmp_path / "out"), "--max_steps", "6", "--save_strategy", "steps"]
    arguments += ["--save_steps", "3", "--retrieval_gallery", "0", "--per_device_train_batch_size", "2"]
    processes = start_ranks([*arguments, "--learning_rate", "1e30", "--max_grad_norm", "0"], 2)
    said = [process.communicate(timeout=250)[0] for process in processes]
    assert [process.returncode for process in processes] == [2, 2], "".join(said)
    for text in said:
        assert "pretrain.py: weights: expected finite numbers, got others at step 3: the training has diverged." in text
        assert "Traceback" not in text
    assert not list((tmp_path / "out").glob("checkpoint-*"))


@pytest.fixture(scope="module")
def saved(pretrain, config, tmp_path_factory) -> Path:
    """A finished run with checkpoints, of training data read as a stream."""
    output = tmp_path_factory.mktemp("saved") / "vit-tiny"
    assert pretrain.main([str(config), "--output_dir", str(output), "--streaming"]) == 0
    return output


def test_a_saved_model_goes_on_with_its_own_processor(pretrain, config, saved, archive, tmp_path, capsys):
    arguments = ["--model_name", str(saved), "--data_dir", str(archive), "--workers", "0", "--use_cpu"]
    arguments += ["--cache_dir", str(config.parent / "prepared"), "--validation_start", "2014-02-25"]
    arguments += ["--max_steps", "1", "--per_device_train_batch_size", "4", "--save_strategy", "no"]
    output = tmp_path / "out"
    assert pretrain.main([*arguments, "--output_dir", str(output), "--modalities", "hmi", "171"]) == 0
    ours, theirs = (json.loads((path / "preprocessor_config.json").read_text()) for path in (output, saved))
    assert ours == theirs
    capsys.readouterr()
    for given, message in {
        ("--weight_sharing", "shared"): "weight_sharing='shared' (saved: 'instrument')",
        ("--modalities", "hmi", "304"): "modalities=['hmi', 'aia304'] (saved: ['hmi', 'aia171'])",
        ("--config_overrides", '{"hidden_size": 64, "depth": 3}'): "hidden_size=64 (saved: 32), depth=3 (saved: none",
        ("--photometry", "dn"): "photometry: expected 'nominal'",
        ("--geometry", "none"): "geometry: expected 'rsun'",
    }.items():
        assert pretrain.main([*arguments, "--output_dir", str(output), *given]) == 2
        assert message in capsys.readouterr().err


def test_a_checkpoint_of_another_model_and_a_used_folder_are_refused(pretrain, config, saved, tmp_path, capsys):
    assert pretrain.main([str(config), "--output_dir", str(saved)]) == 2
    said = capsys.readouterr().err
    assert f"output_dir: expected a folder without checkpoints of an earlier run, got {saved / 'checkpoint-4'}" in said
    out = ["--output_dir", str(tmp_path / "out"), "--resume_from_checkpoint", str(saved / "checkpoint-4")]
    for given, message in {
        ("--anchor_modality", "171", "--modalities", "171", "hmi"): "one of hmi, aia171",
        ("--config_overrides", json.dumps({**TINY, "projection_dim": 8})): "other weights: solarchip.centering",
    }.items():
        assert pretrain.main([str(config), *out, *given]) == 2
        said = capsys.readouterr().err
        assert "resume_from_checkpoint: expected a checkpoint of this model" in said
        assert message in said
        assert "Traceback" not in said


def test_real_files_are_reported_and_trained_on(pretrain, sdo_folder, tmp_path, capsys):
    arguments = ["--data_dir", str(sdo_folder), "--modalities", "aia171", "aia304", "--anchor_modality", "aia171"]
    arguments += ["--model_name", "vit-tiny", "--weight_sharing", "shared", "--config_overrides", json.dumps(TINY)]
    arguments += ["--cache_dir", str(tmp_path / "cache"), "--output_dir", str(tmp_path / "out"), "--workers", "0"]
    options = ["--max_steps", "2", "--use_cpu", "--disable_tqdm", "true", "--save_strategy", "no"]
    assert pretrain.main(arguments + options) == 0
    said = capsys.readouterr().out
    for name, reason in {
        "HMI_continuum.jp2": "CONTINUUM",
        "aia_171_cutout.fits": "partial disk",
        "html_not_fits.fits": "HTML",
        "truncated_aia": "truncated",
        "hmi.sharp_cea": "CEA",
        "mdi.fd_m_96m": "MDI",
    }.items():
        assert re.search(rf"skipped \S*{re.escape(name)}\S*: .*{reason}", said), name
    assert "2 training and 0 held-out observations of aia171, aia304" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "data_dir: expected a folder"),
        (["--data_dir", "/nowhere/at/all"], "'/nowhere/at/all'"),
        (["{empty}"], "full-disk images of SDO"),
        (["{archive}", "--modalities", "hmi", "soho"], "'soho'"),
        (["{archive}", "--modalities", "hmi", "171", "--anchor_modality", "aia94"], "anchor_modality: expected one of"),
        (["{archive}", "--anchor_modality", "aia94"], "aia94"),
        (["{archive}", "--model_name", "vit-huge"], "vit-tiny, vit-small"),
        (["{archive}", "--weight_sharing", "none"], "weight_sharing"),
        (["{archive}", "--config_overrides", '{"imagesize": 64}'], "Did you mean 'image_size'"),
        (["{archive}", "--config_overrides", "image_size=64"], "config_overrides: expected a JSON object"),
        (["{archive}", "--gap", "a while"], "gap"),
        (["{archive}", "--validation_start", "2014-02-31"], "validation_start: expected"),
        (["{archive}", "--validation_start", "2014-01-01"], "none in 'train'"),
        (["{archive}", "--validation_fraction", "1.5"], "validation_fraction: expected"),
        (
            ["{archive}", "--model_name", "vit-tiny", "--resume_from_checkpoint", "nowhere"],
            "resume_from_checkpoint: expected",
        ),
        (["{archive}", "--augmentation", "mirror"], "augmentation"),
        (["missing.yaml"], "missing.yaml"),
    ],
)
def test_bad_input_is_a_sentence_and_exit_code_2(pretrain, arguments, message, archive, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    given = []
    for argument in arguments:
        folder = {"{archive}": archive, "{empty}": tmp_path / "empty"}.get(argument)
        given += ["--data_dir", str(folder), "--workers", "0"] if folder else [argument]
    try:
        code = pretrain.main([*given, "--output_dir", str(tmp_path / "out")])
    except SystemExit as stop:  # argparse's own
        code = stop.code
    said = capsys.readouterr().err
    assert code == 2
    assert message in said
    assert "Traceback" not in said


def test_help_names_our_arguments(pretrain, capsys):
    with pytest.raises(SystemExit) as stop:
        pretrain.main(["--help"])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    for name in ("--data_dir", "--model_name", "--tolerance", "--augmentation", "--retrieval_gallery", "--max_steps"):
        assert name in said
    assert "'last' for the last complete one" in " ".join(said.split())


@pytest.mark.parametrize("name", ["quickstart.yaml", "published.yaml", "vit_base.yaml"])
def test_configurations_of_the_repository_parse(pretrain, name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    path = ROOT / "examples" / "configs" / name
    text = path.read_text().replace("bf16: true", "bf16: false")
    (tmp_path / name).write_text(text)
    model, data, args = pretrain.parse_arguments([name, "--use_cpu", "--max_steps", "7"])
    assert args.max_steps == 7
    config = pretrain.build_config(model, data, model.modalities or ["hmi", "aia171"])
    assert config.projection_centering == yaml.safe_load(text)["projection_centering"]
    assert config.cls_loss_weight == yaml.safe_load(text)["config_overrides"]["cls_loss_weight"]
