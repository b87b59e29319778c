"""Scores of probabilistic flare forecasts: arrays in, numbers out, NaN where a score is undefined.

NumPy only, no import from the package: the `evaluate` library copies this file beside the metric module.
"""

from typing import Any

import numpy as np

CLASS_NAMES = ("0AB", "C", "M", "X")

# The scores that may be undefined (a class absent, no warning issued); they are counted when they come out NaN.
BINARY_SCORES = ("tss", "hss", "pod", "pofd", "far", "csi", "acc", "bias", "brier", "bss", "auc")


def contingency_table(predicted: Any, observed: Any) -> tuple[int, int, int, int]:
    """Counts hits, false alarms, misses and correct rejections.

    Args:
        predicted: (N,) bool, warnings.
        observed: (N,) bool, events.

    Returns:
        `(tp, fp, fn, tn)`.
    """
    predicted, observed = np.asarray(predicted, dtype=bool), np.asarray(observed, dtype=bool)
    tp = int((predicted & observed).sum())
    fp, fn = int(predicted.sum()) - tp, int(observed.sum()) - tp
    return tp, fp, fn, len(observed) - tp - fp - fn


def table_scores(tp: float, fp: float, fn: float, tn: float) -> dict[str, float]:
    """Scores of a 2 x 2 table; a zero denominator gives NaN.

    Args:
        tp: Hits.
        fp: False alarms.
        fn: Misses.
        tn: Correct rejections.

    Returns:
        `pod` tp/(tp+fn); `pofd` fp/(fp+tn), the false alarm *rate*; `far` fp/(tp+fp), the false alarm *ratio*; `csi`
        tp/(tp+fp+fn); `acc`; `bias` (tp+fp)/(tp+fn); `tss` = POD - POFD (Hanssen and Kuipers 1965; Bloomfield et al.
        2012, doi:10.1088/2041-8205/747/2/L41); `hss` 2(tp tn - fp fn)/((tp+fn)(fn+tn)+(tp+fp)(fp+tn)) (Heidke 1926).
    """
    pod, pofd = _ratio(tp, tp + fn), _ratio(fp, fp + tn)
    return {
        "tss": pod - pofd,
        "hss": _ratio(2 * (tp * tn - fp * fn), (tp + fn) * (fn + tn) + (tp + fp) * (fp + tn)),
        "pod": pod,
        "pofd": pofd,
        "far": _ratio(fp, tp + fp),
        "csi": _ratio(tp, tp + fp + fn),
        "acc": _ratio(tp + tn, tp + fp + fn + tn),
        "bias": _ratio(tp + fp, tp + fn),
    }


def roc_auc(probabilities: Any, observed: Any) -> float:
    """Area under the ROC curve: the chance that an event was given more than a non-event, ties counting half.

    Args:
        probabilities: (N,) float.
        observed: (N,) bool.

    Returns:
        The area; NaN if events or non-events are absent.
    """
    probabilities, observed = np.asarray(probabilities, dtype=float), np.asarray(observed, dtype=bool)
    events, others = int(observed.sum()), int((~observed).sum())
    if not events or not others:
        return float("nan")
    _, inverse, counts = np.unique(probabilities, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    return float((ranks[observed].sum() - events * (events + 1) / 2) / (events * others))


def brier_skill(probabilities: Any, observed: Any, reference: float) -> float:
    """Brier skill score against a constant forecast.

    Args:
        probabilities: (N,) float.
        observed: (N,) bool.
        reference: The constant probability, as the climatology of the training part or of the sample.

    Returns:
        1 - BS / BS_reference; NaN where the constant forecast is perfect (no event, and climatology 0).
    """
    observed = np.asarray(observed, dtype=float)
    brier = np.mean((np.asarray(probabilities, dtype=float) - observed) ** 2)
    return 1 - _ratio(brier, np.mean((reference - observed) ** 2))


def gerrity_weights(frequencies: Any) -> np.ndarray:
    """Gerrity's equitable scoring matrix for ordered classes.

    With p_r the observed frequencies, a_r = (1 - P_r) / P_r, P_r = p_1 + ... + p_r, and b = 1 / (K - 1):
    s_nn = b (sum_{r<n} 1/a_r + sum_{r>=n} a_r), s_mn = s_nm = b (sum_{r<m} 1/a_r - (n - m) + sum_{r>=n} a_r), m < n,
    r running to K - 1.

    Args:
        frequencies: (K,) observed frequencies (or counts) of the classes, in order.

    Returns:
        (K, K) float64 rewards; all NaN where the lowest or the highest class was never observed.

    Source: Gerrity (1992), Monthly Weather Review 120, 2709, doi:10.1175/1520-0493(1992)120<2709:ANOGAM>2.0.CO;2.
    """
    frequencies = np.asarray(frequencies, dtype=float)
    classes = len(frequencies)
    if frequencies[0] <= 0 or frequencies[-1] <= 0:
        return np.full((classes, classes), np.nan)
    below = np.cumsum(frequencies)[:-1] / frequencies.sum()
    odds = (1 - below) / below
    rewards = np.empty((classes, classes))
    for m in range(classes):
        for n in range(m, classes):
            rewards[m, n] = rewards[n, m] = ((1 / odds[:m]).sum() - (n - m) + odds[n:].sum()) / (classes - 1)
    return rewards


def gerrity_score(table: Any) -> float:
    """Gandin-Murphy-Gerrity score (GMGS) of a table of ordered classes: 1 perfect, 0 for no skill.

    It equals the mean of the K - 1 true skill statistics of the table cut at each class boundary.

    Args:
        table: (K, K) counts, forecast class by row, observed class by column.

    Returns:
        The score; NaN where the lowest or the highest class was never observed.
    """
    table = np.asarray(table, dtype=float)
    return float((table * gerrity_weights(table.sum(axis=0))).sum() / table.sum())


def reliability_bins(probabilities: Any, observed: Any, num_bins: int = 10) -> dict[str, list]:
    """Counts forecasts in equal bins of probability.

    Args:
        probabilities: (N,) float in [0, 1].
        observed: (N,) bool.
        num_bins: Number of bins; the last one includes 1.

    Returns:
        Lists of `num_bins` entries: `low`, `high` (edges), `count`, `mean_probability` and `observed_frequency` (NaN
        for an empty bin).
    """
    probabilities, observed = np.asarray(probabilities, dtype=float), np.asarray(observed, dtype=float)
    edges = np.round(
        np.linspace(0, 1, num_bins + 1), 12
    )  # 0.3, not 0.30000000000000004: a forecast of 0.3 begins its bin
    index = (np.searchsorted(edges, probabilities, side="right") - 1).clip(0, num_bins - 1)
    count = np.bincount(index, minlength=num_bins)
    filled = np.where(count > 0, count, np.nan)
    return {
        "low": edges[:-1].tolist(),
        "high": edges[1:].tolist(),
        "count": count.tolist(),
        "mean_probability": (np.bincount(index, probabilities, num_bins) / filled).tolist(),
        "observed_frequency": (np.bincount(index, observed, num_bins) / filled).tolist(),
    }


def binary_scores(
    probabilities: Any, observed: Any, threshold: float = 0.5, climatology: float | None = None
) -> dict[str, Any]:
    """All scores of forecasts of one yes/no event.

    Args:
        probabilities: (N,) float in [0, 1].
        observed: (N,) bool.
        threshold: A warning is issued at this probability or above. Choose it on validation data.
        climatology: Event frequency of the training part, for `bss_training`.

    Returns:
        The scores of `table_scores`; `brier`; `auc`; `bss_sample` and, where `climatology` is given, `bss_training`;
        `bss` is the latter where it exists and `bss_reference` says which; `threshold`, `base_rate`, `count`, and the
        table's `tp, fp, fn, tn`.
    """
    probabilities, observed = np.asarray(probabilities, dtype=float), np.asarray(observed, dtype=bool)
    tp, fp, fn, tn = contingency_table(probabilities >= threshold, observed)
    scores: dict[str, Any] = table_scores(tp, fp, fn, tn)
    scores["brier"] = float(np.mean((probabilities - observed) ** 2))
    scores["auc"] = roc_auc(probabilities, observed)
    scores["bss_sample"] = brier_skill(probabilities, observed, float(observed.mean()))
    if climatology is not None:
        scores["bss_training"] = brier_skill(probabilities, observed, float(climatology))
    scores["bss_reference"] = "sample" if climatology is None else "training"
    scores["bss"] = scores[f"bss_{scores['bss_reference']}"]
    return scores | {
        "threshold": float(threshold),
        "base_rate": float(observed.mean()),
        "count": len(observed),
        "tp": tp,
        "fp": fp,
        "fn": fn,
        "tn": tn,
    }


def exceedance(probabilities: Any) -> np.ndarray:
    """Turns class probabilities into those of reaching each class but the lowest.

    Args:
        probabilities: (N, K) float.

    Returns:
        (N, K - 1) float64; for the classes 0AB, C, M, X the columns are C+, M+, X+.
    """
    probabilities = np.asarray(probabilities, dtype=float)
    return np.cumsum(probabilities[:, ::-1], axis=1)[:, ::-1][:, 1:].clip(0, 1)


def flare_scores(
    predictions: Any,
    references: Any,
    threshold: Any = 0.5,
    climatology: Any = None,
    decision: str = "argmax",
    headline: str = "M+",
    num_bins: int = 10,
) -> dict[str, Any]:
    """Scores probabilities of flares, yes/no or ordered classes.

    Args:
        predictions: (N,) probabilities of the event, or (N, K) class probabilities whose rows sum to 1.
        references: (N,) 0/1, or the classes 0..K-1. Unknown windows (label -1) have to be dropped before.
        threshold: Probability from which a warning is issued; for classes one for all boundaries, or K - 1 of them, or
            a dict by boundary as `{"C+": .5, "M+": .3, "X+": .05}`.
        climatology: Frequencies of the training part: the event's, or K class frequencies.
        decision: How a class is chosen for GMGS: `"argmax"`, or `"threshold"` (the highest boundary that is warned of).
        headline: The boundary whose scores stand at the top of the result for classes.
        num_bins: Bins of the reliability table.

    Returns:
        For a yes/no event the scores of `binary_scores`, `reliability`, and `undefined`, the number of scores that are
        NaN, with their names in `undefined_scores`. For classes the same of the headline boundary, and besides a dict
        a boundary under `"C+"`, `"M+"`, `"X+"` (`"1+"`, `"2+"`, ... unless K is 4), `gmgs`, `class_acc`, `rps` (sum
        over the boundaries of their Brier scores; Epstein 1969), `rpss_sample`, `rpss_training`, `class_table`
        (forecast by row, observed by column) and `headline`.

    Raises:
        ValueError: As `as_forecasts`; a threshold or climatology that is no probability or of another length, or an
            unknown boundary or decision.
    """
    predictions, references = as_forecasts(predictions, references)
    if predictions.ndim == 1:
        if isinstance(threshold, dict) or np.ndim(threshold) != 0:
            raise ValueError(f"threshold: expected one number for a yes/no event, got {threshold!r}.")
        if np.ndim(climatology) != 0:
            raise ValueError(f"climatology: expected one frequency for a yes/no event, got {climatology!r}.")
        limit = float(_shares(threshold, "threshold"))
        base_rate = None if climatology is None else float(_shares(climatology, "climatology"))
        scores = binary_scores(predictions, references == 1, limit, base_rate)
        scores["reliability"] = reliability_bins(predictions, references == 1, num_bins)
        return scores | _undefined({"": scores})

    classes = predictions.shape[1]
    names = [f"{name}+" for name in (CLASS_NAMES if classes == len(CLASS_NAMES) else map(str, range(classes)))][1:]
    thresholds = _thresholds(threshold, names)
    frequencies = None if climatology is None else _numbers(climatology, "climatology")
    if frequencies is not None and frequencies.shape != (classes,):
        raise ValueError(f"climatology: expected {classes} class frequencies, got shape {frequencies.shape}.")
    if frequencies is not None and not (frequencies.min() >= 0 and 0 < frequencies.sum() < np.inf):
        raise ValueError(f"climatology: expected frequencies of zero or more, got {frequencies.tolist()}.")
    if headline not in names:
        if headline != "M+":  # the default, which classes other than 0AB, C, M, X do not have
            raise ValueError(f"headline: expected one of {names}, got {headline!r}.")
        headline = names[0]

    above = exceedance(predictions)
    base = None if frequencies is None else exceedance(frequencies[None] / frequencies.sum())[0]
    boundaries: dict[str, dict[str, Any]] = {}
    for k, name in enumerate(names):
        observed = references >= k + 1
        boundaries[name] = binary_scores(above[:, k], observed, thresholds[k], None if base is None else base[k])
        boundaries[name]["reliability"] = reliability_bins(above[:, k], observed, num_bins)

    if decision == "argmax":
        chosen = predictions.argmax(axis=1)
    elif decision == "threshold":
        warned = above >= thresholds
        chosen = np.where(warned.any(axis=1), classes - 1 - warned[:, ::-1].argmax(axis=1), 0)
    else:
        raise ValueError(f"decision: expected 'argmax' or 'threshold', got {decision!r}.")
    table = np.zeros((classes, classes), dtype=int)
    np.add.at(table, (chosen, references), 1)
    cumulative = references[:, None] >= np.arange(1, classes)
    ranked = {"sample": cumulative.mean(axis=0)} | ({} if base is None else {"training": base})
    rps = float(((above - cumulative) ** 2).sum(axis=1).mean())
    whole: dict[str, Any] = {
        "gmgs": gerrity_score(table),
        "class_acc": float((chosen == references).mean()),
        "rps": rps,
    }
    for name, constant in ranked.items():
        whole[f"rpss_{name}"] = 1 - _ratio(rps, ((constant - cumulative) ** 2).sum(axis=1).mean())
    undefined = _undefined({"": whole} | {f"{name} ": values for name, values in boundaries.items()})
    return boundaries[headline] | whole | {"headline": headline, "class_table": table.tolist()} | boundaries | undefined


def flatten_scores(scores: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """Flat numbers for a log or the Trainer: `{"M+": {"tss": .5}}` becomes `{"m_plus_tss": .5}`.

    Args:
        scores: What `flare_scores` returned.
        prefix: Put before every name.

    Returns:
        The scalar numbers by name; tables, lists and texts are left out.
    """
    flat: dict[str, float] = {}
    for name, value in scores.items():
        if isinstance(value, dict) and name.endswith("+"):
            flat |= flatten_scores(value, f"{prefix}{name[:-1].lower()}_plus_")
        elif isinstance(value, int | float | np.number):
            flat[prefix + name] = float(value)
    return flat


def best_threshold(probabilities: Any, observed: Any, score: str = "tss") -> tuple[float, float]:
    """The warning threshold with the largest score. To be called on validation data, never on test data.

    Args:
        probabilities: (N,) float.
        observed: (N,) bool.
        score: A score of `table_scores` for which more is better: `"tss"`, `"hss"`, `"csi"`, `"acc"`.

    Returns:
        `(threshold, score)`; the threshold lies midway between two forecasts that occurred (among equals, the one
        nearest to 0.5).

    Raises:
        ValueError: The score is defined for no threshold.
    """
    probabilities, observed = np.asarray(probabilities, dtype=float), np.asarray(observed, dtype=bool)
    levels, inverse = np.unique(probabilities, return_inverse=True)
    hits = np.cumsum(np.bincount(inverse, observed, len(levels))[::-1])[::-1]
    warned = np.cumsum(np.bincount(inverse, minlength=len(levels))[::-1])[::-1]
    events, count = observed.sum(), len(observed)
    values = np.array(
        [
            table_scores(tp, w - tp, events - tp, count - w - events + tp)[score]
            for tp, w in zip(hits, warned, strict=True)
        ]
    )
    if np.isnan(values).all():
        raise ValueError(f"{score}: expected events and non-events in the validation part, got {events} of {count}.")
    middle = np.concatenate([levels[:1], (levels[1:] + levels[:-1]) / 2])
    best = np.flatnonzero(values >= np.nanmax(values) - 1e-12)
    chosen = best[np.argmin(np.abs(middle[best] - 0.5))]
    return float(middle[chosen]), float(values[chosen])


def _ratio(numerator: float, denominator: float) -> float:
    return float(numerator) / float(denominator) if denominator else float("nan")


def _undefined(groups: dict[str, dict[str, Any]]) -> dict[str, Any]:
    names = [
        f"{prefix}{name}"
        for prefix, group in groups.items()
        for name, value in group.items()
        if isinstance(value, float) and np.isnan(value)
    ]
    return {"undefined": len(names), "undefined_scores": names}


def _thresholds(threshold: Any, names: list[str]) -> np.ndarray:
    if isinstance(threshold, dict):
        if set(threshold) != set(names):
            raise ValueError(f"threshold: expected the boundaries {names}, got {sorted(threshold)}.")
        threshold = [threshold[name] for name in names]
    values = _shares(threshold, "threshold")
    if values.ndim and values.shape != (len(names),):
        raise ValueError(f"threshold: expected one number or {len(names)} ({names}), got shape {values.shape}.")
    return np.broadcast_to(values, (len(names),))


def _numbers(values: Any, name: str) -> np.ndarray:
    """Anything that holds numbers as float64; missing ones become NaN."""
    if hasattr(values, "detach"):  # a tensor, perhaps with a gradient, on a device, or of a type that NumPy lacks
        values = values.detach().cpu().double()
    try:
        return np.asarray(values, dtype=float)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: expected numbers, got {type(values).__name__} ({error}).") from error


def _shares(values: Any, name: str) -> np.ndarray:
    shares = _numbers(values, name)
    if not ((shares >= 0) & (shares <= 1)).all():
        raise ValueError(f"{name}: expected probabilities in [0, 1], got {values!r}.")
    return shares


def as_forecasts(predictions: Any, references: Any) -> tuple[np.ndarray, np.ndarray]:
    """Checks forecasts and what happened, and makes arrays of them.

    Args:
        predictions: (N,) probabilities of the event, or (N, K) class probabilities: a list, array, tensor or pandas
            object.
        references: (N,) 0/1, or the classes 0..K-1, likewise.

    Returns:
        float64 array (N,) or (N, K), and int64 array (N,).

    Raises:
        ValueError: Shapes that do not fit, values that are no probabilities or no classes, unknown labels, no sample.
    """
    predictions, references = _numbers(predictions, "predictions"), _numbers(references, "references")
    if predictions.ndim not in (1, 2) or references.ndim != 1 or len(predictions) != len(references):
        raise ValueError(
            "expected predictions (N,) or (N, K) and references (N,), got shapes "
            f"{predictions.shape} and {references.shape}."
        )
    if not len(references):
        raise ValueError("expected at least one forecast, got none.")
    if predictions.ndim == 2 and predictions.shape[1] < 2:
        raise ValueError(
            f"predictions: expected two or more classes, or (N,) for a yes/no event, got shape {predictions.shape}."
        )
    if not (np.isfinite(predictions).all() and predictions.min() >= 0 and predictions.max() <= 1 + 1e-6):
        raise ValueError(
            f"predictions: expected probabilities in [0, 1], got values in [{np.min(predictions):.4g}, "
            f"{np.max(predictions):.4g}]; turn logits into probabilities first."
        )
    if predictions.ndim == 2:
        sums = predictions.sum(axis=1)
        worst = sums[np.abs(sums - 1).argmax()]
        if abs(worst - 1) > 1e-2:  # a softmax in bfloat16 misses 1 by some thousandths
            raise ValueError(
                f"predictions: expected class probabilities that sum to 1 in every row, got a row of sum {worst:.4g}."
            )
    highest = 1 if predictions.ndim == 1 else predictions.shape[1] - 1
    found = np.unique(references)
    if not np.isin(found, np.arange(highest + 1)).all():
        raise ValueError(
            f"references: expected whole numbers 0..{highest}, got {found[:6].tolist()}; drop unknown windows "
            "(label -1, not covered) before scoring."
        )
    return predictions, references.astype(np.int64)


__all__ = [
    "BINARY_SCORES",
    "CLASS_NAMES",
    "as_forecasts",
    "best_threshold",
    "binary_scores",
    "brier_skill",
    "contingency_table",
    "exceedance",
    "flare_scores",
    "flatten_scores",
    "gerrity_score",
    "gerrity_weights",
    "reliability_bins",
    "roc_auc",
    "table_scores",
]
