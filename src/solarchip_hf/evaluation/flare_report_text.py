"""The Markdown of a flare report, from what its JSON holds."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from .flare_skill.skill_scores import CLASS_NAMES

_FEW_BLOCKS = 10


def described(report: Mapping[str, Any]) -> str:
    """What the data are, in words; that they are synthetic is never left out."""
    note = report["data"]
    if report["synthetic"] and "synthetic" not in note.lower():
        return f"{note}, synthetic" if note else "synthetic Sun"
    return note


def report_markdown(report: Mapping[str, Any]) -> str:
    """Writes a report for reading.

    Args:
        report: What `write_flare_report` returns.

    Returns:
        Markdown.
    """
    place = described(report)
    headline, protocol = report["headline"], report["protocol"]
    kind = "**Synthetic** data: nothing here is a result on the real Sun. " if report["synthetic"] else ""
    horizon = pd.Timedelta(protocol.get("horizon", "24h")) / pd.Timedelta("1h")
    latency = pd.Timedelta(protocol.get("latency", "0h")) / pd.Timedelta("1h")
    lines = [
        f"# Flare forecast: {report['forecast']}" + (f" ({place})" if place else ""),
        "",
        f"{kind}Largest flare of the next {horizon:g} h, by {protocol.get('by', 'start')}, latency {latency:g} h, "
        f"classes on the {protocol.get('scale') or 'unknown'} scale. Thresholds have the largest TSS on the validation "
        "part. Brackets are "
        f"{100 * protocol['level']:g}% intervals from blocks of {protocol['block']} "
        f"({protocol['num_resamples']} resamples), conditional on the phase of the solar cycle that the test part "
        "covers. A dash is a score that is undefined.",
        "",
        *_warnings(report),
        *_samples(report),
    ]
    for boundary in [headline, *[name for name in report["scores"] if name != headline]]:
        lines += _scores(report, boundary)
    lines += _tables(report) + _differences(report) + _classes(report) + _years(report) + _angles(report)
    lines += _calibration(report)
    for path in report["figures"]:
        lines += [f"![{path.rpartition('/')[2].removesuffix('.png').replace('_', ' ')}]({path})", ""]
    return "\n".join(lines)


def _warnings(report: Mapping[str, Any]) -> list[str]:
    lines = []
    blocks, calibration = report["protocol"]["num_blocks"], report["run"].get("calibration")
    if blocks < _FEW_BLOCKS:
        lines.append(f"The test part spans only {blocks:.1f} such blocks: the intervals are rough.")
    if calibration:
        lines.append(
            f"The network's probabilities are calibrated by {calibration['method']} on {calibration['fitted_on']}; the "
            "baselines' are not calibrated."
        )
    share = (report["run"].get("data") or {}).get("label_fraction")
    if share is not None and share < 1:
        lines.append(
            f"A share of {share:g} of the training labels is used, and besides all labels of the validation part, for "
            "checkpoint, calibration and thresholds."
        )
    return [" ".join(lines), ""] if lines else []


def _samples(report: Mapping[str, Any]) -> list[str]:
    rows = [
        [name, part["count"], part["first"][:10], part["last"][:10], *part["classes"].values()]
        for name, part in report["samples"].items()
    ]
    left = report["left_out"]
    lines = [*_table(["part", "samples", "first", "last", *CLASS_NAMES], rows, text=4), ""]
    count = left["test samples without all forecasts"]
    if count:
        lines += [f"Left out of the test part: {count} samples that not every forecast covers.", ""]
    for name, reason in left["baselines"].items():
        lines += [f"Baseline left out: {name}: {reason}.", ""]
    return lines


def _scores(report: Mapping[str, Any], boundary: str) -> list[str]:
    table = report["scores"][boundary]
    events = next(iter(table.values()))
    changed = report["changed_windows"][boundary]
    count = round((events["count"] or 0) * (events["base_rate"] or 0))
    rows = []
    for name, row in table.items():
        threshold = _number(row["threshold"], 3)
        if report["thresholds"][boundary][name]["from"] != "validation":
            threshold += "*"
        rows.append(
            [
                name,
                *[_interval(row, key) for key in ("bss_training", "bss_sample", "tss", "auc")],
                threshold,
                *[_number(row[key]) for key in ("tss_half", "tss_shuffled", "tss_changed")],
            ]
        )
    titles = [
        "forecast",
        "BSS, training climatology",
        "BSS, sample climatology",
        "TSS",
        "AUC",
        "threshold",
        "TSS at .5",
        "TSS, shuffled within years",
        "TSS, changed windows",
    ]
    lines = [
        f"## {boundary}: {count} of {round(events['count'] or 0)} windows",
        "",
        *_table(titles, rows),
        "",
        f"The outcome differs from the day before in {changed['changed']} of {changed['known']} windows for which that "
        "is known.",
        "",
    ]
    if any(source["from"] != "validation" for source in report["thresholds"][boundary].values()):
        lines += ["\\* 0.5: the validation part gives no threshold (no forecast of it, or one class only).", ""]
    return lines


def _tables(report: Mapping[str, Any]) -> list[str]:
    headline = report["headline"]
    keys = ("pod", "far", "csi", "hss", "tss", "acc", "bias")
    rows = [
        [name, *[_number(row[key]) for key in keys], *[row[key] for key in ("tp", "fp", "fn", "tn")]]
        for name, row in report["tables"][headline].items()
    ]
    titles = ["forecast", "POD", "FAR", "CSI", "HSS", "TSS", "ACC", "bias", "hits", "false alarms", "misses", "quiet"]
    return [f"## Warnings of {headline} at the threshold", "", *_table(titles, rows), ""]


def _differences(report: Mapping[str, Any]) -> list[str]:
    if not report["differences"]:
        return []
    rows = [[name, _interval(row, "bss"), _interval(row, "tss")] for name, row in report["differences"].items()]
    return [
        f"## {report['forecast']} less its rivals, {report['headline']}, on the same resamples",
        "",
        *_table(["rival", "gain in BSS", "gain in TSS"], rows),
        "",
    ]


def _classes(report: Mapping[str, Any]) -> list[str]:
    rows = [
        [name, *[_number(row[key]) for key in ("gmgs", "rpss_training", "rpss_sample", "class_acc")]]
        for name, row in report["classes"].items()
    ]
    titles = ["forecast", "GMGS", "RPSS, training climatology", "RPSS, sample climatology", "ACC"]
    return ["## Classes 0AB, C, M, X", "", *_table(titles, rows), ""]


def _years(report: Mapping[str, Any]) -> list[str]:
    lines = [f"## By year, {report['headline']}", ""]
    keys = ("tss", "hss", "bss_training", "bss_sample", "auc")
    rows = []
    for year, table in report["by_year"].items():
        for name, row in table.items():
            events = round((row["base_rate"] or 0) * (row["count"] or 0))
            rows.append([year, name, f"{events}/{round(row['count'] or 0)}", *[_number(row[key]) for key in keys]])
    titles = ["year", "forecast", "events", "TSS", "HSS", "BSS, training", "BSS, sample", "AUC"]
    return [*lines, *_table(titles, rows, text=3), ""]


def _angles(report: Mapping[str, Any]) -> list[str]:
    bins = next(iter(report["by_angle"].values()))
    titles = ["forecast"]
    for row in bins:
        place = "unknown" if row["low"] is None else f"{row['low']:g} to {min(row['high'], 90):g} degrees"
        titles.append(f"{place} ({row['events']})")
    rows = [[name, *[_number(row["pod"]) for row in table]] for name, table in report["by_angle"].items()]
    return [
        f"## Share of {report['headline']} windows warned of, by the flare's distance from the disk's centre",
        "",
        *_table(titles, rows),
        "",
    ]


def _calibration(report: Mapping[str, Any]) -> list[str]:
    keys = ("reliability", "resolution", "uncertainty", "expected_calibration_error")
    rows = [[name, *[_number(row[key]) for key in keys]] for name, row in report["reliability"].items()]
    titles = ["forecast", "reliability (0 is best)", "resolution (more is better)", "uncertainty", "calibration error"]
    return [f"## Reliability, {report['headline']}", "", *_table(titles, rows), ""]


def _interval(row: Mapping[str, Any], key: str) -> str:
    if row[key] is None:
        return "-"
    if row[f"{key}_low"] is None or row[f"{key}_high"] is None:
        return _number(row[key])
    return f"{_number(row[key])} [{_number(row[f'{key}_low'])}, {_number(row[f'{key}_high'])}]"


def _number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _table(titles: Sequence[str], rows: Sequence[Sequence[Any]], text: int = 1) -> list[str]:
    """Lines of a table whose first `text` columns are words."""
    rule = ["---"] * text + ["---:"] * (len(titles) - text)
    return [f"| {' | '.join(map(str, row))} |" for row in (titles, rule, *rows)]


__all__ = ["described", "report_markdown"]
