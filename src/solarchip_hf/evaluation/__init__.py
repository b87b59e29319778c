"""Skill scores, resampled intervals, reliability and baselines.

The metric modules for `evaluate.load` are the folders of this package (`flare_skill`). Names are loaded when first
used: importing the package costs nothing.
"""

from importlib import import_module
from typing import Any

_HOMES = {
    "bootstrap": ("BootstrapInterval", "block_bootstrap"),
    "reliability": ("ReliabilityCurve", "reliability_curve"),
    "flare_skill.skill_scores": (
        "best_threshold",
        "binary_scores",
        "contingency_table",
        "exceedance",
        "flare_scores",
        "flatten_scores",
        "gerrity_score",
        "reliability_bins",
        "roc_auc",
        "table_scores",
    ),
    "flare_baselines": (
        "ClimatologyBaseline",
        "MagnetogramForestBaseline",
        "PastRateLogisticBaseline",
        "PersistenceBaseline",
        "TrailingRateBaseline",
        "classes_from_exceedance",
        "magnetogram_statistics",
    ),
    "figures": ("reliability_figure", "roc_curve", "roc_figure"),
    "stratified": ("changed_windows", "recall_by_angle", "score_forecasts", "scores_by_group", "shuffle_within"),
}
_MODULES = {name: module for module, names in _HOMES.items() for name in names}

__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
