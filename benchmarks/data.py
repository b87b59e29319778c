"""Speed and memory of the data path, each against a named reference in the same run.

    python benchmarks/data.py                       # everything, about ten minutes on two cores
    python benchmarks/data.py --parts read --rows 8

- scan: files/s of headers, and the second scan of the same archive through its index;
- prepare: files/s of one core for a day of the archive (ten AIA synoptics of 1024 px and one HMI of 4096 px, Rice), and
  the share of reading and decoding in it;
- read: images/s of `load_observations` against `torch.load` of one `.pt` file an image at equal precision (float16 on
  disk, float32 tensors out), with 0 and 2 workers;
- memory: peak of preparing and of reading 1x and 10x rows.

The files are made here, with the headers and the compressibility of real ones, so that the run needs no archive.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import torch
from astropy.io import fits
from torch.utils.data import DataLoader, Dataset

from solarchip_hf import SolarChipImageProcessor
from solarchip_hf.data import load_observations, pair_observations, prepare_dataset, read_image, scan_archive

WAVELENGTHS = (94, 131, 171, 193, 211, 304, 335, 1600, 1700, 4500)
START = datetime(2015, 1, 1, tzinfo=UTC)
ARCHIVE_FILES, ARCHIVE_CORES, ARCHIVE_SECONDS = 55_000, 16, 15 * 60
GPU_BYTES_PER_SECOND = 2.4e9


def write_image(path: Path, time_: datetime, wavelength: int | None, size: int, seed: int) -> None:
    """Writes an AIA synoptic image, or an HMI magnetogram where the wavelength is None."""
    rng = np.random.default_rng(seed)
    offset = (np.arange(size) - (size - 1) / 2) * 2457.6 / size / 960
    radius = np.hypot(offset[:, None], offset[None, :])
    header = fits.Header(
        {
            "CTYPE1": "HPLN-TAN", "CTYPE2": "HPLT-TAN", "CUNIT1": "arcsec", "CUNIT2": "arcsec", "RSUN_OBS": 960.0,
            "CRPIX1": (size + 1) / 2, "CRPIX2": (size + 1) / 2, "CRVAL1": 0.0, "CRVAL2": 0.0, "DSUN_OBS": 1.496e11,
            "CDELT1": 2457.6 / size, "CDELT2": 2457.6 / size, "QUALITY": 0, "CRLT_OBS": 3.0, "CRLN_OBS": 100.0,
        }
    )  # fmt: skip
    if wavelength is None:
        stamp = f"{time_:%Y.%m.%d_%H:%M:%S}_TAI"
        header.update({"TELESCOP": "SDO/HMI", "INSTRUME": "HMI_SIDE1", "CONTENT": "MAGNETOGRAM", "BUNIT": "Gauss"})
        header.update({"T_OBS": stamp, "T_REC": stamp, "CROTA2": 180.0, "BLANK": -(2**31)})
        pixels = np.round(rng.normal(0, 100, (size, size))).astype(np.int32)  # tenths of a gauss
        pixels[radius > 1] = -(2**31)
        header.update({"BSCALE": 0.1, "BZERO": 0.0})
    else:
        stamp = f"{time_:%Y-%m-%dT%H:%M:%S.000}"
        header.update({"TELESCOP": "SDO/AIA", "INSTRUME": "AIA_3", "WAVELNTH": wavelength, "T_OBS": stamp})
        header.update({"DATE-OBS": stamp, "EXPTIME": 2.0, "CROTA2": 0.0, "LVL_NUM": 1.5})
        pixels = rng.poisson(400 * np.exp(-np.maximum(radius - 0.9, 0) * 5)).astype(np.int16)
    for number in range(150 - len(header)):  # a real header has some 190 cards
        header[f"KEY{number:04d}"] = (number * 0.5, "one of the many cards of a real header")
    unit = fits.CompImageHDU(pixels, header, compression_type="RICE_1", do_not_scale_image_data=True)
    fits.HDUList([fits.PrimaryHDU(), unit]).writeto(path)


def write_days(folder: Path, days: int, *, aia_size: int = 1024, hmi_size: int = 4096) -> None:
    """Writes a day of all channels and links it under the names of further days, with headers of their own time."""
    folder.mkdir(parents=True)
    for day in range(days):
        slot = START + timedelta(days=day)
        write_image(folder / f"hmi.M_720s.{slot:%Y%m%d}_000000_TAI.fits", slot, None, hmi_size, day)
        for wavelength in WAVELENGTHS:
            path = folder / f"AIA{slot:%Y%m%d_%H%M}_{wavelength:04d}.fits"
            write_image(path, slot, wavelength, aia_size, 100 * day + wavelength)


def timed(call: Callable[[], object]) -> tuple[float, float]:
    """Seconds of wall clock and of this process's processor time."""
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - wall, time.process_time() - cpu


def measure_scan(folder: Path, files: int) -> None:
    """First and second scan of an archive of links to one day's files."""
    source = folder / "source"
    write_days(source, 1, aia_size=256, hmi_size=256)
    originals = sorted(source.iterdir())
    archive = folder / "archive"
    for number in range(files):
        target = archive / f"{number // 1000:04d}" / f"{number:06d}.fits"
        target.parent.mkdir(parents=True, exist_ok=True)
        os.link(originals[number % len(originals)], target)
    index = folder / "catalog.parquet"
    first, _ = timed(lambda: scan_archive(archive, index, progress=False))
    second, _ = timed(lambda: scan_archive(archive, index, progress=False))
    print(
        f"scan     {files} files, {os.cpu_count()} cores: first {first:.1f} s = {files / first:.0f} files/s; ", end=""
    )
    print(f"second {second:.2f} s = {first / second:.0f} times faster (20 asked)")


def measure_prepare(folder: Path, days: int) -> None:
    """One core's throughput, and what of it is reading."""
    torch.set_num_threads(1)
    archive = folder / "days"
    write_days(archive, days)
    pairs = pair_observations(scan_archive(archive, progress=False))
    paths = [path for name in pairs.attrs["modalities"] for path in pairs[name]]
    processor = SolarChipImageProcessor(size=1024)
    read_image(paths[0])  # imports
    _, reading = timed(lambda: [read_image(path) for path in paths])
    _, total = timed(lambda: prepare_dataset(pairs, folder / "prepared", processor, workers=0, progress=False))
    rate = len(paths) / total
    print(f"prepare  {len(paths)} files on one core: {total:.1f} s = {rate:.2f} files/s; ", end="")
    print(f"reading and decoding {reading / total:.0%}")
    minutes = ARCHIVE_FILES / rate / ARCHIVE_CORES / 60
    print(f"         {ARCHIVE_FILES} files on {ARCHIVE_CORES} such cores: {minutes:.1f} min (15 asked)")


class TensorFiles(Dataset):
    """The reference: one `.pt` file an image, as the research code keeps them."""

    def __init__(self, folder: Path, rows: int, modalities: list[str]):
        self.folder, self.rows, self.modalities = folder, rows, modalities

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.stack([torch.load(self.folder / f"{m}_{index}.pt").float() for m in self.modalities])


class StoredImages(Dataset):
    """Ours without the processor's scaling, which the reference does not do either."""

    def __init__(self, folder: Path):
        self.dataset = load_observations(folder)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> torch.Tensor:
        images = self.dataset.physical(index).values()
        size = self.dataset.processor.size
        out = np.empty((len(self.dataset.modalities), size, size), dtype=np.float32)
        for position, image in enumerate(images):
            out[position] = image
        return torch.from_numpy(out)


def small_archive(folder: Path, rows: int) -> Path:
    """An archive of `rows` observations of all channels, in small files."""
    archive = folder / f"archive_{rows}"
    write_days(archive, rows, aia_size=64, hmi_size=64)
    return archive


def prepare_rows(archive: Path, out: Path, size: int) -> None:
    """Prepares an archive in this process."""
    pairs = pair_observations(scan_archive(archive, progress=False))
    prepare_dataset(pairs, out, SolarChipImageProcessor(size=size), workers=0, progress=False)


def measure_read(folder: Path, rows: int) -> None:
    """Images/s of ours and of one tensor file an image."""
    torch.set_num_threads(1)
    prepared = folder / "prepared"
    prepare_rows(small_archive(folder, rows), prepared, 1024)
    dataset = load_observations(prepared)
    tensors = folder / "tensors"
    tensors.mkdir()
    for row in range(rows):
        for name, image in dataset.physical(row).items():
            torch.save(torch.from_numpy(image.copy()), tensors / f"{name}_{row}.pt")
    reference, ours = TensorFiles(tensors, rows, dataset.modalities), StoredImages(prepared)
    torch.testing.assert_close(ours[0], reference[0], equal_nan=True)
    images = rows * len(dataset.modalities)
    for workers in (0, 2):
        rates = {}
        for name, source in (("torch.load", reference), ("stored", ours), ("scaled", dataset)):
            loader = DataLoader(source, batch_size=2, shuffle=True, num_workers=workers)
            runs = [timed(lambda loader=loader: [None for _ in loader])[0] for _ in range(3)]
            rates[name] = images / min(runs)
        print(f"read     {workers} workers, 1024 px: torch.load {rates['torch.load']:.0f} images/s, ", end="")
        print(f"ours {rates['stored']:.0f} ({rates['stored'] / rates['torch.load']:.2f} times), ", end="")
        print(f"ours with scaling {rates['scaled']:.0f}")
        if workers == 0:
            needed = GPU_BYTES_PER_SECOND / (1024 * 1024 * 4)
            print(f"         a GPU at 2.4 GB/s of float32 takes {needed:.0f} images/s: ", end="")
            print(f"{needed / rates['scaled']:.1f} such processes")


def measure_memory(folder: Path, rows: int) -> None:
    """Peak memory of preparing and of reading, each in a process of its own, for 1x and 10x rows."""
    for count in (rows, 10 * rows):
        archive, prepared = small_archive(folder, count), folder / f"prepared_{count}"
        for task in ("prepare", "read"):
            command = [sys.executable, __file__, "--child", task, str(archive), str(prepared)]
            printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
            print(f"memory   {task:<8}{count:>6} rows of 256 px, {len(WAVELENGTHS) + 1} channels: {printed}")


def own_memory() -> float:
    """MiB of this process that are no mapped files: what the system cannot reclaim."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["RssAnon"].split()[0]) / 1024


def memory_child(task: str, archive: Path, prepared: Path) -> None:
    """Prepares or reads a dataset of 256 px and prints the peak of its own memory, sampled every 10 ms."""
    samples, done = [own_memory()], threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            samples.append(own_memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    if task == "prepare":
        prepare_rows(archive, prepared, 256)
    else:
        for batch in DataLoader(load_observations(prepared), batch_size=4):
            del batch
    done.set()
    watcher.join()
    print(f"peak {max(samples):.0f} MiB, of these {samples[0]:.0f} by the imports")


PARTS = ("scan", "prepare", "read", "memory")


def main() -> None:
    """Runs the parts asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--scan-files", type=int, default=20_000)
    parser.add_argument("--days", type=int, default=3, help="days of the archive to prepare")
    parser.add_argument("--rows", type=int, default=16, help="observations to read, and the 1x of memory")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child is not None:
        memory_child(arguments.child[0], *map(Path, arguments.child[1:]))
        return
    with tempfile.TemporaryDirectory(prefix="solarchip-data-") as name:
        folder = Path(name)
        for part, amount in zip(
            PARTS, (arguments.scan_files, arguments.days, arguments.rows, arguments.rows), strict=True
        ):
            if part in arguments.parts:
                (folder / part).mkdir()
                globals()[f"measure_{part}"](folder / part, amount)


if __name__ == "__main__":
    main()
