"""Figures of an evaluation as images in the trackers that the Trainer reports to: TensorBoard, trackio, W&B."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import TensorBoardCallback, default_logdir

from .figures import reconstruction_figure, retrieval_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def to_pixels(figure: "Figure") -> np.ndarray:
    """(height, width, 3) uint8 of a figure that has a canvas."""
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()


def place_tensorboard(callbacks: list[TrainerCallback], output_dir: str) -> None:
    """Gives TensorBoard its folder below `output_dir` from the beginning.

    transformers does so when training starts; an evaluation before would be written to the working directory.

    Args:
        callbacks: Of the Trainer.
        output_dir: Of the run.
    """
    for callback in callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
            callback.logging_dir = str(Path(output_dir) / default_logdir())


class EvaluationFigures(TrainerCallback):
    """After each evaluation, sends a reconstruction and the retrieval table as images to the trackers.

    Scalars go there by transformers' own callbacks; images through the same writers, so that they stand in the same
    run. Nothing is drawn where no tracker takes images.

    Args:
        trainer: A `SolarChipTrainer`, which keeps what its last evaluation saw.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        """Draws and sends, on one process."""
        if not state.is_world_process_zero:
            return
        trackers = [c for c in self.trainer.callback_handler.callbacks if _takes_images(c)]
        if trackers:
            images = {name: to_pixels(figure) for name, figure in self._figures()}
            for tracker in trackers:
                _send(tracker, images, state.global_step)

    def _figures(self) -> "Iterator[tuple[str, Figure]]":
        trainer, shown = self.trainer, self.trainer.shown_observation
        step = trainer.state.global_step
        if shown is not None:
            processor = trainer.processing_class
            yield (
                "eval/reconstruction",
                reconstruction_figure(
                    shown["pixel_values"].numpy(),
                    shown["reconstruction"].numpy(),
                    trainer.modalities,
                    observed=shown["observed"].numpy(),
                    title=f"First held-out observation, step {step}",
                    limb=getattr(processor, "geometry", "rsun") == "rsun",
                ),
            )
        if trainer.retrieval_table is not None and trainer.retrieval_table.rows:
            yield "eval/retrieval", retrieval_figure(trainer.retrieval_table, title=f"Held-out retrieval, step {step}")


def _api(callback: Any) -> Any:
    """The module of trackio or W&B behind transformers' callback, once its run has begun."""
    module = getattr(callback, "_trackio", None) or getattr(callback, "_wandb", None)
    return module if getattr(callback, "_initialized", False) else None


def _takes_images(callback: Any) -> bool:
    return getattr(callback, "tb_writer", None) is not None or _api(callback) is not None


def _send(callback: Any, images: Mapping[str, np.ndarray], step: int) -> None:
    if getattr(callback, "tb_writer", None) is not None:
        for name, pixels in images.items():
            callback.tb_writer.add_image(name, pixels, step, dataformats="HWC")
        callback.tb_writer.flush()
        return
    api = _api(callback)
    api.log({**{name: api.Image(pixels) for name, pixels in images.items()}, "train/global_step": step})


__all__ = ["EvaluationFigures", "place_tensorboard", "to_pixels"]
