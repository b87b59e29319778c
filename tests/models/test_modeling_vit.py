"""The ViT tower and its decoder: tokens, layouts, positions, recording, checkpointing, initialisation."""

import copy

import pytest
import torch
from tiny_models import VIT

from solarchip_hf import SolarChipViTConfig, SolarChipViTDecoder, SolarChipViTModel


def config_of(**fields) -> SolarChipViTConfig:
    values = {key: value for key, value in VIT.items() if key != "model_type"}
    return SolarChipViTConfig(**{**values, **fields})


def tower(modalities=("aia171", "aia304"), projection_dim=16, **fields) -> SolarChipViTModel:
    torch.manual_seed(0)
    return SolarChipViTModel._from_config(config_of(**fields), modalities=modalities, projection_dim=projection_dim)


def decoder(modalities=None, **fields) -> SolarChipViTDecoder:
    torch.manual_seed(0)
    config = config_of(**fields)
    return SolarChipViTDecoder._from_config(
        config.decoder_config(), latent_channels=config.hidden_size, modalities=modalities
    )


IMAGES = torch.randn(3, 1, 32, 32, generator=torch.Generator().manual_seed(1))
IDS = torch.tensor([0, 1, 1])


@torch.no_grad()
def test_shapes_and_what_they_are_made_of():
    model = tower().eval()
    output = model(IMAGES, IDS)
    assert output.last_hidden_state.shape == (3, 17, 32)
    assert output.projections.shape == (3, 17, 16)
    assert output.latents.shape == (3, 32, 4, 4)
    assert output.latents_logvar is None
    assert output.hidden_states is None
    torch.testing.assert_close(output.projections, output.last_hidden_state @ model.projection.weight.T)
    # latents are the patch tokens, row by row
    torch.testing.assert_close(output.latents[:, :, 1, 2], output.last_hidden_state[:, 1 + 4 + 2])
    # the last layer norm acts on all tokens: without its affine part each has mean 0 and variance 1
    torch.testing.assert_close(output.last_hidden_state.mean(-1), torch.zeros(3, 17), atol=1e-5, rtol=0)
    torch.testing.assert_close(output.last_hidden_state.var(-1, unbiased=False), torch.ones(3, 17), atol=1e-3, rtol=0)


@torch.no_grad()
def test_agrees_with_clip_where_clip_has_the_same():
    """The class token of the tower without modality vectors is CLIP's pooled output."""
    model = tower(modalities=None).eval()
    ours = model(IMAGES).last_hidden_state[:, 0]
    torch.testing.assert_close(ours, model.encoder(IMAGES).pooler_output)


@torch.no_grad()
def test_modality_vectors_tell_modalities_apart():
    model = tower().eval()
    same = IMAGES[:1].expand(2, -1, -1, -1)
    first, second = model(same, torch.tensor([0, 1])).last_hidden_state
    assert (first - second).abs().max() > 1e-3
    model.modality_embedding.aia304.copy_(model.modality_embedding.aia171)
    first, second = model(same, torch.tensor([0, 1])).last_hidden_state
    torch.testing.assert_close(first, second)


@torch.no_grad()
def test_other_sizes_interpolate_the_positions():
    model = tower(modalities=None).eval()
    larger = model(torch.randn(1, 1, 48, 48))
    assert larger.last_hidden_state.shape == (1, 37, 32)
    assert larger.latents.shape == (1, 32, 6, 6)
    assert larger.last_hidden_state.isfinite().all()
    # with equal rows in the table, interpolation changes nothing: a constant image gives equal patch tokens
    model.encoder.embeddings.position_embedding.weight[1:] = 0.3
    tokens = model(torch.ones(1, 1, 48, 48)).last_hidden_state[0, 1:]
    torch.testing.assert_close(tokens, tokens[:1].expand_as(tokens), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("shape", [(1, 1, 32, 40), (1, 1, 30, 30), (1, 3, 32, 32), (1, 32, 32), (0, 1, 32, 32)])
def test_wrong_shapes_are_refused(shape):
    with pytest.raises(ValueError, match=r"expected \(N, 1, H, H\) with H a multiple of 8"):
        tower()(torch.zeros(shape), torch.zeros(1, dtype=torch.long))


@torch.no_grad()
def test_unpatchify_puts_each_token_where_its_patch_lies():
    model = decoder().eval()
    latents = torch.randn(1, 32, 4, 4)
    image = model(latents)
    assert image.shape == (1, 1, 32, 32)
    # without attention between tokens, a change of one latent pixel changes exactly its own patch
    model.transformer.layers = torch.nn.ModuleList()
    image, changed = model(latents), latents.clone()
    changed[0, :, 1, 2] += 1
    where = (model(changed) - image).abs()[0, 0] > 0
    assert where[8:16, 16:24].any()
    where[8:16, 16:24] = False
    assert not where.any()


@torch.no_grad()
def test_raster_layout_is_a_plain_reshape():
    patch, raster = decoder(), decoder(decoder_layout="raster")
    raster.load_state_dict(patch.state_dict())
    pixels = {}
    patch.output_projection.register_forward_hook(lambda module, args, output: pixels.update(tokens=output))
    latents = torch.randn(2, 32, 4, 4)
    patched = patch(latents)
    torch.testing.assert_close(raster(latents), pixels["tokens"].reshape(2, 1, 32, 32))
    token = pixels["tokens"][1, 4 * 3 + 1].reshape(8, 8)
    torch.testing.assert_close(patched[1, 0, 24:32, 8:16], token)


@torch.no_grad()
def test_decoder_sizes_positions_and_modalities():
    model = decoder(
        modalities=("aia171", "aia304"),
        decoder_hidden_size=16,
        decoder_num_hidden_layers=3,
        decoder_num_attention_heads=4,
        decoder_position_embedding=True,
    )
    assert len(model.transformer.layers) == 3
    assert model.transformer.layers[0].mlp.fc1.out_features == 64
    assert model(torch.randn(2, 32, 6, 6), torch.tensor([0, 1])).shape == (2, 1, 48, 48)
    flat = torch.ones(1, 32, 4, 4)
    patches = model(flat, torch.tensor([0])).unfold(2, 8, 8).unfold(3, 8, 8).reshape(16, -1)
    assert torch.cdist(patches, patches).fill_diagonal_(1).min() > 1e-4  # equal latents, told apart by position
    plain = decoder()(flat).unfold(2, 8, 8).unfold(3, 8, 8).reshape(16, -1)
    torch.testing.assert_close(plain, plain[:1].expand_as(plain))


@torch.no_grad()
def test_hidden_states_and_attentions():
    model = tower().eval()
    model.set_attn_implementation("eager")
    output = model(IMAGES, IDS, output_hidden_states=True, output_attentions=True)
    assert [state.shape for state in output.hidden_states] == [(3, 17, 32)] * 3
    assert [map_.shape for map_ in output.attentions] == [(3, 2, 17, 17)] * 2
    torch.testing.assert_close(output.attentions[0].sum(-1), torch.ones(3, 2, 17))
    last = model.encoder.post_layernorm(output.hidden_states[-1])
    torch.testing.assert_close(last, output.last_hidden_state)
    assert model(IMAGES, IDS).hidden_states is None


@torch.no_grad()
def test_eager_equals_sdpa():
    model = tower().eval()
    assert model.config._attn_implementation == "sdpa"
    assert model.encoder.config._attn_implementation == "sdpa"
    fast = model(IMAGES, IDS).last_hidden_state
    model.set_attn_implementation("eager")
    assert model.encoder.encoder.layers[0].self_attn.config._attn_implementation == "eager"
    torch.testing.assert_close(model(IMAGES, IDS).last_hidden_state, fast)


def test_gradient_checkpointing_changes_memory_and_nothing_else():
    plain = tower().train()
    checkpointed = copy.deepcopy(plain)
    checkpointed.activation_checkpointing_enable()
    calls = []
    first = checkpointed.encoder.encoder.layers[0].mlp
    first.register_forward_pre_hook(lambda *_: calls.append(1))
    for model in (plain, checkpointed):
        model(IMAGES, IDS).projections.square().mean().backward()
    assert len(calls) == 2  # once forward, once again in the backward
    for (name, one), other in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        assert one.grad.abs().max() > 0 or "k_proj.bias" in name, name  # a softmax ignores a shift of all keys
        torch.testing.assert_close(one.grad, other.grad)


def test_initial_scales():
    torch.manual_seed(0)
    config = config_of(hidden_size=256, num_attention_heads=4, intermediate_size=1024)
    model = SolarChipViTModel._from_config(config, modalities=("hmi", "aia171"), projection_dim=256)
    assert model.projection.weight.std().item() == pytest.approx(256**-0.5, rel=0.02)  # N(0, 1/hidden)
    assert model.modality_embedding.hmi.std().item() == pytest.approx(0.02, rel=0.2)
    assert not torch.equal(model.modality_embedding.hmi, model.modality_embedding.aia171)
    decoder_model = SolarChipViTDecoder._from_config(config.decoder_config(), latent_channels=256)
    for transformer in (model.encoder.encoder, decoder_model.transformer):
        attention = transformer.layers[0].self_attn
        depth = len(transformer.layers)
        assert attention.out_proj.weight.std().item() == pytest.approx(256**-0.5, rel=0.02)
        assert attention.q_proj.weight.std().item() == pytest.approx((256 * 2 * depth) ** -0.5, rel=0.02)
