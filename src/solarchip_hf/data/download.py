"""Fetching SDO images from the JSOC tree and its mirrors: resumes, tries again, and looks at what came.

The tree is `aia/synoptic/YYYY/MM/DD/Hhh00/AIAYYYYMMDD_hhmm_wwww.fits` (a near-real-time copy under `aia/synoptic/nrt`)
and `hmi/fits/YYYY/MM/DD/hmi.M_720s.YYYYMMDD_hhmmss_TAI.fits`. AIA 1700 has no frame at the full hour: the one of two
minutes later is asked for first. HMI's slots are on TAI.
"""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm.auto import tqdm

from ..models.modalities import MODALITIES, MODALITY_NAMES, resolve_modality
from .durations import read_duration
from .transfer import Absent, Fetcher, Unavailable

logger = logging.getLogger(__name__)

JSOC = "https://jsoc1.stanford.edu/data"
LOG = ".download.jsonl"  # slots that no source has, so that a second call need not ask again
_AIA_STEP = pd.Timedelta("2min")  # of the synoptic series
_MAY_STILL_COME = pd.Timedelta("7D")


@dataclass(frozen=True)
class Place:
    """Where a file may lie: its address, its path below the folder, and the time that its name promises."""

    url: str
    file: str
    time: pd.Timestamp


@dataclass(frozen=True)
class Job:
    """One image wanted, and the places to try in their order."""

    modality: str
    slot: pd.Timestamp
    places: tuple[Place, ...]

    @property
    def key(self) -> str:
        """What names the job in the log."""
        return f"{self.modality} {self.slot:%Y-%m-%dT%H:%M:%S}"

    @property
    def asked(self) -> str:
        """What names its places in the log: another source, series or tolerance is another question."""
        return hashlib.sha256("\n".join(place.url for place in self.places).encode()).hexdigest()[:16]


def download_sdo(
    start: Any,
    end: Any,
    folder: str | os.PathLike,
    *,
    modalities: Sequence[str] | None = None,
    cadence: str | pd.Timedelta = "1D",
    tolerance: str | pd.Timedelta = "6min",
    sources: Sequence[str] = (JSOC,),
    near_real_time: bool = False,
    search: str = "tree",
    retries: int = 4,
    backoff: float = 2.0,
    timeout: float = 60.0,
    threads: int = 4,
    retry_absent: bool = False,
    progress: bool = True,
) -> pd.DataFrame:
    """Downloads one image a slot and modality into a tree that `scan_archive` reads.

    A file is written under a temporary name, compared with its announced length, opened as the image that its name
    promises (an HTML page, a truncated file, another channel or another time is refused), and then renamed: a file
    under its own name is whole. An interrupted call goes on where it stopped, in the middle of a file where the server
    can. Errors of the connection, of the server (5xx, 429) and wrong contents are tried again after 1, 2, 4, ... times
    `backoff` seconds; then the next source is asked. A source that has failed three times in a row is given one try a
    file until it answers again.

    Args:
        start: First slot, as `"2015-01-01"` (UTC).
        end: End of the range, exclusive.
        folder: Root of the archive.
        modalities: Channels wanted; by default all eleven.
        cadence: Time between slots. HMI slots are rounded to 12 minutes, AIA's to 2, those of 4500 to the hour; slots
            that fall together are one.
        tolerance: How far a neighbouring AIA frame may lie from its slot, where that of the slot is absent; less than
            half the cadence in any case.
        sources: Addresses of the tree, the first preferred, then its mirrors.
        near_real_time: Whether AIA's near-real-time series is asked where the synoptic one has no file.
        search: `"tree"` builds the names; `"fido"` has sunpy's client of that tree list AIA's files first, so that none
            is asked for in vain (HMI's are built all the same).
        retries: Further tries after a failure that may pass.
        backoff: Seconds before the first of them; doubled each time. A server's `Retry-After` counts if it is longer.
        timeout: Seconds without an answer that count as a failure.
        threads: Files fetched at a time; JSOC asks for few.
        retry_absent: Whether to ask again for slots that no source had at an earlier call with the same sources and
            tolerance. Slots of the last week are always asked again.
        progress: Whether to show a progress bar.

    Returns:
        One row a slot and modality: `time_nominal`, `modality`, `status` (`"present"` from an earlier call,
        `"downloaded"`, `"absent"` where no source has it, `"failed"`), `path` and `url` (None where there is no file),
        `bytes`, `reason`. `attrs["report"]` counts them.

    Raises:
        ValueError: The range is empty, or an argument makes no sense.
        ImportError: `search="fido"` without sunpy.
    """
    folder = Path(folder)
    names = [resolve_modality(name) for name in (modalities or MODALITY_NAMES)]
    step = read_duration(cadence, "cadence")
    slots = _slots(start, end, step)
    # beyond half the cadence a neighbouring frame belongs to the next slot
    tolerance = min(read_duration(tolerance, "tolerance", zero=True), (step - pd.Timedelta("1s")) / 2)
    if search not in ("tree", "fido"):
        raise ValueError(f"search: expected 'tree' or 'fido', got {search!r}.")
    if not sources or any(not source.startswith(("http://", "https://")) for source in sources):
        raise ValueError(f"sources: expected addresses that start with http:// or https://, got {list(sources)}.")
    if retries < 0 or backoff < 0 or threads < 1:
        raise ValueError(f"retries, backoff, threads: expected 0, 0, 1 or more, got {retries}, {backoff}, {threads}.")
    listed = _fido_listing(names, slots, tolerance) if search == "fido" else {}
    jobs = []
    asked = set()
    for slot in slots:
        for name in names:
            places = tuple(_places(name, slot, tolerance, sources, near_real_time, listed.get(name)))
            first = places[0].file if places else f"{name} {slot}"
            if first not in asked:  # a cadence below that of the series asks for one file several times
                asked.add(first)
                jobs.append(Job(name, slot, places))
    fetcher = Fetcher(retries=retries, backoff=backoff, timeout=timeout)
    known = set() if retry_absent else _read_log(folder / LOG)
    rows = []
    with tqdm(total=len(jobs), desc="download", unit="file", disable=not progress) as bar:
        for job, row in _run(lambda job: _do(job, folder, fetcher, (job.key, job.asked) in known), jobs, threads):
            rows.append(row)
            if row["status"] == "absent" and (job.key, job.asked) not in known:
                _write_log(folder / LOG, job)
            bar.update()
    table = pd.DataFrame(rows, columns=["time_nominal", "modality", "status", "path", "url", "bytes", "reason"])
    table = table.sort_values(["time_nominal", "modality"], ignore_index=True)
    counts = table["status"].value_counts().to_dict()
    states = ("present", "downloaded", "absent", "failed")
    table.attrs["report"] = {state: int(counts.get(state, 0)) for state in states}
    return table


def _slots(start: Any, end: Any, cadence: pd.Timedelta) -> list[pd.Timestamp]:
    first, last = (pd.Timestamp(value) for value in (start, end))
    first, last = (t.tz_localize("UTC") if t.tzinfo is None else t.tz_convert("UTC") for t in (first, last))
    slots = list(pd.date_range(first, last, freq=cadence, inclusive="left"))
    if not slots:
        raise ValueError(f"start, end: expected a range with at least one slot, got {first} to {last}.")
    return slots


def _places(
    name: str,
    slot: pd.Timestamp,
    tolerance: pd.Timedelta,
    sources: Sequence[str],
    near_real_time: bool,
    listed: Sequence[str] | None,
) -> Iterator[Place]:
    """Where the image of a slot may lie, the best place first."""
    if name == "hmi":
        time = slot.round("720s")
        file = f"hmi/{time:%Y/%m/%d}/hmi.M_720s.{time:%Y%m%d_%H%M%S}_TAI.fits"
        for source in sources:
            yield Place(f"{source.rstrip('/')}/{file.replace('hmi/', 'hmi/fits/', 1)}", file, time)
        return
    wavelength = MODALITIES[name].wavelength
    if listed is not None:
        for url in listed:
            time = _named_time(url)
            if abs(time - slot) <= tolerance:
                yield Place(url, f"aia/{time:%Y/%m/%d}/{url.rpartition('/')[2]}", time)
    series = ["aia/synoptic", "aia/synoptic/nrt"] if near_real_time else ["aia/synoptic"]
    series = series if listed is None else series[1:]
    for time in _frames(name, slot, tolerance):
        file = f"AIA{time:%Y%m%d_%H%M}_{wavelength:04d}.fits"
        for part in series:
            for source in sources:
                url = f"{source.rstrip('/')}/{part}/{time:%Y/%m/%d}/H{time:%H}00/{file}"
                target = f"nrt_{file}" if part.endswith("nrt") else file  # both series may be kept side by side
                yield Place(url, f"aia/{time:%Y/%m/%d}/{target}", time)


def _frames(name: str, slot: pd.Timestamp, tolerance: pd.Timedelta) -> Iterator[pd.Timestamp]:
    """Times of frames to ask for, the likeliest first."""
    if name == "aia4500":
        yield slot.round("3600s")
        return
    nearest = slot.round("120s")
    if name == "aia1700" and nearest.minute == 0:
        nearest += _AIA_STEP
    yield nearest
    for step in range(1, int(tolerance / _AIA_STEP) + 2):
        for time in (nearest + step * _AIA_STEP, nearest - step * _AIA_STEP):
            if abs(time - slot) <= tolerance:
                yield time


def _do(job: Job, folder: Path, fetcher: Fetcher, known_absent: bool) -> dict[str, Any]:
    """One job to its end: a row of the result."""
    row = {"time_nominal": job.slot, "modality": job.modality, "path": None, "url": None, "bytes": 0, "reason": ""}
    for place in job.places:
        path = folder / place.file
        if path.exists():
            return row | {"status": "present", "path": str(path), "url": place.url, "bytes": path.stat().st_size}
    if known_absent:
        return row | {"status": "absent", "reason": "no source had it at an earlier call"}
    reasons = []
    for place in job.places:
        try:
            size = fetcher.fetch(place.url, folder / place.file, job.modality, place.time.to_pydatetime())
        except Absent:
            continue
        except Unavailable as error:
            reasons.append(f"{place.url}: {error}")
            logger.warning("%s: %s", place.url, error)
            continue
        return row | {"status": "downloaded", "path": str(folder / place.file), "url": place.url, "bytes": size}
    if reasons:
        return row | {"status": "failed", "reason": "; ".join(reasons)}
    return row | {"status": "absent", "reason": f"none of {len(job.places)} places has it"}


def _run(
    function: Callable[[Job], dict[str, Any]], jobs: Sequence[Job], threads: int
) -> Iterator[tuple[Job, dict[str, Any]]]:
    """Calls a function for every job in threads, few in advance, so that an interruption ends soon."""
    waiting = iter(jobs)
    with ThreadPoolExecutor(threads) as pool:
        running: dict[Future, Job] = {}
        try:
            while True:
                for job in waiting:
                    running[pool.submit(function, job)] = job
                    if len(running) >= 2 * threads:
                        break
                if not running:
                    return
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    yield running.pop(future), future.result()
        finally:
            for future in running:
                future.cancel()


def _named_time(url: str) -> pd.Timestamp:
    """The time in a synoptic file's name, `AIAYYYYMMDD_hhmm_wwww.fits`."""
    return pd.to_datetime(url.rpartition("AIA")[2][:13], format="%Y%m%d_%H%M", utc=True)


def _fido_listing(names: Sequence[str], slots: Sequence[pd.Timestamp], tolerance: pd.Timedelta) -> dict[str, list[str]]:
    """Addresses of the synoptic files that sunpy finds near the slots, a query a wavelength and slot."""
    try:
        import astropy.units as u
        from sunpy.net import attrs
        from sunpy.net.dataretriever.sources.aia_synopsis import AIASynopsisClient
    except ImportError as error:
        raise ImportError(
            "search='fido' needs sunpy's network clients, which are not installed: "
            "pip install 'solarchip_hf[download]', or take search='tree'."
        ) from error
    listing: dict[str, list[str]] = {}
    for name in names:
        if name == "hmi":
            continue
        found: list[tuple[pd.Timedelta, str]] = []
        for slot in slots:
            period = attrs.Time(str((slot - tolerance).tz_localize(None)), str((slot + tolerance).tz_localize(None)))
            wavelength = attrs.Wavelength(MODALITIES[name].wavelength * u.AA)
            # Fido's client for this level, without Fido: it would ask the VSO too, which has no such files
            response = AIASynopsisClient().search(period, attrs.Instrument.aia, attrs.Level("1.5s"), wavelength)
            urls = {str(row["url"]) for row in response}
            found += [(abs(_named_time(url) - slot), url) for url in urls]
        listing[name] = [url for _, url in sorted(found)]
    return listing


def _read_log(path: Path) -> set[tuple[str, str | None]]:
    if not path.exists():
        return set()
    recent = pd.Timestamp.now(tz="UTC") - _MAY_STILL_COME
    lines = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}"))
    entries = {(line["absent"], line.get("asked")) for line in lines}
    return {entry for entry in entries if pd.Timestamp(entry[0].partition(" ")[2], tz="UTC") < recent}


def _write_log(path: Path, job: Job) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps({"absent": job.key, "asked": job.asked}) + "\n")


__all__ = ["JSOC", "download_sdo"]
