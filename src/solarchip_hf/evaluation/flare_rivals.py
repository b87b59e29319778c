"""The baselines of `flare_baselines` on the samples of a run: fitted on its training part, on the same windows."""

import logging
from collections.abc import Mapping
from typing import cast

import numpy as np
import pandas as pd
from tqdm import tqdm

from ..data.flare_observations import FlareObservations
from ..data.leakage import check_feature_table
from ..data.observations import Observations, load_observations
from .flare_baselines import (
    ClimatologyBaseline,
    MagnetogramForestBaseline,
    PastRateLogisticBaseline,
    PersistenceBaseline,
    TrailingRateBaseline,
    magnetogram_statistics,
)

logger = logging.getLogger(__name__)

# name, class, whether it reads the magnetogram's statistics (else the history of flares)
_BASELINES: tuple[tuple[str, type, bool], ...] = (
    ("climatology", ClimatologyBaseline, False),
    ("trailing 365 d rate", TrailingRateBaseline, False),
    ("persistence", PersistenceBaseline, False),
    ("past-rate logistic", PastRateLogisticBaseline, False),
    ("magnetogram forest", MagnetogramForestBaseline, True),
)


def magnetogram_table(observations: Observations | FlareObservations, *, progress: bool = False) -> pd.DataFrame:
    """Statistics of every observation's magnetogram, as `magnetogram_statistics` gives them.

    Args:
        observations: Prepared observations on the `rsun` grid, whose dataset holds `hmi`, be it among their modalities
            or not.
        progress: Whether to show a bar.

    Returns:
        A row an observation in their order; NaN where the magnetogram is missing or has no valid pixel.

    Raises:
        ValueError: Another grid, or a dataset without magnetograms.
    """
    images = observations.observations if isinstance(observations, FlareObservations) else observations
    if images.processor.geometry != "rsun" or "hmi" not in images.manifest["modalities"]:
        raise ValueError(
            f"observations: expected magnetograms on the rsun grid, got {images.manifest['modalities']} on the "
            f"{images.processor.geometry} grid."
        )
    everything = cast(Observations, load_observations(images.folder, ["hmi"]))
    place = pd.MultiIndex.from_frame(everything.metadata[["shard", "row"]])
    wanted = pd.MultiIndex.from_frame(images.metadata[["shard", "row"]])
    rows = []
    for position in tqdm(place.get_indexer(wanted), desc="magnetograms", unit="image", disable=not progress):
        field = everything.physical(int(position))["hmi"]
        try:
            rows.append({} if field is None else magnetogram_statistics(field).iloc[0].to_dict())
        except ValueError as error:
            logger.warning("observation %d: no statistics: %s", position, error)
            rows.append({})
    return pd.DataFrame(rows)


def baseline_forecasts(
    parts: Mapping[str, FlareObservations],
    *,
    statistics: Mapping[str, pd.DataFrame] | None = None,
    seed: int = 0,
    progress: bool = False,
) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, str]]:
    """Fits every baseline on the training part and lets it forecast the others.

    A baseline is fitted on the training rows whose features are all known; where a feature of another part is unknown,
    its forecast is NaN, and `write_flare_report` leaves the sample out for all forecasts alike.

    Args:
        parts: `train`, and the parts to forecast, as `validation` and `test`.
        statistics: `magnetogram_table` of each part where it was computed before; else it is computed here.
        seed: Of the forest.
        progress: Whether to show bars.

    Returns:
        The forecasts, name to part to (N, 4) probabilities; and the baselines that could not be made, name to reason.

    Raises:
        LeakageError: A feature of the flares' history is the target in disguise, in the training part.
    """
    train = parts["train"]
    others = [name for name in parts if name != "train"]
    forecasts: dict[str, dict[str, np.ndarray]] = {}
    absent: dict[str, str] = {}
    tables = {name: part.history for name, part in parts.items()}
    check_feature_table(train.history, train.labels)
    magnetic: dict[str, pd.DataFrame] = dict(statistics or {})
    for name, baseline, reads_images in _BASELINES:
        if reads_images and not magnetic:
            try:
                magnetic = {part: magnetogram_table(data, progress=progress) for part, data in parts.items()}
            except ValueError as error:
                absent[name] = str(error)
                continue
        features = magnetic if reads_images else tables
        model = baseline(seed=seed) if reads_images else baseline()
        columns = list(features["train"]) if reads_images or not model.columns else list(model.columns)
        columns = [] if isinstance(model, ClimatologyBaseline) else columns
        known = {part: np.isfinite(features[part][columns].to_numpy(dtype=float)).all(axis=1) for part in parts}
        if not known["train"].any():
            absent[name] = "no training sample has all features: the flare list does not reach back far enough"
            continue
        model.fit(features["train"][known["train"]], train.classes[known["train"]])
        forecasts[name] = {}
        for part in others:
            probabilities = np.full((len(parts[part]), 4), np.nan)
            if known[part].any():
                probabilities[known[part]] = model.predict_proba(features[part][known[part]])
            forecasts[name][part] = probabilities
    for name, reason in absent.items():
        logger.warning("baseline %s left out: %s", name, reason)
    return forecasts, absent


__all__ = ["baseline_forecasts", "magnetogram_table"]
