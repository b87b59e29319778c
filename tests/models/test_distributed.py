"""Two real gloo processes with uneven, different data against one with the whole batch: gradients, not only values."""

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from gloo_pair import on_two_processes
from solarchip_hf.models import distributed
from solarchip_hf.models.losses import (
    centering_statistics,
    contrastive_losses,
    kl_loss,
    make_pairs,
    reconstruction_loss,
)

NAMES = ("hmi", "aia171", "aia304")
PATCHES, WIDTH, PIXELS = 5, 8, 9
CASES = {
    "anchor": {"pairing": "anchor"},
    "all pairs, class centring": {"pairing": "all", "centering": "class"},
    "all pairs, token centring, sliced": {"pairing": "all", "centering": "tokens", "max_logits": 9},
    "float64": {"pairing": "all", "centering": "tokens", "dtype": torch.float64},
    "one process without observations": {"pairing": "all", "centering": "tokens", "split": (7, 0)},
}


class Tower(torch.nn.Module):
    """A small encoder and decoder with the temperatures, so that every parameter meets every term."""

    def __init__(self):
        super().__init__()
        self.encoder = torch.nn.Linear(PIXELS, WIDTH)
        self.decoder = torch.nn.Linear(WIDTH, PIXELS)
        self.logit_scales = torch.nn.Parameter(torch.tensor([1.1, 0.4, 2.0]))

    def forward(self, images, observed, pairing, centering="none", max_logits=2**27):
        embeds = self.encoder(torch.where(observed[:, :, None, None], images, 0.0))
        losses = contrastive_losses(
            embeds,
            observed,
            self.logit_scales,
            pairs=make_pairs(NAMES, "hmi", pairing),
            patch_mask=torch.tensor([True, True, False, True, True]),
            centering=centering,
            max_logits=max_logits,
        )
        errors = reconstruction_loss(self.decoder(embeds), images, observed, "l2")
        return sum(losses.values()) + errors + 0.1 * kl_loss(embeds, embeds - 1, observed)


def whole_batch(dtype):
    generator = torch.Generator().manual_seed(5)
    images = torch.randn(7, 3, 1 + PATCHES, PIXELS, generator=generator, dtype=dtype)
    images[1:4] = images[1:4].mul(0.2).add(images[:1])  # alike, so that negatives matter
    observed = torch.ones(7, 3, dtype=torch.bool)
    observed[0, 1] = observed[2, 0] = False
    observed[5:, 2] = False  # the second process has no aia304 at all
    images[~observed] = float("nan")
    return images, observed


def tower(dtype):
    torch.manual_seed(0)
    return Tower().to(dtype)


def step(model, images, observed, pairing, **options):
    images = images.clone().requires_grad_()
    loss = model(images, observed, pairing, **options)
    loss.backward()
    return loss.detach(), images.grad


def compute(rank):
    results = {}
    for name, case in CASES.items():
        case = dict(case)
        dtype, split = case.pop("dtype", torch.float32), case.pop("split", (5, 2))
        images, observed = (tensor.split(split)[rank] for tensor in whole_batch(dtype))
        model = DistributedDataParallel(tower(dtype))
        loss, grad = step(model, images, observed, **case)
        weights = {key: value.grad for key, value in model.module.named_parameters()}
        results[name] = {"loss": loss, "images": grad, "weights": weights}
    results["gathered"] = distributed.all_gather_with_grad(torch.arange(3.0 - rank) + 10 * rank)
    results["gathered bool"] = distributed.all_gather_with_grad(torch.tensor([True] * (rank + 1)))
    results["sum"] = distributed.all_reduce_sum(torch.tensor([1.0 + rank], requires_grad=True))
    results["place"] = (distributed.rank(), distributed.world_size())
    local = torch.full((2, 3, 1 + PATCHES, WIDTH), float(rank))
    observed = torch.ones(2, 3, dtype=torch.bool)
    if rank == 0:  # without gathering one process can go alone, and sees its own observations only
        images = torch.randn(3, 3, 1 + PATCHES, WIDTH, generator=torch.Generator().manual_seed(1))
        marks = torch.ones(3, 3, dtype=torch.bool)
        results["local"] = contrastive_losses(images, marks, torch.zeros(3), pairs=[(0, 1)], gather=False)
    mean, _, count = centering_statistics(local, observed)
    results["statistics"] = (mean.unique(), count)
    return results


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    return on_two_processes(compute, tmp_path_factory.mktemp("gloo"))


@pytest.mark.parametrize("name", CASES)
def test_gradients_equal_those_of_one_process(processes, name):
    case = dict(CASES[name])
    dtype = case.pop("dtype", torch.float32)
    case.pop("split", None)
    images, observed = whole_batch(dtype)
    model = tower(dtype)
    loss, grad = step(model, images, observed, **case)
    parts = [results[name] for results in processes]
    accuracy = 1e-5 if dtype == torch.float32 else 1e-12

    assert torch.stack([part["loss"] for part in parts]).mean().item() == pytest.approx(loss.item(), rel=accuracy)
    # the input's gradient is of the local loss, which carries the number of processes
    pairs = {"images": (torch.cat([part["images"] for part in parts]) / 2, grad)}
    for rank, part in enumerate(parts):
        for key, parameter in model.named_parameters():
            pairs[f"{key} on {rank}"] = (part["weights"][key], parameter.grad)
    assert len(pairs) == 11
    for key, (ours, expected) in pairs.items():
        ours, expected = ours.double().flatten(), expected.double().flatten()
        assert expected.norm() > 1e-3, key
        assert (ours - expected).norm() < accuracy * expected.norm(), key
        assert torch.cosine_similarity(ours, expected, dim=0) > 0.999999, key
    assert (grad[~observed] == 0).all()


def test_local_negatives_alone_would_be_wrong():
    # What the processes compare with is what makes the difference: the same data without gathering disagree by far.
    images, observed = whole_batch(torch.float64)
    model = tower(torch.float64)
    step(model, images, observed, "all")
    expected = model.encoder.weight.grad.clone()
    model.zero_grad()
    for part in (slice(0, 5), slice(5, 7)):
        step(model, images[part], observed[part], "all")
    ours = model.encoder.weight.grad / 2
    assert torch.cosine_similarity(ours.flatten(), expected.flatten(), dim=0) < 0.99


def test_collectives(processes):
    for rank, results in enumerate(processes):
        assert results["gathered"].tolist() == [0, 1, 2, 10, 11]
        assert results["gathered bool"].tolist() == [True] * 3
        assert results["sum"].item() == 3
        assert not results["sum"].requires_grad
        assert results["place"] == (rank, 2)
        assert results["statistics"][0].tolist() == [0.5]
        assert results["statistics"][1].tolist() == [4, 4, 4]


def test_without_gathering_a_process_is_alone(processes):
    images = torch.randn(3, 3, 1 + PATCHES, WIDTH, generator=torch.Generator().manual_seed(1))
    expected = contrastive_losses(images, torch.ones(3, 3, dtype=torch.bool), torch.zeros(3), pairs=[(0, 1)])
    for name, loss in processes[0]["local"].items():
        assert loss.item() == pytest.approx(expected[name].item(), rel=1e-6)
        assert loss > 0.1


def test_without_processes_nothing_happens():
    tensor = torch.randn(3, 2, requires_grad=True)
    assert distributed.all_gather_with_grad(tensor) is tensor
    assert distributed.all_reduce_with_grad(tensor) is tensor
    assert torch.equal(distributed.all_reduce_sum(tensor), tensor)
    assert not distributed.all_reduce_sum(tensor).requires_grad
    assert (distributed.rank(), distributed.world_size()) == (0, 1)
    assert distributed.gather_sizes(tensor) == [3]
