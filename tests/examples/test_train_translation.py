"""Both training scripts of the translation on a real prepared dataset: a prior, a ControlNet, a pipeline that loads."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from solarchip_hf import SolarChipImageProcessor
from solarchip_hf.data import load_observations
from solarchip_hf.translation import SolarChipControlNetPipeline
from solarchip_hf.translation.latents import LatentDataset

ROOT = Path(__file__).parents[2]
NETWORK = ["--base_width", "16", "--multipliers", "1", "2", "--num_heads", "2"]
OPTIONS = ["--max_steps", "4", "--batch_size", "4", "--warmup_steps", "1", "--use_cpu", "--disable_tqdm"]


def script(name: str):
    spec = importlib.util.spec_from_file_location(f"{name}_example", ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def train_prior():
    return script("train_prior")


@pytest.fixture(scope="module")
def train_controlnet():
    return script("train_controlnet")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a prepared dataset and an untrained autoencoder."""
    sys.path.insert(0, str(ROOT / "tests" / "translation"))
    try:
        from tiny_latents import MODALITIES, draw_dataset, tiny_autoencoder
    finally:
        sys.path.pop(0)
    folder = tmp_path_factory.mktemp("world")
    draw_dataset(folder)
    tiny_autoencoder().save_pretrained(folder / "autoencoder")
    SolarChipImageProcessor(modalities=MODALITIES, size=32).save_pretrained(folder / "autoencoder")
    return folder


def common(world: Path) -> list[str]:
    places = {"autoencoder": "autoencoder", "data_dir": "prepared", "latents_dir": "latents"}
    return [word for name, place in places.items() for word in (f"--{name}", str(world / place))]


@pytest.fixture(scope="module")
def prior(world, train_prior):
    arguments = [*common(world), *NETWORK, *OPTIONS, "--modalities", "hmi", "171", "--note", "SyntheticSun"]
    assert train_prior.main([*arguments, "--output_dir", str(world / "prior"), "--save_steps", "2"]) == 0
    return world / "prior"


def test_prior_of_two_modalities(prior, world, train_prior, capsys):
    facts = json.loads((prior / "prior.json").read_text())
    latents = LatentDataset(world / "latents")
    assert facts["modalities"] == ["hmi", "aia171"]
    assert facts["latent_std"]["aia171"] == latents.std["aia171"]
    assert facts["reconstruction"]["aia171"]["unit"] == "DN"
    assert facts["metrics"]["steps"] == 4
    assert facts["data"] == "SyntheticSun"
    assert (prior / "samples" / "step-000004.png").stat().st_size > 5000
    averaged = load_file(prior / "checkpoint-4" / "ema.safetensors")
    saved = load_file(prior / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(saved[name], tensor) for name, tensor in averaged.items())

    # the latents are there already, and the run goes on
    arguments = [*common(world), *NETWORK, *OPTIONS, "--modalities", "hmi", "171", "--output_dir", str(prior)]
    assert train_prior.main([*arguments, "--max_steps", "6", "--resume_from_checkpoint", "last"]) == 0
    said = capsys.readouterr().out
    assert "the ceiling of translation (held-out)" in said
    assert "from step 4 to 6" in said
    assert "19 training latents (8, 8, 8) of hmi, aia171" in said


@pytest.mark.parametrize(("sources", "target", "count"), [(["hmi"], "aia171", 9), (["171", "304"], "hmi", 9)])
def test_controlnet_leaves_a_pipeline_that_loads(
    sources, target, count, prior, world, train_controlnet, tmp_path, capsys
):
    before = {path: path.read_bytes() for path in (prior / "unet").iterdir()}
    arguments = [*common(world), *OPTIONS, "--prior", str(prior), "--sources", *sources, "--target", target]
    arguments += ["--sample_images", "2", "--learning_rate", "1e-3", "--ema_decay", "0", "--note", "SyntheticSun"]
    arguments += ["--save_steps", "4"]
    assert train_controlnet.main([*arguments, "--output_dir", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert f"to {target}: {count} training observations (1 left out" in said
    assert "zero outputs verified" in said
    assert (tmp_path / "samples" / "step-000004.png").stat().st_size > 5000
    assert {path: path.read_bytes() for path in (prior / "unet").iterdir()} == before

    pipeline = SolarChipControlNetPipeline.from_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    kept = load_file(prior / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(tensor, kept[name]) for name, tensor in pipeline.unet.state_dict().items())
    assert pipeline.controlnet.controlnet_mid_block.weight.any()
    assert pipeline.config.prior_modalities == ["hmi", "aia171"]
    observations = load_observations(world / "prepared")
    images = observations.physical(12)
    given = {name: images[name] for name in pipeline.config.source_modalities}
    output = pipeline([given], num_inference_steps=2, num_samples=2, output_type="np")
    assert output.samples.shape == (1, 2, 32, 32)
    assert np.isfinite(output.prediction[0][observations.processor.support(target)]).all()
    assert json.loads((tmp_path / "training.json").read_text())["metrics"]["steps"] == 4
    again = ["--output_dir", str(tmp_path), "--resume_from_checkpoint", "last"]
    assert train_controlnet.main([*arguments, *again]) == 0
    assert "zero outputs verified" not in capsys.readouterr().out  # only a new one has them


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prior", ""], "prior: expected a value"),
        (["--prior", "{world}"], "expected a folder with prior.json"),
        (["--target", "304"], "expected one of hmi, aia171, which the prior knows, got aia304"),
        (["--sources", "aia171"], "the target aia171 not among them"),
        (["--sources", "soho"], "soho"),
        (["--autoencoder", "{world}/nowhere/at/all"], "as examples/pretrain.py writes it"),
        (["--data_dir", "{world}"], "manifest.json"),
        (["--hint_dropout", "1.5"], "hint_dropout"),
        (["--max_steps", "0"], "max_steps: expected 1 or more"),
        (["--sampler", "euler"], "euler"),
        (["--latents_dtype", "int8"], "int8"),
        (["missing.yaml"], "missing.yaml"),
    ],
)
def test_bad_input_is_a_sentence_and_exit_code_2(
    arguments, message, prior, world, train_controlnet, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    given = [*common(world), *OPTIONS, "--prior", str(prior), "--sources", "hmi", "--target", "aia171"]
    words = [word.replace("{world}", str(world)) for word in arguments]
    assert train_controlnet.main([*words, *given] if words[0].endswith("yaml") else [*given, *words]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("train_controlnet", ["--sampler", "euler"], "sampler: expected one of"),
        ("train_controlnet", ["--sample_images", "0"], "sample_images: expected 1 or more"),
        ("train_controlnet", ["--hint_width", "0"], "hint_width: expected 1 or more"),
        ("train_controlnet", ["--lr_scheduler", "stairs"], "lr_scheduler: expected one of"),
        ("train_prior", ["--prediction_type", "sample"], "prediction_type: expected one of"),
        ("train_prior", ["--prior_size", "huge"], "prior_size: expected one of"),
        ("train_prior", ["--base_width", "15", "--num_heads", "4"], "num_heads: expected a divisor"),
        ("train_prior", ["--num_heads", "0"], "num_heads: expected a divisor"),
    ],
)
def test_settings_are_refused_before_anything_is_encoded(
    name, arguments, message, prior, world, tmp_path, capsys, request
):
    task = ["--modalities", "hmi"] if name == "train_prior" else ["--prior", str(prior), "--sources", "hmi"]
    task += [] if name == "train_prior" else ["--target", "aia171"]
    places = ["--latents_dir", str(tmp_path / "latents"), "--output_dir", str(tmp_path / "out")]
    given = [*common(world), *OPTIONS, *task, *places, *arguments]
    assert request.getfixturevalue(name).main(given) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_dataset_prepared_otherwise_than_the_autoencoders_is_refused(world, train_prior, tmp_path, capsys):
    shutil.copytree(world / "autoencoder", tmp_path / "autoencoder")
    held = tmp_path / "autoencoder" / "preprocessor_config.json"
    settings = json.loads(held.read_text())
    assert settings["photometry"] == "nominal"
    held.write_text(json.dumps({**settings, "photometry": "dn_per_s", "statistics": None}))
    given = [*common(world), *OPTIONS, "--modalities", "hmi", "--output_dir", str(tmp_path / "out")]
    assert train_prior.main([*given, "--autoencoder", str(tmp_path / "autoencoder")]) == 2
    said = capsys.readouterr().err
    assert "data_dir: expected images prepared as those" in said
    assert "photometry 'nominal' instead of 'dn_per_s'" in said


def test_a_prior_of_a_later_format_is_refused(prior, world, train_controlnet, tmp_path, capsys):
    facts = json.loads((prior / "prior.json").read_text())
    (tmp_path / "prior.json").write_text(json.dumps({**facts, "format": 2}))
    given = [*common(world), *OPTIONS, "--prior", str(tmp_path), "--sources", "hmi", "--target", "aia171"]
    assert train_controlnet.main(given) == 2
    said = capsys.readouterr().err
    assert "prior.json: expected a prior of format 1, got 2" in said
    assert "train the prior anew" in said


def test_latents_of_another_autoencoder_are_refused(prior, world, train_controlnet, tmp_path, capsys):
    from tiny_latents import tiny_autoencoder

    tiny_autoencoder(seed=5).save_pretrained(tmp_path / "other")
    given = [*common(world), *OPTIONS, "--prior", str(prior), "--sources", "hmi", "--target", "aia171"]
    given += ["--autoencoder", str(tmp_path / "other"), "--output_dir", str(tmp_path / "out")]
    assert train_controlnet.main(given) == 2
    assert "stale ones (different: autoencoder)" in capsys.readouterr().err
    assert train_controlnet.main([*given, "--latents_dir", str(tmp_path / "latents")]) == 2
    assert "expected the latents that it was trained on, got latents of another autoencoder" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["prior", "controlnet", "translate_prior", "translate_controlnet"])
def test_configurations_of_the_repository_parse(name, train_prior, train_controlnet):
    path = ROOT / "examples" / "configs" / f"{name}.yaml"
    module = train_prior if name.endswith("prior") else train_controlnet
    _, _, args = module.parse_arguments([str(path), "--max_steps", "7"])
    assert args.max_steps == 7
    values = yaml.safe_load(path.read_text())
    assert args.learning_rate == float(values["learning_rate"])
    assert args.ema_decay == values["ema_decay"]


@pytest.mark.parametrize("name", ["train_prior", "train_controlnet"])
def test_help_names_our_arguments(name, request, capsys):
    with pytest.raises(SystemExit) as stop:
        request.getfixturevalue(name).main(["--help"])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    for option in ("--autoencoder", "--latents_dir", "--snr_gamma", "--ema_decay", "--resume_from_checkpoint"):
        assert option in said
    assert "the same for both:" in said  # the group of arguments that both commands share
