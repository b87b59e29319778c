"""Image processor: FITS files, JPEG2000, HDUs, Maps, arrays in; scaled tensors on the canonical grid out, and back."""

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from functools import lru_cache
from typing import Any, TypedDict

import numpy as np
import torch
from transformers.image_processing_base import ImageProcessingMixin  # noqa: F401 (diffusers looks for it here)
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature

from .geometry import (
    GEOMETRIES,
    SUPPORT_RADIUS,
    canonical_facts,
    canonical_header,
    disk_mask,
    to_canonical,
)
from .header_cards import generator_of
from .headers import SolarImage, SolarImageError
from .image_inputs import as_list, image_from_array, is_array
from .image_statistics import approximate_statistics, check_statistics, is_approximate, published_statistics
from .jpeg2000 import decode_quicklook
from .modalities import MODALITIES, MODALITY_NAMES, resolve_modality
from .photometry import PHOTOMETRIES, degradation_factor, load_degradation, photometric_factor, physical_unit
from .readers import read_image, require_modality
from .scaling import SCALINGS, standardize, unstandardize
from .settings import choice, refuse_typos, square_size

logger = logging.getLogger(__name__)

# support: HMI to the limb, AIA to the circle inscribed in the frame, zero after scaling elsewhere. disk: all to the
# limb. keep: nothing is cut, missing pixels are zero after scaling. zero: missing pixels are zero before scaling.
OFF_DISK_POLICIES = ("support", "disk", "keep", "zero")
_PUBLISHED: dict[str, Any] = {
    "size": 1024,
    "geometry": "none",
    "photometry": "dn",
    "degradation": None,
    "scaling": "log1p",
    "off_disk": "zero",
}
# Images of one observation that lie farther apart bring a warning, in a translation an error: in an hour the Sun turns
# by half a degree. Pairing itself is far stricter.
LONGEST_DIFFERENCE = timedelta(hours=1)


class SolarChipImageProcessorKwargs(TypedDict, total=False):
    """Settings that `from_pretrained` may override."""

    modalities: list[str] | None
    size: int | dict[str, int] | None
    geometry: str | None
    photometry: str | None
    degradation: str | dict[str, Any] | None
    scaling: str | None
    statistics: dict[str, Any] | None
    off_disk: str | None


@lru_cache(maxsize=8)
def _mask(size: int, radius: float) -> np.ndarray:
    mask = disk_mask(size, radius)
    mask.setflags(write=False)
    return mask


class SolarChipImageProcessor(BaseImageProcessor):
    """Turns solar images into model inputs, and model outputs into physical units or sunpy Maps.

    An image is a path or the bytes of a FITS file (plain, gzip, Rice) or of a Helioviewer JPEG2000, an astropy HDU or
    HDUList, a sunpy Map, a `SolarImage`, or a NumPy / torch array together with `modality=`. Each is put on the
    canonical grid by one anti-aliased resampling, north up, brought to the named photometry, transformed and z-scored.

    An array has no header: it is taken as square, north-up (row 0 in the south), filling the canonical frame, in the
    unit of `photometry` (after exposure and degradation); only its size is changed where it differs. An 8-bit PIL
    image is a quick-look with row 0 in the north and needs `modality=` and `quicklook=True`.

    Args:
        modalities: The ordered names that `modality_ids` index; default: all eleven.
        size: Pixels of the result on a side.
        geometry: `"rsun"` (R = 406.67 px at 1024 px), `"arcsec"` (2.4 arcsec per pixel at 1024 px) or `"none"` (resized
            only, orientation as in the file).
        photometry: `"nominal"` (DN x T0 / EXPTIME, with the channel's nominal exposure T0), `"dn"` or `"dn_per_s"`.
        degradation: None, or a named table of throughput that AIA images are divided by: a mapping
            `{"name": ..., "factors": {modality: {date: factor}}}` or the path of a CSV or JSON file.
        scaling: `"log1p"` (sign(x) log(1 + |x|)), `"asinh"` or `"linear"`, before the z-score.
        statistics: `{"photometry", "degradation", "geometry", "size", "scaling", "source", "modalities": {name:
            {"mean", "std", "unit"}}}` of the transformed image; must belong to the settings above. None stands for
            approximate ones, where such are known.
        off_disk: `"support"` (HMI to the limb, AIA to the circle inscribed in the frame, zero elsewhere), `"disk"`,
            `"keep"` or `"zero"` (missing pixels are zero before scaling). None: `"zero"` for geometry `"none"`,
            `"support"` otherwise.
        preset: `"published"` sets everything but `modalities` as the published method has it; see `published`. Other
            settings beside it are refused.

    Raises:
        ValueError: A setting is unknown or misspelt, or the statistics belong to other settings.
    """

    model_input_names = ["pixel_values", "modality_ids"]  # noqa: RUF012
    rescale_factor = None  # type: ignore[assignment]  # the base class would write 1/255 into every saved file
    valid_kwargs = SolarChipImageProcessorKwargs  # type: ignore[assignment]

    def __init__(
        self,
        *,
        modalities: Sequence[str] | None = None,
        size: int | Mapping[str, int] = 1024,
        geometry: str = "rsun",
        photometry: str = "nominal",
        degradation: str | os.PathLike | Mapping[str, Any] | None = None,
        scaling: str = "log1p",
        statistics: Mapping[str, Any] | None = None,
        off_disk: str | None = None,
        preset: str | None = None,
        **kwargs: Any,
    ):
        refuse_typos(type(self).__name__, self.valid_kwargs.__annotations__, kwargs)
        super().__init__(**kwargs)
        if preset is not None:
            choice("preset", preset, ("published",))
            published = {**_PUBLISHED, "statistics": published_statistics()}
            given = (square_size(size), geometry, photometry, degradation, scaling, off_disk, statistics)
            defaults = SolarChipImageProcessor.__init__.__kwdefaults__ or {}
            for (name, value), other in zip(published.items(), given, strict=True):
                if other not in (value, defaults[name]):
                    raise ValueError(
                        f"{name}: expected none beside preset={preset!r}, which sets it too, got {other!r}. "
                        "Leave one of the two out."
                    )
            size, geometry, photometry, degradation, scaling, off_disk, statistics = published.values()
        if isinstance(modalities, str):  # a sequence too, of letters
            raise ValueError(f"modalities: expected a list of names, got the text {modalities!r}.")
        self.modalities = [resolve_modality(name) for name in (MODALITY_NAMES if modalities is None else modalities)]
        if not self.modalities or len(set(self.modalities)) != len(self.modalities):
            raise ValueError(f"modalities: expected a list of different channels, got {modalities!r}.")
        self.size = square_size(size)
        self.geometry = choice("geometry", geometry, GEOMETRIES)
        self.photometry = choice("photometry", photometry, PHOTOMETRIES)
        self.degradation = load_degradation(degradation)
        self.scaling = choice("scaling", scaling, SCALINGS)
        if off_disk is None:
            off_disk = "zero" if geometry == "none" else "support"
        self.off_disk = choice("off_disk", off_disk, OFF_DISK_POLICIES)
        if (geometry == "none" and off_disk in ("support", "disk")) or (geometry == "arcsec" and off_disk == "disk"):
            raise ValueError(
                f"off_disk: expected a policy that needs no fixed solar radius for geometry={geometry!r}, got "
                f"{off_disk!r}; leave it out, or take 'keep' or 'zero'."
            )
        self.statistics = self._resolve_statistics(statistics)

    @classmethod
    def published(cls, modalities: Sequence[str] | None = None) -> "SolarChipImageProcessor":
        """The published preprocessing: raw DN and gauss, resized to 1024 px, NaN to 0, the published statistics."""
        return cls(preset="published", modalities=modalities)

    @classmethod
    def from_dict(cls, image_processor_dict: Mapping[str, Any], **kwargs: Any):
        """Builds a processor from a saved one; keywords override its settings, as `from_pretrained` passes them on.

        With another `geometry` the off-disk policy is the default one of that geometry, unless it is given too.

        Args:
            image_processor_dict: The content of a `preprocessor_config.json`.
            **kwargs: Settings to override, as transformers does.

        Raises:
            ValueError: A keyword is a misspelt setting; or `preset` is given, which leaves nothing of what was saved.
        """
        refuse_typos(cls.__name__, cls.valid_kwargs.__annotations__, kwargs)
        settings = dict(image_processor_dict)
        if kwargs.get("preset") is not None:
            raise ValueError(
                f"preset: expected none, since a saved processor has settings; make a new {cls.__name__}(preset=...)."
            )
        if kwargs.get("geometry", settings.get("geometry")) != settings.get("geometry"):
            settings["off_disk"] = None
        return super().from_dict(settings, **kwargs)

    @property
    def statistics_key(self) -> dict[str, Any]:
        """What statistics must have been computed with to be valid here."""
        return {
            "photometry": self.photometry,
            "degradation": self.degradation["name"] if self.degradation else None,
            "geometry": self.geometry,
            "size": self.size,
            "scaling": self.scaling,
        }

    def _resolve_statistics(self, statistics: Mapping[str, Any] | None) -> dict[str, Any] | None:
        """Checks given statistics; the class default follows the settings, also after it has been saved."""
        key = self.statistics_key
        if statistics is None or (is_approximate(statistics) and any(statistics.get(k) != key[k] for k in key)):
            return approximate_statistics(key)
        return check_statistics(statistics, key, self.modalities)

    def with_statistics(self, statistics: Mapping[str, Any] | None) -> "SolarChipImageProcessor":
        """A new processor with the same settings and other statistics."""
        settings = {name: getattr(self, name) for name in SolarChipImageProcessorKwargs.__annotations__}
        return type(self)(**{**settings, "statistics": statistics})

    # One image -------------------------------------------------------------------------------------------------------

    def _open(self, image: Any, modality: str | None, quicklook: bool) -> tuple[SolarImage, bool]:
        """Any accepted kind of image as a `SolarImage`, and whether it came without header facts."""
        if isinstance(image, SolarImage):
            return image, False
        if is_array(image):
            if modality is None:
                raise SolarImageError(
                    "array", "modality", "modality= with an array, which has no header", "none",
                    "Give the FITS file, or name the channel.",
                )  # fmt: skip
            return self._open_array(image, modality, quicklook)
        return read_image(image, modality=modality, quicklook=quicklook), False

    def _open_array(self, array: Any, modality: str, quicklook: bool) -> tuple[SolarImage, bool]:
        if str(array.dtype).removeprefix("torch.") != "uint8":
            return image_from_array(array, modality, physical_unit(modality, self.photometry), self.geometry), True
        if not quicklook:
            raise SolarImageError(
                "array", "dtype", "physical values", "8-bit grey levels, which are stretched and carry no unit",
                "Pass quicklook=True to take them approximately, or give the FITS file.",
            )  # fmt: skip
        unit = "G" if MODALITIES[modality].unit == "G" else "DN/s"
        levels = decode_quicklook(np.asarray(array), modality)
        return replace(image_from_array(levels, modality, unit, self.geometry), approximate=True), False

    def _check(self, image: SolarImage, modality: str | None, require_usable: bool) -> str:
        """Refuses what the processor cannot stand for; returns the modality."""
        name = require_modality(image, modality)
        if name not in self.modalities:
            raise SolarImageError(
                image.source, "modality", f"one that this processor has ({', '.join(self.modalities)})", name,
                "Load the processor with modalities= that include it.",
            )  # fmt: skip
        if require_usable and (generator := generator_of(image.header)):
            raise SolarImageError(
                image.source, "CREATOR", "an observed image", f"one that the model {generator} (MODEL) generated",
                "Give the file that it was made from, or pass require_usable=False to take it for an observation.",
            )  # fmt: skip
        if require_usable and not image.usable:
            raise SolarImageError(
                image.source, "usable", "an image fit for use", image.reason or f"{image.quality}",
                "Pass require_usable=False to take it all the same.",
            )  # fmt: skip
        return name

    def to_physical(
        self,
        image: Any,
        modality: str | int | None = None,
        *,
        quicklook: bool = False,
        require_usable: bool = True,
    ) -> tuple[SolarImage, np.ndarray]:
        """Reads one image and puts it on the canonical grid in physical units, before any transform.

        Args:
            image: Any single image that the class accepts.
            modality: Its channel; needed where the image does not tell, else checked against it.
            quicklook: Whether 8-bit, stretched images may be taken, approximately.
            require_usable: Whether a quality word that advises against use, or an image without any pixel, is an error.

        Returns:
            The header facts with the WCS of the canonical image (their `data` is empty, `header` is the original), and
            the (size, size) float32 image, NaN where invalid; HMI is NaN beyond the limb.

        Raises:
            SolarImageError: The image cannot be handled, in a sentence that says why.
        """
        modality = None if modality is None else resolve_modality(modality)
        opened, plain = self._open(image, modality, quicklook)
        name = self._check(opened, modality, require_usable)
        factor = 1.0
        if not plain:
            factor = photometric_factor(opened, name, self.photometry)
            factor /= degradation_factor(opened, name, self.degradation)
        pixels = to_canonical(opened, self.size, self.geometry)
        if factor != 1.0:
            pixels *= np.float32(factor)
        if require_usable and not np.isfinite(pixels).any():
            raise SolarImageError(
                opened.source, "pixels", "any finite one on the canonical grid", "none",
                "Were only the header's facts read, or is the WCS (CRPIX, CRVAL) wrong?",
            )  # fmt: skip
        facts = canonical_facts(opened, self.size, self.geometry)
        if MODALITIES[name].instrument == "hmi" and self.geometry != "none":
            radius = 1.0
            if self.geometry == "arcsec":  # in units of the fixed radius of 976 arcsec
                radius = facts.rsun_arcsec / 976.0
            pixels[~disk_mask(self.size, radius)] = np.nan
        return replace(facts, modality=name, unit=physical_unit(name, self.photometry)), pixels

    # Scaling ---------------------------------------------------------------------------------------------------------

    def _row(self, modality: str) -> dict[str, Any]:
        if self.statistics is None:
            raise ValueError(
                f"statistics: expected explicit ones for {self.statistics_key}, for which no default is known; compute "
                "them on your dataset and pass statistics=, or use with_statistics()."
            )
        return self.statistics["modalities"][modality]

    def support(self, modality: str | int) -> np.ndarray | None:
        """(size, size) bool: pixels that a modality's image keeps; None where the policy cuts none."""
        if self.off_disk in ("keep", "zero"):
            return None
        hmi = MODALITIES[resolve_modality(modality)].instrument == "hmi"
        to_limb = self.off_disk == "disk" or (hmi and self.geometry == "rsun")
        return _mask(self.size, 1.0 if to_limb else SUPPORT_RADIUS)

    def scale(self, physical: np.ndarray, modality: str | int) -> np.ndarray:
        """Transforms and z-scores physical images, filling what is invalid or cut off by the off-disk policy.

        Args:
            physical: (..., size, size) in physical units on the canonical grid; NaN where invalid.
            modality: Their channel.

        Returns:
            (..., size, size) float32, finite.
        """
        name = resolve_modality(modality)
        row = self._row(name)
        physical = np.asarray(physical, dtype=np.float32)
        self._check_shape(physical)
        if self.off_disk == "zero":
            physical = np.where(np.isfinite(physical), physical, np.float32(0))
        values = standardize(physical, row["mean"], row["std"], self.scaling)
        keep = np.isfinite(values)
        support = self.support(name)
        if support is not None:
            keep &= support
        values[~keep] = 0
        return values

    def unscale(self, values: np.ndarray | torch.Tensor, modality: str | int) -> np.ndarray:
        """The inverse of `scale`: physical units, NaN where the off-disk policy cuts.

        Args:
            values: (..., size, size) scaled images.
            modality: Their channel.

        Returns:
            (..., size, size) float32.
        """
        name = resolve_modality(modality)
        row = self._row(name)
        if isinstance(values, torch.Tensor):
            values = values.detach().float().cpu().numpy()
        self._check_shape(values)
        physical = unstandardize(values, row["mean"], row["std"], self.scaling)
        support = self.support(name)
        if support is not None:
            physical[..., ~support] = np.nan
        return physical

    def _check_shape(self, images: np.ndarray) -> None:
        if images.shape[-2:] != (self.size, self.size):
            raise ValueError(f"images: expected (..., {self.size}, {self.size}), got {tuple(images.shape)}.")

    # Batches ---------------------------------------------------------------------------------------------------------

    def preprocess(
        self,
        images: Any,
        modality: str | int | Sequence[str | int] | None = None,
        return_tensors: str | None = "pt",
        *,
        quicklook: bool = False,
        require_usable: bool = True,
        return_headers: bool = False,
    ) -> BatchFeature | tuple[BatchFeature, list[Any]]:
        """Prepares one image, a list of images, or observations.

        Args:
            images: One image, a list of images, an array (N, H, W) of one modality, a mapping `{modality: image}`, or
                a list of such mappings (an image of None is missing).
            modality: The channel of the image or images, or one a listed image; not for mappings.
            return_tensors: `"pt"`, `"np"`, or None for NumPy arrays.
            quicklook: Whether 8-bit, stretched images may be taken, approximately.
            require_usable: Whether a quality word that advises against use is an error.
            return_headers: Whether to return header facts beside the batch.

        Returns:
            A `BatchFeature`: for images `pixel_values` (N, 1, size, size) float32 and `modality_ids` (N,) int64; for
            mappings `pixel_values` (B, M, size, size) float32 in the order of `modalities`, zeros where missing, and
            `observed` (B, M) bool. With `return_headers`, a pair of it and a list of facts, a dict of facts by modality
            for each mapping.

        Raises:
            SolarImageError: An image cannot be handled.
            ValueError: The arguments do not fit each other.
        """
        options = {"quicklook": quicklook, "require_usable": require_usable}
        if isinstance(images, Mapping):
            images = [images]
        if type(images) in (list, tuple) and any(isinstance(item, Mapping) for item in images):
            if modality is not None:
                raise ValueError("modality: expected none with mappings, whose keys are the modalities.")
            data, headers = self._observations(images, options)
        else:
            data, headers = self._images(*as_list(images, modality), options)  # type: ignore[assignment]
        batch = BatchFeature(data, tensor_type=return_tensors)
        return (batch, headers) if return_headers else batch

    def _images(
        self, images: list[Any], modalities: list[Any], options: dict[str, bool]
    ) -> tuple[dict[str, np.ndarray], list[SolarImage]]:
        pixel_values = np.empty((len(images), 1, self.size, self.size), dtype=np.float32)
        ids = np.empty(len(images), dtype=np.int64)
        headers = []
        for index, (image, modality) in enumerate(zip(images, modalities, strict=True)):
            facts, physical = self.to_physical(image, modality, **options)
            name = str(facts.modality)
            pixel_values[index, 0] = self.scale(physical, name)
            ids[index] = self.modalities.index(name)
            headers.append(facts)
        return {"pixel_values": pixel_values, "modality_ids": ids}, headers

    def _observations(
        self, observations: Sequence[Any], options: dict[str, bool]
    ) -> tuple[dict[str, np.ndarray], list[dict[str, SolarImage]]]:
        shape = (len(observations), len(self.modalities))
        pixel_values = np.zeros((*shape, self.size, self.size), dtype=np.float32)
        observed = np.zeros(shape, dtype=bool)
        headers: list[dict[str, SolarImage]] = []
        for index, observation in enumerate(observations):
            if not isinstance(observation, Mapping):
                raise ValueError(f"images: expected mappings only, got {type(observation).__name__} at {index}.")
            headers.append({})
            for alias, image in observation.items():
                if image is None:
                    continue
                facts, physical = self.to_physical(image, alias, **options)
                name = str(facts.modality)
                position = self.modalities.index(name)
                if observed[index, position]:
                    raise ValueError(f"images: expected one image of {name} an observation, got two.")
                pixel_values[index, position] = self.scale(physical, name)
                observed[index, position] = True
                headers[-1][name] = facts
            self._warn_of_other_times(index, headers[-1])
        return {"pixel_values": pixel_values, "observed": observed}, headers

    @staticmethod
    def _warn_of_other_times(index: int, facts: Mapping[str, SolarImage]) -> None:
        times = sorted((image.time_nominal, name) for name, image in facts.items() if image.time_nominal is not None)
        if times and times[-1][0] - times[0][0] > LONGEST_DIFFERENCE:
            (first, one), (last, other) = times[0], times[-1]
            logger.warning(
                "observation %d: expected images of one time, got %s at %s and %s at %s. The Sun turns by a pixel of "
                "2.4 arcsec in a quarter of an hour: pair files by time, as pair_observations does.",
                index, one, first.isoformat(), other, last.isoformat(),
            )  # fmt: skip

    def post_process(
        self,
        pixel_values: np.ndarray | torch.Tensor,
        modality_ids: Sequence[int] | np.ndarray | torch.Tensor,
        headers: Sequence[SolarImage] | None = None,
    ) -> np.ndarray | list[Any]:
        """Takes model images back to physical units, or to sunpy Maps.

        Args:
            pixel_values: (N, 1, size, size) or (N, size, size) scaled images.
            modality_ids: (N,) indices into `modalities`.
            headers: The N facts that `return_headers=True` gave; then Maps are returned.

        Returns:
            (N, size, size) float32 in physical units, or a list of N sunpy Maps of the instrument's own class.

        Raises:
            ImportError: Maps are asked for and sunpy is not installed.
            ValueError: The numbers of images, ids and headers differ, or an id is none of `modalities`.
        """
        ids = [int(value) for value in modality_ids]
        if pixel_values.ndim == 4 and pixel_values.shape[1] == 1:
            pixel_values = pixel_values[:, 0]
        if pixel_values.ndim != 3 or len(pixel_values) != len(ids):
            raise ValueError(
                f"pixel_values: expected ({len(ids)}, 1, size, size) for {len(ids)} ids, got "
                f"{tuple(pixel_values.shape)}."
            )
        if any(not 0 <= value < len(self.modalities) for value in ids):
            raise ValueError(f"modality_ids: expected positions in {self.modalities}, got {ids}.")
        names = [self.modalities[value] for value in ids]
        images = [self.unscale(values, name) for values, name in zip(pixel_values, names, strict=True)]
        if headers is None:
            return np.stack(images) if images else np.empty((0, self.size, self.size), dtype=np.float32)
        if len(headers) != len(ids):
            raise ValueError(f"headers: expected {len(ids)}, one an image, got {len(headers)}.")
        return [self.to_map(*triple) for triple in zip(images, names, headers, strict=True)]

    def to_map(self, physical: np.ndarray, modality: str | int, facts: SolarImage) -> Any:
        """One canonical image in physical units as a sunpy Map.

        Args:
            physical: (size, size) in the unit of `photometry`.
            modality: Its channel.
            facts: Header facts as `to_physical` or `return_headers=True` give them.

        Returns:
            An `AIAMap` or `HMIMap` whose WCS puts the limb at RSUN_OBS about the disk's centre.
        """
        try:
            from sunpy.map import Map
        except ImportError as error:
            raise ImportError("Maps need sunpy: pip install 'solarchip_hf[sunpy]'.") from error
        name = resolve_modality(modality)
        exposure = facts.exposure
        if self.photometry == "nominal":
            exposure = MODALITIES[name].nominal_exposure
        header = canonical_header(facts, name, physical_unit(name, self.photometry), exposure)
        return Map(physical, header)


__all__ = ["LONGEST_DIFFERENCE", "OFF_DISK_POLICIES", "SolarChipImageProcessor", "SolarChipImageProcessorKwargs"]
