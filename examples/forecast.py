"""Forecasts the largest flare to come, mostly of the next 24 hours, from FITS or JPEG2000 files, with a reason.

    python examples/forecast.py solarchip/flare-vit-tiny hmi.M_720s.20240101_000000_TAI.fits
    python examples/forecast.py solarchip/flare-vit-tiny archive/ --latest 1 --output forecasts.json --figures figures/

The files are put together to observations by time, one a slot of the model's first channel. Prints a table; --output
writes everything as JSON; --figures draws for every observation the Sun in its own colours, overlaid with what speaks
for a flare (integrated gradients), beside a gauge of the probabilities; --maps writes those overlays as FITS files that
sunpy reads. A file that cannot be used is reported with its reason and does not stop the others.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm import tqdm
from transformers import pipeline

import solarchip_hf  # noqa: F401  (registers the task)
from solarchip_hf.data import pair_observations
from solarchip_hf.data.catalog import catalog_frame, find_image_files, read_facts
from solarchip_hf.data.durations import read_duration
from solarchip_hf.hub.command_checks import check_device, check_saved
from solarchip_hf.models.headers import SolarImageError


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a model tuned by finetune_flare.py, or its name on the Hub")
    parser.add_argument("inputs", nargs="+", type=Path, help="FITS or JPEG2000 files, or folders that hold them")
    parser.add_argument("--latest", type=int, help="only so many observations, the latest")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--figures", type=Path, help="folder for a figure an observation")
    parser.add_argument("--maps", type=Path, help="folder for the attributions as FITS files")
    parser.add_argument("--attribution", default="m_plus", help="what to explain: c_plus, m_plus (default) or x_plus")
    parser.add_argument("--steps", type=int, default=32, help="points of the integration (default: 32)")
    parser.add_argument("--tolerance", default="6min", help="largest time difference in an observation (default: 6min)")
    parser.add_argument("--device", default=None, help="torch device; default: the first GPU, else the CPU")
    return parser.parse_args(arguments)


def find_observations(
    files: list[Path], modalities: list[str], tolerance: str
) -> tuple[list[dict[str, str]], list[str]]:
    """Groups files to observations of the model's channels.

    Args:
        files: The files.
        modalities: Channels of the model.
        tolerance: As for `pair_observations`.

    Returns:
        Observations `{modality: path}` in the order of time, and a sentence for each file that was left out.
    """
    rows = []
    for file in tqdm(files, desc="headers", disable=None):
        status = file.stat()
        rows.append({**read_facts(str(file)), "file_size": status.st_size, "mtime_ns": status.st_mtime_ns})
    catalog = catalog_frame(rows)
    refused = [f"{row.path}: {row.reason}" for row in catalog[~catalog["usable"]].itertuples()]
    usable = catalog[catalog["usable"]]
    unknown = ~usable["modality"].isin(modalities)
    refused += [
        f"{row.path}: modality: expected one that the model knows ({', '.join(modalities)}), got {row.modality}."
        for row in usable[unknown].itertuples()
    ]
    usable = usable[~unknown].reset_index(drop=True)
    anchors = [name for name in modalities if (usable["modality"] == name).any()]
    if not anchors:
        return [], refused
    pairs, dropped = pair_observations(usable, tolerance, anchor=anchors[0], modalities=anchors, return_dropped=True)
    refused += [f"{row.path}: {row.dropped}" for row in dropped.itertuples()]
    return [{name: row[name] for name in anchors if pd.notna(row[name])} for _, row in pairs.iterrows()], refused


def print_table(forecasts: list[dict[str, Any]]) -> None:
    """One line a forecast."""
    names = list(forecasts[0]["exceedance"])
    heads = [name.removesuffix("_plus").upper() + "+" for name in names]
    print(f"{'valid from (UTC)':<22}{'until':<22}" + "".join(f"{head:>7}" for head in heads) + "  largest  warnings")
    for forecast in forecasts:
        warned = [head for head, name in zip(heads, names, strict=True) if (forecast["warnings"] or {}).get(name)]
        marks = [mark for mark in ("synthetic", "approximate") if any(image[mark] for image in forecast["images"])]
        verdict = ", ".join(warned) or ("none" if forecast["thresholds"] else "no thresholds")
        print(
            f"{forecast['valid_from'] or 'unknown':<22}{forecast['valid_until'] or 'unknown':<22}"
            + "".join(f"{forecast['exceedance'][name]:>7.3f}" for name in names)
            + f"  {forecast['label']:<8} {verdict}{' (' + ', '.join(marks) + ')' if marks else ''}"
        )
    window = forecasts[0]["window"]
    print(f"A flare counts by its {window['by']}, within {window['horizon']} from 'valid from' on.")
    without = [
        head for head, name in zip(heads, names, strict=True) if name not in (forecasts[0]["thresholds"] or names)
    ]
    if without:
        print(f"The model has no threshold for {', '.join(without)}: the last column never warns of it.")
    if not forecasts[0]["calibrated"]:
        print("The model carries no calibration: these are the network's own probabilities.")


def write_extras(forecast: dict[str, Any], options: argparse.Namespace) -> list[str]:
    """Figure and Maps of a forecast; replaces its attribution by numbers that JSON can hold. Returns what it wrote."""
    from solarchip_hf.hub.flare_figures import forecast_figure

    stamp = "".join(character for character in forecast["valid_from"] or "array" if character.isalnum())
    attribution = forecast["attribution"]
    if options.figures:
        forecast["figure"] = str(options.figures / f"forecast_{stamp}.png")
        forecast_figure(forecast, forecast["figure"])
    if options.maps:
        options.maps.mkdir(parents=True, exist_ok=True)
        forecast["maps"] = {}
        for name in attribution.maps:
            path = options.maps / f"{attribution.target}_{name}_{stamp}.fits"
            attribution.to_map(name).save(path, overwrite=True)
            forecast["maps"][name] = str(path)
    forecast["attribution"] = {
        "target": attribution.target,
        "log_odds": attribution.log_odds,
        "baseline_log_odds": attribution.baseline_log_odds,
        "residual": attribution.residual,
        "peaks_arcsec": {name: attribution.peaks(name) for name in attribution.maps},
    }
    return [path for path in (forecast.get("figure"), *forecast.get("maps", {}).values()) if path]


def forecast_files(options: argparse.Namespace) -> int:
    """Runs the command; returns the exit status (0 all used, 1 some refused, 2 none usable)."""
    for flag in ("latest", "steps"):
        if getattr(options, flag) is not None and getattr(options, flag) < 1:
            raise ValueError(f"--{flag}: expected at least 1, got {getattr(options, flag)}.")
    read_duration(options.tolerance, "--tolerance")
    for flag in ("output", "figures", "maps"):
        path = getattr(options, flag)
        if path and not path.absolute().parent.is_dir():
            raise FileNotFoundError(
                f"--{flag}: expected a place in a folder that exists, got {path}. Make that folder."
            )
        if path and path.exists() and path.is_dir() == (flag == "output"):
            raise FileExistsError(f"--{flag}: expected a {'file' if flag == 'output' else 'folder'}, got {path}.")
    if options.device is not None:
        check_device(options.device)
    check_saved(options.model, "flare model")
    refused: list[str] = []
    files = find_image_files(options.inputs, refused)
    explain = bool(options.figures or options.maps or options.output)
    forecaster = pipeline("solar-flare-forecasting", model=options.model, device=options.device)
    if explain and options.attribution not in forecaster.events:
        raise ValueError(f"--attribution: expected one of {', '.join(forecaster.events)}, got {options.attribution!r}.")
    observations, unusable = find_observations(files, list(forecaster.model.config.modalities), options.tolerance)
    refused += unusable
    if options.latest:
        observations = observations[-options.latest :]
    forecasts, written = [], []
    for observation in tqdm(observations, desc="forecasts", disable=None):
        try:
            asked = {"attribution": options.attribution, "attribution_steps": options.steps} if explain else {}
            forecasts.append(forecaster(observation, **asked))
        except (SolarImageError, OSError) as error:
            refused.append(str(error))
            continue
        if explain:
            written += write_extras(forecasts[-1], options)
    for reason in refused:
        print(f"refused  {reason}", file=sys.stderr)
    if not forecasts:
        print("No observation could be used.", file=sys.stderr)
        return 2
    print_table(forecasts)
    if options.output:
        partial = options.output.with_name(options.output.name + ".partial")
        partial.write_text(json.dumps({"model": options.model, "forecasts": forecasts, "refused": refused}, indent=2))
        os.replace(partial, options.output)
        written.append(str(options.output))
    print(*(f"written: {path}" for path in written), sep="\n", end="\n" * bool(written))
    return 1 if refused else 0


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; bad input ends in one sentence and status 2."""
    options = parse_arguments(arguments)
    try:
        return forecast_files(options)
    except (OSError, ValueError) as error:
        print(f"forecast.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
