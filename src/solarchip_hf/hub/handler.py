"""Handler of Inference Endpoints: files of solar images in; features, flare probabilities or a translated image out.

This file is also copied beside published weights. There it works without the package, by the code in the repository
(translations need the package). `EndpointHandler(path)(data)` takes what the endpoint's server makes of a request:

    {"inputs": b"..."}                                    the bytes of a FITS or a Helioviewer JPEG2000 file
    {"inputs": "U0lNUExFICA9..."}                         the same in base64, as JSON carries it
    {"inputs": {"hmi": "...", "aia171": "..."}}           one observation of several channels
    {"inputs": [...], "parameters": {"tokens": true}}     several, with parameters

A bad request is answered by `{"error": {"type": ..., "message": ..., "status": 4xx}}`, a failure of the server by
status 500; neither by an exception.
"""

import base64
import binascii
import importlib
import importlib.util
import json
import logging
import sys
import tempfile
import zlib
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

logger = logging.getLogger(__name__)

MAX_BYTES = 64 * 2**20  # of one file, packed or unpacked: a 4096 px image of 32 bits
MAX_PIXELS = 4096 * 4096
MAX_IMAGES = 16
MAX_SAMPLES = 32
MAX_STEPS = 200
TOLERANCE = timedelta(minutes=12)  # between the images of one observation, as of the forecasting pipeline


class RequestError(Exception):
    """A request that cannot be answered.

    Args:
        status: HTTP status, 4xx (500 for a failure of the server).
        kind: Short name of the reason.
        message: A sentence for the caller.
        details: Further facts.
    """

    def __init__(self, status: int, kind: str, message: str, **details: Any):
        super().__init__(message)
        self.status, self.kind, self.details = status, kind, details

    def answer(self) -> dict[str, Any]:
        """The error as JSON carries it."""
        return {"error": {"type": self.kind, "message": str(self), "status": self.status, **self.details}}


class EndpointHandler:
    """Answers requests with one model.

    Args:
        path: Folder of a published backbone, flare model or translation pipeline.
        max_bytes: Largest file.
        max_pixels: Largest image.
        max_images: Most files in a request.
        device: Where to compute; None: a GPU if there is one.

    Attributes:
        task: `"features"`, `"flares"` or `"translation"`.

    Raises:
        OSError, ValueError: The folder holds no such model.
    """

    def __init__(
        self,
        path: str = "",
        *,
        max_bytes: int = MAX_BYTES,
        max_pixels: int = MAX_PIXELS,
        max_images: int = MAX_IMAGES,
        device: str | None = None,
    ):
        self.limits = {"bytes": max_bytes, "pixels": max_pixels, "images": max_images}
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        folder = Path(path)
        if (folder / "model_index.json").is_file():
            self.task = "translation"
            self._load_pipeline(folder)
        else:
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            classifies = any(name.endswith("ForImageClassification") for name in config.get("architectures") or [])
            self.task = "flares" if classifies else "features"
            self._load_model(folder, config.get("auto_map"))
        # the reader and the error of the code that the processor itself belongs to
        self._code = sys.modules[type(self.processor).__module__]

    def _load_model(self, folder: Path, auto_map: Mapping[str, str] | None) -> None:
        from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification

        # The code in the folder runs only where the package is missing, and only the folder's own: an entry
        # "owner/name--module.Class" would fetch another repository's.
        with_code = importlib.util.find_spec("solarchip_hf") is None
        if not with_code:
            importlib.import_module("solarchip_hf")  # registers the classes
        elsewhere = [entry for entry in (auto_map or {}).values() if "--" in str(entry)]
        if with_code and (elsewhere or not auto_map):
            raise ValueError(
                f"config.json: expected the folder's own code in auto_map, got {elsewhere or 'none'}. "
                "Install solarchip_hf, or publish the folder with its code."
            )
        auto = AutoModelForImageClassification if self.task == "flares" else AutoModel
        self.model = auto.from_pretrained(folder, trust_remote_code=with_code).to(self.device).eval()
        self.processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=with_code)

    def _load_pipeline(self, folder: Path) -> None:
        package = importlib.import_module("solarchip_hf")
        self.model = package.SolarChipControlNetPipeline.from_pretrained(folder).to(self.device)
        self.model.set_progress_bar_config(disable=True)
        self.processor = self.model.image_processor

    def __call__(self, data: Any) -> Any:
        """Answers one request.

        Args:
            data: A mapping with `inputs` and perhaps `parameters`. Parameters: `modality` (the channel that a file must
                be, or is to be taken for), `require_usable` (default true), `tokens` (features: all of them); of a
                translation `num_samples`, `num_inference_steps`, `guidance_scale`, `seed`.

        Returns:
            A mapping, or a list of them for a list of inputs; plain values that JSON can carry.
        """
        try:
            inputs, parameters = self._request(data)
            answers = [self._answer(self._observation(entry), parameters) for entry in inputs]
        except RequestError as error:
            return error.answer()
        except Exception:  # the endpoint's server would send its text to the caller
            logger.exception("A request failed")
            return RequestError(500, "internal_error", "The server failed; the reason is in its log.").answer()
        return answers if isinstance(data["inputs"], list) else answers[0]

    # ---- what came

    def _request(self, data: Any) -> tuple[list[Any], dict[str, Any]]:
        if not isinstance(data, Mapping) or "inputs" not in data:
            got = ", ".join(map(str, data)) if isinstance(data, Mapping) else type(data).__name__
            raise RequestError(400, "bad_request", f"inputs: expected a mapping with 'inputs', got {got or 'nothing'}.")
        parameters = data.get("parameters") or {}
        known = _PARAMETERS[self.task]
        if not isinstance(parameters, Mapping) or set(parameters) - set(known):
            raise RequestError(
                400, "bad_request", f"parameters: expected some of {', '.join(known)}, got {parameters!r:.200}."
            )
        for name, value in parameters.items():
            _check_parameter(name, value, known[name])
        inputs = data["inputs"]
        inputs = inputs if isinstance(inputs, list) else [inputs]
        count = sum(len(entry) if isinstance(entry, Mapping) else 1 for entry in inputs)
        if not count:
            raise RequestError(400, "bad_request", "inputs: expected at least one file, got none.")
        if count > self.limits["images"]:
            raise RequestError(
                413, "too_many_images", f"inputs: expected at most {self.limits['images']} files, got {count}."
            )
        return inputs, dict(parameters)

    def _observation(self, entry: Any) -> bytes | dict[str, bytes]:
        if not isinstance(entry, Mapping):
            return self._file(entry)
        if self.task == "features":
            raise RequestError(
                400, "bad_request", "inputs: expected files; a mapping by channel is for forecasts and translations."
            )
        return {str(name): self._file(value) for name, value in entry.items()}

    def _file(self, value: Any) -> bytes:
        """The unpacked bytes of one file, of a size and of image dimensions that are allowed."""
        if isinstance(value, str):
            if len(value) > 4 * (self.limits["bytes"] // 3 + 1) + 100:
                raise self._too_large(f"{len(value)} characters of base64")
            try:
                value = base64.b64decode(value.partition("base64,")[2] or value, validate=True)
            except (binascii.Error, ValueError) as error:
                raise RequestError(400, "bad_request", f"inputs: expected base64, got {error}.") from error
        if not isinstance(value, bytes | bytearray | memoryview):
            raise RequestError(
                415,
                "unsupported_media",
                f"inputs: expected the bytes of a FITS or JPEG2000 file, or their base64, got {type(value).__name__}. "
                "Send them as application/octet-stream or inside JSON; pictures are not data.",
            )
        content = bytes(value)
        if len(content) > self.limits["bytes"]:
            raise self._too_large(f"{len(content)} bytes")
        if content[:2] == b"\x1f\x8b":
            content = self._unpack(content)
        facts = self._handled(self._code.read_image, content, header_only=True)
        if facts.shape[0] * facts.shape[1] > self.limits["pixels"]:
            raise self._too_large(f"an image of {facts.shape[1]} x {facts.shape[0]} pixels")
        return content

    def _unpack(self, content: bytes) -> bytes:
        """What a gzip file holds, without letting a small one grow beyond the limit."""
        inflater = zlib.decompressobj(wbits=31)
        try:
            unpacked = inflater.decompress(content, self.limits["bytes"] + 1)
        except zlib.error as error:
            raise RequestError(422, "unreadable_image", f"inputs: expected a whole gzip file, got {error}.") from error
        if len(unpacked) > self.limits["bytes"]:
            raise self._too_large(f"a gzip file of more than {self.limits['bytes']} bytes")
        if unpacked[:2] == b"\x1f\x8b":
            raise RequestError(422, "unreadable_image", "inputs: expected a FITS file in gzip, got gzip in gzip.")
        if not inflater.eof:
            raise RequestError(422, "unreadable_image", "inputs: expected a whole gzip file, got one without its end.")
        return unpacked

    def _too_large(self, got: str) -> RequestError:
        limits = f"{self.limits['bytes']} bytes and {self.limits['pixels']} pixels"
        return RequestError(413, "too_large", f"inputs: expected at most {limits} a file, got {got}.")

    def _handled(self, function: Any, *arguments: Any, **options: Any) -> Any:
        """Calls code that reads an image, whose complaints are the caller's to hear."""
        try:
            return function(*arguments, **options)
        except self._code.SolarImageError as error:
            details = {name: str(getattr(error, name)) for name in ("fieldname", "expected", "got", "advice")}
            raise RequestError(422, "unreadable_image", str(error), **details) from error
        except ValueError as error:
            raise RequestError(422, "unfit_input", str(error)) from error

    # ---- what goes back

    @torch.inference_mode()
    def _answer(self, observation: Any, parameters: dict[str, Any]) -> dict[str, Any]:
        if self.task == "translation":
            return self._translate(observation, parameters)
        options = {"return_headers": True, "require_usable": parameters.get("require_usable", True)}
        if isinstance(observation, bytes):
            options["modality"] = parameters.get("modality")
            batch, headers = self._handled(self.processor, [observation], return_tensors="pt", **options)
            facts, images = _facts(headers[0]), [headers[0]]
        else:
            batch, headers = self._handled(self.processor, observation, return_tensors="pt", **options)
            facts = {"images": {name: _facts(header) for name, header in headers[0].items()}}
            _check_times(headers[0])
            images = list(headers[0].values())
        batch = {name: value.to(self.device) for name, value in batch.items()}
        if self.task == "flares":
            return {**self._forecast(batch), **self._valid(images[0]), **facts}
        output = self.model(**batch)
        answer = {
            "features": _numbers(output.pooler_output[0]),
            "contrastive": _numbers(output.contrastive_embeds[0, 0]),
        }
        if parameters.get("tokens"):
            answer["tokens"] = _numbers(output.last_hidden_state[0])
        return {**answer, **facts}

    def _forecast(self, batch: dict[str, torch.Tensor]) -> dict[str, Any]:
        config = self.model.config
        calibration = getattr(config, "calibration", None)
        siblings = type(config).__module__.rpartition(".")[0]
        probabilities = importlib.import_module(f"{siblings}.calibration").calibrated_probabilities
        shares = probabilities(self.model(**batch).logits, calibration)[0]
        labels = [config.id2label[index] for index in range(len(shares))]
        reached = shares.flip(0).cumsum(0).flip(0)
        answer: dict[str, Any] = {
            "probabilities": dict(zip(labels, _numbers(shares), strict=True)),
            "exceedance": {
                f"{label.lower()}_plus": share for label, share in zip(labels[1:], _numbers(reached[1:]), strict=True)
            },
            "label": labels[int(shares.argmax())],
            "calibrated": calibration is not None,
        }
        thresholds = (calibration or {}).get("thresholds")
        if thresholds:
            warnings = {name: answer["exceedance"][name] >= value for name, value in thresholds.items()}
            answer |= {"thresholds": dict(thresholds), "warnings": warnings}
        return answer

    def _valid(self, image: Any) -> dict[str, str | None]:
        """From when until when the forecast holds."""
        config = self.model.config
        siblings = type(config).__module__.rpartition(".")[0]
        read_window = importlib.import_module(f"{siblings}.forecast_window").read_window
        horizon, latency, _ = read_window(config.forecast_window)
        nominal = image.time_nominal or image.time
        if nominal is None:
            return {"valid_from": None, "valid_until": None}
        begin = nominal + latency
        return {"valid_from": begin.isoformat(), "valid_until": (begin + horizon).isoformat()}

    def _translate(self, observation: Any, parameters: dict[str, Any]) -> dict[str, Any]:
        names = ("num_samples", "num_inference_steps", "guidance_scale")
        options = {name: parameters[name] for name in names if name in parameters}
        generator = torch.Generator().manual_seed(parameters.get("seed", 0))
        output = self._handled(self.model, observation, output_type="map", generator=generator, **options)
        answer = {"prediction": _fits(output.prediction[0]), "uncertainty": None}
        if output.uncertainty is not None:
            answer["uncertainty"] = _fits(output.uncertainty[0])
        return {
            **answer,
            "modality": self.model.config.target_modality,
            "unit": str(output.prediction[0].unit or ""),
            "format": "FITS, base64",
            "notice": "Generated by a model from other channels: not an observation.",
        }


# For every parameter its types, what they are called, and the range of a number.
_COMMON: dict[str, tuple[Any, str, tuple[float, float] | None]] = {
    "modality": ((str, int), "a channel as 'hmi' or 171", None),
    "require_usable": (bool, "true or false", None),
}
_PARAMETERS: dict[str, dict[str, tuple[Any, str, tuple[float, float] | None]]] = {
    "features": {**_COMMON, "tokens": (bool, "true or false", None)},
    "flares": _COMMON,
    "translation": {
        "num_samples": (int, "a whole number", (1, MAX_SAMPLES)),
        "num_inference_steps": (int, "a whole number", (1, MAX_STEPS)),
        "guidance_scale": ((int, float), "a number", (0, 50)),
        "seed": (int, "a whole number", (0, 2**63 - 1)),
    },
}


def _check_parameter(name: str, value: Any, rule: tuple[Any, str, tuple[float, float] | None]) -> None:
    kinds, words, bounds = rule
    fits = isinstance(value, kinds) and (kinds is bool or not isinstance(value, bool))
    if fits and bounds is not None:
        fits = bounds[0] <= value <= bounds[1]
        words = f"{words} from {bounds[0]:g} to {bounds[1]:g}"
    if not fits:
        raise RequestError(400, "bad_request", f"{name}: expected {words}, got {value!r:.100}.")


def _check_times(headers: Mapping[str, Any]) -> None:
    times = [header.time for header in headers.values() if header.time is not None]
    if times and max(times) - min(times) > TOLERANCE:
        raise RequestError(
            422,
            "unfit_input",
            f"inputs: expected the images of one observation within {TOLERANCE}, got {min(times):%Y-%m-%dT%H:%M} to "
            f"{max(times):%Y-%m-%dT%H:%M} UTC.",
        )


def _facts(header: Any) -> dict[str, Any]:
    """What the answer tells of an image."""
    return {
        "modality": header.modality,
        "time": header.time.isoformat() if header.time else None,
        "approximate": header.approximate,
        "synthetic": "SYNTHETIC" in str(header.header.get("ORIGIN", "")).upper(),
        "notes": list(header.notes),
    }


def _fits(image: Any) -> str:
    """A sunpy Map as the base64 of a FITS file."""
    from solarchip_hf.translation.generated_maps import write_fits

    with tempfile.TemporaryDirectory() as scratch:
        return base64.b64encode(write_fits(image, Path(scratch) / "image.fits").read_bytes()).decode()


def _numbers(values: torch.Tensor) -> list[Any]:
    return values.float().cpu().tolist()


__all__ = ["EndpointHandler", "RequestError"]
