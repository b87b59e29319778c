"""Prepared observations joined with flare labels by their nominal slot: what a flare forecast is trained on."""

import copy
import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch.utils.data import Dataset

from .durations import write_duration
from .flare_events import to_utc
from .flare_labels import label_flares, past_features, trailing_day_rates
from .observations import Observations
from .splits import chronological_split

logger = logging.getLogger(__name__)


class FlareObservations(Dataset):
    """Observations with the class of the largest flare that follows each, as a map-style torch dataset.

    An item is that of `Observations` and `labels`, a () int64 tensor: 0AB, C, M, X as 0..3. Use `label_observations`
    to make one.

    Attributes:
        observations: The images.
        labels: What `label_flares` says of each observation, a row each, indexed by nominal slot; and
            `label_day_before` (int64), the label of the window 24 hours earlier, -1 where unknown: a target like the
            others, by which windows that change are told.
        history: `past_*` features of each observation (`past_features` and `trailing_day_rates`), the same index;
            NaN where the flare list does not reach back far enough.
        dropped: How many observations were left out, by reason.
    """

    def __init__(
        self,
        observations: Observations,
        labels: pd.DataFrame,
        history: pd.DataFrame,
        dropped: Mapping[str, int] | None = None,
    ):
        if not len(observations) == len(labels) == len(history):
            raise ValueError(
                f"expected a row of labels and of history an observation, got {len(observations)} observations, "
                f"{len(labels)} labels and {len(history)} rows of history."
            )
        self.observations, self.labels, self.history = observations, labels, history
        self.dropped = dict(dropped or {})

    def __len__(self) -> int:
        return len(self.observations)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {**self.observations[index], "labels": torch.tensor(int(self.labels["label"].iloc[index]))}

    @property
    def modalities(self) -> list[str]:
        """Names of the images of an observation, in order."""
        return self.observations.modalities

    @property
    def processor(self) -> Any:
        """The image processor of the observations."""
        return self.observations.processor

    @property
    def times(self) -> pd.DatetimeIndex:
        """(len,) nominal slots, UTC."""
        return pd.DatetimeIndex(self.labels.index)

    @property
    def classes(self) -> np.ndarray:
        """(len,) int64 labels, 0..3."""
        return self.labels["label"].to_numpy(dtype=np.int64)

    def select(self, indices: Any) -> "FlareObservations":
        """A dataset of some of the observations.

        Args:
            indices: Positions in this dataset in the order wanted, or a (len,) bool mask.

        Returns:
            A new dataset that shares the files.
        """
        part = copy.copy(self)
        part.observations = self.observations.select(indices)
        indices = np.asarray(indices)
        rows = indices if indices.size else []
        part.labels, part.history = self.labels.iloc[rows], self.history.iloc[rows]
        return part

    def describe(self) -> str:
        """Number, span and classes in words."""
        counts = np.bincount(self.classes, minlength=4)
        span = f", {self.times.min():%Y-%m-%d} to {self.times.max():%Y-%m-%d}" if len(self) else ""
        shares = ", ".join(f"{name} {count}" for name, count in zip(("0AB", "C", "M", "X"), counts, strict=True))
        return f"{len(self)} observations{span}: {shares}"


def label_observations(
    observations: Observations,
    events: pd.DataFrame,
    *,
    horizon: str | pd.Timedelta = "24h",
    by: str = "start",
    coverage: Any = None,
    latency: str | pd.Timedelta = "0h",
) -> FlareObservations:
    """Joins observations with the labels of the window behind each nominal slot.

    Observations whose window is not covered by the list are left out, as are second ones of the same slot and those
    without any image; all are counted in `dropped` and logged.

    Args:
        observations: What `load_observations` gives; `metadata["time_nominal"]` tells the slots.
        events: Flares as `read_flare_events` returns them.
        horizon: As for `label_flares`.
        by: As for `label_flares`.
        coverage: As for `label_flares`. The default, first to last flare of the list, loses quiet ends.
        latency: As for `label_flares`: the delay of the images behind the Sun.

    Returns:
        The labelled observations in the order of time.

    Raises:
        ValueError: No observation that the list covers, or arguments that `label_flares` refuses.
    """
    slots = to_utc(observations.metadata["time_nominal"])
    labels = label_flares(slots, events, horizon, by=by, coverage=coverage, latency=latency)
    facts = dict(labels.attrs)
    empty, uncovered = ~observations.observed.any(axis=1), ~labels["covered"].to_numpy()
    again = ~empty & pd.Series(slots).where(~empty).duplicated().to_numpy()
    dropped = {
        "no image of these modalities": int(empty.sum()),
        "second of its slot": int(again.sum()),
        "label unknown": int((uncovered & ~again & ~empty).sum()),
    }
    kept = np.flatnonzero(~(empty | again | uncovered))
    if not len(kept):
        raise ValueError(
            f"events: expected a flare list that covers the windows of the observations ({slots.min()} to "
            f"{slots.max()}), got one for {facts['coverage'] or 'nothing'}. Give the list of these years, or its true "
            "coverage."
        )
    for reason, count in dropped.items():
        if count:
            logger.warning("%d of %d observations left out: %s", count, len(slots), reason)
    kept = kept[np.argsort(slots.asi8[kept], kind="stable")]
    moments = slots[kept]
    before = label_flares(moments - pd.Timedelta("24h"), events, horizon, by=by, coverage=coverage, latency=latency)
    labels = labels.iloc[kept].assign(label_day_before=before["label"].to_numpy())
    history = pd.concat(
        [past_features(moments, events, coverage=coverage), trailing_day_rates(moments, events, coverage=coverage)],
        axis=1,
    )
    labels.attrs = facts | {"source": str(events["source"].iloc[0]) if len(events) else ""}
    return FlareObservations(observations.select(kept), labels, history, dropped)


def told_window(facts: Mapping[str, Any]) -> dict[str, str]:
    """The window of labels, by their `attrs`, as a model's configuration carries it (`forecast_window`)."""
    return {
        "horizon": write_duration(facts["horizon"]),
        "latency": write_duration(facts["latency"]),
        "by": facts["by"],
    }


def split_flares(
    dataset: FlareObservations, parts: Mapping[str, Any] | None = None, *, gap: str | pd.Timedelta = "27D"
) -> dict[str, FlareObservations]:
    """Cuts labelled observations into consecutive parts in time with a gap at every border.

    Args:
        dataset: What `label_observations` gives.
        parts: As for `chronological_split`: shares, or times at which each part ends. By default 70%, 15%, 15% for
            `train`, `validation` and `test`.
        gap: Least time between observations of different parts.

    Returns:
        A dataset for each name.

    Raises:
        ValueError: As for `chronological_split`.
    """
    positions = chronological_split(dataset.times, parts, gap=gap)
    return {name: dataset.select(chosen) for name, chosen in positions.items()}


def choose_blocks(times: Any, fraction: float, *, seed: int = 0, block: str | pd.Timedelta = "27D") -> np.ndarray:
    """Chooses a share of the samples in whole blocks of time, for curves of skill against labels.

    Neighbouring days show the same active regions: single days strewn over the years would hold nearly everything that
    all days hold.

    Args:
        times: (N,) times of the samples, in any order.
        fraction: Share of the samples, in (0, 1].
        seed: Of the order in which blocks are drawn.
        block: Length of a block, counted from the first time.

    Returns:
        Positions (int64, ascending in time). Blocks are drawn until the share is reached; the last of them is left
        out where the share is nearer without it, though never the only one.

    Raises:
        ValueError: A fraction or a block that makes no sense, or no sample.
    """
    moments = to_utc(times)
    length = pd.Timedelta(block)
    if not 0 < fraction <= 1 or length <= pd.Timedelta(0) or not len(moments):
        raise ValueError(
            f"expected a fraction in (0, 1], a positive block and at least one time, got {fraction}, {length} and "
            f"{len(moments)} times."
        )
    order = np.argsort(moments.asi8, kind="stable")
    if fraction == 1:
        return order
    number = ((moments - moments.min()) // length).to_numpy()
    blocks, counts = np.unique(number, return_counts=True)
    turn = np.random.default_rng(seed).permutation(len(blocks))
    reached = np.cumsum(counts[turn])
    wanted = fraction * len(moments)
    last = int(np.searchsorted(reached, wanted))
    if last > 0 and wanted - reached[last - 1] <= reached[last] - wanted:
        last -= 1
    return order[np.isin(number[order], blocks[turn[: last + 1]])]


__all__ = ["FlareObservations", "choose_blocks", "label_observations", "split_flares", "told_window"]
