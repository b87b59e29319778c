"""Pretrains SolarCHIP on a folder of FITS files or on a prepared dataset.

    accelerate launch examples/pretrain.py --data_dir /data/sdo --modalities hmi aia171 aia304 --model_name vit-base
    accelerate launch examples/pretrain.py examples/configs/quickstart.yaml --max_steps 100

A folder of FITS files is scanned, paired and prepared (once) into `--cache_dir`; what cannot be used is reported with
its reason. Model, image processor, metrics and figures go to `--output_dir`, which the Auto classes load. The first
argument may be a YAML or JSON file of arguments; later ones, and all of transformers' TrainingArguments, override it.
"""

import hashlib
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from huggingface_hub.errors import StrictDataclassError
from transformers import HfArgumentParser, set_seed

from solarchip_hf import SolarChipConfig, SolarChipForPreTraining, SolarChipImageProcessor, read_image, resolve_modality
from solarchip_hf.data import (
    ObservationStream,
    load_observations,
    pair_observations,
    prepare_dataset,
    scan_archive,
    split_labels,
)
from solarchip_hf.data.durations import read_duration, read_time
from solarchip_hf.hub import write_card
from solarchip_hf.hub.command_checks import one_line, parse_all
from solarchip_hf.training import SolarChipTrainer, SolarChipTrainingArguments
from solarchip_hf.training.arguments import read_arguments, with_output_dir
from solarchip_hf.training.checkpoints import checkpoint_to_resume
from solarchip_hf.training.continuation import check_checkpoint, check_output_dir, saved_config, saved_processor
from solarchip_hf.training.report import describe_catalog, describe_pairs, report_pretraining


def option(default: Any, text: str) -> Any:
    """A field with its help."""
    return field(default=default, metadata={"help": text})


@dataclass
class ModelArguments:
    """What is trained."""

    model_name: str = option("vit-base", "vit-tiny, vit-small, vit-base, vit-large, cnn-base; or a saved folder.")
    weight_sharing: str = option("instrument", "Towers: instrument (one for HMI, one for AIA), modality, or shared.")
    modalities: list[str] | None = field(
        default=None, metadata={"help": "Channels in order; default: all in the data."}
    )
    anchor_modality: str | None = option(None, "The channel that others are paired with; default: hmi, or the first.")
    pairing: str = option("anchor", "anchor: pairs with the anchor; all: every pair.")
    projection_centering: str | None = option(None, "none, class or tokens: what is centred before comparison.")
    config_overrides: str | None = option(None, "Further fields of the configuration as JSON, '{\"image_size\": 512}'.")
    processor = None  # of a saved folder


@dataclass
class DataArguments:
    """What it is trained on."""

    data_dir: str | None = option(None, "A folder of FITS (or Helioviewer JPEG2000) files, or a prepared dataset.")
    cache_dir: str = option("prepared", "Where prepared datasets are kept.")
    overwrite_cache: bool = option(False, "Prepare again if the archive has changed.")
    streaming: bool = option(False, "Read training data file after file, shuffled nearby, instead of anywhere.")
    workers: int | None = option(None, "Processes for preparation; default: all cores.")
    tolerance: str = option("6min", "Largest time difference within an observation.")
    min_observed: int = option(2, "Channels that an observation must have at least.")
    geometry: str = option("rsun", "Canonical grid: rsun, arcsec or none.")
    photometry: str = option("nominal", "Units of AIA: nominal, dn or dn_per_s.")
    validation_fraction: float = option(0.2, "Share held out, the latest; 0: none.")
    validation_start: str | None = option(None, "Hold out from this date on instead.")
    gap: str = option("27D", "Time left out between training and held-out observations.")
    note: str = option("", "What the data are, for titles, as 'SyntheticSun'.")


def parse_arguments(argv: list[str]) -> tuple[ModelArguments, DataArguments, SolarChipTrainingArguments]:
    """Reads an optional YAML or JSON file (first argument), then the command line, which wins."""
    usage = "pretrain.py [CONFIG.yaml] --data_dir FOLDER [--model_name NAME] [--output_dir FOLDER] [...]\n\n"
    kinds = (ModelArguments, DataArguments, SolarChipTrainingArguments)
    parser = HfArgumentParser(kinds, usage=usage + __doc__.split("\n\n")[1], description=__doc__.partition("\n\n")[0])
    if argv and argv[0].endswith((".yaml", ".yml", ".json")):
        argv = read_arguments(argv[0]) + argv[1:]
    return parse_all(parser, with_output_dir(argv), "A field of the configuration goes into --config_overrides.")


def build_config(model: ModelArguments, data: DataArguments, modalities: list[str]) -> SolarChipConfig:
    """The configuration of a saved model, with which the arguments must agree, or of a new one of a named size."""
    try:
        overrides = dict(json.loads(model.config_overrides or "{}"))
    except (TypeError, ValueError) as error:
        raise ValueError(f"config_overrides: expected a JSON object, got {model.config_overrides!r}.") from error
    if model.projection_centering is not None:
        overrides["projection_centering"] = model.projection_centering
    if Path(model.model_name).is_dir():
        names, usual = ("modalities", "weight_sharing", "anchor_modality", "pairing"), ModelArguments()
        given = {name: getattr(model, name) for name in names if getattr(model, name) != getattr(usual, name)}
        return saved_config(model.model_name, {**given, **overrides})
    if data.geometry != "rsun":
        overrides = {"mask_reconstruction": False, **overrides}
    if data.geometry == "none":  # no grid, hence no disk to tell patches apart by
        overrides = {"min_disk_fraction": 0.0, **overrides}
    modalities = [resolve_modality(name) for name in modalities]
    anchor = resolve_modality(model.anchor_modality or ("hmi" if "hmi" in modalities else modalities[0]))
    if anchor not in modalities:
        raise ValueError(f"anchor_modality: expected one of the modalities {', '.join(modalities)}, got {anchor}.")
    fields = {"modalities": modalities, "anchor_modality": anchor, "pairing": model.pairing}
    return SolarChipConfig.from_name(model.model_name, weight_sharing=model.weight_sharing, **{**fields, **overrides})


def check(model: ModelArguments, data: DataArguments) -> None:
    """Refuses, before any file is read, what cannot work with any data."""
    if data.data_dir is None or not Path(data.data_dir).is_dir():
        raise ValueError(
            f"data_dir: expected a folder of FITS files or a prepared dataset, got {data.data_dir!r}. "
            "Pass --data_dir FOLDER."
        )
    read_duration(data.tolerance, "tolerance")
    read_duration(data.gap, "gap", zero=True)
    if data.validation_start is not None:
        read_time(data.validation_start, "validation_start")
    if "/" in model.model_name and not Path(model.model_name).is_dir():
        raise ValueError(
            f"model_name: expected a named size or a saved folder, got {model.model_name!r}: no such folder."
        )
    if not 0 <= data.validation_fraction < 1:
        raise ValueError(f"validation_fraction: expected 0 or more and below 1, got {data.validation_fraction}.")
    config = build_config(model, data, model.modalities or [model.anchor_modality or "hmi"])
    model.processor = saved_processor(model.model_name, vars(data), vars(DataArguments()))
    if model.processor is not None:  # the data are prepared and scaled as the weights know them
        model.modalities = config.modalities
        data.geometry, data.photometry = model.processor.geometry, model.processor.photometry


def prepare(model: ModelArguments, data: DataArguments, say: Any) -> Path:
    """Scans, pairs and prepares a folder of files; returns the prepared dataset's folder."""
    folder = Path(data.data_dir)
    catalog = scan_archive(folder, index=cache_path(model, data).with_suffix(".catalog.parquet"), workers=data.workers)
    say(describe_catalog(catalog))
    usable = catalog[catalog["usable"] & catalog["full_disk"] & catalog["modality"].notna()]
    if not len(usable):
        raise ValueError(f"data_dir: expected full-disk images of SDO in {folder}, got none that can be used.")
    wanted = [resolve_modality(name) for name in model.modalities or usable["modality"].unique()]
    anchor = resolve_modality(model.anchor_modality or ("hmi" if "hmi" in wanted else wanted[0]))
    least = min(data.min_observed, len(set(wanted)))
    pairs = pair_observations(catalog, data.tolerance, anchor=anchor, modalities=model.modalities, min_observed=least)
    if not len(pairs):
        raise ValueError(f"modalities: expected {least} of {', '.join(wanted)} within {data.tolerance}, got none.")
    if "SYNTHETIC" in str(read_image(pairs[anchor].iloc[0], header_only=True).header.get("ORIGIN")):
        data.note = data.note or "synthetic"
    labels = ["train"] * len(pairs)
    if data.validation_start or data.validation_fraction > 0:
        first = data.validation_start or 1 - data.validation_fraction
        parts = {"train": first, "validation": None if data.validation_start else data.validation_fraction}
        try:
            labels = list(split_labels(pairs["time_nominal"], parts, gap=data.gap))
        except ValueError as error:
            if data.validation_start and pairs["time_nominal"].max() >= pd.to_datetime(data.validation_start, utc=True):
                raise  # what shall be held out is not trained on
            say(f"No held-out part: {error}\nTraining on all {len(pairs)} observations.")
    kept = [label != "gap" for label in labels]
    pairs, labels = pairs[kept].reset_index(drop=True), [label for label in labels if label != "gap"]
    say(describe_pairs(pairs, labels))
    names = list(pairs.attrs["modalities"])
    grid = {"size": build_config(model, data, names).image_size, "geometry": data.geometry}
    processor = SolarChipImageProcessor(modalities=names, photometry=data.photometry, **grid)
    target = cache_path(model, data)
    prepare_dataset(pairs, target, processor, splits=labels, workers=data.workers, overwrite=data.overwrite_cache)
    return target


def cache_path(model: ModelArguments, data: DataArguments) -> Path:
    """Folder of the dataset prepared with these settings."""
    folder = Path(data.data_dir).resolve()
    size = build_config(model, data, model.modalities or [model.anchor_modality or "hmi"]).image_size
    free = ("data_dir", "cache_dir", "streaming", "workers", "overwrite_cache", "note")
    facts = {name: value for name, value in vars(data).items() if name not in free}
    facts |= {"folder": str(folder), "modalities": model.modalities, "anchor": model.anchor_modality}
    digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:8]
    return Path(data.cache_dir) / f"{folder.name}-{size}px-{digest}"


def build(argv: list[str]) -> tuple[SolarChipTrainer, DataArguments]:
    """Everything before the first step: arguments, data, model, Trainer.

    Raises:
        ValueError, OSError: Something the user gave cannot be used; the message says what, and what to do.
    """
    model_args, data_args, args = parse_arguments(argv)
    main_process = args.process_index == 0
    say = print if main_process else lambda *_: None
    check(model_args, data_args)
    with args.main_process_first(local=False):
        folder = Path(data_args.data_dir)
        if not (folder / "manifest.json").exists():
            if args.world_size > 1:
                say(f"Others wait {args.ddp_timeout} s (--ddp_timeout); examples/prepare_data.py prepares beforehand.")
            folder = prepare(model_args, data_args, say) if main_process else cache_path(model_args, data_args)
        dataset = load_observations(folder, modalities=model_args.modalities, processor=model_args.processor)
    split = dataset.metadata["split"]
    train, held_out = (dataset.select((split == name).to_numpy()) for name in ("train", "validation"))
    data_args.geometry = dataset.processor.geometry  # as it was prepared, here or elsewhere
    set_seed(args.seed)
    config = build_config(model_args, data_args, dataset.modalities)
    saved = Path(model_args.model_name).is_dir()
    model = SolarChipForPreTraining.from_pretrained(model_args.model_name) if saved else SolarChipForPreTraining(config)
    if (config.image_size, config.modalities) != (dataset.processor.size, dataset.modalities):
        raise ValueError(
            f"data_dir: expected {config.modalities} at {config.image_size} px for {model_args.model_name}, got "
            f"{dataset.modalities} at {dataset.processor.size} px. Prepare anew, or set image_size and modalities."
        )
    say(
        f"{len(train)} training and {len(held_out)} held-out observations of {', '.join(dataset.modalities)}; "
        f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.1f} million parameters."
    )
    share = max(1, len(train) // args.world_size)
    if share < args.per_device_train_batch_size:
        say(f"Batches of {share} a process instead of {args.per_device_train_batch_size}: there are no more.")
        args.per_device_train_batch_size = share
    if args.resume_from_checkpoint:
        args.resume_from_checkpoint = found = checkpoint_to_resume(args.resume_from_checkpoint, args.output_dir)
        say(f"Resuming from {found}." if found else f"No complete checkpoint in {args.output_dir}: starting anew.")
        if found:
            check_checkpoint(found, model)
    else:
        check_output_dir(args.output_dir)
    train = ObservationStream(train, seed=args.seed) if data_args.streaming else train
    trainer = SolarChipTrainer(
        model, args, train_dataset=train, eval_dataset=held_out or None, processing_class=dataset.processor
    )
    return trainer, data_args


def main(argv: list[str]) -> int:
    """Trains and reports; returns the exit code: 2 where what was given cannot be used, 0 also behind a SIGTERM."""
    try:
        trainer, data_args = build(argv)
    except (ValueError, OSError, StrictDataclassError) as error:
        print(f"pretrain.py: {one_line(error)}", file=sys.stderr)
        return 2
    diverged = ""
    try:
        metrics = trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint).metrics
    except FloatingPointError as error:
        diverged = str(error)
    if diverged:  # told here, since `end` wants the traceback gone
        print(f"pretrain.py: {diverged}", file=sys.stderr)
        trainer.end()
        return 2
    if trainer.stopped_by_signal:
        print(f"Stopped behind step {trainer.state.global_step}; --resume_from_checkpoint last goes on from there.")
        trainer.end()
        return 0
    if trainer.eval_dataset is not None:
        metrics |= trainer.evaluate()
    trainer.save_model()
    if trainer.is_world_process_zero():
        print(report_pretraining(trainer, metrics, note=data_args.note))
        synthetic = True if "synthetic" in data_args.note.lower() else None  # the files themselves do not tell
        write_card(trainer.args.output_dir, trainer=trainer, data=data_args.note or None, synthetic=synthetic)
        print(f"Saved to {trainer.args.output_dir}: AutoModel.from_pretrained({trainer.args.output_dir!r}) loads it.")
    trainer.end()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
