"""Figures for a card, from the reports that pretraining, flare tuning and translation leave beside their weights."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd


@dataclass(frozen=True)
class CardResult:
    """One figure of a card, with what it takes to read it.

    Attributes:
        metric: Identifier, as `"tss"` or `"recall@1"`.
        value: The figure; one that is not finite is left out of the card.
        protocol: How it was measured: on what, split how, beside what; a sentence or two.
        dataset: What it was measured on, in words.
        name: The metric for readers, as `"TSS, M and above"`; default: `metric`.
        low: Lower bound of its 95% interval.
        high: Upper bound.
        split: Part of the dataset, as `"validation"`.
        dataset_id: Repository of the dataset on the Hub, if it is there.
        synthetic: Whether the data are synthetic; None: not known.
        control: Whether this is a baseline or control beside the model's own figures.
    """

    metric: str
    value: float
    protocol: str
    dataset: str
    name: str = ""
    low: float | None = None
    high: float | None = None
    split: str | None = None
    dataset_id: str | None = None
    synthetic: bool | None = None
    control: bool = False


_FLARE_SCORES = {"tss": "TSS", "hss": "HSS", "bss_training": "BSS over training climatology", "auc": "AUC"}
_RIVAL_SCORES = ("tss", "bss_training")  # of the baselines: enough to compare with
_FIDELITY = {
    "correlation_disk": "correlation on the disk, radial profile removed",
    "correlation": "correlation, whole frame",
    "rmse": "RMSE",
    "ssim": "SSIM",
    "polarity_agreement": "polarity agreement where the field is strong",
    "coverage": "coverage of the ensemble's interval",
}
_FIDELITY_RIVALS = ("correlation_disk",)


def pretraining_results(metrics: Mapping[str, Any], *, data: str, synthetic: bool | None) -> list[CardResult]:
    """Retrieval with its controls: means over the pairs of channels.

    Args:
        metrics: `metrics.json` of pretraining.
        data: What the data are.
        synthetic: Whether they are synthetic.
    """
    rows = metrics.get("retrieval") or []
    results = []
    for method in dict.fromkeys(row["method"] for row in rows):
        held = [row for row in rows if row["method"] == method]
        gallery = ", ".join(map(str, sorted({row["gallery"] for row in held})))
        protocol = (
            f"Retrieval of the co-temporal image of another channel among {gallery} held-out observations, mean of "
            f"both directions and of {len(held)} pairs of channels; chance is {_mean(held, 'chance@1'):.3f}. "
            "Every pair with its interval stands in `retrieval.md`."
        )
        for metric in ("recall@1", "recall@5"):
            results.append(
                CardResult(
                    metric=metric,
                    value=_mean(held, metric),
                    name=f"{metric}, {method}",
                    protocol=protocol,
                    dataset=data or "the held-out observations",
                    split="validation",
                    synthetic=synthetic,
                    control=method not in ("class token", "patch similarity"),
                )
            )
    return results


def _mean(rows: Iterable[Mapping[str, float]], name: str) -> float:
    values = [row[name] for row in rows]
    return math.fsum(values) / len(values)


def flare_results(report: Mapping[str, Any], *, data: str, synthetic: bool | None) -> list[CardResult]:
    """Skill of a flare forecast and of its rivals at the report's headline; a score that is not defined is left out.

    Args:
        report: `report.json` of flare tuning.
        data: What the data are.
        synthetic: Whether they are synthetic.
    """
    boundary = report.get("headline", "M+")
    scores = (report.get("scores") or {}).get(boundary) or {}
    test = (report.get("samples") or {}).get("test") or {}
    told = report.get("protocol") or {}
    scored = next((row["count"] for row in scores.values() if row.get("count") is not None), None)
    count = test.get("count", "Some") if scored is None else round(scored)
    verb = {"start": "start", "peak": "peak"}.get(told.get("by"), "happen")
    late = _hours(told.get("latency") or "0h")
    delay = "" if late == "0 h" else f", forecast {late} behind it"
    protocol = (
        f"{count} observations of {_days(test)}, split in time; flares of {boundary} that {verb} "
        f"within {_hours(told.get('horizon'))} after the image{delay}; threshold: "
        f"{told.get('threshold', 'not recorded')}; "
        f"intervals from blocks of {told.get('block', 'a length that is not recorded')}. All forecasts are scored on "
        "the same samples; the whole comparison stands in `report.md`."
    )
    results = []
    for forecast, row in scores.items():
        ours = forecast == report.get("forecast")
        for metric in _FLARE_SCORES if ours else _RIVAL_SCORES:
            if row.get(metric) is not None:
                results.append(
                    CardResult(
                        metric=metric,
                        value=row[metric],
                        name=f"{_FLARE_SCORES[metric]}, {boundary}" + ("" if ours else f": {forecast}"),
                        low=row.get(f"{metric}_low"),
                        high=row.get(f"{metric}_high"),
                        protocol=protocol,
                        dataset=data or "the observations of the report",
                        split="test",
                        synthetic=synthetic,
                        control=not ours,
                    )
                )
    return results


def _days(part: Mapping[str, Any]) -> str:
    return f"{part['first'][:10]} to {part['last'][:10]}" if part.get("first") else "a period that is not recorded"


def _hours(horizon: Any) -> str:
    if not horizon:
        return "the window of its training"
    return f"{pd.Timedelta(horizon) / pd.Timedelta('1h'):g} h"


def translation_results(table: Mapping[str, Any], *, data: str, synthetic: bool | None) -> list[CardResult]:
    """Fidelity of a translation and of its rivals.

    Args:
        table: `fidelity.json` of the evaluation.
        data: What the data are.
        synthetic: Whether they are synthetic.
    """
    protocol = (
        f"{table.get('observations')} held-out observations, {', '.join(table.get('sources') or [])} to "
        f"{table.get('target')}, in {table.get('unit')}; mean over observations, intervals from blocks of "
        f"{table.get('block')}. The whole comparison stands in `fidelity.md`."
    )
    results = []
    for method, row in (table.get("rows") or {}).items():
        ours = method == table.get("method")
        for metric in _FIDELITY if ours else _FIDELITY_RIVALS:
            score = (row.get("scores") or {}).get(metric) or {}
            if score.get("estimate") is not None:
                results.append(
                    CardResult(
                        metric=metric,
                        value=score["estimate"],
                        name=_FIDELITY[metric] + ("" if ours else f": {method}"),
                        low=score.get("low"),
                        high=score.get("high"),
                        protocol=protocol,
                        dataset=data or table.get("data") or "the held-out observations",
                        split="validation",
                        synthetic=synthetic,
                        control=not ours,
                    )
                )
    return results


__all__ = ["CardResult", "flare_results", "pretraining_results", "translation_results"]
