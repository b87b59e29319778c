"""The contrastive Trainer and what judges it: retrieval, controls, figures; and the tuning of flare forecasts.

Names are loaded on first use, so that importing this package does not pull in transformers' Trainer.
"""

import importlib
from typing import TYPE_CHECKING, Any

_HOMES = {
    "SolarChipTrainingArguments": ".arguments",
    "SolarChipTrainer": ".trainer",
    "SolarChipDataCollator": ".collator",
    "SolarAugmentation": ".augmentation",
    "RetrievalTable": ".retrieval",
    "cross_modal_retrieval": ".retrieval",
    "compare_with_controls": ".controls",
    "FlareTrainingArguments": ".flare_arguments",
    "FlareDataCollator": ".flare_features",
    "FlareProbe": ".flare_features",
    "FrozenFeatures": ".flare_features",
    "encode_observations": ".flare_features",
    "balanced_class_weights": ".flare_models",
    "build_flare_model": ".flare_models",
    "best_flare_fit": ".flare_tries",
    "FlareFit": ".flare_trainer",
    "FlarePredictions": ".flare_trainer",
    "FlareTrainer": ".flare_trainer",
    "fit_flare_model": ".flare_trainer",
    "predict_flares": ".flare_trainer",
}

if TYPE_CHECKING:
    from .arguments import SolarChipTrainingArguments
    from .augmentation import SolarAugmentation
    from .collator import SolarChipDataCollator
    from .controls import compare_with_controls
    from .flare_arguments import FlareTrainingArguments
    from .flare_features import FlareDataCollator, FlareProbe, FrozenFeatures, encode_observations
    from .flare_models import balanced_class_weights, build_flare_model
    from .flare_trainer import FlareFit, FlarePredictions, FlareTrainer, fit_flare_model, predict_flares
    from .flare_tries import best_flare_fit
    from .retrieval import RetrievalTable, cross_modal_retrieval
    from .trainer import SolarChipTrainer


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})


__all__ = [
    "FlareDataCollator",
    "FlareFit",
    "FlarePredictions",
    "FlareProbe",
    "FlareTrainer",
    "FlareTrainingArguments",
    "FrozenFeatures",
    "RetrievalTable",
    "SolarAugmentation",
    "SolarChipDataCollator",
    "SolarChipTrainer",
    "SolarChipTrainingArguments",
    "balanced_class_weights",
    "best_flare_fit",
    "build_flare_model",
    "compare_with_controls",
    "cross_modal_retrieval",
    "encode_observations",
    "fit_flare_model",
    "predict_flares",
]
