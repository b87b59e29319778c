"""What watches a run at its steps: temperatures within bounds, and an end on request."""

import logging
import math
import signal
import threading
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

logger = logging.getLogger(__name__)

MAX_LOGIT_SCALE = math.log(100.0)


class TemperatureClamp(TrainerCallback):
    """Holds the logarithmic logit scales at ln 100 or below after each step, as CLIP does (Radford et al. 2021, 2.5).

    The loss reads them clamped anyway; a value beyond would have no gradient, and so no way back.
    """

    def on_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        """Clamps `model.logit_scales`."""
        for name, parameter in kwargs["model"].named_parameters():
            if name.endswith("logit_scales"):
                with torch.no_grad():
                    parameter.clamp_(max=MAX_LOGIT_SCALE)


class StopOnSignal(TrainerCallback):
    """On SIGTERM, ends training behind the present step with a checkpoint, on all processes together.

    The signal only sets a mark. At the step's end the mark is reduced over the processes, so that one process that was
    told is enough; evaluation is left out, since whoever sends the signal seldom waits long. The handler is there from
    the beginning of training to its end.

    Attributes:
        stopped: Whether training was ended so.
    """

    def __init__(self, number: int = signal.SIGTERM):
        self.number = number
        self.stopped = False
        self._told = False
        self._former: Any = None

    def _remember(self, number: int, frame: Any) -> None:
        self._told = True

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        """Installs the handler, where Python allows one: in the main thread."""
        self.stopped = self._told = False
        if threading.current_thread() is threading.main_thread():
            self._former = signal.signal(self.number, self._remember)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        """Asks for a checkpoint and the end where any process was told."""
        if self._any_told(args):
            self.stopped = True
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False
            logger.warning("%s: saving step %d and stopping.", signal.Signals(self.number).name, state.global_step)

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        """transformers comes by here once more after the last step: everything is saved already."""
        if self.stopped:
            control.should_save = control.should_evaluate = False

    def release(self) -> None:
        """Puts the former handler back; the Trainer calls it however training ends."""
        if self._former is not None:
            signal.signal(self.number, self._former)
            self._former = None

    def _any_told(self, args: TrainingArguments) -> bool:
        if not (dist.is_available() and dist.is_initialized()):
            return self._told
        told = torch.tensor(int(self._told), device=args.device)
        dist.all_reduce(told, op=dist.ReduceOp.MAX)
        return bool(told)


def start_worker(first: Callable[[int], None] | None, worker_id: int) -> None:
    """Begins a process that loads data: it leaves SIGTERM to the process that trains.

    Launchers and schedulers send the signal to whole groups of processes; a loader that dies of it ends training before
    the checkpoint. It ends by itself when training does.

    Args:
        first: What else begins it.
        worker_id: Its number.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if first is not None:
        first(worker_id)


__all__ = ["StopOnSignal", "TemperatureClamp", "start_worker"]
