"""A training step against the published algorithm: seconds, peak memory, images a second, share of peak arithmetic.

    python benchmarks/training_step.py                      # a small encoder with 11 modalities, the real one with two
    python benchmarks/training_step.py --encoder small --modalities 2
    python benchmarks/training_step.py --device cuda --encoder base --bf16 --chunk 16
    python benchmarks/training_step.py --output benchmarks/results/training_step.md

Three steps of the same model on the same numbers: a straightforward reading of the published algorithm (each modality
by itself, each patch, sample and direction a problem of its own, all graphs alive until one backward), ours, and ours
with the gradient cache. The encoders are the same for all three. Each step runs in a process of its own, so that its
peak is its own. A step is forward and backward; the optimiser's is the same for all. The run fails if losses or
gradients differ. On a CPU the real encoder runs with at most 4 observations of two modalities, once: it takes minutes.
"""

import argparse
import contextlib
import datetime
import functools
import json
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from torch.utils.flop_counter import FlopCounterMode

from measuring import peak_growth, seconds_of
from solarchip_hf import SolarChipConfig, SolarChipForPreTraining
from solarchip_hf.models.modalities import MODALITY_NAMES
from solarchip_hf.training.gradient_cache import gradient_cache_step

# hidden size, layers, heads, image size, patch size: all of 256 patches
ENCODERS = {"small": (64, 2, 2, 128, 8), "medium": (192, 4, 3, 256, 16), "base": (768, 12, 12, 1024, 64)}
PASSED_ON = ("batch", "modalities", "encoder", "chunk", "repeats", "threads", "device")
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


def unit(tokens, *place):
    """Unit vectors of a place in the batch, which is taken out twice, once for the norm, as the published code does."""
    return tokens[place] / tokens[place].norm(dim=-1, keepdim=True)


def both_directions(first, second, scale):
    logits = scale * first @ second.T
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
    everything = slice(None)
    for two in embeds[1:]:
        one = embeds[0]
        cls = both_directions(unit(one, everything, 0), unit(two, everything, 0), scales[0])
        one, two = one[:, 1:], two[:, 1:]
        patch = intra = 0.0
        for i in range(one.shape[1]):
            patch = patch + both_directions(unit(one, everything, i), unit(two, everything, i), scales[1])
        for b in range(len(one)):
            intra = intra + both_directions(unit(one, b), unit(two, b), scales[2])
        loss = loss + (cls + patch / one.shape[1] + intra / len(one)) / pairs
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


def matrix_rate(arguments):
    """Multiply-adds a second, times two, of one large matrix product: the peak that can be had."""
    many, kind = (8192, torch.bfloat16) if arguments.device == "cuda" else (2048, torch.float32)
    one = torch.randn(many, many, device=arguments.device, dtype=kind if arguments.bf16 else torch.float32)
    return 2 * many**3 / min(seconds_of(lambda: one @ one, arguments.device, 6))


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
    seconds = seconds_of(lambda: step(pixel_values), device, arguments.repeats)
    facts = {"loss": losses[0].item(), "peak": peak, "best": min(seconds), "median": statistics.median(seconds)}
    if arguments.only == "ours":
        with FlopCounterMode(display=False) as counter:
            our_step(model, pixel_values[:2], autocast, 0)
        facts["operations"] = counter.get_total_flops() / 2 * arguments.batch
        facts["rate"] = matrix_rate(arguments)
    print(json.dumps(facts))


def run(arguments, folder):
    facts = {}
    words = [f"--{name}={value}" for name, value in vars(arguments).items() if name in PASSED_ON and value is not None]
    for name in STEPS:
        command = [sys.executable, __file__, *words, "--only", name, "--gradients", str(folder / f"{name}.pt")]
        result = subprocess.run(command + ["--bf16"] * arguments.bf16, capture_output=True, text=True)
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


def hardware(arguments):
    if arguments.device == "cuda":
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {arguments.threads or torch.get_num_threads()} threads"


def report(arguments, facts, worst):
    """The table of one encoder, as lines of Markdown."""
    hidden, layers, _, size, patch = ENCODERS[arguments.encoder]
    precision = "bfloat16 mixed" if arguments.bf16 else "float32"
    lines = [
        f"## Encoder {hidden} x {layers}, {arguments.modalities} modalities",
        f"B {arguments.batch}, L {1 + (size // patch) ** 2}, {size} px, an encoder and a decoder a modality, "
        f"{precision}, chunks of {arguments.chunk}; {hardware(arguments)}; torch {torch.__version__}, transformers "
        f"{transformers.__version__}; {datetime.datetime.now(datetime.UTC).date()}.",
        "",
        "| step | best s | median s | images/s | faster by | peak growth MiB | of published |",
        "|---|---|---|---|---|---|---|",
    ]
    first = facts["published"]
    for name, title in STEPS.items():
        row = facts[name]
        images = arguments.batch * arguments.modalities / row["best"]
        lines.append(
            f"| {title} | {row['best']:.3f} | {row['median']:.3f} | {images:.1f} | {first['best'] / row['best']:.2f} "
            f"| {row['peak'] / 2**20:.0f} | {row['peak'] / first['peak']:.2f} |"
        )
    ours = facts["ours"]
    share = ours["operations"] / ours["best"] / ours["rate"]
    lines += [
        "",
        f"Ours: {ours['operations'] / 1e12:.3f}e12 operations a step, {share:.0%} of the rate of a large matrix "
        f"product there ({ours['rate'] / 1e12:.2f}e12 a second). Largest relative difference of loss and gradient to "
        f"the published algorithm: {max(worst.values()):.1e}.",
        "",
    ]
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16, help="observations")
    parser.add_argument("--modalities", type=int, default=len(MODALITY_NAMES), help="one encoder each")
    parser.add_argument("--encoder", choices=list(ENCODERS), help="default: small, and base beside it")
    parser.add_argument("--chunk", type=int, default=4, help="images a chunk of the gradient cache")
    parser.add_argument("--repeats", type=int, default=5, help="timed repetitions after two steps")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads (default: torch's own choice)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 mixed precision")
    parser.add_argument("--output", type=Path, help="a Markdown file for the tables")
    parser.add_argument("--only", choices=list(STEPS), help=argparse.SUPPRESS)
    parser.add_argument("--gradients", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only:
        measure(arguments)
        return
    written = ["# A training step against the published algorithm", "", f"`python {shlex.join(sys.argv)}`", ""]
    for encoder in [arguments.encoder] if arguments.encoder else ["small", "base"]:
        case = argparse.Namespace(**{**vars(arguments), "encoder": encoder})
        if encoder == "base" and case.device == "cpu":
            case.batch, case.modalities, case.repeats = min(case.batch, 4), min(case.modalities, 2), 1
        with tempfile.TemporaryDirectory() as folder:
            facts = run(case, Path(folder))
        lines = report(case, facts, compare(facts, 5e-2 if case.bf16 else 1e-4))
        print("\n".join(lines), flush=True)
        written += lines
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text("\n".join(written), encoding="utf-8")


if __name__ == "__main__":
    main()
