"""Contrastive losses against the published algorithm's per-patch loop, and the memory of their logits.

    python benchmarks/losses.py
    python benchmarks/losses.py --device cuda --memory-patches 256

The references compute the objective for one pair of modalities one problem at a time, with every graph alive until the
backward. The first reads the published code plainly: it cuts the class token off, and takes each patch out of the batch
twice, once for the vector and once for its norm. Each taking costs a zero-filled gradient of the whole batch. The
second, which is kinder to the loop than the published code, takes each patch once. All run in this process on the same
numbers; the run fails if values or gradients differ.
"""

import argparse
import functools
import math
import statistics
import sys

import torch
import torch.nn.functional as F

from measuring import peak_growth, seconds_of, synchronize
from solarchip_hf.models.losses import contrastive_losses

TERMS = ("cls_loss", "patch_loss", "intra_loss")


def unit(vectors):
    return vectors / vectors.norm(dim=-1, keepdim=True)


def both_directions(first, second, scale):
    """Unit vectors (n, D) of each side -> mean cross-entropy of both directions."""
    logits = scale * first @ second.T
    labels = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def taken_twice(tokens, index):
    return tokens[index] / tokens[index].norm(dim=-1, keepdim=True)


def taken_once(tokens, index):
    return unit(tokens[index])


def loop_losses(embeds, logit_scales, take):
    """Embeddings (B, 2, 1+L, P) and log-scales (3,) to the three terms, one problem at a time.

    `take(tokens, index)` gives the unit vectors at `index`; `taken_twice` is the published code's way.
    """
    one, two = embeds.unbind(1)
    patches_one, patches_two = one[:, 1:], two[:, 1:]
    scales = logit_scales.exp()
    samples, patches = range(len(one)), range(patches_one.shape[1])
    by_patch = [(slice(None), index) for index in patches]
    return {
        "cls_loss": both_directions(unit(one[:, 0]), unit(two[:, 0]), scales[0]),
        "patch_loss": sum(both_directions(take(patches_one, i), take(patches_two, i), scales[1]) for i in by_patch)
        / len(patches),
        "intra_loss": sum(both_directions(take(patches_one, i), take(patches_two, i), scales[2]) for i in samples)
        / len(samples),
    }


def inputs(batch, tokens, width, device):
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(batch, 1, tokens, width, generator=generator)
    embeds = 0.3 * shared + torch.randn(batch, 2, tokens, width, generator=generator)
    scales = torch.full((3,), math.log(1 / 0.07))
    return embeds.to(device).requires_grad_(), scales.to(device).requires_grad_()


def measure(losses, leaves, device, repeats):
    """Seconds of forward + backward (best, median), values of the terms, gradients of the leaves."""

    def step():
        for leaf in leaves:
            leaf.grad = None
        terms = losses()
        sum(terms.values()).backward()
        return terms

    terms = step()  # warms up
    seconds = seconds_of(step, device, repeats)
    values = torch.stack([terms[name].detach() for name in TERMS])
    return min(seconds), statistics.median(seconds), values, [leaf.grad.clone() for leaf in leaves]


def compare_speed(arguments):
    device = arguments.device
    embeds, scales = inputs(arguments.batch, 1 + arguments.patches, arguments.width, device)
    observed = torch.ones(arguments.batch, 2, dtype=torch.bool, device=device)
    leaves = (embeds, scales)
    ways = {
        "loop, as published": lambda: loop_losses(*leaves, taken_twice),
        "loop, each patch once": lambda: loop_losses(*leaves, taken_once),
        "contrastive_losses": lambda: contrastive_losses(embeds, observed, scales, pairs=[(0, 1)]),
    }
    results = {name: measure(losses, leaves, device, arguments.repeats) for name, losses in ways.items()}
    ours = results["contrastive_losses"]

    print(f"\nForward + backward, B {arguments.batch}, L {1 + arguments.patches}, D {arguments.width}, float32")
    print(f"{'':<24}{'best s':>10}{'median s':>10}{'ours is faster by':>28}")
    for name, (best, median, *_) in results.items():
        ratios = "" if name == "contrastive_losses" else f"{best / ours[0]:>14.1f}x{median / ours[1]:>12.1f}x"
        print(f"{name:<24}{best:>10.4f}{median:>10.4f}{ratios}")
    for name, (_, _, terms, gradients) in results.items():
        values = ((ours[2] - terms) / terms).abs().max().item()
        slopes = max(((a - b).norm() / b.norm()).item() for a, b in zip(ours[3], gradients, strict=True))
        if values > 1e-5 or slopes > 1e-5:
            sys.exit(f"{name} differs by {values:.1e} in values, {slopes:.1e} in gradients: no comparison of speed.")
        if name != "contrastive_losses":
            print(f"largest relative difference to the {name}: values {values:.1e}, gradients {slopes:.1e}")


def compare_memory(arguments):
    device, batch, patches = arguments.device, arguments.memory_batch, arguments.memory_patches
    embeds, scales = inputs(batch, 1 + patches, arguments.memory_width, device)
    observed = torch.ones(batch, 2, dtype=torch.bool, device=device)

    def step(max_logits):
        embeds.grad = None
        losses = contrastive_losses(embeds, observed, scales, pairs=[(0, 1)], max_logits=max_logits)
        sum(losses.values()).backward()
        synchronize(device)

    contrastive_losses(embeds[:8], observed[:8], scales, pairs=[(0, 1)])  # libraries and threads come up
    gibibyte = 2**30
    print(f"\nPeak growth of memory in forward + backward, B {batch}, P {patches}, D {arguments.memory_width}, float32")
    print(f"(of which the embeddings' gradients and copies: {6 * embeds.numel() * 4 / gibibyte:.3f} GiB)")
    print(f"{'max_logits':<12}{'measured':>12}{'three slices':>16}{'all logits':>14}   (GiB)")
    everything = 4 * patches * batch**2
    for exponent in (22, 24, 26, 27):
        bound = 3 * 4 * min(2**exponent, (1 + patches) * batch**2)
        peak = peak_growth(functools.partial(step, 2**exponent), device)
        print(f"2^{exponent:<10}{peak / gibibyte:>12.3f}{bound / gibibyte:>16.3f}{everything / gibibyte:>14.2f}")
    dense = 4 * 256 * 8192**2 / gibibyte
    print(
        f"P 256, B 8192: the logits of one pair are {dense:.0f} GiB. In slices of 2^27, the default, "
        f"{3 * 4 * 2**27 / gibibyte:.1f} GiB are alive at most, whatever P, B and the number of pairs."
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16, help="observations of the speed comparison")
    parser.add_argument("--patches", type=int, default=256, help="patches per image of the speed comparison")
    parser.add_argument("--width", type=int, default=768, help="width of the embeddings of the speed comparison")
    parser.add_argument("--repeats", type=int, default=5, help="timed repetitions after one warm-up")
    parser.add_argument("--memory-batch", type=int, default=8192, help="observations of the memory measurement")
    parser.add_argument("--memory-patches", type=int, default=2, help="patches; slices do not grow with them")
    parser.add_argument("--memory-width", type=int, default=16, help="width; slices do not grow with it")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads (default: torch's own choice)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--skip-memory", action="store_true", help="only the speed comparison")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    name = torch.cuda.get_device_name() if arguments.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, {name}")
    compare_speed(arguments)
    if not arguments.skip_memory:
        compare_memory(arguments)


if __name__ == "__main__":
    main()
