"""What a model weighs: parameters and training state of each named size and weight sharing, and one measured step.

    python benchmarks/memory.py                                        # the table; nothing is allocated
    python benchmarks/memory.py --measure vit-base --weight_sharing shared --modalities aia171 aia304

Training state is what AdamW in float32 keeps a parameter: weight, gradient and two moments, 16 bytes. Activations come
on top; `--measure` runs one optimisation step in a process of its own and prints the peak of its resident memory.
"""

import argparse
import resource
import time

import torch

from solarchip_hf import MODALITY_NAMES, SolarChipConfig, SolarChipForPreTraining

SIZES = ("vit-tiny", "vit-small", "vit-base", "vit-large", "cnn-base")
SHARINGS = ("shared", "instrument", "modality")
BYTES_PER_PARAMETER = 16
GIB = 2**30


def parameters(name: str, sharing: str, modalities: list[str]) -> int:
    """Number of parameters of a pretraining model, counted without allocating it."""
    config = SolarChipConfig.from_name(name, weight_sharing=sharing, modalities=modalities)
    with torch.device("meta"):
        model = SolarChipForPreTraining(config)
    return sum(parameter.numel() for parameter in model.parameters())


def table(modalities: list[str]) -> str:
    """Markdown: a row a size, a column a weight sharing, with millions of parameters and GiB of training state."""
    lines = [f"| size | {' | '.join(SHARINGS)} |", "|---" * (len(SHARINGS) + 1) + "|"]
    for name in SIZES:
        counts = [parameters(name, sharing, modalities) for sharing in SHARINGS]
        cells = [f"{count / 1e6:.1f} M, {count * BYTES_PER_PARAMETER / GIB:.2f} GiB" for count in counts]
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def measure(name: str, sharing: str, modalities: list[str], batch: int) -> str:
    """One AdamW step on random observations; says its time and the peak resident memory of the process."""
    torch.manual_seed(0)
    anchor = "hmi" if "hmi" in modalities else modalities[0]
    config = SolarChipConfig.from_name(name, weight_sharing=sharing, modalities=modalities, anchor_modality=anchor)
    model = SolarChipForPreTraining(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    pixel_values = torch.randn(batch, len(modalities), config.image_size, config.image_size)
    begin = time.perf_counter()
    model(pixel_values).loss.backward()
    optimizer.step()
    seconds = time.perf_counter() - begin
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB  # kilobytes on Linux
    return (
        f"{name}, {sharing}, {len(modalities)} modalities at {config.image_size} px, batch {batch}: one step in "
        f"{seconds:.1f} s, peak resident memory {peak:.2f} GiB (torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads)"
    )


def main() -> None:
    """Prints the table, or one measured step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modalities", nargs="+", default=list(MODALITY_NAMES), help="default: all eleven")
    parser.add_argument("--measure", choices=SIZES, help="run one training step of this size")
    parser.add_argument("--weight_sharing", choices=SHARINGS, default="shared", help="for --measure (default: shared)")
    parser.add_argument("--batch_size", type=int, default=1, help="observations, for --measure (default: 1)")
    options = parser.parse_args()
    if options.measure:
        print(measure(options.measure, options.weight_sharing, options.modalities, options.batch_size))
    else:
        print(f"{len(options.modalities)} modalities; parameters, and their state in training with AdamW in float32:\n")
        print(table(options.modalities))


if __name__ == "__main__":
    main()
