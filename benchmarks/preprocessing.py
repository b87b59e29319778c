"""Speed and accuracy of preprocessing: one 4096 px, Rice-compressed AIA file to a model's tensor.

Measured against the usual road in the same run: astropy and `aiapy.calibrate.register` (cubic, to 0.6 arcsec per pixel,
north up, disk centred), block mean of 4 x 4 pixels, the same photometry and scaling. Both roads end on the same grid
(`geometry="arcsec"`, 2.4 arcsec per pixel), so that the images can be compared pixel by pixel.

    python benchmarks/preprocessing.py --repeats 5
"""

import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from astropy.io import fits
from scipy.ndimage import gaussian_filter, zoom
from transformers import HfArgumentParser

from solarchip_hf import SolarChipImageProcessor

SIZE = 1024
RSUN_ARCSEC = 959.65
PLATE_SCALE = 0.599489  # AIA 171, level 1


@dataclass
class Arguments:
    """What to measure."""

    repeats: int = field(default=5, metadata={"help": "Timed runs of each road; the median counts."})
    threads: int = field(default=2, metadata={"help": "Threads that torch may use."})
    rotation: float = field(default=0.0194, metadata={"help": "CROTA2 of the file in degrees."})
    seed: int = field(default=0, metadata={"help": "Seed of the image that is drawn."})
    file: str | None = field(default=None, metadata={"help": "A level 1 file of one's own instead of the drawn one."})
    json: str | None = field(default=None, metadata={"help": "Where to write the figures as JSON."})


def draw_level1(path: Path, rotation: float, seed: int) -> None:
    """Writes a plausible AIA 171 level 1 image: disk, limb, corona, structure at all scales, photon and read noise."""
    random = np.random.default_rng(seed)
    size, centre = 4096, (2048.27, 2045.61)  # FITS pixels of the disk's centre
    y, x = np.ogrid[1 : size + 1, 1 : size + 1]
    radius = np.hypot(x - centre[0], y - centre[1]) * (PLATE_SCALE / RSUN_ARCSEC)
    brightness = np.interp(
        radius, [0, 0.5, 0.9, 0.98, 1.0, 1.05, 1.2, 1.5, 2], [1, 1.05, 1.4, 2.2, 3, 0.8, 0.12, 0.02, 0]
    )
    texture = np.zeros((size, size), dtype=np.float32)
    for coarse, sigma, amplitude in ((64, 1.5, 0.8), (512, 1.5, 0.5), (2048, 1.2, 0.35)):
        noise = gaussian_filter(random.standard_normal((coarse, coarse), dtype=np.float32), sigma)
        texture += zoom(noise * (amplitude / noise.std()), size // coarse, order=1)
    photons = 190 * brightness * np.exp(texture)
    image = random.poisson(photons) + random.normal(0, 1.4, photons.shape)
    header = fits.Header()
    for card, value in {
        "TELESCOP": "SDO/AIA", "INSTRUME": "AIA_3", "WAVELNTH": 171, "WAVEUNIT": "angstrom", "LVL_NUM": 1.0,
        "DATE-OBS": "2024-10-04T16:17:57.35", "T_OBS": "2024-10-04T16:17:58.35Z", "EXPTIME": 1.999577, "QUALITY": 0,
        "CTYPE1": "HPLN-TAN", "CTYPE2": "HPLT-TAN", "CUNIT1": "arcsec", "CUNIT2": "arcsec", "CRVAL1": 0.0,
        "CRVAL2": 0.0, "CDELT1": PLATE_SCALE, "CDELT2": PLATE_SCALE, "CRPIX1": centre[0], "CRPIX2": centre[1],
        "CROTA2": rotation, "RSUN_OBS": RSUN_ARCSEC, "DSUN_OBS": 149596840624.3, "R_SUN": RSUN_ARCSEC / PLATE_SCALE,
        "HGLN_OBS": 0.0, "HGLT_OBS": 6.4, "CRLN_OBS": 121.0, "CRLT_OBS": 6.4, "BUNIT": "DN",
    }.items():  # fmt: skip
        header[card] = value
    data = np.clip(np.rint(image), -32000, 16383).astype(np.int16)
    table = fits.CompImageHDU(data, header, compression_type="RICE_1", tile_shape=(1, size))
    fits.HDUList([fits.PrimaryHDU(), table]).writeto(path)


def usual_road(path: Path, processor: SolarChipImageProcessor) -> np.ndarray:
    """astropy, sunpy and aiapy to (1, 1, 1024, 1024); physical units come beside it as (1024, 1024)."""
    import sunpy.map
    from aiapy.calibrate import register

    with fits.open(path) as units:
        level1 = sunpy.map.Map(units[1].data.astype(np.float32), units[1].header)
    registered = register(level1, missing=0.0)
    margin = (4 * SIZE - np.array(registered.data.shape)) // 2
    native = np.pad(registered.data, [(max(side, 0),) * 2 for side in margin])
    cut = [(length - 4 * SIZE) // 2 for length in native.shape]
    native = native[cut[0] : cut[0] + 4 * SIZE, cut[1] : cut[1] + 4 * SIZE]
    physical = native.reshape(SIZE, 4, SIZE, 4).mean(axis=(1, 3)) * (2.0 / level1.exposure_time.to_value("s"))
    torch.from_numpy(processor.scale(physical, "aia171")[None, None])
    return physical


def timed(roads: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each road; they take turns, after one run that warms up, so that all see the same machine."""
    seconds: dict[str, list[float]] = {name: [] for name in roads}
    for turn in range(repeats + 1):
        for name, road in roads.items():
            start = time.perf_counter()
            road()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def displacement(image: np.ndarray, reference: np.ndarray) -> float:
    """Pixels between two images by the peak of their cross-correlation, parabola through its neighbours."""
    spectra = [np.fft.fft2(values - values.mean()) for values in (reference, image)]
    correlation = np.fft.ifft2(spectra[0].conj() * spectra[1]).real
    peak = np.unravel_index(correlation.argmax(), correlation.shape)
    offsets = []
    for axis, length in enumerate(correlation.shape):
        line = np.take(correlation, peak[1 - axis], axis=1 - axis)
        low, middle, high = (line[(peak[axis] + step) % length] for step in (-1, 0, 1))
        position = peak[axis] + 0.5 * (low - high) / (low - 2 * middle + high)
        offsets.append((position + length / 2) % length - length / 2)
    return float(np.hypot(*offsets))


def measure(path: Path, arguments: Arguments) -> dict[str, float]:
    """All figures for one file."""
    torch.set_num_threads(arguments.threads)
    processor = SolarChipImageProcessor(geometry="arcsec", size=SIZE)
    default = SolarChipImageProcessor(size=SIZE)

    def decode() -> None:
        with fits.open(path) as units:
            np.asarray(units[1].data)

    roads = {
        "decode_s": decode,
        "processor_s": lambda: processor(path, return_tensors="pt"),
        "processor_rsun_s": lambda: default(path, return_tensors="pt"),
        "usual_s": lambda: usual_road(path, processor),
    }
    figures = timed(roads, arguments.repeats)
    figures["speedup"] = figures["usual_s"] / figures["processor_s"]
    figures["decode_share"] = figures["decode_s"] / figures["processor_s"]

    facts, image = processor.to_physical(path)
    reference = usual_road(path, processor)
    offset = np.arange(SIZE) - (SIZE - 1) / 2
    disk = np.hypot(offset[:, None], offset[None, :]) < facts.rsun_arcsec / facts.cdelt[0]
    # fine structure only: the mask's own edge, or a slow gradient cut by it, would hold the peak at zero
    logs = [np.log1p(np.maximum(np.nan_to_num(values), 0)) for values in (image, reference)]
    fine = [np.where(disk, values - gaussian_filter(values, 4), 0) for values in logs]
    figures["displacement_px"] = displacement(*fine)
    figures["correlation"] = float(np.corrcoef(image[disk], reference[disk])[0, 1])
    figures["flux_ratio"] = float(image[disk].sum(dtype=np.float64) / reference[disk].sum(dtype=np.float64))
    return figures


def main() -> None:
    arguments = HfArgumentParser(Arguments, description=__doc__.splitlines()[0]).parse_args_into_dataclasses()[0]
    warnings.simplefilter("ignore")  # sunpy and aiapy remark on the header's age and pointing
    with tempfile.TemporaryDirectory() as folder:
        path = Path(arguments.file) if arguments.file else Path(folder) / "aia.lev1_euv_12s.171.fits"
        if not arguments.file:
            draw_level1(path, arguments.rotation, arguments.seed)
        figures = measure(path, arguments)
    rows = (
        ("astropy + aiapy.register + block mean", f"{figures['usual_s']:.3f} s"),
        ("SolarChipImageProcessor, same grid", f"{figures['processor_s']:.3f} s"),
        ("SolarChipImageProcessor, default grid", f"{figures['processor_rsun_s']:.3f} s"),
        ("ratio", f"{figures['speedup']:.1f}"),
        ("Rice decoding, share of the processor's time", f"{figures['decode_s']:.3f} s, {figures['decode_share']:.0%}"),
        ("displacement", f"{figures['displacement_px']:.4f} px"),
        ("correlation on the disk", f"{figures['correlation']:.6f}"),
        ("flux ratio on the disk - 1", f"{figures['flux_ratio'] - 1:+.1e}"),
    )
    for label, value in rows:
        print(f"{label:<46} {value}")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
