"""Trains a ControlNet on a frozen prior: from images of one or several channels to those of another.

    accelerate launch examples/train_controlnet.py examples/configs/controlnet.yaml --sources hmi --target aia171 \
        --prior solarchip/prior-aia171 --data_dir prepared/ --output_dir solarchip/hmi-to-aia171

The prior (of train_prior.py) stays as it is; the ControlNet sees the sources' latents as a hint and their tokens as
context, which both are dropped now and then for classifier-free guidance. `--output_dir` becomes a complete
SolarChipControlNetPipeline, which examples/translate.py and evaluate_translation.py load. The first argument may be a
YAML or JSON file of arguments; later ones override it.
"""

import logging
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import HfArgumentParser, set_seed

from solarchip_hf import resolve_modality
from solarchip_hf.data.shards import write_json
from solarchip_hf.hub.command_checks import check_saved, one_line, parse_all
from solarchip_hf.models.settings import choice
from solarchip_hf.training.arguments import read_arguments
from solarchip_hf.translation import SolarChipControlNetPipeline
from solarchip_hf.translation.components import SCHEDULERS, build_controlnet, build_scheduler
from solarchip_hf.translation.diffusion_objective import ControlNetPrediction
from solarchip_hf.translation.diffusion_training import DiffusionArguments, DiffusionTrainer
from solarchip_hf.translation.latents import HELD_OUT, TranslationLatents
from solarchip_hf.translation.training_runs import (
    LatentsArguments,
    OpenedLatents,
    Prior,
    image_grid_figure,
    load_prior,
    open_latents,
)


@dataclass
class ControlNetArguments:
    """What is trained."""

    prior: str | None = field(default=None, metadata={"help": "Folder of the prior, from train_prior.py."})
    sources: list[str] | None = field(default=None, metadata={"help": "Source channels, as hmi or 171 193 211."})
    target: str | None = field(default=None, metadata={"help": "Target channel; the prior must know it."})
    hint_dropout: float = field(
        default=0.1, metadata={"help": "Probability that a training item has no source, for guidance."}
    )
    hint_width: int | None = field(default=None, metadata={"help": "Channels inside the hint encoder."})
    sampler: str = field(default="unipc", metadata={"help": "Scheduler of the saved pipeline: unipc, dpm++ or ddim."})
    sample_images: int = field(default=3, metadata={"help": "Held-out observations in a sampled figure."})


def parse_arguments(argv: list[str]) -> tuple[LatentsArguments, ControlNetArguments, DiffusionArguments]:
    """Reads an optional YAML or JSON file (first argument), then the command line, which wins."""
    parser = HfArgumentParser(
        (LatentsArguments, ControlNetArguments, DiffusionArguments),
        usage="train_controlnet.py [CONFIG.yaml] --prior FOLDER --sources NAME [NAME ...] --target NAME [...]\n\n"
        + __doc__.split("\n\n")[1],
        description=__doc__.partition("\n\n")[0],
        epilog="`train_controlnet.py --help` lists every argument.",
    )
    if argv and argv[0].endswith((".yaml", ".yml", ".json")):
        argv = read_arguments(argv[0]) + argv[1:]
    return parse_all(parser, argv)


def build_pipeline(
    opened: OpenedLatents, prior: Prior, dataset: TranslationLatents, controlnet, sampler: str
) -> SolarChipControlNetPipeline:
    """The pipeline of the parts as they are now."""
    return SolarChipControlNetPipeline(
        autoencoder=opened.autoencoder,
        unet=prior.unet,
        controlnet=controlnet,
        scheduler=build_scheduler(sampler, prediction_type=prior.scheduler.config.prediction_type),
        image_processor=opened.observations.processor,
        source_modalities=dataset.sources,
        target_modality=dataset.target,
        latent_mean={name: opened.latents.mean[name] for name in [*dataset.sources, dataset.target]},
        latent_std={name: opened.latents.std[name] for name in [*dataset.sources, dataset.target]},
        prior_modalities=prior.modalities if prior.unet.config.num_class_embeds else None,
    )


def build(
    data: LatentsArguments, control: ControlNetArguments, args: DiffusionArguments
) -> tuple[DiffusionTrainer, OpenedLatents, Prior]:
    """Everything before the first step.

    Raises:
        ValueError, OSError: Something the user gave cannot be used; the message says what, and what to do.
    """
    for name, owner in (("data_dir", data), ("prior", control), ("sources", control), ("target", control)):
        if not getattr(owner, name):
            raise ValueError(f"{name}: expected a value, got none. Pass --{name}; --help says what it is.")
    choice("sampler", control.sampler, SCHEDULERS)
    for name, value in (("hint_width", control.hint_width), ("sample_images", control.sample_images)):
        if value is not None and value < 1:
            raise ValueError(f"{name}: expected 1 or more, got {value}.")
    target = resolve_modality(control.target)
    check_saved(data.autoencoder, "autoencoder", argument="autoencoder")
    prior = load_prior(control.prior)
    predict = ControlNetPrediction(prior.unet, class_label=prior.label(target), hint_dropout=control.hint_dropout)
    opened = open_latents(
        data.autoencoder,
        data.data_dir,
        data.latents_dir,
        dtype=data.latents_dtype,
        batch_size=data.encode_batch_size,
        use_cpu=args.use_cpu,
        progress=not args.disable_tqdm,
    )
    prior.check_latents(opened.latents)
    dataset = TranslationLatents(opened.latents.split("train"), control.sources, target)
    set_seed(args.seed)
    controlnet = build_controlnet(
        prior.unet, opened.latents.shape[0] * len(dataset.sources), hint_width=control.hint_width
    )
    shown = held_out(opened, dataset, control.sample_images)

    def draw_samples(trainer: DiffusionTrainer, step: int) -> None:
        pipeline = build_pipeline(opened, prior, dataset, trainer.model, control.sampler)
        pipeline.set_progress_bar_config(disable=True)
        images = [opened.observations.physical(row) for row in shown]
        sources = [{name: image[name] for name in dataset.sources} for image in images]
        noise = torch.Generator().manual_seed(args.seed)  # the same in every figure
        output = pipeline(sources, num_samples=4, guidance_scale=1.0, output_type="np", generator=noise)
        rows = [("source", name, np.stack([image[name] for image in images])) for name in dataset.sources]
        support = opened.observations.processor.support(target)  # what is generated; None: all of the frame
        truth = np.stack([np.asarray(image[target], dtype=np.float32) for image in images])
        rows += [("truth", target, truth if support is None else np.where(support, truth, np.nan))]
        rows += [("prediction", target, output.prediction), ("spread", target, output.uncertainty)]
        place = f", {data.note}" if data.note else ""
        path = Path(args.output_dir) / "samples" / f"step-{step:06d}.png"
        trainer.show(image_grid_figure(rows, path, title=f"ControlNet at step {step}: held-out{place}"), step)

    trainer = DiffusionTrainer(controlnet, dataset, predict, prior.scheduler, args, on_sample=draw_samples)
    prior.unet.to(trainer.device)
    if trainer.step == 0:
        predict.check_initial(trainer.model, trainer.batch([0]), steps=prior.scheduler.config.num_train_timesteps)
    return trainer, opened, prior


def held_out(opened: OpenedLatents, dataset: TranslationLatents, count: int) -> list[int]:
    """Rows of validation and test that have all channels, evenly spread; of all parts where there are none."""
    latents = opened.latents
    positions = [latents.position(name) for name in [*dataset.sources, dataset.target]]
    complete = latents.observed[:, positions].all(axis=1)
    rows = np.flatnonzero(complete & latents.metadata["split"].isin(HELD_OUT).to_numpy())
    rows = rows if len(rows) else np.flatnonzero(complete)
    return [int(row) for row in rows[np.unique(np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(int))]]


def main(argv: list[str]) -> int:
    """Trains and saves; returns the exit code: 2 where what was given cannot be used, 0 also behind a SIGTERM."""
    try:
        data, control, args = parse_arguments(argv)
        trainer, opened, prior = build(data, control, args)
        dataset = trainer.dataset
        say = print if trainer.accelerator.is_main_process else lambda *_: None
        say(f"Reconstruction by the autoencoder alone, the ceiling of translation (held-out):\n{opened.ceiling()}")
        checked = "" if trainer.step else "zero outputs verified; "
        say(
            f"{', '.join(dataset.sources)} to {dataset.target}: {len(dataset)} training observations "
            f"({dataset.left_out} left out: a channel is missing); {checked}"
            f"{sum(parameter.numel() for parameter in trainer.model.parameters()) / 1e6:.1f} million parameters; "
            f"from step {trainer.step} to {args.max_steps}."
        )

        def keep(metrics: dict[str, float]) -> None:
            pipeline = build_pipeline(opened, prior, dataset, trainer.averaged(), control.sampler)
            pipeline.save_pretrained(args.output_dir)
            facts = {"data": data.note, "metrics": metrics, "reconstruction": opened.latents.reconstruction}
            write_json(Path(args.output_dir) / "training.json", facts)

        trainer.train(keep)
    except (ValueError, OSError, FloatingPointError, StrictDataclassError) as error:
        print(f"train_controlnet.py: {one_line(error)}", file=sys.stderr)
        return 2
    if trainer.stopped:
        say(f"Stopped behind step {trainer.step}; --resume_from_checkpoint last goes on from there.")
        return 0
    say(f"Saved to {args.output_dir}: SolarChipControlNetPipeline.from_pretrained({args.output_dir!r}) loads it.")
    return 0


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    sys.exit(main(sys.argv[1:]))
