"""Rival translations in one table: every score with its interval, the paired difference, what the spread is worth."""

import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm import tqdm

from .bootstrap import BootstrapInterval, Bounds, block_bootstrap
from .translation_cases import TranslationCases
from .translation_fidelity.fidelity_scores import fidelity_scores

logger = logging.getLogger(__name__)

ROTATION = "27D"
FEWEST_BLOCKS = 12
# What a table shows, in this order; the JSON has every score.
HEADLINES = {
    "correlation_disk": "r, disk",
    "correlation": "r, frame",
    "ccc_disk": "CCC, disk",
    "rmse": "RMSE",
    "mae": "MAE",
    "nmse": "NMSE",
    "psnr": "PSNR (dB)",
    "ssim": "SSIM",
    "flux_error_abs": "flux error",
    "ppe10": "PPE10",
    "unsigned_flux_error": "unsigned flux error",
    "polarity_agreement": "polarity",
    "rmse_gain_over_zero": "RMSE gain over zero",
    "ssim_strong_gain_over_zero": "SSIM gain over zero, strong",
    "power_fine_db": "fine power (dB)",
    "crps": "CRPS",
    "spread_skill": "spread-skill r",
    "spread_error_ratio": "spread / error",
    "coverage": "coverage",
}
# What scores can be, where that has an end; their intervals stop there.
_INDEX, _SHARE, _ERROR = (-1.0, 1.0), (0.0, 1.0), (0.0, np.inf)
BOUNDS: Mapping[str, Bounds] = {
    **dict.fromkeys(("correlation_disk", "correlation", "correlation_strong", "ccc_disk", "ccc"), _INDEX),
    **dict.fromkeys(("ssim", "ssim_zero", "ssim_strong", "ssim_strong_zero"), _INDEX),
    **dict.fromkeys(("spread_skill", "polarity_gain_over_hale"), _INDEX),
    **dict.fromkeys(("ssim_gain_over_zero", "ssim_strong_gain_over_zero"), (-2.0, 2.0)),
    **dict.fromkeys(("ppe10", "ppe10_strong", "polarity_agreement", "polarity_agreement_hale", "coverage"), _SHARE),
    **dict.fromkeys(("rmse", "mae", "nmse", "flux_error_abs", "unsigned_flux_error_abs", "rmse_strong"), _ERROR),
    "spread_error_ratio": _ERROR,
    "unsigned_flux_error": (-1.0, np.inf),
    "rmse_gain_over_zero": (-np.inf, 1.0),
}
# What is compared pair by pair.
PAIRED = ("correlation_disk", "correlation", "rmse", "ssim", "polarity_agreement", "rmse_gain_over_zero", "crps")


@dataclass
class TranslationTable:
    """Scores of rival translations of the same observations.

    Attributes:
        cases: What was translated, for the heading.
        rows: Method to its scores, as `fidelity_scores` gives them.
        intervals: Method to score to `BootstrapInterval`.
        differences: Method to score to the interval of (`method` - this one), paired.
        method: The row that is compared with all others.
        block: Length of the bootstrap's blocks.
        note: What the data are, as "synthetic".
        remarks: Method to a remark, as what it has seen.
    """

    cases: TranslationCases
    rows: dict[str, dict[str, Any]]
    intervals: dict[str, dict[str, BootstrapInterval]]
    differences: dict[str, dict[str, BootstrapInterval]]
    method: str | None
    block: str
    note: str = ""
    remarks: dict[str, str] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """What from what, on what data."""
        cases = self.cases
        data = f" ({self.note})" if self.note else ""
        return f"{', '.join(cases.source_modalities)} -> {cases.target_modality}, held-out observations{data}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; NaN and infinity become None."""
        cases = self.cases
        return _plain(
            {
                "sources": list(cases.source_modalities),
                "target": cases.target_modality,
                "unit": cases.unit,
                "data_range": cases.data_range,
                "data": self.note,
                "observations": len(cases),
                "times": [time.isoformat() for time in cases.times],
                "block": self.block,
                "method": self.method,
                "remarks": self.remarks,
                "rows": {
                    name: {
                        "scores": {key: value.to_dict() for key, value in self.intervals[name].items()},
                        **{key: value for key, value in row.items() if key not in self.intervals[name]},
                    }
                    for name, row in self.rows.items()
                },
                "differences": {
                    name: {key: value.to_dict() for key, value in scores.items()}
                    for name, scores in self.differences.items()
                },
            }
        )

    def to_markdown(self) -> str:
        """One table with all rows, a heading that states data, unit, range and blocks, and notes below it."""
        cases = self.cases
        columns = [name for name in HEADLINES if any(name in row for row in self.rows.values())]
        span = (cases.times.max() - cases.times.min()).days
        lines = [
            f"# {self.title}",
            "",
            f"{len(cases)} observations, {cases.times.min():%Y-%m-%d} to {cases.times.max():%Y-%m-%d}; "
            f"{cases.unit}, {cases.processor.size} px; data range of PSNR and SSIM {cases.data_range:g} {cases.unit}. "
            f"Mean over observations, with 95% intervals from blocks of {self.block}.",
        ]
        if pd.Timedelta(self.block) < pd.Timedelta(ROTATION):
            lines.append(
                f"The held-out part spans {span} days, too few for blocks of a solar rotation (27 days): the intervals "
                "take shorter blocks as independent, and are too narrow."
            )
        header = ["method", "n", *(HEADLINES[name] for name in columns)]
        lines += ["", _line(header), _line(["---"] * len(header))]
        for name, row in self.rows.items():
            cells = [_cell(self.intervals[name].get(column)) for column in columns]
            label = f"**{name}**" if name == self.method else name
            lines.append(_line([label, str(row["count"]), *cells]))
        lines += ["", *self._notes(columns), *self._paired()]
        return "\n".join(lines) + "\n"

    def to_text(self, columns: Sequence[str] | None = None) -> str:
        """A few scores without intervals for a terminal, and by how much the method is ahead of each rival.

        Args:
            columns: Names of scores; by default the headline, RMSE, SSIM and, of a magnetogram, polarity and gain.
        """
        wanted = columns or ("correlation_disk", "rmse", "ssim", "polarity_agreement", "rmse_gain_over_zero", "crps")
        columns = [name for name in wanted if any(name in row for row in self.rows.values())]
        width = max(len(name) for name in self.rows)
        lines = [self.title, " " * width + "".join(f"{HEADLINES[name]:>20}" for name in columns)]
        for name, row in self.rows.items():
            values = [row.get(column, float("nan")) for column in columns]
            cells = "".join(
                f"{round(value, 3) + 0.0:20.3f}" if np.isfinite(value) else f"{'-':>20}" for value in values
            )
            lines.append(f"{name:<{width}}{cells}")
        for name, scores in self.differences.items():
            shown = [key for key in PAIRED if key in columns and _defined(scores.get(key))]
            text = ", ".join(f"{HEADLINES[key]} {_cell(scores[key])}" for key in shown)
            if text:
                lines.append(f"{self.method} less {name}: {text}")
        return "\n".join(lines)

    def _paired(self) -> list[str]:
        """A table of paired differences, or nothing without a method."""
        columns = [name for name in PAIRED if any(name in scores for scores in self.differences.values())]
        if not columns:
            return []
        header = [f"{self.method} less", *(HEADLINES[name] for name in columns)]
        lines = ["", "Paired differences, observation by observation:", "", _line(header)]
        lines.append(_line(["---"] * len(header)))
        for name, scores in self.differences.items():
            lines.append(_line([name, *(_cell(scores.get(column)) for column in columns)]))
        return lines

    def _notes(self, columns: Sequence[str]) -> list[str]:
        notes = [
            "- r, disk and CCC, disk: within 0.95 R, radial profile removed; over the frame the disk itself scores.",
        ]
        if "polarity_agreement" in columns:
            hale = next(iter(self.rows.values()))["polarity_agreement_hale"]
            notes.append(
                "- polarity: share of pixels above 100 G with the right sign, .5 by chance; Hale's law on the true "
                f"regions reaches {hale:.3f}. Gains: RMSE relative to the zero field's, SSIM by difference. The frame "
                "of a magnetogram is its disk."
            )
        ensembles = {row["members"]: row["expected_coverage"] for row in self.rows.values() if "members" in row}
        for members, expected in ensembles.items():
            notes.append(
                f"- coverage: of the central interval of {members} samples; {expected:.3f} is expected where truth and "
                "samples are alike."
            )
        undefined: dict[str, dict[int, list[str]]] = {}
        for name, row in self.rows.items():
            for key, count in row["undefined"].items():
                if key in columns:
                    undefined.setdefault(HEADLINES[key], {}).setdefault(count, []).append(name)
            if row["missing_pixels"]:
                notes.append(f"- {name}: {row['missing_pixels']} valid pixels of the truth have no prediction.")
        parts = [
            f"{label} {count} ({'all methods' if len(names) == len(self.rows) else ', '.join(names)})"
            for label, counts in undefined.items()
            for count, names in counts.items()
        ]
        if parts:
            notes.append(f"- undefined in so many of the {len(self.cases)} observations: {'; '.join(parts)}.")
        return notes + [f"- {name}: {remark}" for name, remark in self.remarks.items() if name in self.rows]


def compare_translations(
    predictions: Mapping[str, np.ndarray],
    cases: TranslationCases,
    *,
    samples: Mapping[str, np.ndarray] | None = None,
    method: str | None = None,
    block: str | None = None,
    num_resamples: int = 500,
    note: str = "",
    remarks: Mapping[str, str] | None = None,
    seed: int = 0,
    progress: bool = False,
) -> TranslationTable:
    """Scores rival translations of the same observations.

    Args:
        predictions: Name to (N, H, H) in physical units.
        cases: The held-out observations.
        samples: Name to (N, m, H, H), for those predictions that are means of ensembles.
        method: The row that the others are compared with, by paired differences.
        block: Length of the bootstrap's blocks; None: 27 days, or shorter where the observations span fewer than 12
            such blocks, which the table says.
        num_resamples: Of the bootstrap.
        note: What the data are, as "synthetic".
        remarks: Name to a remark that stands below the table.
        seed: Of the bootstrap.
        progress: Whether to show a bar.

    Returns:
        The table.

    Raises:
        ValueError: No predictions, or `samples` or `method` that none of them bears the name of.
    """
    samples = dict(samples or {})
    unknown = [name for name in (*samples, *([method] if method else [])) if name not in predictions]
    if not predictions or unknown:
        raise ValueError(f"predictions: expected {', '.join(unknown) or 'at least one'}, got {list(predictions)}.")
    rows = {
        name: fidelity_scores(
            values,
            cases.truth,
            modality=cases.target_modality,
            samples=samples.get(name),
            data_range=cases.data_range,
            times=list(cases.times.tz_convert(None)),
            b0=cases.b0,
        )
        for name, values in tqdm(predictions.items(), desc="scores", unit="method", disable=not progress)
    }
    block = fitting_block(cases.times) if block is None else block
    options = {"block": block, "num_resamples": num_resamples, "seed": seed}
    bounded = {**options, "bounds": BOUNDS}
    intervals = {name: _intervals(row["per_sample"], cases.times, bounded) for name, row in rows.items()}
    differences = {}
    bounded = {**options, "bounds": {name: (low - high, high - low) for name, (low, high) in BOUNDS.items()}}
    if method is not None:
        ours = rows[method]["per_sample"]
        for name, row in rows.items():
            common = [key for key in row["per_sample"] if key in ours]
            if name != method:
                apart = {key: np.subtract(ours[key], row["per_sample"][key]) for key in common}
                differences[name] = _intervals(apart, cases.times, bounded)
    return TranslationTable(cases, rows, intervals, differences, method, block, note, dict(remarks or {}))


def fitting_block(times: pd.DatetimeIndex) -> str:
    """27 days; or a twelfth of the span of the times in whole hours, where that is shorter."""
    span = times.max() - times.min()
    if span / FEWEST_BLOCKS >= pd.Timedelta(ROTATION):
        return ROTATION
    hours = max(1, int(span / FEWEST_BLOCKS / pd.Timedelta("1h")))
    return f"{hours // 24}D" if hours % 24 == 0 else f"{hours}h"


def write_report(table: TranslationTable, folder: str | Path, *, stem: str = "fidelity") -> list[Path]:
    """Writes `fidelity.json` and `fidelity.md`, each whole or not at all.

    Args:
        table: The scores.
        folder: Where to.
        stem: Of the file names.

    Returns:
        The files written.
    """
    folder, written = Path(folder), []
    folder.mkdir(parents=True, exist_ok=True)
    for suffix, text in (("json", json.dumps(table.to_dict(), indent=2)), ("md", table.to_markdown())):
        path = folder / f"{stem}.{suffix}"
        partial = path.with_name(path.name + ".partial")
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
        written.append(path)
    return written


def _intervals(
    per_sample: Mapping[str, Any], times: pd.DatetimeIndex, options: Mapping[str, Any]
) -> dict[str, BootstrapInterval]:
    names = list(per_sample)
    values = np.array([per_sample[name] for name in names], dtype=float).T  # (N, K)
    values[~np.isfinite(values)] = np.nan

    def means(rows: np.ndarray) -> dict[str, float]:
        defined = np.isfinite(rows)
        count = defined.sum(axis=0)
        total = np.where(defined, rows, 0).sum(axis=0)
        return dict(zip(names, np.where(count > 0, total / np.maximum(count, 1), np.nan), strict=True))

    return block_bootstrap(means, values, times=times, **options)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float | np.floating):
        return float(value) if np.isfinite(value) else None
    return value


def _cell(interval: BootstrapInterval | None) -> str:
    if interval is None or not _defined(interval):
        return "-"
    size = max(abs(interval.low), abs(interval.high)) if np.isfinite(interval.low) else abs(interval.estimate)
    digits = 3 if size < 10 else 1 if size < 1000 else 0
    # adding zero turns a rounded -0.0 into 0.0
    text, low, high = (
        f"{round(value, digits) + 0.0:.{digits}f}" for value in (interval.estimate, interval.low, interval.high)
    )
    return f"{text} [{low}, {high}]" if np.isfinite(interval.low) else text


def _defined(interval: BootstrapInterval | None) -> bool:
    return interval is not None and bool(np.isfinite(interval.estimate))


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


__all__ = ["TranslationTable", "compare_translations", "fitting_block", "write_report"]
