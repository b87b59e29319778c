"""Few steps of a modern scheduler against 100 of DDIM, and how many samples a second batches give.

    python benchmarks/translation.py                                   # random weights: speed only
    python benchmarks/translation.py --pipeline runs/hmi-to-aia171 --dataset prepared --split test

All schedulers start from the same noise, on the same images, in this process. With a trained pipeline and a prepared
dataset the correlation with the truth is printed (within 0.95 R, radial profile removed, mean over the images), and the
run fails if neither UniPC nor DPM++ comes within 0.01 of DDIM in a quarter of its time. Without them the networks are
random and the images synthetic: then only the times mean something.
"""

import argparse
import statistics
import sys
import time

import numpy as np
import torch

from solarchip_hf import (
    SolarChipConfig,
    SolarChipControlNetPipeline,
    SolarChipForPreTraining,
    SolarChipImageProcessor,
    SyntheticSun,
    load_observations,
)
from solarchip_hf.evaluation.translation_fidelity.image_scores import image_scores
from solarchip_hf.translation import build_controlnet, build_prior, build_scheduler, latent_shape

LARGEST_LOSS = 0.01  # of correlation
SMALLEST_GAIN = 4.0  # in time


def random_pipeline() -> SolarChipControlNetPipeline:
    """HMI to AIA 171 at 128 px with random weights, of the sizes that a laptop trains."""
    torch.manual_seed(0)
    modalities = ["hmi", "aia171"]
    autoencoder = SolarChipForPreTraining(SolarChipConfig.from_name("vit-tiny", modalities=modalities)).eval()
    shape = latent_shape(autoencoder.config)
    prior = build_prior(shape)
    return SolarChipControlNetPipeline(
        autoencoder=autoencoder,
        unet=prior.eval(),
        controlnet=build_controlnet(prior, shape[0]).eval(),
        scheduler=build_scheduler("unipc"),
        image_processor=SolarChipImageProcessor(modalities=modalities, size=128),
        source_modalities=["hmi"],
        target_modality="aia171",
        latent_mean={name: [0.0] * shape[0] for name in modalities},
        latent_std={name: [1.0] * shape[0] for name in modalities},
    )


def synthetic_images(pipeline, count):
    """Images of a synthetic Sun on the canonical grid: {modality: (N, H, H)}."""
    size = pipeline.image_processor.size
    sun = SyntheticSun(seed=0, start="2014-01-01", days=2 * count, size=size)
    names = [*pipeline.config.source_modalities, pipeline.config.target_modality]
    drawn = [sun.observe(moment, names) for moment in sun.times("2D")[:count]]
    return {name: np.stack([images[name] for images in drawn]) for name in names}


def dataset_images(pipeline, folder, split, count):
    """Images of a prepared dataset, evenly spread over a split: {modality: (N, H, H)}."""
    names = [*pipeline.config.source_modalities, pipeline.config.target_modality]
    observations = load_observations(folder, modalities=names, processor=pipeline.image_processor)
    split = split or ("test" if "test" in observations.manifest["splits"] else "validation")
    whole = np.flatnonzero(observations.observed.all(axis=1) & (observations.metadata["split"] == split).to_numpy())
    if not len(whole):
        raise ValueError(f"{folder}: expected observations of {', '.join(names)} in {split!r}, got none.")
    rows = whole[np.linspace(0, len(whole) - 1, min(count, len(whole))).round().astype(int)]
    drawn = [observations.physical(int(row)) for row in rows]
    return {name: np.stack([np.asarray(images[name], dtype=np.float32) for images in drawn]) for name in names}


def sample(pipeline, images, steps, arguments, batch_size=None):
    """Seconds of a call and its (N, H, H) predictions; every sample has a generator of its own."""
    sources = list(pipeline.config.source_modalities)
    given = np.stack([images[name] for name in sources], axis=1)
    count = len(given) * arguments.num_samples
    generators = [torch.Generator().manual_seed(seed) for seed in range(count)]
    start = time.perf_counter()
    output = pipeline(
        given,
        num_inference_steps=steps,
        guidance_scale=arguments.guidance_scale,
        num_samples=arguments.num_samples,
        generator=generators,
        batch_size=batch_size or arguments.batch_size,
        output_type="np",
    )
    if arguments.device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, output.prediction


def correlation(predictions, truth):
    """Mean over the images of the correlation within 0.95 R, each image's radial profile removed."""
    pairs = zip(predictions, truth, strict=True)
    return float(np.nanmean([image_scores(*pair, data_range=1.0)["correlation_disk"] for pair in pairs]))


def compare_schedulers(pipeline, images, arguments):
    """Prints the table of schedulers; returns whether a fast one keeps up with the slow one."""
    truth = images[pipeline.config.target_modality]
    kind = pipeline.scheduler.config.prediction_type
    runs = {
        f"DDIM, {arguments.reference_steps} steps": ("ddim", arguments.reference_steps),
        f"UniPC, {arguments.steps} steps": ("unipc", arguments.steps),
        f"DPM++, {arguments.steps} steps": ("dpm++", arguments.steps),
    }
    results = {}
    for label, (name, steps) in runs.items():
        pipeline.scheduler = build_scheduler(name, prediction_type=kind)
        sample(pipeline, {key: value[:1] for key, value in images.items()}, 2, arguments)  # warms up
        timed = [sample(pipeline, images, steps, arguments) for _ in range(arguments.repeats)]
        results[label] = (statistics.median(seconds for seconds, _ in timed), timed[0][1])
    (slow, reference), *_ = results.values()
    base = correlation(reference, truth)
    print(f"\n{len(truth)} images, {arguments.num_samples} samples each, guidance {arguments.guidance_scale:g}")
    print(f"{'scheduler':<18} {'s / image':>10} {'times DDIM':>11} {'corr. truth':>12} {'corr. DDIM':>11}")
    kept = False
    for label, (seconds, predictions) in results.items():
        score, alike = correlation(predictions, truth), correlation(predictions, reference)
        print(f"{label:<18} {seconds / len(truth):>10.3f} {slow / seconds:>11.2f} {score:>12.4f} {alike:>11.4f}")
        kept |= slow / seconds >= SMALLEST_GAIN and score >= base - LARGEST_LOSS
    return kept


def measure_batches(pipeline, images, arguments):
    """Prints samples a second by batch size, with the fast scheduler."""
    pipeline.scheduler = build_scheduler("unipc", prediction_type=pipeline.scheduler.config.prediction_type)
    largest = max(arguments.batch_sizes)
    given = {name: np.resize(stack, (largest, *stack.shape[1:])) for name, stack in images.items()}
    print(f"\nUniPC, {arguments.steps} steps\n{'batch':>6} {'samples / s':>12}")
    for batch_size in arguments.batch_sizes:
        seconds = min(
            sample(pipeline, given, arguments.steps, arguments, batch_size)[0] for _ in range(arguments.repeats)
        )
        print(f"{batch_size:>6} {largest * arguments.num_samples / seconds:>12.2f}")


def run(arguments):
    """Prints both tables; returns the exit status: 1 where a trained pipeline misses the targets."""
    if arguments.pipeline:
        pipeline = SolarChipControlNetPipeline.from_pretrained(arguments.pipeline)
    else:
        pipeline = random_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    pipeline.to(arguments.device)
    parts = [sum(weight.numel() for weight in part.parameters()) / 1e6 for part in (pipeline.unet, pipeline.controlnet)]
    print(
        f"{', '.join(pipeline.config.source_modalities)} to {pipeline.config.target_modality}, prior {parts[0]:.1f} M, "
        f"ControlNet {parts[1]:.1f} M, {pipeline.image_processor.size} px, {arguments.device}, "
        f"{torch.get_num_threads()} threads, {'trained' if arguments.pipeline else 'random'} weights, "
        f"{'dataset ' + arguments.dataset if arguments.dataset else 'synthetic'} images"
    )
    if arguments.dataset:
        images = dataset_images(pipeline, arguments.dataset, arguments.split, arguments.images)
    else:
        images = synthetic_images(pipeline, arguments.images)
    kept = compare_schedulers(pipeline, images, arguments)
    if arguments.batch_sizes:
        measure_batches(pipeline, images, arguments)
    if arguments.pipeline and arguments.dataset:
        text = f"correlation within {LARGEST_LOSS} of DDIM's in 1/{SMALLEST_GAIN:g} of its time"
        print(f"\n{'OK' if kept else 'FAILED'}: {text}")
        return 0 if kept else 1
    return 0


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--pipeline", help="folder of a saved pipeline, or its name on the Hub; default: random weights"
    )
    parser.add_argument("--dataset", help="folder of a prepared dataset; default: synthetic images")
    parser.add_argument("--split", help="part of the dataset; default: test, or validation where there is no test")
    parser.add_argument("--images", type=int, default=2, help="images to translate (default: 2)")
    parser.add_argument("--num_samples", type=int, default=1, help="samples an image (default: 1)")
    parser.add_argument("--guidance_scale", type=float, default=1.0, help="weight of the sources (default: 1)")
    parser.add_argument("--steps", type=int, default=20, help="steps of the fast schedulers (default: 20)")
    parser.add_argument("--reference_steps", type=int, default=100, help="steps of DDIM (default: 100)")
    parser.add_argument("--batch_size", type=int, default=4, help="samples denoised together (default: 4)")
    parser.add_argument(
        "--batch_sizes", type=int, nargs="*", default=[1, 2, 4, 8], help="for the throughput; none: skip"
    )
    parser.add_argument("--repeats", type=int, default=2, help="timings of each (default: 2)")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    try:
        sys.exit(run(arguments))
    except (OSError, ValueError) as error:
        print(f"translation.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
