"""Several tries of a tuning, of which validation keeps the best: the same care for every network of a comparison."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..models.modeling_solarchip_classification import SolarChipForImageClassification
from .flare_arguments import FlareTrainingArguments
from .flare_trainer import FlareFit, Score, fit_flare_model

logger = logging.getLogger(__name__)


def best_flare_fit(
    build: Callable[[], SolarChipForImageClassification],
    train: Any,
    validation: Any,
    args: Mapping[str, Any],
    tries: Sequence[Mapping[str, Any]],
    *,
    score: Score | None = None,
) -> tuple[FlareFit, list[dict[str, Any]]]:
    """Fits a new model for every try and keeps the one with the best validation score.

    Args:
        build: Gives the model that a try begins with.
        train: As for `fit_flare_model`.
        validation: As for `fit_flare_model`; it chooses, so it must be there.
        args: Fields of `FlareTrainingArguments` that all tries share; each try has `output_dir/try-N` for itself.
        tries: Fields that differ, as `[{"weight_decay": 0.1}, {"weight_decay": 1.0}]`.
        score: As for `fit_flare_model`.

    Returns:
        The best fit; and every try in order: its fields with `score` (None if not finite), `step` and `chosen`.

    Raises:
        ValueError: No try, no validation part, no try with a finite score, or as for `fit_flare_model`.
    """
    if not tries or validation is None:
        raise ValueError("tries, validation: expected at least one try and a part to judge it by, got none.")
    best: FlareFit | None = None
    records: list[dict[str, Any]] = []
    for number, fields in enumerate(tries, 1):
        arguments = FlareTrainingArguments(**{**args, **fields})
        arguments.output_dir = str(Path(arguments.output_dir or ".") / f"try-{number}")
        try:
            fit = fit_flare_model(build(), train, validation, arguments, score=score)
        except FloatingPointError as error:  # as of too large a learning rate: a try like any other, and a bad one
            logger.warning("try %d left out: %s", number, error)
            records.append({**fields, "score": None, "step": 0, "chosen": False})
            continue
        finite = math.isfinite(fit.best_score)
        records.append({**fields, "score": fit.best_score if finite else None, "step": fit.best_step, "chosen": False})
        sign = -1 if fit.score_name.endswith("loss") else 1
        if not finite:
            continue
        if best is None or sign * fit.best_score > sign * best.best_score:
            best, chosen = fit, records[-1]
    if best is None:
        raise ValueError(f"tries: expected one with a finite validation score, got none: {records}.")
    chosen["chosen"] = True
    return best, records


__all__ = ["best_flare_fit"]
