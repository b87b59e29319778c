"""Rival ways to a flare forecast, each repeated with several seeds: mean, standard error, and whether two are apart."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from ..data.flare_observations import FlareObservations
from ..models.calibration import calibrated_probabilities
from .bootstrap import block_bootstrap
from .calibration import choose_thresholds, fit_calibration
from .flare_skill.skill_scores import CLASS_NAMES, binary_scores, exceedance
from .stratified import SCORE_BOUNDS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Probabilities are kept so far from 0 and 1, whose log-odds are infinite, before they are calibrated.
_LEAST_PROBABILITY = 1e-4

_TRIES = "tries"  # in the metadata of a file of forecasts

SCORES = ("bss", "tss", "auc")
_TITLES = {"bss": "Brier skill score", "tss": "true skill statistic", "auc": "area under ROC"}


def recalibrated(forecast: Mapping[str, np.ndarray], labels: Any, method: str = "platt") -> dict[str, np.ndarray]:
    """A forecast calibrated on the validation part, as a network's logits are by `fit_calibration`.

    Args:
        forecast: Part to (N, 4) class probabilities, `validation` among them; rows of NaN stay.
        labels: (Nv,) classes of the validation part.
        method: As for `fit_calibration`.

    Returns:
        Part to (N, 4) calibrated probabilities.
    """
    logits = {part: np.log(np.clip(values, _LEAST_PROBABILITY, 1)) for part, values in forecast.items()}
    known = np.isfinite(logits["validation"]).all(axis=1)
    calibration = fit_calibration(logits["validation"][known], np.asarray(labels)[known], method)
    calibrated = {}
    for part, values in logits.items():
        calibrated[part] = np.full(values.shape, np.nan)
        known = np.isfinite(values).all(axis=1)
        if known.any():
            calibrated[part][known] = calibrated_probabilities(torch.from_numpy(values[known]), calibration).numpy()
    return calibrated


def save_forecasts(
    path: str | Path,
    forecasts: Mapping[str, Mapping[str, np.ndarray]],
    tries: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
) -> None:
    """Keeps the forecasts of one seed, as a whole or not at all.

    Args:
        path: A safetensors file; its folder is made if absent.
        forecasts: Arm to part to probabilities.
        tries: Arm to the tries that validation chose among, as `best_flare_fit` gives them.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    rows = ((f"{arm}/{part}", p) for arm, parts in forecasts.items() for part, p in parts.items())
    tensors = {name: np.ascontiguousarray(values, dtype=np.float64) for name, values in rows}
    save_file(tensors, partial, metadata={_TRIES: json.dumps(tries or {})})
    partial.replace(path)


def load_forecasts(path: str | Path) -> dict[str, dict[str, np.ndarray]]:
    """What `save_forecasts` kept."""
    forecasts: dict[str, dict[str, np.ndarray]] = {}
    for name, values in load_file(path).items():
        arm, _, part = name.rpartition("/")
        forecasts.setdefault(arm, {})[part] = values
    return forecasts


def load_tries(path: str | Path) -> dict[str, list[dict[str, Any]]]:
    """The tries that `save_forecasts` kept beside the forecasts; none of a file that was kept without them."""
    with safe_open(path, framework="numpy") as file:
        return json.loads((file.metadata() or {}).get(_TRIES, "{}"))


def seed_report(
    folder: str | Path,
    parts: Mapping[str, FlareObservations],
    arms: Mapping[str, Sequence[Mapping[str, np.ndarray]]],
    *,
    claim: tuple[str, str] | None = None,
    ceiling: str | None = None,
    headline: str = "M+",
    note: str = "",
    choices: str = "",
    run: Mapping[str, Any] | None = None,
    tries: Mapping[str, Sequence[Any]] | None = None,
    block: str = "27D",
    num_resamples: int = 500,
    level: float = 0.95,
) -> dict[str, Any]:
    """Scores every arm and seed on the same test samples and writes `seeds.json`, `seeds.md` and a figure.

    The Brier skill is against the class frequencies of `parts["train"]`; the TSS is at the threshold that is best on
    the validation part, chosen for every arm and seed by itself. Two kinds of uncertainty stand side by side: the
    standard error over seeds (choice of labels, initial weights) on the one test part, and the bootstrap interval of
    the mean over seeds (what another test part of the same phase of the cycle might give).

    Args:
        folder: Where to write; made if absent.
        parts: `train`, `validation` and `test`.
        arms: Name to forecasts, one a seed: `{"validation": (Nv, 4), "test": (Nt, 4)}` class probabilities, NaN where
            an arm cannot forecast; such samples are left out for all.
        claim: Two arms: the first is said to be better than the second.
        ceiling: The arm that nothing can beat, as the true hazard of a synthetic Sun; drawn as a line.
        headline: The boundary of the figure and of the claim.
        note: What the data are; stands in titles.
        choices: In words, what was calibrated and chosen on the validation part, and among how many.
        run: Facts to write down.
        tries: Arm to what was tried and chosen on the validation part, an entry a seed; None of an unknown one.
        block: Length of the bootstrap's blocks.
        num_resamples: Number of resamples.
        level: Nominal coverage of the intervals.

    Returns:
        What `seeds.json` holds: `data`, `run`, `samples`, `tries`, `scores` (boundary, arm, score: `mean`,
        `standard_error`, `seeds`, `low`, `high`; the error is null for a single seed), `claim` (each score of it: both
        means and errors, and `holds`: both errors are known, and mean - error of the first is above mean + error of the
        second; and `holds` for all of them).

    Raises:
        ValueError: An unknown boundary or arm, or no sample that all arms forecast.
    """
    boundaries = [f"{name}+" for name in CLASS_NAMES[1:]]
    unknown = [name for name in (*(claim or ()), *filter(None, [ceiling])) if name not in arms]
    if headline not in boundaries or unknown:
        raise ValueError(
            f"headline, claim, ceiling: expected {', '.join(boundaries)} and arms, got {[headline, *unknown]}."
        )
    kept = {}
    for part in ("validation", "test"):
        finite = [np.isfinite(forecast[part]).all(axis=1) for forecasts in arms.values() for forecast in forecasts]
        kept[part] = np.all(finite, axis=0)
        if not kept[part].any():
            raise ValueError(f"arms: expected samples of the {part} part that all of them forecast, got none.")
    labels = {part: parts[part].classes[kept[part]] for part in kept}
    counts = np.bincount(parts["train"].classes, minlength=len(CLASS_NAMES))
    options = {"block": block, "num_resamples": num_resamples, "level": level}
    times = parts["test"].times[kept["test"]]
    result: dict[str, Any] = {
        "data": note,
        "synthetic": parts["test"].labels.attrs.get("source") == "synthetic",
        "headline": headline,
        "run": dict(run or {}),
        "protocol": {
            **options,
            "threshold": "largest TSS on the validation part",
            "bss": "against training climatology",
            "choices": choices,
        },
        "samples": {
            name: {"count": len(part), "first": str(part.times.min()), "last": str(part.times.max())}
            | {"classes": np.bincount(part.classes, minlength=len(CLASS_NAMES)).tolist()}
            for name, part in parts.items()
        },
        "tries": dict(tries or {}),
        "left_out": {part: int((~mask).sum()) for part, mask in kept.items()},
        "scores": {},
    }
    names = ["c_plus", "m_plus", "x_plus"]
    for column, boundary in enumerate(boundaries):
        base = float(counts[column + 1 :].sum() / counts.sum())
        observed = labels["test"] > column
        rows = {}
        for arm, forecasts in arms.items():
            above = np.stack([exceedance(forecast["test"][kept["test"]])[:, column] for forecast in forecasts], axis=1)
            limits = [
                choose_thresholds(forecast["validation"][kept["validation"]], labels["validation"]).get(
                    names[column], 0.5
                )
                for forecast in forecasts
            ]
            rows[arm] = _scores(above, observed, limits, base, times, options)
        result["scores"][boundary] = rows
    if claim is not None:
        result["claim"] = _claim(result["scores"][headline], claim)
    folder = Path(folder)
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    seeds_figure(result, ceiling=ceiling).savefig(folder / "figures" / "seeds.png", dpi=150)
    result["figures"] = ["figures/seeds.png"]
    for path, text in (("seeds.json", json.dumps(result, indent=2) + "\n"), ("seeds.md", seeds_markdown(result))):
        partial = folder / f"{path}.part"
        partial.write_text(text, encoding="utf-8")
        partial.replace(folder / path)
    return result


def _scores(
    above: np.ndarray,
    observed: np.ndarray,
    limits: Sequence[float],
    base: float,
    times: Any,
    options: Mapping[str, Any],
) -> dict[str, dict[str, Any]]:
    """Scores of one arm: (N, seeds) probabilities, (N,) bool."""

    def each(probabilities: np.ndarray, events: np.ndarray) -> dict[str, np.ndarray]:
        scores = [binary_scores(p, events, limit, base) for p, limit in zip(probabilities.T, limits, strict=True)]
        return {name: np.array([row[name] for row in scores], dtype=float) for name in SCORES}

    def mean(probabilities: np.ndarray, events: np.ndarray) -> dict[str, float]:
        return {name: float(values.mean()) for name, values in each(probabilities, events).items()}

    single = each(above, observed)
    rows: dict[str, dict[str, Any]] = {}
    intervals = block_bootstrap(mean, above, observed, times=times, bounds=SCORE_BOUNDS, **options)
    for name, values in single.items():
        error = float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None
        row = {"mean": float(values.mean()), "low": intervals[name].low, "high": intervals[name].high}
        finite = {key: value if np.isfinite(value) else None for key, value in row.items()}
        rows[name] = {**finite, "standard_error": error if error is None or np.isfinite(error) else None}
        rows[name]["seeds"] = [float(value) if np.isfinite(value) else None for value in values]
    return rows


def _claim(scores: Mapping[str, Any], claim: tuple[str, str]) -> dict[str, Any]:
    better, worse = claim
    result: dict[str, Any] = {"better": better, "worse": worse}
    for name in ("bss", "tss"):
        ours, theirs = scores[better][name], scores[worse][name]
        if ours["mean"] is None or theirs["mean"] is None:  # events, or their absence, are missing in the test part
            result[name] = {"difference": None, "between_the_error_bars": None, "holds": False}
            continue
        gap = ours["mean"] - theirs["mean"]
        errors = ours["standard_error"], theirs["standard_error"]
        apart = None if None in errors else gap - sum(errors)  # a single seed says nothing on the spread of seeds
        result[name] = {"difference": gap, "between_the_error_bars": apart, "holds": apart is not None and apart > 0}
    result["holds"] = result["bss"]["holds"] and result["tss"]["holds"]
    return result


def seeds_markdown(result: Mapping[str, Any]) -> str:
    """The report for reading.

    Args:
        result: What `seed_report` returns.

    Returns:
        Markdown.
    """
    kind = "**Synthetic** data: nothing here is a result on the real Sun. " if result["synthetic"] else ""
    protocol = result["protocol"]
    title = f" ({result['data']})" if result["data"] else ""
    lines = [
        f"# Flare forecasts over several seeds{title}",
        "",
        f"{kind}Mean over seeds and its standard error; in brackets the {100 * protocol['level']:g}% interval of the "
        f"mean from blocks of {protocol['block']} of the test part. Thresholds have the largest TSS on the validation "
        "part; the Brier skill is against the class frequencies of the training part. A share of the labels is one of "
        "the training labels alone: calibration and thresholds use all labels of the validation part, and so does "
        f"whatever else is chosen there. {protocol['choices']}".rstrip(),
        "",
        "| part | samples | first | last | " + " | ".join(CLASS_NAMES) + " |",
        "|---|---:|---|---|" + "---:|" * len(CLASS_NAMES),
    ]
    for name, part in result["samples"].items():
        classes = " | ".join(map(str, part["classes"]))
        lines.append(f"| {name} | {part['count']} | {part['first'][:10]} | {part['last'][:10]} | {classes} |")
    first = result["headline"]
    for boundary in [first, *[name for name in result["scores"] if name != first]]:
        lines += [
            "",
            f"## {boundary}",
            "",
            "| forecast | seeds | " + " | ".join(_TITLES[name] for name in SCORES) + " |",
        ]
        lines.append("|---|---:|" + "---:|" * len(SCORES))
        for arm, row in result["scores"][boundary].items():
            cells = " | ".join(_cell(row[name]) for name in SCORES)
            lines.append(f"| {arm} | {len(row['bss']['seeds'])} | {cells} |")
    if "claim" in result:
        claim = result["claim"]
        verdict = "holds" if claim["holds"] else "does **not** hold"
        lines += ["", f"## Is {claim['better']} better than {claim['worse']}?", ""]
        lines.append(f"The claim {verdict}: mean and standard error do not overlap where the last column is positive.")
        lines += ["", "| score | difference of means | between the error bars |", "|---|---:|---:|"]
        for name in ("bss", "tss"):
            gaps = [claim[name][key] for key in ("difference", "between_the_error_bars")]
            lines.append(f"| {_TITLES[name]} | " + " | ".join("-" if x is None else f"{x:+.3f}" for x in gaps) + " |")
    return "\n".join([*lines, "", *[f"![scores over seeds]({path})" for path in result.get("figures", [])], ""])


def _cell(row: Mapping[str, Any]) -> str:
    if row["mean"] is None:
        return "-"
    error = "" if row["standard_error"] is None else f" ± {row['standard_error']:.3f}"
    interval = "" if row["low"] is None or row["high"] is None else f" [{row['low']:.2f}, {row['high']:.2f}]"
    return f"{row['mean']:.3f}{error}{interval}"


def seeds_figure(result: Mapping[str, Any], *, ceiling: str | None = None) -> "Figure":
    """Draws every arm's seeds, mean and standard error, for the Brier skill and the TSS.

    Args:
        result: What `seed_report` returns.
        ceiling: An arm to draw as a line.

    Returns:
        The figure.
    """
    from matplotlib.figure import Figure

    scores = result["scores"][result["headline"]]
    arms = [name for name in scores if name != ceiling]
    figure = Figure(figsize=(9.0, 1.6 + 0.42 * len(arms)), layout="constrained")
    for axes, name in zip(figure.subplots(1, 2, sharey=True), ("bss", "tss"), strict=True):
        for place, arm in enumerate(reversed(arms)):
            row = scores[arm][name]
            values = [value for value in row["seeds"] if value is not None]
            axes.plot(values, np.full(len(values), place), "o", color="0.7", markersize=4)
            if row["mean"] is not None:
                bar = row["standard_error"]
                axes.errorbar(row["mean"], place, xerr=bar, fmt="D", color="#1f4e79", markersize=5, capsize=3)
        if ceiling is not None and scores[ceiling][name]["mean"] is not None:
            axes.axvline(scores[ceiling][name]["mean"], color="#c1121f", linewidth=1, label=ceiling)
            axes.legend(frameon=False, fontsize="small", loc="lower right")
        axes.axvline(0, color="0.8", linewidth=1)
        axes.set(xlabel=f"{_TITLES[name]}, {result['headline']}", yticks=range(len(arms)), yticklabels=arms[::-1])
    kind = "Synthetic Sun: " if result["synthetic"] else ""
    figure.suptitle(f"{kind}each seed, and mean ± standard error over seeds", fontsize=11)
    return figure


__all__ = [
    "SCORES",
    "load_forecasts",
    "load_tries",
    "recalibrated",
    "save_forecasts",
    "seed_report",
    "seeds_figure",
    "seeds_markdown",
]
