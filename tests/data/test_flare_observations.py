"""Observations joined with labels: right rows, right slots, nothing of the future in the features, honest counts."""

import numpy as np
import pandas as pd
import pytest

from flare_world import CADENCE, activity, flare_class, flare_world, labelled_world
from solarchip_hf.data import (
    SyntheticSun,
    check_feature_table,
    choose_blocks,
    label_flares,
    label_observations,
    load_flare_parts,
    load_observations,
    prepare_flare_archive,
    read_flare_events,
    split_flares,
)
from solarchip_hf.data.flare_observations import told_window
from solarchip_hf.data.flare_preparation import choose_modalities


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return flare_world(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def dataset(root):
    return labelled_world(root)


def test_every_observation_has_the_class_of_its_own_next_day(dataset):
    classes = ["BCMX".index(flare_class(value)[0]) for value in activity()]
    days = (dataset.times - pd.Timestamp("2013-01-01", tz="UTC")).days
    assert (np.diff(days) == CADENCE).all()
    assert dataset.classes.tolist() == [classes[day] for day in days]
    assert dataset.labels["label_day_before"].tolist()[1:] == [classes[day - 1] for day in days][1:]
    assert dataset.labels["label_day_before"].iloc[0] == classes[days[0] - 1]
    item = dataset[5]
    assert item["labels"].item() == dataset.classes[5]
    np.testing.assert_array_equal(item["pixel_values"], dataset.observations[5]["pixel_values"])
    assert set(item) == {"pixel_values", "observed", "labels"}


def test_the_image_belongs_to_the_label(dataset):
    strongest = [np.nanmax(dataset.observations.physical(i)["hmi"]) for i in range(len(dataset))]
    values = [activity()[(time - pd.Timestamp("2013-01-01", tz="UTC")).days] for time in dataset.times]
    assert np.corrcoef(strongest, values)[0, 1] > 0.9


def test_what_is_left_out_is_counted(root, dataset, caplog):
    assert dataset.dropped["label unknown"] == 1  # the first window begins before the list
    events = read_flare_events(root / "flares.csv")
    observations = load_observations(root / "prepared")
    late = events[events["start_time"] > "2013-12-01"]
    with caplog.at_level("WARNING"):
        some = label_observations(observations, late)
    assert some.dropped["label unknown"] == len(observations) - len(some)
    assert f"{some.dropped['label unknown']} of {len(observations)} observations left out: label unknown" in caplog.text
    assert some.times.min() > pd.Timestamp("2013-12-01", tz="UTC")
    whole = label_observations(observations, late, coverage=("2012-12-01", "2014-06-01"))
    assert len(whole) == len(observations)
    assert (whole.classes[whole.times < "2013-11-30"] == 0).all()
    twice = observations.select([*range(len(observations)), 3])
    assert label_observations(twice, events).dropped["second of its slot"] == 1
    blind = observations.select(range(10))
    blind.metadata.loc[2:4, ["hmi_source", "aia171_source"]] = None
    assert label_observations(blind, events).dropped["no image of these modalities"] == 3
    with pytest.raises(ValueError, match="a flare list that covers"):
        label_observations(observations, events, coverage=("2001-01-01", "2001-06-01"))


def test_history_knows_nothing_of_the_window_ahead(root, dataset):
    check_feature_table(dataset.history, dataset.labels)
    assert all(name.startswith("past_") for name in dataset.history)
    events = read_flare_events(root / "flares.csv")
    moment = dataset.times[60]
    later = events.copy()
    changed = later["start_time"] > moment
    later.loc[changed, "flux"] = 9e-4
    later.loc[changed, "goes_class"] = "X9.0"
    again = label_observations(load_observations(root / "prepared"), later)
    known = dataset.times <= moment
    pd.testing.assert_frame_equal(again.history[known], dataset.history[known])
    assert (again.classes[~known] == 3).all()


def test_parts_keep_the_gap_and_their_rows(dataset):
    parts = split_flares(dataset, {"train": 0.6, "validation": 0.2, "test": 0.2})
    assert list(parts) == ["train", "validation", "test"]
    for before, after in (("train", "validation"), ("validation", "test")):
        assert parts[after].times.min() - parts[before].times.max() >= pd.Timedelta("27D")
    for part in parts.values():
        expected = dataset.labels.loc[part.times, "label"]
        assert part.classes.tolist() == expected.tolist()
        assert len(part.history) == len(part) > 10
    first = parts["test"][0]["pixel_values"]
    position = dataset.times.get_loc(parts["test"].times[0])
    np.testing.assert_array_equal(first, dataset[position]["pixel_values"])


def test_selections_share_order_and_masks(dataset):
    mask = dataset.classes >= 2
    chosen = dataset.select(mask)
    assert (chosen.classes >= 2).all()
    assert len(chosen) == mask.sum()
    assert dataset.select([7, 3]).times.tolist() == [dataset.times[7], dataset.times[3]]
    assert len(dataset.select([])) == 0
    assert "C" in dataset.describe()


def test_fractions_are_whole_blocks_and_seeded():
    times = pd.date_range("2012-01-01", periods=1000, freq="1D", tz="UTC")
    blocks = (times - times[0]) // pd.Timedelta("27D")
    sizes = []
    for seed in range(5):
        chosen = choose_blocks(times, 0.1, seed=seed)
        assert (np.diff(chosen) > 0).all()
        own = set(blocks[chosen])
        assert len(chosen) == sum((blocks == block).sum() for block in own)  # no block in part
        sizes.append(len(chosen))
        assert choose_blocks(times, 0.1, seed=seed).tolist() == chosen.tolist()
    assert all(abs(size - 100) <= 27 for size in sizes)
    assert len({tuple(choose_blocks(times, 0.1, seed=seed)) for seed in range(5)}) == 5
    assert choose_blocks(times, 1.0).tolist() == list(range(1000))
    assert len(choose_blocks(times, 1e-6)) == 27  # one block at least
    with pytest.raises(ValueError, match="fraction in"):
        choose_blocks(times, 0.0)


def test_a_folder_of_files_becomes_labelled_parts(root, tmp_path):
    parts = {"train": 0.6, "validation": 0.2, "test": 0.2}
    said = []
    options = {"parts": parts, "workers": 0, "report": lambda files, pairs: said.append((len(files), len(pairs)))}
    target = prepare_flare_archive(root / "archive", tmp_path, {"size": 16}, modalities=["171"], **options)
    assert said == [(240, 120)]
    dataset = load_observations(target)
    assert dataset.modalities == ["aia171", "hmi"]  # magnetograms besides, for the baselines
    assert set(dataset.metadata["split"]) == {*parts, "gap"}
    loaded = load_flare_parts(target, root / "flares.csv", parts=parts, modalities=["171"])
    assert loaded["train"].modalities == ["aia171"]
    own = dict(zip(dataset.metadata["time_nominal"], dataset.metadata["split"], strict=True))
    for name, part in loaded.items():
        assert {own[time] for time in part.times} == {name}
    dates = {"train": "2013-06-01", "validation": "2013-12-01", "test": None}
    other = load_flare_parts(target, root / "flares.csv", parts=dates, prepared_parts=False)
    assert other["test"].times.min() >= pd.Timestamp("2013-12-01", tz="UTC")


def test_prepared_parts_are_never_cut_anew_in_silence(root, tmp_path, caplog):
    parts = {"train": 0.6, "validation": 0.2, "test": 0.2}
    target = prepare_flare_archive(root / "archive", tmp_path, {"size": 16}, parts=parts, workers=0)
    events = read_flare_events(root / "flares.csv")
    with pytest.raises(ValueError, match="covers windows of every prepared part, got none of validation, test"):
        load_flare_parts(target, events[events["start_time"] < "2013-06-01"], parts=parts)
    with caplog.at_level("WARNING"):
        load_flare_parts(target, events, parts=parts, gap="3D")
    assert "gap=3D has no effect" in caplog.text
    drawn = read_flare_events(root / "flares.csv", source="synthetic")
    with pytest.raises(ValueError, match=r"real flares for the real images \(the dataset's manifest\), got synthetic"):
        load_flare_parts(target, drawn, parts=parts)


def test_flares_of_another_sun_are_refused(root, tmp_path):
    events = read_flare_events(root / "flares.csv", source="synthetic")
    options = {"parts": {"train": 1.0}, "workers": 0}
    with pytest.raises(ValueError, match=r"expected real flares for the real images .* got synthetic ones"):
        prepare_flare_archive(root / "archive", tmp_path, {"size": 16}, events=events, **options)
    SyntheticSun(seed=0, size=32).write_archive(tmp_path / "drawn", ["2013-01-01"], ["hmi"], progress=False)
    real = read_flare_events(root / "flares.csv")
    with pytest.raises(ValueError, match=r"expected synthetic flares for the synthetic images .* got real ones"):
        prepare_flare_archive(tmp_path / "drawn", tmp_path, {"size": 16}, events=real, **options)
    assert not list(tmp_path.glob("*/manifest.json"))


def test_modalities_are_chosen_or_refused():
    found = ["hmi", "aia171"]
    assert choose_modalities(found, None, None) == found
    assert choose_modalities(found, ["171"], None) == ["aia171"]
    assert choose_modalities(found, None, ["aia304", "aia171"]) == ["aia171"]
    with pytest.raises(ValueError, match="got aia304"):
        choose_modalities(found, ["304"], None)
    with pytest.raises(ValueError, match="what the model knows"):
        choose_modalities(found, ["hmi"], ["aia171"])
    with pytest.raises(ValueError, match="got none"):
        choose_modalities(found, None, ["aia304"])


def test_labels_follow_their_arguments(root):
    events = read_flare_events(root / "flares.csv")
    observations = load_observations(root / "prepared")
    two_days = label_observations(observations, events, horizon="48h", latency="12h")
    reference = label_flares(two_days.times, events, "48h", latency="12h")
    assert two_days.classes.tolist() == reference["label"].tolist()
    assert two_days.labels.attrs["horizon"] == "2 days 00:00:00"
    assert told_window(two_days.labels.attrs) == {"horizon": "48h", "latency": "12h", "by": "start"}
