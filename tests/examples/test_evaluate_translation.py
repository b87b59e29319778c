"""The command that scores a translation pipeline: one table with all rivals, a U-Net that is kept, bad input."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from solarchip_hf import load_observations

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "evaluate_translation.py"
QUICK = ["--num_samples", "2", "--num_inference_steps", "2", "--unet_steps", "4", "--unet_widths", "8", "16"]
QUICK += ["--device", "cpu", "--note", "synthetic"]


@pytest.fixture(scope="module")
def command(load_example):
    return load_example("evaluate_translation")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a prepared dataset and pipelines of random weights in both directions."""
    sys.path.insert(0, str(ROOT / "tests" / "evaluation"))
    try:
        from tiny_translation import tiny_pipeline, write_dataset
    finally:
        sys.path.pop(0)
    folder = tmp_path_factory.mktemp("world")
    processor = load_observations(write_dataset(folder, training=12, held_out=6)).processor
    tiny_pipeline(processor, "hmi", "aia171").save_pretrained(folder / "to_aia")
    tiny_pipeline(processor, "aia171", "hmi").save_pretrained(folder / "to_hmi")
    return folder


def test_report_of_a_passband(command, world, tmp_path, capsys):
    arguments = [str(world / "to_aia"), str(world / "prepared"), "--output", str(tmp_path), *QUICK]
    assert command.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "hmi -> aia171, held-out observations (synthetic)" in printed
    facts = json.loads((tmp_path / "fidelity.json").read_text())
    assert list(facts["rows"]) == [
        "ControlNet",
        "ControlNet, one sample",
        "U-Net, L1",
        "latent regression",
        "unconditional prior",
        "unconditional prior, one sample",
        "training mean",
        "mean radial profile",
        "another day",
        "autoencoder ceiling",
    ]
    assert {row["count"] for row in facts["rows"].values()} == {6}
    assert {row["missing_pixels"] for name, row in facts["rows"].items() if name != "another day"} == {0}
    assert facts["rows"]["ControlNet"]["members"] == 2
    assert facts["rows"]["ControlNet"]["expected_coverage"] == pytest.approx(1 / 3)
    assert facts["rows"]["ControlNet"]["scores"]["crps"]["estimate"] > 0
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {"translation.png", "rivals.png", "spread.png"}
    # a second run takes the U-Net that is there, and says the same
    weights = (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").stat().st_mtime_ns
    assert command.main(arguments) == 0
    assert "U-Net loaded" in capsys.readouterr().out
    assert (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").stat().st_mtime_ns == weights
    assert command.main([*arguments, "--seed", "1"]) == 0
    assert "trained anew" in capsys.readouterr().out
    assert (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").stat().st_mtime_ns > weights
    assert command.main(arguments) == 0
    again = json.loads((tmp_path / "fidelity.json").read_text())
    np.testing.assert_allclose(
        *([row["scores"]["rmse"]["estimate"] for row in each["rows"].values()] for each in (facts, again)), rtol=1e-4
    )


def test_a_unet_of_other_training_is_not_taken(command, world):
    dataset = load_observations(world / "prepared")
    training = dataset.select(dataset.metadata["split"].to_numpy() == "train")
    settings = {"widths": [8, 16], "steps": 4, "seed": 0}
    key = command.training_key(training, ["hmi"], "aia171", **settings)
    assert key == json.loads(json.dumps(key))
    assert key == command.training_key(training, ("hmi",), "aia171", **settings)
    fewer = training.select(np.arange(len(training) - 1))
    others = [
        command.training_key(fewer, ["hmi"], "aia171", **settings),
        command.training_key(training, ["hmi"], "aia171", **{**settings, "steps": 5}),
        command.training_key(training, ["aia171"], "hmi", **settings),
    ]
    assert key not in others


def test_report_of_a_magnetogram(command, world, tmp_path, capsys):
    output = tmp_path / "report"
    arguments = [str(world / "to_hmi"), str(world / "prepared"), "--output", str(output), "--limit", "4", *QUICK]
    assert command.main([*arguments, "--unet_steps", "0"]) == 0
    rows = json.loads((output / "fidelity.json").read_text())["rows"]
    assert {"zero field", "Hale's law", "flipped truth"} <= set(rows)
    assert "U-Net, L1" not in rows
    assert rows["zero field"]["scores"]["rmse_gain_over_zero"]["estimate"] == 0
    assert rows["flipped truth"]["scores"]["rmse_gain_over_zero"]["estimate"] == pytest.approx(-1)
    assert {row["count"] for row in rows.values()} == {4}
    assert "RMSE gain over zero" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["to_aia", "nowhere"], "prepared dataset"),
        (["./nowhere", "prepared"], "nowhere"),
        (["to_aia", "prepared", "--split", "test"], "expected test beside train"),
    ],
)
def test_bad_input_ends_in_a_sentence(command, world, tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(world)
    assert command.main([*arguments, "--output", str(tmp_path), *QUICK]) == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert errors[-1].startswith("evaluate_translation.py: ")
    assert message in errors[-1]
    assert not list(tmp_path.iterdir())


def test_options_out_of_range(command, capsys):
    with pytest.raises(SystemExit) as stop:
        command.main(["a", "b", "--num_samples", "1"])
    assert stop.value.code == 2
    assert "--num_samples: expected 2 or more, got 1" in capsys.readouterr().err
