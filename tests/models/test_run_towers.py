"""Whole observations go through the towers by slices: the same as row by row, for values and gradients."""

import itertools

import pytest
import torch
from tiny_models import tiny_config

from solarchip_hf import SolarChipModel
from solarchip_hf.models import modeling_solarchip_layers
from solarchip_hf.models.modeling_solarchip_layers import run_towers

MODALITIES = ["aia171", "hmi", "aia304"]  # the magnetogram's tower in the midst of the other's
TOWERS = {
    "instrument": {"hmi": ["hmi"], "aia": ["aia171", "aia304"]},
    "modality": {name: [name] for name in MODALITIES},
    "shared": {"shared": MODALITIES},
}


def passed_through(towers, inputs, ids):
    """What a tower gives tells which tower, which place in it, and which image."""

    def run(tower, rows, places):
        value = rows * (10 + list(towers).index(tower)) + places[:, None]
        return {"plain": value, "levels": (value, 2 * value), "none": None}

    return run_towers(towers, MODALITIES, ids, inputs, run)


@pytest.mark.parametrize("sharing", list(TOWERS))
@pytest.mark.parametrize("batch", [1, 4])
def test_observations_come_back_in_their_own_order(sharing, batch, monkeypatch):
    ids = list(range(3)) * batch
    inputs = torch.randn(3 * batch, 5, requires_grad=True)
    other = inputs.detach().clone().requires_grad_()
    seen = []
    whole = modeling_solarchip_layers._run_observations
    monkeypatch.setattr(modeling_solarchip_layers, "_run_observations", lambda *a: seen.append(1) or whole(*a))
    ours = passed_through(TOWERS[sharing], inputs, ids)
    assert seen == [1]
    mixed = torch.randperm(3 * batch).tolist() if batch > 1 else [1, 0, 2]
    theirs = passed_through(TOWERS[sharing], other[mixed], [ids[row] for row in mixed])
    assert seen == [1]
    assert torch.equal(ours["plain"][mixed], theirs["plain"])
    assert torch.equal(ours["levels"][1], 2 * ours["plain"])
    assert ours["none"] is None
    weights = torch.randn(3 * batch, 5)
    (ours["plain"] * weights).sum().backward()
    (theirs["plain"] * weights[mixed]).sum().backward()
    torch.testing.assert_close(inputs.grad, other.grad)


def test_a_model_gives_an_image_the_same_in_any_company():
    torch.manual_seed(0)
    config = tiny_config("vit", weight_sharing="instrument", modalities=MODALITIES, anchor_modality="hmi")
    model = SolarChipModel(config).eval()
    images = torch.randn(6, 1, config.image_size, config.image_size)
    with torch.no_grad():
        together = model(images, [0, 1, 2] * 2, output_hidden_states=True)
        for index, modality in zip(range(6), itertools.cycle(range(3)), strict=False):
            alone = model(images[index : index + 1], [modality], output_hidden_states=True)
            torch.testing.assert_close(together.last_hidden_state[index], alone.last_hidden_state[0])
            torch.testing.assert_close(together.hidden_states[-1][index], alone.hidden_states[-1][0])
