"""Who may import whom, what an import of the package costs, and that every public name is there."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import solarchip_hf

PACKAGE = Path(solarchip_hf.__file__).parent
ROOMS = {
    "models": {"models"},
    "data": {"models", "data"},
    "training": {"models", "training"},
    "translation": {"models", "data", "training", "translation"},  # of training: whole checkpoints, drawing, a SIGTERM
    "evaluation": {"models", "data", "evaluation"},
    "hub": {"models", "data", "training", "translation", "evaluation", "hub"},
}
HEAVY = (
    "diffusers",
    "peft",
    "astropy",
    "sunpy",
    "aiapy",
    "dask",
    "distributed",
    "datasets",
    "matplotlib",
    "evaluate",
    "sklearn",
)


def own_imports(path: Path) -> set[str]:
    """Dotted names below the package that a module imports, in functions too."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    parts = ("solarchip_hf", *path.relative_to(PACKAGE).with_suffix("").parts)
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(parts[: len(parts) - node.level]) if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            found |= {f"{module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.split(".")[0] in ("solarchip_hf", "examples")}


MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE)


def test_there_are_modules_to_look_at():
    assert {path.relative_to(PACKAGE).parts[0] for path in MODULES} >= {"models", "data", "training", "hub"}
    assert own_imports(PACKAGE / "models" / "modeling_solarchip.py") >= {
        "solarchip_hf.models.losses.contrastive_losses"
    }


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_rooms_import_what_they_may(path):
    room = path.relative_to(PACKAGE).parts[0]
    for name in own_imports(path):
        parts = name.split(".")
        assert parts[0] != "examples", f"{path.name} imports {name}: nobody imports the examples"
        target = parts[1] if len(parts) > 1 and parts[1] in ROOMS else None
        if room == "hub" and target is None:
            continue  # it may import all, by the package's own names too
        assert target is not None, f"{path.name} imports {name}: import from the room that holds it"
        assert target in ROOMS[room], f"{path.name} imports {name}: {room} may import {', '.join(sorted(ROOMS[room]))}"


@pytest.mark.parametrize("path", sorted((PACKAGE / "models").glob("*.py")), ids=lambda path: path.name)
def test_models_are_flat_and_import_siblings_by_name(path):
    siblings = {other.stem for other in (PACKAGE / "models").glob("*.py")}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1, f"{path.name}: line {node.lineno} leaves the folder"
            assert node.module in siblings, f"{path.name}: line {node.lineno} imports no sibling"
    assert not [child for child in (PACKAGE / "models").iterdir() if child.is_dir() and child.name != "__pycache__"]


def test_no_name_of_translation_is_a_pipeline_of_diffusers():
    from diffusers import pipelines

    # diffusers would save a component from such a folder as one of its own pipelines, and look for it there
    names = {path.stem for path in (PACKAGE / "translation").glob("[a-z]*.py")} | {"translation", "models"}
    assert hasattr(pipelines, "controlnet")
    assert not [name for name in names if hasattr(pipelines, name)]


def test_the_import_pulls_nothing_heavy():
    code = f"""
import sys
import solarchip_hf
print(*sorted({{name.split(".")[0] for name in sys.modules}} & {set(HEAVY)!r}))
from transformers import AutoConfig
print(AutoConfig.for_model("solarchip").model_type)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines() == ["", "solarchip"]


def test_every_public_name_is_there():
    assert len(set(solarchip_hf.__all__)) == len(solarchip_hf.__all__)
    assert set(solarchip_hf._LAZY) <= set(solarchip_hf.__all__)
    assert set(solarchip_hf.__all__) <= set(dir(solarchip_hf))
    for name in solarchip_hf.__all__:
        assert getattr(solarchip_hf, name) is not None, name
    with pytest.raises(AttributeError, match="has no attribute 'SolarChipp'"):
        solarchip_hf.SolarChipp  # noqa: B018


@pytest.mark.parametrize("room", ["data", "training", "translation", "evaluation", "hub"])
def test_every_public_class_of_a_room_is_a_public_name_of_the_package(room):
    module = importlib.import_module(f"solarchip_hf.{room}")
    assert module.__all__
    for name in module.__all__:
        if isinstance(getattr(module, name), type):
            assert getattr(solarchip_hf, name) is getattr(module, name), name


def test_auto_classes_are_registered():
    from transformers import (
        AutoConfig,
        AutoImageProcessor,
        AutoModel,
        AutoModelForImageClassification,
        AutoModelForPreTraining,
    )

    config = AutoConfig.for_model("solarchip", backbone_config={"num_hidden_layers": 1, "hidden_size": 48})
    for auto, expected in (
        (AutoModel, solarchip_hf.SolarChipModel),
        (AutoModelForPreTraining, solarchip_hf.SolarChipForPreTraining),
        (AutoModelForImageClassification, solarchip_hf.SolarChipForImageClassification),
    ):
        assert auto._model_mapping[type(config)] is expected
    mapping = AutoImageProcessor.register.__globals__["IMAGE_PROCESSOR_MAPPING"]
    assert solarchip_hf.SolarChipImageProcessor in mapping[type(config)].values()


def test_auto_image_processor_round_trip(tmp_path):
    from transformers import AutoImageProcessor

    solarchip_hf.SolarChipImageProcessor(modalities=["hmi", "aia171"], size=64).save_pretrained(tmp_path)
    again = AutoImageProcessor.from_pretrained(tmp_path)
    assert type(again) is solarchip_hf.SolarChipImageProcessor
    assert list(again.modalities) == ["hmi", "aia171"]
