"""Trains the prior of a translation: latent diffusion over one channel or several, without a source.

    accelerate launch examples/train_prior.py examples/configs/prior.yaml --data_dir prepared/ --modalities aia171
    accelerate launch examples/train_prior.py examples/configs/translate_prior.yaml --resume_from_checkpoint last

The dataset (of examples/prepare_data.py or pretrain.py) is encoded once with the autoencoder (of pretrain.py) into
`--latents_dir`; the autoencoder's own reconstruction error is printed, the ceiling of every translation through it.
With several `--modalities` one prior learns them all, told apart by a label. `--output_dir` gets the averaged weights
for train_controlnet.py, checkpoints, and sampled figures. The first argument may be a YAML or JSON file of arguments;
later ones override it.
"""

import logging
import sys
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError
from transformers import HfArgumentParser, set_seed

from solarchip_hf import resolve_modality
from solarchip_hf.hub.command_checks import check_saved, one_line, parse_all
from solarchip_hf.models.settings import choice
from solarchip_hf.training.arguments import read_arguments
from solarchip_hf.translation.components import PRIOR_SIZES, build_prior, build_scheduler, latent_shape
from solarchip_hf.translation.diffusion_objective import prior_prediction
from solarchip_hf.translation.diffusion_training import DiffusionArguments, DiffusionTrainer
from solarchip_hf.translation.latents import PriorLatents
from solarchip_hf.translation.training_runs import (
    LatentsArguments,
    OpenedLatents,
    decode_latents,
    image_grid_figure,
    open_config,
    open_latents,
    sample_prior,
    save_prior,
)


@dataclass
class PriorArguments:
    """What is trained."""

    modalities: list[str] | None = field(
        default=None, metadata={"help": "Targets of this prior, as 171 or hmi 171 304; several make it conditional."}
    )
    prior_size: str = field(default="small", metadata={"help": "small, or published (base width 320)."})
    base_width: int | None = field(default=None, metadata={"help": "Channels of the first resolution."})
    multipliers: list[int] | None = field(
        default=None, metadata={"help": "Widths in base widths, one a resolution, as 1 2 4 4."}
    )
    layers_per_block: int | None = field(default=None, metadata={"help": "Residual blocks a resolution."})
    num_heads: int | None = field(default=None, metadata={"help": "Attention heads."})
    prediction_type: str = field(default="epsilon", metadata={"help": "epsilon (published) or v_prediction."})


def parse_arguments(argv: list[str]) -> tuple[LatentsArguments, PriorArguments, DiffusionArguments]:
    """Reads an optional YAML or JSON file (first argument), then the command line, which wins."""
    parser = HfArgumentParser(
        (LatentsArguments, PriorArguments, DiffusionArguments),
        usage="train_prior.py [CONFIG.yaml] --autoencoder FOLDER --data_dir FOLDER --modalities NAME [NAME ...] [...]"
        "\n\n" + __doc__.split("\n\n")[1],
        description=__doc__.partition("\n\n")[0],
        epilog="`train_prior.py --help` lists every argument.",
    )
    if argv and argv[0].endswith((".yaml", ".yml", ".json")):
        argv = read_arguments(argv[0]) + argv[1:]
    return parse_all(parser, argv)


def build(
    data: LatentsArguments, prior: PriorArguments, args: DiffusionArguments
) -> tuple[DiffusionTrainer, OpenedLatents, list[str]]:
    """Everything before the first step.

    Raises:
        ValueError, OSError: Something the user gave cannot be used; the message says what, and what to do.
    """
    if data.data_dir is None:
        raise ValueError("data_dir: expected a prepared dataset, got none. Pass --data_dir FOLDER.")
    if not prior.modalities:
        raise ValueError("modalities: expected the prior's target or targets, got none. Pass --modalities NAME ...")
    modalities = [resolve_modality(name) for name in prior.modalities]
    # What may be refused is built before the dataset is encoded, which takes long.
    scheduler = build_scheduler("ddpm", prediction_type=prior.prediction_type)
    check_saved(data.autoencoder, "autoencoder", argument="autoencoder")
    config = open_config(data.autoencoder)
    set_seed(args.seed)
    unet = build_prior(
        latent_shape(config),
        size=choice("prior_size", prior.prior_size, tuple(PRIOR_SIZES)),
        token_width=config.hidden_size,
        prior_modalities=modalities,
        base_width=prior.base_width,
        multipliers=prior.multipliers,
        layers_per_block=prior.layers_per_block,
        num_heads=prior.num_heads,
    )
    opened = open_latents(
        data.autoencoder,
        data.data_dir,
        data.latents_dir,
        dtype=data.latents_dtype,
        batch_size=data.encode_batch_size,
        use_cpu=args.use_cpu,
        progress=not args.disable_tqdm,
    )

    def draw_samples(trainer: DiffusionTrainer, step: int) -> None:
        rows = []
        for position, name in enumerate(modalities):
            latents = sample_prior(
                trainer.model,
                (4, *opened.latents.shape),
                prediction_type=prior.prediction_type,
                class_label=position if len(modalities) > 1 else None,
                seed=args.seed,
            )
            rows.append(("prior", name, decode_latents(opened, latents, name)))
        place = f", trained on {data.note}" if data.note else ""
        path = Path(args.output_dir) / "samples" / f"step-{step:06d}.png"
        trainer.show(image_grid_figure(rows, path, title=f"Prior at step {step}{place}"), step)

    trainer = DiffusionTrainer(
        unet,
        PriorLatents(opened.latents.split("train"), modalities),
        prior_prediction,
        scheduler,
        args,
        on_sample=draw_samples,
    )
    return trainer, opened, modalities


def main(argv: list[str]) -> int:
    """Trains and saves; returns the exit code: 2 where what was given cannot be used, 0 also behind a SIGTERM."""
    try:
        data, prior, args = parse_arguments(argv)
        trainer, opened, modalities = build(data, prior, args)
        say = print if trainer.accelerator.is_main_process else lambda *_: None
        say(f"Reconstruction by the autoencoder alone, the ceiling of translation (held-out):\n{opened.ceiling()}")
        say(
            f"{len(trainer.dataset)} training latents {opened.latents.shape} of {', '.join(modalities)}; "
            f"{sum(parameter.numel() for parameter in trainer.model.parameters()) / 1e6:.1f} million parameters; "
            f"from step {trainer.step} to {args.max_steps}."
        )

        def keep(metrics: dict[str, float]) -> None:
            facts = {"metrics": metrics, "data": data.note, "reconstruction": opened.latents.reconstruction}
            save_prior(args.output_dir, trainer.averaged(), trainer.scheduler, opened.latents, modalities, **facts)

        trainer.train(keep)
    except (ValueError, OSError, FloatingPointError, StrictDataclassError) as error:
        print(f"train_prior.py: {one_line(error)}", file=sys.stderr)
        return 2
    if trainer.stopped:
        say(f"Stopped behind step {trainer.step}; --resume_from_checkpoint last goes on from there.")
        return 0
    say(f"Saved to {args.output_dir}: give it to train_controlnet.py as --prior.")
    return 0


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    sys.exit(main(sys.argv[1:]))
