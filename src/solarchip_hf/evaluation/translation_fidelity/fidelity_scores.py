"""Fidelity of many generated images of one channel: scores of every sample, their means, and what was not counted.

No import from the package: the `evaluate` library copies this file beside the metric module.
"""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from .ensemble_scores import ENSEMBLE_SCORES, central_interval, ensemble_scores
from .image_scores import (
    DATA_RANGES,
    IMAGE_SCORES,
    INTENSITY_SCORES,
    image_scores,
    intensity_scores,
    radial_distance,
)
from .magnetogram_scores import MAGNETOGRAM_SCORES, magnetogram_scores

# Solar minimum between the cycles 24 and 25 (SILSO, Royal Observatory of Belgium): the leaders' polarity turns over.
CYCLE_25 = np.datetime64("2019-12-01")


def fidelity_scores(
    predictions: Any,
    references: Any,
    *,
    modality: str,
    samples: Any = None,
    data_range: float | None = None,
    times: Sequence[Any] | None = None,
    b0: Any = 0.0,
    northern_leader: int | None = None,
    radius: float | None = None,
) -> dict[str, Any]:
    """Scores generated images against observed ones.

    Args:
        predictions: (N, H, H) physical units on the canonical grid, north up, NaN where there is nothing.
        references: (N, H, H) the truth; of a magnetogram the disk is scored.
        modality: `"hmi"`, or `"aia171"` and the like.
        samples: (N, m, H, H) the members that the predictions were made from, m of 2 or more.
        data_range: For PSNR and SSIM, in the unit of the images; by default `DATA_RANGES`, DN at the nominal exposure
            and 500 G. Give it for any other unit.
        times: (N,) UTC, which tell the cycle for Hale's law; for magnetograms without `northern_leader`.
        b0: Heliographic latitude of the disk's centre in degrees, one or N.
        northern_leader: Polarity of northern leaders, +1 or -1, in place of `times`.
        radius: Solar radius in pixels; by default that of the canonical grid.

    Returns:
        The mean of every score over the samples in which it is defined, `per_sample` (lists of N), `undefined` (how
        many samples a score is missing from, where any), `count` N, `data_range`, and of the pixels `valid_pixels`
        (both finite) and `missing_pixels` (truth finite, prediction not). With `samples` also `members` and
        `expected_coverage`.

    Raises:
        ValueError: Shapes, modality or options that do not fit.
    """
    channel = _channel(modality)
    predictions, references = np.asarray(predictions), np.asarray(references)
    if references.ndim != 3 or references.shape[1] != references.shape[2] or predictions.shape != references.shape:
        raise ValueError(
            f"predictions and references: expected two arrays (N, H, H), got {predictions.shape} and "
            f"{references.shape}."
        )
    count = len(references)
    if not count:
        raise ValueError("references: expected at least one image, got none.")
    if samples is not None:
        samples = np.asarray(samples)
        if samples.ndim != 4 or (samples.shape[0], *samples.shape[2:]) != references.shape or samples.shape[1] < 2:
            raise ValueError(
                f"samples: expected ({count}, m, H, H) with m of 2 or more beside references {references.shape}, got "
                f"{samples.shape}."
            )
    data_range = DATA_RANGES[channel] if data_range is None else float(data_range)
    if not data_range > 0:
        raise ValueError(f"data_range: expected a positive number, got {data_range}.")
    leaders = _leaders(channel, times, northern_leader, count)
    latitudes = np.broadcast_to(np.asarray(b0, dtype=float), (count,))
    if channel == "hmi":  # beyond the limb there is no field, whatever stands for it
        references = np.where(radial_distance(references.shape[-1], radius) < 1, references, np.nan)

    rows: list[dict[str, float]] = []
    for index in range(count):
        pair = predictions[index], references[index]
        scores = image_scores(*pair, data_range=data_range, radius=radius)
        if channel == "hmi":
            scores |= magnetogram_scores(
                *pair,
                data_range=data_range,
                northern_leader=leaders[index],
                b0=float(latitudes[index]),
                radius=radius,
            )
        else:
            scores |= intensity_scores(*pair, radius=radius)
        if samples is not None:
            scores |= ensemble_scores(samples[index], references[index], radius=radius)
        rows.append(scores)
    return _summary(rows, predictions, references, data_range, None if samples is None else samples.shape[1])


def score_names(modality: str, ensemble: bool = False) -> tuple[str, ...]:
    """The scores of a channel in the order of tables: the headline first."""
    own = MAGNETOGRAM_SCORES if _channel(modality) == "hmi" else INTENSITY_SCORES
    return (*IMAGE_SCORES, *own, *(ENSEMBLE_SCORES if ensemble else ()))


def northern_leaders(times: Sequence[Any]) -> list[int]:
    """Polarity of northern leading spots by Hale's law: -1 in cycle 24, +1 in cycle 25.

    Regions of the old cycle near the equator and of the new one at high latitude overlap for about a year around the
    minimum, and are not told apart.

    Args:
        times: UTC, anything that NumPy reads as a date; zone-aware ones are read by their UTC.

    Returns:
        -1 or +1 for each.
    """
    moments = [getattr(time, "to_datetime64", lambda time=time: np.datetime64(time))() for time in times]
    return [1 if moment >= CYCLE_25 else -1 for moment in moments]


def _channel(modality: str) -> str:
    name = re.sub(r"[^a-z0-9]", "", str(modality).lower())
    name = f"aia{int(name)}" if name.isdigit() else name
    if name not in DATA_RANGES:
        raise ValueError(f"modality: expected one of {', '.join(DATA_RANGES)}, got {modality!r}.")
    return name


def _leaders(channel: str, times: Sequence[Any] | None, northern_leader: int | None, count: int) -> list[int]:
    if channel != "hmi":
        return []
    if northern_leader is not None:
        return [northern_leader] * count
    if times is None:
        raise ValueError(
            "times: expected the times of magnetograms, which tell the polarity of the cycle, got none; or give "
            "northern_leader, -1 in cycle 24 and +1 in cycle 25."
        )
    if len(times) != count:
        raise ValueError(f"times: expected {count}, one an image, got {len(times)}.")
    return northern_leaders(list(times))


def _summary(
    rows: list[dict[str, float]],
    predictions: np.ndarray,
    references: np.ndarray,
    data_range: float,
    members: int | None,
) -> dict[str, Any]:
    per_sample = {name: [row[name] for row in rows] for name in rows[0]}
    defined = {name: np.asarray(values)[~np.isnan(values)] for name, values in per_sample.items()}
    summary: dict[str, Any] = {
        name: float(values.mean()) if len(values) else float("nan") for name, values in defined.items()
    }
    known, given = np.isfinite(references), np.isfinite(predictions)
    summary |= {
        "per_sample": per_sample,
        "undefined": {name: len(rows) - len(values) for name, values in defined.items() if len(values) < len(rows)},
        "count": len(rows),
        "data_range": data_range,
        "valid_pixels": int((known & given).sum()),
        "missing_pixels": int((known & ~given).sum()),
    }
    if members is not None:
        summary |= {"members": members, "expected_coverage": central_interval(members)[1]}
    return summary


__all__ = ["fidelity_scores", "northern_leaders", "score_names"]
