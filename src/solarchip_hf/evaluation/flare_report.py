"""One report a run: a flare forecast beside its rivals on the same samples, as JSON, Markdown and figures."""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from ..data.flare_events import disk_angle
from ..data.flare_observations import FlareObservations
from ..models.calibration import calibrated_probabilities
from .bootstrap import block_bootstrap
from .calibration import boundary_names, choose_thresholds, fit_calibration
from .figures import reliability_figure, roc_figure
from .flare_report_text import described, report_markdown
from .flare_rivals import baseline_forecasts
from .flare_skill.skill_scores import CLASS_NAMES, binary_scores, exceedance, flare_scores
from .reliability import reliability_curve
from .stratified import recall_by_angle, score_forecasts, scores_by_group

logger = logging.getLogger(__name__)

BOUNDARIES = tuple(f"{name}+" for name in CLASS_NAMES[1:])
_RAW = ", uncalibrated"
_TABLE = ("pod", "far", "csi", "hss", "tss", "acc", "bias", "tp", "fp", "fn", "tn")
_YEARLY = ("count", "base_rate", "tss", "hss", "bss_training", "bss_sample", "auc")


def write_flare_report(
    folder: str | Path,
    parts: Mapping[str, FlareObservations],
    forecasts: Mapping[str, Mapping[str, np.ndarray]],
    *,
    extra_forecasts: Mapping[str, Any] | None = None,
    baselines: tuple[Mapping[str, Mapping[str, np.ndarray]], Mapping[str, str]] | None = None,
    headline: str = "M+",
    note: str = "",
    run: Mapping[str, Any] | None = None,
    block: str = "27D",
    num_resamples: int = 500,
    level: float = 0.95,
    seed: int = 0,
    figures: bool = True,
) -> dict[str, Any]:
    """Scores forecasts of the test part and writes `report.json`, `report.md` and `figures/` into a folder.

    Every forecast is scored on the same samples: where one is NaN (as a baseline without history), the sample is left
    out for all, and counted. Thresholds of warning maximise TSS on the validation part, for every forecast by itself.

    Args:
        folder: Where to write; made if absent. An earlier report there is replaced.
        parts: `train`, `validation` and `test`, as `split_flares` gives them.
        forecasts: Name to `{"validation": (Nv, 4), "test": (Nt, 4)}` class probabilities; the first is the one that
            the report is about.
        extra_forecasts: Further rows, as the true hazard of a synthetic Sun: name to (Nt, 4) for the test part alone
            (warning from 0.5), or to a dict as in `forecasts`.
        baselines: What `baseline_forecasts` gave for these parts, where it was computed before.
        headline: The boundary of the first tables and the figures: `"C+"`, `"M+"` or `"X+"`.
        note: What the data are, as `"SyntheticSun"`; stands in titles.
        run: Facts to write down: arguments, calibration, training.
        block: Length of the bootstrap's blocks.
        num_resamples: Number of resamples.
        level: Nominal coverage of the intervals.
        seed: Of the resampling, the shuffling and the forest.
        figures: Whether to draw.

    Returns:
        What `report.json` holds: `data`, `run`, `protocol`, `samples`, `climatology`, `thresholds`, `scores` (a
        boundary, a forecast: each score with `_low` and `_high`), `tables` (the scores of the contingency table at the
        threshold), `classes` (GMGS, RPSS), `differences` (the first forecast less each rival, paired), `by_year`,
        `by_angle`, `reliability`, `left_out`.

    Raises:
        ValueError: A part or a forecast is missing, has another number of rows, or holds no probabilities.
    """
    for name in ("train", "validation", "test"):
        if name not in parts:
            raise ValueError(f"parts: expected train, validation and test, got {', '.join(parts)}.")
    if headline not in BOUNDARIES or not forecasts:
        raise ValueError(f"headline: expected one of {', '.join(BOUNDARIES)} and a forecast, got {headline!r}.")
    test, first = parts["test"], next(iter(forecasts))
    rivals, absent = baseline_forecasts(parts, seed=seed) if baselines is None else baselines
    every: dict[str, dict[str, np.ndarray]] = {}
    for name, forecast in {**forecasts, **rivals, **(extra_forecasts or {})}.items():
        every[name] = _checked(name, forecast, parts)
    kept = np.all([np.isfinite(forecast["test"]).all(axis=1) for forecast in every.values()], axis=0)
    if not kept.any():
        raise ValueError("forecasts: expected samples that all of them forecast, got none.")
    labels, times = test.classes[kept], test.times[kept]
    before = test.labels["label_day_before"].to_numpy()[kept]
    known = before >= 0
    used = {name: forecast["test"][kept] for name, forecast in every.items()}
    counts = np.bincount(parts["train"].classes, minlength=len(CLASS_NAMES))
    climatology = counts / counts.sum()
    thresholds, sources = _thresholds(every, parts["validation"].classes)
    options: dict[str, Any] = {"block": block, "num_resamples": num_resamples, "level": level, "seed": seed}

    result: dict[str, Any] = {
        "data": note,
        "synthetic": test.labels.attrs.get("source") == "synthetic",
        "forecast": first,
        "headline": headline,
        "run": dict(run or {}),
        "protocol": {
            **{key: value for key, value in test.labels.attrs.items() if key != "doubtful_peaks"},
            **options,
            "num_blocks": block_bootstrap(np.mean, labels, times=times, block=block, num_resamples=1).num_blocks,
            "threshold": "largest TSS on the validation part",
        },
        "samples": {name: _samples(part) for name, part in parts.items()},
        "left_out": {"test samples without all forecasts": int((~kept).sum()), "baselines": dict(absent)},
        "climatology": {
            "training": dict(zip(CLASS_NAMES, climatology.tolist(), strict=True)),
            "sample": dict(zip(CLASS_NAMES, (np.bincount(labels, minlength=4) / len(labels)).tolist(), strict=True)),
        },
        "thresholds": {b: {n: {"value": thresholds[b][n], "from": sources[b][n]} for n in every} for b in BOUNDARIES},
        "scores": {},
        "tables": {},
        "changed_windows": {},
    }
    for column, boundary in enumerate(BOUNDARIES):
        table = score_forecasts(
            used, labels, times, climatology=climatology, thresholds=thresholds[boundary], boundary=boundary, **options
        )
        result["scores"][boundary] = table.to_dict(orient="index")
        changed = (labels > column) != (before > column)
        result["changed_windows"][boundary] = {"changed": int((changed & known).sum()), "known": int(known.sum())}
        for name, row in result["scores"][boundary].items():
            row |= _changed(exceedance(used[name])[:, column], labels > column, changed & known, row["threshold"])
        result["tables"][boundary] = {
            name: {
                key: value
                for key, value in binary_scores(
                    exceedance(forecast)[:, column], labels > column, thresholds[boundary][name]
                ).items()
                if key in _TABLE
            }
            for name, forecast in used.items()
        }
    result["classes"] = {
        name: {
            key: value
            for key, value in flare_scores(forecast, labels, climatology=climatology).items()
            if key in ("gmgs", "rps", "rpss_training", "rpss_sample", "class_acc", "class_table")
        }
        for name, forecast in used.items()
    }
    column = BOUNDARIES.index(headline)
    above = {name: exceedance(forecast)[:, column] for name, forecast in used.items()}
    observed = labels > column
    limits = thresholds[headline]
    base = float(climatology[column + 1 :].sum())
    result["differences"] = _differences(first, above, observed, times, limits, base, options)
    result["by_year"] = _by_year(used, labels, times, limits, climatology, headline)
    angles = disk_angle(test.labels["target_location"])[kept]
    result["by_angle"] = {
        name: recall_by_angle(above[name], observed, angles, threshold=limits[name]).to_dict(orient="records")
        for name in used
    }
    shown = [*forecasts, *[n for n in used if n in (extra_forecasts or {})]]
    curves = {
        name: reliability_curve(above[name], observed, times=times, **options)
        for name in [*shown, *[n for n in ("past-rate logistic", "magnetogram forest") if n in used]]
    }
    result["reliability"] = {name: curve.to_dict() for name, curve in curves.items()}

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for stale in sorted((folder / "figures").glob("flare_*.png")):
        stale.unlink()
    result["figures"] = _draw(folder, curves, above, observed, limits, headline, result, shown) if figures else []
    result = _plain(result)
    write_whole(folder / "report.json", json.dumps(result, indent=2, allow_nan=False) + "\n")
    write_whole(folder / "report.md", report_markdown(result))
    return result


def calibrated_report(
    folder: str | Path,
    parts: Mapping[str, FlareObservations],
    logits: Mapping[str, Any],
    *,
    name: str = "model",
    method: str = "platt",
    run: Mapping[str, Any] | None = None,
    **options: Any,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Calibrates a model's logits on validation, writes `forecasts.csv`, and reports calibrated and raw forecasts.

    Args:
        folder: Where to write, as for `write_flare_report`.
        parts: As for `write_flare_report`.
        logits: (N, 4) of `validation` and of `test`, in the order of the parts.
        name: What the forecast is called in the report.
        method: As for `fit_calibration`.
        run: As for `write_flare_report`; the calibration is added.
        **options: Of `write_flare_report`.

    Returns:
        The calibration, for `model.config.calibration`, and the report.
    """
    span = parts["validation"].times
    calibration = fit_calibration(
        logits["validation"],
        parts["validation"].classes,
        method,
        fitted_on=f"validation, {len(span)} observations, {span.min():%Y-%m-%d} to {span.max():%Y-%m-%d}",
    )
    forecasts: dict[str, dict[str, np.ndarray]] = {name: {}, name + _RAW: {}}
    tables = []
    for part in ("validation", "test"):
        values = torch.as_tensor(np.asarray(logits[part]))
        for key, kind in zip(forecasts, (calibration, None), strict=True):
            forecasts[key][part] = calibrated_probabilities(values, kind).double().numpy()
        table = pd.DataFrame(forecasts[name][part], columns=list(CLASS_NAMES), index=parts[part].times)
        tables.append(table.assign(part=part, label=parts[part].classes))
    Path(folder).mkdir(parents=True, exist_ok=True)
    write_whole(Path(folder) / "forecasts.csv", pd.concat(tables).to_csv(index_label="time"))
    facts = {**(run or {}), "calibration": calibration}
    return calibration, write_flare_report(folder, parts, forecasts, run=facts, **options)


def _checked(name: str, forecast: Any, parts: Mapping[str, FlareObservations]) -> dict[str, np.ndarray]:
    given = dict(forecast) if isinstance(forecast, Mapping) else {"test": forecast}
    if "test" not in given:
        raise ValueError(f"{name}: expected a forecast of the test part, got {', '.join(given)}.")
    checked = {}
    for part, values in given.items():
        if part not in ("validation", "test"):
            continue
        values = np.asarray(values, dtype=float)
        if values.shape != (len(parts[part]), len(CLASS_NAMES)):
            raise ValueError(
                f"{name}: expected probabilities of shape ({len(parts[part])}, {len(CLASS_NAMES)}) for the {part} "
                f"part, got {values.shape}."
            )
        sums = values[np.isfinite(values).all(axis=1)]
        if sums.size and (sums.min() < -1e-6 or np.abs(sums.sum(axis=1) - 1).max() > 1e-3):
            raise ValueError(f"{name}: expected rows of probabilities that sum to 1 in the {part} part.")
        checked[part] = values.clip(0, 1)
    return checked


def _thresholds(
    forecasts: Mapping[str, Mapping[str, np.ndarray]], labels: np.ndarray
) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, str]]]:
    """The threshold of each boundary and forecast, and in words where it is from."""
    values: dict[str, dict[str, float]] = {boundary: {} for boundary in BOUNDARIES}
    sources: dict[str, dict[str, str]] = {boundary: {} for boundary in BOUNDARIES}
    names = boundary_names(len(CLASS_NAMES))
    for name, forecast in forecasts.items():
        found: dict[str, float] = {}
        if "validation" in forecast:
            known = np.isfinite(forecast["validation"]).all(axis=1)
            if known.any():
                found = choose_thresholds(forecast["validation"][known], labels[known])
        for boundary, key in zip(BOUNDARIES, names, strict=True):
            values[boundary][name] = found.get(key, 0.5)
            if key in found:
                sources[boundary][name] = "validation"
            else:
                why = "one class only there" if "validation" in forecast else "no forecast of it"
                sources[boundary][name] = f"not from validation: {why}"
    return values, sources


def _changed(above: np.ndarray, observed: np.ndarray, changed: np.ndarray, threshold: float) -> dict[str, float]:
    """TSS on the windows whose outcome differs from that of the day before, at whatever cadence the samples have."""
    if not changed.any():
        return {"tss_changed": float("nan")}
    return {"tss_changed": binary_scores(above[changed], observed[changed], threshold)["tss"]}


def _samples(part: FlareObservations) -> dict[str, Any]:
    counts = np.bincount(part.classes, minlength=len(CLASS_NAMES))
    return {
        "count": len(part),
        "first": str(part.times.min()),
        "last": str(part.times.max()),
        "classes": dict(zip(CLASS_NAMES, counts.tolist(), strict=True)),
        "dropped_before_the_split": part.dropped,
    }


def _differences(
    first: str,
    above: Mapping[str, np.ndarray],
    observed: np.ndarray,
    times: Any,
    limits: Mapping[str, float],
    base: float,
    options: Mapping[str, Any],
) -> dict[str, dict[str, float]]:
    """The first forecast's TSS and BSS less those of each rival, on the same resamples."""
    rows: dict[str, dict[str, float]] = {}
    for name in above:
        if name == first:
            continue

        def gain(ours: np.ndarray, theirs: np.ndarray, events: np.ndarray, name: str = name) -> dict[str, float]:
            a = binary_scores(ours, events, limits[first], base)
            b = binary_scores(theirs, events, limits[name], base)
            return {"tss": a["tss"] - b["tss"], "bss": a["bss_training"] - b["bss_training"]}

        bounds = {"tss": (-2.0, 2.0)}  # a difference of Brier skills has none
        intervals = block_bootstrap(gain, above[first], above[name], observed, times=times, bounds=bounds, **options)
        rows[name] = {}
        for score, interval in intervals.items():
            rows[name] |= {score: interval.estimate, f"{score}_low": interval.low, f"{score}_high": interval.high}
    return rows


def _by_year(
    used: Mapping[str, np.ndarray],
    labels: np.ndarray,
    times: Any,
    limits: Mapping[str, float],
    climatology: np.ndarray,
    headline: str,
) -> dict[str, dict[str, dict[str, float]]]:
    prefix = f"{headline[:-1].lower()}_plus_"
    years = pd.DatetimeIndex(times).year
    result: dict[str, dict[str, dict[str, float]]] = {}
    for name, forecast in used.items():
        table = scores_by_group(forecast, labels, years, threshold=limits[name], climatology=climatology)
        for year, row in table.iterrows():
            result.setdefault(str(year), {})[name] = {key: float(row[prefix + key]) for key in _YEARLY}
    return result


def _draw(
    folder: Path,
    curves: Mapping[str, Any],
    above: Mapping[str, np.ndarray],
    observed: np.ndarray,
    limits: Mapping[str, float],
    headline: str,
    result: Mapping[str, Any],
    shown: Sequence[str],
) -> list[str]:
    place = described(result)
    horizon = pd.Timedelta(result["protocol"].get("horizon", "24h")) / pd.Timedelta("1h")
    title = f"{headline} within {horizon:g} h" + (f", {place}" if place else "")
    drawn = ["figures/flare_reliability.png"]
    reliability_figure({name: curves[name] for name in shown}, folder / drawn[0], title=title)
    if observed.any() and not observed.all():
        drawn.append("figures/flare_roc.png")
        apart = {name: values for name, values in above.items() if not name.endswith(_RAW)}  # the same curve
        roc_figure(apart, observed, folder / drawn[1], thresholds=limits, title=title)
    return drawn


def _plain(value: Any) -> Any:
    """Plain values for JSON; what is not finite becomes null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [_plain(item) for item in value]
    if isinstance(value, bool | np.bool_):
        return bool(value)
    if isinstance(value, int | np.integer):
        return int(value)
    if isinstance(value, float | np.floating):
        return float(value) if np.isfinite(value) else None
    return value if value is None or isinstance(value, str) else str(value)


def write_whole(path: Path, text: str) -> None:
    """Writes a file under another name, then renames it: it is there as a whole or not at all."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


__all__ = ["BOUNDARIES", "calibrated_report", "write_flare_report"]
