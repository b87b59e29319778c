"""Baselines of translation on a small prepared dataset: what each one is, the U-Net's training, and the ceiling."""

import numpy as np
import pytest
import torch
from tiny_translation import SIZE, tiny_autoencoder, tiny_pipeline, write_dataset

from solarchip_hf import load_observations
from solarchip_hf.evaluation.translation_baselines import (
    LatentRegression,
    autoencoder_ceiling,
    hale_magnetograms,
    mean_radial_profile,
    other_days,
    sample_pipeline,
    simple_baselines,
    training_mean,
)
from solarchip_hf.evaluation.translation_cases import gather_cases
from solarchip_hf.evaluation.translation_fidelity.image_scores import radial_distance
from solarchip_hf.evaluation.translation_unet import UNetTranslator, train_unet


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("translation"))


@pytest.fixture(scope="module")
def training(dataset):
    return load_observations(dataset, split="train")


@pytest.fixture(scope="module")
def held_out(dataset):
    return load_observations(dataset, split="validation")


@pytest.fixture(scope="module")
def cases(held_out):
    return gather_cases(held_out, ["hmi"], "aia171")


def test_cases_are_the_complete_observations_in_time_order(training, held_out, cases):
    assert (len(held_out), len(cases)) == (8, 8)
    assert len(gather_cases(training, ["hmi"], "aia171")) == len(training) - 1  # one lacks its 171
    assert cases.times.is_monotonic_increasing
    assert (cases.unit, cases.data_range) == ("DN", 3132.0)
    assert np.isnan(cases.truth[:, ~cases.processor.support("aia171")]).all()
    inside = cases.processor.support("aia171")
    # the scaled target and the truth are one image
    np.testing.assert_allclose(cases.to_physical(cases.target)[:, inside], cases.truth[:, inside], rtol=2e-3, atol=0.1)
    shuffled = gather_cases(held_out.select([5, 2, 7, 0]), ["171"], "HMI", limit=2)
    assert (shuffled.source_modalities, shuffled.target_modality, shuffled.unit) == (("aia171",), "hmi", "G")
    assert shuffled.times.is_monotonic_increasing
    assert len(shuffled) == 2
    assert np.abs(shuffled.b0 + 7).max() < 0.5  # in March the south pole is turned to us


def test_cases_that_cannot_be_had_are_refused(held_out, dataset):
    with pytest.raises(ValueError, match="without aia304"):
        gather_cases(held_out, ["hmi"], "aia304")
    with pytest.raises(ValueError, match="got none of 0"):
        gather_cases(held_out.select(np.zeros(8, dtype=bool)), ["hmi"], "aia171")


def test_training_mean_is_the_mean_of_what_is_there(training):
    mean = training_mean(training, "aia171")
    images = [training.physical(index)["aia171"] for index in range(len(training))]
    assert sum(image is None for image in images) == 1
    stack = np.stack([np.asarray(image, dtype=np.float64) for image in images if image is not None])
    valid = np.isfinite(stack).any(axis=0)
    np.testing.assert_allclose(mean[valid], np.nanmean(stack[:, valid], axis=0), rtol=1e-5)
    assert np.isnan(mean[~valid]).all()
    profile = mean_radial_profile(mean)
    assert np.ptp(profile[radial_distance(SIZE) < 0.06]) == 0  # the four central pixels are alike
    assert np.nanmean(profile[valid]) == pytest.approx(mean[valid].mean(), rel=1e-4)


def test_simple_baselines(training, cases, held_out):
    predictions, remarks = simple_baselines(training, cases)
    assert list(predictions) == ["training mean", "mean radial profile", "another day"]
    assert all(images.shape == cases.truth.shape for images in predictions.values())
    assert len(np.unique(predictions["another day"][:, 16, 16])) > 4
    np.testing.assert_array_equal(other_days(training, "aia171", 3, seed=1), other_days(training, "aia171", 3, seed=1))
    fields = gather_cases(held_out, ["171"], "hmi")
    predictions, remarks = simple_baselines(training, fields)
    assert {"zero field", "Hale's law", "flipped truth"} <= set(predictions)
    assert "sees the truth" in remarks["Hale's law"]
    on_disk = fields.processor.support("hmi")
    assert not predictions["zero field"][:, on_disk].any()
    assert np.isnan(predictions["zero field"][:, ~on_disk]).all()
    hale = hale_magnetograms(fields)
    placed = hale != 0
    assert placed.any()
    placed &= on_disk  # rows of the truth may lack pixels at the limb
    np.testing.assert_allclose(np.abs(hale[placed]), np.abs(fields.truth[placed]))
    assert np.nanmin(np.abs(hale[placed])) > 100  # the weak field around the regions is no part of it


def test_the_ceiling_is_what_the_autoencoder_makes_of_the_truth(cases):
    model = tiny_autoencoder()
    ceiling = autoencoder_ceiling(model, cases, batch_size=3)
    with torch.no_grad():
        pixels = torch.stack([torch.zeros_like(cases.target), cases.target], dim=1)
        expected = cases.to_physical(model(pixels, return_loss=False).reconstruction[:, 1])
    np.testing.assert_allclose(ceiling, expected, rtol=1e-4, atol=1e-3)


def test_latent_regression_finds_a_linear_map(training, cases):
    model = tiny_autoencoder()
    fitted = LatentRegression(model, ridge=1e-6)
    with pytest.raises(ValueError, match="fit"):
        fitted.predict(cases)
    # source and target alike: the map is the identity, and the prediction the ceiling
    same = gather_cases(training, ["aia171"], "aia171")
    np.testing.assert_allclose(
        LatentRegression(model, ridge=1e-9).fit(same, batch_size=4).predict(same),
        autoencoder_ceiling(model, same),
        rtol=2e-2,
        atol=0.2,
    )
    prediction = fitted.fit(gather_cases(training, ["hmi"], "aia171")).predict(cases)
    assert prediction.shape == cases.truth.shape
    assert np.isfinite(prediction[:, cases.processor.support("aia171")]).all()


def test_unet_learns_is_reproducible_and_comes_back(training, cases, tmp_path):
    def trained(steps: int) -> tuple[UNetTranslator, list[dict[str, float]]]:
        torch.manual_seed(0)
        translator = UNetTranslator.build(["hmi"], "aia171", training.processor.statistics_key, widths=(8, 16))
        return translator, train_unet(
            translator, training.select(range(12)), training.select(range(12, 16)), num_steps=steps, eval_every=5
        )

    translator, history = trained(24)
    assert history[-1]["loss"] < 0.7 * history[0]["loss"]
    assert {"step", "loss", "validation_loss"} == set(history[0])
    prediction = translator.predict(cases, batch_size=3)
    again, _ = trained(24)
    np.testing.assert_array_equal(prediction, again.predict(cases, batch_size=3))
    translator.save_pretrained(tmp_path / "unet")
    assert not list((tmp_path / "unet").glob("*.bin"))
    loaded = UNetTranslator.from_pretrained(tmp_path / "unet")
    np.testing.assert_array_equal(loaded.predict(cases, batch_size=3), prediction)
    with pytest.raises(ValueError, match="trained for"):
        loaded.predict(gather_cases(training, ["171"], "hmi"))
    with pytest.raises(FileNotFoundError, match=r"translation\.json"):
        UNetTranslator.from_pretrained(tmp_path)


def test_unet_keeps_the_best_weights_and_stops(training):
    torch.manual_seed(0)
    translator = UNetTranslator.build(["hmi"], "aia171", training.processor.statistics_key, widths=(8, 16))
    held = training.select(range(12, 16))
    # a rate that soon makes it worse
    history = train_unet(
        translator, training.select(range(12)), held, num_steps=40, eval_every=2, patience=2, learning_rate=0.1, seed=3
    )
    losses = [row["validation_loss"] for row in history]
    assert history[-1]["step"] < 40
    pixels = torch.stack([held[index]["pixel_values"] for index in range(4)])
    weight = torch.from_numpy(np.array(held.processor.support("aia171"))).float()
    with torch.no_grad():
        kept = (weight / weight.mean() * (translator(pixels[:, :1]) - pixels[:, 1]).abs()).mean().item()
    assert kept == pytest.approx(min(losses), rel=1e-4)
    assert min(losses) < losses[-1]


def test_unet_folds_large_images_into_channels():
    key = {"size": 128}
    translator = UNetTranslator.build(["hmi", "aia304"], "aia171", key, widths=(8, 16))
    assert translator.square == 2
    assert translator.unet.config.in_channels == 8
    with torch.no_grad():
        assert translator(torch.zeros(2, 2, 128, 128)).shape == (2, 128, 128)
    with pytest.raises(ValueError, match="halvings"):
        UNetTranslator.build(["hmi"], "aia171", {"size": 36}, widths=(8, 16, 32, 64))


def test_sampling_through_the_pipeline(cases):
    pipeline = tiny_pipeline(cases.processor, "hmi", "aia171")
    pipeline.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 2, "num_samples": 2}
    drawn = sample_pipeline(pipeline, cases, batch_size=16, **options)
    assert drawn.shape == (8, 2, SIZE, SIZE)
    inside = cases.processor.support("aia171")
    assert np.isfinite(drawn[..., inside]).all()
    np.testing.assert_allclose(
        sample_pipeline(pipeline, cases, batch_size=3, **options)[..., inside], drawn[..., inside], rtol=1e-3
    )
    # the prior alone: the same noise, no source
    prior_only = sample_pipeline(pipeline, cases, unconditional=True, **options)
    assert np.abs(prior_only - drawn)[..., inside].max() > 1e-3 * np.abs(drawn[..., inside]).max()
    # other noise, another image
    assert np.abs(drawn[:, 0] - drawn[:, 1])[..., inside].max() > 0
