"""Arguments of contrastive pretraining: those of transformers, with defaults that suit it, and a few of our own."""

import json
import os
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import torch
import yaml
from transformers import TrainingArguments
from transformers.integrations import is_tensorboard_available
from transformers.utils.generic import strtobool

from .augmentation import PRESETS


@dataclass
class SolarChipTrainingArguments(TrainingArguments):
    """Arguments of `SolarChipTrainer`.

    Everything of `transformers.TrainingArguments` is there. Defaults that differ: AdamW with beta2 of .98 and weight
    decay .05, cosine schedule with a warm-up over 5% of the steps, batches of 16 without a short last one (the number
    of negatives is part of the loss), a log line every 10 steps, non-finite losses shown as they are, columns that stay
    as the dataset gives them, and reports to TensorBoard (below `output_dir`) where it is installed.

    Attributes:
        augmentation: Preset of `SolarAugmentation`: `solar`, `published` or `none`.
        polarity_reversal: Whether the preset `solar` reverses the sign of the field at random (the other solar cycle).
        roll_degrees: Largest roll of the preset `solar`, in degrees.
        retrieval_gallery: Number of held-out observations, from the first in time, that evaluation retrieves among;
            0 leaves retrieval out.
        retrieval_block: Neighbouring queries that count as one in the bootstrap of the intervals.
        gradient_cache_chunk: Most images that run through a tower with their graph at a time; the gradient is that of
            the whole batch. None: no cache, the whole batch at once.
        ema_decay: Decay of an exponential moving average of the weights, saved to `ema/` beside them; None: no average.
        collapse_patience: Evaluations in a row without telling observations apart before a warning; 0: no warning.
    """

    output_dir: str | None = field(
        default="solarchip/vit-base", metadata={"help": "Folder for checkpoints, the model and its processor."}
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Must stay false: the collator reads the dataset's own columns."}
    )
    per_device_train_batch_size: int = field(
        default=16, metadata={"help": "Observations a process and step; each brings one image a modality."}
    )
    per_device_eval_batch_size: int = field(default=16, metadata={"help": "Observations a process in evaluation."})
    dataloader_drop_last: bool = field(
        default=True,
        metadata={"help": "Drop a short last batch of an epoch of training; evaluation always keeps it."},
    )
    learning_rate: float = field(default=1e-4, metadata={"help": "Largest learning rate of the schedule."})
    weight_decay: float = field(default=0.05, metadata={"help": "Decoupled weight decay of AdamW."})
    adam_beta2: float = field(default=0.98, metadata={"help": "Second moment's decay of AdamW."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Schedule of the learning rate."})
    warmup_steps: float = field(
        default=0.05, metadata={"help": "Steps of linear warm-up; below 1, the share of all steps."}
    )
    logging_steps: float = field(default=10, metadata={"help": "Steps between log lines."})
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Whether to hide non-finite losses from the log."}
    )
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints that are kept."})
    augmentation: str = field(
        default="solar",
        metadata={
            "help": "What every training batch goes through: 'solar' (north-south flip with the sign of the field "
            "reversed, reversed polarity, roll of a few degrees), 'published' (all flips, any angle), or 'none'.",
            "choices": list(PRESETS),
        },
    )
    polarity_reversal: bool = field(
        default=True, metadata={"help": "Whether 'solar' reverses the polarity of the whole Sun at random."}
    )
    roll_degrees: float = field(default=3.0, metadata={"help": "Largest roll of 'solar', in degrees."})
    retrieval_gallery: int = field(
        default=256, metadata={"help": "Held-out observations that evaluation retrieves among; 0: no retrieval."}
    )
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={"help": "A checkpoint's folder, or 'last' for the last complete one of output_dir, if there is any."},
    )
    report_to: None | str | list[str] = field(  # noqa: RUF036 (the order that HfArgumentParser can read)
        default=None,
        metadata={
            "help": "Trackers: 'tensorboard', 'trackio', 'wandb', 'all' or 'none'; default: TensorBoard if installed."
        },
    )
    retrieval_block: int = field(
        default=1, metadata={"help": "Neighbouring queries that count as one in the intervals' bootstrap."}
    )

    gradient_cache_chunk: int | None = field(
        default=None,
        metadata={"help": "Images a chunk of the gradient cache: the same gradient in the memory of one chunk."},
    )

    ema_decay: float | None = field(
        default=None, metadata={"help": "Decay of an average of the weights, saved beside them; 0.999 is usual."}
    )
    collapse_patience: int = field(
        default=3, metadata={"help": "Evaluations at chance in a row before a warning; 0: no warning."}
    )

    def __post_init__(self):
        if self.gradient_cache_chunk is not None:
            self._prepare_gradient_cache()
        if self.output_dir is None:
            self.output_dir = "solarchip/vit-base"
        if not torch.accelerator.is_available():
            self.dataloader_pin_memory = False
        if self.report_to is None:
            self.report_to = "tensorboard" if is_tensorboard_available() else "none"
        super().__post_init__()
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns: expected false, since the collator reads the columns, got true.")
        if self.augmentation not in PRESETS:
            raise ValueError(f"augmentation: expected one of {', '.join(PRESETS)}, got {self.augmentation!r}.")
        if self.learning_rate < 0 or self.per_device_train_batch_size < 1:
            given = f"{self.learning_rate} and {self.per_device_train_batch_size}"
            raise ValueError(f"learning_rate, per_device_train_batch_size: expected at least 0 and 1, got {given}.")
        if self.ema_decay is not None and not 0.0 < self.ema_decay < 1.0:
            raise ValueError(f"ema_decay: expected a number between 0 and 1, got {self.ema_decay}.")
        if self.retrieval_gallery < 0 or self.retrieval_block < 1:
            raise ValueError(
                "retrieval_gallery and retrieval_block: expected at least 0 and 1, "
                f"got {self.retrieval_gallery} and {self.retrieval_block}."
            )

    def _prepare_gradient_cache(self) -> None:
        if self.gradient_cache_chunk < 1:
            raise ValueError(f"gradient_cache_chunk: expected at least 1 image, got {self.gradient_cache_chunk}.")
        if self.deepspeed is not None or strtobool(os.environ.get("ACCELERATE_USE_DEEPSPEED", "false")):
            raise ValueError(
                "gradient_cache_chunk: expected DDP, FSDP or one process, got DeepSpeed, whose ZeRO reduces gradients "
                "at every chunk's backward. Use DDP or FSDP, or no gradient cache."
            )
        if self.ddp_find_unused_parameters is False:
            raise ValueError(
                "ddp_find_unused_parameters: expected true or unset with gradient_cache_chunk, since a chunk runs one "
                "tower only, got false."
            )
        self.ddp_find_unused_parameters = True


def read_arguments(path: str | Path) -> list[str]:
    """A YAML or JSON file of arguments, written as a command line would have them.

    Args:
        path: A file of names with values. Lists become several words, mappings JSON; a null is left out.

    Returns:
        Words such as `["--max_steps", "100", "--modalities", "hmi", "aia171"]`, to be put before those of the real
        command line, which then win.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is no mapping, or no YAML.
    """
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: expected YAML or JSON: {error}.") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected names with values, got {type(values).__name__}.")
    words: list[str] = []
    for name, value in values.items():
        if value is not None:
            parts = [json.dumps(value)] if isinstance(value, dict) else value if isinstance(value, list) else [value]
            words += [f"--{name}", *map(str, parts)]
    return words


def with_output_dir(words: list[str]) -> list[str]:
    """Command-line words with an output folder: `solarchip/NAME` for `--model_name NAME`, unless one is given.

    Args:
        words: As `--model_name vit-tiny` or `--model_name=vit-tiny`; a name with a slash is a folder.

    Returns:
        The words, with `--output_dir` where it follows from the model's name.
    """
    parts = [part for word in words for part in word.split("=", 1)]
    if {"--output_dir", "--help"} & set(parts):
        return words
    names = [name for word, name in pairwise(parts) if word == "--model_name" and "/" not in name]
    return [*words, "--output_dir", f"solarchip/{names[-1]}"] if names else words


__all__ = ["SolarChipTrainingArguments", "read_arguments", "with_output_dir"]
