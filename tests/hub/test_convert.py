"""Conversion of research checkpoints: the same numbers as an independent run of their layout, from the saved folder."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from research_layout import (
    NAMES,
    ResearchCNN,
    ResearchViT,
    cnn_table,
    flare_state,
    load_branch,
    random_branch,
    random_state,
    research_terms,
    save_checkpoint,
    vit_table,
)
from transformers import AutoImageProcessor, AutoModel, AutoModelForPreTraining

from solarchip_hf import SolarChipForPreTraining, SolarChipImageProcessor, SolarChipModel
from solarchip_hf.hub.conversion_layout import infer_backbone
from solarchip_hf.hub.convert import KNOWN_HEADS, convert_checkpoint, main

VIT = (64, 16, 32, 2, 24)  # size, patch, width, layers, projection
CNN = (16, [1, 2, 4], 1, 8, 12)  # ch, ch_mult, blocks, latents, projection: 8, 16 and 32 groups
SCALES = (2.0, 2.5, 2.75)
FLAGS = {"vit": {"num_attention_heads": 4}, "cnn": {"image_size": 64}, "vae": {"image_size": 64}}


def table_of(kind: str) -> dict[str, tuple[int, ...]]:
    return vit_table(*VIT) if kind == "vit" else cnn_table(*CNN, variational=kind == "vae")


def network_of(kind: str) -> torch.nn.Module:
    return ResearchViT(*VIT, heads=4) if kind == "vit" else ResearchCNN(*CNN, variational=kind == "vae")


def assert_close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = 1e-5) -> None:
    """Equal within the tolerance, taken of the largest value where that is above 1, and of numbers worth comparing."""
    assert ours.dtype == theirs.dtype
    assert theirs.numel() == 1 or theirs.std() > 0.05
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance * max(1.0, theirs.abs().max().item()))


def assert_same_numbers(
    folder: Path,
    networks: dict[str, torch.nn.Module],
    size: int,
    count: int = 3,
    dtype: torch.dtype = torch.float32,
    tolerance: float = 1e-5,
) -> None:
    """Everything that the two Auto models give, against the networks of the layout, by modality."""
    model = AutoModel.from_pretrained(folder, dtype=dtype).eval()
    whole = AutoModelForPreTraining.from_pretrained(folder, dtype=dtype).eval()
    assert type(model) is SolarChipModel
    assert type(whole) is SolarChipForPreTraining
    assert model.config.modalities == list(networks)
    images = torch.randn(count, len(networks), 1, size, size, generator=torch.Generator().manual_seed(7)).to(dtype)
    with torch.no_grad():
        expected = [network.to(dtype)(images[:, index]) for index, network in enumerate(networks.values())]
        got = whole(images[:, :, 0])
        for index, theirs in enumerate(expected):
            ours = model(images[:, index], [index] * count)
            assert_close(ours.last_hidden_state, theirs["tokens"], tolerance)
            assert_close(ours.pooler_output, theirs["tokens"][:, 0], tolerance)
            assert_close(ours.contrastive_embeds, theirs["projections"], tolerance)
            assert_close(got.reconstruction[:, index], theirs["reconstruction"][:, 0], tolerance)
            if "logvar" in theirs:
                assert_close(ours.latents_logvar, theirs["logvar"], tolerance)
        if len(networks) > 1:
            terms = research_terms([theirs["projections"] for theirs in expected], SCALES)
            for ours, theirs in zip([got.cls_loss, got.patch_loss, got.intra_loss], terms, strict=True):
                assert_close(ours, theirs, tolerance)


@pytest.mark.parametrize("kind", ["vit", "cnn", "vae"])
@pytest.mark.parametrize("sharing", ["base", "mergeaia", "mergeall"])
def test_small_checkpoints_give_the_numbers_of_their_layout(tmp_path, kind, sharing):
    branches = {"base": ["hmi", "0171", "0304"], "mergeaia": ["hmi", "aia"], "mergeall": ["all"]}[sharing]
    state = random_state(table_of(kind), branches, SCALES)
    names = None if sharing == "base" else ["hmi", "171", "304"]
    checkpoint = save_checkpoint(tmp_path / "last.ckpt", state)
    report = convert_checkpoint(checkpoint, tmp_path / "out", modalities=names, **FLAGS[kind])
    branch_of = dict(zip(["hmi", "aia171", "aia304"], (branches + branches[-1:] * 2)[:3], strict=True))
    networks = {name: load_branch(network_of(kind), state, branch) for name, branch in branch_of.items()}
    assert_same_numbers(tmp_path / "out", networks, size=64)
    assert_same_numbers(tmp_path / "out", networks, size=64, dtype=torch.float64, tolerance=1e-11)
    assert report.weight_sharing == {"base": "modality", "mergeaia": "instrument", "mergeall": "shared"}[sharing]
    assert max(report.agreement.values()) < 1e-12
    assert {"tokens", "projections", "reconstruction", "cls_loss", "patch_loss", "intra_loss"} <= set(report.agreement)


def test_published_vit_widths_give_the_numbers_of_their_layout(tmp_path):
    sizes = (1024, 64, 768, 1, 768)  # as published, but one layer instead of twelve
    state = random_state(vit_table(*sizes), ["all"], SCALES)
    checkpoint = save_checkpoint(tmp_path / "last.ckpt", state)
    convert_checkpoint(checkpoint, tmp_path / "out", num_attention_heads=12, modalities=["hmi", "193"])
    network = load_branch(ResearchViT(*sizes, heads=12), state, "all")
    assert_same_numbers(tmp_path / "out", {"hmi": network, "aia193": network}, size=1024, count=2)
    backbone = json.loads((tmp_path / "out" / "config.json").read_text())["backbone_config"]
    assert (backbone["image_size"], backbone["patch_size"], backbone["hidden_size"]) == (1024, 64, 768)
    published = SolarChipImageProcessor.published(modalities=["hmi", "193"])
    assert AutoImageProcessor.from_pretrained(tmp_path / "out").to_dict() == published.to_dict()


def test_published_cnn_gives_the_numbers_of_its_layout(tmp_path):
    sizes = (32, [1, 1, 1, 2, 2, 2], 2, 32, 32)
    state = random_state(cnn_table(*sizes), ["hmi"], SCALES)
    convert_checkpoint(save_checkpoint(tmp_path / "last.ckpt", state), tmp_path / "out")
    network = load_branch(ResearchCNN(*sizes), state, "hmi")
    assert_same_numbers(tmp_path / "out", {"hmi": network}, size=128, count=2)
    backbone = json.loads((tmp_path / "out" / "config.json").read_text())["backbone_config"]
    assert backbone["image_size"] == 1024
    assert backbone["block_out_channels"] == [32, 32, 32, 64, 64, 64]


@pytest.mark.parametrize(("layers", "projection", "heads"), [(12, 768, 12), (6, 512, 8), (12, 512, None)])
def test_heads_of_the_sizes_that_the_research_code_configures(layers, projection, heads):
    fields, _, width = infer_backbone(vit_table(1024, 64, 768, layers, projection), "hmi")
    assert KNOWN_HEADS.get((fields["hidden_size"], fields["num_hidden_layers"], width)) == heads


def test_raster_layout_is_kept_and_explained_in_the_config(tmp_path):
    state = random_state(vit_table(*VIT), ["hmi"])
    convert_checkpoint(save_checkpoint(tmp_path / "last.ckpt", state), tmp_path / "out", num_attention_heads=4)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["backbone_config"]["decoder_layout"] == "raster"
    assert any("raster" in note and "rows" in note for note in config["conversion_notes"])
    assert (config["projection_centering"], config["min_disk_fraction"]) == ("none", 0.0)
    assert config["use_modality_embedding"] is False


def test_report_lists_every_key(tmp_path):
    state = random_state(vit_table(*VIT), ["hmi", "0171", "0193"])
    state["rec_loss_fn.perceptual_loss.lin0.model.1.weight"] = torch.zeros(1, 64, 1, 1)
    checkpoint = save_checkpoint(tmp_path / "last.ckpt", state)
    report = convert_checkpoint(checkpoint, tmp_path / "out", num_attention_heads=4, modalities=["hmi", "0193"])
    assert set(report.used) | set(report.ignored) >= set(state)
    assert not set(report.used) & set(report.ignored)
    assert all("not asked for" in report.ignored[key] for key in state if key.startswith("model_dict.0171."))
    assert "perceptual" in report.ignored["rec_loss_fn.perceptual_loss.lin0.model.1.weight"]
    assert "(optimizer_states)" in report.ignored
    weights = {target for targets in report.used.values() for target in targets if "[" not in target}
    model = SolarChipForPreTraining.from_pretrained(tmp_path / "out")
    assert weights == set(model.state_dict()) - {"logit_scales"}
    assert json.loads((tmp_path / "out" / "conversion_report.json").read_text())["used"] == report.used


def test_branches_keep_the_order_of_the_file(tmp_path):
    branches = [NAMES[index] for index in (0, 5, 2)]
    checkpoint = save_checkpoint(tmp_path / "last.ckpt", random_state(vit_table(*VIT), branches))
    report = convert_checkpoint(checkpoint, tmp_path / "out", num_attention_heads=4)
    assert report.modalities == ["hmi", "aia211", "aia131"]
    assert AutoImageProcessor.from_pretrained(tmp_path / "out").modalities == report.modalities


def test_one_branch_loads_from_a_folder_with_several(tmp_path):
    state = random_state(vit_table(*VIT), ["hmi", "0171", "0193"])
    convert_checkpoint(save_checkpoint(tmp_path / "last.ckpt", state), tmp_path / "out", num_attention_heads=4)
    model = AutoModel.from_pretrained(tmp_path / "out", modalities=["0171"]).eval()
    assert list(model.towers) == ["aia171"]
    images = torch.randn(2, 1, 64, 64)
    with torch.no_grad():
        assert_close(model(images).last_hidden_state, load_branch(network_of("vit"), state, "0171")(images)["tokens"])


def test_half_precision_weights_are_widened_exactly(tmp_path):
    state = {key: value.bfloat16() for key, value in random_state(vit_table(*VIT), ["hmi"]).items()}
    checkpoint = save_checkpoint(tmp_path / "last.ckpt", state)
    report = convert_checkpoint(checkpoint, tmp_path / "out", num_attention_heads=4)
    table = SolarChipForPreTraining.from_pretrained(tmp_path / "out").solarchip.towers["hmi"].projection.weight
    assert table.dtype == torch.float32
    assert torch.equal(table.T, state["model_dict.hmi.contrasive_porject"].float())
    assert any("bfloat16" in note for note in report.notes)


def test_temperatures_beyond_the_bound_of_the_losses_are_kept_and_said(tmp_path):
    checkpoint = save_checkpoint(
        tmp_path / "last.ckpt", random_state(vit_table(*VIT), ["hmi", "0171"], (5.0, 2.0, 2.0))
    )
    report = convert_checkpoint(checkpoint, tmp_path / "out", num_attention_heads=4)
    scales = SolarChipForPreTraining.from_pretrained(tmp_path / "out").logit_scales
    assert scales.tolist() == [5.0, 2.0, 2.0]
    assert any("ln 100" in note for note in report.notes)


@pytest.mark.parametrize("preprocessing", ["zscore", "log1p"])
def test_features_from_fits_agree(tmp_path, sdo_folder, preprocessing):
    fits = pytest.importorskip("astropy.io.fits")
    state = random_state(vit_table(*VIT), ["hmi", "0171", "0304"])
    checkpoint = save_checkpoint(tmp_path / "last.ckpt", state)
    convert_checkpoint(checkpoint, tmp_path / "out", num_attention_heads=4, preprocessing=preprocessing)
    paths = {"0171": sdo_folder / "AIAsynoptic0171.fits", "0304": sdo_folder / "AIAsynoptic0304.fits"}
    statistics = {"0171": (4.058454606964953, 2.0019955472124473), "0304": (1.7023200257985773, 1.4301543643478678)}
    expected = []
    for branch, path in paths.items():
        with fits.open(path) as units:
            image = torch.from_numpy(np.nan_to_num(units[1].data.astype(np.float32), nan=0.0))[None, None]
        image = F.interpolate(image, size=(64, 64), mode="bilinear", antialias=True)
        image = image.sign() * image.abs().log1p()
        if preprocessing == "zscore":
            mean, deviation = statistics[branch]
            image = (image - mean) / deviation
        with torch.no_grad():
            expected.append(load_branch(ResearchViT(*VIT, heads=4), state, branch)(image)["tokens"][0])
    processor, model = AutoImageProcessor.from_pretrained(tmp_path / "out"), AutoModel.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        features = model.eval()(**processor(list(paths.values()), return_tensors="pt")).last_hidden_state
    assert_close(features, torch.stack(expected))


def test_missing_pixels_are_zero_gauss_as_in_the_research_code(tmp_path):
    checkpoint = save_checkpoint(tmp_path / "last.ckpt", random_state(vit_table(*VIT), ["hmi"]))
    convert_checkpoint(checkpoint, tmp_path / "out", num_attention_heads=4)
    magnetogram = np.linspace(-900, 900, 64 * 64, dtype=np.float32).reshape(64, 64)
    magnetogram[:20] = np.nan
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out")
    got = processor(magnetogram, modality="hmi", return_tensors="np")["pixel_values"][0, 0]
    filled = np.nan_to_num(magnetogram, nan=0.0)
    expected = (np.sign(filled) * np.log1p(np.abs(filled)) + 0.0033644122878536808) / 1.4462468177923982
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)


PEAK = """
import resource, sys
from solarchip_hf.hub.convert import convert_checkpoint
if len(sys.argv) > 1:
    convert_checkpoint(sys.argv[1], sys.argv[2], num_attention_heads=8, modalities=["hmi"])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_one_branch_of_eleven_without_the_rest_in_memory(tmp_path):
    sizes = (64, 16, 512, 1, 64)
    peaks = []
    for count in (1, 11):
        state = random_state(vit_table(*sizes), NAMES[:count])
        checkpoint = save_checkpoint(tmp_path / f"{count}.ckpt", state)
        command = [sys.executable, "-c", PEAK, str(checkpoint), str(tmp_path / f"out{count}")]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr[-3000:]
        peaks.append(int(result.stdout.splitlines()[-1]) * 1024)
    branch = (tmp_path / "1.ckpt").stat().st_size
    assert (tmp_path / "11.ckpt").stat().st_size > 10 * branch > 200e6
    assert peaks[1] - peaks[0] < 2 * branch
    network = load_branch(ResearchViT(*sizes, heads=8), state, "hmi")
    assert_same_numbers(tmp_path / "out11", {"hmi": network}, size=64)


@pytest.mark.parametrize("kind", ["vit", "cnn", "vae"])
def test_encoder_of_a_flare_classifier(tmp_path, kind):
    state = flare_state(table_of(kind))
    checkpoint = save_checkpoint(tmp_path / "last.ckpt", state)
    report = convert_checkpoint(checkpoint, tmp_path / "out", encoder_only=True, **FLAGS[kind])
    assert report.architecture == "SolarChipModel"
    assert set(report.used) | {key for key in report.ignored if not key.startswith("(")} == set(state)
    assert "no place" in report.ignored["classifier.1.weight"]
    model = AutoModel.from_pretrained(tmp_path / "out").eval()
    branch = {f"model_dict.hmi.{key}": value for key, value in random_branch(table_of(kind), seed=5).items()}
    images = torch.randn(2, 1, 64, 64)
    with torch.no_grad():
        ours, theirs = model(images), load_branch(network_of(kind), branch, "hmi")(images)
    assert_close(ours.last_hidden_state, theirs["tokens"])
    assert_close(ours.contrastive_embeds, theirs["projections"])
    assert AutoImageProcessor.from_pretrained(tmp_path / "out").modalities == ["hmi"]


def test_command_converts_and_reports(tmp_path, capsys):
    checkpoint = save_checkpoint(tmp_path / "last.ckpt", random_state(vit_table(*VIT), ["hmi", "0171"]))
    assert main([str(checkpoint), str(tmp_path / "out"), "--num_attention_heads", "4", "--modalities", "hmi"]) == 0
    output = capsys.readouterr().out
    assert "used     model_dict.hmi.contrasive_porject -> solarchip.towers.hmi.projection.weight" in output
    assert "ignored  model_dict.0171.encoder.class_embedding: of a branch that was not asked for" in output
    assert "missing  none" in output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.ckpt", "out"]
    names = {"config.json", "conversion_report.json", "model.safetensors", "preprocessor_config.json"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
