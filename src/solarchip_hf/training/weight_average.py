"""An exponential moving average of the weights, with centring statistics of its own, saved beside them."""

import logging
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..models.modeling_solarchip_layers import SolarChipCentering

logger = logging.getLogger(__name__)

FOLDER = "ema"
COUNT = "num_updates"


def _running_statistics(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Copies of the buffers of every `SolarChipCentering`, by name."""
    return {
        f"{name}.{part}": buffer.clone()
        for name, module in model.named_modules()
        if isinstance(module, SolarChipCentering)
        for part, buffer in module.named_buffers()
    }


def _kept(before: torch.Tensor, after: torch.Tensor, momentum: float) -> torch.Tensor:
    """Share of the old in running statistics that went from `before` to `after` updates; see `SolarChipCentering`."""
    plain = int(1 / momentum)  # so many updates form a plain average
    first, last = before.clamp(max=plain), after.clamp(max=plain)
    return first / last.clamp(min=1) * (1 - momentum) ** (after - last - (before - first))


class WeightAverage(TrainerCallback):
    """Keeps an exponential moving average of the weights, and one of the statistics that centre its embeddings.

    The decay at step t is the smaller of `decay` and (1 + t) / (10 + t), so that the first weights are soon forgotten.

    The live network's running statistics are of networks of the past, over a span of their own. The average needs
    those of its own span: the statistics of each step's batch, which follow from how the running ones moved, averaged
    with the decay of the weights. To first order in the weights' movement they are the averaged network's.

    Args:
        decay: Share of the average that a step keeps, in (0, 1).

    Attributes:
        resume_from: The checkpoint that training goes on from, if any.
    """

    def __init__(self, decay: float):
        self.decay = decay
        self.resume_from: str | None = None
        self.weights: dict[str, torch.Tensor] = {}
        self.statistics: dict[str, torch.Tensor] = {}
        self._before: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        """Starts from the weights, or from the average that a checkpoint has."""
        model = kwargs["model"]
        self.weights = {
            name: parameter.detach().clone() for name, parameter in model.named_parameters() if parameter.requires_grad
        }
        self._before = _running_statistics(model)
        self.statistics = {name: table.clone() for name, table in self._before.items() if not name.endswith(COUNT)}
        files = sorted((Path(self.resume_from) / FOLDER).glob("*.safetensors")) if self.resume_from else []
        if self.resume_from and not files:
            logger.warning(
                "%s has no average of the weights: it begins at step %d.", self.resume_from, state.global_step
            )
        for file in files:
            for name, tensor in load_file(file).items():
                average = self.weights.get(name, self.statistics.get(name))
                if average is not None:
                    average.copy_(tensor)

    @torch.no_grad()
    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        """Moves the averages."""
        model = kwargs["model"]
        decay = min(self.decay, (1 + state.global_step) / (10 + state.global_step))
        weights = [parameter.detach() for name, parameter in model.named_parameters() if name in self.weights]
        torch._foreach_lerp_(list(self.weights.values()), weights, 1.0 - decay)
        if self.statistics:
            self._average_statistics(_running_statistics(model), decay, model.config.centering_momentum)

    def _average_statistics(self, after: dict[str, torch.Tensor], decay: float, momentum: float) -> None:
        for name, average in self.statistics.items():
            count = f"{name.rpartition('.')[0]}.{COUNT}"
            kept = _kept(self._before[count], after[count], momentum)
            new = 1 - kept
            # (after - kept x before) / new; a modality that the step did not see has no batch, the first has no before
            batch = after[name] + (after[name] - self._before[name]) * (kept / new.clamp(min=1e-12))
            share = torch.where(kept > 0, 1.0 - decay, 1.0) * (new > 0)
            average.lerp_(batch, share.to(average))
        self._before = after

    def save(self, folder: str | Path, model: Any) -> None:
        """Writes the model with its averages to `ema/` of a folder, loadable as any model.

        Args:
            folder: Where the model itself is saved.
            model: A `PreTrainedModel` with the names that were averaged.
        """
        if self.weights:
            state_dict = {**model.state_dict(), **self.weights, **self.statistics}
            model.save_pretrained(Path(folder) / FOLDER, state_dict=state_dict)


__all__ = ["FOLDER", "WeightAverage"]
