"""The CNN tower and its decoder: autoencoder and VAE, against diffusers' own, recording, checkpointing, scales."""

import copy

import pytest
import torch
from diffusers import AutoencoderKL
from tiny_models import CNN

from solarchip_hf import SolarChipCNNConfig, SolarChipCNNDecoder, SolarChipCNNModel, SolarChipConfig

IMAGES = torch.randn(3, 1, 32, 32, generator=torch.Generator().manual_seed(1))
IDS = torch.tensor([0, 1, 1])


def config_of(**fields) -> SolarChipCNNConfig:
    values = {key: value for key, value in CNN.items() if key != "model_type"}
    return SolarChipCNNConfig(**{**values, **fields})


def tower(modalities=("aia171", "aia304"), projection_dim=16, **fields) -> SolarChipCNNModel:
    torch.manual_seed(0)
    return SolarChipCNNModel._from_config(config_of(**fields), modalities=modalities, projection_dim=projection_dim)


def decoder(modalities=None, **fields) -> SolarChipCNNDecoder:
    torch.manual_seed(0)
    return SolarChipCNNDecoder._from_config(config_of(**fields), modalities=modalities)


@torch.no_grad()
def test_shapes_and_what_they_are_made_of():
    model = tower().eval()
    output = model(IMAGES, IDS)
    assert output.latents.shape == (3, 8, 8, 8)
    assert output.last_hidden_state.shape == (3, 65, 8)
    assert output.projections.shape == (3, 65, 16)
    assert output.latents_logvar is None
    torch.testing.assert_close(output.last_hidden_state[:, 1 + 8 * 2 + 5], output.latents[:, :, 2, 5])
    pooled = model.class_projection(output.latents.mean(dim=(2, 3)))
    torch.testing.assert_close(output.last_hidden_state[:, 0], pooled)
    assert decoder()(output.latents).shape == (3, 1, 32, 32)
    assert model(torch.zeros(1, 1, 64, 64), IDS[:1]).latents.shape == (1, 8, 16, 16)


@torch.no_grad()
def test_vae_is_diffusers_autoencoder_kl():
    """Encoder, moments, decoder and the convolutions between them compute what diffusers' own model computes."""
    ours, back = tower(modalities=None, double_z=True).eval(), decoder(double_z=True).eval()
    blocks = len(CNN["block_out_channels"])
    theirs = AutoencoderKL(
        in_channels=1,
        out_channels=1,
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        block_out_channels=tuple(CNN["block_out_channels"]),
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=4,
    ).eval()
    theirs.encoder.load_state_dict(ours.encoder.state_dict())
    theirs.quant_conv.load_state_dict(ours.quant_conv.state_dict())
    theirs.decoder.load_state_dict(back.decoder.state_dict())
    theirs.post_quant_conv.load_state_dict(back.post_quant_conv.state_dict())
    output, posterior = ours(IMAGES), theirs.encode(IMAGES).latent_dist
    torch.testing.assert_close(output.latents, posterior.mean)
    torch.testing.assert_close(output.latents_logvar, posterior.logvar)
    torch.testing.assert_close(back(output.latents), theirs.decode(posterior.mean).sample)


@torch.no_grad()
def test_modality_vectors_tell_modalities_apart():
    model, back = tower().eval(), decoder(modalities=("aia171", "aia304")).eval()
    first, second = model(IMAGES[:1].expand(2, -1, -1, -1), torch.tensor([0, 1])).latents
    assert (first - second).abs().max() > 1e-4
    first, second = back(first.expand(2, -1, -1, -1), torch.tensor([0, 1]))
    assert (first - second).abs().max() > 1e-4


@torch.no_grad()
def test_hidden_states():
    output = tower().eval()(IMAGES, IDS, output_hidden_states=True)
    shapes = [tuple(state.shape[1:]) for state in output.hidden_states]
    assert shapes == [(8, 32, 32), (8, 16, 16), (8, 8, 8), (16, 8, 8), (16, 8, 8)]
    assert tower().eval()(IMAGES, IDS).hidden_states is None


@pytest.mark.parametrize("shape", [(1, 1, 32, 36), (1, 1, 30, 30), (1, 2, 32, 32)])
def test_wrong_shapes_are_refused(shape):
    with pytest.raises(ValueError, match=r"expected \(N, 1, H, H\) with H a multiple of 4"):
        tower()(torch.zeros(shape), torch.zeros(1, dtype=torch.long))


def test_gradient_checkpointing_changes_nothing_else():
    pairs = []
    for plain, inputs in ((tower(), (IMAGES, IDS)), (decoder(), (torch.randn(2, 8, 8, 8),))):
        checkpointed = copy.deepcopy(plain)
        checkpointed.activation_checkpointing_enable()
        calls = []
        checkpointed.get_submodule("encoder.mid_block" if hasattr(plain, "encoder") else "decoder.mid_block").resnets[
            0
        ].register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        for model in (plain.train(), checkpointed.train()):
            output = model(*inputs)
            (output if isinstance(output, torch.Tensor) else output.projections).square().mean().backward()
        assert len(calls) == 2  # once forward, once again in the backward
        pairs.extend(zip(plain.named_parameters(), checkpointed.parameters(), strict=True))
    for (name, one), other in pairs:
        assert one.grad is not None, name
        torch.testing.assert_close(one.grad, other.grad)


@torch.no_grad()
def test_initialisation_keeps_the_signal_alive():
    """With transformers' general scheme the published network would give latents that are nearly constant."""
    config = SolarChipConfig.from_name("cnn-base").backbone_config
    torch.manual_seed(0)
    model = SolarChipCNNModel._from_config(config, projection_dim=32).eval()
    images = torch.randn(2, 1, 128, 128)
    latents = model(images).latents
    assert latents.shape == (2, 32, 4, 4)
    assert 0.05 < latents.std() < 2
    convolution = model.encoder.down_blocks[1].resnets[0].conv1.weight
    assert convolution.std().item() == pytest.approx((3 * 32 * 9) ** -0.5, rel=0.02)
    assert model.projection.weight.std().item() == pytest.approx(32**-0.5, rel=0.1)
    norm = model.encoder.conv_norm_out
    assert torch.equal(norm.weight, torch.ones_like(norm.weight))
    assert torch.equal(norm.bias, torch.zeros_like(norm.bias))
