"""An exponential moving average of the weights, saved beside them."""

import logging
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

logger = logging.getLogger(__name__)

FOLDER = "ema"


class WeightAverage(TrainerCallback):
    """Keeps an exponential moving average of the weights; buffers are not averaged.

    The decay at step t is the smaller of `decay` and (1 + t) / (10 + t), so that the first weights are soon forgotten.

    Args:
        decay: Share of the average that a step keeps, in (0, 1).

    Attributes:
        resume_from: The checkpoint that training goes on from, if any.
    """

    def __init__(self, decay: float):
        self.decay = decay
        self.resume_from: str | None = None
        self.weights: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        """Starts from the weights, or from the average that a checkpoint has."""
        self.weights = {
            name: parameter.detach().clone()
            for name, parameter in kwargs["model"].named_parameters()
            if parameter.requires_grad
        }
        files = sorted((Path(self.resume_from) / FOLDER).glob("*.safetensors")) if self.resume_from else []
        if self.resume_from and not files:
            logger.warning(
                "%s has no average of the weights: it begins at step %d.", self.resume_from, state.global_step
            )
        for file in files:
            for name, tensor in load_file(file).items():
                if name in self.weights:
                    self.weights[name].copy_(tensor)

    @torch.no_grad()
    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        """Moves the average towards the weights."""
        decay = min(self.decay, (1 + state.global_step) / (10 + state.global_step))
        weights = [parameter.detach() for name, parameter in kwargs["model"].named_parameters() if name in self.weights]
        torch._foreach_lerp_(list(self.weights.values()), weights, 1.0 - decay)

    def save(self, folder: str | Path, model: Any) -> None:
        """Writes the model with its averaged weights to `ema/` of a folder, loadable as any model.

        Args:
            folder: Where the model itself is saved.
            model: A `PreTrainedModel` with the names that were averaged.
        """
        if self.weights:
            model.save_pretrained(Path(folder) / FOLDER, state_dict={**model.state_dict(), **self.weights})


__all__ = ["FOLDER", "WeightAverage"]
