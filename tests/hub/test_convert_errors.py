"""What conversion refuses: each a sentence that names the cause, and no file written."""

import argparse
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from research_layout import cnn_table, flare_state, random_state, save_checkpoint, vit_table

from solarchip_hf.hub import conversion_layout
from solarchip_hf.hub.conversion_files import read_state_dict
from solarchip_hf.hub.convert import ConversionError, convert_checkpoint, main

VIT = (32, 16, 16, 1, 8)
CNN = (8, [1, 2], 1, 4, 6)


def vit_state(*branches: str) -> dict[str, torch.Tensor]:
    return random_state(vit_table(*VIT), list(branches or ("hmi", "0171")))


def refusal(tmp_path: Path, checkpoint: Path, **options) -> ConversionError:
    """The error of a conversion that must fail, after which the folder is as it was."""
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConversionError) as caught:
        convert_checkpoint(checkpoint, tmp_path / "deep" / "out", **{"num_attention_heads": 2, **options})
    assert sorted(tmp_path.rglob("*")) == before
    return caught.value


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("share", [0.02, 0.5, 0.999])
def test_truncated_file(tmp_path, share):
    whole = save_checkpoint(tmp_path / "last.ckpt", vit_state()).read_bytes()
    (tmp_path / "last.ckpt").write_bytes(whole[: int(share * len(whole))])
    assert "truncated" in str(refusal(tmp_path, tmp_path / "last.ckpt"))


def test_truncated_entry_within_a_whole_archive(tmp_path):
    whole = save_checkpoint(tmp_path / "whole.ckpt", vit_state())
    with zipfile.ZipFile(whole) as source, zipfile.ZipFile(tmp_path / "last.ckpt", "w") as target:
        for name in source.namelist()[:-5]:
            target.writestr(name, source.read(name))
    assert "cannot be read" in str(refusal(tmp_path, tmp_path / "last.ckpt"))


def test_pickle_with_code_is_not_run(tmp_path):
    marker = tmp_path / "marker"
    torch.save({"state_dict": vit_state(), "callbacks": Payload(marker)}, tmp_path / "last.ckpt")
    text = str(refusal(tmp_path, tmp_path / "last.ckpt"))
    assert "pathlib" in text
    assert "weights_only" in text
    with (tmp_path / "bare.ckpt").open("wb") as stream:
        pickle.dump({"state_dict": Payload(marker)}, stream)
    assert "bare pickle" in str(refusal(tmp_path, tmp_path / "bare.ckpt"))
    assert not marker.exists()


def test_foreign_objects_beside_the_weights_are_named(tmp_path):
    content = {"state_dict": vit_state(), "hyper_parameters": argparse.Namespace(lr=1e-4)}
    torch.save(content, tmp_path / "last.ckpt")
    text = str(refusal(tmp_path, tmp_path / "last.ckpt"))
    assert "argparse.Namespace" in text
    assert "state_dict" in text  # how to save it anew


def test_files_that_are_no_checkpoints(tmp_path):
    (tmp_path / "page.ckpt").write_text("<html>404</html>")
    assert "torch.save" in str(refusal(tmp_path, tmp_path / "page.ckpt"))
    torch.save({"weights": {}}, tmp_path / "other.ckpt")
    assert "state_dict" in str(refusal(tmp_path, tmp_path / "other.ckpt"))
    torch.save({"state_dict": {"model_dict.hmi.x": 3}}, tmp_path / "number.ckpt")
    assert "model_dict.hmi.x" in str(refusal(tmp_path, tmp_path / "number.ckpt"))
    with pytest.raises(FileNotFoundError, match="absent"):
        convert_checkpoint(tmp_path / "absent.ckpt", tmp_path / "out")


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("model.diffusion_model.input_blocks.0.0.weight", "SolarLDM"),
        ("control_model.input_hint_block.0.weight", "SolarControl"),
        ("hmi_encoder.conv_in.weight", "SolarPredictor"),
        ("models.hmi.encoder.pos_embedding", "before SolarCHIP"),
        ("resnet.layer1.0.conv1.weight", "no checkpoint of SolarCHIP"),
    ],
)
def test_other_checkpoints_are_refused_by_name(tmp_path, key, name):
    state = {"betas": torch.zeros(1000), key: torch.zeros(3, 3), "model.diffusion_model.out.0.bias": torch.zeros(3)}
    if "SolarLDM" not in name and "SolarControl" not in name:
        del state["model.diffusion_model.out.0.bias"]
    assert name in str(refusal(tmp_path, save_checkpoint(tmp_path / "last.ckpt", state)))


def test_wrong_architectures(tmp_path):
    table = {"encoder.layer1.0.conv1.weight": (8, 8, 3, 3), "contrasive_porject": (8, 8)}
    checkpoint = save_checkpoint(tmp_path / "resnet.ckpt", random_state(table, ["hmi"]))
    assert "expected a ViT" in str(refusal(tmp_path, checkpoint))

    colours = vit_table(*VIT) | {"encoder.conv1.weight": (16, 3, 16, 16)}
    checkpoint = save_checkpoint(tmp_path / "colours.ckpt", random_state(colours, ["hmi"]))
    assert "one image channel" in str(refusal(tmp_path, checkpoint))

    attention = cnn_table(*CNN) | {"encoder.down.1.attn.0.q.weight": (16, 16, 1, 1)}
    checkpoint = save_checkpoint(tmp_path / "attention.ckpt", random_state(attention, ["hmi"]))
    assert "attn_resolutions" in str(refusal(tmp_path, checkpoint, num_attention_heads=None))

    linear = {key: shape for key, shape in cnn_table(*CNN).items() if "attn_1" not in key}
    linear |= {"encoder.mid.attn_1.to_qkv.weight": (48, 16, 1, 1)}
    checkpoint = save_checkpoint(tmp_path / "linear.ckpt", random_state(linear, ["hmi"]))
    assert "linear attention" in str(refusal(tmp_path, checkpoint, num_attention_heads=None))

    wide = cnn_table(8, [2, 2], 1, 4, 6)
    checkpoint = save_checkpoint(tmp_path / "wide.ckpt", random_state(wide, ["hmi"]))
    assert "ch_mult" in str(refusal(tmp_path, checkpoint, num_attention_heads=None))


def test_one_missing_key_of_any_kind(tmp_path):
    whole = vit_state("hmi")
    for key in whole:
        state = {name: value for name, value in whole.items() if name != key}
        error = refusal(tmp_path, save_checkpoint(tmp_path / "last.ckpt", state))
        assert error.missing == [key]
    cnn = random_state(cnn_table(*CNN, variational=True), ["hmi"])
    for key in [*list(cnn)[::7], "model_dict.hmi.quant_conv.weight", "model_dict.hmi.encoder.conv_in.weight"]:
        state = {name: value for name, value in cnn.items() if name != key}
        error = refusal(tmp_path, save_checkpoint(tmp_path / "last.ckpt", state), num_attention_heads=None)
        assert error.missing == [key]


@pytest.mark.parametrize(
    "key",
    [
        "model_dict.hmi.encoder.proj",
        "model_dict.hmi.encoder.transformer.resblocks.0.attn.bias_k",
        "model_dict.0171.decoder.position",
        "contrastive_loss_fn.extra",
        "queue",
    ],
)
def test_one_extra_key(tmp_path, key):
    checkpoint = save_checkpoint(tmp_path / "last.ckpt", vit_state() | {key: torch.zeros(2)})
    # Also where the branch that holds it was not asked for.
    for options in ({}, {"modalities": ["hmi"]}):
        error = refusal(tmp_path, checkpoint, **options)
        assert error.unexpected == [key]
        assert key in str(error)


def test_shapes_that_do_not_fit(tmp_path):
    state = vit_state()
    key = "model_dict.0171.encoder.transformer.resblocks.0.mlp.c_fc.weight"
    state[key] = torch.zeros(8, 16)
    text = str(refusal(tmp_path, save_checkpoint(tmp_path / "last.ckpt", state)))
    assert key in text
    assert "(64, 16)" in text
    state = vit_state() | {"contrastive_loss_fn.cls_logit_scale": torch.zeros(2)}
    text = str(refusal(tmp_path, save_checkpoint(tmp_path / "last.ckpt", state)))
    assert "cls_logit_scale" in text
    state = vit_state("hmi") | {"model_dict.hmi.encoder.positional_embedding": torch.zeros(7, 16)}
    assert "square" in str(refusal(tmp_path, save_checkpoint(tmp_path / "last.ckpt", state)))


def test_what_no_shape_tells(tmp_path):
    checkpoint = save_checkpoint(tmp_path / "last.ckpt", vit_state())
    assert "--num_attention_heads" in str(refusal(tmp_path, checkpoint, num_attention_heads=None))
    assert "divisor" in str(refusal(tmp_path, checkpoint, num_attention_heads=3))
    assert "image_size" in str(refusal(tmp_path, checkpoint, image_size=64))
    assert "preprocessing" in str(refusal(tmp_path, checkpoint, preprocessing="sqrt"))
    cnn = save_checkpoint(tmp_path / "cnn.ckpt", random_state(cnn_table(*CNN), ["hmi"]))
    assert "single head" in str(refusal(tmp_path, cnn))


def test_modalities_that_the_file_does_not_hold(tmp_path):
    checkpoint = save_checkpoint(tmp_path / "last.ckpt", vit_state())
    assert "aia193" in str(refusal(tmp_path, checkpoint, modalities=["hmi", "193"]))
    checkpoint = save_checkpoint(tmp_path / "mixed.ckpt", vit_state("hmi", "aia", "0171"))
    assert "'hmi' and 'aia'" in str(refusal(tmp_path, checkpoint))


def test_a_flare_classifier_is_named_and_checked_as_strictly(tmp_path):
    state = flare_state(vit_table(*VIT))
    checkpoint = save_checkpoint(tmp_path / "last.ckpt", state)
    assert "--encoder_only" in str(refusal(tmp_path, checkpoint))
    lacking = {key: value for key, value in state.items() if key != "hmi_encoder.ln_post.bias"}
    error = refusal(tmp_path, save_checkpoint(tmp_path / "last.ckpt", lacking), encoder_only=True)
    assert error.missing == ["hmi_encoder.ln_post.bias"]
    assert "hmi_encoder.ln_post.bias" in str(error)
    for key in ("hmi_encoder.proj", "decoder.de_proj.bias"):
        checkpoint = save_checkpoint(tmp_path / "last.ckpt", state | {key: torch.zeros(2)})
        assert refusal(tmp_path, checkpoint, encoder_only=True).unexpected == [key]
    checkpoint = save_checkpoint(tmp_path / "last.ckpt", vit_state())
    assert "flare classifier" in str(refusal(tmp_path, checkpoint, encoder_only=True))


def test_weights_that_are_not_finite(tmp_path):
    state = vit_state()
    state["model_dict.0171.decoder.de_proj.bias"][3] = float("nan")
    text = str(refusal(tmp_path, save_checkpoint(tmp_path / "last.ckpt", state)))
    assert "reconstruction" in text


def test_a_table_with_a_wrong_pair_does_not_get_through(tmp_path, monkeypatch):
    pairs = list(conversion_layout.VIT_BLOCK_PAIRS)
    name, (query, key, value), rule = pairs[0]
    pairs[0] = (name, (key, value, query), rule)
    monkeypatch.setattr(conversion_layout, "VIT_BLOCK_PAIRS", tuple(pairs))
    text = str(refusal(tmp_path, save_checkpoint(tmp_path / "last.ckpt", vit_state())))
    assert "expected what the checkpoint's own layout gives" in text
    assert "tokens" in text


def test_output_folder_is_never_mixed_with_other_files(tmp_path):
    checkpoint = save_checkpoint(tmp_path / "last.ckpt", vit_state())
    (tmp_path / "out").mkdir()
    convert_checkpoint(checkpoint, tmp_path / "out", num_attention_heads=2)
    content = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with pytest.raises(ConversionError, match="empty folder"):
        convert_checkpoint(checkpoint, tmp_path / "out", num_attention_heads=2)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == content
    with pytest.raises(ConversionError, match="got a file"):
        convert_checkpoint(checkpoint, checkpoint, num_attention_heads=2)


def test_command_names_the_keys_and_fails(tmp_path):
    state = vit_state("hmi")
    del state["model_dict.hmi.encoder.ln_pre.bias"]
    checkpoint = save_checkpoint(tmp_path / "last.ckpt", state | {"queue": torch.zeros(2)})
    command = [sys.executable, "-W", "error", "-m", "solarchip_hf.hub.convert", str(checkpoint), str(tmp_path / "out")]
    result = subprocess.run([*command, "--num_attention_heads", "2"], capture_output=True, text=True)
    assert result.returncode == 1
    assert "not converted" in result.stderr
    assert "Traceback" not in result.stderr
    assert "unexpected: queue" in result.stderr
    assert "missing: model_dict.hmi.encoder.ln_pre.bias" in result.stderr
    assert main([str(checkpoint), str(tmp_path / "out"), "--modalities", "999"]) == 1
    assert not (tmp_path / "out").exists()


def test_tensors_are_mapped_from_the_file(tmp_path):
    state, others = read_state_dict(save_checkpoint(tmp_path / "last.ckpt", vit_state()))
    assert list(state) == list(vit_state())
    assert others == ["epoch", "global_step", "optimizer_states"]
