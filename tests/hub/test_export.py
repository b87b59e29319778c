"""Exported graphs: what they give against the model itself, with any batch, and what is refused."""

import json

import numpy as np
import pytest
import torch

from solarchip_hf import (
    SolarChipConfig,
    SolarChipForImageClassification,
    SolarChipForPreTraining,
    SolarChipImageProcessor,
    SolarChipModel,
    SyntheticSun,
)
from solarchip_hf.hub import export
from solarchip_hf.hub.export import CalibratedProbabilities, ExportError, export_model, largest_difference
from solarchip_hf.models.calibration import calibrated_probabilities

MODALITIES = ["hmi", "aia171", "aia304"]
CALIBRATIONS = {
    "none": None,
    "temperature": {"method": "temperature", "temperature": 1.7},
    "platt": {"method": "platt", "slope": [0.9, 1.1, 2.0], "intercept": [-0.2, 1.4, -1.3]},
    "isotonic": {
        "method": "isotonic",
        "x": [[0.2, 0.5, 0.6], [0.1, 0.9], [0.3]],
        "y": [[0.0, 0.4, 1.0], [0.3, 0.5], [0.2]],
    },
}


def config(backbone: str = "vit", **fields) -> SolarChipConfig:
    backbones = {
        "vit": {
            "model_type": "solarchip_vit",
            "image_size": 32,
            "patch_size": 8,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
        },
        "vae": {
            "model_type": "solarchip_cnn",
            "image_size": 32,
            "block_out_channels": [8, 16],
            "layers_per_block": 1,
            "latent_channels": 8,
            "norm_num_groups": 4,
            "double_z": True,
        },
    }
    values = {"modalities": MODALITIES, "projection_dim": 16, "classifier_hidden_size": 16, **fields}
    return SolarChipConfig(backbone_config=backbones[backbone], **values)


def save(model, folder):
    """Saves a model with its processor, no parameter at its start, where heads and centring do nearly nothing."""
    torch.manual_seed(0)
    with torch.no_grad():
        for values in model.parameters():
            values += 0.3 * (torch.rand_like(values) - 0.5)
        for name, values in model.named_buffers():
            if ".centering." in f".{name}" and values.is_floating_point():
                values += torch.rand_like(values)
    model.save_pretrained(folder)
    SolarChipImageProcessor(modalities=model.config.modalities, size=32).save_pretrained(folder)
    return model.eval()


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "encoder"
    return save(SolarChipModel(config()), folder), folder


@pytest.fixture(scope="module")
def flare(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "flare"
    model = SolarChipForImageClassification(config(ordinal=True, calibration=CALIBRATIONS["isotonic"]))
    return save(model, folder), folder


def test_flare_model_to_onnx_from_fits_files(flare, tmp_path):
    import onnx
    import onnxruntime

    model, folder = flare
    report = export_model(folder, tmp_path / "out")
    assert (report.task, report.file, report.labels) == ("flare", "model.onnx", ["0AB", "C", "M", "X"])
    assert json.loads((tmp_path / "out" / "export.json").read_text())["modalities"] == MODALITIES
    assert max(report.differences.values()) < 1e-4
    graph = (tmp_path / "out" / "model.onnx").read_bytes()
    onnx.checker.check_model(onnx.load_from_string(graph))
    assert b"site-packages" not in graph  # nothing of where it was written

    sun = SyntheticSun(seed=0, start="2014-02-01", days=5, size=64)
    sun.write_archive(tmp_path / "archive", sun.times("1D"), MODALITIES, progress=False)
    days = sorted({path.name[3:11] for path in (tmp_path / "archive").rglob("AIA*.fits")})
    observations = [
        {name: next((tmp_path / "archive").rglob(f"AIA{day}*_0{name[3:]}.fits")) for name in MODALITIES[1:]}
        for day in days
    ]
    assert len(observations) == 5  # the graph was traced at 2, compared at 1, 3 and 4
    processor = SolarChipImageProcessor.from_pretrained(tmp_path / "out")
    inputs = processor(observations, return_tensors="np")
    assert not inputs["observed"][:, 0].any()  # no magnetogram
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx", providers=["CPUExecutionProvider"])
    got = dict(zip([o.name for o in session.get_outputs()], session.run(None, dict(inputs)), strict=True))
    with torch.no_grad():
        expected = model(**{name: torch.from_numpy(value) for name, value in inputs.items()})
    np.testing.assert_allclose(got["logits"], expected.logits, atol=1e-4)
    np.testing.assert_allclose(got["token_weights"], expected.token_weights, atol=1e-4)
    probabilities = calibrated_probabilities(expected.logits, model.config.calibration)
    np.testing.assert_allclose(got["probabilities"], probabilities, atol=1e-4)
    assert expected.logits.std(0).max() > 1e-3  # the comparison is of something
    assert (got["modality_weights"][:, 0] == 0).all()


def test_encoder_by_torch_export(tmp_path):
    model = save(SolarChipForPreTraining(config("vae", weight_sharing="modality")), tmp_path / "model").solarchip
    report = export_model(tmp_path / "model", tmp_path / "out", output_format="torch", modalities=["304", "hmi"])
    assert (report.task, report.modalities) == ("encoder", ["aia304", "hmi"])
    graph = torch.export.load(tmp_path / "out" / "model.pt2").module()
    images = torch.randn(7, 2, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        tokens, pooled, embeds = graph(pixel_values=images)
        expected = model(images.flatten(0, 1)[:, None], [2, 0] * 7)
    torch.testing.assert_close(tokens.flatten(0, 1), expected.last_hidden_state, atol=1e-4, rtol=0)
    torch.testing.assert_close(pooled.flatten(0, 1), expected.pooler_output, atol=1e-4, rtol=0)
    torch.testing.assert_close(embeds.flatten(0, 1), expected.contrastive_embeds, atol=1e-4, rtol=1e-4)
    assert tokens.std(0).mean() > 1e-2
    assert list(SolarChipImageProcessor.from_pretrained(tmp_path / "out").modalities) == ["aia304", "hmi"]


@pytest.mark.parametrize("calibration", CALIBRATIONS.values(), ids=CALIBRATIONS)
def test_calibration_in_operators_of_onnx_is_the_same(calibration):
    logits = 3 * torch.randn(500, 4, generator=torch.Generator().manual_seed(0))
    got = CalibratedProbabilities(calibration, 4)(logits)
    torch.testing.assert_close(got, calibrated_probabilities(logits, calibration), atol=1e-6, rtol=0)


def test_a_graph_that_disagrees_is_not_kept(encoder, tmp_path, monkeypatch, capsys):
    eager = export._eager
    monkeypatch.setattr(export, "_eager", lambda *arguments: tuple(value + 2e-2 for value in eager(*arguments)))
    assert export.main([str(encoder[1]), str(tmp_path / "out"), "--format", "torch", "--modalities", "171"]) == 2
    said = capsys.readouterr().err
    assert "not exported: the exported graph: expected what" in said
    assert "last_hidden_state" in said
    assert list(tmp_path.iterdir()) == []


def test_largest_difference():
    ones = torch.ones(2, 3)
    assert largest_difference(ones, ones) == 0
    assert largest_difference(ones + 0.25, ones) == 0.25
    assert largest_difference(100 * ones, 80 * ones) == 0.25  # relative beyond 1
    assert largest_difference(ones * float("nan"), ones) != 0  # NaN passes no bound
    assert largest_difference(ones[:1], ones) == float("inf")


def test_what_cannot_be_exported_is_said_in_a_sentence(encoder, flare, tmp_path, capsys):
    def run(*arguments):
        assert export.main([*map(str, arguments)]) == 2
        said = capsys.readouterr().err
        assert "not exported: " in said
        assert "Traceback" not in said
        return said

    full = tmp_path / "full"
    full.mkdir()
    (full / "something").write_text("here")
    assert "new or empty folder" in run(encoder[1], full)
    assert "expected a flare model" in run(encoder[1], tmp_path / "out", "--task", "flare")
    assert "aia193" in run(encoder[1], tmp_path / "out", "--modalities", "193")
    run(tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "bare").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "bare" / name).write_bytes((encoder[1] / name).read_bytes())
    assert "expected the image processor" in run(tmp_path / "bare", tmp_path / "out")
    with pytest.raises(ValueError, match="format: expected one of onnx, torch"):
        export_model(encoder[1], tmp_path / "out", output_format="tflite")
    assert not (tmp_path / "out").exists()
    assert issubclass(ExportError, ValueError)
