"""An iterable over a prepared dataset: sharded once, with a length, shuffled by seed and epoch, resumable."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from .observations import Observations


class ObservationStream(IterableDataset):
    """Observations one after the other, for training that reads its files in order.

    The order is a function of (seed, epoch) alone: files are shuffled, and rows among `window` neighbouring files, so
    that reading stays local. It is dealt out in blocks of `batch_size` rows, first to `world_size` ranks, then to the
    workers of the `DataLoader`: a loader of that batch size yields the same batches in the same order with any number
    of workers, and no row is doubled. All ranks get equally many rows, since one with a batch more would wait for the
    others for ever: where their number does not divide that of the rows, the last rows of the epoch's order, fewer than
    there are ranks, are left out; shuffled epochs leave out others each. A single rank gets every row.

    Shard **once**: give `rank` and `world_size` here only where the loader is not prepared by Accelerate (which deals
    out an iterable among the ranks itself); leave them alone under the Trainer.

    Args:
        observations: The dataset.
        shuffle: Whether to shuffle; else the order of the dataset.
        seed: Seed of the order.
        batch_size: Batch size of the loader that will read.
        rank: This process's number among `world_size`.
        world_size: Number of processes that share the stream.
        window: Number of files whose rows are mixed.
    """

    def __init__(
        self,
        observations: Observations,
        *,
        shuffle: bool = True,
        seed: int = 0,
        batch_size: int = 1,
        rank: int = 0,
        world_size: int = 1,
        window: int = 8,
    ):
        if not 0 <= rank < world_size:
            raise ValueError(f"rank: expected 0 to {world_size - 1} for world_size={world_size}, got {rank}.")
        if batch_size < 1 or window < 1:
            raise ValueError(f"batch_size, window: expected 1 or more, got {batch_size} and {window}.")
        self.observations = observations
        self.shuffle, self.seed, self.window = shuffle, seed, window
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        self.epoch = 0
        self.position = 0

    @property
    def modalities(self) -> list[str]:
        """Names of the images, in order."""
        return self.observations.modalities

    @property
    def processor(self) -> Any:
        """The image processor that scales."""
        return self.observations.processor

    def order(self) -> np.ndarray:
        """This rank's rows in this epoch, in the order in which they come."""
        observations = self.observations
        order = np.arange(len(observations))
        if self.shuffle:
            generator = np.random.default_rng((self.seed, self.epoch))
            shards = generator.permutation(np.unique(observations._shard))
            rows = {shard: order[observations._shard == shard] for shard in shards}
            windows = [shards[start : start + self.window] for start in range(0, len(shards), self.window)]
            mixed = [generator.permutation(np.concatenate([rows[shard] for shard in part])) for part in windows]
            order = np.concatenate(mixed) if mixed else order
        block = self.batch_size * self.world_size
        dealt = order[: len(order) // block * block]
        rest = order[len(dealt) :]  # less than a batch for every rank
        share = len(rest) // self.world_size
        return np.concatenate(
            [
                _dealt(dealt, self.rank, self.world_size, self.batch_size),
                rest[self.rank * share : (self.rank + 1) * share],
            ]
        )

    def _settings(self) -> dict[str, int]:
        """What the order follows from, beside the epoch."""
        return {
            "seed": self.seed,
            "batch_size": self.batch_size,
            "world_size": self.world_size,
            "window": self.window,
            "shuffle": int(self.shuffle),
            "rows": len(self.observations),
        }

    def __len__(self) -> int:
        return len(self.order()) - self.position

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        order = self.order()[self.position :]
        worker = get_worker_info()
        if worker is not None:
            order = _dealt(order, worker.id, worker.num_workers, self.batch_size)
        for index in order:
            yield self.observations[int(index)]

    def set_epoch(self, epoch: int) -> None:
        """Starts the order of another epoch at its beginning."""
        if epoch != self.epoch:
            self.position = 0
        self.epoch = epoch

    def state_dict(self, consumed: int = 0) -> dict[str, int]:
        """What `load_state_dict` needs to go on.

        Args:
            consumed: Rows that this rank has used since the iteration began (workers read ahead, so that only the
                training loop knows): batches seen times the batch size.

        Returns:
            Plain integers.
        """
        return {**self._settings(), "epoch": self.epoch, "position": self.position + consumed}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes on where `state_dict` was taken.

        Raises:
            ValueError: The state belongs to another seed, batch size, number of ranks or of rows, window or shuffling,
                under which the same position would mean other rows.
        """
        for name, value in self._settings().items():
            if state.get(name) != value:
                raise ValueError(
                    f"state: expected one of {name} {value}, got {state.get(name)}. Go on with the settings of the "
                    "stream that it was taken from."
                )
        self.epoch, self.position = int(state["epoch"]), int(state["position"])


def _dealt(order: np.ndarray, member: int, members: int, block: int) -> np.ndarray:
    """The blocks of `order` that fall to a member, dealt out in turn."""
    return order[(np.arange(len(order)) // block) % members == member]


__all__ = ["ObservationStream"]
