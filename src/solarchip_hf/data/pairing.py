"""Pairing: for each anchor slot, the nearest file of every other modality."""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from ..models.modalities import MODALITY_NAMES, resolve_modality
from .durations import read_duration

logger = logging.getLogger(__name__)

_ROUNDS = 8  # of mutual-nearest matching; two or three settle real archives
_SAME_MOMENT = pd.Timedelta("1s")


def pair_observations(
    catalog: pd.DataFrame,
    tolerance: str | pd.Timedelta = "6min",
    anchor: str = "hmi",
    *,
    modalities: Sequence[str] | None = None,
    near_real_time: bool = True,
    approximate: bool = True,
    min_observed: int = 1,
    return_dropped: bool = False,
) -> pd.DataFrame | tuple[pd.DataFrame, pd.DataFrame]:
    """Groups the files of a catalogue into observations, one an anchor slot.

    Only files that are usable, show the full disk, and have a modality and a time take part. The rules, in their order:

    - Of several files of one modality at the same moment (within a second), one is kept: science series before
      near-real-time, FITS before an 8-bit quick-look, a quality word of zero before another, then the first path.
    - Of several anchor files in one nominal slot the same order decides, then the one nearest to the slot.
    - A file belongs to the anchor that it is nearest to in time (UTC of the observation, so that HMI's slots on TAI
      need no special case), if that is within the tolerance; it serves no second one. A quick-look fills a place only
      where no other file is within the tolerance.

    Solar rotation moves the disk centre by one pixel of 2.4 arcsec in 15.6 minutes: 6 minutes are .4 pixel.

    Args:
        catalog: A table of `scan_archive`.
        tolerance: Largest time difference to the anchor.
        anchor: The modality whose slots are the rows.
        modalities: The columns, in this order; by default every modality of which the catalogue has a file that may be
            used, in the order of the package's table.
        near_real_time: Whether files of near-real-time series take part.
        approximate: Whether 8-bit quick-looks take part.
        min_observed: Rows with fewer modalities than this are dropped.
        return_dropped: Whether to return the dropped files too.

    Returns:
        A table sorted by time: `time_nominal` (slot of the anchor), `time` (UTC of the anchor), for every modality a
        column of paths (None where missing) and `{modality}_difference` (its time minus the anchor's, s), `observed`
        (how many modalities are there), `near_real_time` and `approximate` (whether any file is), and the anchor's
        `rsun_arcsec`, `b0`, `l0`. `attrs["report"]` counts files, candidates, what was dropped and why, observations,
        and what is missing per modality; `attrs["anchor"]` and `attrs["modalities"]` name the columns. With
        `return_dropped`, a pair of it and a table of every file that is in no observation: `path`, `modality`, `time`
        and `dropped`, the reason.

    Raises:
        ValueError: The catalogue lacks columns, the anchor has no usable file (the message names what it has instead),
            or the tolerance is no positive time.
    """
    tolerance = read_duration(tolerance, "tolerance")
    missing = {"path", "modality", "time", "time_nominal", "full_disk", "usable"} - set(catalog.columns)
    if missing:
        raise ValueError(f"catalog: expected the columns of scan_archive, got a table without {sorted(missing)}.")
    anchor = resolve_modality(anchor)
    reasons = np.full(len(catalog), None, dtype=object)  # why a file is in no observation
    files = _candidates(catalog, reasons, near_real_time=near_real_time, approximate=approximate)
    available = [name for name in MODALITY_NAMES if (files["modality"] == name).any()]
    if anchor not in available:
        raise ValueError(_no_anchor(catalog, anchor, available, files, reasons))
    if modalities is None:
        names = available
    else:
        names = list(dict.fromkeys(resolve_modality(name) for name in modalities))
        if anchor not in names:
            raise ValueError(f"modalities: expected the anchor {anchor!r} among them, got {names}.")
        for name in set(names) - set(available):
            logger.warning("no usable file of %s: its column is empty", name)
    files = _keep(files, files["modality"].isin(names), reasons, "modality not asked for")
    candidates = len(files)

    files = _one_a_moment(files, reasons)
    anchors = _one_a_slot(files[files["modality"] == anchor], reasons)
    pairs = anchors[["time_nominal", "time"]].copy()
    chosen: dict[str, np.ndarray] = {}
    for name in names:
        if name == anchor:
            chosen[name] = anchors.index.to_numpy()
        else:
            chosen[name] = _match(anchors["time"], files[files["modality"] == name], tolerance)
    for name, labels in chosen.items():
        there = labels >= 0
        path = np.full(len(pairs), None, dtype=object)
        path[there] = files["path"].loc[labels[there]].to_numpy(dtype=object)
        difference = np.full(len(pairs), np.nan)
        delta = files["time"].loc[labels[there]].to_numpy() - pairs["time"].to_numpy()[there]
        difference[there] = delta / np.timedelta64(1, "us") / 1e6  # both in microseconds
        pairs[name] = pd.Series(path, index=pairs.index, dtype=object)
        pairs[f"{name}_difference"] = difference
    used = np.stack(list(chosen.values()), axis=1)  # (rows, modalities) of labels, -1 where missing
    pairs["observed"] = (used >= 0).sum(axis=1)
    for flag in ("near_real_time", "approximate"):
        pairs[flag] = np.isin(used, files.index[_flag(files, flag)].to_numpy()).any(axis=1)
    for fact in ("rsun_arcsec", "b0", "l0"):
        pairs[fact] = anchors[fact].to_numpy(dtype=float) if fact in anchors else np.nan
    for name in ("time", "time_nominal"):
        pairs[name] = pairs[name].dt.tz_localize("UTC")
    enough = (pairs["observed"] >= min_observed).to_numpy()
    pairs = pairs[enough].reset_index(drop=True)
    taken, thin = (files["row"].loc[part[part >= 0]].to_numpy() for part in (used[enough], used[~enough]))
    reasons[thin] = f"observation with fewer than {min_observed} modalities"
    idle = np.setdiff1d(np.flatnonzero(pd.isna(reasons)), taken)
    reasons[idle] = "no anchor of its own within the tolerance"

    report: dict[str, Any] = {
        "files": len(catalog),
        "candidates": candidates,
        "used": len(taken),
        "dropped": _counts(reasons),
        "observations": len(pairs),
        "complete": int((pairs["observed"] == len(names)).sum()),
        "missing": {name: int(pairs[name].isna().sum()) for name in names},
        "tolerance_seconds": tolerance.total_seconds(),
    }
    pairs.attrs.update(report=report, anchor=anchor, modalities=list(names))
    if not return_dropped:
        return pairs
    left = ~pd.isna(reasons)
    dropped = catalog.loc[left, ["path", "modality", "time"]].reset_index(drop=True)
    return pairs, dropped.assign(dropped=reasons[left])


def _flag(files: pd.DataFrame, name: str) -> np.ndarray:
    return files[name].fillna(False).to_numpy(dtype=bool) if name in files else np.zeros(len(files), dtype=bool)


def _counts(reasons: np.ndarray) -> dict[str, int]:
    """Number of files for each reason, in the order of the rules as far as they come first."""
    return {reason: int(count) for reason, count in pd.Series(reasons).value_counts(sort=False).items()}


def _keep(files: pd.DataFrame, good: Any, reasons: np.ndarray, reason: str) -> pd.DataFrame:
    """The good files; the others get the reason."""
    good = np.asarray(good, dtype=bool)
    reasons[files["row"].to_numpy()[~good]] = reason
    return files[good]


def _candidates(catalog: pd.DataFrame, reasons: np.ndarray, *, near_real_time: bool, approximate: bool) -> pd.DataFrame:
    """Files that may take part, with their `row` in the catalogue."""
    usable = catalog["usable"].fillna(False).to_numpy(dtype=bool)
    rules = {
        "unreadable": (usable | catalog["instrument"].notna().to_numpy()) if "instrument" in catalog else usable | True,
        "no modality of ours": catalog["modality"].isin(MODALITY_NAMES).to_numpy(),
        "partial disk": catalog["full_disk"].fillna(False).to_numpy(dtype=bool),
        "not usable (quality, exposure or time)": usable,
        "no time": (catalog["time"].notna() & catalog["time_nominal"].notna()).to_numpy(),
        "near real time": np.full(len(catalog), True) if near_real_time else ~_flag(catalog, "near_real_time"),
        "quick-look": np.full(len(catalog), True) if approximate else ~_flag(catalog, "approximate"),
    }
    files = catalog.assign(row=np.arange(len(catalog)))
    for reason, good in rules.items():
        files = _keep(files, good[files["row"]], reasons, reason)
    files = files.reset_index(drop=True)
    files.attrs = {}
    for name in ("time", "time_nominal"):  # without a zone inside this module: NumPy has none
        files[name] = pd.to_datetime(files[name], utc=True).dt.tz_localize(None).astype("datetime64[us]")
    return files


def _no_anchor(
    catalog: pd.DataFrame, anchor: str, available: list[str], files: pd.DataFrame, reasons: np.ndarray
) -> str:
    counts = files["modality"].value_counts()
    others = ", ".join(f"{name} ({counts[name]})" for name in available) or "none"
    unusable = int((catalog["modality"] == anchor).sum())
    why = ", ".join(f"{count} {reason}" for reason, count in _counts(reasons).items()) or "none"
    return (
        f"anchor: expected a modality with usable full-disk files, got {anchor!r} with none "
        f"({unusable} files of it in the catalogue; of all {len(catalog)} files dropped: {why}). "
        f"Modalities that can anchor, with their files: {others}. Pass one as anchor=."
    )


def _rank(files: pd.DataFrame) -> pd.DataFrame:
    """Columns to sort by, the file to keep first."""
    quality = files["quality"] if "quality" in files else pd.Series(pd.NA, index=files.index, dtype="Int64")
    return pd.DataFrame(
        {
            "nrt": _flag(files, "near_real_time"),
            "quick": _flag(files, "approximate"),
            # near real time is bit 30 of AIA's word and ranked already
            "quality": (pd.to_numeric(quality).fillna(0).astype("int64") & ~(1 << 30)).ne(0),
            "path": files["path"],
        },
        index=files.index,
    )


def _one_a_moment(files: pd.DataFrame, reasons: np.ndarray) -> pd.DataFrame:
    """Keeps the best of the files of one modality whose times lie within a second; sorted by time."""
    files = files.sort_values(["modality", "time", "path"], ignore_index=True)
    same = (files["modality"] == files["modality"].shift()) & (files["time"].diff() <= _SAME_MOMENT)
    rank = _rank(files)
    rank["moment"] = (~same).cumsum()
    best = rank.sort_values(["moment", "nrt", "quick", "quality", "path"]).drop_duplicates("moment").index
    kept = _keep(files, files.index.isin(best), reasons, "duplicate of the same moment")
    return kept.sort_values("time", kind="stable", ignore_index=True)


def _one_a_slot(anchors: pd.DataFrame, reasons: np.ndarray) -> pd.DataFrame:
    rank = _rank(anchors)
    rank["slot"] = anchors["time_nominal"]
    rank["away"] = (anchors["time"] - anchors["time_nominal"]).abs()
    best = rank.sort_values(["slot", "nrt", "quick", "quality", "away", "path"]).drop_duplicates("slot").index
    kept = _keep(anchors, anchors.index.isin(best), reasons, "second anchor in one slot")
    return kept.sort_values("time", kind="stable")


def _match(times: pd.Series, files: pd.DataFrame, tolerance: pd.Timedelta) -> np.ndarray:
    """Labels of the files for each anchor time (both sorted), -1 where none; no file twice.

    Rounds of mutual-nearest matching: science files first, quick-looks for the places still empty.
    """
    result = np.full(len(times), -1, dtype=np.int64)
    quick = _flag(files, "approximate")
    for pool in (files[~quick], files[quick]):
        left = pd.DataFrame({"time": times.to_numpy(), "row": np.arange(len(times))})
        right = pd.DataFrame({"time": pool["time"].to_numpy(), "file": pool.index.to_numpy()})
        for _ in range(_ROUNDS):
            left = left[result[left["row"]] < 0]
            right = right[~right["file"].isin(result)]
            if not len(left) or not len(right):
                break
            near = pd.merge_asof(left, right, on="time", direction="nearest", tolerance=tolerance)
            back = pd.merge_asof(right, left, on="time", direction="nearest", tolerance=tolerance)
            near = near.dropna(subset="file").astype({"file": np.int64})
            back = back.dropna(subset="row").astype({"row": np.int64})
            mutual = near.merge(back, on=["row", "file"])
            if not len(mutual):
                break
            result[mutual["row"]] = mutual["file"].to_numpy()
    return result


__all__ = ["pair_observations"]
