"""SolarChipModel and SolarChipForPreTraining: dispatch, missing data, sharing, loading, initialisation."""

import copy
import io
import logging
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import MODALITIES, tiny_batch, tiny_config
from transformers import AutoImageProcessor, AutoModel, AutoModelForPreTraining
from transformers.utils import logging as transformers_logging

from solarchip_hf import (
    MODALITY_NAMES,
    SolarChipConfig,
    SolarChipForPreTraining,
    SolarChipImageProcessor,
    SolarChipModel,
)
from solarchip_hf.models.geometry import SUPPORT_RADIUS, disk_fraction, disk_mask
from solarchip_hf.models.losses import contrastive_losses, kl_loss, make_pairs, reconstruction_loss

BACKBONES = ["vit", "cnn", "vae"]
SHARING = ["instrument", "modality", "shared"]
TERMS = ["cls_loss", "patch_loss", "intra_loss", "reconstruction_loss"]


def pretraining(backbone="vit", fields=None, seed=0, **config) -> SolarChipForPreTraining:
    torch.manual_seed(seed)
    return SolarChipForPreTraining(tiny_config(backbone, fields, **config))


def images(count=5, size=32, seed=3) -> torch.Tensor:
    return torch.randn(count, 1, size, size, generator=torch.Generator().manual_seed(seed))


class Warnings:
    """What transformers' logger says inside a `with` block."""

    def __enter__(self):
        self.stream = io.StringIO()
        self.handler = logging.StreamHandler(self.stream)
        transformers_logging.get_logger("transformers").addHandler(self.handler)
        return self

    def __exit__(self, *_):
        transformers_logging.get_logger("transformers").removeHandler(self.handler)

    @property
    def text(self) -> str:
        return self.stream.getvalue()


# --- SolarChipModel -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("sharing", SHARING)
@torch.no_grad()
def test_a_mixed_batch_equals_single_images(backbone, sharing):
    torch.manual_seed(0)
    model = SolarChipModel(tiny_config(backbone, weight_sharing=sharing)).eval()
    for index, name in enumerate(MODALITIES):  # as after training
        model.centering[name].mean.fill_(0.1 * (index + 1))
        model.centering[name].std.fill_(2.0 + index)
    pixel_values, ids = images(), [2, 0, 1, 0, 2]
    batch = model(pixel_values, torch.tensor(ids), output_hidden_states=True)
    hidden, tokens = model.config.hidden_size, batch.last_hidden_state.shape[1]
    side = 32 // model.config.patch_size
    assert batch.last_hidden_state.shape == (5, 1 + side**2, hidden)
    assert batch.contrastive_embeds.shape == (5, tokens, 16)
    assert batch.latents.shape == (5, hidden, side, side)
    assert (batch.latents_logvar is None) == (backbone != "vae")
    torch.testing.assert_close(batch.pooler_output, batch.last_hidden_state[:, 0])
    for row, index in enumerate(ids):
        single = model(pixel_values[row : row + 1], [index], output_hidden_states=True)
        for key, value in single.items():
            if key == "hidden_states":
                for one, other in zip(value, batch[key], strict=True):
                    torch.testing.assert_close(one, other[row : row + 1], atol=1e-5, rtol=1e-5)
            else:
                torch.testing.assert_close(value, batch[key][row : row + 1], atol=1e-5, rtol=1e-5)
    assert (batch.last_hidden_state[1] - batch.last_hidden_state[3]).abs().max() > 1e-3  # rows do differ


@torch.no_grad()
def test_attentions_in_the_order_of_the_batch():
    model = SolarChipModel(tiny_config()).eval()
    with pytest.raises(ValueError, match="expected attn_implementation='eager', got 'sdpa'"):
        model(images(2), [0, 1], output_attentions=True)
    fast = model(images(), [2, 0, 1, 0, 2])
    model.set_attn_implementation("eager")
    output = model(images(), [2, 0, 1, 0, 2], output_attentions=True)
    torch.testing.assert_close(fast.last_hidden_state, output.last_hidden_state, atol=1e-5, rtol=1e-5)
    assert [attention.shape for attention in output.attentions] == [(5, 2, 17, 17)] * 2
    single = model(images()[1:2], [0], output_attentions=True)
    torch.testing.assert_close(single.attentions[1], output.attentions[1][1:2])
    with pytest.raises(ValueError, match="expected a ViT backbone, got a CNN"):
        SolarChipModel(tiny_config("cnn"))(images(1), [0], output_attentions=True)


@pytest.mark.parametrize("backbone", BACKBONES)
@torch.no_grad()
def test_tuple_equals_dict(backbone):
    model = pretraining(backbone).eval()
    for call in (
        lambda **kwargs: model.solarchip(images(3), [0, 2, 1], **kwargs),
        lambda **kwargs: model(*tiny_batch(), **kwargs),
        lambda **kwargs: model(*tiny_batch(), return_loss=False, output_hidden_states=True, **kwargs),
    ):
        named, plain = call(), call(return_dict=False)
        assert isinstance(plain, tuple)
        assert len(plain) == len(named.to_tuple()) > 3
        for one, other in zip(plain, named.to_tuple(), strict=True):
            torch.testing.assert_close(one, other)
    assert next(iter(model(*tiny_batch()))) == "loss"


def test_ids_are_checked():
    model = SolarChipModel(tiny_config())
    for ids in (None, [0], [0, 3], [-1, 0], np.array([0, 3]), torch.tensor([[0], [1]])):
        with pytest.raises(ValueError, match=r"modality_ids: expected 2 numbers in 0\.\.2"):
            model(images(2), ids)
    listed, as_array = model(images(2), [2, 0]), model(images(2), np.array([2, 0]))
    assert torch.equal(as_array.last_hidden_state, listed.last_hidden_state)
    assert SolarChipModel(tiny_config(modalities=["171"]))(images(2)).pooler_output.shape == (2, 32)


def test_observations_given_to_the_encoders_alone_name_who_takes_them():
    config = tiny_config()
    processor = SolarChipImageProcessor(size=config.image_size, modalities=config.modalities)
    batch = processor({"hmi": np.ones((config.image_size, config.image_size))})
    with pytest.raises(ValueError, match="a list of images instead of mappings, or take SolarChipForPreTraining or"):
        SolarChipModel(config)(**batch)


def test_unknown_modalities_are_refused_by_the_model():
    config = tiny_config(modalities=["hmi", "aia9999"])
    with pytest.raises(ValueError, match=r"expected some of hmi, aia94.*got 'aia9999'"):
        SolarChipModel(config)


# --- the objective ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("pairing", ["anchor", "all"])
def test_forward_is_the_loss_functions_on_the_outputs(backbone, pairing):
    model = pretraining(backbone, pairing=pairing, anchor_modality="171", projection_centering="tokens").eval()
    pixel_values, observed = tiny_batch()
    output = model(pixel_values, observed)
    size = 32 // model.config.patch_size
    assert output.reconstruction.shape == (4, 3, 32, 32)
    assert output.contrastive_embeds.shape == output.projections.shape == (4, 3, 1 + size**2, 16)
    assert output.latents.shape == (4, 3, model.config.hidden_size, size, size)
    terms = contrastive_losses(
        output.projections,
        observed,
        torch.full((3,), math.log(1 / 0.07)),
        pairs=make_pairs(MODALITIES, "aia171", pairing),
        patch_mask=torch.from_numpy(disk_fraction(32, size) >= 0.25).flatten(),
        centering="tokens",
    )
    masks = torch.from_numpy(np.stack([disk_mask(32), *[disk_mask(32, SUPPORT_RADIUS)] * 2]))
    terms["reconstruction_loss"] = reconstruction_loss(output.reconstruction, pixel_values, observed, "l1", masks)
    weights = {"cls_loss": 0.05, "patch_loss": 0.001, "intra_loss": 0.0001, "reconstruction_loss": 1.0}
    if backbone == "vae":
        terms["kl_loss"] = kl_loss(output.latents_mean, output.latents_logvar, observed)
        weights["kl_loss"] = 0.1
    else:
        assert output.kl_loss is None
    for name, term in terms.items():
        assert term > 0
        torch.testing.assert_close(output[name], term)
    torch.testing.assert_close(output.loss, sum(weights[name] * term for name, term in terms.items()))


@torch.no_grad()
def test_published_behaviour_masks_nothing():
    published = {"min_disk_fraction": 0.0, "mask_reconstruction": False, "projection_centering": "none"}
    model = pretraining(**published, reconstruction_loss="l2").eval()
    pixel_values, observed = tiny_batch()
    output = model(pixel_values, observed)
    expected = contrastive_losses(output.projections, observed, model.logit_scales, pairs=[(0, 1), (0, 2)])
    for name, term in expected.items():
        torch.testing.assert_close(output[name], term)
    torch.testing.assert_close(
        output.reconstruction_loss, reconstruction_loss(output.reconstruction, pixel_values, observed, "l2")
    )


@pytest.mark.parametrize(("modality", "radius"), [("hmi", 1.0), ("171", SUPPORT_RADIUS)])
@torch.no_grad()
def test_only_pixels_that_the_geometry_keeps_are_reconstructed(modality, radius):
    model = pretraining(modalities=[modality]).eval()
    pixel_values, observed = torch.zeros(2, 1, 32, 32), torch.ones(2, 1, dtype=torch.bool)
    output = model(pixel_values, observed)
    inside = torch.from_numpy(disk_mask(32, radius))
    assert 0.2 < (~inside).double().mean() < 0.6

    def error(where):
        changed = torch.where(where, output.reconstruction + 3.0, output.reconstruction)
        return model.autoencoding_terms(output, changed, observed)["reconstruction_loss"].item()

    assert error(inside) == pytest.approx(3.0)  # the mean over kept pixels
    assert error(~inside) == 0.0


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("sharing", SHARING)
def test_missing_images_change_nothing_whatever_they_hold(backbone, sharing):
    """Neither a term nor any gradient depends on the pixels of missing images, NaN included, to the last bit."""
    model = pretraining(backbone, weight_sharing=sharing, projection_centering="tokens").train()
    pixel_values, observed = tiny_batch()
    assert not observed.all()
    results = []
    for filler in (0.0, 1e3, math.nan, math.inf):
        one = copy.deepcopy(model)
        inputs = torch.where(observed[:, :, None, None], pixel_values, filler).requires_grad_()
        torch.manual_seed(7)  # the VAE draws
        output = one(inputs, observed)
        output.loss.backward()
        assert inputs.grad[~observed].abs().max() == 0
        assert inputs.grad[observed].abs().amax(dim=(1, 2)).min() > 0
        results.append((output, dict(one.named_parameters()), dict(one.named_buffers())))
    reference, parameters, buffers = results[0]
    for output, other_parameters, other_buffers in results[1:]:
        for name in ["loss", *TERMS]:
            assert torch.equal(reference[name], output[name]), name
        for name, parameter in parameters.items():
            assert parameter.grad.isfinite().all(), name
            assert torch.equal(parameter.grad, other_parameters[name].grad), name
        for name, buffer in buffers.items():
            assert torch.equal(buffer, other_buffers[name]), name


def test_an_observation_without_its_missing_modality_equals_a_model_without_it():
    """All AIA 304 missing: the terms are those of a model of the other two with the same weights."""
    full = pretraining().eval()
    pixel_values, observed = tiny_batch()
    observed[:, 2] = False
    part = SolarChipForPreTraining(tiny_config(modalities=MODALITIES[:2])).eval()
    part.load_state_dict({key: full.state_dict()[key] for key in part.state_dict()})
    with torch.no_grad():
        one, other = full(pixel_values, observed), part(pixel_values[:, :2], observed[:, :2])
    for name in ["loss", *TERMS]:
        torch.testing.assert_close(one[name], other[name])


@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_tower_without_rows_gets_zero_gradients_and_not_none(backbone):
    model = pretraining(backbone, weight_sharing="modality").train()
    output = model.solarchip(images(2), [1, 1])
    reconstruction = model.decode(output.latents, [1, 1])
    (output.projections.square().mean() + output.last_hidden_state.std() + reconstruction.square().mean()).backward()
    for group in (model.solarchip.towers, model.decoders):
        for tower in group:
            largest = max(parameter.grad.abs().max() for parameter in group[tower].parameters())
            assert (largest > 0) == (tower == "aia171")


def test_every_parameter_gets_a_gradient():
    for backbone in BACKBONES:
        model = pretraining(backbone).train()
        model(*tiny_batch()).loss.backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0 or "k_proj.bias" in name or "to_k.bias" in name, name


def test_gradient_checkpointing_gives_the_same_gradients():
    for backbone in BACKBONES:
        plain = pretraining(backbone).train()
        checkpointed = copy.deepcopy(plain)
        checkpointed.activation_checkpointing_enable()
        for model in (plain, checkpointed):
            torch.manual_seed(5)
            model(*tiny_batch()).loss.backward()
        for (name, one), other in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
            torch.testing.assert_close(one.grad, other.grad, msg=name)


def test_one_modality_is_an_autoencoder_and_a_lost_anchor_is_told():
    model = pretraining(modalities=["171"])
    pixel_values, observed = tiny_batch(modalities=1)
    output = model(pixel_values, torch.ones_like(observed))
    assert [output[name].item() for name in TERMS[:3]] == [0, 0, 0]
    torch.testing.assert_close(output.loss, output.reconstruction_loss)
    output.loss.backward()
    with pytest.raises(ValueError, match="Set anchor_modality to one of them"):
        pretraining(modalities=["171", "304"])(*tiny_batch(modalities=2))


def test_observations_are_checked():
    model = pretraining()
    with pytest.raises(ValueError, match=r"expected \(B, 3, H, W\), one image a modality of hmi, aia171, aia304"):
        model(torch.zeros(2, 1, 32, 32))
    for call in (lambda: model(torch.zeros(0, 3, 32, 32)), lambda: model.decode(torch.zeros(0, 32, 4, 4), [])):
        with torch.no_grad(), pytest.raises(ValueError, match="expected at least one image"):
            call()
    pixel_values, observed = tiny_batch()
    with torch.no_grad():
        torch.testing.assert_close(
            model.eval()(pixel_values, observed.tolist()).loss, model(pixel_values, observed).loss
        )
    with pytest.raises(ValueError, match=r"observed: expected \(2, 3\), got \(2, 2\)"):
        model(torch.zeros(2, 3, 32, 32), torch.ones(2, 2, dtype=torch.bool))


def test_return_loss_and_accumulation_flags():
    model = pretraining().eval()
    output = model(*tiny_batch(), return_loss=False)
    assert output.loss is None
    assert output.cls_loss is None
    assert model.accepts_loss_kwargs is False
    ignored = model.config.keys_to_ignore_at_inference + ["loss"]  # as the Trainer does  # noqa: RUF005
    kept = {name for name in model(*tiny_batch()) if name not in ignored}
    assert kept == set(TERMS)  # scalars; nothing of the size of an image is stacked over an evaluation
    assert "logits" not in ignored


# --- encode, decode, the VAE ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backbone", BACKBONES)
@torch.no_grad()
def test_encode_and_decode_are_the_two_halves(backbone):
    model = pretraining(backbone).eval()
    pixel_values, observed = tiny_batch()
    output = model(pixel_values, torch.ones_like(observed))
    ids = [0, 1, 2] * 4
    latents = model.encode(pixel_values.flatten(0, 1)[:, None], ids)
    torch.testing.assert_close(latents.unflatten(0, (4, 3)), output.latents, atol=1e-5, rtol=1e-5)
    reconstruction = model.decode(latents, torch.tensor(ids))
    torch.testing.assert_close(reconstruction.reshape(4, 3, 32, 32), output.reconstruction, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_vae_samples_in_training_and_on_request():
    model = pretraining("vae").train()
    encoded = model.solarchip(images(1), [1])
    many = images(1).expand(400, -1, -1, -1)
    drawn = model.encode(many, [1] * 400, sample=True, generator=torch.Generator().manual_seed(0))
    deviation = (0.5 * encoded.latents_logvar[0]).exp()
    assert ((drawn.mean(0) - encoded.latents[0]) / deviation).abs().max() < 0.25  # five standard errors
    torch.testing.assert_close(drawn.std(0), deviation, atol=0, rtol=0.2)
    first, second = model(*tiny_batch()), model(*tiny_batch())
    assert not torch.equal(first.latents, second.latents)
    assert torch.equal(first.latents_mean, second.latents_mean)
    model.eval()
    assert torch.equal(model(*tiny_batch()).latents, first.latents_mean)


# --- centring ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("centering", ["none", "class", "tokens"])
@torch.no_grad()
def test_running_statistics_follow_the_batches_and_serve_inference(centering, tmp_path):
    model = pretraining(projection_centering=centering, centering_momentum=0.25)
    pixel_values, observed = tiny_batch(8)
    model.eval()
    fresh = model(pixel_values, observed)
    torch.testing.assert_close(fresh.contrastive_embeds, fresh.projections)  # statistics of nothing change nothing
    model.train()
    for _ in range(3):
        model(pixel_values, observed)
    model.eval()
    output = model(pixel_values, observed)
    if centering == "none":
        assert len(model.solarchip.centering) == 0
        assert torch.equal(output.contrastive_embeds, output.projections)
        return
    columns = slice(0, 1) if centering == "class" else slice(None)
    for index, name in enumerate(MODALITIES):
        assert model.solarchip.centering[name].num_updates == 3
        seen = output.contrastive_embeds[observed[:, index], index]
        centred = seen[:, columns]
        torch.testing.assert_close(centred.mean(0), torch.zeros_like(centred[0]), atol=1e-3, rtol=0)
        torch.testing.assert_close(centred.std(0, unbiased=False), torch.ones_like(centred[0]), atol=2e-2, rtol=0)
        if centering == "class":
            torch.testing.assert_close(seen[:, 1:], output.projections[observed[:, index], index, 1:])
    model.save_pretrained(tmp_path)
    again = SolarChipForPreTraining.from_pretrained(tmp_path).eval()
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(dict(again.named_buffers())[name], buffer)
    torch.testing.assert_close(again(pixel_values, observed).contrastive_embeds, output.contrastive_embeds)


@torch.no_grad()
def test_running_statistics_average_first_and_forget_later():
    model = pretraining(centering_momentum=0.4).solarchip
    values = [1.0, 2.0, 6.0]
    projections = torch.stack([torch.full((2, 3, 17, 16), value) for value in values])
    observed = torch.ones(2, 3, dtype=torch.bool)
    observed[:, 2] = False
    means = []
    for batch in projections:
        model.update_centering(batch, observed)
        means.append(model.centering["hmi"].mean[0, 0].item())
    # weights 1, 1/2, then never less than the momentum
    assert means == pytest.approx([1.0, 1.5, 1.5 + 0.4 * 4.5])
    assert model.centering["aia304"].num_updates == 0
    assert (model.centering["aia304"].std == 1).all()
    single = torch.ones(1, 3, 17, 16)
    model.update_centering(single, torch.ones(1, 3, dtype=torch.bool))  # one image has no deviation
    assert model.centering["hmi"].num_updates == 3


@torch.no_grad()
def test_running_statistics_of_tokens_at_another_size():
    model = pretraining(projection_centering="tokens")
    model.train()
    model(*tiny_batch())
    model.eval()
    larger = model.solarchip(images(2, size=64), [0, 1])
    mean, std = model.solarchip.centering["hmi"].statistics(65)
    assert mean.shape == std.shape == (65, 16)
    torch.testing.assert_close(larger.contrastive_embeds[0], (larger.projections[0] - mean) / std)
    torch.testing.assert_close(mean[0], model.solarchip.centering["hmi"].mean[0])
    # training at another size moves the same table, by statistics resized to its grid
    before = model.solarchip.centering["hmi"].mean.clone()
    model.train()
    pixel_values, observed = tiny_batch(size=64)
    batch_mean = model(pixel_values, observed).projections[observed[:, 0], 0].mean(0)  # (65, 16)
    pooled = batch_mean[1:].T.reshape(16, 4, 2, 4, 2).mean((2, 4)).flatten(1).T  # bilinear halving is the mean of 2 x 2
    expected = (before + torch.cat([batch_mean[:1], pooled])) / 2  # the second update has half the weight
    torch.testing.assert_close(model.solarchip.centering["hmi"].mean, expected)


# --- sharing, subsets, saving and loading -----------------------------------------------------------------------------


def test_weight_sharing_by_its_parameter_counts():
    def count(sharing, embedding=True, **fields):
        config = tiny_config(weight_sharing=sharing, use_modality_embedding=embedding, **fields)
        return sum(parameter.numel() for parameter in SolarChipForPreTraining(config).parameters())

    alone = count("modality", modalities=["171"]) - 3  # without the logit scales
    assert count("modality") == 3 * alone + 3
    assert count("instrument", embedding=False) == 2 * alone + 3
    assert count("shared", embedding=False) == alone + 3
    vector = 32 + 32  # in the encoder and in the decoder
    assert count("instrument") == count("instrument", embedding=False) + 2 * vector
    assert count("shared") == count("shared", embedding=False) + 3 * vector


@pytest.mark.parametrize("backbone", BACKBONES)
@torch.no_grad()
def test_save_and_load(backbone, tmp_path):
    model = pretraining(backbone).train()
    model(*tiny_batch())
    model.eval().save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    with Warnings() as warnings:
        again, info = AutoModelForPreTraining.from_pretrained(tmp_path, output_loading_info=True)
        features, features_info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert warnings.text == ""
    for report in (info, features_info):
        assert not any(report.values())
    assert type(again) is SolarChipForPreTraining
    assert type(features) is SolarChipModel
    torch.testing.assert_close(again(*tiny_batch()).loss, model(*tiny_batch()).loss)
    one, other = features(images(2), [0, 2]), model.solarchip(images(2), [0, 2])
    torch.testing.assert_close(one.contrastive_embeds, other.contrastive_embeds, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("sharing", SHARING)
@pytest.mark.parametrize("centering", ["class", "tokens"])
@torch.no_grad()
def test_loading_a_subset_of_modalities(sharing, centering, tmp_path):
    model = pretraining(weight_sharing=sharing, projection_centering=centering).train()
    model(*tiny_batch())
    model.eval().save_pretrained(tmp_path)
    full = model.solarchip(images(4), [0, 1, 2, 2])
    for modalities, ids, rows in ((["hmi"], [0], [0]), (["304"], [0, 0], [2, 3]), (["304", "hmi"], [1, 0], [0, 2])):
        for auto in (AutoModel, AutoModelForPreTraining):
            with Warnings() as warnings:
                part, info = auto.from_pretrained(tmp_path, modalities=modalities, output_loading_info=True)
            assert warnings.text == ""
            assert not any(info.values())
            backbone = part.base_model
            assert sum(p.numel() for p in part.parameters()) < sum(p.numel() for p in model.parameters())
            output = backbone(images(4)[rows], ids)
            for key, value in output.items():
                torch.testing.assert_close(value, full[key][rows], atol=1e-5, rtol=1e-5)
    wanted = {"instrument": ["aia"], "modality": ["aia304"], "shared": ["shared"]}[sharing]
    part = SolarChipModel.from_pretrained(tmp_path, modalities=["304"])
    assert list(part.towers) == wanted
    assert list(part.centering) == ["aia304"]
    assert part.config.modalities == ["aia304"]
    # a subset saves and loads as a checkpoint of its own
    part.save_pretrained(tmp_path / "part")
    alone = AutoModel.from_pretrained(tmp_path / "part")
    torch.testing.assert_close(alone(images(1)).last_hidden_state, part(images(1)).last_hidden_state)
    with pytest.raises(ValueError, match="what the checkpoint holds"):
        AutoModel.from_pretrained(tmp_path, modalities=["94"])


def test_towers_of_another_weight_sharing_are_foreign(tmp_path):
    pretraining(weight_sharing="modality").save_pretrained(tmp_path)
    config = tiny_config(weight_sharing="instrument")
    _, info = SolarChipForPreTraining.from_pretrained(tmp_path, config=config, output_loading_info=True)
    assert any(".towers.aia171." in key for key in info["unexpected_keys"])
    assert any(".towers.aia." in key for key in info["missing_keys"])


def test_foreign_keys_are_still_reported(tmp_path):
    pretraining().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    foreign = {"solarchip.towers.mdi.bias", "solarchip.extra.weight", "solarchip.towers.hmi.extra"}
    save_file(weights | {key: torch.zeros(1) for key in foreign}, tmp_path / "model.safetensors", {"format": "pt"})
    for cls in (SolarChipForPreTraining, SolarChipModel):
        with Warnings() as warnings:
            _, info = cls.from_pretrained(tmp_path, modalities=["171"], output_loading_info=True)
        # the tower of HMI is known and not wanted, whatever it holds
        unexpected = {key.removeprefix("solarchip.") for key in info["unexpected_keys"]}
        assert unexpected == {"towers.mdi.bias", "extra.weight"}
        assert "towers.mdi.bias" in warnings.text


@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_missing_key_comes_back_initialised(backbone, tmp_path):
    """From a checkpoint that holds next to nothing, every weight has its scheme's scale: none is leftover memory."""
    reference = pretraining(backbone, projection_centering="tokens", seed=11)
    reference.save_pretrained(tmp_path)
    save_file({"logit_scales": torch.zeros(3)}, tmp_path / "model.safetensors", {"format": "pt"})
    model, info = SolarChipForPreTraining.from_pretrained(tmp_path, output_loading_info=True)
    assert len(info["missing_keys"]) == len(reference.state_dict()) - 1
    assert torch.equal(model.logit_scales, torch.zeros(3))
    found, once, again = (
        {name: value.detach().double() for name, value in (*one.named_parameters(), *one.named_buffers())}
        for one in (model, reference, pretraining(backbone, projection_centering="tokens", seed=12))
    )
    drawn = [name for name in once if name != "logit_scales" and not torch.equal(once[name], again[name])]
    for name in once.keys() - {"logit_scales", *drawn}:
        assert torch.equal(found[name], once[name]), name
    assert len(drawn) > 30
    for name in drawn:
        spread = torch.stack([once[name], again[name]]).square().mean().sqrt()
        ratio = found[name].square().mean().sqrt() / spread
        assert not torch.equal(found[name], once[name]), name
        assert ratio == pytest.approx(1, abs=0.05 + 4 / math.sqrt(once[name].numel())), name
    weights = load_file(tmp_path / "model.safetensors")
    assert list(weights) == ["logit_scales"]
    reference.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["logit_scales"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    scales = SolarChipForPreTraining.from_pretrained(tmp_path).logit_scales
    torch.testing.assert_close(scales.detach(), torch.full((3,), math.log(1 / 0.07)))


@torch.no_grad()
def test_buffers_that_are_not_saved_are_right_after_a_reload(tmp_path):
    model = pretraining().eval()
    model.save_pretrained(tmp_path)
    again = SolarChipForPreTraining.from_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    transient = {name: buffer for name, buffer in model.named_buffers() if name not in saved}
    assert transient  # CLIP's position ids
    for name, buffer in transient.items():
        assert torch.equal(dict(again.named_buffers())[name], buffer), name


@torch.no_grad()
def test_half_precision_keeps_the_statistics_in_full(tmp_path):
    model = pretraining().train()
    model(*tiny_batch())
    model.save_pretrained(tmp_path)
    half = SolarChipModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.towers["hmi"].projection.weight.dtype == torch.bfloat16
    assert half.centering["hmi"].mean.dtype == torch.float32
    output = half(images(2).bfloat16(), [0, 1])
    assert output.contrastive_embeds.dtype == torch.bfloat16
    exact = model.eval().solarchip(images(2), [0, 1])
    torch.testing.assert_close(output.last_hidden_state.float(), exact.last_hidden_state, atol=0.15, rtol=0.1)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_autocast_to_half_precision(backbone):
    model = pretraining(backbone).train()
    exact = copy.deepcopy(model)
    torch.manual_seed(2)
    expected = exact(*tiny_batch())
    torch.manual_seed(2)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(*tiny_batch())
    assert output.loss.dtype == torch.float32
    assert output.loss.item() == pytest.approx(expected.loss.item(), rel=0.03)
    for module, result in ((model, output), (exact, expected)):
        result.loss.backward()
        assert all(parameter.grad.isfinite().all() for parameter in module.parameters())
    ours, theirs = (torch.cat([p.grad.flatten() for p in one.parameters()]) for one in (model, exact))
    assert torch.cosine_similarity(ours, theirs, dim=0) > 0.9  # the sign in L1 flips where bfloat16 rounds


def test_dispatch_goes_by_model_type():
    """A configuration of another copy of the same code (as the Hub's remote code makes) builds the same towers."""
    config = tiny_config("cnn")

    class Foreign(type(config.backbone_config)):
        pass

    config.backbone_config = Foreign(**config.backbone_config.to_dict())
    assert SolarChipModel(config).towers["hmi"].config.model_type == "solarchip_cnn"


# --- the promise of the front page ------------------------------------------------------------------------------------


@torch.no_grad()
def test_two_lines_load_a_folder_named_as_a_repository(tmp_path, monkeypatch, sdo_folder):
    monkeypatch.chdir(tmp_path)
    model = pretraining(fields={"image_size": 64, "patch_size": 16})
    model.save_pretrained("solarchip/vit-base")
    SolarChipImageProcessor(modalities=MODALITIES, size=64).save_pretrained("solarchip/vit-base")
    processor = AutoImageProcessor.from_pretrained("solarchip/vit-base")
    features = AutoModel.from_pretrained("solarchip/vit-base")
    inputs = processor([sdo_folder / "AIAsynoptic0304.fits", sdo_folder / "AIAsynoptic0171.fits"], return_tensors="pt")
    assert inputs["modality_ids"].tolist() == [2, 1]
    output = features(**inputs)
    assert output.last_hidden_state.shape == (2, 17, 32)
    assert output.last_hidden_state.isfinite().all()


@torch.no_grad()
def test_the_published_size_gives_the_promised_shapes_for_real_files(sdo_folder):
    config = SolarChipConfig.from_name("vit-base")
    processor = SolarChipImageProcessor(modalities=config.modalities)
    inputs = processor([sdo_folder / "AIAsynoptic0171.fits", sdo_folder / "AIAsynoptic1700.fits"], return_tensors="pt")
    config.modalities = [name for name in MODALITY_NAMES if name != "hmi"]  # one tower: half of the memory and time
    model = AutoModel.from_config(config).eval()
    output = model(inputs["pixel_values"], inputs["modality_ids"] - 1)
    assert output.last_hidden_state.shape == (2, 257, 768)
    assert output.pooler_output.shape == (2, 768)
    assert output.contrastive_embeds.shape == (2, 257, 768)
    assert output.latents.shape == (2, 768, 16, 16)
    assert output.last_hidden_state.isfinite().all()
