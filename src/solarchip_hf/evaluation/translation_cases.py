"""The held-out observations that rival translations are scored on, all of them on the same ones."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch

from ..models.modalities import MODALITIES, resolve_modality
from ..models.photometry import physical_unit
from .translation_fidelity.image_scores import DATA_RANGES

if TYPE_CHECKING:
    from ..data.observations import Observations
    from ..models.image_processing_solarchip import SolarChipImageProcessor


@dataclass(frozen=True)
class TranslationCases:
    """N observations whose target is to be told from their sources.

    Attributes:
        sources: (N, S, H, H) float32 scaled images of the sources.
        target: (N, H, H) float32 scaled image of the target.
        truth: (N, H, H) float32 the target in physical units, NaN where invalid or beyond its support.
        source_modalities: The S names.
        target_modality: The name of the target.
        times: N nominal times, UTC.
        b0: (N,) heliographic latitude of the disk's centre in degrees.
        processor: The image processor that scaled them.
    """

    sources: torch.Tensor
    target: torch.Tensor
    truth: np.ndarray
    source_modalities: tuple[str, ...]
    target_modality: str
    times: pd.DatetimeIndex
    b0: np.ndarray
    processor: "SolarChipImageProcessor"

    def __len__(self) -> int:
        return len(self.truth)

    @property
    def unit(self) -> str:
        """Physical unit of the truth."""
        return physical_unit(self.target_modality, self.processor.photometry)

    @property
    def data_range(self) -> float:
        """What PSNR and SSIM take as the range of the target, in its unit."""
        exposure = MODALITIES[self.target_modality].nominal_exposure
        per_second = self.processor.photometry == "dn_per_s"
        return DATA_RANGES[self.target_modality] / (exposure if per_second and exposure else 1.0)

    def batches(self, size: int) -> Iterator[slice]:
        """Slices of at most `size` observations."""
        for start in range(0, len(self), size):
            yield slice(start, min(start + size, len(self)))

    def to_physical(self, values: torch.Tensor | np.ndarray) -> np.ndarray:
        """Scaled images (..., H, H) of the target in physical units, NaN beyond its support."""
        return self.processor.unscale(values, self.target_modality)


def gather_cases(
    observations: "Observations",
    source_modalities: Sequence[str],
    target_modality: str,
    *,
    limit: int | None = None,
) -> TranslationCases:
    """Reads the observations that have the target and every source, evenly spread in time where there are too many.

    Args:
        observations: A prepared dataset, or a part of it.
        source_modalities: The channels that are given.
        target_modality: The channel that is to be told.
        limit: Most observations that are read.

    Returns:
        The cases, in the order of time.

    Raises:
        ValueError: A modality is not in the dataset, no observation has all of them, or the grid has no fixed disk.
    """
    wanted = [resolve_modality(name) for name in (*source_modalities, target_modality)]
    absent = [name for name in wanted if name not in observations.modalities]
    if absent:
        raise ValueError(f"observations: expected {', '.join(wanted)}, got a dataset without {', '.join(absent)}.")
    if observations.processor.geometry != "rsun":
        raise ValueError(
            f"observations: expected the geometry 'rsun', on which the disk is the same in every image, got "
            f"{observations.processor.geometry!r}. Prepare the dataset with it."
        )
    columns = [observations.modalities.index(name) for name in wanted]
    complete = np.flatnonzero(observations.observed[:, columns].all(axis=1))
    if not len(complete):
        raise ValueError(
            f"observations: expected some with all of {', '.join(wanted)}, got none of {len(observations)}."
        )
    order = np.argsort(observations.metadata["time_nominal"].to_numpy()[complete], kind="stable")
    chosen = complete[order]
    if limit is not None and limit < len(chosen):
        chosen = chosen[((np.arange(limit) + 0.5) * len(chosen) / limit).astype(int)]
    scaled = torch.stack([observations[int(index)]["pixel_values"][columns] for index in chosen])
    truth = np.stack([np.asarray(observations.physical(int(index))[wanted[-1]], dtype=np.float32) for index in chosen])
    support = observations.processor.support(wanted[-1])
    if support is not None:
        truth[:, ~support] = np.nan
    facts = observations.metadata.iloc[chosen]
    return TranslationCases(
        sources=scaled[:, :-1],
        target=scaled[:, -1],
        truth=truth,
        source_modalities=tuple(wanted[:-1]),
        target_modality=wanted[-1],
        times=pd.DatetimeIndex(facts["time_nominal"]),
        b0=facts["b0"].to_numpy(dtype=float, na_value=0.0),
        processor=observations.processor,
    )


__all__ = ["TranslationCases", "gather_cases"]
