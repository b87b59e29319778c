"""Export with code: the folder alone, in a process that cannot import this package (nor diffusers, for a ViT)."""

import json
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from solarchip_hf import (
    SolarChipConfig,
    SolarChipForImageClassification,
    SolarChipForPreTraining,
    SolarChipImageProcessor,
    SolarChipModel,
    save_with_code,
)
from solarchip_hf.hub.remote_code import CONFIG_AUTO_MAP, PROCESSOR_AUTO_MAP, add_code, code_files

CLASSES = [SolarChipModel, SolarChipForPreTraining, SolarChipForImageClassification]

# Runs first in the other process: whoever asks for a blocked package is told that there is none.
BLOCK = """
import importlib.abc, sys

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
"""


def vit_config(**fields) -> SolarChipConfig:
    sizes = {"image_size": 64, "patch_size": 16, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    backbone = {**sizes, "num_attention_heads": 2, "decoder_num_hidden_layers": 1}
    return SolarChipConfig(backbone_config=backbone, modalities=["hmi", "171", "304"], projection_dim=16, **fields)


def cnn_config() -> SolarChipConfig:
    backbone = {"model_type": "solarchip_cnn", "image_size": 64, "block_out_channels": [8, 8, 16], "norm_num_groups": 4}
    return SolarChipConfig(backbone_config={**backbone, "latent_channels": 8}, modalities=["hmi", "171", "304"])


def run_without_package(script: str, folder: Path, cache: Path, *, blocked: tuple[str, ...]) -> str:
    """The standard output of a script in an isolated process that sees the folder and none of the blocked packages."""
    code = BLOCK.format(blocked=set(blocked)) + textwrap.dedent(script)
    environment = {"HF_HOME": str(cache), "HF_HUB_OFFLINE": "1", "PATH": "", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-I", "-c", code, str(folder)], capture_output=True, text=True, env=environment, cwd=cache
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout


@pytest.mark.parametrize("model_class", CLASSES)
def test_whichever_class_was_saved_the_map_is_full(model_class, tmp_path):
    model = model_class(vit_config())
    processor = SolarChipImageProcessor(modalities=model.config.modalities, size=64)
    written = save_with_code(model, tmp_path, processor=processor)
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == CONFIG_AUTO_MAP
    assert json.loads((tmp_path / "preprocessor_config.json").read_text())["auto_map"] == PROCESSOR_AUTO_MAP
    assert {path.name for path in written} == {path.name for path in tmp_path.glob("*.py")}
    assert {path.name for path in tmp_path.iterdir()} - {path.name for path in written} == {
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    }
    # nothing of the export sticks to the class: a plain save writes no code
    model.save_pretrained(tmp_path / "plain")
    assert not list((tmp_path / "plain").glob("*.py"))
    assert "auto_map" not in json.loads((tmp_path / "plain" / "config.json").read_text())


def test_the_folder_with_code_loads_with_the_package_too(tmp_path):
    from transformers import AutoModel

    save_with_code(SolarChipForPreTraining(vit_config()), tmp_path)
    assert type(AutoModel.from_pretrained(tmp_path)) is SolarChipModel


def test_every_copied_module_imports_siblings_only():
    names = {path.stem for path in code_files()}
    assert {"modeling_solarchip_classification", "readers", "losses", "image_processing_solarchip"} <= names
    for path in code_files():
        text = path.read_text()
        assert "from __future__ import annotations" not in text, path.name
        for line in text.splitlines():
            words = line.split()
            if words[:1] == ["from"] and len(words) > 1 and words[1].startswith("."):
                assert words[1].removeprefix(".") in names, f"{path.name}: {line}"
                assert words[2] == "import"
            assert "solarchip_hf" not in words[1:2], f"{path.name}: {line}"


def test_mismatches_are_refused(tmp_path):
    model = SolarChipModel(vit_config())
    with pytest.raises(ValueError, match=r"processor\.modalities: expected those of the model, hmi, aia171, aia304"):
        save_with_code(model, tmp_path, processor=SolarChipImageProcessor(modalities=["hmi"]))
    with pytest.raises(FileNotFoundError, match="Save the model first"):
        add_code(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(ValueError, match="expected 'solarchip', got 'vit'"):
        add_code(tmp_path)


def test_a_vit_works_without_package_and_diffusers_on_a_real_file(tmp_path, sdo_folder):
    torch.manual_seed(0)
    pretrained = SolarChipForPreTraining(vit_config()).eval()
    processor = SolarChipImageProcessor(modalities=pretrained.config.modalities, size=64)
    save_with_code(pretrained, tmp_path / "export", processor=processor)
    path = sdo_folder / "AIAsynoptic0171.fits"
    inputs = processor([path], return_tensors="pt")
    with torch.no_grad():
        expected = pretrained.solarchip(**inputs).contrastive_embeds
    folder = tmp_path / "elsewhere" / "vit-base"
    shutil.copytree(tmp_path / "export", folder)
    script = f"""
    import torch
    from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification, AutoModelForPreTraining
    folder = sys.argv[1]
    processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
    inputs = processor([{str(path)!r}], return_tensors="pt")
    with torch.no_grad():
        model = AutoModel.from_pretrained(folder, trust_remote_code=True)
        output = model(**inputs)
        part = AutoModel.from_pretrained(folder, trust_remote_code=True, modalities=["aia171"])
        alone = part(inputs["pixel_values"], [0])
        classifier = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True)
        logits = classifier(**inputs).logits
        pretraining = AutoModelForPreTraining.from_pretrained(folder, trust_remote_code=True)
        observed = torch.zeros(1, 3, dtype=torch.bool)
        observed[:, 1] = True
        loss = pretraining(inputs["pixel_values"].expand(1, 3, -1, -1), observed).loss
    assert not [name for name in sys.modules if name.split(".")[0] in ("solarchip_hf", "diffusers")]
    assert torch.equal(output.contrastive_embeds, alone.contrastive_embeds)
    print(type(model).__module__.split(".")[0], list(part.towers), tuple(logits.shape), bool(loss.isfinite()))
    torch.save(output.contrastive_embeds, folder + "/embeds.pt")
    """
    printed = run_without_package(script, folder, tmp_path, blocked=("solarchip_hf", "diffusers", "sunpy"))
    assert printed.split("\n")[-2] == "transformers_modules ['aia'] (1, 4) True"
    torch.testing.assert_close(torch.load(folder / "embeds.pt"), expected)


def test_a_cnn_asks_for_diffusers_in_words(tmp_path):
    save_with_code(SolarChipModel(cnn_config()), tmp_path / "cnn")
    script = """
    from transformers import AutoModel
    try:
        AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
    except ImportError as error:
        print(error)
    """
    printed = run_without_package(script, tmp_path / "cnn", tmp_path, blocked=("solarchip_hf", "diffusers"))
    assert "pip install solarchip_hf[cnn]" in printed
