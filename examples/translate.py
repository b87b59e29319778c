"""Generate what another channel would have seen: FITS files in, FITS files and a figure out.

    python examples/translate.py solarchip/hmi-to-aia171 hmi.M_720s.20240101_000000_TAI.fits --output generated
    python examples/translate.py solarchip/hmi-to-aia171 archive/hmi --output generated --num_samples 16 --seed 1

For every observation it writes `<source>_to_<target>.fits`, the mean over the samples, with the source's coordinates
and time and cards that say that it is generated, `..._uncertainty.fits`, their spread, and a figure; `--write_samples`
writes the samples too. The files of a pipeline of several sources are told apart by their headers; a file of the first
source goes with the nearest in time of every other one, an hour away at most. A file that cannot be used is reported
with its reason and does not stop the others.
"""

import argparse
import sys
from pathlib import Path

import pandas as pd
import torch
from tqdm import tqdm

from solarchip_hf import SolarChipControlNetPipeline, SolarImageError, read_image
from solarchip_hf.data.catalog import find_image_files
from solarchip_hf.hub.command_checks import check_device, check_saved
from solarchip_hf.models.image_processing_solarchip import LONGEST_DIFFERENCE
from solarchip_hf.translation import build_scheduler, write_fits
from solarchip_hf.translation.figures import translation_figure


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipeline", help="folder of a saved pipeline, or its name on the Hub")
    parser.add_argument("inputs", nargs="+", type=Path, help="FITS or JPEG2000 files, or folders that hold them")
    parser.add_argument("--output", type=Path, required=True, help="folder to write to; made if absent")
    parser.add_argument("--num_samples", type=int, default=8, help="samples an observation (default: 8)")
    parser.add_argument("--num_inference_steps", type=int, default=20, help="denoising steps (default: 20)")
    parser.add_argument("--guidance_scale", type=float, default=1.0, help="weight of the sources (default: 1)")
    parser.add_argument("--scheduler", choices=("unipc", "dpm++", "ddim"), help="default: the one that was saved")
    parser.add_argument("--seed", type=int, default=0, help="of the first sample; the next ones count on (default: 0)")
    parser.add_argument("--batch_size", type=int, default=8, help="samples denoised together (default: 8)")
    parser.add_argument("--write_samples", action="store_true", help="write every sample as a FITS file too")
    parser.add_argument("--no_figure", action="store_true", help="write FITS files only")
    parser.add_argument("--overwrite", action="store_true", help="replace files that are there already")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="torch device")
    return parser.parse_args(arguments)


def group_files(files: list[Path], sources: list[str], refused: list[str]) -> list[dict[str, Path]]:
    """Files as observations: one a file for a single source, else files of all sources that are nearest in time.

    Args:
        files: Of all sources.
        sources: The pipeline's sources, in order.
        refused: Gets a sentence for every file that belongs to no observation.
    """
    if len(sources) == 1:
        return [{sources[0]: file} for file in files]
    rows = []
    for file in files:
        try:
            facts = read_image(file, header_only=True)
        except (SolarImageError, OSError) as error:
            refused.append(str(error))
            continue
        if facts.modality not in sources or facts.time is None:
            got = facts.modality if facts.time is not None else "one without a time"
            refused.append(f"{file}: expected an image of {', '.join(sources)} with its time, got {got}.")
        else:
            rows.append((facts.modality, pd.Timestamp(facts.time), file))
    found = pd.DataFrame(rows, columns=["modality", "time", "file"]).sort_values("time", kind="stable")
    found["time"] = pd.to_datetime(found["time"], utc=True)
    paired = found[found["modality"] == sources[0]][["time", "file"]].rename(columns={"file": sources[0]})
    for name in sources[1:]:
        other = found[found["modality"] == name][["time", "file"]].rename(columns={"file": name})
        other[f"{name} time"] = other["time"]
        paired = pd.merge_asof(paired, other, on="time", direction="nearest", tolerance=LONGEST_DIFFERENCE)
        distance = (paired[f"{name} time"] - paired["time"]).abs()
        # A file serves once: the nearest of those that would have it.
        paired = paired.assign(distance=distance).dropna(subset=[name]).sort_values("distance", kind="stable")
        paired = paired.drop_duplicates(name).sort_values("time", kind="stable").drop(columns="distance")
    observations = [dict(zip(sources, row, strict=True)) for row in paired[sources].itertuples(index=False)]
    used = {file for images in observations for file in images.values()}
    hours = LONGEST_DIFFERENCE.total_seconds() / 3600
    for row in found[~found["file"].isin(used)].itertuples():
        others = ", ".join(name for name in sources if name != row.modality)
        refused.append(f"{row.file}: expected a file of {others} of its own within {hours:g} h of it, got none.")
    return observations


class Translator:
    """Translates observations one after the other and writes what comes out."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.pipeline = SolarChipControlNetPipeline.from_pretrained(options.pipeline).to(options.device)
        self.pipeline.set_progress_bar_config(disable=True)
        if options.scheduler:
            kind = self.pipeline.scheduler.config.prediction_type
            self.pipeline.scheduler = build_scheduler(options.scheduler, prediction_type=kind)
        self.sources = list(self.pipeline.config.source_modalities)
        self.target = self.pipeline.config.target_modality
        self.written: dict[Path, Path] = {}  # what this run wrote, from which file

    def outputs(self, stem: str) -> dict[str, Path]:
        """Where the parts of an observation go, by what they are."""
        many, base = self.options.num_samples, f"{stem}_to_{self.target}"
        parts = {"prediction": f"{base}.fits"}
        if many > 1:
            parts["uncertainty"] = f"{base}_uncertainty.fits"
        if self.options.write_samples:
            parts |= {f"sample {index}": f"{base}_sample{index + 1:02d}.fits" for index in range(many)}
        if not self.options.no_figure:
            parts["figure"] = f"{base}.png"
        return {kind: self.options.output / name for kind, name in parts.items()}

    def translate(self, images: dict[str, Path]) -> list[Path]:
        """Translates one observation.

        Raises:
            SolarImageError: An image cannot be translated.
            FileExistsError: Something would be overwritten.
        """
        options = self.options
        file = images[self.sources[0]]
        paths = self.outputs(file.name.split(".fits")[0].removesuffix(".jp2"))
        twin = next((self.written[path] for path in paths.values() if path in self.written), None)
        if twin is not None:
            raise FileExistsError(
                f"{file}: expected a name of its own, got that of {twin}, whose outputs it would replace. Translate it "
                "with another --output."
            )
        there = [str(path) for path in paths.values() if path.exists()]
        if there and not options.overwrite:
            raise FileExistsError(f"{there[0]}: is there already; choose another --output, or pass --overwrite.")
        seeds = range(options.seed, options.seed + options.num_samples)
        output = self.pipeline(
            file if len(images) == 1 else images,
            num_inference_steps=options.num_inference_steps,
            guidance_scale=options.guidance_scale,
            num_samples=options.num_samples,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            batch_size=options.batch_size,
            output_type="map",
        )
        self.written |= dict.fromkeys(paths.values(), file)
        parts = {"prediction": output.prediction[0]}
        if output.uncertainty is not None:
            parts["uncertainty"] = output.uncertainty[0]
        parts |= {f"sample {index}": image for index, image in enumerate(output.samples[0])}
        for kind, path in paths.items():
            if kind != "figure":
                write_fits(parts[kind], path, overwrite=options.overwrite)
        if "figure" in paths:
            self.draw(images, parts, paths["figure"])
        return list(paths.values())

    def draw(self, images: dict[str, Path], parts: dict, path: Path) -> None:
        """Writes the figure of one observation."""
        processor = self.pipeline.image_processor
        given = {}
        for name, file in images.items():
            facts, physical = processor.to_physical(file, name)
            given[name] = processor.to_map(physical, name, facts)
        model, revision = self.pipeline.identity
        creators = [value for card, value in parts["prediction"].meta.items() if card.lower().startswith("srccre")]
        synthetic = any("SyntheticSun" in value for value in creators)
        made = "generated from a SYNTHETIC image, not observed" if synthetic else "generated, not observed"
        title = f"{model} ({revision[:12]}), {parts['prediction'].date.isot[:19]}: {made}"
        figure = translation_figure(given, parts["prediction"], parts.get("uncertainty"), self.target, title)
        partial = path.with_name(f".{path.name}.part")
        figure.savefig(partial, format="png")
        partial.replace(path)


def translate(options: argparse.Namespace) -> int:
    """Runs the command; returns the exit status (0 all translated, 1 some refused, 2 none)."""
    if options.output.is_file():
        raise NotADirectoryError(f"--output: expected a folder, got the file {options.output}.")
    check_device(options.device)
    check_saved(options.pipeline, "pipeline", argument="pipeline")
    refused: list[str] = []
    files = find_image_files(options.inputs, refused)
    translator = Translator(options)
    observations = group_files(files, translator.sources, refused)
    written = 0
    for images in tqdm(observations, desc="translating", unit="observation", disable=not sys.stderr.isatty()):
        try:
            paths = translator.translate(images)
        except (SolarImageError, OSError) as error:
            refused.append(str(error))
            continue
        written += 1
        print("\n".join(f"written: {path}" for path in paths))
    for reason in refused:
        print(f"refused  {reason}", file=sys.stderr)
    if not written:
        print("No observation could be translated.", file=sys.stderr)
        return 2
    return 1 if refused else 0


def main() -> None:
    """Runs the command; bad input ends in one sentence and status 2."""
    options = parse_arguments()
    try:
        sys.exit(translate(options))
    except (OSError, ValueError, ImportError) as error:
        print(f"translate.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
