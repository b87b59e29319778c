"""The catalogue of an archive: one row a file, from headers alone."""

import gzip
import json
import logging
import math
import os
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm.auto import tqdm

from ..models.headers import SolarImage, SolarImageError
from ..models.readers import read_image
from .isolation import WorkerDied, map_isolated

logger = logging.getLogger(__name__)

FITS_SUFFIXES = (".fits", ".fit", ".fts", ".fits.gz", ".fit.gz", ".fts.gz", ".fits.fz", ".fz")
JPEG2000_SUFFIXES = (".jp2",)
SUFFIXES = FITS_SUFFIXES + JPEG2000_SUFFIXES

# Raised whenever the facts below are read differently, so that an older index is read again.
INDEX_VERSION = 2
_INDEX_KEY = b"solarchip_hf.catalog"
_FITS_BLOCK = 2880  # bytes
_FILES_A_WORKER = 64  # below this many files a further worker costs more to start than it saves

_REFUSED = "file: expected a readable one, got "
_SAVE_EVERY = 10_000  # files between two writes of the index

_UTC = pa.timestamp("us", tz="UTC")
CATALOG_SCHEMA = pa.schema(
    [
        ("path", pa.string()),
        ("modality", pa.string()),
        ("time", _UTC),
        ("time_nominal", _UTC),
        ("full_disk", pa.bool_()),
        ("usable", pa.bool_()),
        ("reason", pa.string()),
        ("instrument", pa.string()),
        ("exposure", pa.float64()),
        ("quality", pa.int64()),
        ("near_real_time", pa.bool_()),
        ("approximate", pa.bool_()),
        ("unit", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("plate_scale", pa.float64()),  # arcsec per pixel along x
        ("crpix_x", pa.float64()),
        ("crpix_y", pa.float64()),
        ("crval_x", pa.float64()),  # arcsec
        ("crval_y", pa.float64()),
        ("rotation", pa.float64()),  # degrees, as CROTA2
        ("rsun_arcsec", pa.float64()),
        ("b0", pa.float64()),  # degrees
        ("l0", pa.float64()),  # degrees
        ("observer_distance", pa.float64()),  # metres
        ("notes", pa.string()),
        ("file_size", pa.int64()),
        ("mtime_ns", pa.int64()),
    ]
)


def scan_archive(
    folder: str | os.PathLike,
    index: str | os.PathLike | None = None,
    *,
    workers: int | None = None,
    timeout: float | None = 120.0,
    progress: bool = True,
) -> pd.DataFrame:
    """Reads the headers of every FITS and JPEG2000 file below a folder into one table.

    Files are read in worker processes. A file that cannot be read, that is no image of the Sun, or that kills or stalls
    its reader gives a row with `usable` false and the `reason`; it never stops the scan.

    Args:
        folder: Root of the tree; `.fits`, `.fit`, `.fts` (each also `.gz`), `.fz` and `.jp2` files are read, others are
            left alone. Links to files are read, links to folders are not followed.
        index: A Parquet file that keeps the table. Where it exists only files that are new, or whose size or
            modification time has changed, or that the system refused to open, are read; files that are gone leave it.
        workers: Number of reading processes; by default the number of cores, fewer for a small archive.
        timeout: Seconds after which a file is given up; None for no limit.
        progress: Whether to show a progress bar.

    Returns:
        A table sorted by path, with the columns of `CATALOG_SCHEMA`: `path`, `modality` (None where it is none of
        ours), `time` (UTC), `time_nominal` (slot of the series), `full_disk`, `usable`, `reason` (empty where usable),
        and the header facts: `exposure` (s), `quality`, `near_real_time`, `approximate` (8-bit quick-look), `width`,
        `height` (px), `plate_scale` (arcsec/px), `crpix_*` (px), `crval_*` (arcsec), `rotation` (degrees),
        `rsun_arcsec`, `b0`, `l0` (degrees), `file_size` (bytes), `mtime_ns`. `attrs["report"]` counts files found,
        read, kept from the index, gone and unusable.

    Raises:
        NotADirectoryError: The folder does not exist.
        ValueError: The index is a file that this function did not write.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise NotADirectoryError(f"scan_archive: expected a folder with FITS or JPEG2000 files, got {str(folder)!r}.")
    found = pd.DataFrame(_walk(folder), columns=["path", "file_size", "mtime_ns"])
    known = _read_index(Path(index)) if index is not None else None
    kept, todo = _split_known(found, known)
    rows: list[dict[str, Any]] = []
    for row in _read_all(todo, workers, timeout, progress):
        rows.append(row)
        if index is not None and len(rows) % _SAVE_EVERY == 0:  # so that a killed scan goes on from here
            write_catalog(_merged(kept, rows), Path(index))
    table = _merged(kept, rows)
    gone = 0 if known is None else int((~known["path"].isin(found["path"])).sum())
    if index is not None and (known is None or len(todo) or gone):
        write_catalog(table, Path(index))
    table.attrs["report"] = {
        "files": len(table),
        "read": len(todo),
        "kept": len(kept),
        "gone": gone,
        "usable": int(table["usable"].sum()),
        "unusable": int((~table["usable"]).sum()),
    }
    return table


def find_image_files(inputs: Iterable[str | os.PathLike], refused: list[str] | None = None) -> list[Path]:
    """The files among the inputs, whatever they are called, and those of a known ending below their folders.

    Args:
        inputs: Files and folders.
        refused: Gets a sentence for every input that does not exist, holds no such file, or is neither file nor folder;
            without it the first one that does not exist is an error, and the others are passed over.

    Returns:
        The files, each once, those of a folder sorted by path.

    Raises:
        FileNotFoundError: An input does not exist, or there is no such file in any of them.
    """
    files: list[Path] = []
    reasons = []
    for path in map(Path, inputs):
        if not path.exists():
            reasons.append(f"{path}: no such file or folder.")
            if refused is None:
                raise FileNotFoundError(reasons[-1])
        elif path.is_dir():
            below = [
                file for file in sorted(path.rglob("*")) if file.name.lower().endswith(SUFFIXES) and file.is_file()
            ]
            if not below:
                reasons.append(f"{path}: no file ending in {', '.join(SUFFIXES)} in this folder.")
            files += below
        elif path.is_file():
            files.append(path)
        else:
            reasons.append(f"{path}: neither a file nor a folder.")
    if not files:
        raise FileNotFoundError(" ".join(reasons) or "inputs: expected files or folders, got none.")
    if refused is not None:
        refused += reasons
    return list(dict.fromkeys(files))


def _merged(kept: pd.DataFrame, rows: list[dict[str, Any]]) -> pd.DataFrame:
    fresh = catalog_frame(rows)
    table = pd.concat([kept, fresh], ignore_index=True) if len(kept) else fresh
    return table.sort_values("path", ignore_index=True)


def _walk(root: Path) -> Iterator[tuple[str, int, int]]:
    """Yields (path, size, mtime_ns) of every recognised file below a folder, links to folders not followed."""
    top = os.path.abspath(root)
    stack = [top]
    while stack:
        folder = stack.pop()
        try:
            entries = os.scandir(folder)
        except OSError as error:
            if folder == top:
                raise
            logger.warning("%s was left out: the folder cannot be read (%s)", folder, error.strerror)
            continue
        with entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    stack.append(entry.path)
                elif entry.name.lower().endswith(SUFFIXES) and not entry.name.startswith("."):
                    try:
                        stat = entry.stat()
                    except FileNotFoundError:  # a dangling link, or deleted while we walk: not in the archive
                        logger.warning("%s vanished during the scan", entry.path)
                        continue
                    # a name that is no UTF-8 fits no table: escaped, it is that of a file that cannot be opened
                    path = os.fsencode(entry.path).decode("utf-8", "backslashreplace")
                    yield path, stat.st_size, stat.st_mtime_ns


def _split_known(found: pd.DataFrame, known: pd.DataFrame | None) -> tuple[pd.DataFrame, list[tuple[str, int, int]]]:
    if known is None or not len(known):
        return catalog_frame([]), list(found.itertuples(index=False, name=None))
    merged = found.merge(
        known[["path", "file_size", "mtime_ns"]], on="path", how="left", suffixes=("", "_known"), validate="1:1"
    )
    same = (merged["file_size"] == merged["file_size_known"]) & (merged["mtime_ns"] == merged["mtime_ns_known"])
    # what the system refused (no permission, a disk that was away) is no property of the file: it is asked again
    refused = merged["path"].isin(known["path"][known["reason"].str.startswith(_REFUSED, na=False)])
    same = (same.fillna(False) & ~refused).to_numpy(dtype=bool)
    return known[known["path"].isin(found["path"][same])], list(found[~same].itertuples(index=False, name=None))


def _read_all(
    files: list[tuple[str, int, int]], workers: int | None, timeout: float | None, progress: bool
) -> Iterator[dict[str, Any]]:
    if not files:
        return
    limit = math.ceil(len(files) / _FILES_A_WORKER)
    count = min(limit, os.cpu_count() or 1) if workers is None else workers
    sizes = {path: (size, mtime) for path, size, mtime in files}
    results = map_isolated(read_facts, sizes, workers=count, timeout=timeout)
    for path, result in tqdm(results, total=len(files), desc="scan", unit="file", disable=not progress):
        size, mtime = sizes[path]
        if isinstance(result, WorkerDied):
            row = unusable_facts(path, f"file: expected a header that can be read, got a crash: {result}")
        elif isinstance(result, Exception):
            row = unusable_facts(
                path, f"file: expected a header that can be read, got {type(result).__name__}: {result}"
            )
        else:
            row = result
        yield {**row, "file_size": size, "mtime_ns": mtime}


def read_facts(path: str) -> dict[str, Any]:
    """Reads the catalogue's facts of one file from its header.

    Args:
        path: A FITS or JPEG2000 file.

    Returns:
        A row of `CATALOG_SCHEMA` without size and modification time; a file that is no usable image gives a row with
        `usable` false and the reason.
    """
    try:
        image = read_image(path, header_only=True)
        _check_gzip(path)
    except SolarImageError as error:
        return unusable_facts(path, str(error).removeprefix(f"{path}: "))
    except OSError as error:
        return unusable_facts(path, f"{_REFUSED}{type(error).__name__}: {error}")
    return image_facts(path, image)


def _check_gzip(path: str) -> None:
    """Refuses a gzipped file that is cut off: its header, at the beginning, may be whole.

    A whole one ends with its length, and FITS files have whole blocks; only where that is not so all is inflated.
    """
    with open(path, "rb") as file:
        if file.read(2) != b"\x1f\x8b":
            return
        file.seek(-4, os.SEEK_END)
        length = int.from_bytes(file.read(4), "little")
    if length and length % _FITS_BLOCK == 0:
        return
    try:
        with gzip.open(path) as stream:
            while stream.read(2**20):
                pass
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise SolarImageError(path, "file", "a whole gzip file", str(error), "Fetch the file again.") from error


def image_facts(path: str, image: SolarImage) -> dict[str, Any]:
    """The catalogue's facts of an image.

    Args:
        path: What names it in the catalogue.
        image: Its header, as read.

    Returns:
        A row of `CATALOG_SCHEMA` without size and modification time.
    """
    (a, b), (c, d) = image.rotation
    height, width = image.shape
    return {
        "path": path,
        "modality": image.modality,
        "time": image.time,
        "time_nominal": image.time_nominal,
        "full_disk": bool(image.full_disk),
        "usable": bool(image.usable),
        "reason": image.reason,
        "instrument": image.instrument,
        "exposure": image.exposure,
        "quality": image.quality,
        "near_real_time": bool(image.near_real_time),
        "approximate": bool(image.approximate),
        "unit": image.unit,
        "width": width,
        "height": height,
        "plate_scale": image.cdelt[0],
        "crpix_x": image.crpix[0],
        "crpix_y": image.crpix[1],
        "crval_x": image.crval[0],
        "crval_y": image.crval[1],
        "rotation": math.degrees(math.atan2(c - b, a + d)),
        "rsun_arcsec": image.rsun_arcsec,
        "b0": image.b0,
        "l0": image.l0,
        "observer_distance": image.observer_distance,
        "notes": " ".join(image.notes),
    }


def unusable_facts(path: str, reason: str, **facts: Any) -> dict[str, Any]:
    """A row of `CATALOG_SCHEMA` for what cannot be used, and why."""
    return {
        "path": path,
        "full_disk": False,
        "usable": False,
        "reason": reason,
        "near_real_time": False,
        "approximate": path.lower().endswith(JPEG2000_SUFFIXES),
        "notes": "",
        **facts,
    }


def catalog_frame(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """A table of `CATALOG_SCHEMA` from rows that may lack columns; a size or modification time not told is 0."""
    columns = {name: [_plain(row.get(name)) for row in rows] for name in CATALOG_SCHEMA.names}
    return _to_pandas(pa.table(columns, schema=CATALOG_SCHEMA))


def _plain(value: Any) -> Any:
    if isinstance(value, float) and math.isnan(value):
        return None
    return value.item() if hasattr(value, "item") else value


def _to_pandas(table: pa.Table) -> pd.DataFrame:
    """Pandas columns of fixed types: missing text is None, missing numbers NaN, quality a nullable integer."""
    frame = table.to_pandas(types_mapper={pa.int64(): pd.Int64Dtype(), pa.int32(): pd.Int32Dtype()}.get)
    for name in ("file_size", "mtime_ns"):
        frame[name] = frame[name].fillna(0).astype("int64")
    for name in ("path", "modality", "reason", "instrument", "unit", "notes"):
        frame[name] = pd.Series(table[name].to_pylist(), dtype=object, index=frame.index)
    return frame


def _read_index(path: Path) -> pd.DataFrame | None:
    if not path.exists():
        return None
    try:
        table = pq.read_table(path)
    except pa.ArrowInvalid as error:
        raise ValueError(
            f"index: expected a Parquet catalogue written by scan_archive, got {str(path)!r} ({error}). "
            "Name another file, or delete this one."
        ) from error
    facts = json.loads((table.schema.metadata or {}).get(_INDEX_KEY, b"null"))
    if facts is None:
        raise ValueError(
            f"index: expected a Parquet catalogue written by scan_archive, got {str(path)!r} without its mark. "
            "Name another file, or delete this one."
        )
    if facts["version"] != INDEX_VERSION:
        logger.info("%s was written by another version (%s): all files are read again", path, facts["version"])
        return None
    return _to_pandas(table.cast(CATALOG_SCHEMA))


def write_catalog(table: pd.DataFrame, path: Path) -> None:
    """Writes a catalogue as the Parquet file that `read_catalog` reads."""
    path.parent.mkdir(parents=True, exist_ok=True)
    arrow = pa.Table.from_pandas(table, schema=CATALOG_SCHEMA, preserve_index=False)
    arrow = arrow.replace_schema_metadata({_INDEX_KEY: json.dumps({"version": INDEX_VERSION}).encode()})
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    pq.write_table(arrow, temporary)
    os.replace(temporary, path)


def read_catalog(path: str | os.PathLike) -> pd.DataFrame:
    """Reads a catalogue back from the index that `scan_archive` wrote.

    Args:
        path: The Parquet file.

    Returns:
        The table of `scan_archive`.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is no catalogue, or one of another version.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"catalogue: expected a Parquet file written by scan_archive, got nothing at {path}.")
    table = _read_index(path)
    if table is None:
        raise ValueError(f"catalogue: {path} was written by another version: run scan_archive on the folder again.")
    return table


__all__ = [
    "CATALOG_SCHEMA",
    "SUFFIXES",
    "catalog_frame",
    "find_image_files",
    "image_facts",
    "read_catalog",
    "read_facts",
    "scan_archive",
    "unusable_facts",
    "write_catalog",
]
