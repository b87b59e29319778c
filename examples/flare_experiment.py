"""Does pretraining help a flare forecast when labels are few? An experiment on the synthetic Sun.

    python examples/flare_experiment.py --output runs/flare-demo

Everything is synthetic: `SyntheticSun` draws small images of a few channels through the maximum of an activity cycle as
FITS files, a small backbone is pretrained on the training years without labels, with more images than there are labels,
and then, with a tenth of the daily labels (whole blocks of 27 days, another choice for every seed), a linear probe of
the frozen backbone is compared with the same network trained from nothing, with the baselines that a forecast must
beat, fitted on the same labels, and with the simulation's true hazard. Both networks get the same number of tries.
What is drawn, prepared and pretrained is kept in --output and used again by a later call. Writes seeds.md, seeds.json
and a figure there; the test part is scored once, at the end.
"""

import argparse
import json
import sys
import time
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from solarchip_hf import SolarChipConfig, SolarChipForPreTraining, SolarChipImageProcessor, SyntheticSun, data
from solarchip_hf.data.durations import read_duration, read_time
from solarchip_hf.data.flare_events import to_utc
from solarchip_hf.evaluation import ValidationScore, fit_calibration, recalibrated, seed_report
from solarchip_hf.evaluation.flare_rivals import baseline_forecasts, magnetogram_table
from solarchip_hf.evaluation.flare_seeds import load_forecasts, load_tries, save_forecasts
from solarchip_hf.models.calibration import calibrated_probabilities
from solarchip_hf.training import (
    SolarChipTrainer,
    SolarChipTrainingArguments,
    best_flare_fit,
    build_flare_model,
    encode_observations,
    predict_flares,
)

PARTS = {"train": "2015-01-01", "validation": "2016-01-01", "test": None}
SPAN = ("2011-02-01", "2017-07-01")
MODALITIES = ["hmi", "aia94", "aia131"]  # the field, and the two channels that show hot loops
BACKBONE = {"image_size": 64, "patch_size": 8, "hidden_size": 96, "intermediate_size": 384, "num_hidden_layers": 3}
OBJECTIVE = {  # with the published weights of the loss
    "decoder_num_hidden_layers": 1,
    "projection_dim": 96,
    "classifier_hidden_size": 96,
    "classifier_head": "linear",
}
OURS, THEIRS = "pretrained, frozen probe", "same network from scratch"
CEILING = "true hazard of the simulation"
# Of the frozen network only the probe learns; its weight decay shrinks it on standardised statistics.
TRIES = {
    OURS: [
        {"tuning": "linear", "learning_rate": rate, "weight_decay": decay}
        for rate, decay in ((3e-4, 10.0), (1e-4, 10.0), (1e-4, 100.0))
    ],
    THEIRS: [
        {"tuning": "full", "learning_rate": rate, "backbone_learning_rate": rate, "weight_decay": decay}
        for rate, decay in ((1e-3, 0.1), (5e-4, 0.1), (5e-4, 1.0))
    ],
}
CHOICES = (
    "The networks and the rows marked calibrated are calibrated there (Platt), so are the thresholds. Each network has "
    f"{len(TRIES[OURS])} tries of learning rate and weight decay; try and step are those with the largest Brier skill "
    "there. All else was chosen on the Sun of seed 2, its test part included."
)
KEPT = ("sun", "span", "parts", "cadence", "unlabelled", "pretraining_steps")  # what a folder is for
QUIET = {"save_strategy": "no", "report_to": [], "disable_tqdm": True, "logging_steps": 50}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/flare-demo"), help="folder of all that is kept")
    parser.add_argument("--sun", type=int, default=7, help="seed of the synthetic Sun (default: 7)")
    parser.add_argument("--span", nargs=2, default=SPAN, metavar="DATE", help="first day and end of the archive")
    parser.add_argument("--parts", nargs=2, metavar="DATE", help="begin of validation, of test (default: 2015, 2016)")
    parser.add_argument("--cadence", default="1D", help="time between labelled observations (default: 1D)")
    parser.add_argument("--unlabelled", default="12h", help="time between those of pretraining (default: 12h)")
    parser.add_argument("--labels", type=float, default=0.1, help="share of the training labels (default: 0.1)")
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds (default: 5)")
    parser.add_argument("--pretraining_steps", type=int, default=300, help="steps of 32 observations (default: 300)")
    parser.add_argument("--epochs", type=int, default=20, help="epochs of tuning (default: 20)")
    parser.add_argument("--workers", type=int, default=2, help="processes that draw and prepare (default: 2)")
    return parser.parse_args(arguments)


def check(options: argparse.Namespace) -> None:
    """Refuses, before anything is drawn, numbers that work with no data."""
    if min(options.seeds, options.epochs, options.pretraining_steps) < 1:
        raise ValueError("--seeds, --epochs, --pretraining_steps: expected at least 1, got less.")
    if not 0 < options.labels <= 1:
        raise ValueError(f"--labels: expected a share in (0, 1], got {options.labels}.")
    for name in ("span", "parts"):
        first, last = (read_time(date, f"--{name}") for date in getattr(options, name) or ("2015", "2016"))
        if not first < last:
            raise ValueError(f"--{name}: expected two dates, the later one last, got {first:%Y-%m-%d} {last:%Y-%m-%d}.")
    for name in ("cadence", "unlabelled"):
        read_duration(getattr(options, name), f"--{name}")


def archive(options: argparse.Namespace) -> tuple[Path, SyntheticSun]:
    """Draws the Sun as FITS files with its flare list, and prepares them once; returns the prepared folder."""
    start, end = (pd.Timestamp(date) for date in options.span)
    days = (end - start) / pd.Timedelta("1D")
    sun = SyntheticSun(seed=options.sun, start=start, days=days, size=BACKBONE["image_size"])
    prepared = options.output / "prepared"
    if (prepared / "manifest.json").exists():
        return prepared, sun
    parts = dict(zip(PARTS, [*options.parts, None], strict=True)) if options.parts else PARTS
    dense, slots = sun.times(options.unlabelled), sun.times(options.cadence)
    slots = slots.union(dense[dense < pd.Timestamp(parts["train"], tz=dense.tz)])
    slots = slots[np.asarray(data.split_labels(slots, parts, gap="27D")) != "gap"]
    sun.write_archive(options.output / "archive", slots, MODALITIES, workers=options.workers)
    catalog = data.scan_archive(options.output / "archive", options.output / "catalog.parquet", workers=options.workers)
    pairs = data.pair_observations(catalog, modalities=MODALITIES)
    labels = data.split_labels(pairs["time_nominal"], parts, gap="27D")
    table = sun.degradation_table(MODALITIES)  # known to users of AIA too; uncorrected, it tells the year
    processor = SolarChipImageProcessor(modalities=MODALITIES, size=sun.size, degradation=table)
    data.prepare_dataset(pairs, prepared, processor, splits=list(labels), workers=options.workers)
    return prepared, sun


def labelled(prepared: Path, sun: SyntheticSun, options: argparse.Namespace) -> dict[str, Any]:
    """The parts with the labels of the synthetic flare list, whose history reaches a year further back."""
    first = sun.start - pd.Timedelta("366D")
    report = options.output / "synthetic_flares.csv"
    last = sun.end + pd.Timedelta("2D")
    sun.flares(first, last).to_csv(report, index=False)
    events = data.read_flare_events(report)
    slots, parts = to_utc(sun.times(options.cadence)), {}
    for name in PARTS:
        images = data.load_observations(prepared, split=name)
        images = images.select(to_utc(images.metadata["time_nominal"]).isin(slots))
        parts[name] = data.label_observations(images, events, coverage=(first, last))
    return parts


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
        **{"per_device_train_batch_size": 32, "learning_rate": 1e-3, "warmup_steps": 30, "augmentation": "solar"},
        **QUIET,
    )
    model = SolarChipForPreTraining(config)
    SolarChipTrainer(model, arguments, train_dataset=observations, processing_class=observations.processor).train()
    model.save_pretrained(folder)
    observations.processor.save_pretrained(folder)
    return folder


def network(
    name: str, backbone: Path, train: Any, parts: dict[str, Any], seed: int, options: argparse.Namespace
) -> tuple[dict[str, np.ndarray], list[dict[str, Any]]]:
    """The calibrated forecasts of the best of a network's tries, of validation and test; and all its tries."""
    steps = 4 * -(-len(train) // 32)
    arguments = {
        "output_dir": str(options.output / "tuning"),
        "num_train_epochs": options.epochs,
        **{"per_device_train_batch_size": 32, "per_device_eval_batch_size": 128, "seed": seed},
        **{**QUIET, "save_strategy": "steps", "eval_strategy": "steps", "eval_steps": steps, "save_steps": steps},
        "save_total_limit": 1,
    }
    build = partial(build_flare_model, backbone, from_scratch=name == THEIRS, seed=seed)
    score = ValidationScore(train.classes)
    fit, tries = best_flare_fit(build, train, parts["validation"], arguments, TRIES[name], score=score)
    print(f"  {name}: {json.dumps(tries)}", flush=True)
    raw = {part: predict_flares(fit.model, parts[part], batch_size=128, progress=False) for part in list(PARTS)[1:]}
    calibration = fit_calibration(raw["validation"].logits, raw["validation"].labels)
    forecasts = {p: calibrated_probabilities(torch.from_numpy(raw[p].logits), calibration).numpy() for p in raw}
    return forecasts, tries


def one_seed(seed: int, backbone: Path, parts: Any, features: Any, statistics: Any, options: argparse.Namespace) -> Any:
    """Forecasts of every arm with one choice of labels, and the networks' tries: what `save_forecasts` takes."""
    chosen = data.choose_blocks(parts["train"].times, options.labels, seed=seed)
    few = parts["train"].select(chosen)
    print(f"seed {seed}: {few.describe()}", flush=True)
    ours, our_tries = network(OURS, backbone, features["train"].select(chosen), features, seed, options)
    theirs, their_tries = network(THEIRS, backbone, few, parts, seed, options)
    tables = {**statistics, "train": statistics["train"].iloc[chosen]}
    rivals = baseline_forecasts({**parts, "train": few}, statistics=tables, seed=seed)[0]
    calibrated = {f"{name}, calibrated": recalibrated(p, parts["validation"].classes) for name, p in rivals.items()}
    return {OURS: ours, THEIRS: theirs, **rivals, **calibrated}, {OURS: our_tries, THEIRS: their_tries}


def experiment(options: argparse.Namespace) -> dict[str, Any]:
    """Everything; returns the report."""
    settings = {name: str(getattr(options, name)) for name in KEPT} | {"recipe": repr([BACKBONE, OBJECTIVE, TRIES])}
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

    seeds, tries = [], []
    for seed in range(options.seeds):
        kept = options.output / "forecasts" / f"{options.labels:g}_{options.epochs}_{seed}.safetensors"
        if not kept.exists():
            save_forecasts(kept, *one_seed(seed, backbone, parts, features, statistics, options))
        seeds.append(load_forecasts(kept))
        tries.append(load_tries(kept))
    names = sorted(seeds[0], key=lambda name: (name != OURS, name != THEIRS, name))
    arms = {name: [forecasts[name] for forecasts in seeds] for name in names}
    clock["tuned"] = time.perf_counter()
    arms[CEILING] = [{name: sun.flare_probabilities(parts[name].times) for name in list(PARTS)[1:]}]
    seconds = {name: round(then - before) for (_, before), (name, then) in pairwise(clock.items())}
    return seed_report(
        options.output,
        parts,
        arms,
        claim=(OURS, THEIRS),
        ceiling=CEILING,
        note=f"SyntheticSun, seed {options.sun}, {options.labels:.0%} of the labels",
        choices=CHOICES,
        tries={name: [seed.get(name) for seed in tries] for name in TRIES},
        run={"tries": TRIES, **{name: str(value) for name, value in vars(options).items()}, "seconds": seconds},
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
