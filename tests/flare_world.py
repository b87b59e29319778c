"""A small world for the tests of flare forecasts: magnetograms whose active region tells of the flares to come.

Nothing physical: a bipole whose field follows a slow random process, and every day a flare whose class follows it too.
"""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pandas as pd
from astropy.io import fits

from solarchip_hf import SolarChipConfig, SolarChipForPreTraining, SolarChipImageProcessor
from solarchip_hf.data import (
    FlareObservations,
    label_observations,
    load_observations,
    pair_observations,
    prepare_dataset,
    read_flare_events,
    scan_archive,
)

SIZE = 64
START = datetime(2013, 1, 1, tzinfo=UTC)
DAYS = 480
CADENCE = 4  # days between observations
RSUN_ARCSEC = 960.0
TINY = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "decoder_num_hidden_layers": 1,
    "projection_dim": 16,
    "classifier_hidden_size": 32,
    "classifier_dropout": 0.0,
}


def activity(days: int = DAYS, seed: int = 0) -> np.ndarray:
    """(days,) a slow process in 0..1."""
    noise = np.random.default_rng(seed).normal(size=days)
    values = np.zeros(days)
    for day in range(1, days):
        values[day] = 0.8 * values[day - 1] + 0.6 * noise[day]
    return 1 / (1 + np.exp(-1.6 * values))


def flare_class(value: float) -> str:
    """The class of a day's flare."""
    for limit, name in ((0.9, "X1.2"), (0.65, "M2.0"), (0.3, "C3.0")):
        if value > limit:
            return name
    return "B2.0"


def write_flare_list(path: Path, seed: int = 0) -> Path:
    """A flare at 06:00 of every day, in the layout of SWPC, with a place on the disk."""
    rows = []
    for day, value in enumerate(activity(seed=seed)):
        start = START + timedelta(days=day, hours=6)
        moments = [start, start + timedelta(minutes=12), start + timedelta(minutes=30)]
        east = "E" if day % 2 else "W"
        rows.append(
            [*(m.strftime("%Y-%m-%dT%H:%M:%S") for m in moments), flare_class(value), f"N10{east}{day % 80:02d}"]
        )
    table = pd.DataFrame(rows, columns=["start_time", "peak_time", "end_time", "goes_class", "location"])
    table.assign(noaa_ar="").to_csv(path, index=False)
    return path


def write_images(folder: Path, modalities: Sequence[str] = ("hmi",), seed: int = 0, days: int = DAYS) -> Path:
    """FITS files with the cards of real ones, one observation every `CADENCE` days at 00:00."""
    folder.mkdir(parents=True, exist_ok=True)
    offset = (np.arange(SIZE) - (SIZE - 1) / 2) * 2457.6 / SIZE / RSUN_ARCSEC
    x, y = np.meshgrid(offset, offset)
    disk = np.hypot(x, y) <= 1
    for day, value in enumerate(activity(seed=seed)[:days]):
        if day % CADENCE:
            continue
        slot = START + timedelta(days=day)
        size = 0.08 * value**2
        bipole = np.exp(-((x - 0.3) ** 2 + (y - 0.2) ** 2) / size) - np.exp(-((x + 0.3) ** 2 + (y - 0.2) ** 2) / size)
        rng = np.random.default_rng((seed, day))
        cards = {
            "CTYPE1": "HPLN-TAN", "CTYPE2": "HPLT-TAN", "CUNIT1": "arcsec", "CUNIT2": "arcsec",
            "CRPIX1": (SIZE + 1) / 2, "CRPIX2": (SIZE + 1) / 2, "CRVAL1": 0.0, "CRVAL2": 0.0,
            "CDELT1": 2457.6 / SIZE, "CDELT2": 2457.6 / SIZE, "RSUN_OBS": RSUN_ARCSEC, "QUALITY": 0,
            "DSUN_OBS": 1.4959787e11, "RSUN_REF": 6.96e8, "CRLT_OBS": 3.0, "CRLN_OBS": 100.0,
        }  # fmt: skip
        if "hmi" in modalities:
            field = np.where(disk, 1200 * value * bipole + rng.normal(0, 1, bipole.shape), np.nan)
            moment = f"{slot:%Y.%m.%d_%H:%M:%S}_TAI"
            hmi = {
                "TELESCOP": "SDO/HMI", "INSTRUME": "HMI_SIDE1", "WAVELNTH": 6173.0, "CONTENT": "MAGNETOGRAM",
                "BUNIT": "Gauss", "T_REC": moment, "T_OBS": moment, "QLOOK": 0, "CROTA2": 0.0, "CADENCE": 720.0,
                "DATE-OBS": f"{slot - timedelta(seconds=104):%Y-%m-%dT%H:%M:%S.00}",
            }  # fmt: skip
            name = f"hmi.M_720s.{slot:%Y%m%d_%H%M%S}_TAI.fits"
            fits.PrimaryHDU(field.astype(np.float32), fits.Header(cards | hmi)).writeto(folder / name)
        if "aia171" in modalities:
            bright = 150 * np.exp(-(x**2 + y**2)) * (1 + 3 * value * np.abs(bipole)) + rng.gamma(2, 3, bipole.shape)
            seen = f"{slot + timedelta(seconds=1):%Y-%m-%dT%H:%M:%S.000}"
            aia = {
                "TELESCOP": "SDO/AIA", "INSTRUME": "AIA_3", "WAVELNTH": 171, "WAVEUNIT": "angstrom", "T_OBS": seen,
                "DATE-OBS": seen, "EXPTIME": 2.0, "LVL_NUM": 1.5, "CROTA2": 0.0,
            }  # fmt: skip
            name = f"AIA{slot:%Y%m%d_%H%M}_0171.fits"
            fits.PrimaryHDU(bright.astype(np.int16), fits.Header(cards | aia)).writeto(folder / name)
    return folder


def write_pretrained(folder: Path, modalities: Sequence[str], processor: SolarChipImageProcessor) -> Path:
    """A saved model as examples/pretrain.py leaves one, with random weights."""
    import torch

    torch.manual_seed(1234)
    config = SolarChipConfig.from_name("vit-tiny", modalities=list(modalities), **TINY)
    SolarChipForPreTraining(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def flare_world(base: Path, modalities: Sequence[str] = ("hmi", "aia171")) -> Path:
    """A folder with `archive/`, `flares.csv`, `prepared/` and `pretrained/`; made once a session."""
    root = base / f"flare_world_{'_'.join(modalities)}"
    if not (root / "pretrained" / "config.json").exists():
        archive = write_images(root / "archive", modalities)
        write_flare_list(root / "flares.csv")
        pairs = pair_observations(scan_archive(archive, workers=0, progress=False))
        processor = SolarChipImageProcessor(modalities=modalities, size=TINY["image_size"])
        prepare_dataset(pairs, root / "prepared", processor, workers=0, progress=False)
        write_pretrained(root / "pretrained", modalities, load_observations(root / "prepared").processor)
    return root


def labelled_world(root: Path, modalities: Sequence[str] | None = None) -> FlareObservations:
    """Its labelled observations."""
    events = read_flare_events(root / "flares.csv")
    return label_observations(load_observations(root / "prepared", modalities), events)
