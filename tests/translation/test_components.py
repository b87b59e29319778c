"""Priors, ControlNets, schedulers, and what they are fed."""

import logging

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from tiny_pipeline import MODALITIES, tiny_autoencoder

from solarchip_hf import SolarChipConfig
from solarchip_hf.translation import (
    build_controlnet,
    build_prior,
    build_scheduler,
    condition_on_sources,
    denormalise_latents,
    latent_shape,
    normalise_latents,
    null_context,
)

TINY = {"base_width": 32, "multipliers": (1, 2), "num_heads": 2}


def tiny_prior(backbone, **settings):
    torch.manual_seed(0)
    return build_prior(latent_shape(tiny_autoencoder(backbone).config), **TINY, **settings).eval()


def noisy(unet, seed=0):
    side = unet.config.sample_size
    return torch.randn(2, unet.config.in_channels, side, side, generator=torch.Generator().manual_seed(seed))


def sources_of(unet, sources=2, seed=1):
    """Hint and context of random latents, with statistics that change nothing."""
    generator = torch.Generator().manual_seed(seed)
    channels, side = unet.config.in_channels, unet.config.sample_size
    latents = torch.randn(2, sources, channels, side, side, generator=generator)
    tokens = torch.randn(2, sources, channels, generator=generator)
    names = MODALITIES[:sources]
    zero, one = {name: [0.0] * channels for name in names}, {name: [1.0] * channels for name in names}
    return condition_on_sources(latents, tokens, names, zero, one)


@pytest.mark.parametrize(("backbone", "shape"), [("vit", (32, 4, 4)), ("cnn", (8, 8, 8))])
def test_latent_shapes_are_those_of_the_autoencoder(backbone, shape):
    autoencoder = tiny_autoencoder(backbone)
    latents = autoencoder.encode(torch.zeros(1, 1, 64, 64), [0])
    assert latent_shape(autoencoder.config) == tuple(latents.shape[1:]) == shape
    assert latent_shape(autoencoder.config, 128)[1] == 2 * shape[1]
    with pytest.raises(ValueError, match="multiple of"):
        latent_shape(autoencoder.config, 68)


def test_the_published_prior_has_the_published_widths():
    config = SolarChipConfig.from_name("cnn-base", modalities=["hmi"])
    with torch.device("meta"):
        prior = build_prior(latent_shape(config), size="published")
    assert (prior.config.in_channels, prior.config.sample_size) == (32, 32)
    assert tuple(prior.config.block_out_channels) == (320, 640, 1280, 1280)
    assert prior.config.layers_per_block == 2
    assert prior.config.down_block_types[0] == "CrossAttnDownBlock2D"
    attention = prior.down_blocks[0].attentions[0].transformer_blocks[0].attn1
    assert (attention.heads, attention.inner_dim) == (8, 320)


@pytest.mark.parametrize(
    ("shape", "settings", "said"),
    [
        ((8, 6, 6), {"multipliers": (1, 2, 2)}, "fewer multipliers"),
        ((8, 8, 4), {}, "square"),
        ((8, 8, 8), {"base_width": 30, "num_heads": 4}, "num_heads: expected a divisor"),
        ((8, 8, 8), {"multipliers": ()}, "multipliers"),
        ((8, 8, 8), {"size": "huge"}, "size: expected one of 'published', 'small'"),
    ],
)
def test_priors_that_do_not_fit_are_refused(shape, settings, said):
    with pytest.raises(ValueError, match=said):
        build_prior(shape, **settings)


def test_a_prior_narrower_than_the_latents_is_warned_about(caplog):
    with caplog.at_level(logging.WARNING, logger="solarchip_hf"):
        build_prior((64, 4, 4), **TINY)
    assert "32 channels cannot carry the noise of 64 latent channels" in caplog.text


@pytest.mark.parametrize("backbone", ["vit", "cnn"])
@pytest.mark.parametrize("prior_modalities", [None, ["hmi", "aia171"]])
@torch.no_grad()
def test_a_new_controlnet_changes_nothing_until_it_is_trained(backbone, prior_modalities):
    unet = tiny_prior(backbone, prior_modalities=prior_modalities)
    controlnet = build_controlnet(unet, 2 * unet.config.in_channels).eval()
    hint, context = sources_of(unet)
    latents, labels = noisy(unet), None if prior_modalities is None else torch.tensor([1, 1])
    alone = unet(latents, 500, null_context(unet, 2), class_labels=labels).sample

    def steered():
        down, middle = controlnet(latents, 500, context, hint, class_labels=labels, return_dict=False)
        return unet(
            latents,
            500,
            null_context(unet, 2),
            class_labels=labels,
            down_block_additional_residuals=down,
            mid_block_additional_residual=middle,
        ).sample

    assert (steered() - alone).abs().max() <= 1e-6
    assert alone.std() > 1e-2
    for layer in controlnet.controlnet_down_blocks:
        torch.nn.init.normal_(layer.weight, std=0.1)
    assert (steered() - alone).abs().max() > 1e-3  # the zeros were what kept it still
    before = controlnet.conv_in.weight.clone()
    unet.conv_in.weight.add_(1)
    assert torch.equal(controlnet.conv_in.weight, before)  # a copy, not the prior's own


@pytest.mark.parametrize("backbone", ["vit", "cnn"])
@torch.no_grad()
def test_the_hint_stays_on_the_latent_grid(backbone):
    unet = tiny_prior(backbone)
    controlnet = build_controlnet(unet, 3 * unet.config.in_channels, hint_width=24)
    hint, _ = sources_of(unet, sources=3)
    encoded = controlnet.controlnet_cond_embedding(hint)
    assert encoded.shape == (2, 32, *hint.shape[2:])
    assert torch.equal(encoded, torch.zeros_like(encoded))
    assert controlnet.controlnet_cond_embedding.conv_in.weight.shape[:2] == (24, hint.shape[1])


@torch.no_grad()
def test_a_context_of_zeros_is_the_null_context_in_any_length():
    unet = tiny_prior("vit")
    latents = noisy(unet)
    assert null_context(unet, 2).shape == (2, 1, 32)
    short = unet(latents, 300, null_context(unet, 2)).sample
    long = unet(latents, 300, torch.zeros(2, 17, 32)).sample
    assert (short - long).abs().max() <= 1e-6


def test_hint_and_context_hold_the_sources_in_order():
    generator = torch.Generator().manual_seed(0)
    latents, tokens = torch.randn(2, 2, 3, 4, 4, generator=generator), torch.randn(2, 2, 3, generator=generator)
    mean = {"hmi": [1.0, 2.0, 3.0], "aia171": [0.0, 0.5, 1.0]}
    std = {"hmi": [1.0, 2.0, 4.0], "aia171": [0.5, 1.0, 2.0]}
    hint, context = condition_on_sources(latents, tokens, ["hmi", "aia171"], mean, std)
    assert hint.shape == (2, 6, 4, 4)
    assert context.shape == (2, 2 * 17, 3)
    for source, name in enumerate(("hmi", "aia171")):
        for channel in range(3):
            shift, scale = mean[name][channel], std[name][channel]
            expected = (latents[:, source, channel] - shift) / scale
            torch.testing.assert_close(hint[:, 3 * source + channel], expected)
            torch.testing.assert_close(context[:, 17 * source + 1 : 17 * source + 17, channel], expected.flatten(1))
            torch.testing.assert_close(context[:, 17 * source, channel], (tokens[:, source, channel] - shift) / scale)
    restored = denormalise_latents(hint[:, 3:], "aia171", mean, std)
    torch.testing.assert_close(restored, latents[:, 1])
    with pytest.raises(ValueError, match="expected an entry for 'aia304'"):
        normalise_latents(latents[:, 0], "aia304", mean, std)
    with pytest.raises(ValueError, match="expected 3 numbers"):
        normalise_latents(latents[:, 0], "hmi", {"hmi": [0.0]}, std)
    with pytest.raises(ValueError, match=r"expected \(B, 1, z, h, w\) for hmi"):
        condition_on_sources(latents, tokens, ["hmi"], mean, std)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_all_schedulers_share_the_published_noise(prediction_type):
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    for name in ("ddpm", "ddim", "unipc", "dpm++"):
        scheduler = build_scheduler(name, prediction_type=prediction_type)
        np.testing.assert_allclose(scheduler.alphas_cumprod.numpy(), np.cumprod(1 - betas), rtol=1e-3)
        scheduler.set_timesteps(20)
        assert scheduler.timesteps[0] == 999  # from pure noise, as in training
        assert scheduler.config.prediction_type == prediction_type
        assert not scheduler.config.get("clip_sample")
        # diffusers' own way to another scheduler, whose default is to clip
        swapped = DDIMScheduler.from_config(scheduler.config)
        assert not swapped.config.clip_sample
        assert swapped.config.prediction_type == prediction_type
    with pytest.raises(ValueError, match="scheduler: expected one of"):
        build_scheduler("euler")
    with pytest.raises(ValueError, match="prediction_type: expected one of"):
        build_scheduler("ddim", prediction_type="sample")


@pytest.mark.parametrize("name", ["ddim", "unipc", "dpm++"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_schedulers_find_the_image_that_a_perfect_network_knows(name, prediction_type):
    truth = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(2))
    scheduler = build_scheduler(name, prediction_type=prediction_type)
    scheduler.set_timesteps(20)
    latents = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(3))
    for timestep in scheduler.timesteps:
        alpha = scheduler.alphas_cumprod[int(timestep)]
        noise = (latents - alpha.sqrt() * truth) / (1 - alpha).sqrt()
        output = noise if prediction_type == "epsilon" else alpha.sqrt() * noise - (1 - alpha).sqrt() * truth
        latents = scheduler.step(output, timestep, latents).prev_sample
    assert (latents - truth).abs().max() < 1e-2
