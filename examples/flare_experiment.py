"""Does pretraining help a flare forecast when labels are few? An experiment on the synthetic Sun.

    python examples/flare_experiment.py --output runs/flare-demo

Everything is synthetic: `SyntheticSun` draws daily images of a few channels through the maximum of an activity cycle as
FITS files, a small backbone is pretrained on the training years without labels, and then, with a tenth of the labels
(whole blocks of 27 days, another choice for every seed), a probe on the frozen backbone is compared with the same
network trained from nothing, with the baselines that a forecast must beat, fitted on the same labels, and with the
simulation's true hazard. What is drawn, prepared and pretrained is kept in --output and used again by a later call.
Writes seeds.md, seeds.json and a figure there; the test part is scored once, at the end.
"""

import argparse
import json
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors.numpy import load_file, save_file

from solarchip_hf import SolarChipConfig, SolarChipForPreTraining, SolarChipImageProcessor, SyntheticSun, data
from solarchip_hf.evaluation import ValidationScore, fit_calibration, seed_report
from solarchip_hf.evaluation.flare_rivals import baseline_forecasts, magnetogram_table
from solarchip_hf.models.calibration import calibrated_probabilities
from solarchip_hf.training import (
    FlareTrainingArguments,
    SolarChipTrainer,
    SolarChipTrainingArguments,
    build_flare_model,
    encode_observations,
    fit_flare_model,
    predict_flares,
)

PARTS = {"train": "2015-01-01", "validation": "2016-01-01", "test": None}
SPAN = ("2011-02-01", "2017-07-01")
MODALITIES = ["hmi", "aia94", "aia131"]  # the field, and the two channels that show hot loops
BACKBONE = {"image_size": 64, "patch_size": 8, "hidden_size": 96, "intermediate_size": 384, "num_hidden_layers": 3}
OBJECTIVE = {
    "decoder_num_hidden_layers": 1,
    "projection_dim": 96,
    "classifier_hidden_size": 96,
    **dict.fromkeys(("cls_loss_weight", "patch_loss_weight", "reconstruction_loss_weight"), 1.0),
    "intra_loss_weight": 0.1,
}
OURS, THEIRS = "pretrained, frozen probe", "same network from scratch"
CEILING = "true hazard of the simulation"
QUIET = {"save_strategy": "no", "report_to": [], "disable_tqdm": True, "logging_steps": 50}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/flare-demo"), help="folder of all that is kept")
    parser.add_argument("--sun", type=int, default=2, help="seed of the synthetic Sun (default: 2)")
    parser.add_argument("--span", nargs=2, default=SPAN, metavar="DATE", help="first day and end of the archive")
    parser.add_argument(
        "--parts", nargs=2, metavar="DATE", help="begin of validation and of test (default: 2015, 2016)"
    )
    parser.add_argument("--cadence", default="1D", help="time between observations (default: 1D)")
    parser.add_argument("--labels", type=float, default=0.1, help="share of the training labels (default: 0.1)")
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds (default: 5)")
    parser.add_argument("--pretraining_steps", type=int, default=300, help="steps of 32 observations (default: 300)")
    parser.add_argument("--epochs", type=int, default=40, help="epochs of tuning (default: 40)")
    parser.add_argument("--workers", type=int, default=2, help="processes that draw and prepare (default: 2)")
    return parser.parse_args(arguments)


def check(options: argparse.Namespace) -> None:
    """Refuses, before anything is drawn, numbers that work with no data."""
    if min(options.seeds, options.epochs, options.pretraining_steps) < 1:
        raise ValueError("--seeds, --epochs, --pretraining_steps: expected at least 1, got less.")
    if not 0 < options.labels <= 1:
        raise ValueError(f"--labels: expected a share in (0, 1], got {options.labels}.")


def archive(options: argparse.Namespace) -> tuple[Path, SyntheticSun]:
    """Draws the Sun as FITS files with its flare list, and prepares them once; returns the prepared folder."""
    start, end = (pd.Timestamp(date) for date in options.span)
    sun = SyntheticSun(seed=options.sun, start=start, days=(end - start) / pd.Timedelta("1D"), size=128)
    prepared = options.output / "prepared"
    if (prepared / "manifest.json").exists():
        return prepared, sun
    sun.write_archive(options.output / "archive", sun.times(options.cadence), MODALITIES, workers=options.workers)
    catalog = data.scan_archive(options.output / "archive", options.output / "catalog.parquet", workers=options.workers)
    pairs = data.pair_observations(catalog, modalities=MODALITIES)
    labels = np.asarray(data.split_labels(pairs["time_nominal"], parts_of(options), gap="27D"))
    pairs, labels = pairs[labels != "gap"].reset_index(drop=True), labels[labels != "gap"]
    processor = SolarChipImageProcessor(modalities=MODALITIES, size=BACKBONE["image_size"])
    data.prepare_dataset(pairs, prepared, processor, splits=list(labels), workers=options.workers)
    return prepared, sun


def parts_of(options: argparse.Namespace) -> dict[str, Any]:
    """The ends of the parts, as `split_labels` takes them."""
    return dict(zip(PARTS, [*options.parts, None], strict=True)) if options.parts else PARTS


def labelled(prepared: Path, sun: SyntheticSun, options: argparse.Namespace) -> dict[str, Any]:
    """The parts with the labels of the synthetic flare list, whose history reaches a year further back."""
    first = sun.start - pd.Timedelta("366D")
    report = options.output / "synthetic_flares.csv"
    last = sun.end + pd.Timedelta("2D")
    sun.flares(first, last).to_csv(report, index=False)
    events = data.read_flare_events(report)
    images = {name: data.load_observations(prepared, split=name) for name in PARTS}
    return {name: data.label_observations(images[name], events, coverage=(first, last)) for name in PARTS}


def pretrain(prepared: Path, options: argparse.Namespace) -> Path:
    """Pretrains the backbone on the images of the training part, without labels, once."""
    folder = options.output / "backbone"
    if (folder / "config.json").exists():
        return folder
    observations = data.load_observations(prepared, split="train")
    torch.manual_seed(0)
    config = SolarChipConfig.from_name("vit-tiny", modalities=MODALITIES, **BACKBONE, **OBJECTIVE)
    arguments = SolarChipTrainingArguments(
        output_dir=str(options.output / "pretraining"),
        max_steps=options.pretraining_steps,
        per_device_train_batch_size=32,
        learning_rate=1e-3,
        warmup_steps=30,
        augmentation="solar",
        **QUIET,
    )
    model = SolarChipForPreTraining(config)
    SolarChipTrainer(model, arguments, train_dataset=observations, processing_class=observations.processor).train()
    model.save_pretrained(folder)
    observations.processor.save_pretrained(folder)
    return folder


def tuned(
    model: Any, train: Any, parts: dict[str, Any], seed: int, options: argparse.Namespace, **settings: Any
) -> Any:
    """Fits a model on some labels; returns the fit, and its calibrated forecasts of validation and test."""
    steps = 5 * -(-len(train) // 32)
    arguments = FlareTrainingArguments(
        output_dir=str(options.output / "tuning"),
        num_train_epochs=options.epochs,
        per_device_train_batch_size=32,
        per_device_eval_batch_size=128,
        eval_strategy="steps",
        eval_steps=steps,
        save_steps=steps,
        seed=seed,
        **{**QUIET, "save_strategy": "steps", "save_total_limit": 1},
        **settings,
    )
    fit = fit_flare_model(model, train, parts["validation"], arguments, score=ValidationScore(train.classes))
    raw = {name: predict_flares(fit.model, parts[name], batch_size=128, progress=False) for name in list(PARTS)[1:]}
    calibration = fit_calibration(raw["validation"].logits, raw["validation"].labels)
    logits = {name: torch.from_numpy(raw[name].logits) for name in raw}
    return fit, {name: calibrated_probabilities(logits[name], calibration).numpy() for name in raw}


def probe(backbone: Path, few: Any, features: dict[str, Any], seed: int, options: argparse.Namespace) -> Any:
    """The better, on validation, of a linear and an attentive probe of the frozen backbone."""
    fits = []
    for tuning, head, rate in (("linear", "linear", 5e-3), ("attentive", "mlp", 1e-3)):
        model = build_flare_model(backbone, seed=seed, classifier_head=head)
        fits.append(tuned(model, few, features, seed, options, tuning=tuning, learning_rate=rate))
    return max(fits, key=lambda fit: fit[0].best_score)


def one_seed(seed: int, backbone: Path, parts: Any, features: Any, statistics: Any, options: argparse.Namespace) -> Any:
    """Forecasts of every arm with one choice of labels: name to part to class probabilities."""
    chosen = data.choose_blocks(parts["train"].times, options.labels, seed=seed)
    few = parts["train"].select(chosen)
    print(f"seed {seed}: {few.describe()}", flush=True)
    fit, ours = probe(backbone, features["train"].select(chosen), features, seed, options)
    print(f"  probe: {fit.score_name} on validation {fit.best_score:.3f} at step {fit.best_step}", flush=True)
    rates = {"tuning": "full", "learning_rate": 5e-4, "backbone_learning_rate": 5e-4}
    network = build_flare_model(backbone, from_scratch=True, seed=seed)
    fit, theirs = tuned(network, few, parts, seed, options, **rates)
    print(f"  scratch: {fit.score_name} on validation {fit.best_score:.3f} at step {fit.best_step}", flush=True)
    tables = {**statistics, "train": statistics["train"].iloc[chosen]}
    return {OURS: ours, THEIRS: theirs, **baseline_forecasts({**parts, "train": few}, statistics=tables, seed=seed)[0]}


def save(forecasts: dict[str, dict[str, np.ndarray]], path: Path) -> None:
    """Keeps the forecasts of a seed, so that a later call goes on from there."""
    path.parent.mkdir(exist_ok=True)
    partial = path.with_suffix(".partial")
    flat = {
        f"{arm}/{part}": np.ascontiguousarray(p, float) for arm, row in forecasts.items() for part, p in row.items()
    }
    save_file(flat, partial)
    partial.replace(path)


def experiment(options: argparse.Namespace) -> dict[str, Any]:
    """Everything; returns the report."""
    settings = {name: str(getattr(options, name)) for name in ("sun", "span", "parts", "cadence", "pretraining_steps")}
    kept = options.output / "settings.json"
    if kept.exists() and json.loads(kept.read_text()) != settings:
        raise ValueError(f"--output: expected a new folder, or the settings of {kept}, got {settings}.")
    kept.write_text(json.dumps(settings))
    clock = {"start": time.perf_counter()}
    prepared, sun = archive(options)
    clock["drawn and prepared"] = time.perf_counter()
    backbone = pretrain(prepared, options)
    clock["pretrained"] = time.perf_counter()
    parts = labelled(prepared, sun, options)
    for name, part in parts.items():
        print(f"synthetic {name}: {part.describe()}", flush=True)
    frozen = build_flare_model(backbone)
    features = {name: encode_observations(frozen, part, batch_size=128) for name, part in parts.items()}
    statistics = {name: magnetogram_table(part) for name, part in parts.items()}
    clock["encoded"] = time.perf_counter()

    arms: dict[str, list[dict[str, np.ndarray]]] = {}
    for seed in range(options.seeds):
        kept = options.output / "forecasts" / f"{options.labels:g}_{options.epochs}_{seed}.safetensors"
        if not kept.exists():
            save(one_seed(seed, backbone, parts, features, statistics, options), kept)
        for key, values in load_file(kept).items():
            arm, _, part = key.rpartition("/")
            arms.setdefault(arm, [{} for _ in range(options.seeds)])[seed][part] = values
    arms = {name: arms[name] for name in [OURS, THEIRS, *sorted(set(arms) - {OURS, THEIRS})]}
    clock["tuned"] = time.perf_counter()
    hazard = {name: sun.flare_probabilities(parts[name].times) for name in ("validation", "test")}
    arms[CEILING] = [hazard]
    seconds = {name: round(then - before) for (_, before), (name, then) in pairwise(clock.items())}
    return seed_report(
        options.output,
        parts,
        arms,
        claim=(OURS, THEIRS),
        ceiling=CEILING,
        note=f"SyntheticSun, seed {options.sun}, {options.labels:.0%} of the labels",
        run={**{name: str(value) for name, value in vars(options).items()}, "seconds": seconds},
    )


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; bad input ends in one sentence and status 2."""
    options = parse_arguments(arguments)
    try:
        check(options)
        options.output.mkdir(parents=True, exist_ok=True)
        report = experiment(options)
    except (OSError, ValueError) as error:
        print(f"flare_experiment.py: {error}", file=sys.stderr)
        return 2
    print((options.output / "seeds.md").read_text())
    print(json.dumps(report["run"]["seconds"]), "seconds. Synthetic data; report and figure are in", options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
