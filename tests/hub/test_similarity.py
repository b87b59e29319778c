"""Similarity search: answers against an exhaustive search, exclusion in time, reuse of what is known."""

import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from solarchip_hf import SolarChipConfig, SolarChipImageProcessor, SolarChipModel, SyntheticSun, prepare_dataset
from solarchip_hf.hub.similarity import ImageEmbedder, SimilarityIndex, contact_sheet

MODALITIES = ["hmi", "aia171"]


def make_model(seed: int = 0) -> SolarChipModel:
    torch.manual_seed(seed)
    backbone = {
        "model_type": "solarchip_vit",
        "image_size": 32,
        "patch_size": 8,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    return SolarChipModel(SolarChipConfig(backbone_config=backbone, modalities=MODALITIES, projection_dim=16))


def make_embedder(seed: int = 0, **options) -> ImageEmbedder:
    return ImageEmbedder(make_model(seed), SolarChipImageProcessor(modalities=MODALITIES, size=32), **options)


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    folder = tmp_path_factory.mktemp("archive")
    sun = SyntheticSun(seed=0, start="2014-02-01", days=90, size=64)
    sun.write_archive(folder, sun.times("9D"), MODALITIES, progress=False)
    (folder / "page.fits").write_text("<!DOCTYPE html><html><body>404</body></html>")
    return folder


@pytest.fixture(scope="module")
def index(archive, tmp_path_factory):
    index = SimilarityIndex(tmp_path_factory.mktemp("index") / "class", make_embedder())
    report = index.update(archive)
    assert (report["known"], report["added"], len(report["refused"])) == (0, 20, 1)
    assert "HTML" in report["refused"][0]
    return index


def first(archive, pattern="AIA*_0171.fits"):
    return min(archive.rglob(pattern))


def test_answers_are_those_of_an_exhaustive_search(index, archive):
    vector, facts, _ = index.embedder.embed_image(first(archive))
    rows = index.rows().to_pandas().query("modality == 'aia171'")
    cosines = np.stack(rows["embedding"]) @ vector
    assert cosines.max() - cosines.min() > 1e-4  # there is something to rank
    answers = index.nearest(vector, "171", k=4)
    assert answers[0].source == str(first(archive))  # itself
    assert answers[0].similarity == pytest.approx(1, abs=1e-5)
    np.testing.assert_allclose([answer.similarity for answer in answers], np.sort(cosines)[::-1][:4], atol=1e-6)

    far = index.nearest(vector, "171", k=20, time=facts.time)
    distance = (rows["time"] - pd.Timestamp(facts.time)).abs()
    assert len(far) == (distance >= "27D").sum() < 10
    assert {answer.time for answer in far} == set(rows["time"][distance >= "27D"])
    assert all(a.similarity >= b.similarity for a, b in pairwise(far))


def test_answers_are_kept_apart(index, archive):
    vector, facts, _ = index.embedder.embed_image(first(archive))
    answers = index.nearest(vector, "aia171", k=9, time=facts.time, exclude_within="0h", apart="20D")
    times = sorted(answer.time for answer in answers)
    assert 3 <= len(times) <= 4
    assert min(np.diff(times)) >= pd.Timedelta("20D")
    assert index.nearest(vector, "aia171", time=facts.time, exclude_within="900D") == []


def test_another_channel_may_be_searched(index, archive):
    vector, _, _ = index.embedder.embed_image(first(archive))
    assert {answer.modality for answer in index.nearest(vector, "hmi", k=3)} == {"hmi"}


def test_what_is_known_is_not_embedded_again(index, archive, tmp_path, monkeypatch):
    copied, folder = tmp_path / "archive", tmp_path / "index"
    shutil.copytree(archive, copied)
    (copied / "page.fits").unlink()
    again = SimilarityIndex(folder, make_embedder())
    assert again.update(copied, modalities=["171"])["added"] == 10
    count = len(again.dataset("171"))
    written = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}

    fresh = SimilarityIndex(folder, make_embedder())
    monkeypatch.setattr(ImageEmbedder, "__call__", lambda *_: pytest.fail("embedded again"))
    assert fresh.update(copied, modalities=["171"]) == {"known": 10, "added": 0, "refused": []}
    assert len(fresh.dataset("171")) == count
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == written  # the index is read back
    monkeypatch.undo()

    shutil.copyfile(first(copied), copied / "another.fits")
    second = sorted(copied.rglob("AIA*_0171.fits"))[1]
    shutil.copyfile(first(copied), second)  # another Sun under a known name
    assert fresh.update(copied, modalities=["171"])["added"] == 2
    assert len(fresh.dataset("171")) == 11
    vector, _, _ = fresh.embedder.embed_image(first(copied))
    assert {answer.source for answer in fresh.nearest(vector, "171", k=3)} == {
        str(first(copied)),
        str(copied / "another.fits"),
        str(second),
    }
    assert len(list(folder.glob("*.faiss"))) == 1
    assert not list(folder.glob(".*"))  # nothing half-written


def test_a_prepared_dataset_gives_the_answers_of_its_files(index, archive, tmp_path):
    processor = SolarChipImageProcessor(modalities=MODALITIES, size=32)
    prepare_dataset(archive, tmp_path / "prepared", processor, workers=0, modalities=MODALITIES)
    embedder = make_embedder()
    of_dataset = SimilarityIndex(tmp_path / "index", embedder)
    other = SolarChipImageProcessor(modalities=MODALITIES, size=32, geometry="arcsec")
    wrong = SimilarityIndex(tmp_path / "wrong", ImageEmbedder(make_model(), other))
    with pytest.raises(ValueError, match="prepared with, got geometry='arcsec'"):
        wrong.update(tmp_path / "prepared")
    assert of_dataset.update(tmp_path / "prepared")["added"] == 20
    vector, facts, image = embedder.embed_image(first(archive))
    answers, expected = (
        one.nearest(vector, "171", k=3, time=facts.time, exclude_within="0h") for one in (of_dataset, index)
    )
    assert [answer.time.date() for answer in answers] == [answer.time.date() for answer in expected]
    assert answers[0].similarity == pytest.approx(1, abs=1e-3)  # float16 in the dataset
    np.testing.assert_allclose(of_dataset.image(answers[0]), image, atol=0.02)
    np.testing.assert_array_equal(index.image(expected[0]), image)


def test_other_galleries_and_removed_files_are_not_answered(archive, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    for folder, file in zip((one, one, two), sorted(archive.rglob("AIA*_0171.fits")), strict=False):
        folder.mkdir(exist_ok=True)
        shutil.copyfile(file, folder / file.name)
    index = SimilarityIndex(tmp_path / "index", make_embedder())
    index.update(one)
    fresh = SimilarityIndex(tmp_path / "index", index.embedder)
    fresh.update(two)
    vector = index.embedder.embed_image(first(archive))[0]
    assert {Path(answer.source).parent for answer in fresh.nearest(vector, "171")} == {two}
    assert len(SimilarityIndex(tmp_path / "index", index.embedder).nearest(vector, "171")) == 3  # nobody chose
    assert len(index.nearest(vector, "171", k=2)) == 2
    first(one).unlink()
    (answer,) = index.nearest(vector, "171", k=1)  # the index in memory still knows it
    assert Path(answer.source).is_file()
    assert len(SimilarityIndex(tmp_path / "index", index.embedder).nearest(vector, "171")) == 2


def test_vectors_of_another_model_are_refused(index, archive):
    for embedder in (make_embedder(seed=1), make_embedder(embedding="patch")):
        with pytest.raises(ValueError, match="expected vectors of this model and embedding"):
            SimilarityIndex(index.folder, embedder)


def test_mean_of_patches_leaves_the_sky_out(archive):
    embedder = make_embedder(embedding="patch")
    vector, _, image = embedder.embed_image(first(archive))
    assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-5)
    patches = torch.zeros(1, 16, 16)
    corners = [0, 3, 12, 15]
    patches[:, corners, 0] = 1
    patches[:, [i for i in range(16) if i not in corners], 1] = 1
    mean = embedder._mean_of_patches(patches)[0]
    assert mean[0] == 0
    assert mean[1] == 1
    with pytest.raises(ValueError, match="embedding: expected one of class, patch"):
        make_embedder(embedding="tokens")
    assert image.shape == (32, 32)


def test_spans_and_galleries_that_cannot_be_used(index, archive, tmp_path):
    vector = index.embedder.embed_image(first(archive))[0]
    with pytest.raises(ValueError, match="exclude_within: expected a span as '27D'"):
        index.nearest(vector, "171", time=pd.Timestamp("2014-02-01"), exclude_within="a month")
    with pytest.raises(ValueError, match="apart: expected a span of zero or more"):
        index.nearest(vector, "171", apart="-1D")
    with pytest.raises(ValueError, match="expected images of aia193 in the gallery"):
        index.nearest(vector, "193")
    with pytest.raises(FileNotFoundError, match="expected a prepared dataset, or files ending in"):
        SimilarityIndex(tmp_path / "index", make_embedder()).update(tmp_path / "nowhere")


def test_contact_sheet_shows_every_image(index, archive):
    image = index.embedder.embed_image(first(archive))[2]
    figure = contact_sheet([image] * 5, ["171"] * 4 + ["hmi"], list("abcde"), title="synthetic")
    drawn = [axes for axes in figure.axes if axes.images]
    assert [axes.get_title().split("\n")[1] for axes in drawn] == list("abcde")
    assert drawn[0].images[0].get_cmap().name != drawn[4].images[0].get_cmap().name
