"""Export of the encoder and of the flare model as one graph, for use without this package's models: ONNX, torch.export.

    python -m solarchip_hf.hub.export solarchip/vit-base exported/ --format onnx

The graph takes observations, `pixel_values` (B, M, S, S) as the processor's observation form gives them, of any number
B. What cannot be chosen any more: the modalities and their order, the size S, float32, inference. Other channels or
another size take another export; a single channel is `--modalities hmi`. The flare model's graph takes `observed`
(B, M) too, and gives the probabilities by the calibration that the model carries; the encoder's has a row for every
image, of which those of missing images mean nothing.

A graph is kept only if it gives what the model itself gives on random observations, within 1e-4, at batches other than
that of the export.
"""

import argparse
import importlib.metadata
import json
import logging
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoImageProcessor

from solarchip_hf.models.calibration import calibrated_probabilities
from solarchip_hf.models.losses import center_embeds
from solarchip_hf.models.modeling_solarchip import SolarChipModel, SolarChipPreTrainedModel
from solarchip_hf.models.modeling_solarchip_classification import SolarChipForImageClassification

logger = logging.getLogger(__name__)

FORMATS = {"onnx": "model.onnx", "torch": "model.pt2"}
TASKS = ("encoder", "flare")
TOLERANCE = 1e-4  # largest difference from eager, of values beyond 1 relative to the largest of them
REPORT_NAME = "export.json"
_BATCHES = (1, 3, 4)  # compared; the graph is traced at 2, since torch takes a 1 for a constant
_INLINE_BYTES = 2**30  # an ONNX file cannot pass 2 GiB; larger weights go to a file beside it


class ExportError(ValueError):
    """A model that cannot be exported, or whose graph disagrees with it; nothing was written."""


@dataclass
class ExportReport:
    """What was exported; `export.json` holds it.

    Attributes:
        task: `"encoder"` or `"flare"`.
        format: `"onnx"` or `"torch"`.
        file: Name of the graph's file in the folder.
        source: The model that was exported.
        modalities: The M channels, in the order of the inputs.
        labels: Names of the classes of the flare model, else empty.
        inputs: Name to shape and dtype; B is free.
        outputs: Name to shape; all are float32.
        differences: Name of an output to its largest difference from eager, over all batches compared.
        compared_batches: Batch sizes that were compared.
        versions: Versions of the libraries that wrote and checked the graph.
    """

    task: str
    format: str
    file: str
    source: str
    modalities: list[str]
    labels: list[str]
    inputs: dict[str, str]
    outputs: dict[str, str]
    differences: dict[str, float]
    compared_batches: list[int]
    versions: dict[str, str]


class ObservationEncoder(nn.Module):
    """The encoder on observations, with the way of every modality to its tower written out.

    `SolarChipModel` sends the images of a mixed batch to their towers by values of `modality_ids`, which no graph can
    hold. Here a channel's tower follows from its place.

    Args:
        model: The encoder.
    """

    output_names = ("last_hidden_state", "pooler_output", "contrastive_embeds")

    def __init__(self, model: SolarChipModel):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(B, M, S, S) -> tokens (B, M, 1+L, hidden), class tokens (B, M, hidden), embeddings (B, M, 1+L, P)."""
        names = self.model.config.modalities
        tokens, embeds = {}, {}
        for tower, served in self.model.config.towers().items():
            images = pixel_values[:, [names.index(name) for name in served]].flatten(0, 1)[:, None]
            tower_ids = torch.arange(len(served), device=images.device).repeat(
                pixel_values.shape[0]
            )  # len() would fix the batch
            outputs = self.model.towers[tower](images, tower_ids, return_dict=True)
            for position, name in enumerate(served):
                tokens[name] = outputs.last_hidden_state.unflatten(0, (-1, len(served)))[:, position]
                embeds[name] = self._center(outputs.projections.unflatten(0, (-1, len(served)))[:, position], name)
        last_hidden_state = torch.stack([tokens[name] for name in names], dim=1)
        return last_hidden_state, last_hidden_state[:, :, 0], torch.stack([embeds[name] for name in names], dim=1)

    def _center(self, projections: torch.Tensor, name: str) -> torch.Tensor:
        if not self.model.centering:
            return projections
        return center_embeds(projections, *self.model.centering[name].statistics(projections.shape[1]))


class CalibratedProbabilities(nn.Module):
    """`calibrated_probabilities` in operators that ONNX has: no search among knots, no running minimum.

    Args:
        calibration: That of the model's configuration; None: softmax.
        num_classes: Number of ordered classes K.
    """

    def __init__(self, calibration: Mapping[str, Any] | None, num_classes: int):
        super().__init__()
        self.calibration = calibration
        self.num_classes = num_classes

    def forward(self, logits: torch.Tensor) -> torch.Tensor:
        """(B, K) -> (B, K), as in `models/calibration.py`."""
        calibration = self.calibration
        if calibration is None or calibration["method"] == "temperature":
            return (logits / (calibration or {"temperature": 1.0})["temperature"]).softmax(dim=-1)
        least = torch.ones_like(logits[:, 0])
        reached = [least]  # probability of each class or a higher one
        for boundary in range(self.num_classes - 1):
            odds = logits[:, boundary + 1 :].logsumexp(dim=-1) - logits[:, : boundary + 1].logsumexp(dim=-1)
            least = torch.minimum(least, self._calibrate(odds, boundary))
            reached.append(least)
        reached.append(torch.zeros_like(least))
        return torch.stack([upper - lower for upper, lower in pairwise(reached)], dim=-1)

    def _calibrate(self, odds: torch.Tensor, boundary: int) -> torch.Tensor:
        calibration = self.calibration
        if calibration["method"] == "platt":
            return torch.sigmoid(odds * calibration["slope"][boundary] + calibration["intercept"][boundary])
        x, y = odds.new_tensor(calibration["x"][boundary]), odds.new_tensor(calibration["y"][boundary])
        # A broken line is its first value and, for every piece, the piece's slope times the way gone along it.
        way = torch.minimum((odds.sigmoid()[:, None] - x[:-1]).clamp_min(0), x.diff())
        return y[0] + (way * (y.diff() / x.diff())).sum(dim=-1)


class FlareClassifier(nn.Module):
    """The flare model on observations; see `ObservationEncoder`.

    Args:
        model: The classifier.
    """

    output_names = ("logits", "probabilities", "modality_weights", "token_weights")

    def __init__(self, model: SolarChipForImageClassification):
        super().__init__()
        self.encoder = ObservationEncoder(model.solarchip)
        self.classifier = model.classifier
        self.probabilities = CalibratedProbabilities(model.config.calibration, model.config.num_labels)

    def forward(self, pixel_values: torch.Tensor, observed: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(B, M, S, S), (B, M) bool -> logits and probabilities (B, K), weights (B, M) and (B, M, 1+L)."""
        pixel_values = torch.where(observed[:, :, None, None], pixel_values, 0.0)
        tokens, _, embeds = self.encoder(pixel_values)
        rows = [
            self.classifier.image_features(tokens[:, index], embeds[:, index, 0], index)
            for index in range(tokens.shape[1])
        ]
        features, token_weights = (torch.stack(parts, dim=1) for parts in zip(*rows, strict=True))
        logits, modality_weights = self.classifier(features, observed)
        return logits, self.probabilities(logits), modality_weights, token_weights * observed[..., None]


def _eager(model: SolarChipPreTrainedModel, inputs: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """What the model gives by the way that its users go, in the order of the graph's outputs."""
    pixel_values = inputs["pixel_values"]
    shape = pixel_values.shape[:2]
    if isinstance(model, SolarChipForImageClassification):
        outputs = model(**inputs)
        probabilities = calibrated_probabilities(outputs.logits, model.config.calibration)
        return outputs.logits, probabilities, outputs.modality_weights, outputs.token_weights
    outputs = model(pixel_values.flatten(0, 1)[:, None], list(range(shape[1])) * shape[0])
    values = (outputs.last_hidden_state, outputs.pooler_output, outputs.contrastive_embeds)
    return tuple(value.unflatten(0, shape) for value in values)


def _random_inputs(task: str, batch: int, count: int, size: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(batch)
    inputs = {"pixel_values": torch.randn(batch, count, size, size, generator=generator)}
    if task == "flare":
        inputs["observed"] = torch.rand(batch, count, generator=generator) > 0.3
        inputs["observed"][0] = True
    return inputs


def largest_difference(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest absolute difference, of values beyond 1 relative to the largest of them; infinite if shapes differ."""
    if got.shape != expected.shape:
        return float("inf")
    difference = (got.double() - expected.double()).abs().max()
    return float(difference / expected.abs().max().clamp_min(1))


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    # It says of four operators that torchvision, which nothing here uses, is not installed.
    exporter = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = exporter.level
    exporter.setLevel(logging.ERROR)
    try:
        yield
    finally:
        exporter.setLevel(level)


def _write_onnx(program: torch.export.ExportedProgram, path: Path, inputs: list[str], outputs: Sequence[str]) -> None:
    weights = sum(tensor.numel() * tensor.element_size() for tensor in program.state_dict.values())
    with _quiet_exporter():
        try:
            exported = torch.onnx.export(
                program,
                input_names=inputs,
                output_names=list(outputs),
                dynamic_shapes={name: {0: "batch"} if name == "pixel_values" else {} for name in inputs},  # named once
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            reason = str(error.__cause__ or error).splitlines()[0]
            raise ExportError(f"the graph cannot be written as ONNX ({reason}). Try --format torch.") from error
    exported.save(path, external_data=weights > _INLINE_BYTES)


def _run_onnx(path: Path) -> Callable[[Mapping[str, torch.Tensor]], list[torch.Tensor]]:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(inputs: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        values = session.run(None, {name: value.numpy() for name, value in inputs.items()})
        return [torch.from_numpy(value) for value in values]

    return run


def _run_torch(path: Path) -> Callable[[Mapping[str, torch.Tensor]], Sequence[torch.Tensor]]:
    graph = torch.export.load(path).module()
    return lambda inputs: graph(**inputs)


def _load(source: str, task: str | None, modalities: Sequence[str] | None) -> tuple[Any, Any, str]:
    """The model in float32, its processor, and what it is."""
    config = AutoConfig.from_pretrained(source)
    if config.model_type != "solarchip":
        raise ExportError(f"{source}: model_type: expected 'solarchip', got {config.model_type!r}.")
    is_flare = SolarChipForImageClassification.__name__ in (config.architectures or [])
    task = task or ("flare" if is_flare else "encoder")
    if task == "flare" and not is_flare:
        raise ExportError(
            f"{source}: expected a flare model, got {', '.join(config.architectures or ['no architecture'])}, whose "
            "head would be random. Fine-tune it first, or export its encoder with --task encoder."
        )
    model_class = SolarChipForImageClassification if task == "flare" else SolarChipModel
    model = model_class.from_pretrained(source, modalities=modalities, dtype=torch.float32).eval()
    try:
        processor = AutoImageProcessor.from_pretrained(source, modalities=model.config.modalities)
    except OSError as error:
        raise ExportError(
            f"{source}: expected the image processor beside the model, since a graph is of no use without its "
            "preprocessing, got none. Save it there with processor.save_pretrained."
        ) from error
    return model, processor, task


def _require(output_format: str) -> dict[str, str]:
    """Versions of the libraries that the format takes."""
    libraries = ["torch", "transformers", *(["onnx", "onnxscript", "onnxruntime"] if output_format == "onnx" else [])]
    try:
        return {name: importlib.metadata.version(name) for name in libraries}
    except importlib.metadata.PackageNotFoundError as error:
        raise ImportError(
            f"The ONNX export needs onnx, onnxscript and onnxruntime, and {error.name} is not installed: "
            "pip install 'solarchip_hf[export]'."
        ) from error


@torch.no_grad()
def export_model(
    source: str | Path,
    output_dir: str | Path,
    *,
    output_format: str = "onnx",
    task: str | None = None,
    modalities: Sequence[str] | None = None,
) -> ExportReport:
    """Writes a model's graph, its processor's settings and a report into a new folder.

    Args:
        source: Folder of a saved model with its processor, or its name on the Hub.
        output_dir: A new or empty folder; it appears only when the graph agrees with the model.
        output_format: `"onnx"` (`model.onnx`, and `model.onnx.data` beside it where the weights pass 1 GiB) or
            `"torch"` (`model.pt2` for `torch.export.load`).
        task: `"encoder"` or `"flare"`; None: what was saved.
        modalities: Those to export, in this order; None: all of the model.

    Returns:
        The report, which the folder holds too.

    Raises:
        ExportError: The model is none of this package's, lacks its processor, or the graph disagrees with it by more
            than 1e-4. Nothing is written then.
        ImportError: ONNX is asked for and its libraries are not installed.
        OSError: There is no model, or the folder is not empty.
        ValueError: An unknown format, task or modality.
    """
    source, output_dir = str(source), Path(output_dir)
    for name, value, known in (("format", output_format, FORMATS), ("task", task or TASKS[0], TASKS)):
        if value not in known:
            raise ValueError(f"{name}: expected one of {', '.join(known)}, got {value!r}.")
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise FileExistsError(f"{output_dir}: expected a new or empty folder, got one with content.")
    versions = _require(output_format)
    model, processor, task = _load(source, task, modalities)
    graph = FlareClassifier(model) if task == "flare" else ObservationEncoder(model)
    count, size = len(model.config.modalities), processor.size

    example = _random_inputs(task, 2, count, size)
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(graph.eval(), (), example, dynamic_shapes={name: {0: batch} for name in example})
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # source lines with the paths of this machine

    standing = next(parent for parent in output_dir.absolute().parents if parent.is_dir())
    with tempfile.TemporaryDirectory(prefix=f".{output_dir.name}-", dir=standing) as scratch:
        folder = Path(scratch) / "exported"
        folder.mkdir()
        path = folder / FORMATS[output_format]
        if output_format == "onnx":
            _write_onnx(program, path, list(example), graph.output_names)
            run = _run_onnx(path)
        else:
            torch.export.save(program, path)
            run = _run_torch(path)
        differences = dict.fromkeys(graph.output_names, 0.0)
        shapes: dict[str, str] = {}
        for compared in _BATCHES:
            inputs = _random_inputs(task, compared, count, size)
            for name, got, expected in zip(graph.output_names, run(inputs), _eager(model, inputs), strict=True):
                differences[name] = max(differences[name], largest_difference(got, expected))
                shapes[name] = "(" + ", ".join(["B", *map(str, expected.shape[1:])]) + ")"
        off = {name: value for name, value in differences.items() if not value <= TOLERANCE}
        if off:
            raise ExportError(
                f"the exported graph: expected what {source} gives within {TOLERANCE}, got differences {off}. "
                "Nothing is written."
            )
        report = ExportReport(
            task=task,
            format=output_format,
            file=path.name,
            source=source,
            modalities=list(model.config.modalities),
            labels=[model.config.id2label[index] for index in range(model.config.num_labels)] * (task == "flare"),
            inputs={
                name: f"(B, {', '.join(map(str, value.shape[1:]))}) {str(value.dtype).removeprefix('torch.')}"
                for name, value in example.items()
            },
            outputs=shapes,
            differences=differences,
            compared_batches=list(_BATCHES),
            versions=versions,
        )
        processor.save_pretrained(folder)
        (folder / REPORT_NAME).write_text(json.dumps(asdict(report), indent=2) + "\n", encoding="utf-8")
        output_dir.mkdir(parents=True, exist_ok=True)
        folder.replace(output_dir)  # within one file system: all of it or nothing
    logger.info("%s: wrote %s", output_dir, report.file)
    return report


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns 0, or 2 with the reason on the standard error."""
    parser = argparse.ArgumentParser(
        prog="python -m solarchip_hf.hub.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", help="folder of a saved model with its processor, or its name on the Hub")
    parser.add_argument("output_dir", help="new or empty folder")
    parser.add_argument("--format", choices=FORMATS, default="onnx", help="default: %(default)s")
    parser.add_argument("--task", choices=TASKS, help="default: flare for a flare model, else encoder")
    parser.add_argument("--modalities", nargs="+", help="export these only, in this order, as: hmi 171 193")
    options = parser.parse_args(arguments)
    try:
        report = export_model(
            options.model,
            options.output_dir,
            output_format=options.format,
            task=options.task,
            modalities=options.modalities,
        )
    except (ImportError, OSError, ValueError) as error:
        print(f"not exported: {error}", file=sys.stderr)
        return 2
    print(f"{options.output_dir}/{report.file}: {report.task} of {', '.join(report.modalities)}")
    for name, shape in report.inputs.items():
        print(f"  input    {name} {shape}")
    for name, shape in report.outputs.items():
        print(f"  output   {name} {shape}, differs from eager by {report.differences[name]:.1e} at the most")
    return 0


__all__ = ["ExportError", "ExportReport", "FlareClassifier", "ObservationEncoder", "export_model", "main"]

if __name__ == "__main__":
    sys.exit(main())
