"""Two gloo processes with uneven, gappy batches against one with all: gradients and running statistics of the model."""

import copy
import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tiny_models import tiny_batch, tiny_config
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers.distributed import DistributedConfig

from solarchip_hf import SolarChipForPreTraining

CASES = {
    "a tower each": {"backbone": "vit", "weight_sharing": "modality", "projection_centering": "tokens"},
    "shared": {"backbone": "vit", "weight_sharing": "shared", "pairing": "all"},
    "convolutions": {"backbone": "cnn", "weight_sharing": "instrument"},
}
SPLIT = (4, 2)
SHARDED = "a tower each, sharded"


def whole_batch():
    pixel_values, observed = tiny_batch(6)
    observed[4:, 1] = False  # the second process has no AIA 171 at all
    pixel_values[~observed] = float("nan")
    return pixel_values, observed


def build(name) -> SolarChipForPreTraining:
    torch.manual_seed(0)
    weights = {"cls_loss_weight": 1.0, "patch_loss_weight": 1.0, "intra_loss_weight": 1.0}
    return SolarChipForPreTraining(tiny_config(**CASES[name], **weights)).train()


def results_of(model, loss) -> dict:
    return {
        "loss": loss.detach(),
        "gradients": {name: parameter.grad for name, parameter in model.named_parameters()},
        "buffers": dict(model.named_buffers()),
    }


def sharded(folder) -> SolarChipForPreTraining:
    """The model of the case "a tower each", read by both processes and sharded by FSDP2, one unit a tower."""
    model = SolarChipForPreTraining.from_pretrained(folder, distributed_config=DistributedConfig(fsdp_size=2))
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    units = {name for name, module in model.named_modules() if isinstance(module, FSDPModule)}
    towers = model.config.towers()
    assert units == {"", *(f"solarchip.towers.{name}" for name in towers), *(f"decoders.{name}" for name in towers)}
    return model.train()


def work(rank, folder):
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    results = {}
    for name in CASES:
        # No search for unused parameters: every tower takes part on every process.
        model = DistributedDataParallel(build(name))
        pixel_values, observed = (tensor.split(SPLIT)[rank] for tensor in whole_batch())
        loss = model(pixel_values, observed).loss
        loss.backward()
        results[name] = results_of(model.module, loss)
    model = sharded(f"{folder}/model")
    pixel_values, observed = (tensor.split(SPLIT)[rank] for tensor in whole_batch())
    loss = model(pixel_values, observed).loss
    loss.backward()
    results[SHARDED] = results_of(model, loss)
    results[SHARDED]["gradients"] = {key: grad.full_tensor() for key, grad in results[SHARDED]["gradients"].items()}
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gloo")
    build("a tower each").save_pretrained(folder / "model")
    mp.spawn(work, args=(str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("name", [*CASES, SHARDED])
def test_two_processes_take_the_step_of_one(processes, name):
    model = build(name.removesuffix(", sharded"))
    loss = model(*whole_batch()).loss
    loss.backward()
    expected = results_of(model, loss)
    losses = torch.stack([results[name]["loss"] for results in processes])
    torch.testing.assert_close(losses.mean(), expected["loss"], rtol=1e-5, atol=1e-6)
    total = torch.cat([gradient.flatten() for gradient in expected["gradients"].values()]).norm()
    assert total > 0.1
    for results in processes:
        for key, gradient in expected["gradients"].items():
            assert (results[name]["gradients"][key] - gradient).norm() < 1e-5 * total, key
        for key, buffer in expected["buffers"].items():
            torch.testing.assert_close(results[name]["buffers"][key], buffer, rtol=1e-4, atol=1e-5, msg=key)
    moved = [key for key, buffer in expected["buffers"].items() if key.endswith("num_updates") and buffer == 1]
    assert len(moved) == 3


def test_local_batches_alone_would_give_another_step():
    """What gathering is for: the mean of the two processes' own gradients points elsewhere."""
    whole = build("shared")
    whole(*whole_batch()).loss.backward()
    parts = [copy.deepcopy(build("shared")) for _ in SPLIT]
    for part, *batch in zip(parts, *(tensor.split(SPLIT) for tensor in whole_batch()), strict=True):
        part(*batch).loss.backward()
    truth = torch.cat([parameter.grad.flatten() for parameter in whole.parameters()])
    local = sum(torch.cat([parameter.grad.flatten() for parameter in part.parameters()]) for part in parts) / 2
    assert torch.cosine_similarity(truth, local, dim=0) < 0.99
