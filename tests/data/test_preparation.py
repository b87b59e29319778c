"""Preparation: rows right, faults listed, restart equal to an undisturbed run, serial equal to Dask."""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from small_archive import SIZE, write_aia, write_archive, write_hmi

from solarchip_hf import SolarChipImageProcessor
from solarchip_hf.data import load_observations, pair_observations, prepare_dataset, scan_archive
from solarchip_hf.data.shards import ShardReader, fact_names
from solarchip_hf.data.statistics import Moments, merge_moments
from solarchip_hf.models.geometry import SUPPORT_RADIUS, disk_mask

QUIET = {"workers": 0, "progress": False}
START = datetime(2015, 1, 1, tzinfo=UTC)


@pytest.fixture(scope="module")
def processor():
    return SolarChipImageProcessor(size=32)


@pytest.fixture(scope="module")
def pairs(small_archive):
    return pair_observations(scan_archive(small_archive, progress=False))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, pairs, processor):
    folder = tmp_path_factory.mktemp("prepared")
    manifest = prepare_dataset(pairs, folder, processor, rows_per_shard=5, **QUIET)
    return folder, manifest


def hashes(manifest):
    return [(shard["file"], shard["rows"], shard["sha256"]) for shard in manifest["shards"]]


def rows_of(folder):
    """Every row of a dataset with its images as bytes."""
    manifest = json.loads((folder / "manifest.json").read_text())
    names = manifest["modalities"]
    for shard in manifest["shards"]:
        facts = ShardReader(folder / shard["file"], fact_names(names)).facts().to_pylist()
        images = ShardReader(folder / shard["file"], names)
        for number, row in enumerate(facts):
            pixels = images.images(number)
            yield row | {name: None if pixels[name] is None else pixels[name].tobytes() for name in names}


def test_rows_hold_the_canonical_images_and_their_facts(prepared, pairs, processor):
    folder, manifest = prepared
    assert manifest["observations"] == len(pairs) == 12
    assert manifest["splits"] == {"train": 12}
    assert manifest["images"] == {"hmi": 12, "aia171": 12, "aia1700": 12}
    assert [shard["rows"] for shard in manifest["shards"]] == [5, 5, 2]
    assert manifest["failures"] == manifest["clipped_images"] == 0
    assert manifest["synthetic_images"] == 0  # nothing in their headers says that they are
    rows = list(rows_of(folder))
    assert [row["time_nominal"] for row in rows] == pairs["time_nominal"].dt.to_pydatetime().tolist()
    for row, pair in zip(rows, pairs.to_dict("records"), strict=True):
        assert row["time"] == pair["time"].to_pydatetime()
        assert row["observed"] == 3
        assert row["rsun_arcsec"] == 960.0
        assert row["b0"] == 3.0
        assert row["aia171_exposure"] == 2.0
        assert row["aia1700_difference"] == pair["aia1700_difference"] == 156.0
        assert Path(row["aia171_source"]).parts == ("aia", Path(pair["aia171"]).name)
        for name in ("hmi", "aia171", "aia1700"):
            _, expected = processor.to_physical(pair[name], name)
            stored = np.frombuffer(row[name], dtype=np.float16).reshape(32, 32)
            np.testing.assert_array_equal(stored, expected.astype(np.float16))
            assert row[f"{name}_valid"] == 1.0
            assert row[f"{name}_clipped"] == 0


def test_statistics_are_those_of_the_stored_images(prepared, processor):
    folder, manifest = prepared
    statistics = json.loads((folder / "statistics.json").read_text())
    assert statistics == manifest["statistics"]
    assert {name: statistics[name] for name in processor.statistics_key} == processor.statistics_key
    assert statistics["source"] == "computed on 12 training observations of this dataset, 2014-12-31 to 2015-01-11"
    for name, radius in (("hmi", 1.0), ("aia171", SUPPORT_RADIUS), ("aia1700", SUPPORT_RADIUS)):
        mask = disk_mask(32, radius)
        images = np.stack([np.frombuffer(row[name], np.float16).reshape(32, 32) for row in rows_of(folder)])
        inside = images.astype(np.float64)[:, mask]
        transformed = np.sign(inside) * np.log1p(np.abs(inside))
        row = statistics["modalities"][name]
        assert row["count"] == transformed.size
        assert row["mean"] == pytest.approx(transformed.mean(), abs=1e-6)
        assert row["std"] == pytest.approx(transformed.std(), rel=1e-6)
        assert row["unit"] == ("G" if name == "hmi" else "DN")
    saved = SolarChipImageProcessor.from_pretrained(folder)
    assert saved.statistics == statistics
    assert saved.modalities == ["hmi", "aia171", "aia1700"]


def test_moments_merge_exactly_in_any_grouping():
    rng = np.random.default_rng(0)
    values = rng.normal(1e4, 1.0, 5000)  # a naive sum of squares would lose eight digits here
    whole = Moments.of(values)
    assert whole.std == pytest.approx(values.std(), rel=1e-12)
    for cuts in ([1], [2500], [10, 11, 4000], list(range(100, 5000, 100))):
        parts = merge_moments(Moments.of(part) for part in np.split(values, cuts))
        assert parts.count == 5000
        assert parts.mean == pytest.approx(whole.mean, rel=1e-14)
        assert parts.std == pytest.approx(whole.std, rel=1e-11)
    assert Moments() + whole == whole + Moments() == whole
    pieces = [Moments.of(part) for part in np.split(values, 100)]
    summed = sum(pieces, Moments())
    assert summed.std == pytest.approx(whole.std, rel=1e-11)
    shuffled = [pieces[i] for i in rng.permutation(100)]
    assert merge_moments(shuffled) == merge_moments(pieces)  # to the last bit
    assert merge_moments([]) == merge_moments([Moments()]) == Moments()
    with pytest.raises(ValueError, match="finite numbers"):
        Moments.of(np.array([1.0, np.nan]))


def test_datasets_library_reads_the_same_rows(prepared, tmp_path):
    from datasets import load_dataset

    folder, _ = prepared
    dataset = load_dataset(str(folder), split="train", cache_dir=str(tmp_path))
    assert len(dataset) == 12
    expected = list(rows_of(folder))
    arrays = dataset.with_format("numpy")
    for number in (0, 7, 11):
        image = np.asarray(arrays[number]["aia171"])
        assert image.shape == (32, 32)
        stored = np.frombuffer(expected[number]["aia171"], np.float16).reshape(32, 32)
        np.testing.assert_array_equal(image.astype(np.float16), stored)
        assert dataset[number]["time"] == expected[number]["time"]
        assert dataset[number]["aia171_source"] == expected[number]["aia171_source"]


def test_a_second_call_does_nothing_and_other_settings_are_refused(prepared, pairs, processor):
    folder, manifest = prepared
    stamps = {path: path.stat().st_mtime_ns for path in (folder / "data").iterdir()}
    assert prepare_dataset(pairs, folder, processor, rows_per_shard=5, **QUIET) == manifest
    assert {path: path.stat().st_mtime_ns for path in (folder / "data").iterdir()} == stamps
    other = SolarChipImageProcessor(size=32, photometry="dn")
    with pytest.raises(FileExistsError, match=r"photometry 'nominal' \(now 'dn'\)"):
        prepare_dataset(pairs, folder, other, rows_per_shard=5, **QUIET)
    with pytest.raises(FileExistsError, match="other files, times or splits"):
        prepare_dataset(pairs[:-1], folder, processor, rows_per_shard=5, **QUIET)


def test_overwrite_leaves_nothing_of_the_old(tmp_path, pairs, processor):
    prepare_dataset(pairs, tmp_path, processor, rows_per_shard=1, **QUIET)
    manifest = prepare_dataset(pairs[:4], tmp_path, processor, rows_per_shard=2, overwrite=True, **QUIET)
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == [
        "train-00000-of-00002.arrow",
        "train-00001-of-00002.arrow",
    ]
    assert manifest["observations"] == 4


def test_splits_become_files_and_statistics_are_of_training_only(tmp_path, processor):
    write_archive(tmp_path / "archive", days=16)
    manifest = prepare_dataset(
        tmp_path / "archive", tmp_path / "out", processor, train_end="2015-01-09", gap="5D", rows_per_shard=3, **QUIET
    )
    # 8 days train; those within 5 days after the last of them belong to no part, and are kept as such
    assert manifest["splits"] == {"train": 8, "gap": 4, "validation": 4}
    assert {Path(shard["file"]).name.split("-")[0] for shard in manifest["shards"]} == {"train", "gap", "validation"}
    assert manifest["statistics"]["modalities"]["aia171"]["count"] == 8 * disk_mask(32, SUPPORT_RADIUS).sum()
    alone = prepare_dataset(
        pair_observations(scan_archive(tmp_path / "archive", progress=False))[:8],
        tmp_path / "alone",
        processor,
        **QUIET,
    )
    assert alone["statistics"] == manifest["statistics"]


def test_every_planted_fault_is_listed_and_every_good_file_is_there_once(tmp_path, processor):
    archive = tmp_path / "archive"
    good = {str(path) for path in write_archive(archive, days=6)}
    day = [START + timedelta(days=i) for i in range(10)]
    # what only the pixels show: a damaged heap, a half-blank magnetogram; what the header shows is the scan's part
    damaged = write_aia(archive, day[0], 193)
    content = bytearray(damaged.read_bytes())
    content[-2880 - 600 : -2880 - 200] = b"\xa5" * 400
    damaged.write_bytes(content)
    half = np.zeros((SIZE, SIZE), dtype=bool)
    half[: SIZE // 2] = True
    blank = write_hmi(archive, day[7], nan=half)
    companion = write_aia(archive, day[7], 171)
    lonely = write_hmi(archive, day[9], nan=~half)
    pairs = pair_observations(scan_archive(archive, progress=False))
    manifest = prepare_dataset(pairs, tmp_path / "out", processor, **QUIET)
    failures = pd.read_parquet(tmp_path / "out" / "failures.parquet").set_index("source")
    assert {archive / name for name in failures.index} == {damaged, blank, lonely}
    assert "damaged" in failures.loc[str(damaged.relative_to(archive)), "reason"]
    assert "valid" in failures.loc[blank.name, "reason"]
    assert manifest["failures"] == 3
    rows = list(rows_of(tmp_path / "out"))
    sources = [row[f"{name}_source"] for row in rows for name in manifest["modalities"] if row[f"{name}_source"]]
    assert len(sources) == len(set(sources))
    assert {str(archive / source) for source in sources} == good | {str(companion)}
    assert len(rows) == 7  # the day whose only file failed is gone, the one with a companion is not
    assert rows[6]["hmi"] is None
    assert rows[6]["observed"] == 1
    assert rows[6]["rsun_arcsec"] == 960.0


def test_labels_follow_their_rows_and_failures_can_be_tried_again(tmp_path, pairs, processor, small_archive):
    mixed = pairs.sample(frac=1, random_state=3)
    late = mixed["time_nominal"] >= pairs["time_nominal"].iloc[9]
    labels = np.where(late, "test", "train")
    broken = mixed.copy()
    away = small_archive / "away.fits"
    path = Path(pairs.loc[2, "aia171"])
    path.rename(away)
    try:
        first = prepare_dataset(broken, tmp_path, processor, splits=labels, rows_per_shard=3, **QUIET)
    finally:
        away.rename(path)
    assert first["splits"] == {"train": 9, "test": 3}
    assert first["failures"] == 1
    metadata = load_observations(tmp_path).metadata
    assert metadata["time_nominal"].is_monotonic_increasing
    assert metadata["split"].tolist() == ["train"] * 9 + ["test"] * 3
    assert prepare_dataset(broken, tmp_path, processor, splits=labels, rows_per_shard=3, **QUIET)["failures"] == 1
    retried = prepare_dataset(
        broken, tmp_path, processor, splits=labels, rows_per_shard=3, retry_failures=True, **QUIET
    )
    assert retried["failures"] == 0
    assert retried["images"] == {"hmi": 12, "aia171": 12, "aia1700": 12}
    assert hashes(first)[1:] == hashes(retried)[1:]
    assert hashes(first)[0] != hashes(retried)[0]


def test_values_beyond_float16_are_clipped_and_counted(tmp_path, processor):
    write_hmi(tmp_path / "archive", START)
    write_aia(tmp_path / "archive", START, 171, EXPTIME=0.002)  # a factor of 1000 to the nominal 2 s
    pairs = pair_observations(scan_archive(tmp_path / "archive", progress=False))
    manifest = prepare_dataset(pairs, tmp_path / "half", processor, **QUIET)
    assert manifest["clipped_images"] == 1
    _, expected = processor.to_physical(pairs.loc[0, "aia171"], "aia171")
    dataset = load_observations(tmp_path / "half")
    stored = dataset.physical(0)["aia171"]
    assert np.isfinite(stored[np.isfinite(expected)]).all()
    assert dataset.metadata.loc[0, "aia171_clipped"] == (expected > 65504).sum() > 0
    assert dataset.metadata.loc[0, "hmi_clipped"] == 0
    single = prepare_dataset(pairs, tmp_path / "single", processor, dtype="float32", **QUIET)
    assert single["clipped_images"] == 0
    np.testing.assert_array_equal(load_observations(tmp_path / "single").physical(0)["aia171"], expected)


def test_images_whose_header_says_that_they_are_synthetic_are_counted(tmp_path):
    for day in (1, 2):
        slot = datetime(2015, 1, day, tzinfo=UTC)
        write_aia(tmp_path / "archive", slot, 171, **({"ORIGIN": "SYNTHETIC (a test)"} if day == 1 else {}))
    pairs = pair_observations(scan_archive(tmp_path / "archive", progress=False), anchor="171")
    manifest = prepare_dataset(pairs, tmp_path / "out", SolarChipImageProcessor(size=32), **QUIET)
    assert (manifest["images"], manifest["synthetic_images"]) == ({"aia171": 2}, 1)


def test_ill_posed_calls_are_refused(tmp_path, pairs, processor):
    with pytest.raises(ValueError, match="got none"):
        prepare_dataset(pairs[:0], tmp_path, processor, **QUIET)
    with pytest.raises(ValueError, match="expected the columns"):
        prepare_dataset(pairs.drop(columns="time"), tmp_path, processor, **QUIET)
    with pytest.raises(ValueError, match="one observation only"):
        prepare_dataset(pd.concat([pairs, pairs[:1]], ignore_index=True), tmp_path, processor, **QUIET)
    with pytest.raises(ValueError, match="dtype: expected one of"):
        prepare_dataset(pairs, tmp_path, processor, dtype="int16", **QUIET)
    with pytest.raises(ValueError, match="either splits or train_end"):
        prepare_dataset(pairs, tmp_path, processor, splits={"train": 1.0}, train_end="2015-01-04", **QUIET)
    with pytest.raises(ValueError, match="a label for each of 12"):
        prepare_dataset(pairs, tmp_path, processor, splits=["train"], **QUIET)
    with pytest.raises(ValueError, match="letters, digits and underscores"):
        prepare_dataset(pairs, tmp_path, processor, splits=["a-b"] * 12, **QUIET)
    empty = pairs.assign(aia94=None)
    with pytest.raises(ValueError, match=r"got \['aia94'\], of which none of 12 .* \(modalities=\['hmi'\]\)"):
        prepare_dataset(empty, tmp_path, processor, modalities=["hmi", "aia94"], **QUIET)
    gone = pairs[:1].copy()
    gone[["hmi", "aia171", "aia1700"]] = ["/nowhere/a.fits", "/nowhere/b.fits", "/nowhere/c.fits"]
    with pytest.raises(ValueError, match="at least one readable image, got none of 3"):
        prepare_dataset(gone, tmp_path / "gone", processor, **QUIET)
    (tmp_path / "foreign" / "data").mkdir(parents=True)
    with pytest.raises(FileExistsError, match="no preparation of ours"):
        prepare_dataset(pairs, tmp_path / "foreign", processor, **QUIET)
