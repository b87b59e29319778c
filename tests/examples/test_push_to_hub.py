"""The command that publishes: what it would send, and what it says to bad input."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
from push_to_hub import main
from solarchip_hf import SolarChipConfig, SolarChipModel


@pytest.fixture
def folder(tmp_path) -> Path:
    backbone = {"image_size": 32, "patch_size": 8, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    config = SolarChipConfig(backbone_config={**backbone, "num_attention_heads": 2}, modalities=["hmi"])
    SolarChipModel(config).save_pretrained(tmp_path / "solarchip" / "vit")
    (tmp_path / "solarchip" / "vit" / "training_args.bin").write_bytes(b"x")
    return tmp_path / "solarchip" / "vit"


def test_a_dry_run_says_what_goes_and_what_stays(folder, capsys):
    assert main([str(folder), "--dry_run", "--endpoint"]) == 0
    goes, _, stays = capsys.readouterr().out.partition("1 files stay here:")
    assert "for solarchip/vit:" in goes
    for name in ("README.md", "config.json", "handler.py", "model.safetensors", "modeling_solarchip.py"):
        assert f"  {name}\n" in goes
    assert stays.strip() == "training_args.bin"
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors", "training_args.bin"]
    assert main([str(folder), "--dry_run", "--no_code"]) == 0
    assert ".py" not in capsys.readouterr().out


def test_bad_input_is_a_sentence(folder, capsys):
    cases = {"none of their files": folder.parent, "expected JSON": folder, "not a name": folder}
    (folder / "preprocessor_config.json").write_text("{")
    for words, path in cases.items():
        if words == "not a name":
            (folder / "preprocessor_config.json").unlink()
        assert main([str(path), "--repo_id", "not a name", *(["--dry_run"] if path != folder else [])]) == 2
        error = capsys.readouterr().err
        assert "push_to_hub.py: " in error
        assert words in error
        assert "Traceback" not in error
