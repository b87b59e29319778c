"""`SyntheticSun`: the public face of the drawn Sun."""

import logging
import multiprocessing
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ...models.modalities import MODALITIES, MODALITY_NAMES, resolve_modality
from .catalogue import flare_report, hazard
from .ephemeris import as_utc, days_since_epoch
from .fits_writer import write_observation
from .observation import Plate, Scene, degradation, north_up_plate
from .state import RegionHistory
from .surface import SurfaceNoise

logger = logging.getLogger(__name__)


class SyntheticSun:
    """A seeded, physically motivated Sun, seen in SDO's eleven channels.

    Active regions emerge, decay and flare after the observed statistics of a solar cycle; their magnetic field heats
    the corona that the extreme-ultraviolet channels show. It exists so that every step of this package runs on a fresh
    machine with no download. It is **not** data: whatever is trained or measured on it must say so.

    Everything is a function of (seed, time): any time may be asked for in any order, in any process, with the same
    result. `start` and `days` only set the span that `flares` and `times` cover by default.

    Args:
        seed: A non-negative integer; another seed is another Sun.
        start: First day, UTC.
        days: Length of the default span in days; 4018 are one activity cycle.
        size: Pixels across an image, N, at least 32.

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> sun = SyntheticSun(seed=0, size=128)
        >>> images = sun.observe("2014-02-03T00:00", ["hmi", "aia171"])
        >>> images["aia171"].shape
        (128, 128)
    """

    def __init__(self, seed: int = 0, start: Any = "2010-05-01", days: float = 4018, size: int = 128):
        if int(seed) != seed or seed < 0:
            raise ValueError(f"seed: expected a non-negative integer, got {seed!r}.")
        if size < 32 or size % 2:
            raise ValueError(f"size: expected an even number of pixels of at least 32, got {size!r}.")
        if not days > 0:
            raise ValueError(f"days: expected a positive number, got {days!r}.")
        self.seed, self.start, self.days, self.size = int(seed), as_utc(start), days, int(size)
        self._history = RegionHistory(self.seed)
        self._noise = SurfaceNoise(self.seed)

    def __repr__(self) -> str:
        return f"SyntheticSun(seed={self.seed}, start='{self.start.isoformat()}', days={self.days}, size={self.size})"

    def __getstate__(self) -> dict:
        return {"seed": self.seed, "start": self.start, "days": self.days, "size": self.size}

    def __setstate__(self, state: dict) -> None:
        SyntheticSun.__init__(self, **state)

    @property
    def end(self) -> pd.Timestamp:
        """End of the default span, UTC."""
        return self.start + pd.Timedelta(self.days, "D")

    def times(self, cadence: str = "1D") -> pd.DatetimeIndex:
        """The slots of the default span.

        Args:
            cadence: A pandas time span.
        """
        return pd.date_range(self.start, self.end, freq=pd.Timedelta(cadence), inclusive="left")

    def observe(
        self, time: Any, modalities: Iterable[str | int] | None = None, *, common_plate: bool = False
    ) -> dict[str, np.ndarray]:
        """Draws the Sun at one instant, north up (row 0 south, column 0 east), at the centre of the image.

        The plate is that of the instrument on the day: 2.4 arcsec a pixel for AIA and 2.016 for HMI at 1024 px, in
        proportion at other sizes, so that the disk breathes with the Earth's distance.

        Args:
            time: UTC.
            modalities: Names or aliases; all eleven by default.
            common_plate: Draw HMI on AIA's plate too, so that all images share their pixels.

        Returns:
            For every modality, in the order asked for, (N, N) float32: HMI in gauss, line of sight, NaN off the disk;
            AIA in DN of one exposure, degraded and noisy as observed.

        Raises:
            ValueError: A time that cannot be read, or an unknown modality.
        """
        scene = Scene(self._history, self._noise, days_since_epoch(time), self.size)
        names = self._names(modalities)
        plates = {name: north_up_plate("aia171" if common_plate else name, self.size, scene.view) for name in names}
        images = {}
        for plate in dict.fromkeys(plates.values()):
            images.update(scene.draw(plate, [name for name in names if plates[name] == plate]))
        return {name: images[name][0] for name in names}

    def plate(self, time: Any, modality: str | int = "aia171") -> Plate:
        """The plate that `observe` draws a modality on: scale, solar radius in pixels, centre."""
        from .ephemeris import viewpoint

        return north_up_plate(resolve_modality(modality), self.size, viewpoint(days_since_epoch(time)))

    def write_archive(
        self,
        folder: str | Path,
        times: Iterable[Any] | None = None,
        modalities: Iterable[str | int] | None = None,
        workers: int = 1,
        progress: bool = True,
        *,
        overwrite: bool = False,
    ) -> pd.DataFrame:
        """Writes observations as FITS files with the headers, names and folders of SDO's archives.

        Files appear complete or not at all; those that are there already are kept, so that an interrupted call is
        simply repeated. HMI's slots are on TAI, as in its archive; 1700 is written two minutes after the slot, as in
        AIA's. With `workers` above 1 call it from a script guarded by `if __name__ == "__main__":`, which the processes
        import.

        Args:
            folder: Root of the archive; made if absent.
            times: Nominal times; by default one a day over the span.
            modalities: Names or aliases; all eleven by default.
            workers: Processes.
            progress: Show a progress bar with an estimate of the time left.
            overwrite: Draw again files that are there already.

        Returns:
            A row a file, in the order of the times: `path, modality, time_nominal` (the slot, without a zone),
            `written` (False where kept).

        Raises:
            ValueError: A file of another Sun lies where one is to be written, or an argument is out of range.
        """
        from tqdm import tqdm

        if workers < 1:
            raise ValueError(f"workers: expected at least 1, got {workers!r}.")
        slots = [as_utc(time) for time in (self.times() if times is None else times)]
        names, folder = self._names(modalities), Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        records: list[dict] = []
        with tqdm(total=len(slots), desc="Drawing the synthetic Sun", unit="obs", disable=not progress) as bar:
            if workers == 1 or len(slots) < 2:
                for slot in slots:
                    records += self._write_slot(folder, slot, names, overwrite)
                    bar.update()
            else:
                with ProcessPoolExecutor(workers, _process_context(), _start_worker, (self,)) as pool:
                    jobs = [pool.submit(_write_in_worker, folder, slot, names, overwrite) for slot in slots]
                    try:
                        for job in jobs:
                            records += job.result()
                            bar.update()
                    except BaseException:
                        pool.shutdown(wait=True, cancel_futures=True)
                        raise
        frame = pd.DataFrame(records, columns=["path", "modality", "time_nominal", "written"])
        logger.info("%d files written, %d kept in %s", frame["written"].sum(), (~frame["written"]).sum(), folder)
        return frame

    def flares(self, start: Any = None, end: Any = None) -> pd.DataFrame:
        """The flare report: flares on the visible disk that rise above the soft X-ray background.

        Args:
            start: UTC, by flare start; the span's first day by default.
            end: UTC, exclusive; the span's end by default.

        Returns:
            The 22 columns of the NOAA/NCEI science-quality report. `xrsb_irrad_source` says SYNTHETIC.
        """
        first = self.start if start is None else as_utc(start)
        last = self.end if end is None else as_utc(end)
        return flare_report(self._history, days_since_epoch(first), days_since_epoch(last))

    def hazard(self, times: Iterable[Any], horizon: str = "24h", threshold: str | float = "M1.0") -> np.ndarray:
        """The true probability of a flare of at least `threshold` that starts within `horizon` after each time.

        It knows the hidden state (stored energy, forcing), which no image shows in full: a ceiling for any forecast.

        Args:
            times: UTC.
            horizon: A pandas time span.
            threshold: GOES class, or W/m2.

        Returns:
            (len(times),) float64 probabilities.

        Raises:
            ValueError: The threshold is no class, or the horizon is not positive.
        """
        return hazard(self._history, times, horizon, [threshold])[:, 0]

    def flare_probabilities(self, times: Iterable[Any], horizon: str = "24h") -> np.ndarray:
        """The true probabilities of the class of the largest flare that starts within `horizon` after each time.

        As `hazard`, for the four classes of a flare forecast at once.

        Args:
            times: UTC.
            horizon: A pandas time span.

        Returns:
            (len(times), 4) float64: below C (or none at all), C, M, X; rows sum to 1.
        """
        above = hazard(self._history, times, horizon, ["C1.0", "M1.0", "X1.0"])
        edge = np.ones((len(above), 1))
        return np.concatenate([edge, above], axis=1) - np.concatenate([above, 0.0 * edge], axis=1)

    def degradation_table(self, modalities: Iterable[str | int] | None = None) -> dict[str, Any]:
        """The throughput by which AIA's channels are drawn, as a processor's `degradation` takes it.

        Args:
            modalities: Names or aliases; all by default. HMI has no entry.

        Returns:
            `{"name": "synthetic-sun", "factors": {modality: {"2010-06-01": ...}}}`, every 90 days from a year before
            the span to a year after it.
        """
        year = pd.Timedelta("365D")
        days = pd.date_range(self.start.floor("D") - year, self.end + year, freq="90D")
        names = [name for name in self._names(modalities) if MODALITIES[name].instrument == "aia"]
        factors = {
            name: {f"{day:%Y-%m-%d}": degradation(name, days_since_epoch(day)) for day in days} for name in names
        }
        return {"name": "synthetic-sun", "factors": factors}

    def _names(self, modalities: Iterable[str | int] | None) -> list[str]:
        if modalities is None:
            return list(MODALITY_NAMES)
        if isinstance(modalities, str | int):
            modalities = [modalities]
        return list(dict.fromkeys(resolve_modality(alias) for alias in modalities))

    def _write_slot(self, folder: Path, slot: pd.Timestamp, names: list[str], overwrite: bool) -> list[dict]:
        return write_observation(self._history, self._noise, self.size, folder, slot, names, overwrite)


def _process_context() -> multiprocessing.context.BaseContext:
    """Processes that inherit no threads: forked from a clean server, which imports the package once, or spawned."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


_worker_sun: SyntheticSun | None = None


def _start_worker(sun: SyntheticSun) -> None:
    global _worker_sun
    _worker_sun = sun


def _write_in_worker(folder: Path, slot: pd.Timestamp, names: list[str], overwrite: bool) -> list[dict]:
    if _worker_sun is None:
        raise RuntimeError("a worker must be started by _start_worker before it draws")
    return _worker_sun._write_slot(folder, slot, names, overwrite)


__all__ = ["SyntheticSun"]
