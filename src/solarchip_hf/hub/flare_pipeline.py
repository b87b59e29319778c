"""The task `solar-flare-forecasting`: from images of the Sun to probabilities of the largest flare that comes.

    import solarchip_hf
    from transformers import pipeline

    forecast = pipeline("solar-flare-forecasting", model="solarchip/flare-vit-tiny")
    forecast("hmi.M_720s.20240101_000000_TAI.fits")

The window of the forecast, the calibration and the thresholds of warning are those that the model's configuration
carries.
"""

from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any

import torch
from transformers import Pipeline

from solarchip_hf.hub.attribution import FlareAttribution, integrated_gradients
from solarchip_hf.models.calibration import boundary_names, calibrated_probabilities
from solarchip_hf.models.forecast_window import DEFAULT_WINDOW, read_window
from solarchip_hf.models.headers import SolarImage, SolarImageError
from solarchip_hf.models.modalities import resolve_modality

# Images of one observation may lie this far apart (a solar feature at disk centre moves 1 px of 2.4 arcsec in 15.6 min)
TOLERANCE = timedelta(minutes=12)


class SolarFlareForecastingPipeline(Pipeline):
    """Forecasts the class of the largest flare of the window behind an image that the model was tuned for.

    An input is a path or the bytes of a FITS or JPEG2000 file, an astropy HDU or HDUList, a sunpy Map, a `SolarImage`,
    or a mapping `{modality: image}` of images taken within 12 minutes of each other; in a mapping an image may be an
    array too. A list is a list of observations, answered by a list.

    Of every observation comes a dict:

    - `probabilities`: by class, calibrated if `calibrated` says so; they sum to 1.
    - `exceedance`: probability of at least a class: `c_plus`, `m_plus`, `x_plus`.
    - `label`: the most probable class.
    - `calibrated`: whether the model carries a calibration; if not, probabilities are the network's softmax.
    - `thresholds`, `warnings`: the probabilities from which to warn, as chosen on validation, and the verdicts; None
      where the model carries none.
    - `time`: of the observation, UTC, ISO 8601. `time_nominal`: its slot in the series, in the series' own scale: ISO
      8601 with a Z for UTC, as `2014.02.03_00:00:00_TAI` for HMI. None of an array.
    - `valid_from`, `valid_until`: the forecast is for flares that start (by the window: or peak) after the first and
      not after the second, UTC. They count from the slot's calendar time read as UTC, as the labels of the training do;
      a TAI slot lies half a minute before it.
    - `window`: `horizon`, `latency` and `by`, as the model's `forecast_window` has them.
    - `images`: for every image `modality`, `time`, `source`, `approximate` (8-bit quick-look), `near_real_time`,
      `synthetic` (drawn by `SyntheticSun`) and `notes`, the reader's warnings.
    - `modality_weights`: the share of every channel in the fused feature.
    - `attribution`: with `attribution=True`, a `FlareAttribution`.

    Args:
        model: A `SolarChipForImageClassification` whose classes are ordered.
        image_processor: The processor saved with it.
        attribution: Whether to explain the forecast: True for `m_plus`, or the name of an exceedance.
        attribution_steps: Points of the integration.
        require_usable: Whether an image that its quality word advises against is refused.
        **kwargs: As for every pipeline of transformers.

    Raises:
        ValueError: The processor's channels are not the model's, or an argument is none of the choices.
        SolarImageError: On a call: an image cannot be handled (no magnetogram, a partial disk, a channel that the model
            does not know), in a sentence that says why.
    """

    _load_processor = False
    _load_image_processor = True
    _load_feature_extractor = False
    _load_tokenizer = False

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        saved_as = self.model.config.architectures
        if saved_as and not any(name.endswith("ForImageClassification") for name in saved_as):
            raise ValueError(
                f"model: expected a tuned flare model, got a {', '.join(saved_as)}, whose forecasts would be those of "
                "a random head. Tune it with examples/finetune_flare.py."
            )
        ours, theirs = list(self.model.config.modalities), list(self.image_processor.modalities)
        if ours != theirs:
            raise ValueError(
                f"image_processor: expected one for the model's channels {ours}, got one for {theirs}; load both with "
                "the same modalities=."
            )
        self.model.eval()

    def __call__(self, inputs: Any, **kwargs: Any) -> Any:  # type: ignore[override]  # no further positional ones
        """Forecasts from one observation, or from each of a list of them; see the class.

        Args:
            inputs: An observation, a list, a generator or a dataset of observations.
            **kwargs: `attribution`, `attribution_steps`, `require_usable`, `batch_size`.

        Returns:
            A dict, or a list of dicts.
        """
        if isinstance(inputs, list | tuple) and type(inputs) not in (list, tuple):  # an astropy HDUList is one image
            return super().__call__([inputs], **kwargs)[0]
        return super().__call__(list(inputs) if isinstance(inputs, tuple) else inputs, **kwargs)

    @property
    def events(self) -> list[str]:
        """Names of the exceedances, as `["c_plus", "m_plus", "x_plus"]`."""
        return boundary_names(self.model.config.num_labels)

    def _sanitize_parameters(
        self,
        attribution: bool | str | None = None,
        attribution_steps: int | None = None,
        require_usable: bool | None = None,
        **unknown: Any,
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        if unknown:
            raise ValueError(
                "solar-flare-forecasting: expected attribution=, attribution_steps= or require_usable=, got "
                f"{', '.join(unknown)}."
            )
        forward: dict[str, Any] = {}
        if attribution is not None:
            target = "m_plus" if attribution is True else attribution or None
            if target is not None and target not in self.events:
                raise ValueError(f"attribution: expected True or one of {', '.join(self.events)}, got {attribution!r}.")
            forward["target"] = target
        if attribution_steps is not None:
            if attribution_steps < 1:
                raise ValueError(f"attribution_steps: expected at least 1, got {attribution_steps!r}.")
            forward["steps"] = attribution_steps
        return {} if require_usable is None else {"require_usable": require_usable}, forward, {}

    def preprocess(self, input_: Any, require_usable: bool = True) -> dict[str, Any]:  # type: ignore[override]
        """One observation as the model takes it: `pixel_values`, `observed`, and the header facts by channel."""
        processor, options = self.image_processor, {"require_usable": require_usable, "return_headers": True}
        if isinstance(input_, Mapping):
            batch, headers = processor(input_, **options)
            pixel_values, observed, facts = batch["pixel_values"], batch["observed"], headers[0]
        else:
            batch, headers = processor([input_], **options)
            index = int(batch["modality_ids"][0])
            shape = (1, len(processor.modalities), *batch["pixel_values"].shape[-2:])
            pixel_values = batch["pixel_values"].new_zeros(shape)
            pixel_values[0, index] = batch["pixel_values"][0, 0]
            observed = torch.arange(len(processor.modalities))[None] == index
            facts = {processor.modalities[index]: headers[0]}
        if not observed.any():
            raise SolarImageError("observation", "images", f"one of {', '.join(processor.modalities)}", "none")
        _check_times(facts)
        return {"pixel_values": pixel_values, "observed": observed, "facts": facts}

    def _forward(  # type: ignore[override]
        self, input_tensors: dict[str, Any], target: str | None = None, steps: int = 32
    ) -> dict[str, Any]:
        pixel_values, observed = input_tensors["pixel_values"], input_tensors["observed"]
        pixel_values = pixel_values.to(self.model.dtype)
        output = self.model(pixel_values=pixel_values, observed=observed)
        result = {
            "logits": output.logits.float(),
            "modality_weights": output.modality_weights.float(),
            "pixel_values": pixel_values.float(),
            "observed": observed,
            "facts": input_tensors["facts"],
        }
        if target is not None:
            boundary = self.events.index(target)
            pairs = [
                integrated_gradients(self.model, image[None], seen[None], boundary, steps=steps)
                for image, seen in zip(pixel_values, observed, strict=True)
            ]
            result["attribution"] = torch.stack([values for values, *_ in pairs])
            result["ends"] = torch.tensor([ends for _, *ends in pairs])
            result["target"] = [target] * len(pairs)
        return result

    def postprocess(self, model_outputs: dict[str, Any]) -> dict[str, Any]:  # type: ignore[override]
        """The forecast of one observation as a dict."""
        calibration = self.model.config.calibration
        probabilities = calibrated_probabilities(model_outputs["logits"], calibration)[0].double()
        labels = self.model.config.id2label
        above = probabilities.flip(0).cumsum(0).flip(0)
        exceedance = dict(zip(self.events, above[1:].tolist(), strict=True))
        thresholds = dict((calibration or {}).get("thresholds") or {}) or None
        facts: dict[str, SolarImage] = model_outputs["facts"]
        if isinstance(facts, list):  # a batch of one keeps its list
            facts = facts[0]
        first = next(iter(facts.values()))
        nominal = first.time_nominal or first.time
        horizon, latency, _ = read_window(self.model.config.forecast_window)
        forecast = {
            "label": labels[int(probabilities.argmax())],
            "probabilities": {labels[index]: float(value) for index, value in enumerate(probabilities)},
            "exceedance": exceedance,
            "calibrated": calibration is not None,
            "thresholds": thresholds,
            "warnings": thresholds and {name: exceedance[name] >= value for name, value in thresholds.items()},
            "time": _iso(first.time),
            "time_nominal": _slot(first),
            "valid_from": _iso(nominal and nominal + latency),
            "valid_until": _iso(nominal and nominal + latency + horizon),
            "window": {**DEFAULT_WINDOW, **(self.model.config.forecast_window or {})},
            "images": [_describe(name, image) for name, image in facts.items()],
            "modality_weights": {
                name: float(weight)
                for name, weight in zip(
                    self.image_processor.modalities, model_outputs["modality_weights"][0], strict=True
                )
                if name in facts
            },
        }
        if "attribution" in model_outputs:
            forecast["attribution"] = self._attribution(model_outputs, facts)
        return forecast

    def _attribution(self, outputs: dict[str, Any], facts: Mapping[str, SolarImage]) -> FlareAttribution:
        names = self.image_processor.modalities
        values, pixels = outputs["attribution"][0].numpy(), outputs["pixel_values"][0]
        target, ends = outputs["target"], outputs["ends"][0].tolist()
        return FlareAttribution(
            target=target[0] if isinstance(target, list) else target,
            maps={name: values[names.index(name)] for name in facts},
            images={name: self.image_processor.unscale(pixels[names.index(name)], name) for name in facts},
            headers=facts,
            log_odds=ends[0],
            baseline_log_odds=ends[1],
        )


def _check_times(facts: Mapping[str, SolarImage]) -> None:
    times = {name: image.time for name, image in facts.items() if image.time is not None}
    if len(times) < 2:
        return
    early, late = min(times, key=times.__getitem__), max(times, key=times.__getitem__)
    if times[late] - times[early] > TOLERANCE:
        raise SolarImageError(
            facts[late].source,
            "time",
            f"within {TOLERANCE.seconds // 60} minutes of {early}'s {_iso(times[early])}",
            str(_iso(times[late])),
            "Images of one observation show the same Sun.",
        )


def _iso(time: datetime | None) -> str | None:
    return None if time is None else time.isoformat(timespec="seconds").replace("+00:00", "Z")


def _slot(image: SolarImage) -> str | None:
    """The slot in its own scale: the digits of a TAI slot are those of TAI, though `SolarImage` marks them UTC."""
    nominal = image.time_nominal or image.time
    stamp = image.header.get("T_REC") or (image.modality == "hmi" and image.header.get("T_OBS"))
    if nominal is None or not str(stamp).strip().upper().endswith("TAI"):
        return _iso(nominal)
    return f"{nominal:%Y.%m.%d_%H:%M:%S}_TAI"


def _describe(name: str, image: SolarImage) -> dict[str, Any]:
    return {
        "modality": resolve_modality(name),
        "time": _iso(image.time),
        "source": image.source,
        "approximate": image.approximate,
        "near_real_time": image.near_real_time,
        "synthetic": "SYNTHETIC" in str(image.header.get("ORIGIN", "")).upper(),
        "notes": list(image.notes),
    }


__all__ = ["TOLERANCE", "SolarFlareForecastingPipeline"]
