"""What a demonstration page shows of an observation: the Sun, its forecast, its translation, its nearest neighbours.

Nothing here knows of a web framework. A `Demonstration` holds models that several visitors share and nothing of any
visitor: what a visitor has chosen is an `OpenedObservation`, which the page keeps and hands back. Computing and drawing
happen one at a time, since a scheduler and matplotlib have a state of their own.
"""

import logging
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

from solarchip_hf.data.catalog import SUFFIXES
from solarchip_hf.models.headers import SolarImage, SolarImageError
from solarchip_hf.models.image_processing_solarchip import SolarChipImageProcessor
from solarchip_hf.models.modalities import MODALITIES
from solarchip_hf.models.readers import read_image
from solarchip_hf.training.figures import new_figure

from .flare_figures import MAGNETOGRAM_RANGE, draw_sun, forecast_figure
from .similarity import ImageEmbedder, SimilarityIndex, contact_sheet

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)

VIEW_SIZE = 512
MAX_FILES = 4
WORDS = {"c_plus": "C or larger", "m_plus": "M or larger", "x_plus": "X"}


@dataclass(frozen=True)
class OpenedObservation:
    """What one visitor has chosen.

    Attributes:
        paths: File by channel.
        facts: Header facts by channel.
    """

    paths: Mapping[str, str]
    facts: Mapping[str, SolarImage]

    @property
    def first(self) -> str:
        """The channel that comes first in the table of channels."""
        return next(name for name in MODALITIES if name in self.paths)

    def describe(self) -> str:
        """Markdown: what the files are, and what is to be known of them."""
        lines = []
        for name, facts in self.facts.items():
            time = f"{facts.time.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC" if facts.time else "time unknown"
            marks = [
                *(["**synthetic**, not an observation"] if _synthetic(facts) else []),
                *(["8-bit quick-look, intensities approximate"] if facts.approximate else []),
                *(["near real time"] if facts.near_real_time else []),
            ]
            lines.append(f"- **{MODALITIES[name].label}**, {time}" + "".join(f"; {mark}" for mark in marks))
        return "\n".join(lines)


def _synthetic(facts: SolarImage) -> bool:
    return "SYNTHETIC" in str(facts.header.get("ORIGIN", "")).upper()


def _trained_on_synthetic(source: str) -> bool:
    """Whether a model's card says that it was trained on synthetic images; without a card nothing is said."""
    from huggingface_hub import ModelCard
    from transformers.utils import cached_file

    try:
        path = cached_file(source, "README.md")
    except OSError:
        logger.info("%s: no card is there, so nothing is said of the data that it was trained on.", source)
        return False
    return "synthetic-data" in (ModelCard.load(path, ignore_metadata_errors=True).data.tags or [])


def picture(figure: "Figure") -> np.ndarray:
    """(H, W, 3) uint8 of a figure."""
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()


class Demonstration:
    """Models and a gallery behind a demonstration page.

    Args:
        encoder: Folder or Hub name of a pretrained model, for the nearest neighbours; None: without.
        flare: Of a flare model; None: without a forecast.
        translation: Of a translation pipeline; None: without a translation.
        gallery: Folder of the files that can be picked, and among which neighbours are looked for.
        index: Folder for the gallery's embeddings.

    Raises:
        FileNotFoundError: The gallery holds no file.
        OSError, ValueError: A model cannot be loaded.
    """

    def __init__(
        self,
        *,
        gallery: str | Path,
        index: str | Path,
        encoder: str | None = None,
        flare: str | None = None,
        translation: str | None = None,
    ):
        self.gallery = Path(gallery)
        self._lock = threading.Lock()
        self._view = SolarChipImageProcessor(size=VIEW_SIZE)
        self.samples = self._find_samples()
        self._forecast = self._load_forecast(flare) if flare else None
        self._pipeline = self._load_translation(translation) if translation else None
        self._index = self._load_index(encoder, index) if encoder else None
        models = {"forecast": flare, "translate": translation, "nearest": encoder}
        self._notes = {
            name: "\n\nThis model was trained on **synthetic** images: its answers tell nothing of the real Sun."
            for name, source in models.items()
            if source and _trained_on_synthetic(source)
        }

    @property
    def abilities(self) -> dict[str, bool]:
        """Which of `forecast`, `translate` and `nearest` have a model."""
        parts = {"forecast": self._forecast, "translate": self._pipeline, "nearest": self._index}
        return {name: part is not None for name, part in parts.items()}

    def _find_samples(self) -> dict[str, str]:
        files = sorted(path for path in self.gallery.rglob("*") if path.name.lower().endswith(SUFFIXES))
        if not files:
            raise FileNotFoundError(f"{self.gallery}: expected files ending in {', '.join(SUFFIXES)}, got none.")
        return {path.name: str(path) for path in files}

    @staticmethod
    def _load_forecast(source: str) -> Any:
        from transformers import pipeline

        # transformers' annotations know its own tasks alone.
        return pipeline("solar-flare-forecasting", model=source, device="cpu")  # type: ignore[call-overload]

    @staticmethod
    def _load_translation(source: str) -> Any:
        from solarchip_hf.translation import SolarChipControlNetPipeline

        pipeline = SolarChipControlNetPipeline.from_pretrained(source)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def _load_index(self, source: str, folder: str | Path) -> SimilarityIndex:
        from transformers import AutoImageProcessor, AutoModel

        embedder = ImageEmbedder(AutoModel.from_pretrained(source), AutoImageProcessor.from_pretrained(source))
        index = SimilarityIndex(folder, embedder)
        report = index.update(self.gallery)
        logger.info("%s: %d images known, %d added", folder, report["known"], report["added"])
        return index

    def open(self, paths: Sequence[str | Path]) -> OpenedObservation:
        """Reads what a visitor chose.

        Args:
            paths: One file, or several of one moment and of different channels.

        Returns:
            The observation.

        Raises:
            SolarImageError: A file is none that can be used, in a sentence without folders.
        """
        if not 1 <= len(paths) <= MAX_FILES:
            raise SolarImageError("files", "number", f"1 to {MAX_FILES}", str(len(paths)), "Choose fewer.")
        chosen: dict[str, str] = {}
        facts: dict[str, SolarImage] = {}
        for path in map(str, paths):
            try:
                found, _ = self._view.to_physical(path)
            except SolarImageError as error:
                raise _without_folder(error) from error
            name = str(found.modality)
            if name in chosen:
                raise SolarImageError(
                    Path(path).name, "channel", "one file of each channel", f"a second one of {MODALITIES[name].label}",
                    "Choose one of them.",
                )  # fmt: skip
            chosen[name], facts[name] = path, found
        order = [name for name in MODALITIES if name in chosen]
        return OpenedObservation({name: chosen[name] for name in order}, {name: facts[name] for name in order})

    def look(self, observation: OpenedObservation) -> np.ndarray:
        """(H, W, 3) uint8: the Sun in the colours of its channels."""
        with self._lock:
            count = len(observation.paths)
            figure = new_figure(5.0 * count, 6.0)
            # The page lays its buttons over the top.
            figure.set_layout_engine("constrained", rect=(0.0, 0.0, 1.0, 0.94))
            for axes, (name, path) in zip(
                figure.subplots(1, count, squeeze=False)[0], observation.paths.items(), strict=True
            ):
                facts, image = self._view.to_physical(path)
                support = self._view.support(name)
                image = image if support is None else np.where(support, image, np.nan)
                draw_sun(axes, image, name, facts.rsun_arcsec / abs(facts.cdelt[0]))
                kind = ", synthetic" if _synthetic(facts) else ""
                time = f"\n{facts.time:%Y-%m-%d %H:%M} UTC" if facts.time else ""
                axes.set_title(f"{MODALITIES[name].label}{kind}{time}", fontsize=11)
                field = f"-{MAGNETOGRAM_RANGE:g} to {MAGNETOGRAM_RANGE:g} G"
                shown = field if MODALITIES[name].signed else "fourth root of DN"
                axes.set_xlabel(f"solar north up; {shown}", fontsize=9)
            return picture(figure)

    def forecast(self, observation: OpenedObservation, *, event: str = "m_plus") -> tuple[np.ndarray, str]:
        """The forecast with its gauge, and what in the image speaks for a flare.

        Args:
            observation: What was opened.
            event: What to explain: `c_plus`, `m_plus` or `x_plus`.

        Returns:
            A picture and Markdown.

        Raises:
            SolarImageError: The model cannot use these files.
        """
        known = self._forecast.image_processor.modalities
        images = {name: path for name, path in observation.paths.items() if name in known}
        if not images:
            raise _unknown_channel(observation, known, "forecast")
        with self._lock:
            try:
                answer = self._forecast(images, attribution=event, attribution_steps=16)
            except SolarImageError as error:
                raise _without_folder(error) from error
            figure = picture(forecast_figure(answer))
        lines = [f"- {WORDS.get(name, name)}: **{value:.1%}**" for name, value in answer["exceedance"].items()]
        kind = "calibrated" if answer["calibrated"] else "**not calibrated**: read them as a ranking"
        verb = {"start": "starts", "peak": "peaks"}[answer["window"]["by"]]
        span = f"after {answer['valid_from']} until {answer['valid_until']}"
        window = f"Largest flare that {verb} {span}; probabilities are {kind}."
        text = "\n".join([window, "", *lines, "", "Not an operational warning."])
        return figure, text + self._notes.get("forecast", "")

    def translate(
        self, observation: OpenedObservation, *, num_samples: int = 4, num_inference_steps: int = 20, seed: int = 0
    ) -> tuple[np.ndarray, str]:
        """The generated channel beside the spread of its samples.

        Args:
            observation: What was opened.
            num_samples: Samples, 2 or more.
            num_inference_steps: Denoising steps.
            seed: Of the first sample.

        Returns:
            A picture and Markdown.

        Raises:
            SolarImageError: The pipeline cannot use these files.
        """
        from solarchip_hf.translation.figures import translation_figure

        config, processor = self._pipeline.config, self._pipeline.image_processor
        absent = [name for name in config.source_modalities if name not in observation.paths]
        if absent:
            raise _unknown_channel(observation, config.source_modalities, "translation", every=True)
        images = {name: observation.paths[name] for name in config.source_modalities}
        target = config.target_modality
        with self._lock:
            try:
                output = self._pipeline(
                    images if len(images) > 1 else next(iter(images.values())),
                    num_inference_steps=num_inference_steps,
                    num_samples=num_samples,
                    generator=[torch.Generator().manual_seed(seed + index) for index in range(num_samples)],
                    output_type="map",
                )
            except SolarImageError as error:
                raise _without_folder(error) from error
            maps = {}
            for name, path in images.items():
                facts, physical = processor.to_physical(path, name)
                maps[name] = processor.to_map(physical, name, facts)
            drawn = " from a SYNTHETIC image" if any(_synthetic(observation.facts[name]) for name in images) else ""
            title = f"Generated{drawn}, not observed: mean and spread of {num_samples} samples"
            figure = picture(translation_figure(maps, output.prediction[0], output.uncertainty[0], target, title))
        text = (
            f"**Generated** {MODALITIES[target].label} from {', '.join(MODALITIES[name].label for name in images)}, "
            f"seeds {seed} to {seed + num_samples - 1}, {num_inference_steps} steps. Where the spread is large, the "
            "source leaves the answer open. A generated image is not an observation."
        )
        return figure, text + self._notes.get("translate", "")

    def nearest(
        self, observation: OpenedObservation, *, k: int = 3, exclude_within: str = "27D"
    ) -> tuple[np.ndarray, str]:
        """The gallery's images of the same channel that are the most similar.

        Args:
            observation: What was opened; its first channel that the model knows is compared.
            k: How many.
            exclude_within: Images nearer in time are left out.

        Returns:
            A picture and Markdown.

        Raises:
            SolarImageError: The model does not know the channel, or the gallery has no other image.
        """
        embedder = self._index.embedder
        known = [name for name in observation.paths if name in embedder.processor.modalities]
        if not known:
            raise _unknown_channel(observation, embedder.processor.modalities, "search")
        name = known[0]
        with self._lock:
            vector, facts, image = embedder.embed_image(observation.paths[name])
            try:
                answers = self._index.nearest(vector, name, k=k, time=facts.time, exclude_within=exclude_within)
            except ValueError as error:
                raise SolarImageError("gallery", "images", f"some of {MODALITIES[name].label}", "none") from error
            if not answers:
                raise SolarImageError("gallery", "time", f"images at least {exclude_within} away", "none")
            shown = [embedder.visible(one, name) for one in (image, *map(self._index.image, answers))]
            kinds = [", synthetic" if _synthetic(read_image(answer.source)) else "" for answer in answers]
            captions = ["yours" + (", synthetic" if _synthetic(facts) else "")]
            captions[0] += f"\n{facts.time:%Y-%m-%d %H:%M} UTC" if facts.time else ""
            captions += [
                f"cosine {answer.similarity:.3f}{kind}\n{answer.time:%Y-%m-%d %H:%M} UTC"
                for answer, kind in zip(answers, kinds, strict=True)
            ]
            limb = embedder.processor.geometry == "rsun"
            sheet = picture(contact_sheet(shown, [name] * len(shown), captions, limb=limb))
        lines = [
            f"{rank}. {Path(answer.source).name}, {answer.time:%Y-%m-%d %H:%M} UTC{kind}"
            for rank, (answer, kind) in enumerate(zip(answers, kinds, strict=True), 1)
        ]
        days = pd.Timedelta(exclude_within) / pd.Timedelta("1D")
        among = "Among the gallery's images" + (f" at least {days:g} days away:" if days else ":")
        return sheet, "\n".join([among, "", *lines]) + self._notes.get("nearest", "")


def _without_folder(error: SolarImageError) -> SolarImageError:
    """The same sentence with the file's name instead of where a server keeps it."""
    parts = (error.fieldname, error.expected, error.got, error.advice)
    folder = str(Path(error.source).parent)
    cleaned = [text.replace(error.source, Path(error.source).name).replace(f"{folder}/", "") for text in parts]
    return SolarImageError(Path(error.source).name, *cleaned)


def _unknown_channel(
    observation: OpenedObservation, known: Sequence[str], purpose: str, *, every: bool = False
) -> SolarImageError:
    names = ", ".join(MODALITIES[name].label for name in known)
    got = ", ".join(MODALITIES[name].label for name in observation.paths)
    return SolarImageError(purpose, "channel", f"{names}" if every or len(known) == 1 else f"one of {names}", got)


__all__ = ["Demonstration", "OpenedObservation", "picture"]
