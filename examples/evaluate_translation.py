"""Scores a translation pipeline on held-out observations, beside the baselines it has to beat.

    python examples/evaluate_translation.py translation/hmi-to-aia171 prepared/sdo --output translation/evaluation
    python examples/evaluate_translation.py translation/aia171-to-hmi prepared/sdo --limit 24 --num_samples 4

Takes a saved SolarChipControlNetPipeline and a prepared dataset whose rows are split in time. Writes `fidelity.md` and
`fidelity.json` (every method in one table, with intervals from blocks of time), figures and the U-Net that was trained
as a baseline, which a second run with the same training observations and settings loads instead of training it again.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

from solarchip_hf.data import chronological_split, load_observations
from solarchip_hf.data.durations import read_duration
from solarchip_hf.data.observations import Observations
from solarchip_hf.evaluation.translation_baselines import (
    LatentRegression,
    autoencoder_ceiling,
    sample_pipeline,
    simple_baselines,
)
from solarchip_hf.evaluation.translation_cases import TranslationCases, gather_cases
from solarchip_hf.evaluation.translation_figures import write_figures
from solarchip_hf.evaluation.translation_report import compare_translations, write_report
from solarchip_hf.evaluation.translation_unet import FACTS, UNetTranslator, train_unet, training_key
from solarchip_hf.hub.command_checks import check_device, check_saved
from solarchip_hf.translation import SolarChipControlNetPipeline

METHOD = "ControlNet"


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipeline", help="folder of a saved pipeline, or its name on the Hub")
    parser.add_argument("dataset", help="folder of a prepared dataset, or its name on the Hub")
    parser.add_argument("--output", type=Path, default=Path("evaluation"), help="folder to write (default: evaluation)")
    parser.add_argument("--split", help="part that is scored (default: test where there is one, else validation)")
    parser.add_argument("--limit", type=int, default=48, help="observations scored, spread in time (default: 48)")
    parser.add_argument("--num_samples", type=int, default=8, help="samples an observation, 2 or more (default: 8)")
    parser.add_argument("--num_inference_steps", type=int, default=20, help="denoising steps (default: 20)")
    parser.add_argument("--guidance_scale", type=float, default=1.0, help="weight of the sources (default: 1)")
    parser.add_argument("--batch_size", type=int, default=16, help="samples denoised together (default: 16)")
    parser.add_argument("--unet_steps", type=int, default=200, help="steps of the U-Net; 0: without it (default: 200)")
    parser.add_argument("--unet_widths", type=int, nargs="+", default=[16, 32, 64], help="its channels (16 32 64)")
    parser.add_argument("--block", help="length of the bootstrap's blocks, as 27D (default: by the span)")
    parser.add_argument("--note", default="", help="what the data are, for titles, as 'synthetic'")
    parser.add_argument("--seed", type=int, default=0, help="of samples, U-Net and resampling (default: 0)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="torch device")
    options = parser.parse_args(arguments)
    for name, least in (("limit", 2), ("num_samples", 2), ("num_inference_steps", 1), ("batch_size", 1)):
        if getattr(options, name) < least:
            parser.error(f"--{name}: expected {least} or more, got {getattr(options, name)}.")
    return options


def split_name(dataset: Observations, wanted: str | None) -> str:
    """The part that is scored.

    Raises:
        ValueError: There is no such part, or none that was held out, or no training part.
    """
    there = dict.fromkeys(dataset.metadata["split"])
    name = wanted or next((part for part in ("test", "validation") if part in there), None)
    if name not in there or "train" not in there:
        raise ValueError(
            f"split: expected {wanted or 'test or validation'} beside train in {dataset.folder}, got "
            f"{', '.join(map(str, there))}. Prepare the dataset with splits in time."
        )
    return str(name)


def unet_baseline(options: argparse.Namespace, training: Observations, cases: TranslationCases) -> np.ndarray:
    """The U-Net's predictions; trained on the training part, the last of which it stops by."""
    folder = options.output / "unet"
    settings = {"widths": list(options.unet_widths), "steps": options.unet_steps, "seed": options.seed}
    key = training_key(training, cases.source_modalities, cases.target_modality, **settings)
    translator = UNetTranslator.from_pretrained(folder).to(options.device) if (folder / FACTS).is_file() else None
    if translator is not None and translator.training_key == key:
        print(f"U-Net loaded from {folder}.")
    else:
        if translator is not None:
            print(f"The U-Net in {folder} was trained on other observations or with other settings: trained anew.")
        torch.manual_seed(options.seed)
        translator = UNetTranslator.build(
            cases.source_modalities,
            cases.target_modality,
            cases.processor.statistics_key,
            widths=options.unet_widths,
        )
        parts = {"train": np.arange(len(training)), "validation": None}
        try:
            parts = chronological_split(training.metadata["time_nominal"], {"train": 0.85, "validation": 0.15})
        except ValueError as error:
            print(f"U-Net: no early stopping, since the training part is too short: {error}")
        train_unet(
            translator,
            training.select(parts["train"]),
            None if parts["validation"] is None else training.select(parts["validation"]),
            num_steps=options.unet_steps,
            seed=options.seed,
            device=options.device,
            progress=sys.stderr.isatty(),
        )
        translator.training_key = key
        translator.save_pretrained(folder)
    return translator.predict(cases, batch_size=options.batch_size)


def evaluate(options: argparse.Namespace) -> str:
    """Scores, writes and draws; returns the text for the terminal."""
    if options.block is not None:
        read_duration(options.block, "--block")
    if options.output.is_file():
        raise NotADirectoryError(f"--output: expected a folder, got the file {options.output}.")
    check_device(options.device)
    check_saved(options.pipeline, "pipeline", argument="pipeline")
    pipeline = SolarChipControlNetPipeline.from_pretrained(options.pipeline).to(options.device)
    pipeline.set_progress_bar_config(disable=not sys.stderr.isatty(), desc="samples")
    sources, target = list(pipeline.config.source_modalities), pipeline.config.target_modality
    dataset = load_observations(options.dataset, [*sources, target], processor=pipeline.image_processor)
    labels = dataset.metadata["split"].to_numpy()
    held_out = dataset.select(labels == split_name(dataset, options.split))
    training = dataset.select(labels == "train")
    cases = gather_cases(held_out, sources, target, limit=options.limit)

    sampling = {
        "num_inference_steps": options.num_inference_steps,
        "guidance_scale": options.guidance_scale,
        "batch_size": options.batch_size,
        "seed": options.seed,
    }
    drawn = sample_pipeline(pipeline, cases, num_samples=options.num_samples, **sampling)
    prior = sample_pipeline(pipeline, cases, num_samples=1, unconditional=True, **sampling)[:, 0]
    # The prior knows no observation: its ensemble for one of them is its draws for that one and the next ones.
    turns = (np.arange(len(prior))[:, None] + np.arange(min(options.num_samples, len(prior)))) % len(prior)
    samples = {METHOD: drawn, "unconditional prior": prior[turns]}
    simple, remarks = simple_baselines(training, cases, seed=options.seed, progress=sys.stderr.isatty())
    predictions = {METHOD: drawn.mean(axis=1), f"{METHOD}, one sample": drawn[:, 0]}
    if options.unet_steps:
        predictions["U-Net, L1"] = unet_baseline(options, training, cases)
    fitted = LatentRegression(pipeline.autoencoder).fit(gather_cases(training, sources, target, limit=256))
    predictions |= {
        "latent regression": fitted.predict(cases),
        "unconditional prior": prior[turns].mean(axis=1),
        "unconditional prior, one sample": prior,
        **simple,
        "autoencoder ceiling": autoencoder_ceiling(pipeline.autoencoder, cases),
    }
    if options.unet_steps:
        remarks["U-Net, L1"] = (
            f"at most {options.unet_steps} steps of 8 images; the last 15% of the training part say when to stop."
        )
    remarks |= {
        METHOD: f"mean of {options.num_samples} samples, {options.num_inference_steps} steps, guidance "
        f"{options.guidance_scale:g}.",
        "autoencoder ceiling": "the truth, encoded and decoded; it sees the truth.",
    }
    table = compare_translations(
        predictions,
        cases,
        samples=samples,
        method=METHOD,
        block=options.block,
        note=options.note,
        remarks=remarks,
        seed=options.seed,
        progress=sys.stderr.isatty(),
    )
    written = write_report(table, options.output)
    written += write_figures(
        cases, predictions, options.output / "figures", method=METHOD, samples=drawn, note=options.note
    )
    return "\n".join([table.to_text(), *(f"written: {path}" for path in written)])


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; bad input ends in one sentence and status 2."""
    options = parse_arguments(arguments)
    try:
        print(evaluate(options))
    except (OSError, ValueError, ImportError) as error:
        print(f"evaluate_translation.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
