"""Latents of a real prepared dataset: what is stored, its statistics, resuming, and what is refused as stale."""

import json
import pickle

import numpy as np
import pytest
import torch
from tiny_latents import MODALITIES, draw_dataset, tiny_autoencoder

from solarchip_hf.data import load_observations
from solarchip_hf.translation import latent_statistics
from solarchip_hf.translation.latents import LatentDataset, PriorLatents, TranslationLatents, encode_dataset


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return draw_dataset(tmp_path_factory.mktemp("translation"))


@pytest.fixture(scope="module")
def observations(dataset):
    return load_observations(dataset)


def encode(model, observations, folder, **options):
    return encode_dataset(model, observations, folder, **{"progress": False, "dtype": "float32", **options})


@pytest.fixture(scope="module")
def latents(observations, tmp_path_factory):
    return encode(tiny_autoencoder(), observations, tmp_path_factory.mktemp("latents") / "vit", shard_rows=6)


@pytest.mark.parametrize("backbone", ["vit", "cnn", "vae"])
def test_stored_latents_are_those_of_the_encoder(backbone, observations, tmp_path):
    model = tiny_autoencoder(backbone)
    latents = encode(model, observations, tmp_path / "latents", shard_rows=5, batch_size=3)
    assert latents.modalities == MODALITIES
    assert latents.shape == (8, 8, 8)
    assert len(latents) == 14
    assert len(list((tmp_path / "latents").glob("*.safetensors"))) == 3
    for index in (0, 7, 13):
        item, image = latents[index], observations[index]
        encoded = model.solarchip(image["pixel_values"][:, None], range(3), return_dict=True)
        assert torch.equal(item["observed"], image["observed"])
        seen = item["observed"]
        torch.testing.assert_close(item["latents"][seen], encoded.latents[seen], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(item["class_tokens"][seen], encoded.pooler_output[seen], rtol=1e-5, atol=1e-6)
        # patch tokens are the latent's pixels, which is why they are not stored
        tokens = encoded.last_hidden_state[:, 1:].transpose(1, 2).unflatten(2, (8, 8))
        assert torch.equal(tokens, encoded.latents)


def test_missing_images_are_marked_and_zero(latents):
    row = int(np.flatnonzero(~latents.observed[:, 1])[0])
    item = latents[row]
    assert item["observed"].tolist() == [True, False, True]
    assert not item["latents"][1].any()
    assert item["latents"][0].any()
    assert latents.metadata["aia171_observed"].tolist().count(False) == 1
    assert not [name for name in latents.metadata if name.endswith("_source")]  # no paths of the archive


def test_statistics_are_those_of_the_training_split(latents):
    assert (latents.metadata["split"] == "train").sum() == 10
    training = latents.split("train")
    for position, name in enumerate(MODALITIES):
        rows = [training[index] for index in range(len(training))]
        values = torch.stack([row["latents"][position] for row in rows if row["observed"][position]]).double()
        assert len(values) == (9 if name == "aia171" else 10)
        np.testing.assert_allclose(latents.mean[name], values.mean((0, 2, 3)), atol=1e-6)
        np.testing.assert_allclose(latents.std[name], values.std((0, 2, 3), unbiased=False), rtol=1e-5)


def test_the_autoencoders_own_error_is_in_physical_units(latents, observations):
    """Against errors computed here from the images of the held-out observations."""
    model = tiny_autoencoder()
    assert set(latents.reconstruction) == set(MODALITIES)
    assert [row["unit"] for row in latents.reconstruction.values()] == ["G", "DN", "DN"]
    assert latents.reconstruction["aia171"]["images"] == 4
    errors = []
    for row in range(10, 14):
        pixels = observations[row]["pixel_values"][1][None, None]
        with torch.no_grad():
            decoded = model.decode(model.encode(pixels, [1]), [1])[:, 0]
        truth = np.asarray(observations.physical(row)["aia171"], dtype=np.float64)
        errors.append(observations.processor.unscale(decoded, "aia171")[0] - truth)
    error = np.stack(errors)
    error = error[np.isfinite(error)]
    assert error.size == 4 * observations.processor.support("aia171").sum()
    assert latents.reconstruction["aia171"]["mae"] == pytest.approx(np.abs(error).mean(), rel=1e-4)
    assert latents.reconstruction["aia171"]["rmse"] == pytest.approx(np.sqrt((error**2).mean()), rel=1e-4)


def test_encoding_goes_on_where_it_stopped(latents, observations, tmp_path):
    folder = tmp_path / "latents"
    encode(tiny_autoencoder(), observations, folder, shard_rows=6)
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    (folder / "latents-00001.safetensors").unlink()
    (folder / "manifest.json").unlink()
    with pytest.raises(FileNotFoundError, match="goes on where it stopped"):
        LatentDataset(folder)
    kept = (folder / "latents-00000.safetensors").stat().st_mtime_ns
    encode(tiny_autoencoder(), observations, folder, shard_rows=6)
    assert (folder / "latents-00000.safetensors").stat().st_mtime_ns == kept
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == whole


def test_stale_latents_are_refused(latents, observations, dataset):
    settings = {"shard_rows": 6}
    encode(tiny_autoencoder(), observations, latents.folder, **settings)  # the same again is what is there
    with pytest.raises(ValueError, match=r"stale ones \(different: autoencoder\)"):
        encode(tiny_autoencoder(seed=1), observations, latents.folder, **settings)
    with pytest.raises(ValueError, match=r"different: dtype"):
        encode(tiny_autoencoder(), observations, latents.folder, dtype="float16", **settings)
    with pytest.raises(ValueError, match=r"different: dataset"):
        encode(tiny_autoencoder(), observations.select(np.arange(12)), latents.folder, **settings)
    with pytest.raises(ValueError, match="expected hmi, aia171, aia304 at 32 px"):
        encode(tiny_autoencoder(), load_observations(dataset, modalities=["hmi", "aia171"]), latents.folder, **settings)


def test_half_precision_and_worker_processes(latents, observations, tmp_path):
    half = encode(tiny_autoencoder(), observations, tmp_path / "half", dtype="float16")
    difference = half[3]["latents"] - latents[3]["latents"]
    assert half[3]["latents"].dtype == torch.float32
    assert 0 < difference.abs().max() < 2e-3
    again = pickle.loads(pickle.dumps(half))  # as for a worker that is spawned
    assert torch.equal(again[3]["latents"], half[3]["latents"])


def test_latents_that_do_not_fit_are_refused(observations, tmp_path):
    model = tiny_autoencoder()
    with torch.no_grad():
        for tower in model.solarchip.towers.values():
            tower.encoder.post_layernorm.weight.mul_(1e6)
    with pytest.raises(ValueError, match="Take dtype='float32'"):
        encode(model, observations, tmp_path / "latents", dtype="float16")
    assert not list((tmp_path / "latents").glob("*.safetensors"))


def test_items_of_a_prior(latents):
    one, two = PriorLatents(latents, ["171"]), PriorLatents(latents, ["hmi", "aia171"])
    assert (len(one), len(two)) == (13, 27)
    labels = torch.stack([two[index]["class_label"] for index in range(27)])
    assert labels.bincount().tolist() == [14, 13]
    training = PriorLatents(latents.split("train"), ["aia171"])
    targets = torch.stack([training[index]["target"] for index in range(len(training))])
    torch.testing.assert_close(targets.mean((0, 2, 3)), torch.zeros(8), atol=1e-5, rtol=0)
    torch.testing.assert_close(targets.std((0, 2, 3), correction=0), torch.ones(8), atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="got aia193"):
        PriorLatents(latents, ["193"])


def test_items_of_a_controlnet(latents):
    pairs = TranslationLatents(latents, ["hmi", "304"], "171")
    assert (len(pairs), pairs.left_out) == (13, 1)
    item = pairs[0]
    assert item["target"].shape == (8, 8, 8)
    assert item["hint"].shape == (16, 8, 8)
    assert item["context"].shape == (2 * 65, 8)
    assert torch.equal(item["hint"][:8], PriorLatents(latents, ["hmi"])[0]["target"])
    assert torch.equal(item["hint"][8:].flatten(1).T, item["context"][66:])
    with pytest.raises(ValueError, match="the target aia171 not among them"):
        TranslationLatents(latents, ["hmi", "aia171"], "aia171")


def test_only_the_channels_asked_for_are_read(latents, monkeypatch):
    """Asked of the slices of the open file, with the whole item beside."""
    whole, asked = latents[2], []
    real = type(latents)._locate

    class Watched:
        def __init__(self, file):
            self.file = file

        def get_slice(self, name):
            stored = self.file.get_slice(name)
            return type("Slice", (), {"__getitem__": lambda _, where: asked.append((name, where)) or stored[where]})()

    def locate(self, index):
        file, row = real(self, index)
        return Watched(file), row

    monkeypatch.setattr(LatentDataset, "_locate", locate)
    PriorLatents(latents, ["304"])[2]
    assert asked == [("latents", (2, 2))]
    asked.clear()
    item = TranslationLatents(latents.select(np.arange(14) != 1), ["304"], "hmi")[1]  # row 2
    assert asked == [("latents", (2, 2)), ("latents", (2, 0)), ("class_tokens", (2, 2))]
    torch.testing.assert_close(
        item["target"] * torch.tensor(latents.std["hmi"])[:, None, None]
        + torch.tensor(latents.mean["hmi"])[:, None, None],
        whole["latents"][0],
    )
    assert torch.equal(latents.read(2, [2, 0], "class_tokens"), whole["class_tokens"][[2, 0]])


def test_statistics_do_not_depend_on_the_slices(latents, monkeypatch):
    paths = sorted(latents.folder.glob("*.safetensors"))
    marked = np.arange(6) % 3 > 0
    at_once = latent_statistics.shard_moments(paths[0], marked)
    monkeypatch.setattr(latent_statistics, "_BLOCK", 1)  # an image at a time
    torch.testing.assert_close(latent_statistics.shard_moments(paths[0], marked), at_once, rtol=1e-13, atol=1e-12)
    assert at_once[2, 0, 0] == 4 * 64


def test_a_shard_is_no_larger_than_it_may_be(observations, tmp_path, monkeypatch):
    monkeypatch.setattr("solarchip_hf.translation.latents._SHARD_BYTES", 5 * 3 * 8 * 8 * 8 * 2 + 100)
    few = encode(tiny_autoencoder(), observations, tmp_path / "few", dtype="float16")
    assert few.manifest["shard_rows"] == 5
    monkeypatch.undo()
    assert encode(tiny_autoencoder(), observations, tmp_path / "all").manifest["shard_rows"] == 256


def test_a_later_format_is_refused(latents, tmp_path):
    for path in latents.folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps({**manifest, "format": 99}))
    with pytest.raises(ValueError, match="got 99"):
        LatentDataset(tmp_path)
