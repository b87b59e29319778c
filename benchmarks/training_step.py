"""A training step against the published algorithm: seconds, peak memory, images a second, share of peak arithmetic.

    python benchmarks/training_step.py                                   # B 16, L 257, a small encoder, on the CPU
    python benchmarks/training_step.py --encoder base --batch 4 --repeats 1     # minutes
    python benchmarks/training_step.py --device cuda --encoder base --modalities 11 --bf16 --chunk 16

Three steps of the same model on the same numbers: a straightforward reading of the published algorithm (each modality
by itself, each patch, sample and direction a problem of its own, all graphs alive until one backward), ours, and ours
with the gradient cache. Each runs in a process of its own, so that its peak is its own. A step is forward and backward;
the optimiser's is the same for all. The run fails if losses or gradients differ.
"""

import argparse
import contextlib
import datetime
import functools
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from solarchip_hf import SolarChipConfig, SolarChipForPreTraining
from solarchip_hf.models.modalities import MODALITY_NAMES
from solarchip_hf.training.gradient_cache import gradient_cache_step

# hidden size, layers, heads, image size, patch size: all of 256 patches
ENCODERS = {"small": (64, 1, 2, 128, 8), "medium": (192, 4, 3, 256, 16), "base": (768, 12, 12, 1024, 64)}
STEPS = {"published": "published algorithm", "ours": "ours", "cache": "ours, gradient cache"}


def build(arguments):
    """The model with the published objective: no centring, all patches, whole images reconstructed."""
    hidden, layers, heads, size, patch = ENCODERS[arguments.encoder]
    backbone = {
        "model_type": "solarchip_vit",
        "image_size": size,
        "patch_size": patch,
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }
    torch.manual_seed(0)
    config = SolarChipConfig(
        backbone_config=backbone,
        modalities=list(MODALITY_NAMES[: arguments.modalities]),
        weight_sharing="modality",
        projection_dim=hidden,
        projection_centering="none",
        min_disk_fraction=0.0,
        mask_reconstruction=False,
        cls_loss_weight=1.0,
        patch_loss_weight=1.0,
        intra_loss_weight=1.0,
        reconstruction_loss_weight=1.0,
    )
    return SolarChipForPreTraining(config).to(arguments.device).train()


def observations(arguments, batch):
    size = ENCODERS[arguments.encoder][3]
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, arguments.modalities, size, size, generator=generator).to(arguments.device)


def both_directions(first, second, scale):
    logits = scale * F.normalize(first, dim=-1) @ F.normalize(second, dim=-1).T
    labels = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def published_step(model, pixel_values, autocast, chunk):
    """Every modality through its network, then a loop over pairs, and in it over patches and samples."""
    embeds, reconstruction = [], 0.0
    with autocast():
        for modality, name in enumerate(model.config.modalities):
            images = pixel_values[:, modality, None]
            ids = torch.zeros(len(images), dtype=torch.long, device=images.device)
            encoded = model.solarchip.towers[name](images, ids, return_dict=True)
            decoded = model.decoders[name](encoded.latents, ids)
            reconstruction = reconstruction + (decoded.float() - images).abs().mean()
            embeds.append(encoded.projections)
    embeds = [tokens.float() for tokens in embeds]
    scales, loss, pairs = model.logit_scales.exp(), reconstruction, len(embeds) - 1
    one, patches = embeds[0], range(1, embeds[0].shape[1])
    for two in embeds[1:]:
        cls = both_directions(one[:, 0], two[:, 0], scales[0])
        patch = sum(both_directions(one[:, i], two[:, i], scales[1]) for i in patches) / len(patches)
        intra = sum(both_directions(a[1:], b[1:], scales[2]) for a, b in zip(one, two, strict=True)) / len(one)
        loss = loss + (cls + patch + intra) / pairs
    loss.backward()
    return loss.detach()


def our_step(model, pixel_values, autocast, chunk):
    with autocast():
        loss = model(pixel_values).loss
    loss.backward()
    return loss.detach()


def cached_step(model, pixel_values, autocast, chunk):
    return gradient_cache_step(model, pixel_values, chunk_size=chunk, autocast=autocast)["loss"]


FUNCTIONS = {"published": published_step, "ours": our_step, "cache": cached_step}


def synchronize(device):
    if device == "cuda":
        torch.cuda.synchronize()


def memory_of(process_field):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(process_field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {process_field}: the memory measurement needs Linux, or a GPU.")


def peak_growth(step, device):
    """Bytes by which memory rose above what was allocated before `step`, at its peak."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak (VmHWM) back to the present
    before = memory_of("VmRSS")
    step()
    return memory_of("VmHWM") - before


def matrix_rate(arguments):
    """Multiply-adds a second, times two, of one large matrix product: the peak that can be had."""
    many, kind = (8192, torch.bfloat16) if arguments.device == "cuda" else (2048, torch.float32)
    one = torch.randn(many, many, device=arguments.device, dtype=kind if arguments.bf16 else torch.float32)
    seconds = []
    for _ in range(6):
        synchronize(arguments.device)
        start = time.perf_counter()
        one @ one
        synchronize(arguments.device)
        seconds.append(time.perf_counter() - start)
    return 2 * many**3 / min(seconds)


def measure(arguments):
    """Runs one of the steps; prints its figures as JSON, and leaves its gradients in a file."""
    device = arguments.device
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    model = build(arguments)
    pixel_values = observations(arguments, arguments.batch)
    autocast = functools.partial(torch.autocast, device, torch.bfloat16) if arguments.bf16 else contextlib.nullcontext
    step = functools.partial(FUNCTIONS[arguments.only], model, autocast=autocast, chunk=arguments.chunk)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)  # there in any training; no part of a step's growth
    step(pixel_values[:2])  # libraries and threads come up
    model.zero_grad(set_to_none=False)
    losses = []
    peak = peak_growth(lambda: losses.append(step(pixel_values)), device)
    gradients = {name: parameter.grad.float().cpu() for name, parameter in model.named_parameters()}
    torch.save(gradients, arguments.gradients)
    seconds = []
    for _ in range(arguments.repeats):
        synchronize(device)
        start = time.perf_counter()
        step(pixel_values)
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    facts = {"loss": losses[0].item(), "peak": peak, "best": min(seconds), "median": statistics.median(seconds)}
    if arguments.only == "ours":
        with FlopCounterMode(display=False) as counter:
            our_step(model, pixel_values[:2], autocast, 0)
        facts["operations"] = counter.get_total_flops() / 2 * arguments.batch
        facts["rate"] = matrix_rate(arguments)
    print(json.dumps(facts))


def run(arguments, folder):
    facts = {}
    for name in STEPS:
        command = [sys.executable, __file__, *sys.argv[1:], "--only", name, "--gradients", str(folder / f"{name}.pt")]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            sys.exit(f"{STEPS[name]}: the process ended with {result.returncode}.\n{result.stderr[-3000:]}")
        facts[name] = json.loads(result.stdout.splitlines()[-1])
        facts[name]["gradients"] = torch.load(folder / f"{name}.pt", weights_only=True)
    return facts


def compare(facts, accuracy):
    """The largest relative differences to the published algorithm; ends the program where they are too large."""
    reference = facts["published"]
    total = torch.stack([grad.norm() for grad in reference["gradients"].values()]).norm()
    worst = {}
    for name in ("ours", "cache"):
        apart = [facts[name]["gradients"][key] - grad for key, grad in reference["gradients"].items()]
        difference = (torch.stack([grad.norm() for grad in apart]).norm() / total).item()
        worst[name] = max(difference, abs(facts[name]["loss"] / reference["loss"] - 1))
        if not worst[name] < accuracy:
            sys.exit(f"{STEPS[name]}: loss or gradient differs by {worst[name]:.1e}: the speeds mean nothing.")
    return worst


def report(arguments, facts, worst):
    hidden, layers, _, size, patch = ENCODERS[arguments.encoder]
    device = torch.cuda.get_device_name() if arguments.device == "cuda" else f"CPU ({platform.machine()})"
    threads = arguments.threads or torch.get_num_threads()
    now = datetime.datetime.now(datetime.UTC).date()
    print(f"{device}, {threads} CPU threads, torch {torch.__version__}, {now}")
    print(
        f"B {arguments.batch}, {arguments.modalities} modalities, L {1 + (size // patch) ** 2}, {size} px, "
        f"encoder {hidden} x {layers} a modality, {'bfloat16 mixed' if arguments.bf16 else 'float32'}, "
        f"chunks of {arguments.chunk}\n"
    )
    print("| step | best s | median s | images/s | faster by | peak growth MiB | of published |")
    print("|---|---|---|---|---|---|---|")
    first = facts["published"]
    for name, title in STEPS.items():
        row = facts[name]
        images = arguments.batch * arguments.modalities / row["best"]
        print(
            f"| {title} | {row['best']:.3f} | {row['median']:.3f} | {images:.1f} | {first['best'] / row['best']:.2f} "
            f"| {row['peak'] / 2**20:.0f} | {row['peak'] / first['peak']:.2f} |"
        )
    ours = facts["ours"]
    share = ours["operations"] / ours["best"] / ours["rate"]
    print(
        f"\nOurs: {ours['operations'] / 1e12:.3f}e12 operations a step, {share:.0%} of the rate of a large matrix "
        f"product here ({ours['rate'] / 1e12:.2f}e12 a second)."
    )
    print(f"Largest relative difference to the published algorithm: {max(worst.values()):.1e}.")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16, help="observations")
    parser.add_argument("--modalities", type=int, default=2)
    parser.add_argument("--encoder", choices=list(ENCODERS), default="small")
    parser.add_argument("--chunk", type=int, default=4, help="images a chunk of the gradient cache")
    parser.add_argument("--repeats", type=int, default=5, help="timed repetitions after two steps")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads (default: torch's own choice)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 mixed precision")
    parser.add_argument("--only", choices=list(STEPS), help=argparse.SUPPRESS)
    parser.add_argument("--gradients", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only:
        measure(arguments)
        return
    with tempfile.TemporaryDirectory() as folder:
        facts = run(arguments, Path(folder))
    report(arguments, facts, compare(facts, 5e-2 if arguments.bf16 else 1e-4))


if __name__ == "__main__":
    main()
