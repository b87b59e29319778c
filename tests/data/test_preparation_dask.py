"""Preparation on Dask: the bytes of a serial run, whoever dies on the way."""

import os
import signal
import threading
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from dask.distributed import Client, LocalCluster
from small_archive import write_aia, write_archive

from solarchip_hf import SolarChipImageProcessor
from solarchip_hf.data import pair_observations, prepare_dataset, scan_archive
from solarchip_hf.data.shards import ShardReader

START = datetime(2015, 1, 1, tzinfo=UTC)


@pytest.fixture(scope="module")
def processor():
    return SolarChipImageProcessor(size=32)


def contents(folder):
    """Every file of a dataset but what depends on when and where it was made."""
    names = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    return {str(name): (folder / name).read_bytes() for name in names if name.parts[0] != ".preparation"}


@pytest.mark.timeout(280)
def test_a_cluster_of_two_workers_gives_the_serial_bytes_though_one_is_killed(tmp_path, processor, small_archive):
    pairs = pair_observations(scan_archive(small_archive, workers=1, progress=False))
    options = {"rows_per_shard": 1, "progress": False}
    prepare_dataset(pairs, tmp_path / "serial", processor, workers=0, **options)
    records = tmp_path / "dask" / ".preparation" / "records"
    settings = {"threads_per_worker": 1, "processes": True, "dashboard_address": "127.0.0.1:0", "memory_limit": 0}
    with LocalCluster(n_workers=2, **settings) as cluster, Client(cluster) as client:
        before = set(client.run(os.getpid).values())
        victim = min(before)
        found = []

        def kill():
            """Waits for the first shard, then kills one worker while most of the work is left."""
            while not list(records.glob("*.json")):
                time.sleep(0.005)
            os.kill(victim, signal.SIGKILL)
            found.append(len(list(records.glob("*.json"))))

        killer = threading.Thread(target=kill, daemon=True)
        killer.start()
        prepare_dataset(pairs, tmp_path / "dask", processor, scheduler=cluster.scheduler_address, **options)
        killer.join(timeout=10)
        assert victim not in client.run(os.getpid).values()
    assert len(before) == 2
    assert 1 <= found[0] < len(pairs)
    assert contents(tmp_path / "dask") == contents(tmp_path / "serial")
    assert len(list((tmp_path / "dask" / "data").iterdir())) == len(pairs) == 12


@pytest.mark.timeout(280)
def test_a_file_that_kills_its_reader_costs_one_image(tmp_path, processor, deadly):
    archive = tmp_path / "archive"
    good = write_archive(archive, days=2)
    killer = write_aia(archive, START, 193)
    planted = pair_observations(scan_archive(archive, workers=1, progress=False))
    killer = killer.rename(killer.with_name(deadly))
    planted["aia193"] = planted["aia193"].map(lambda path: path and str(killer))
    options = {"rows_per_shard": 1, "progress": False}
    manifest = prepare_dataset(planted, tmp_path / "dask", processor, workers=1, **options)
    serial = prepare_dataset(planted, tmp_path / "serial", processor, workers=0, **options)  # harmless in this process
    assert manifest["shards"][1]["sha256"] == serial["shards"][1]["sha256"]
    assert len(manifest["shards"]) == 2
    failures = pd.read_parquet(tmp_path / "dask" / "failures.parquet")
    assert failures["source"].tolist() == [deadly]
    assert f"status {-signal.SIGKILL}" in failures.loc[0, "reason"]
    assert sum(manifest["images"].values()) == len(good) == sum(serial["images"].values()) - 1
    names = ["hmi", "aia171", "aia1700"]
    first, whole = (
        ShardReader(Path(folder) / manifest["shards"][0]["file"], [*names, "aia193"]).images(0)
        for folder in (tmp_path / "dask", tmp_path / "serial")
    )
    assert first["aia193"] is None
    for name in names:
        np.testing.assert_array_equal(first[name], whole[name])
