"""Similarity search: which Suns of a gallery look, to a model, most like this one?

Images are compared in the contrastive space by the cosine of one vector each: the class token's embedding, or the mean
of the patches on the disk. Vectors and facts of every image are kept in a folder as Parquet files, a FAISS index a
channel beside them; what is known is not embedded again, and new files are added.

The Sun of an hour ago is always the most alike. Neighbours near the query in time are therefore left out, by default
within a rotation of 27 days, and answers can be kept apart from each other likewise.
"""

import hashlib
import json
import logging
import os
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from solarchip_hf.data.catalog import SUFFIXES
from solarchip_hf.data.observations import load_observations
from solarchip_hf.data.shards import MANIFEST
from solarchip_hf.models.headers import SolarImage, SolarImageError
from solarchip_hf.models.modalities import MODALITIES, resolve_modality
from solarchip_hf.models.readers import read_image
from solarchip_hf.training.figures import colormap, draw_limb, new_figure
from solarchip_hf.training.retrieval import patch_disk_mask

if TYPE_CHECKING:
    from datasets import Dataset
    from matplotlib.figure import Figure

    from solarchip_hf.models.image_processing_solarchip import SolarChipImageProcessor
    from solarchip_hf.models.modeling_solarchip import SolarChipModel

logger = logging.getLogger(__name__)

EMBEDDINGS = ("class", "patch")
INDEX_FORMAT = 1
_SETTINGS = "index.json"
_SAVE_EVERY = 512  # images between two writes, so that an interrupted run goes on from there
_SCHEMA = pa.schema(
    [
        ("source", pa.string()),  # path of the file, or the folder of the prepared dataset
        ("row", pa.int64()),  # row of that dataset, -1 for a file
        ("stamp", pa.string()),  # of the file or dataset, so that a changed one is embedded again
        ("modality", pa.string()),
        ("time", pa.timestamp("us", tz="UTC")),
        ("embedding", pa.list_(pa.float32())),
    ]
)


class ImageEmbedder:
    """Images to unit vectors in the contrastive space.

    Args:
        model: The encoder, in evaluation mode.
        processor: Its image processor, of the same modalities.
        embedding: `"class"`: the class token's; `"patch"`: the mean of the patches on the disk.
        batch_size: Images a step.

    Raises:
        ValueError: An unknown embedding, or a processor of other modalities.
    """

    def __init__(
        self,
        model: "SolarChipModel",
        processor: "SolarChipImageProcessor",
        *,
        embedding: str = "class",
        batch_size: int = 8,
    ):
        if embedding not in EMBEDDINGS:
            raise ValueError(f"embedding: expected one of {', '.join(EMBEDDINGS)}, got {embedding!r}.")
        if list(processor.modalities) != list(model.config.modalities):
            raise ValueError(
                f"processor.modalities: expected the model's, {model.config.modalities}, got {processor.modalities}."
            )
        self.model, self.processor = model.eval(), processor
        self.embedding, self.batch_size = embedding, batch_size

    @torch.no_grad()
    def __call__(self, pixel_values: torch.Tensor, modality_ids: torch.Tensor) -> np.ndarray:
        """(N, 1, S, S) scaled images and (N,) positions in `modalities` -> (N, P) float32 of length 1."""
        device = next(self.model.parameters()).device
        vectors = []
        for start in range(0, len(pixel_values), self.batch_size):
            part = slice(start, start + self.batch_size)
            embeds = self.model(pixel_values[part].to(device), modality_ids[part]).contrastive_embeds.float().cpu()
            vectors.append(embeds[:, 0] if self.embedding == "class" else self._mean_of_patches(embeds[:, 1:]))
        return F.normalize(torch.cat(vectors), dim=-1).numpy()

    def _mean_of_patches(self, patches: torch.Tensor) -> torch.Tensor:
        share = self.model.config.min_disk_fraction if self.processor.geometry == "rsun" else 0
        mask = patch_disk_mask(patches.shape[1], self.processor.size, share)
        return F.normalize(patches if mask is None else patches[:, mask], dim=-1).mean(1)

    def embed_image(self, image: Any, modality: str | None = None) -> tuple[np.ndarray, SolarImage, np.ndarray]:
        """One image of any kind that the processor takes.

        Args:
            image: The file or object.
            modality: Its channel, where it does not tell.

        Returns:
            Its (P,) vector, its header facts, and the (S, S) scaled image.

        Raises:
            SolarImageError: It cannot be handled.
        """
        inputs, headers = self.processor.preprocess([image], modality, "pt", return_headers=True)
        vector = self(inputs["pixel_values"], inputs["modality_ids"])[0]
        return vector, headers[0], inputs["pixel_values"][0, 0].numpy()

    def visible(self, image: np.ndarray, modality: str) -> np.ndarray:
        """(S, S) a scaled image with NaN where the processor keeps nothing, for drawing."""
        support = self.processor.support(modality)
        return image if support is None else np.where(support, image, np.nan)

    def fingerprint(self) -> dict[str, Any]:
        """What vectors must have been made with to be comparable: weights, preprocessing, kind of embedding."""
        digest = hashlib.sha256(json.dumps(self.processor.to_dict(), sort_keys=True, default=str).encode())
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
        return {"format": INDEX_FORMAT, "embedding": self.embedding, "model": digest.hexdigest()}


@dataclass(frozen=True)
class Neighbour:
    """One answer.

    Attributes:
        similarity: Cosine, within -1..1.
        time: Of its observation, UTC.
        modality: Its channel.
        source: Its file, or the folder of the prepared dataset.
        row: Its row in that dataset; -1 for a file.
    """

    similarity: float
    time: pd.Timestamp
    modality: str
    source: str
    row: int


class SimilarityIndex:
    """Embeddings of a gallery in a folder, and the search in them by FAISS.

    The folder may hold vectors of several galleries. Answers are of those that `update` was called with (of all, if it
    was not), and of files that are still there.

    Args:
        folder: Where the vectors are kept; made if it does not exist.
        embedder: What makes them.

    Raises:
        ValueError: The folder holds vectors of another model, preprocessing or kind of embedding.
    """

    def __init__(self, folder: str | Path, embedder: ImageEmbedder):
        self.folder, self.embedder = Path(folder), embedder
        self._datasets: dict[str, Dataset] = {}
        self._galleries: list[Path] = []
        settings, path = embedder.fingerprint(), self.folder / _SETTINGS
        if path.exists():
            held = json.loads(path.read_text(encoding="utf-8"))
            if held != settings:
                different = ", ".join(name for name in settings if held.get(name) != settings[name])
                raise ValueError(
                    f"{self.folder}: expected vectors of this model and embedding, got others (different: "
                    f"{different}). Give another folder for the index, or remove this one."
                )
        else:
            self.folder.mkdir(parents=True, exist_ok=True)
            _write_whole(path, lambda partial: partial.write_text(json.dumps(settings, indent=2) + "\n"))

    def rows(self) -> pa.Table:
        """All vectors with their facts, in the order in which they came."""
        parts = sorted(self.folder.glob("part-*.parquet"))
        return pa.concat_tables([pq.read_table(part, schema=_SCHEMA) for part in parts] or [_SCHEMA.empty_table()])

    def update(self, gallery: str | Path, *, modalities: Sequence[str] | None = None) -> dict[str, Any]:
        """Embeds what of a gallery is not known yet; may be interrupted and called again.

        Args:
            gallery: A prepared dataset, a folder of FITS or JPEG2000 files, or one file.
            modalities: Channels to take; None: all that the model has.

        Returns:
            `known` and `added` images, and `refused`, a list of sentences.

        Raises:
            FileNotFoundError: There is no such folder, or nothing in it.
            ValueError: A prepared dataset of other settings than the model's.
        """
        gallery = Path(gallery).absolute()
        if gallery not in self._galleries:
            self._galleries.append(gallery)
            self._datasets.clear()
        names = self.embedder.processor.modalities if modalities is None else map(resolve_modality, modalities)
        wanted = set(names)
        table = self.rows()
        known = set(zip(*(table[name].to_pylist() for name in ("source", "row", "stamp", "modality")), strict=True))
        files = {(source, stamp) for source, _, stamp, _ in known}
        refused: list[str] = []
        if (gallery / MANIFEST).exists():
            images = self._dataset_images(gallery, wanted, known)
        else:
            images = self._file_images(gallery, wanted, files, refused)
        added, pending = 0, []
        for facts, pixels in images:
            pending.append((facts, pixels))
            if len(pending) == _SAVE_EVERY:
                added += self._append(pending)
                pending = []
        added += self._append(pending)
        return {"known": len(known), "added": added, "refused": refused}

    def _file_images(
        self, gallery: Path, wanted: set[str], known: set[tuple[str, str]], refused: list[str]
    ) -> Iterator[tuple[dict[str, Any], torch.Tensor]]:
        found = sorted(gallery.rglob("*")) if gallery.is_dir() else [gallery]
        files = [path for path in found if path.is_file() and path.name.lower().endswith(SUFFIXES)]
        if not files:
            raise FileNotFoundError(
                f"{gallery}: expected a prepared dataset, or files ending in {', '.join(SUFFIXES)}, got none."
            )
        for path in tqdm(files, desc="gallery", unit="file", disable=None):
            stamp = f"{path.stat().st_size}-{path.stat().st_mtime_ns}"
            if (str(path), stamp) in known:
                continue
            try:
                facts = read_image(path, header_only=True)
                if facts.modality is not None and facts.modality not in wanted:
                    continue
                pixel_values = self.embedder.processor([path], return_tensors="pt")["pixel_values"]
            except (SolarImageError, OSError) as error:
                refused.append(str(error))
                continue
            yield (
                {"source": str(path), "row": -1, "stamp": stamp, "modality": facts.modality, "time": facts.time},
                pixel_values[0, 0],
            )

    def _dataset_images(
        self, gallery: Path, wanted: set[str], known: set[tuple[str, int, str, str]]
    ) -> Iterator[tuple[dict[str, Any], torch.Tensor]]:
        manifest = json.loads((gallery / MANIFEST).read_bytes())
        stamp = _dataset_stamp(gallery)
        names = [name for name in manifest["modalities"] if name in wanted]
        if not names:
            raise ValueError(f"{gallery}: expected images of {', '.join(sorted(wanted))}, got none in this dataset.")
        observations = load_observations(gallery, names, processor=self.embedder.processor)
        for row in tqdm(range(len(observations)), desc="gallery", unit="observation", disable=None):
            new = [
                position
                for position, name in enumerate(names)
                if observations.observed[row, position] and (str(gallery), row, stamp, name) not in known
            ]
            if not new:
                continue
            pixel_values, facts = observations[row]["pixel_values"], observations.metadata.iloc[row]
            for position in new:
                name = names[position]
                yield (
                    {
                        "source": str(gallery),
                        "row": row,
                        "stamp": stamp,
                        "modality": name,
                        "time": facts[f"{name}_time"],
                    },
                    pixel_values[position],
                )

    def _append(self, pending: list[tuple[dict[str, Any], torch.Tensor]]) -> int:
        if not pending:
            return 0
        modalities = self.embedder.processor.modalities
        ids = torch.tensor([modalities.index(facts["modality"]) for facts, _ in pending])
        vectors = self.embedder(torch.stack([pixels for _, pixels in pending])[:, None], ids)
        rows = [{**facts, "embedding": vector} for (facts, _), vector in zip(pending, vectors, strict=True)]
        table = pa.Table.from_pylist(rows, schema=_SCHEMA)
        number = len(list(self.folder.glob("part-*.parquet")))
        _write_whole(self.folder / f"part-{number:05d}.parquet", lambda partial: pq.write_table(table, partial))
        self._datasets.clear()
        return len(rows)

    def dataset(self, modality: str) -> "Dataset":
        """The images of a channel as a `datasets.Dataset` that carries the FAISS index `"embedding"`.

        Args:
            modality: Its name.

        Raises:
            ImportError: faiss is not installed.
            ValueError: The gallery has no image of this channel.
        """
        name = resolve_modality(modality)
        if name in self._datasets:
            return self._datasets[name]
        try:
            import faiss
        except ImportError as error:
            raise ImportError("Similarity search needs faiss: pip install 'solarchip_hf[search]'.") from error
        from datasets import Dataset

        frame = self.rows().to_pandas()
        frame = frame[(frame["modality"] == name) & self._answerable(frame)]
        # Of a file that changed, or that the index met twice, the newest row counts.
        frame = frame.drop_duplicates(["source", "row"], keep="last").reset_index(drop=True)
        if frame.empty:
            raise ValueError(f"{self.folder}: expected images of {name} in the gallery, got none.")
        dataset = Dataset(pa.Table.from_pandas(frame, schema=_SCHEMA, preserve_index=False))
        identity = hashlib.sha256(pd.util.hash_pandas_object(frame[["source", "row", "stamp"]]).to_numpy().tobytes())
        path = self.folder / f"{name}-{identity.hexdigest()[:12]}.faiss"
        if path.exists():
            dataset.load_faiss_index("embedding", path)
        else:
            dataset.add_faiss_index("embedding", metric_type=faiss.METRIC_INNER_PRODUCT)
            for stale in self.folder.glob(f"{name}-*.faiss"):
                stale.unlink()
            _write_whole(path, lambda partial: dataset.save_faiss_index("embedding", partial))
        self._datasets[name] = dataset
        return dataset

    def _answerable(self, frame: pd.DataFrame) -> np.ndarray:
        """Whether a row is of the galleries that were given, and still there."""
        verdicts = {}
        for source, row, stamp in frame[["source", "row", "stamp"]].itertuples(index=False):
            key = (source, row >= 0, stamp)
            if key not in verdicts:
                path = Path(source)
                ours = not self._galleries or any(path.is_relative_to(gallery) for gallery in self._galleries)
                verdicts[key] = ours and (_dataset_stamp(path) == stamp if row >= 0 else path.is_file())
        keys = zip(frame["source"], frame["row"] >= 0, frame["stamp"], strict=True)
        return np.array([verdicts[key] for key in keys], dtype=bool)

    def nearest(
        self,
        vector: np.ndarray,
        modality: str,
        *,
        k: int = 5,
        time: datetime | pd.Timestamp | None = None,
        exclude_within: str | pd.Timedelta = "27D",
        apart: str | pd.Timedelta = "0h",
    ) -> list[Neighbour]:
        """The k images of a channel that are the most similar.

        Args:
            vector: (P,) of length 1, from the same embedder.
            modality: The channel that is searched; another than the query's is allowed.
            k: How many.
            time: Of the query; None: nothing is left out for its sake.
            exclude_within: Images nearer to the query in time than this are left out.
            apart: Answers nearer than this in time to a better one are left out.

        Returns:
            At most k answers, the most similar first; fewer where no more are left.

        Raises:
            ValueError: No image of this channel, or a span that cannot be read.
        """
        import faiss

        if k < 1:
            raise ValueError(f"k: expected at least 1, got {k}.")
        dataset = self.dataset(modality)
        times = pd.DatetimeIndex(dataset.data.column("time").to_pandas())
        allowed = np.ones(len(dataset), dtype=bool)
        if time is not None:
            allowed &= _far_from(times, pd.Timestamp(time), _span("exclude_within", exclude_within))
        spacing = _span("apart", apart)
        query = np.ascontiguousarray(vector, dtype=np.float32)[None]
        answers: list[Neighbour] = []
        while len(answers) < k and allowed.any():
            wanted = 1 if spacing > pd.Timedelta(0) else k - len(answers)
            selector = faiss.IDSelectorBatch(np.flatnonzero(allowed))
            found = dataset.search_batch(
                "embedding",
                query,
                k=min(wanted, int(allowed.sum())),
                params=faiss.SearchParameters(sel=selector),  # type: ignore[call-arg]
            )
            for index, score in zip(found.total_indices[0].tolist(), found.total_scores[0].tolist(), strict=True):
                facts = dataset[index]
                if not Path(facts["source"]).exists():  # removed since the index was read
                    allowed[index] = False
                    continue
                answers.append(Neighbour(score, times[index], facts["modality"], facts["source"], facts["row"]))
                allowed[index] = False
                allowed &= _far_from(times, times[index], spacing)
        return answers

    def image(self, neighbour: Neighbour) -> np.ndarray:
        """(S, S) the scaled image of an answer, read again from where it lies."""
        processor = self.embedder.processor
        if neighbour.row < 0:
            return processor([neighbour.source], return_tensors="np")["pixel_values"][0, 0]
        observations = load_observations(neighbour.source, [neighbour.modality], processor=processor)
        return observations[neighbour.row]["pixel_values"][0].numpy()


def _dataset_stamp(folder: Path) -> str | None:
    """What tells one state of a prepared dataset from another; None where there is none."""
    manifest = folder / MANIFEST
    return hashlib.sha256(manifest.read_bytes()).hexdigest()[:16] if manifest.is_file() else None


def _far_from(times: pd.DatetimeIndex, time: pd.Timestamp, span: pd.Timedelta) -> np.ndarray:
    time = time.tz_localize("UTC") if time.tzinfo is None else time.tz_convert("UTC")
    return np.abs((times - time).to_numpy()) >= span.to_timedelta64()


def _span(name: str, value: str | pd.Timedelta) -> pd.Timedelta:
    try:
        span = pd.Timedelta(value)
    except ValueError as error:
        raise ValueError(f"{name}: expected a span as '27D' or '12h', got {value!r}.") from error
    if not span >= pd.Timedelta(0):
        raise ValueError(f"{name}: expected a span of zero or more, got {value!r}.")
    return span


def _write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        write(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def contact_sheet(
    images: Sequence[np.ndarray],
    modalities: Sequence[str],
    captions: Sequence[str],
    *,
    limb: bool = True,
    title: str = "",
) -> "Figure":
    """Images side by side in the colour maps of their channels, the query first.

    Args:
        images: (S, S) scaled images, row 0 in the south; NaN is drawn black.
        modalities: Their channels.
        captions: The text below the channel's name.
        limb: Whether to draw the limb (meaningful for the `rsun` geometry).
        title: Above the figure.

    Returns:
        The figure; all images of a channel share one scale, that of the first.
    """
    columns = min(len(images), 4)
    lines = -(-len(images) // columns)
    figure = new_figure(2.5 * columns, 3.0 * lines + 0.4)
    panels = figure.subplots(lines, columns, squeeze=False).reshape(-1)
    limits: dict[str, tuple[float, float]] = {}
    for axes in panels[len(images) :]:
        axes.set_visible(False)
    for axes, image, modality, caption in zip(panels, images, modalities, captions, strict=False):
        name = resolve_modality(modality)
        if name not in limits:
            high = max(float(np.nanquantile(np.abs(image), 0.998)), 1e-3)
            limits[name] = (-high, high) if MODALITIES[name].signed else (float(np.nanquantile(image, 0.02)), high)
        axes.set(xticks=[], yticks=[], facecolor="black")
        axes.imshow(image, origin="lower", cmap=colormap(name), vmin=limits[name][0], vmax=limits[name][1])
        if limb:
            draw_limb(axes, image.shape[-1])
        axes.set_title(f"{MODALITIES[name].label}\n{caption}", fontsize=8)
    if title:
        figure.suptitle(title, fontsize=10)
    return figure


__all__ = ["ImageEmbedder", "Neighbour", "SimilarityIndex", "contact_sheet"]
