"""Two thousand files with planted faults: every fault named, every good file in the dataset once, kill -9 or not."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from small_archive import SIZE, write_aia, write_hmi

from solarchip_hf import SolarChipImageProcessor
from solarchip_hf.data import load_observations, pair_observations, prepare_dataset, scan_archive

EXAMPLE = Path(__file__).parents[2] / "examples" / "prepare_data.py"
START = datetime(2012, 1, 1, tzinfo=UTC)
DAYS = 250
QUIET = {"workers": 0, "progress": False}
WAVELENGTHS = (94, 131, 171, 193, 211, 304, 335)
RICE = (171,)  # the others plain, which halves the time of this test


def retimed(content: bytes, day: int) -> bytes:
    """The file with another day in its time cards: much quicker than writing it anew."""
    slot = START + timedelta(days=day)
    for form in ("%Y-%m-%d", "%Y.%m.%d"):
        content = content.replace(START.strftime(form).encode(), slot.strftime(form).encode())
    return content


def patched(content: bytes, old: bytes, new: bytes) -> bytes:
    assert len(old) == len(new)
    assert old in content
    return content.replace(old, new, 1)


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """The archive, its good files, and its bad ones with a word of the reason to be given."""
    folder, scratch = tmp_path_factory.mktemp("large"), tmp_path_factory.mktemp("templates")
    templates = {f"AIA{w:04d}": write_aia(scratch, START, w, rice=w in RICE).read_bytes() for w in WAVELENGTHS}
    templates["HMI"] = write_hmi(scratch, START).read_bytes()
    block = np.zeros((SIZE, SIZE), dtype=bool)
    block[20:44, 20:44] = True
    holed = write_hmi(scratch, START, name="holed.fits", nan=block).read_bytes()
    rng = np.random.default_rng(7)
    jobs = [(day, name) for day in range(DAYS) for name in templates]
    chosen = rng.permutation([i for i, (_, name) in enumerate(jobs) if name != "HMI"])
    kinds = ["truncated", "html", "instrument", "quality", "duplicate", "missing"]
    fault = {int(position): kinds[i % len(kinds)] for i, position in enumerate(chosen[: 10 * len(kinds)])}
    rice = [i for i in chosen[10 * len(kinds) :] if int(jobs[i][1][3:]) in RICE]
    fault |= {int(position): "corrupt" for position in rice[:10]}
    hmi = [i for i, (_, name) in enumerate(jobs) if name == "HMI"]
    fault |= {int(position): "nan" for position in rng.permutation(hmi)[:10]}
    good, bad = set(), {}
    for position, (day, name) in enumerate(jobs):
        content = retimed(templates[name], day)
        path = folder / f"{day // 100}" / f"{name}_{day:04d}.fits"
        path.parent.mkdir(exist_ok=True)
        kind = fault.get(position)
        if kind == "missing":
            continue
        if kind == "truncated":
            content, bad[path] = content[: int(rng.integers(3000, len(content) - 2880))], "truncated"
        elif kind == "html":
            content, bad[path] = b"<!DOCTYPE html>\n<html><body>503</body></html>\n", "HTML"
        elif kind == "instrument":
            content, bad[path] = patched(content, b"'SDO/AIA '", b"'GOES-R  '"), "INSTRUME"
            content = patched(content, b"'AIA_3   '", b"'SUVI    '")
        elif kind == "quality":
            content, bad[path] = (
                patched(content, b"QUALITY =                    0", b"QUALITY =                16384"),
                "bit 14",
            )
        elif kind == "corrupt":
            place = len(content) - 2880 - int(rng.integers(300, 900))
            content, bad[path] = content[:place] + bytes(64) + content[place + 64 :], "damaged"
        elif kind == "nan":
            content, bad[path] = retimed(holed, day), "valid"
        else:
            good.add(path)
        if kind == "duplicate":
            copy = path.with_name(f"z_{path.name}")  # the first path is kept
            copy.write_bytes(content)
            bad[copy] = "duplicate"
        path.write_bytes(content)
    return folder, good, bad


@pytest.mark.timeout(280)
def test_every_fault_is_named_and_every_good_file_is_there_once_despite_a_kill(planted, tmp_path):
    folder, good, bad = planted
    assert len(good) + len(bad) >= 2000 - 10
    assert Counter(bad.values()).most_common()[-1][1] == 10

    catalog = scan_archive(folder, progress=False)
    assert len(catalog) == len(good) + len(bad)
    pairs, dropped = pair_observations(catalog, return_dropped=True)
    pairs.to_parquet(tmp_path / "pairs.parquet")
    out = tmp_path / "out"
    command = [sys.executable, str(EXAMPLE), "prepare", str(tmp_path / "pairs.parquet"), str(out)]
    process = subprocess.Popen([*command, "--size", "16", "--workers", "0"], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    records = out / ".preparation" / "records"
    while not list(records.glob("*.json")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (out / "manifest.json").exists()
    with pytest.raises(FileNotFoundError, match="resumes where it stopped"):
        load_observations(out)
    shards = sorted((out / "data").glob("*.arrow"))
    before = {path: path.stat().st_mtime_ns for path in shards}
    (out / "data" / shards[0].name.replace("00000", "00003", 1)).write_bytes(b"a shard without its record")
    manifest = prepare_dataset(pairs, out, SolarChipImageProcessor(size=16), **QUIET)
    assert 1 <= len(before) < len(manifest["shards"])
    assert shards[0].stat().st_mtime_ns == before[shards[0]]  # it was not done again
    assert not list(out.rglob("*.tmp"))
    undisturbed = prepare_dataset(pairs, tmp_path / "undisturbed", SolarChipImageProcessor(size=16), **QUIET)
    assert manifest == undisturbed  # the shards' hashes are in it
    names = [str(path.relative_to(out)) for path in out.glob("[!.]*")] + [row["file"] for row in manifest["shards"]]
    assert len(names) >= 6 + 4
    for name in names:
        if (out / name).is_file():
            assert (out / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes(), name

    # what was reported: by the scan, by the pairing, by the preparation
    reported = dict(catalog.loc[~catalog["usable"], ["path", "reason"]].itertuples(index=False))
    reported |= {
        path: reason for path, reason in dropped[["path", "dropped"]].itertuples(index=False) if path not in reported
    }
    failures = pd.read_parquet(out / "failures.parquet")
    reported |= {
        str(folder / source): reason for source, reason in zip(failures["source"], failures["reason"], strict=True)
    }
    assert set(reported) == {str(path) for path in bad}
    for path, word in bad.items():
        assert word in reported[str(path)], (path, reported[str(path)])

    # what is in the dataset
    metadata = load_observations(out).metadata
    sources = [s for name in manifest["modalities"] for s in metadata[f"{name}_source"] if s is not None]
    assert Counter(folder / source for source in sources) == Counter(dict.fromkeys(good, 1))
    assert manifest["observations"] == len(metadata) == DAYS
    assert metadata["time_nominal"].tolist() == [pd.Timestamp(START) + timedelta(days=day) for day in range(DAYS)]
    assert json.loads((out / "manifest.json").read_text()) == manifest
