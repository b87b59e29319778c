"""Skill scores, fidelity of translations, resampled intervals, reliability and baselines.

The metric modules for `evaluate.load` are the folders of this package (`flare_skill`, `translation_fidelity`). Names
are loaded when first used: importing the package costs nothing.
"""

from importlib import import_module
from typing import Any

_HOMES = {
    "translation_fidelity.fidelity_scores": ("fidelity_scores", "score_names"),
    "translation_cases": ("TranslationCases", "gather_cases"),
    "translation_baselines": ("LatentRegression", "autoencoder_ceiling", "sample_pipeline", "simple_baselines"),
    "translation_unet": ("UNetTranslator", "train_unet"),
    "translation_report": ("TranslationTable", "compare_translations", "write_report"),
    "translation_figures": ("rivals_figure", "spread_figure", "translation_figure"),
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
    "calibration": ("ValidationScore", "boundary_names", "choose_thresholds", "fit_calibration"),
    "flare_rivals": ("baseline_forecasts", "magnetogram_table"),
    "flare_report": ("calibrated_report", "write_flare_report"),
    "flare_seeds": ("load_forecasts", "load_tries", "recalibrated", "save_forecasts", "seed_report"),
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
