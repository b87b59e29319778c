"""Integrated gradients: completeness, the baseline without structure, and a planted region that is found."""

import numpy as np
import pytest
import torch

from solarchip_hf import SolarChipConfig, SolarChipForImageClassification
from solarchip_hf.hub.attribution import FlareAttribution, integrated_gradients, structureless
from solarchip_hf.models.calibration import exceedance_logits
from solarchip_hf.models.image_inputs import image_from_array


def tiny_model(**fields) -> SolarChipForImageClassification:
    torch.manual_seed(0)
    tower = {"image_size": 32, "patch_size": 8, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    names = {"modalities": ["hmi"], "projection_dim": 16, "classifier_hidden_size": 16}
    return SolarChipForImageClassification(SolarChipConfig.from_name("vit-tiny", **tower, **{**names, **fields}))


def score(model, images, observed, boundary=0):
    with torch.no_grad():
        return exceedance_logits(model(pixel_values=images, observed=observed).logits)[:, boundary].item()


def test_the_baseline_keeps_rings_and_forgets_what_stands_out():
    offset = np.arange(32) - 15.5
    radius = np.hypot(offset[:, None], offset[None, :])
    disk = torch.from_numpy(np.where(radius < 13, 2.0 - radius / 13, 0.0))[None].float()
    active = disk.clone()
    active[0, 10:14, 18:22] += 5.0
    torch.testing.assert_close(structureless(active), structureless(disk), atol=0.02, rtol=0)
    assert (structureless(disk) - disk).abs().max() < 0.1  # within a ring of one pixel
    assert structureless(active).dtype == active.dtype


@pytest.mark.parametrize("fields", [{}, {"ordinal": True}, {"classifier_head": "linear"}])
def test_attributions_add_up_to_the_difference(fields):
    model = tiny_model(modalities=["hmi", "aia171"], **fields).eval()
    with torch.no_grad():
        for name, parameter in model.classifier.named_parameters():
            if "score" in name or "gate" in name or "output" in name:
                parameter.copy_(torch.randn(parameter.shape))
    images = 2 * torch.randn(1, 2, 32, 32)
    observed = torch.tensor([[True, False]])
    before = [parameter.grad for parameter in model.parameters()]
    values, end, start = integrated_gradients(model, images, observed, 1, steps=48)
    assert end == pytest.approx(score(model, images, observed, 1), abs=1e-5)
    assert start == pytest.approx(score(model, structureless(images), observed, 1), abs=1e-5)
    assert abs(end - start) > 1e-2
    assert values.sum().item() == pytest.approx(end - start, rel=0.02)
    assert values[1].abs().max() == 0  # not observed
    assert all(one is other for one, other in zip(before, [p.grad for p in model.parameters()], strict=True))


def test_more_points_and_other_batches_change_little():
    model = tiny_model().eval()
    with torch.no_grad():
        model.classifier.output.weight.copy_(torch.randn(4, 16))
    images, observed = 2 * torch.randn(1, 1, 32, 32), torch.ones(1, 1, dtype=torch.bool)
    values, *_ = integrated_gradients(model, images, observed, 0, steps=32, batch_size=5)
    again, *_ = integrated_gradients(model, images, observed, 0, steps=64, batch_size=64)
    assert (values - again).abs().max() < 0.02 * again.abs().max()


def test_a_planted_region_is_found():
    """A network that has learnt to look for a bright patch points at it, and not at an equal image without it."""
    model = tiny_model(num_labels=2).train()
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)

    def draw(count, labels):
        images = 0.3 * torch.randn(count, 1, 32, 32, generator=generator)
        places = torch.randint(8, 20, (count, 2), generator=generator)
        for image, (row, column), label in zip(images, places.tolist(), labels.tolist(), strict=True):
            image[0, row : row + 5, column : column + 5] += 2.0 * label
        return images, places

    for _ in range(60):
        labels = torch.randint(0, 2, (32,), generator=generator)
        optimizer.zero_grad()
        model(draw(32, labels)[0], labels=labels).loss.backward()
        optimizer.step()
    model.eval()
    images, places = draw(6, torch.ones(6, dtype=torch.long))
    observed = torch.ones(1, 1, dtype=torch.bool)
    shares = []
    for image, (row, column) in zip(images, places.tolist(), strict=True):
        values, end, start = integrated_gradients(model, image[None], observed, 0, steps=16)
        assert end > start  # the patch speaks for the event
        shares.append(values[0, row : row + 5, column : column + 5].sum().item() / (end - start))
    assert np.mean(shares) > 0.5  # on 25 of 1024 pixels


def test_peaks_lie_where_the_map_is_large():
    values = np.zeros((64, 64), dtype=np.float32)
    values[40, 12], values[10, 50], values[12, 50] = 3.0, 1.0, 1.0
    values[30, 30] = -9.0
    facts = image_from_array(np.zeros((64, 64)), "hmi", "G", "rsun")
    attribution = FlareAttribution("m_plus", {"hmi": values}, {"hmi": values}, {"hmi": facts}, 1.0, 6.0)
    first, second = attribution.peaks("hmi", count=2)
    scale = facts.cdelt[0]
    assert first["log_odds"] == pytest.approx(3)
    assert np.hypot(first["tx"] - (12 - 31.5) * scale, first["ty"] - (40 - 31.5) * scale) < 4 * scale
    assert second["log_odds"] == pytest.approx(2)
    assert second["tx"] > 0 > second["ty"]
    assert attribution.residual == pytest.approx(-1.0)
    assert attribution.smoothed("hmi", 2.0).sum() == pytest.approx(-4.0, abs=0.05)
