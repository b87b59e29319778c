"""The order of the training data: a function of (seed, epoch), on every process, after every resume."""

from collections.abc import Iterator
from typing import Any

from torch.utils.data import Dataset, Sampler
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class StreamOrder(Sampler):
    """The rows of a stream in the stream's own order, as positions among its observations.

    A loader over positions deals batches out to the processes, reads what a process uses and no more, and a resumed run
    passes over the batches that were used without reading them. A bare iterable has to be read up to there.

    Args:
        stream: Has `observations` (a map-style dataset), `order()` and `set_epoch(epoch)`, as `ObservationStream`.

    Raises:
        ValueError: The stream is dealt out already; dealt out twice, rows would be lost.
    """

    def __init__(self, stream: Any):
        if stream.world_size != 1:
            raise ValueError(
                f"train_dataset: expected a stream of all rows, got one of rank {stream.rank} of {stream.world_size}. "
                "Leave rank and world_size out: the Trainer deals it out among the processes."
            )
        self.stream = stream

    def __len__(self) -> int:
        return len(self.stream.observations)

    def __iter__(self) -> Iterator[int]:
        return iter(self.stream.order().tolist())

    def set_epoch(self, epoch: int) -> None:
        """Takes the order of an epoch."""
        self.stream.set_epoch(epoch)


def observations_of(dataset: Any) -> Dataset | None:
    """The map-style dataset behind a stream; None where the argument is no stream of that kind.

    Args:
        dataset: Any dataset.
    """
    is_stream = hasattr(dataset, "order") and hasattr(dataset, "set_epoch")
    return getattr(dataset, "observations", None) if is_stream else None


class EpochOrder(TrainerCallback):
    """Tells the samplers below the training loader which epoch begins.

    Accelerate does so for its own random sampler, and for others down to a certain depth of wrappers. Where a run of
    several processes is resumed within a later epoch they lie deeper, and would give the first epoch's order.
    """

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        """Goes down through the loader's samplers."""
        part = kwargs.get("train_dataloader")
        while part is not None:
            below = getattr(part, "batch_sampler", None)  # by identity: some samplers have no length to be true by
            part = below if below is not None else getattr(part, "sampler", None)
            if hasattr(part, "set_epoch"):
                part.set_epoch(int(state.epoch or 0))


__all__ = ["EpochOrder", "StreamOrder", "observations_of"]
