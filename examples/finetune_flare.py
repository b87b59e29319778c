"""Tunes SolarCHIP to forecast the largest flare of the next 24 hours, calibrates it, and reports it beside its rivals.

    python examples/finetune_flare.py --data_dir archive/ --events flares.csv --model_name solarchip/vit-base
    python examples/finetune_flare.py --data_dir prepared/ --events flares.csv --model_name vit-tiny --from_scratch

--data_dir is a folder of FITS files (prepared once into --cache_dir) or a prepared dataset; --events a flare list of
NOAA/NCEI or SWPC as CSV, also that of examples/draw_synthetic_archive.py. --model_name is a folder that
examples/pretrain.py wrote; with --from_scratch the same network begins from nothing. The observations are split in
time into training, validation and test with gaps of 27 days. The validation part chooses the checkpoint, the
calibration and the thresholds of warning; the test part is scored once. --output_dir then holds the model, its
processor, forecasts.csv, and report.md, report.json and figures with every baseline on the same samples.
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import HfArgumentParser

from solarchip_hf import SolarChipConfig
from solarchip_hf.data import choose_blocks, load_flare_parts, prepare_flare_archive, read_flare_events
from solarchip_hf.data.durations import read_time
from solarchip_hf.data.flare_observations import told_window
from solarchip_hf.data.flare_preparation import SETTINGS, check_flare_data
from solarchip_hf.evaluation import ValidationScore, calibrated_report
from solarchip_hf.hub import write_card
from solarchip_hf.hub.card_facts import told_arguments
from solarchip_hf.hub.command_checks import check_saved, one_line, parse_all
from solarchip_hf.models.calibration import METHODS
from solarchip_hf.training import FlareTrainingArguments, build_flare_model, fit_flare_model, predict_flares
from solarchip_hf.training.arguments import read_arguments
from solarchip_hf.training.checkpoints import checkpoint_to_resume
from solarchip_hf.training.flare_models import parse_class_weights, read_pretrained
from solarchip_hf.training.report import describe_catalog, describe_pairs


@dataclass
class ModelArguments:
    """What is tuned."""

    _argument_group_name = "the model"

    model_name: str = field(
        default="solarchip/vit-base",
        metadata={"help": "A pretrained folder or repository; with --from_scratch also a size, as vit-tiny."},
    )
    from_scratch: bool = field(default=False, metadata={"help": "Draw all weights anew, the backbone's too."})
    modalities: list[str] | None = field(
        default=None, metadata={"help": "Channels, as hmi 171; default: those of the model that the data have."}
    )
    class_weights: list[str] | None = field(
        default=None, metadata={"help": "'balanced' (by the training part), or a number for each of 0AB, C, M, X."}
    )
    focal_gamma: float | None = field(default=None, metadata={"help": "Exponent of the focal loss; 2 is usual."})
    ordinal: bool = field(default=False, metadata={"help": "Ordered thresholds on one scale, not free classes."})
    config_overrides: str | None = field(
        default=None, metadata={"help": "Further fields of the configuration as JSON, '{\"classifier_dropout\": 0.3}'."}
    )


@dataclass
class DataArguments:
    """What it is tuned on."""

    _argument_group_name = "the data"

    data_dir: str | None = field(default=None, metadata={"help": "Folder of FITS files, or a prepared dataset."})
    events: list[str] | None = field(default=None, metadata={"help": "Flare lists as CSV, of one irradiance scale."})
    cache_dir: str = field(default="prepared", metadata={"help": "Where prepared datasets are kept."})
    overwrite_cache: bool = field(default=False, metadata={"help": "Prepare again if the archive has changed."})
    workers: int | None = field(default=None, metadata={"help": "Processes for preparation; default: all cores."})
    tolerance: str = field(default="6min", metadata={"help": "Largest time difference within an observation."})
    horizon: str = field(default="24h", metadata={"help": "Length of the window that is forecast."})
    by: str = field(default="start", metadata={"help": "A flare counts where it has its 'start' or its 'peak'."})
    latency: str = field(default="0h", metadata={"help": "Delay between an observation and its forecast."})
    coverage: list[str] | None = field(
        default=None, metadata={"help": "First and last time for which the list is complete; default: of its flares."}
    )
    validation_start: str | None = field(default=None, metadata={"help": "Begin of validation, with --test_start."})
    test_start: str | None = field(default=None, metadata={"help": "Begin of the test part."})
    shares: list[float] | None = field(
        default=None, metadata={"help": "Shares of training, validation, test; default: as prepared, else .6 .2 .2."}
    )
    gap: str | None = field(default=None, metadata={"help": "Time left out at the borders; default: 27D, a rotation."})
    label_fraction: float = field(default=1.0, metadata={"help": "Share of the training labels, in blocks of 27 days."})
    note: str = field(default="", metadata={"help": "What the data are, for titles, as 'SyntheticSun'."})

    def parts(self) -> dict[str, Any]:
        """The three parts by dates or by shares, as `chronological_split` takes them."""
        if self.test_start is not None:
            return {"train": self.validation_start, "validation": self.test_start, "test": None}
        return dict(zip(("train", "validation", "test"), self.shares or (0.6, 0.2, 0.2), strict=True))


@dataclass
class ReportArguments:
    """How it is judged."""

    _argument_group_name = "calibration and report"

    boundary: str = field(default="M+", metadata={"help": "C+, M+ or X+: chooses the checkpoint and heads the tables."})
    calibration: str = field(default="platt", metadata={"help": f"{', '.join(METHODS)}; fitted on validation."})
    num_resamples: int = field(default=500, metadata={"help": "Resamples of blocks of 27 days, for intervals."})


def parse_arguments(argv: list[str]) -> tuple[ModelArguments, DataArguments, ReportArguments, FlareTrainingArguments]:
    """Reads an optional YAML or JSON file (first argument), then the command line, which wins."""
    parser = HfArgumentParser(
        (ModelArguments, DataArguments, ReportArguments, FlareTrainingArguments),
        usage="finetune_flare.py [CONFIG.yaml] --data_dir FOLDER --events CSV [--model_name NAME] [--tuning HOW] [...]"
        "\n\n" + __doc__.split("\n\n")[1],
        description=__doc__.partition("\n\n")[0],
        epilog=__doc__.rpartition("\n\n")[2],
    )
    if argv and argv[0].endswith((".yaml", ".yml", ".json")):
        argv = read_arguments(argv[0]) + argv[1:]
    return parse_all(parser, argv, "A field of the configuration goes into --config_overrides.")


def check(model: ModelArguments, data: DataArguments, judge: ReportArguments) -> dict[str, Any]:
    """Refuses, before any image is read, what works with no data; returns the fields that override a configuration."""
    for name in ("validation_start", "test_start", "coverage"):
        value = getattr(data, name) or []
        for time in [value] if isinstance(value, str) else value:
            read_time(time, name)
    check_flare_data(data.data_dir, data.events, vars(data))
    if "/" in model.model_name or Path(model.model_name).is_dir():  # else the name of a size
        check_saved(model.model_name, "model", argument="model_name")
    if judge.calibration not in METHODS or judge.num_resamples < 1:
        raise ValueError(f"calibration, num_resamples: expected one of {', '.join(METHODS)}, and at least 1.")
    ValidationScore([0], judge.boundary)
    try:
        fields = dict(json.loads(model.config_overrides or "{}"))
    except (TypeError, ValueError) as error:
        raise ValueError(f"config_overrides: expected a JSON object, got {model.config_overrides!r}.") from error
    return {"focal_gamma": model.focal_gamma, "ordinal": model.ordinal or None, **fields}


def run(argv: list[str]) -> None:
    """Data, model, training, calibration, report.

    Raises:
        ValueError, OSError, ImportError, FloatingPointError: Something the user gave cannot be used; the message says
            what, and what to do.
    """
    model_args, data, judge, args = parse_arguments(argv)
    fields = check(model_args, data, judge)
    say = print if args.process_index == 0 else lambda *_, **__: None
    name, folder, options = model_args.model_name, Path(data.data_dir), {"modalities": model_args.modalities}
    saved = read_pretrained(name)
    options["parts"] = data.parts()
    if saved:
        options["known"] = saved[0].modalities
        settings = {setting: getattr(saved[1], setting) for setting in SETTINGS}
    else:
        chosen = {key: value for key, value in fields.items() if value is not None}
        settings = {"size": SolarChipConfig.from_name(name, **chosen).image_size}
    try:
        events, raw = read_flare_events(data.events), not (folder / "manifest.json").exists()
    except ValueError as error:
        said = one_line(error).rstrip(".")
        raise ValueError(f"events: {said}. Pass the flare list of NOAA/NCEI, or one in the style of SWPC.") from error
    with args.main_process_first(local=False):
        if raw:
            folder = prepare_flare_archive(
                folder,
                data.cache_dir,
                settings,
                gap=data.gap or "27D",
                events=events,
                tolerance=data.tolerance,
                workers=data.workers,
                overwrite=data.overwrite_cache,
                report=lambda files, pairs: say(
                    describe_catalog(files), describe_pairs(pairs, pairs["split"]), sep="\n"
                ),
                **options,
            )
    parts = load_flare_parts(
        folder,
        events,
        model=name if saved else None,
        prepared_parts=raw or not (data.test_start or data.shares),
        gap=None if raw else data.gap,
        horizon=data.horizon,
        by=data.by,
        coverage=data.coverage and tuple(data.coverage),
        latency=data.latency,
        **options,
    )
    train = parts["train"]
    parts["train"] = train = train.select(choose_blocks(train.times, data.label_fraction, seed=args.seed))
    for part, observations in parts.items():
        say(f"{part}: {observations.describe()}")
    model = build_flare_model(
        name,
        from_scratch=model_args.from_scratch,
        modalities=train.modalities,
        seed=args.seed,
        class_weights=parse_class_weights(model_args.class_weights, train.classes),
        **{"classifier_head": "linear" if args.tuning == "linear" else None, **fields},
    )
    size, given = model.config.image_size, train.processor.size
    if size != given:
        raise ValueError(f"data_dir: expected images of {size} px for {name}, got {given} px. Set image_size: {given}.")
    if model_args.from_scratch and args.backbone_learning_rate is None:
        args.backbone_learning_rate = args.learning_rate  # there is nothing to preserve
    if args.resume_from_checkpoint:
        found = checkpoint_to_resume(args.resume_from_checkpoint, args.output_dir)
        say(f"Resuming from {found}." if found else f"No complete checkpoint in {args.output_dir}: starting anew.")
    score = ValidationScore(train.classes, judge.boundary)
    fit = fit_flare_model(model, train, parts["validation"], args, score=score)
    if fit.stopped:
        say(f"Stopped behind step {fit.steps}; --resume_from_checkpoint last goes on from there.")
    if fit.stopped or args.process_index != 0:
        return
    output, quiet = Path(args.output_dir), args.disable_tqdm
    fit.model.config.forecast_window = told_window(train.labels.attrs)
    fit.model.save_pretrained(output)
    train.processor.save_pretrained(output)
    places = {"data_dir": folder.name, "events": [Path(path).name for path in data.events], "cache_dir": None}
    own = {"model_name": Path(name).name if saved and Path(name).is_dir() else name}
    facts = {"model": {**vars(model_args), **own, **fields}, "data": vars(data) | places, "training": fit.facts()}
    fit.model.config.calibration, report = calibrated_report(
        output,
        parts,
        {p: predict_flares(fit.model, parts[p], progress=not quiet).logits for p in ("validation", "test")},
        name=args.tuning,
        method=judge.calibration,
        headline=judge.boundary,
        note=data.note,
        run=facts | {"arguments": told_arguments(args.to_dict())},  # the report is published: no paths of this machine
        num_resamples=judge.num_resamples,
        seed=args.seed,
    )
    fit.model.config.save_pretrained(output)
    write_card(output)
    say((output / "report.md").read_text(encoding="utf-8").partition("\n## ")[2].partition("\n## ")[0])
    say(f"{'Synthetic data. ' if report['synthetic'] else ''}Model, forecasts, report and figures are in {output}.")


def main(argv: list[str]) -> int:
    """Runs the command; returns the exit code: 2 where what was given cannot be used, 0 also behind a SIGTERM."""
    try:
        run(argv)
    except (ValueError, OSError, ImportError, FloatingPointError, StrictDataclassError) as error:
        print(f"finetune_flare.py: {one_line(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
