"""Model and dataset cards, written from what a folder's own files say.

    python -m solarchip_hf.hub.cards solarchip/vit-base                       # writes solarchip/vit-base/README.md
    python -m solarchip_hf.hub.cards solarchip/vit-base --data "AIA and HMI, 2010 to 2020" --license cc-by-4.0
    python -m solarchip_hf.hub.cards --family vit --output model_cards/vit.md

Facts come from the configuration, the image processor, the weights' headers, the training arguments and the metrics
that a run leaves; what else is told is kept in `card.json`, so that the card can be written again. A fact that is not
known is not in the card.
"""

import argparse
import importlib.resources
import logging
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import DatasetCardData, EvalResult, ModelCardData

from . import card_text as text
from .card_check import check_card
from .card_facts import (
    FACTS,
    TOLD,
    CardFacts,
    check_told,
    read_facts,
    read_json,
    readable_size,
    save_facts,
    training_facts,
)
from .card_families import FAMILIES, family_facts, family_sizes
from .card_results import CardResult

logger = logging.getLogger(__name__)

CARD = "README.md"
MARK = "<!-- Written by solarchip_hf.hub.cards"
# Cards that a program wrote may be written over: ours, and what transformers' Trainer leaves.
_MARKS = (MARK, "<!-- This model card has been generated automatically according to the information the Trainer")
_TASKS = {"backbone": "image-feature-extraction", "flare": "image-classification", "translation": "image-to-image"}
_TAGS = {
    "backbone": ["contrastive-learning", "foundation-model"],
    "flare": ["flare-forecasting", "space-weather"],
    "translation": ["diffusers", "controlnet", "latent-diffusion"],
}
_COMMON_TAGS = ["heliophysics", "solar-physics", "SDO", "AIA", "HMI", "FITS"]
_ARGUMENT_NAMES = {
    "max_steps": "steps",
    "num_train_epochs": "epochs",
    "per_device_train_batch_size": "observations a step and process",
    "gradient_accumulation_steps": "accumulated steps",
    "lr_scheduler_type": "schedule",
    "optim": "optimiser",
    "max_grad_norm": "gradient clipped at",
    "ema_decay": "decay of the averaged weights",
}
_SHARING = {
    "instrument": "one tower for HMI, one for AIA",
    "modality": "one tower a channel",
    "shared": "one tower for all channels",
}
_CENTRING = {
    "none": "not centred",
    "class": "class token centred per channel",
    "tokens": "tokens centred per channel and position",
}
_COMPONENTS = ("autoencoder", "unet", "controlnet", "scheduler")


def card_data(facts: CardFacts) -> ModelCardData | DatasetCardData:
    """The metadata of a card.

    Args:
        facts: From `read_facts`.

    Returns:
        huggingface_hub's own object; only what is known is set.
    """
    tags = [*_COMMON_TAGS, *_TAGS.get(facts.kind, []), *(["synthetic-data"] if facts.synthetic else [])]
    if facts.kind == "dataset":
        count = facts.manifest.get("observations") or 0
        return DatasetCardData(
            license=facts.license,
            tags=[*tags, "solarchip_hf"],
            pretty_name=_title(facts),
            size_categories=[_size_category(count)],
            task_categories=["image-feature-extraction", "image-to-image"],
            configs=_dataset_configs(facts),
        )
    finite = [result for result in facts.results if math.isfinite(result.value)]
    # a control's figure is not this model's
    evaluated = [_eval_result(result, _TASKS[facts.kind]) for result in finite if not result.control]
    if facts.kind != "translation":
        tags.append("solarchip_hf")
    return ModelCardData(
        license=facts.license,
        # the Hub's snippet for transformers works only where the code travels with the weights
        library_name="transformers" if facts.has_code else "solarchip_hf",
        pipeline_tag=_TASKS[facts.kind],
        tags=tags,
        datasets=facts.datasets or None,
        base_model=facts.base_model,
        metrics=sorted({result.metric for result in finite}) or None,
        model_name=facts.repo_id if evaluated else None,
        eval_results=evaluated or None,
        widget=facts.examples or _widget(facts) or None,
    )


def render_card(facts: CardFacts, family: str | None = None) -> str:
    """The text of a card, with checked metadata.

    Args:
        facts: From `read_facts`.
        family: One of `FAMILIES`, for the page of a family instead of one checkpoint.

    Returns:
        Markdown behind a block of metadata.

    Raises:
        ValueError: The metadata would be refused.
    """
    context: dict[str, Any] = {
        "card_data": card_data(facts).to_yaml(),
        "origin": f"--family {family}" if family else "from the folder's own files",
        "title": FAMILIES[family].title if family else _title(facts),
        "synthetic": facts.synthetic,
        "synthetic_note": f"Data: {facts.data}. {text.SYNTHETIC_NOTE}" if facts.data else text.SYNTHETIC_NOTE,
        "summary": text.summary(facts),
        "preprocessing": text.preprocessing(facts),
        "credit": text.CREDIT,
    }
    if facts.kind == "dataset":
        template = "dataset_card.md.jinja"
        context |= {"use": _dataset_use(facts), "contents": _contents(facts), "limits": text.dataset_limits(facts)}
    else:
        template = "model_card.md.jinja"
        results = [result for result in facts.results if math.isfinite(result.value)]
        context |= {
            "trained": family is None,
            "use": text.use(facts),
            "intended": text.intended(facts),
            "limits": text.limits(facts),
            "architecture": _architecture(facts),
            "sizes": family_sizes(family) if family else None,
            "training": _training(facts),
            "untrained": FAMILIES[family].untrained if family else "How this was trained is not recorded.",
            "results": [text.result_row(result) for result in results],
            "protocols": list(dict.fromkeys(f"{result.dataset}: {result.protocol}" for result in results)),
            "memory": _memory(facts),
            "citation": text.CITATION,
        }
    folder = importlib.resources.files(__package__) / "templates"
    environment = jinja2.Environment(
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=jinja2.StrictUndefined
    )
    content = environment.from_string((folder / template).read_text(encoding="utf-8")).render(context)
    check_card(content)
    return content


def write_card(
    folder: str | Path,
    *,
    repo_id: str | None = None,
    trainer: Any = None,
    measure: bool = False,
    overwrite: bool = False,
    **told: Any,
) -> Path:
    """Writes `README.md` into the folder of a saved model, pipeline or prepared dataset.

    What is told here is kept in the folder's `card.json` and used when the card is written again. A card that somebody
    has edited (its first comment is gone) is left alone.

    Args:
        folder: As `save_pretrained`, a Trainer or `prepare_dataset` left it.
        repo_id: Its name on the Hub; default: the folder's last two path components.
        trainer: The Trainer behind the model, for its facts; then nothing is kept of an earlier `card.json`.
        measure: Whether to load the model in another process and measure its memory.
        overwrite: Whether an edited card is written anew.
        **told: Fields of `CardFacts` that no file tells: `data`, `synthetic`, `results` (a list of `CardResult`),
            `datasets`, `base_model`, `license`, `training`, `memory`, `examples`.

    Returns:
        The card's path.

    Raises:
        ValueError: The folder holds nothing that a card is for, a name or a result is unknown, or the metadata would be
            refused by the Hub.
    """
    folder = Path(folder)
    check_told(told)
    kept = {} if trainer is not None else read_json(folder / FACTS)
    if trainer is not None:
        told["training"] = training_facts(trainer) | dict(told.get("training") or {})
    if measure:
        from .card_memory import measure_memory

        told["memory"] = measure_memory(folder)
    known = kept | {name: value for name, value in told.items() if value is not None}
    if any(known.values()) or (folder / FACTS).exists():
        save_facts(folder, known)
    path = folder / CARD
    if path.exists() and not overwrite and not is_generated(path.read_text(encoding="utf-8")):
        logger.warning("%s: left as it is, since it was not written here or was edited.", path)
        return path
    content = render_card(read_facts(folder, repo_id))
    scratch = folder / f".{CARD}.new"
    scratch.write_text(content, encoding="utf-8")
    scratch.replace(path)
    return path


def is_generated(card: str) -> bool:
    """Whether a card was written by a program, and nobody has claimed it since."""
    return any(mark in card for mark in _MARKS)


def family_card(family: str) -> str:
    """The page of a family of checkpoints.

    Args:
        family: `"vit"`, `"cnn"`, `"flare"` or `"controlnet"`.

    Returns:
        Its Markdown.
    """
    return render_card(family_facts(family), family)


# ---- parts of the metadata


def _eval_result(result: CardResult, task: str) -> EvalResult:
    arguments: dict[str, Any] = {"protocol": result.protocol}
    if result.low is not None and result.high is not None:
        arguments["interval_95"] = [round(result.low, 6), round(result.high, 6)]
    name = text.result_row(result)
    return EvalResult(
        task_type=task,
        dataset_type=result.dataset_id or ("synthetic-sun" if result.synthetic else "sdo"),
        dataset_name=name["dataset"],
        dataset_split=result.split,
        metric_type=result.metric,
        metric_name=name["name"],
        metric_value=round(float(result.value), 6),
        metric_args=arguments,
    )


def _widget(facts: CardFacts) -> list[dict[str, str]]:
    names = facts.pipeline.get("source_modalities") or facts.config.get("modalities") or []
    return [
        {"src": text.example_file(name), "example_title": f"{text.labels([name])}, 2024-01-01"} for name in names[:3]
    ]


def _dataset_configs(facts: CardFacts) -> list[dict[str, Any]]:
    splits = list(facts.manifest.get("splits") or {})
    files = [{"split": name, "path": f"data/{name}-*.arrow"} for name in splits if name != "gap"]
    return [{"config_name": "default", "data_files": files}]


def _size_category(count: int) -> str:
    for limit, name in ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K")):
        if count < limit:
            return name
    return "100K<n<1M"


# ---- parts of the text


def _title(facts: CardFacts) -> str:
    what = {
        "backbone": "SolarCHIP features",
        "flare": "SolarCHIP flare forecast",
        "translation": "SolarCHIP translation",
        "dataset": "SolarCHIP observations",
    }[facts.kind]
    return f"{facts.repo_id}: {what}"


def _architecture(facts: CardFacts) -> list[tuple[str, str]]:
    config, tower = facts.config, facts.config.get("backbone_config") or {}
    rows = []
    for part, name in facts.pipeline.items():
        if isinstance(name, list) and part in _COMPONENTS:
            size = facts.parameters.get(part)
            rows.append((part, f"`{name[1]}`" + (f", {size / 1e6:.1f} million parameters" if size else "")))
    if not config:
        return rows
    rows.append(("channels", text.labels(config.get("modalities") or [])))
    if text.backbone(config) == "CNN":
        widths = ", ".join(map(str, tower.get("block_out_channels") or ["unknown"]))
        rows.append(("tower", f"convolutional, blocks of {widths} channels"))
        rows.append(("latent", f"{tower.get('latent_channels')} channels" + (", VAE" if tower.get("double_z") else "")))
    else:
        rows.append(
            (
                "tower",
                f"vision transformer, {tower.get('num_hidden_layers')} layers of width {tower.get('hidden_size')}, "
                f"{tower.get('num_attention_heads')} heads, patches of {tower.get('patch_size')} px",
            )
        )
    rows.append(("image", f"{tower.get('image_size')} x {tower.get('image_size')} px, one channel"))
    if len(config.get("modalities") or []) > 1:
        rows.append(("weights shared", _SHARING.get(str(config.get("weight_sharing")), "not recorded")))
    if facts.kind == "flare":
        return rows + _calibration(config)
    centring = _CENTRING.get(str(config.get("projection_centering")), "centring not recorded")
    return [*rows, ("contrastive space", f"{config.get('projection_dim')} dimensions, {centring}")]


def _calibration(config: dict[str, Any]) -> list[tuple[str, str]]:
    calibration = config.get("calibration")
    if not calibration:
        return [("calibration", "none: the softmax of the logits is not a calibrated probability")]
    fitted = calibration.get("fitted_on")
    rows = [("calibration", f"{calibration.get('method')}" + (f", fitted on {fitted}" if fitted else ""))]
    thresholds = calibration.get("thresholds") or {}
    if thresholds:
        written = ", ".join(f"{name.replace('_plus', '+').upper()} {value:.3g}" for name, value in thresholds.items())
        rows.append(("thresholds of warning", f"{written} (chosen there too)"))
    return rows


def _training(facts: CardFacts) -> list[tuple[str, str]]:
    training, rows = facts.training, []
    if facts.data:
        rows.append(
            ("data", facts.data + (" (synthetic)" if facts.synthetic and "synth" not in facts.data.lower() else ""))
        )
    for name, part in (training.get("splits") or {}).items():
        period = f", {part['first']} to {part['last']}" if part.get("first") else ""
        rows.append((f"{name} observations", f"{part['observations']}{period}"))
    if training.get("processes", 1) > 1:
        rows.append(("processes", str(training["processes"])))
    for name, value in (training.get("arguments") or {}).items():
        rows.append((_ARGUMENT_NAMES.get(name, name.replace("_", " ")), _short(value)))
    if training.get("device"):
        rows.append(("device", str(training["device"])))
    if training.get("versions"):
        rows.append(("software", ", ".join(f"{name} {value}" for name, value in training["versions"].items())))
    known = ("splits", "processes", "arguments", "device", "versions", "steps", "peak_device_bytes")
    rows += [(name.replace("_", " "), _short(value)) for name, value in training.items() if name not in known]
    return rows


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _memory(facts: CardFacts) -> list[str]:
    total = sum(facts.parameters.values())
    lines = []
    if total:
        size = f", {readable_size(facts.weight_bytes)} on disk" if facts.weight_bytes else ""
        trained = (
            f"{readable_size(total * 16)} for training"
            if facts.kind != "translation"
            else "16 bytes for each parameter that is trained"
        )
        lines.append(
            f"{total / 1e6:.1f} million parameters{size}; computed: {readable_size(total * 4)} in float32 for "
            f"inference, {trained} with AdamW in float32 (weights, gradients, two moments), without activations."
        )
    if facts.memory:
        lines.append(
            f"Measured: {readable_size(facts.memory['peak_bytes'])} at the peak of a process that loads it and runs "
            f"{facts.memory['what']} in {facts.memory['seconds']:.1f} s ({facts.memory['device']})."
        )
    if facts.training.get("peak_device_bytes"):
        lines.append(f"Measured in training: {readable_size(facts.training['peak_device_bytes'])} of device memory.")
    return lines or ["Not known: no weights are here."]


def _dataset_use(facts: CardFacts) -> str:
    return (
        "from solarchip_hf.data import load_observations\n\n"
        f'observations = load_observations("{facts.repo_id}")\n'
        'observations[0]["pixel_values"]    # (channels, size, size), scaled; missing images are zero\n'
        "observations.physical(0)           # the same in physical units, NaN where invalid"
    )


def _contents(facts: CardFacts) -> list[tuple[str, str]]:
    manifest = facts.manifest
    rows = [(f"{name} observations", str(count)) for name, count in (manifest.get("splits") or {}).items()]
    settings = manifest.get("settings") or {}
    rows.append(("image", f"{settings.get('size')} x {settings.get('size')} px, {settings.get('dtype')}"))
    size = sum(shard.get("bytes", 0) for shard in manifest.get("shards") or [])
    rows.append(("files", f"{len(manifest.get('shards') or [])} Arrow files, {readable_size(size)}"))
    if facts.data:
        rows.append(("source", facts.data))
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns 0, or 2 with the reason on the standard error."""
    parser = argparse.ArgumentParser(prog="python -m solarchip_hf.hub.cards", description=__doc__.split("\n")[0])
    parser.add_argument("folder", nargs="?", help="a saved model, pipeline or prepared dataset")
    parser.add_argument("--family", choices=sorted(FAMILIES), help="the page of a family instead of a folder's card")
    parser.add_argument("--output", help="where the page of a family goes; default: the standard output")
    parser.add_argument("--repo_id", help="its name on the Hub; default: the folder's last two path components")
    parser.add_argument("--data", help="what the data are, in words")
    parser.add_argument("--synthetic", action=argparse.BooleanOptionalAction, help="whether they are synthetic")
    parser.add_argument("--datasets", nargs="+", help="repositories of the training data on the Hub")
    parser.add_argument("--base_model", help="repository of the model that this one was tuned from")
    parser.add_argument("--license", help="identifier of the weights' licence (apache-2.0)")
    parser.add_argument("--measure", action="store_true", help="load the model and measure its memory")
    parser.add_argument("--overwrite", action="store_true", help="write anew what somebody has edited")
    options = vars(parser.parse_args(arguments))
    family, output, folder = options.pop("family"), options.pop("output"), options.pop("folder")
    try:
        if (family is None) == (folder is None):
            raise ValueError("folder, --family: expected one of them.")
        if family is None:
            print(write_card(folder, **options))
        elif output is None:
            print(family_card(family), end="")
        else:
            Path(output).write_text(family_card(family), encoding="utf-8")
            print(output)
    except (ValueError, OSError) as error:
        print(f"cards: {error}", file=sys.stderr)
        return 2
    return 0


__all__ = ["CARD", "TOLD", "card_data", "family_card", "is_generated", "main", "render_card", "write_card"]

if __name__ == "__main__":
    sys.exit(main())
