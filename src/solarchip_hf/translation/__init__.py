"""Translation between magnetograms and passbands: latent diffusion on SolarCHIP's latents, steered by a ControlNet.

Names are loaded on first use: importing this package does not ask for diffusers yet.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

_HOMES = {
    "components": (
        "build_controlnet",
        "build_prior",
        "build_scheduler",
        "condition_on_sources",
        "denormalise_latents",
        "latent_shape",
        "normalise_latents",
        "null_context",
    ),
    "pipeline_solarchip_controlnet": ("SolarChipControlNetPipeline", "SolarChipControlNetPipelineOutput"),
    "generated_maps": ("write_fits",),
    "latents": ("LatentDataset", "PriorLatents", "TranslationLatents", "encode_dataset"),
    "diffusion_training": ("DiffusionArguments", "DiffusionTrainer"),
}
_MODULES = {name: module for module, names in _HOMES.items() for name in names}

if TYPE_CHECKING:
    from .components import (
        build_controlnet,
        build_prior,
        build_scheduler,
        condition_on_sources,
        denormalise_latents,
        latent_shape,
        normalise_latents,
        null_context,
    )
    from .diffusion_training import DiffusionArguments, DiffusionTrainer
    from .generated_maps import write_fits
    from .latents import LatentDataset, PriorLatents, TranslationLatents, encode_dataset
    from .pipeline_solarchip_controlnet import SolarChipControlNetPipeline, SolarChipControlNetPipelineOutput


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = import_module(f".{_MODULES[name]}", __name__)
    except ModuleNotFoundError as error:
        if error.name != "diffusers":
            raise
        raise ImportError("Translation needs diffusers: pip install 'solarchip_hf[translation]'.") from error
    value = getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})


__all__ = [
    "DiffusionArguments",
    "DiffusionTrainer",
    "LatentDataset",
    "PriorLatents",
    "SolarChipControlNetPipeline",
    "SolarChipControlNetPipelineOutput",
    "TranslationLatents",
    "build_controlnet",
    "build_prior",
    "build_scheduler",
    "condition_on_sources",
    "denormalise_latents",
    "encode_dataset",
    "latent_shape",
    "normalise_latents",
    "null_context",
    "write_fits",
]
