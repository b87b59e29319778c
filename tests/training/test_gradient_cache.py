"""The gradient cache against the same step in one piece: gradients, random numbers, processes, memory."""

import contextlib
import copy
import itertools
import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from gloo_pair import on_two_processes
from solarchip_hf import SolarChipConfig, SolarChipForPreTraining
from solarchip_hf.training.gradient_cache import gradient_cache_step

VIT = {
    "model_type": "solarchip_vit",
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
VAE = {
    "model_type": "solarchip_cnn",
    "image_size": 32,
    "block_out_channels": [8, 8],
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 4,
    "double_z": True,
}
WEIGHTS = {
    "cls_loss_weight": 1.0,
    "patch_loss_weight": 0.5,
    "intra_loss_weight": 0.7,
    "reconstruction_loss_weight": 0.3,
    "kl_loss_weight": 0.2,
}


def build(backbone=VIT, dtype=torch.float64, **fields):
    torch.manual_seed(0)
    fields = {"modalities": ["hmi", "aia171", "aia304"], "projection_dim": 8, "pairing": "all", **WEIGHTS, **fields}
    return SolarChipForPreTraining(SolarChipConfig(backbone_config=backbone, **fields)).to(dtype).train()


def observations(batch=5, modalities=3, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    pixel_values = torch.randn(batch, modalities, 32, 32, generator=generator, dtype=dtype)
    observed = torch.ones(batch, modalities, dtype=torch.bool)
    observed[0, 1] = observed[2, 0] = observed[batch - 1, 2] = False
    pixel_values[~observed] = float("nan")
    return pixel_values, observed


def gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_same(ours, expected, accuracy, floor=1e-4):
    """Every parameter by name, relative to its gradient's norm, or to `floor` of the whole's where that is larger."""
    assert ours.keys() == expected.keys()
    total = torch.stack([grad.double().norm() for grad in expected.values()]).norm()
    assert total > 1e-2  # an empty gradient would prove nothing
    for name, grad in expected.items():
        difference = (ours[name].double() - grad.double()).norm()
        assert difference <= accuracy * max(grad.double().norm(), floor * total), name


@pytest.mark.parametrize("chunk_size", [1, 3, 64])
@pytest.mark.parametrize(
    ("backbone", "fields"),
    [
        (VIT, {"weight_sharing": "instrument", "projection_centering": "tokens"}),
        (VIT, {"weight_sharing": "modality", "projection_centering": "class", "pairing": "anchor"}),
        (VIT, {"weight_sharing": "shared", "projection_centering": "none", "reconstruction_loss": "l2"}),
        (VAE, {"weight_sharing": "instrument", "projection_centering": "class"}),
    ],
)
def test_equals_the_step_in_one_piece(backbone, fields, chunk_size):
    model = build(backbone, **fields)
    if backbone is VAE:
        model.eval()  # else each draws latents of its own
    whole = copy.deepcopy(model)
    pixel_values, observed = observations()
    output = whole(pixel_values, observed)
    output.loss.backward()
    terms = gradient_cache_step(model, pixel_values, observed, chunk_size=chunk_size)
    for name, value in terms.items():
        assert value.item() == pytest.approx(output[name].item(), rel=1e-6), name
        assert not value.requires_grad
    assert ("kl_loss" in terms) == (backbone is VAE)
    assert_same(gradients(model), gradients(whole), 1e-6)
    for ours, expected in zip(model.buffers(), whole.buffers(), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("backbone", [{**VIT, "attention_dropout": 0.4}, VAE])
def test_random_numbers_are_the_same_in_both_passes(backbone):
    model = build(backbone, weight_sharing="instrument")
    whole, other = copy.deepcopy(model), copy.deepcopy(model)
    pixel_values, observed = observations()
    torch.manual_seed(11)
    gradient_cache_step(model, pixel_values, observed, chunk_size=2)
    following = torch.rand(())

    # the same chunks with the same seeds, all their graphs alive until one backward
    torch.manual_seed(11)
    seed = int(torch.randint(2**62, ()))
    images = pixel_values.where(observed[..., None, None], 0.0)
    output = whole(pixel_values, observed, return_loss=False)
    parts = {name: [] for name in ("projections", "reconstruction", "latents_mean", "latents_logvar")}
    for tower, served in whole.config.towers().items():
        for position, name in enumerate(served):
            collected = {part: [] for part in parts}
            for rows in (slice(0, 2), slice(2, 4), slice(4, 5)):
                torch.manual_seed(seed)
                seed += 1
                chunk = images[rows, whole.config.modalities.index(name)][:, None]
                ids = torch.full((len(chunk),), position)
                encoded = whole.solarchip.towers[tower](chunk, ids, return_dict=True)
                collected["projections"].append(encoded.projections)
                collected["reconstruction"].append(whole.decoders[tower](whole._sample(encoded), ids)[:, 0])
                collected["latents_mean"].append(encoded.latents)
                collected["latents_logvar"].append(encoded.latents_logvar)
            for part, values in collected.items():
                parts[part].append(None if values[0] is None else torch.cat(values))
    for part, values in parts.items():
        if values[0] is not None:
            setattr(output, part, torch.stack(values, dim=1))
    terms = {
        **whole.contrastive_terms(output.projections, observed, image_size=32),
        **whole.autoencoding_terms(output, images, observed),
    }
    whole.weigh(terms).backward()
    assert_same(gradients(model), gradients(whole), 1e-6)

    torch.manual_seed(11)
    assert int(torch.randint(2**62, ())) is not None
    assert torch.rand(()) == following  # one draw a step, whatever the number of chunks
    torch.manual_seed(12)
    gradient_cache_step(other, pixel_values, observed, chunk_size=2)
    with pytest.raises(AssertionError):
        assert_same(gradients(other), gradients(whole), 1e-6)


def test_under_autocast_gradients_are_those_of_the_step_in_one_piece():
    model = build(dtype=torch.float32)
    whole = copy.deepcopy(model)
    pixel_values, observed = observations(dtype=torch.float32)

    def autocast():
        return torch.autocast("cpu", dtype=torch.bfloat16)

    with autocast():
        loss = whole(pixel_values, observed).loss
    loss.backward()
    terms = gradient_cache_step(model, pixel_values, observed, chunk_size=2, autocast=autocast)
    assert terms["loss"].item() == pytest.approx(loss.item(), rel=1e-3)
    ours, expected = (torch.cat([grad.flatten() for grad in gradients(one).values()]) for one in (model, whole))
    assert expected.norm() > 1e-2
    assert torch.cosine_similarity(ours, expected, dim=0) > 0.999


def test_accumulation_and_frozen_temperatures():
    model = build()
    model.logit_scales.requires_grad_(False)
    whole = copy.deepcopy(model)
    pixel_values, observed = observations()
    for part in (slice(0, 2), slice(2, 5)):
        (whole(pixel_values[part], observed[part]).loss / 2).backward()
        gradient_cache_step(
            model, pixel_values[part], observed[part], chunk_size=2, backward=lambda loss: (loss / 2).backward()
        )
    assert model.logit_scales.grad is None
    trained = [{name: grad for name, grad in gradients(one).items() if grad is not None} for one in (model, whole)]
    assert_same(*trained, 1e-6)


CASES = {
    "instrument": {"weight_sharing": "instrument", "projection_centering": "tokens"},
    "modality": {"weight_sharing": "modality", "pairing": "anchor"},
    "shared": {"weight_sharing": "shared", "projection_centering": "class"},
}
SPLIT = (4, 1)
WAYS = {
    "without cache": {"chunk_size": None},
    "with cache": {"chunk_size": 3},
    "with cache, accumulating": {"chunk_size": 2, "accumulation": 4},
    "sharded": {"chunk_size": 3},
    "float32": {"chunk_size": 3, "dtype": torch.float32},
}


def wrap(model, way):
    if way != "sharded":
        return DistributedDataParallel(model, find_unused_parameters=True)
    mesh = init_device_mesh("cpu", (2,))
    for part in [*model.solarchip.towers.values(), *model.decoders.values(), model]:
        fully_shard(part, mesh=mesh)
    return model


def compute(rank):
    results = {}
    for (way, options), (name, fields) in itertools.product(WAYS.items(), CASES.items()):
        dtype, count, chunk_size = (
            options.get("dtype", torch.float64),
            options.get("accumulation", 1),
            options["chunk_size"],
        )
        model = wrap(build(dtype=dtype, **fields), way)
        pixel_values, observed = (tensor.split(SPLIT)[rank] for tensor in observations(dtype=dtype))
        for micro in range(count):
            with contextlib.nullcontext() if micro == count - 1 else model.no_sync():
                if chunk_size is None:
                    output = model(pixel_values, observed)
                    terms = {key: output[key].detach() for key in output if key == "loss" or key.endswith("_loss")}
                    output.loss.backward()
                else:
                    terms = gradient_cache_step(
                        model,
                        pixel_values + micro,
                        observed,
                        chunk_size=chunk_size,
                        backward=lambda loss, count=count: (loss / count).backward(),
                    )
        grads = gradients(getattr(model, "module", model))
        if way == "sharded":
            assert all(isinstance(grad, DTensor) for grad in grads.values())
            grads = {key: grad.full_tensor() for key, grad in grads.items()}
        results[way, name] = {"terms": terms, "gradients": grads}
    try:
        gradient_cache_step(DistributedDataParallel(build()), pixel_values, observed, chunk_size=2)
    except ValueError as error:
        results["refused"] = str(error)
    return results


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    return on_two_processes(compute, tmp_path_factory.mktemp("gloo"))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", CASES)
def test_two_processes_equal_one_with_the_whole_batch(processes, way, name):
    dtype, count = WAYS[way].get("dtype", torch.float64), WAYS[way].get("accumulation", 1)
    # In float32 the gradient of a bias that centring takes out again is a sum of large terms that cancel.
    accuracy, floor = (1e-5, 1e-2) if dtype == torch.float32 else (1e-6, 1e-4)
    whole = build(dtype=dtype, **CASES[name])
    pixel_values, observed = observations(dtype=dtype)
    for micro in range(count):  # what accumulation means: the mean of the micro-steps' gradients, no more negatives
        output = whole(pixel_values + micro, observed)
        (output.loss / count).backward()
    for results in processes:
        assert_same(results[way, name]["gradients"], gradients(whole), accuracy, floor)
    for term, value in processes[0][way, name]["terms"].items():
        mean = (value + processes[1][way, name]["terms"][term]) / 2
        assert mean.item() == pytest.approx(output[term].item(), rel=10 * accuracy), term


def test_what_would_be_wrong_is_refused(processes):
    assert "find_unused_parameters=True" in processes[0]["refused"]
    model = build()
    pixel_values, observed = observations()
    with pytest.raises(ValueError, match="chunk_size: expected at least 1"):
        gradient_cache_step(model, pixel_values, observed, chunk_size=0)
    with pytest.raises(ValueError, match=r"pixel_values: expected \(B, 3, H, W\)"):
        gradient_cache_step(model, pixel_values[:, :2], observed, chunk_size=1)

    class DeepSpeedEngine(torch.nn.Module):
        module = model
        config = model.config

    with pytest.raises(ValueError, match="DeepSpeed"):
        gradient_cache_step(DeepSpeedEngine(), pixel_values, observed, chunk_size=1)


MEASURE = """
    import ctypes
    import json
    from pathlib import Path
    import torch
    from solarchip_hf import SolarChipConfig, SolarChipForPreTraining
    from solarchip_hf.training.gradient_cache import gradient_cache_step

    torch.set_num_threads(1)
    torch.manual_seed(0)
    names = ["hmi", "aia94", "aia131", "aia171", "aia193", "aia211", "aia304", "aia335"]
    backbone = dict(model_type="solarchip_vit", image_size=64, patch_size=8, hidden_size=128, intermediate_size=512,
                    num_hidden_layers=2, num_attention_heads=4)
    model = SolarChipForPreTraining(SolarChipConfig(backbone_config=backbone, modalities=names, projection_dim=32,
                                                    weight_sharing="shared"))

    def memory(field):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

    def growth(batch, chunk_size):
        images = torch.randn(batch, len(names), 64, 64)
        model.zero_grad()
        ctypes.CDLL(None).malloc_trim(0)  # what an earlier step has freed shall not hide what this one takes
        Path("/proc/self/clear_refs").write_text("5")  # the peak falls back to the present
        before = memory("VmRSS")
        if chunk_size:
            gradient_cache_step(model, images, chunk_size=chunk_size)
        else:
            model(images).loss.backward()
        return memory("VmHWM") - before

    growth(1, 4)
    print(json.dumps([growth(8, 4), growth(32, 4), growth(8, None)]))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="a process's peak is measured as Linux tells it")
def test_peak_memory_is_that_of_a_chunk():
    command = [sys.executable, "-c", textwrap.dedent(MEASURE)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    cached, cached_fourfold, whole = json.loads(result.stdout)
    embeds = 8 * 8 * 65 * 32 * 4  # bytes
    assert whole > 100e6
    assert cached < whole / 5
    assert cached_fourfold < cached + 3 * 12 * embeds  # the embeddings, their gradient and the loss's copies of them
