"""Checkpoints that are whole or absent: written aside, listed with their sizes, then renamed.

A checkpoint is written to `incomplete/checkpoint-N`, flushed to the disk, given a list of its files with their sizes
(`checkpoint_files.json`), and only then renamed to `checkpoint-N`. A run that dies while saving leaves a folder that is
never looked at; a file that is cut or lost later is noticed by its size.
"""

import json
import logging
import os
import re
import shutil
from pathlib import Path

logger = logging.getLogger(__name__)

INCOMPLETE = "incomplete"
MANIFEST = "checkpoint_files.json"


def _files(folder: Path) -> dict[str, int]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths}


def write_manifest(folder: str | Path) -> None:
    """Flushes the files of a checkpoint to the disk and lists them with their sizes, the list last.

    Args:
        folder: A folder to which everything has been written.
    """
    folder = Path(folder)
    sizes = _files(folder)
    for name in sizes:
        _flush(folder / name)
    part = folder / f"{MANIFEST}.part"
    part.write_text(json.dumps(sizes, indent=1), encoding="utf-8")
    _flush(part)
    part.replace(folder / MANIFEST)


def _flush(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def why_incomplete(folder: str | Path) -> str | None:
    """What is wrong with a checkpoint.

    Args:
        folder: A folder `checkpoint-N`.

    Returns:
        None where every listed file is there in its size; else the reason, in words.
    """
    folder = Path(folder)
    try:
        sizes = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"it has no {MANIFEST}, which is written last"
    except (ValueError, OSError) as error:
        return f"its {MANIFEST} cannot be read: {error}"
    if not isinstance(sizes, dict):
        return f"its {MANIFEST} is no list of files"
    for name, size in sizes.items():
        path = folder / name
        if not path.is_file():
            return f"its {name} is missing"
        if path.stat().st_size != size:
            return f"its {name} has {path.stat().st_size} bytes instead of {size}"
    return None


def last_complete_checkpoint(output_dir: str | Path) -> str | None:
    """The checkpoint of the most steps that is whole; those passed over are named in a warning.

    Args:
        output_dir: The folder of a run.

    Returns:
        The folder `checkpoint-N`, or None where there is none.
    """
    found = [(re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in Path(output_dir).glob("checkpoint-*")]
    numbered = sorted(((int(match[1]), path) for match, path in found if match and path.is_dir()), reverse=True)
    for _, path in numbered:
        reason = why_incomplete(path)
        if reason is None:
            return str(path)
        logger.warning("%s is passed over: %s.", path, reason)
    return None


def checkpoint_to_resume(wish: str | Path, output_dir: str | Path) -> str | None:
    """The checkpoint that is meant by an argument.

    Args:
        wish: A folder; or `last`, `auto` or `true` for the last complete one.
        output_dir: The folder of a run.

    Returns:
        The folder, or None where there is no complete checkpoint yet.

    Raises:
        ValueError: The folder does not exist, or lists files that are not there in full.
    """
    if str(wish).lower() in ("last", "auto", "true"):
        return last_complete_checkpoint(output_dir)
    reason = why_incomplete(wish) if (Path(wish) / MANIFEST).exists() else None
    if reason is not None or not Path(wish).is_dir():
        raise ValueError(
            f"resume_from_checkpoint: expected 'last' or the folder of a complete checkpoint, got {str(wish)!r}: "
            f"{reason or 'no such folder'}."
        )
    return str(wish)


def clear_incomplete(run_dir: str | Path) -> None:
    """Removes what a run that died while saving has left.

    Args:
        run_dir: The folder of the run.
    """
    shutil.rmtree(Path(run_dir) / INCOMPLETE, ignore_errors=True)


def publish(run_dir: str | Path, name: str) -> Path:
    """Renames `incomplete/NAME` to `NAME`, in the place of an older folder of that name.

    Args:
        run_dir: The folder of the run.
        name: Of the checkpoint, as `checkpoint-100`.

    Returns:
        The folder in its place.
    """
    source, target = Path(run_dir) / INCOMPLETE / name, Path(run_dir) / name
    if target.exists():  # as after a resume from an earlier one; it moves aside before it is removed
        aside = source.with_name(f"{name}.replaced")
        target.replace(aside)
        source.replace(target)
    else:
        source.replace(target)
    shutil.rmtree(source.parent, ignore_errors=True)
    return target


__all__ = [
    "INCOMPLETE",
    "MANIFEST",
    "checkpoint_to_resume",
    "clear_incomplete",
    "last_complete_checkpoint",
    "publish",
    "why_incomplete",
    "write_manifest",
]
