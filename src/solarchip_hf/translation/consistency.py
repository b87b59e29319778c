"""Whether the parts of a translation pipeline fit each other: said at once, not after an hour of sampling."""

import importlib.util
import math
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Any

from ..models.settings import choice
from .components import latent_shape

# What `preparation` says of the images that the networks were trained on.
PREPARATION = ("photometry", "degradation", "geometry", "size")
OUTPUT_TYPES = ("pt", "np", "map")
REDUCTIONS = ("mean", "sample")


def _require(condition: bool, name: str, expected: str, got: Any, advice: str = "") -> None:
    if not condition:
        raise ValueError(f"{name}: expected {expected}, got {got}.{' ' + advice if advice else ''}")


def check_preparation(preparation: Mapping[str, Any], used: Mapping[str, Any]) -> None:
    """Compares how training images were prepared with how a processor prepares new ones.

    Args:
        preparation: `photometry`, `degradation`, `geometry`, `size` of the training images.
        used: The processor's `statistics_key`.

    Raises:
        ValueError: They differ, or something is missing or unknown.
    """
    _require(
        set(preparation) == set(PREPARATION), "preparation", f"exactly {', '.join(PREPARATION)}", sorted(preparation)
    )
    for name in PREPARATION:
        _require(
            preparation[name] == used[name],
            f"image_processor.{name}",
            f"{preparation[name]!r}, as the networks' training images were prepared",
            repr(used[name]),
            "Use the processor that was saved with the pipeline.",
        )


def _check_statistics(config: Mapping[str, Any], names: Sequence[str], channels: int) -> None:
    for table in ("latent_mean", "latent_std"):
        absent = [name for name in names if name not in config[table]]
        _require(not absent, table, f"an entry for each of {', '.join(names)}", f"none for {', '.join(absent)}")
        for name in names:
            row = config[table][name]
            _require(len(row) == channels, f"{table}[{name!r}]", f"{channels} numbers, one a channel", len(row))
    for name in names:
        smallest = min(config["latent_std"][name])
        _require(smallest > 0, f"latent_std[{name!r}]", "positive deviations", smallest)


def _check_networks(unet: Any, controlnet: Any, shape: tuple[int, int, int], width: int, sources: int) -> None:
    channels, side, _ = shape
    for name, network in (("unet", unet), ("controlnet", controlnet)):
        got = network.config.in_channels
        _require(got == channels, f"{name}.config.in_channels", f"the autoencoder's {channels} latent channels", got)
        got = network.config.cross_attention_dim
        _require(got == width, f"{name}.config.cross_attention_dim", f"the width of the tokens, {width}", got)
    got = controlnet.config.conditioning_channels
    expected = f"{channels} latent channels of {sources} sources, {channels * sources}"
    _require(got == channels * sources, "controlnet.config.conditioning_channels", expected, got)
    widths = tuple(controlnet.config.conditioning_embedding_out_channels)
    _require(
        len(widths) == 1,
        "controlnet.config.conditioning_embedding_out_channels",
        "one width, so that the hint stays on the latent grid",
        widths,
        "Make the ControlNet with build_controlnet.",
    )
    _require(
        unet.config.sample_size == side,
        "image_processor.size",
        f"images whose latents are {unet.config.sample_size} pixels wide, as the prior's",
        f"latents of {side} pixels",
        "Use the processor that was saved with the pipeline.",
    )


def _check_labels(unet: Any, controlnet: Any, known: Sequence[str] | None, target: str) -> None:
    labels = unet.config.num_class_embeds
    if labels is None:
        _require(
            known is None or list(known) == [target],
            "prior_modalities",
            f"None or [{target!r}], since the prior has no labels",
            known,
        )
    else:
        _require(
            known is not None and len(known) == labels,
            "prior_modalities",
            f"{labels} modalities, one a label of the prior",
            known,
        )
        _require(target in (known or ()), "target_modality", f"one that the prior knows ({known})", repr(target))
    got = controlnet.config.num_class_embeds
    _require(got == labels, "controlnet.config.num_class_embeds", f"{labels}, as the prior's", got)


def check_components(pipeline: Any) -> None:
    """Checks that networks, statistics, labels, sizes and preparation of a pipeline belong together.

    Args:
        pipeline: A `SolarChipControlNetPipeline` with its components and configuration registered.

    Raises:
        ValueError: In one sentence, what does not fit.
    """
    config, processor = pipeline.config, pipeline.image_processor
    model = pipeline.autoencoder.config
    sources, target = list(config.source_modalities), config.target_modality
    _require(len(set(sources)) == len(sources), "source_modalities", "different channels", sources)
    names = list(dict.fromkeys([*sources, target]))
    for part, known in (("autoencoder", model.modalities), ("image_processor", processor.modalities)):
        absent = [name for name in names if name not in known]
        _require(not absent, f"{part}.modalities", f"all of {', '.join(names)}", f"{', '.join(known)}")
    check_preparation(config.preparation, processor.statistics_key)
    shape = latent_shape(model, processor.size)
    _check_statistics(config, names, shape[0])
    _check_networks(pipeline.unet, pipeline.controlnet, shape, model.hidden_size, len(sources))
    _check_labels(pipeline.unet, pipeline.controlnet, config.prior_modalities, target)


def check_call(
    *,
    num_inference_steps: int,
    guidance_scale: float,
    controlnet_conditioning_scale: float,
    num_samples: int,
    batch_size: int,
    output_type: str,
    reduce: str,
    geometry: str,
    training_steps: int,
) -> None:
    """Refuses settings of a call that cannot be; see `SolarChipControlNetPipeline.__call__` for what they mean.

    The `geometry` is that of the training images, `training_steps` are those of the noise schedule.

    Raises:
        ValueError: In one sentence, what cannot be.
        ImportError: Maps are asked for and sunpy is not installed.
    """
    counts = {"num_inference_steps": num_inference_steps, "num_samples": num_samples, "batch_size": batch_size}
    for name, value in counts.items():
        whole = isinstance(value, Integral) and not isinstance(value, bool) and value > 0
        _require(whole, name, "a whole number from 1 on", repr(value))
    # Beyond it the schedulers repeat timesteps, and give NaN.
    most = f"at most {training_steps}, the steps of the noise schedule"
    _require(num_inference_steps <= training_steps, "num_inference_steps", most, num_inference_steps)
    guided = isinstance(guidance_scale, Real) and math.isfinite(guidance_scale) and guidance_scale >= 0
    _require(guided, "guidance_scale", "0 or more (1: the conditional model)", repr(guidance_scale))
    scale = controlnet_conditioning_scale
    finite = isinstance(scale, Real) and math.isfinite(scale)
    _require(finite, "controlnet_conditioning_scale", "a finite number (1: as trained)", repr(scale))
    choice("output_type", output_type, OUTPUT_TYPES)
    choice("reduce", reduce, REDUCTIONS)
    if output_type == "map":
        _require(
            geometry != "none",
            "output_type",
            "'pt' or 'np', since networks trained with geometry 'none' give no image on a known grid",
            "'map'",
        )
        if importlib.util.find_spec("sunpy") is None:
            raise ImportError("Maps need sunpy: pip install 'solarchip_hf[sunpy]'.")


__all__ = ["PREPARATION", "check_call", "check_components", "check_preparation"]
