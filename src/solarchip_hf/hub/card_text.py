"""The words of a card: how to use it, what it is for, where it ends; each follows from the facts."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..models.forecast_window import read_window
from ..models.modalities import MODALITIES
from .card_facts import CardFacts
from .card_results import CardResult

SYNTHETIC_NOTE = (
    "The images were drawn by `SyntheticSun`, a seeded, physically motivated model of the Sun that is written as FITS "
    "files."
)
PAPER = "[arXiv 2511.22958](https://arxiv.org/abs/2511.22958)"
CREDIT = (
    "Data credit of SDO: NASA/SDO and the AIA and HMI science teams. The code is licensed under Apache-2.0. If you use "
    "this, please cite the method's paper together with the software."
)
CITATION = """\
@misc{shen2025solarchip,
  title         = {Contrastive Heliophysical Image Pretraining for Solar Dynamics Observatory Records},
  author        = {Shen, Shiyu and Gao, Zhe and Chai, Taifeng and Huang, Yang and Pan, Bin},
  year          = {2025},
  eprint        = {2511.22958},
  archivePrefix = {arXiv}
}"""

_GEOMETRIES = {
    "rsun": "north up, disk centred, the solar radius fixed at {radius:.2f} px: the same pixel is the same place on "
    "the disk in all channels, whatever the season",
    "arcsec": "north up, disk centred, a fixed plate scale of {scale:.2f} arcsec per pixel",
    "none": "resized only, orientation as in the file",
}
_PHOTOMETRIES = {
    "nominal": "AIA in DN at the channel's nominal exposure (DN x T0 / EXPTIME)",
    "dn": "AIA in the archive's DN, whatever the exposure",
    "dn_per_s": "AIA in DN per second of exposure",
}
_SCALINGS = {
    "log1p": "sign(x) log(1 + |x|)",
    "asinh": "asinh(x)",
    "linear": "no transform",
}
_NOT_OPERATIONAL = (
    "Not for operational warnings or any decision about safety without a validation of your own, on data as they "
    "arrive, by the standards of the service that would rely on it."
)
_NOT_OBSERVATIONS = (
    "**Generated images are not observations.** Do not measure on them what the source image does not determine, and "
    "do not put them into an archive without the mark that the files carry."
)


def labels(names: Sequence[str]) -> str:
    """Channels for readers."""
    return ", ".join(MODALITIES[name].label if name in MODALITIES else name for name in names)


def backbone(config: Mapping[str, Any]) -> str:
    """`"ViT"` or `"CNN"`."""
    return "CNN" if (config.get("backbone_config") or {}).get("model_type") == "solarchip_cnn" else "ViT"


def summary(facts: CardFacts) -> str:
    """What it is, in a paragraph."""
    names = facts.config.get("modalities") or facts.processor.get("modalities") or []
    sdo = "images of the Solar Dynamics Observatory (SDO)"
    if facts.kind == "backbone":
        return (
            f"A SolarCHIP backbone ({PAPER}): a {backbone(facts.config)} autoencoder pretrained contrastively on "
            f"co-temporal {sdo}, so that the same moment and the same place on the Sun lie close together in all "
            f"channels. Channels: {labels(names)}."
        )
    if facts.kind == "flare":
        classes = [str(value) for value in (facts.config.get("id2label") or {}).values()]
        quiet = " (0AB: no flare of C or larger)" if "0AB" in classes else ""
        return (
            f"A forecaster of solar flares on a SolarCHIP backbone ({PAPER}). From a full-disk observation "
            f"({labels(names)}) it gives probabilities of the ordered classes {', '.join(classes)}{quiet}: the "
            f"largest GOES class of a flare that {_window(facts.config)}."
        )
    if facts.kind == "translation":
        return (
            f"A translation between {sdo}: latent diffusion on the latents of a SolarCHIP autoencoder, steered by a "
            f"ControlNet ({PAPER}). {_directions(facts)}"
        )
    return (
        f"Observations of the Sun, prepared for SolarCHIP ({PAPER}): co-temporal {sdo} on one canonical grid, in "
        f"physical units, with what is missing marked. Channels: {labels(names)}."
    )


def _window(config: Mapping[str, Any]) -> str:
    horizon, latency, by = read_window(config.get("forecast_window"))
    hours, delay = (f"{span.total_seconds() / 3600:g} h" for span in (horizon, latency))
    begin = f", from {delay} after the image's nominal time" if latency else " after the image's nominal time"
    return f"{by}s within {hours}{begin}"


def _directions(facts: CardFacts) -> str:
    sources, target = facts.pipeline.get("source_modalities"), facts.pipeline.get("target_modality")
    if not sources or not target:
        return "It draws samples of one channel given others."
    return f"Source: {labels(sources)}. Target, of which it draws samples: {labels([target])}."


def use(facts: CardFacts) -> list[dict[str, str]]:
    """Code that loads and runs it."""
    names = facts.config.get("modalities") or list(MODALITIES)
    first = names[0] if names else "hmi"
    file = example_file(first).rpartition("/")[2]
    if facts.kind == "translation":
        steps = (
            "from solarchip_hf import SolarChipControlNetPipeline\n\n"
            f'pipeline = SolarChipControlNetPipeline.from_pretrained("{facts.repo_id}")\n'
            f'output = pipeline("{_source_file(facts)}", num_samples=8)\n'
            "output.prediction     # the mean of the samples, in physical units\n"
            "output.uncertainty    # their spread"
        )
        return [{"text": "With the package `solarchip_hf`:", "language": "python", "code": steps}]
    task = (
        "import solarchip_hf    # registers the task and the Auto classes\n"
        "from transformers import pipeline\n\n"
        f'forecast = pipeline("solar-flare-forecasting", model="{facts.repo_id}")\n'
        f'forecast("{file}")["exceedance"]    # of C or larger, M or larger, X'
    )
    head = {"backbone": "AutoModel", "flare": "AutoModelForImageClassification"}[facts.kind]
    answer = {
        "backbone": "outputs.pooler_output         # the class token of each image\n"
        "outputs.contrastive_embeds    # class and patch tokens in the space that all channels share",
        "flare": "outputs.logits.softmax(-1)    # before calibration",
    }[facts.kind]

    def code(before: str, option: str) -> str:
        return (
            f"{before}from transformers import AutoImageProcessor, {head}\n\n"
            f'processor = AutoImageProcessor.from_pretrained("{facts.repo_id}"{option})\n'
            f'model = {head}.from_pretrained("{facts.repo_id}"{option})\n'
            f'inputs = processor(["{file}"], return_tensors="pt")\n'
            f"outputs = model(**inputs)\n{answer}"
        )

    with_package = code("import solarchip_hf    # registers the Auto classes\n", "")
    blocks = [
        {
            "text": "With the package `solarchip_hf`; a file is taken as the archive delivers it:",
            "language": "python",
            "code": task if facts.kind == "flare" else with_package,
        }
    ]
    if facts.has_code:
        more = " and diffusers" if backbone(facts.config) == "CNN" else ""
        blocks.append(
            {
                "text": "Without it, by the code of this repository; needs torch, transformers, astropy, "
                f"pillow{more}:",
                "language": "python",
                "code": code("", ", trust_remote_code=True"),
            }
        )
    return blocks


def _source_file(facts: CardFacts) -> str:
    sources = facts.pipeline.get("source_modalities") or ["aia171"]
    return example_file(sources[0]).rpartition("/")[2]


def example_file(name: str) -> str:
    """Where the archive (JSOC) keeps a channel's image of 2024-01-01 00:00."""
    if MODALITIES[name].instrument == "hmi":
        return "https://jsoc1.stanford.edu/data/hmi/fits/2024/01/01/hmi.M_720s.20240101_000000_TAI.fits"
    wavelength, minute = MODALITIES[name].wavelength, 2 if name == "aia1700" else 0
    folder = "https://jsoc1.stanford.edu/data/aia/synoptic/2024/01/01/H0000"
    return f"{folder}/AIA20240101_00{minute:02d}_{wavelength:04d}.fits"


def intended(facts: CardFacts) -> list[str]:
    """What it is for."""
    if facts.kind == "backbone":
        return [
            "Features of full-disk images for research: similarity search, probing, fine-tuning on few labels.",
            "A start for flare forecasting and for translation between channels, with the heads of the package.",
            "Further pretraining on an archive of your own.",
        ]
    if facts.kind == "flare":
        return [
            "Research on full-disk forecasting: probabilities to be scored beside climatology, persistence and the "
            "trailing rate, with intervals from blocks of 27 days.",
            "A reason beside the number: a map on the disk of what in the image speaks for a flare, and what against.",
        ]
    return [
        "Research on how channels of the Sun relate: filling gaps for exploration, augmenting training data that is "
        "marked as such, hypotheses on what one passband tells of another.",
        "Always with the spread of several samples, which says where the source leaves the target open.",
    ]


def limits(facts: CardFacts) -> list[str]:
    """Where it ends; synthetic training comes first."""
    lines = []
    if facts.synthetic:
        lines.append(
            "**Trained on synthetic images**: it shows that the way works, not how well it works on real observations. "
            "Train on the real archive before any use on it."
        )
    elif facts.training or facts.data:
        lines.append("Known for what it was trained on only: other years of the solar cycle, other instruments, and "
                     "degraded or saturated images lie outside.")  # fmt: skip
    if facts.kind == "translation":
        lines.append(_NOT_OBSERVATIONS)
        if facts.pipeline.get("target_modality") == "hmi":
            lines.append("Passbands carry no direct polarity: the sign of a generated field is a guess.")
    if facts.kind == "flare":
        lines.append(
            "The solar cycle inflates skill: compare with a forecast that knows only the cycle's phase, never by "
            "accuracy alone."
        )
    lines.append(_NOT_OPERATIONAL)
    if facts.kind == "backbone":
        lines.append("A feature is not a measurement: what a linear probe reads from it has to be validated.")
    lines.append(
        "Full-disk images of SDO's AIA and HMI only; cut-outs, continuum images and other instruments are refused."
    )
    lines.append("JPEG2000 files of Helioviewer are 8-bit and stretched: they are read, and marked approximate.")
    return lines


def dataset_limits(facts: CardFacts) -> list[str]:
    """Where a dataset ends."""
    manifest = facts.manifest
    lines = ["Values are interpolated once from the archive's pixels; go back to the files for photometry."]
    if manifest.get("failures"):
        lines.append(f"{manifest['failures']} files could not be used; each is listed in `failures.parquet`.")
    if manifest.get("clipped_images"):
        lines.append(f"{manifest['clipped_images']} images hold values beyond float16, stored as 65504 and counted.")
    lines.append("Splits are in time; observations within the gap at their border are labelled so, or left out.")
    return lines


def preprocessing(facts: CardFacts) -> dict[str, Any]:
    """Geometry, units and statistics of the image processor."""
    processor = facts.processor
    if not processor:
        return {"text": "No image processor is saved here, so the units of the inputs are not recorded.", "rows": []}
    size = processor.get("size") or 0
    words = {"radius": 406.67 * size / 1024, "scale": 2.4 * 1024 / size if size else 0.0}
    geometry = _GEOMETRIES.get(str(processor.get("geometry")), "{}").format(processor.get("geometry"), **words)
    degradation = processor.get("degradation")
    name = degradation.get("name") if isinstance(degradation, Mapping) else degradation
    text = (
        f"Every image is resampled once, with anti-aliasing, to {size} x {size} px: {geometry}. "
        f"{_PHOTOMETRIES.get(str(processor.get('photometry')), 'AIA in units that are not recorded')}; HMI in gauss. "
        f"Degradation of the instrument is {f'divided out by the table {name!r}' if name else 'not corrected'}. "
        f"Then {_SCALINGS.get(str(processor.get('scaling')), 'a transform that is not recorded')}, and the z-score of "
        "the table. The image processor does all of this, and its `post_process` goes back to physical units."
    )
    statistics = processor.get("statistics") or {}
    rows = []
    for channel in processor.get("modalities") or []:
        row = (statistics.get("modalities") or {}).get(channel)
        if row:
            mean, std = f"{row['mean']:.4f}", f"{row['std']:.4f}"
            images = (facts.manifest.get("images") or {}).get(channel, "")
            rows.append(
                {
                    "name": channel,
                    "label": labels([channel]),
                    "unit": row["unit"],
                    "mean": mean,
                    "std": std,
                    "images": images,
                }
            )
    source = statistics.get("source")
    return {"text": text, "rows": rows, "statistics": f"Statistics: {source}." if source else ""}


def result_row(result: CardResult) -> dict[str, str]:
    """A row of the table of results."""
    name = result.name or result.metric
    where = result.dataset + (f", {result.split}" if result.split else "")
    if result.synthetic and "synthetic" not in where.lower():
        where += " (synthetic)"
    known = result.low is not None and result.high is not None
    return {
        "name": f"control: {name}" if result.control else name,
        "value": f"{result.value:.3f}",
        "interval": f"{result.low:.3f} to {result.high:.3f}" if known else "",
        "dataset": where,
    }


__all__ = [
    "CITATION",
    "CREDIT",
    "SYNTHETIC_NOTE",
    "backbone",
    "dataset_limits",
    "example_file",
    "intended",
    "labels",
    "limits",
    "preprocessing",
    "result_row",
    "summary",
    "use",
]
