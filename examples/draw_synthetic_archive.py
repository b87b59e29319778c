"""Draws a synthetic archive of SDO images as FITS files, with its flare report and a contact sheet.

    python examples/draw_synthetic_archive.py --output archive --start 2014-01-01 --end 2014-02-01 --cadence 1D

The files have the names, folders and headers of JSOC's archives, so that everything in this package that reads real
files reads these too. They are drawn by a model of the Sun, and their headers say so: results on them are results on a
synthetic Sun. An interrupted run is continued by running the same command again.
"""

import argparse
import logging
import sys
from pathlib import Path

import pandas as pd

from solarchip_hf.data.durations import read_duration, read_time
from solarchip_hf.data.synthetic_sun import SyntheticSun
from solarchip_hf.data.synthetic_sun.figures import contact_sheet
from solarchip_hf.models.modalities import MODALITY_NAMES, resolve_modality


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the archive; made if absent")
    parser.add_argument(
        "--start",
        default="2014-01-01",
        help="first slot, UTC (of HMI TAI); activity peaks in 2014, as it did (%(default)s)",
    )
    parser.add_argument("--end", default="2014-02-01", help="end of the slots, exclusive, UTC (%(default)s)")
    parser.add_argument("--cadence", default="1D", help="time between slots: 1D, 6h, 12min, ... (%(default)s)")
    parser.add_argument("--size", type=int, default=128, help="pixels across; the archives: 1024, 4096 (%(default)s)")
    parser.add_argument(
        "--modalities",
        nargs="+",
        default=list(MODALITY_NAMES),
        metavar="NAME",
        help="channels to draw, such as: hmi 171 aia304 (all eleven)",
    )
    parser.add_argument("--seed", type=int, default=0, help="another seed is another Sun (%(default)s)")
    parser.add_argument("--workers", type=int, default=1, help="processes that draw (%(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="draw again what is there already")
    return parser.parse_args(arguments)


def draw(options: argparse.Namespace) -> pd.DataFrame:
    """Draws the archive; returns a row a file.

    Raises:
        ValueError: A time, a cadence or a channel that cannot be read, or an empty span.
    """
    start, end = (read_time(getattr(options, name), f"--{name}").tz_localize(None) for name in ("start", "end"))
    cadence = read_duration(options.cadence, "--cadence")
    if options.output.is_file():
        raise NotADirectoryError(f"--output: expected a folder, got the file {options.output}.")
    if not end > start:
        raise ValueError(f"--end: expected a time after --start {options.start}, got {options.end}.")
    sun = SyntheticSun(seed=options.seed, start=start, days=(end - start) / pd.Timedelta("1D"), size=options.size)
    names = [resolve_modality(alias) for alias in options.modalities]
    files = sun.write_archive(
        options.output,
        sun.times(cadence),
        names,
        workers=options.workers,
        overwrite=options.overwrite,
    )
    written, megabytes = int(files["written"].sum()), sum(Path(path).stat().st_size for path in files["path"]) / 1e6
    print(f"{written} files written, {len(files) - written} kept, {megabytes:.1f} MB in {options.output}")

    span = f"s{start:%Y%m%d}_e{end:%Y%m%d}"  # an archive may be drawn in parts, each with a list of its own
    report = options.output / f"synthetic_flare_report_{span}.csv"
    # a day more than the images: the last of them is to be labelled by what follows it
    flares = sun.flares(start, end + pd.Timedelta("1D"))
    partial = report.with_suffix(".partial")
    flares.to_csv(partial, index=False)
    partial.replace(report)
    classes = flares["flare_class"].str[0].value_counts()
    counts = ", ".join(f"{classes[letter]} {letter}" for letter in "XMCB" if letter in classes) or "none"
    print(f"{len(flares)} synthetic flares ({counts}) in {report}")

    sheet = options.output / f"contact_sheet_{span}.png"
    slots = files["time_nominal"].drop_duplicates()
    shown = slots.iloc[[round(k * (len(slots) - 1) / 3) for k in range(min(4, len(slots)))]].drop_duplicates()
    contact_sheet(sun, shown, names).savefig(sheet, dpi=110)
    print(f"contact sheet in {sheet}")
    return files


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns the exit code: 2 where what was given cannot be used."""
    try:
        draw(parse_arguments(arguments))
    except (ValueError, OSError) as error:
        print(f"draw_synthetic_archive.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    sys.exit(main())
