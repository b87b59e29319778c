"""The contrastive Trainer, and what judges it: retrieval, controls, figures.

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
}

if TYPE_CHECKING:
    from .arguments import SolarChipTrainingArguments
    from .augmentation import SolarAugmentation
    from .collator import SolarChipDataCollator
    from .controls import compare_with_controls
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
    "RetrievalTable",
    "SolarAugmentation",
    "SolarChipDataCollator",
    "SolarChipTrainer",
    "SolarChipTrainingArguments",
    "compare_with_controls",
    "cross_modal_retrieval",
]
