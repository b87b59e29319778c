"""Intervals of scores by resampling blocks of time."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any, overload

import numpy as np
import pandas as pd
from scipy.stats import norm as normal
from scipy.stats import t as student_t

from ..data.durations import read_duration
from ..data.flare_events import to_utc

logger = logging.getLogger(__name__)

_FEWEST_BLOCKS = 10

Bounds = tuple[float, float]  # least and largest possible value of a score; infinite where there is none


@dataclass(frozen=True)
class BootstrapInterval:
    """A score with its resampled interval.

    Attributes:
        estimate: The score of the sample itself.
        low: Lower end of the interval.
        high: Upper end of the interval.
        standard_error: Standard deviation over the resamples, corrected for the correlation that blocks cut.
        level: Nominal coverage, as .95.
        block: Length of a block as text, `"none"` for independent samples.
        num_blocks: How many blocks the sample's time spans, gaps longer than a block left out.
        num_resamples: Number of resamples.
        undefined: Resamples in which the score was NaN (a class absent); they are left out of the interval.
        widening: Factor by which the interval was stretched; 1 where it was not.
    """

    estimate: float
    low: float
    high: float
    standard_error: float
    level: float
    block: str
    num_blocks: float
    num_resamples: int
    undefined: int
    widening: float

    @property
    def width(self) -> float:
        """High minus low."""
        return self.high - self.low

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.estimate:.3f} [{self.low:.3f}, {self.high:.3f}]"


@overload
def block_bootstrap(
    statistic: Callable[..., float],
    *arrays: Any,
    times: Any,
    block: str | pd.Timedelta | None = ...,
    num_resamples: int = ...,
    level: float = ...,
    widen: bool = ...,
    bounds: Bounds | None = ...,
    seed: int = ...,
) -> BootstrapInterval: ...


@overload
def block_bootstrap(
    statistic: Callable[..., dict[str, float]],
    *arrays: Any,
    times: Any,
    block: str | pd.Timedelta | None = ...,
    num_resamples: int = ...,
    level: float = ...,
    widen: bool = ...,
    bounds: Mapping[str, Bounds] | None = ...,
    seed: int = ...,
) -> dict[str, BootstrapInterval]: ...


def block_bootstrap(
    statistic: Callable[..., float | dict[str, float]],
    *arrays: Any,
    times: Any,
    block: str | pd.Timedelta | None = "27D",
    num_resamples: int = 1000,
    level: float = 0.95,
    widen: bool = True,
    bounds: Bounds | Mapping[str, Bounds] | None = None,
    seed: int = 0,
) -> BootstrapInterval | dict[str, BootstrapInterval]:
    """Percentile interval of a score from resampled blocks of 27 days.

    Forecasts of consecutive days share active regions, so that the days are not independent: an interval that takes
    them as such is several times too narrow. A resample is made of stretches of `block` length with random starts
    (circular moving blocks: Kuensch 1989, Annals of Statistics 17, 1217; Politis and Romano 1992), joined until they
    span the sample's time. Gaps longer than a block are closed first.

    Blocks still cut what is correlated across their borders, which makes the variance V(l) too small by a share of
    order 1/l. With `widen` the interval is stretched about the estimate to the variance 2 V(2 l) - V(l), in which that
    term cancels (the bias correction of Politis and Romano 1995, Journal of Time Series Analysis 16, 67), and to
    Student's quantile for the few blocks that the variance comes from; it is never narrowed. A stretched interval may
    pass the largest value that a score can have; with `bounds` it ends there, which costs no coverage. The interval is
    conditional on the phase of the solar cycle that the sample happens to cover.

    The same `times`, `block`, `num_resamples` and `seed` give the same resamples: pass two forecasts and their
    difference as `statistic` for a paired comparison.

    Args:
        statistic: Function of the arrays that returns a number, or a dict of numbers (one interval each).
        *arrays: Arrays of N rows, resampled together: predictions, references, ...
        times: (N,) times of the rows, in any order; naive ones mean UTC.
        block: Length of a block; None takes the rows as independent.
        num_resamples: Number of resamples.
        level: Nominal coverage.
        widen: See above; needs a second set of resamples, with blocks of twice the length.
        bounds: Least and largest possible value of the score, as (-1, 1) of a TSS; of a dict of scores, those by name,
            where a name that is left out has none.
        seed: Of the random starts.

    Returns:
        A `BootstrapInterval`, or a dict of them by name. The interval is NaN where the score is undefined for the
        sample itself or for more than half of the resamples.

    Raises:
        ValueError: Lengths differ, no rows, a block or level out of range.
    """
    values = [np.asarray(array) for array in arrays]
    moments = to_utc(times)
    seconds = moments.asi8 / 1e9
    if not values or any(len(value) != len(seconds) for value in values) or not len(seconds):
        raise ValueError(
            f"expected arrays of as many rows as times, got {[len(v) for v in values]} and {len(seconds)}."
        )
    if not 0 < level < 1 or num_resamples < 1:
        raise ValueError(f"expected 0 < level < 1 and num_resamples >= 1, got {level} and {num_resamples}.")
    length = None if block is None else read_duration(block, "block").total_seconds()

    order = np.argsort(seconds, kind="stable")
    values = [value[order] for value in values]
    clock, period = _close_gaps(seconds[order], length)
    sample = statistic(*values)
    named = sample if isinstance(sample, dict) else {"": sample}
    resampled = _resample(statistic, values, clock, period, length, num_resamples, seed)
    num_blocks = float(len(clock)) if length is None else period / length
    doubled = None
    if length is not None:
        if num_blocks < _FEWEST_BLOCKS:
            _warn_of_few(round(num_blocks, 1), str(block))
        if widen and num_blocks >= 4:
            doubled = _resample(statistic, values, clock, period, 2 * length, num_resamples, seed + 1)

    limits = bounds if isinstance(bounds, Mapping) else {} if bounds is None else dict.fromkeys(named, bounds)
    intervals = {}
    for name, estimate in named.items():
        draws = resampled[name]
        defined = draws[np.isfinite(draws)]
        low = high = error = float("nan")
        widening = 1.0
        if np.isfinite(estimate) and 2 * len(defined) > len(draws):
            low, high = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2])
            error = defined.std()
            if doubled is not None and error > 0:
                ratio = np.nanvar(doubled[name]) / error**2 if np.isfinite(doubled[name]).any() else 1.0
                stretch, student = _widening(ratio, num_blocks, level)
                error, widening = error * stretch, stretch * student
                # Stretched about the estimate; where that lies outside the percentiles, no end moves inwards.
                low = min(low, estimate - (estimate - low) * widening)
                high = max(high, estimate + (high - estimate) * widening)
            least, largest = limits.get(name, (-np.inf, np.inf))
            low, high = max(low, least), min(high, largest)
        intervals[name] = BootstrapInterval(
            estimate=float(estimate),
            low=float(low),
            high=float(high),
            standard_error=float(error),
            level=level,
            block="none" if block is None else str(block),
            num_blocks=round(num_blocks, 2),
            num_resamples=num_resamples,
            undefined=len(draws) - len(defined),
            widening=widening,
        )
    return intervals if isinstance(sample, dict) else intervals[""]


@cache  # a report asks for hundreds of intervals on the same times
def _warn_of_few(num_blocks: float, block: str) -> None:
    logger.warning("only %.1f blocks of %s: the interval is rough", num_blocks, block)


def _widening(ratio: float, num_blocks: float, level: float) -> tuple[float, float]:
    """Factors for the variance that blocks miss, and for its being an estimate.

    2 V(2 l) - V(l) weighs the autocovariances by a trapezium, 1 up to lag l and falling to 0 at 2 l. Removing the mean
    costs it a share of (sum of weights) / n = 3 / blocks, and it has 2 n / (2 sum of squared weights) = 3 blocks / 8
    degrees of freedom.
    """
    stretch = float(np.sqrt(max(1.0, 2 * ratio - 1) / (1 - 3 / num_blocks)))
    upper = (1 + level) / 2
    return stretch, float(student_t.ppf(upper, 3 * num_blocks / 8) / normal.ppf(upper))


def _close_gaps(seconds: np.ndarray, length: float | None) -> tuple[np.ndarray, float]:
    """Seconds from the first row with gaps longer than a block closed, and the period of the circle."""
    if length is None or len(seconds) < 2:
        return np.arange(len(seconds), dtype=float), float(len(seconds))
    steps = np.diff(seconds)
    positive = steps[steps > 0]
    typical = float(np.median(positive)) if len(positive) else length
    steps = np.where(steps > length, min(typical, length), steps)
    clock = np.concatenate([[0.0], np.cumsum(steps)])
    return clock, clock[-1] + min(typical, length)


def _resample(
    statistic: Callable[..., Any],
    values: list[np.ndarray],
    clock: np.ndarray,
    period: float,
    length: float | None,
    num_resamples: int,
    seed: int,
) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    rows = len(clock)
    draws: dict[str, list[float]] = {}
    if length is not None:
        length = min(length, period)
        blocks = int(np.ceil(period / length - 1e-9))
        lengths = np.full(blocks, length)
        lengths[-1] = period - (blocks - 1) * length  # the stretches span the sample's time exactly
        circle = np.concatenate([clock, clock + period])
    for _ in range(num_resamples):
        if length is None:
            index = rng.integers(0, rows, rows)
        else:
            start = rng.uniform(0, period, blocks)
            first = np.searchsorted(circle, start)
            count = np.searchsorted(circle, start + lengths) - first
            offset = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
            index = (np.repeat(first, count) + offset) % rows
        result = statistic(*(value[index] for value in values)) if len(index) else {}
        for name, value in (result if isinstance(result, dict) else {"": result}).items():
            draws.setdefault(name, []).append(float(value))
    return {name: np.asarray(numbers + [np.nan] * (num_resamples - len(numbers))) for name, numbers in draws.items()}


__all__ = ["Bounds", "BootstrapInterval", "block_bootstrap"]
