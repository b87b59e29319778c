"""SolarCHIP for the Solar Dynamics Observatory, the Hugging Face way.

Importing the package registers its models and its image processor with the Auto classes of transformers. Names that
pull in heavy libraries (datasets, matplotlib, ...) are loaded when they are first asked for.
"""

import importlib
from typing import Any

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForPreTraining,
)
from transformers.pipelines import PIPELINE_REGISTRY

from .models.configuration_solarchip import FLARE_CLASSES, SolarChipCNNConfig, SolarChipConfig, SolarChipViTConfig
from .models.headers import SolarImage, SolarImageError
from .models.image_processing_solarchip import SolarChipImageProcessor
from .models.modalities import MODALITIES, MODALITY_NAMES, Modality, resolve_modality
from .models.modeling_solarchip import SolarChipForPreTraining, SolarChipModel, SolarChipPreTrainedModel
from .models.modeling_solarchip_classification import SolarChipForImageClassification
from .models.modeling_solarchip_cnn import SolarChipCNNDecoder, SolarChipCNNModel
from .models.modeling_solarchip_outputs import (
    SolarChipForPreTrainingOutput,
    SolarChipImageClassifierOutput,
    SolarChipModelOutput,
    SolarChipTowerOutput,
)
from .models.modeling_solarchip_vit import SolarChipViTDecoder, SolarChipViTModel
from .models.readers import read_image

__version__ = "0.1.0"

# Public names that are imported on demand, by the room that holds them.
_ROOMS = {
    "data": (
        "FlareObservations",
        "LeakageError",
        "ObservationStream",
        "Observations",
        "SyntheticSun",
        "chronological_split",
        "label_flares",
        "load_observations",
        "pair_observations",
        "prepare_dataset",
        "read_catalog",
        "read_flare_events",
        "scan_archive",
        "split_labels",
    ),
    "training": (
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
        "compare_with_controls",
        "cross_modal_retrieval",
        "fit_flare_model",
        "predict_flares",
    ),
    "evaluation": (
        "BootstrapInterval",
        "ClimatologyBaseline",
        "LatentRegression",
        "MagnetogramForestBaseline",
        "PastRateLogisticBaseline",
        "PersistenceBaseline",
        "ReliabilityCurve",
        "TrailingRateBaseline",
        "TranslationCases",
        "TranslationTable",
        "UNetTranslator",
        "ValidationScore",
        "block_bootstrap",
        "reliability_curve",
    ),
    "translation": (
        "DiffusionArguments",
        "DiffusionTrainer",
        "LatentDataset",
        "PriorLatents",
        "SolarChipControlNetPipeline",
        "SolarChipControlNetPipelineOutput",
        "TranslationLatents",
        "encode_dataset",
    ),
    "hub": (
        "CardResult",
        "EndpointHandler",
        "FlareAttribution",
        "SolarFlareForecastingPipeline",
        "convert_checkpoint",
        "push_folder",
        "push_to_hub",
        "save_with_code",
        "write_card",
    ),
}
_LAZY = {name: room for room, names in _ROOMS.items() for name in names}


def _register() -> None:
    for config in (SolarChipConfig, SolarChipViTConfig, SolarChipCNNConfig):
        AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoModel.register(SolarChipConfig, SolarChipModel, exist_ok=True)
    AutoModelForPreTraining.register(SolarChipConfig, SolarChipForPreTraining, exist_ok=True)
    AutoModelForImageClassification.register(SolarChipConfig, SolarChipForImageClassification, exist_ok=True)
    AutoImageProcessor.register(
        SolarChipConfig, image_processor_classes={"pil": SolarChipImageProcessor}, exist_ok=True
    )
    # By a dotted name, as transformers' own tasks: the module is imported when the task is first asked for.
    PIPELINE_REGISTRY.supported_tasks["solar-flare-forecasting"] = {
        "impl": f"{__name__}.hub.flare_pipeline.SolarFlareForecastingPipeline",
        "pt": (AutoModelForImageClassification,),
        "type": "image",
    }


_register()


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})


__all__ = [
    "FLARE_CLASSES",
    "BootstrapInterval",
    "CardResult",
    "ClimatologyBaseline",
    "DiffusionArguments",
    "DiffusionTrainer",
    "EndpointHandler",
    "FlareAttribution",
    "FlareDataCollator",
    "FlareFit",
    "FlareObservations",
    "FlarePredictions",
    "FlareProbe",
    "FlareTrainer",
    "FlareTrainingArguments",
    "FrozenFeatures",
    "LatentDataset",
    "LatentRegression",
    "LeakageError",
    "MODALITIES",
    "MODALITY_NAMES",
    "MagnetogramForestBaseline",
    "Modality",
    "ObservationStream",
    "Observations",
    "PastRateLogisticBaseline",
    "PersistenceBaseline",
    "PriorLatents",
    "ReliabilityCurve",
    "RetrievalTable",
    "SolarAugmentation",
    "SolarChipCNNConfig",
    "SolarChipCNNDecoder",
    "SolarChipCNNModel",
    "SolarChipConfig",
    "SolarChipControlNetPipeline",
    "SolarChipControlNetPipelineOutput",
    "SolarChipDataCollator",
    "SolarChipForImageClassification",
    "SolarChipForPreTraining",
    "SolarChipForPreTrainingOutput",
    "SolarChipImageClassifierOutput",
    "SolarChipImageProcessor",
    "SolarChipModel",
    "SolarChipModelOutput",
    "SolarChipPreTrainedModel",
    "SolarChipTowerOutput",
    "SolarChipTrainer",
    "SolarChipTrainingArguments",
    "SolarChipViTConfig",
    "SolarChipViTDecoder",
    "SolarChipViTModel",
    "SolarImage",
    "SolarImageError",
    "SolarFlareForecastingPipeline",
    "SyntheticSun",
    "TrailingRateBaseline",
    "TranslationCases",
    "TranslationLatents",
    "TranslationTable",
    "UNetTranslator",
    "ValidationScore",
    "block_bootstrap",
    "chronological_split",
    "compare_with_controls",
    "convert_checkpoint",
    "cross_modal_retrieval",
    "encode_dataset",
    "fit_flare_model",
    "label_flares",
    "load_observations",
    "pair_observations",
    "predict_flares",
    "prepare_dataset",
    "push_folder",
    "push_to_hub",
    "read_catalog",
    "read_flare_events",
    "read_image",
    "reliability_curve",
    "resolve_modality",
    "save_with_code",
    "scan_archive",
    "split_labels",
    "write_card",
]
