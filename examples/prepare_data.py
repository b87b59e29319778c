"""From an archive of FITS and JPEG2000 files to a dataset that trains: scan, pair, prepare.

    python examples/prepare_data.py scan ARCHIVE --index catalog.parquet
    python examples/prepare_data.py pair catalog.parquet --output pairs.parquet --anchor hmi --tolerance 6min
    python examples/prepare_data.py prepare pairs.parquet prepared/ --size 512 --train-end 2019-01-01

`scan --format sdoml STORE ...` and `scan --format surya INDEX.csv` take the Zarr stores of SDOML v2 (folders or s3://
addresses) and Surya's core-sdo instead of a folder of files.

`prepare` also takes the archive's folder itself, and then scans and pairs first. Every step may be interrupted and
called again: `scan` reads only files that are new or changed, `prepare` does the shards that are missing.
"""

import argparse
import logging
import sys
from pathlib import Path

import pandas as pd

from solarchip_hf import SolarChipImageProcessor
from solarchip_hf.data import (
    load_observations,
    pair_observations,
    prepare_dataset,
    read_catalog,
    scan_archive,
    scan_sdoml,
    scan_surya,
)
from solarchip_hf.data.catalog import write_catalog
from solarchip_hf.data.durations import read_duration, read_time
from solarchip_hf.data.sources import merge_catalogs


def scan(arguments: argparse.Namespace) -> None:
    """Reads headers into a catalogue and says what was found."""
    if arguments.format == "files":
        if len(arguments.folder) > 1:
            raise ValueError(f"folder: expected one root of an archive of files, got {arguments.folder}.")
        (folder,) = arguments.folder
        catalog = scan_archive(folder, index=arguments.index, workers=arguments.workers)
    else:
        tables = [scan_sdoml(arguments.folder)] if arguments.format == "sdoml" else map(scan_surya, arguments.folder)
        catalog = merge_catalogs(tables)
        write_catalog(catalog, Path(arguments.index))
    report = catalog.attrs["report"]
    print(f"{report['files']} files: {report['read']} read now, {report['kept']} known, {report['gone']} gone")
    usable = catalog[catalog["usable"]]
    if len(usable):
        table = usable.groupby("modality")["time"].agg(["count", "min", "max"])
        print(table.to_string())
    refused = catalog[~catalog["usable"]]
    if len(refused):
        print(f"\n{len(refused)} files are not usable:")
        for path, reason in refused[["path", "reason"]].head(arguments.show).itertuples(index=False):
            print(f"  {path}: {reason}")
        if len(refused) > arguments.show:
            print(f"  ... and {len(refused) - arguments.show} more: see the column `reason` of {arguments.index}")


def pair(arguments: argparse.Namespace) -> None:
    """Groups the catalogue's files into observations and says what was left out."""
    for flag, path in (("output", arguments.output), ("dropped", arguments.dropped)):
        if path and not Path(path).absolute().parent.is_dir():
            raise FileNotFoundError(f"--{flag}: expected a file in a folder that exists, got {path}.")
    pairs, dropped = pair_observations(
        read_catalog(arguments.catalog),
        arguments.tolerance,
        anchor=arguments.anchor,
        modalities=arguments.modalities,
        near_real_time=not arguments.science_only,
        approximate=not arguments.no_quicklooks,
        min_observed=arguments.min_observed,
        return_dropped=True,
    )
    pairs.to_parquet(arguments.output)
    if arguments.dropped:
        dropped.to_parquet(arguments.dropped)
    print_pairing(pairs)


def print_pairing(pairs: pd.DataFrame) -> None:
    """Prints the report of a pairing."""
    report = pairs.attrs["report"]
    print(
        f"{report['files']} files, {report['candidates']} candidates, {report['used']} used in "
        f"{report['observations']} observations ({report['complete']} complete)"
    )
    for reason, count in report["dropped"].items():
        print(f"  dropped {count}: {reason}")
    for name, count in report["missing"].items():
        print(f"  {name}: there in {report['observations'] - count}, missing in {count}")


def prepare(arguments: argparse.Namespace) -> None:
    """Registers and writes the observations, and says what came of it."""
    read_duration(arguments.tolerance, "--tolerance")
    read_duration(arguments.gap, "--gap", zero=True)
    train_end = None if arguments.train_end is None else read_time(arguments.train_end, "--train-end")
    degradation = arguments.degradation
    processor = SolarChipImageProcessor(
        size=arguments.size, geometry=arguments.geometry, photometry=arguments.photometry, degradation=degradation
    )
    if Path(arguments.output).is_file():
        raise NotADirectoryError(f"output: expected a folder, got the file {arguments.output}.")
    pairs: Path | pd.DataFrame = Path(arguments.source)
    if not pairs.is_dir():
        try:
            pairs = pd.read_parquet(pairs)
        except (OSError, ValueError) as error:
            wanted = "the table that `pair` wrote, or the archive's folder"
            raise ValueError(f"source: expected {wanted}, got {arguments.source} ({error}).") from error
    manifest = prepare_dataset(
        pairs,
        arguments.output,
        processor,
        train_end=train_end,
        gap=arguments.gap,
        dtype=arguments.dtype,
        anchor=arguments.anchor,
        tolerance=arguments.tolerance,
        modalities=arguments.modalities,
        workers=arguments.workers,
        scheduler=arguments.scheduler,
        overwrite=arguments.overwrite,
        retry_failures=arguments.retry_failures,
    )
    print(f"{manifest['observations']} observations in {len(manifest['shards'])} shards: {manifest['splits']}")
    for name, row in manifest["statistics"]["modalities"].items():
        print(f"  {name}: {manifest['images'][name]} images, mean {row['mean']:.4f}, std {row['std']:.4f}")
    if manifest["failures"]:
        failures = pd.read_parquet(Path(arguments.output) / "failures.parquet")
        print(f"{len(failures)} files could not be used (all in failures.parquet):")
        for source, reason in failures[["source", "reason"]].head(arguments.show).itertuples(index=False):
            print(f"  {source}: {reason}")
    first = load_observations(arguments.output)[0]["pixel_values"]
    print(f"load_observations({arguments.output!r})[0]['pixel_values']: {tuple(first.shape)} {first.dtype}")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--show", type=int, default=20, help="how many refused files to print (default 20)")
    commands = parser.add_subparsers(required=True, metavar="scan | pair | prepare")

    one = commands.add_parser("scan", help="read headers into a catalogue")
    one.add_argument("folder", nargs="+", help="root of the archive; stores or indices of the other formats")
    one.add_argument("--format", default="files", choices=["files", "sdoml", "surya"], help="default %(default)s")
    one.add_argument("--index", default="catalog.parquet", help="the catalogue, read and written (default %(default)s)")
    one.add_argument("--workers", type=int, help="reading processes (default: the number of cores)")
    one.set_defaults(run=scan)

    two = commands.add_parser("pair", help="group files into observations")
    two.add_argument("catalog", help="what `scan` wrote")
    two.add_argument("--output", default="pairs.parquet", help="table of observations (default %(default)s)")
    two.add_argument("--dropped", help="write the files that are in no observation, with the reason, to this table")
    two.add_argument("--min-observed", type=int, default=1, help="drop observations with fewer modalities")
    two.add_argument("--science-only", action="store_true", help="leave near-real-time files out")
    two.add_argument("--no-quicklooks", action="store_true", help="leave 8-bit JPEG2000 files out")
    two.set_defaults(run=pair)

    three = commands.add_parser("prepare", help="write the dataset")
    three.add_argument("source", help="what `pair` wrote, or the archive's folder")
    three.add_argument("output", help="folder of the dataset")
    three.add_argument("--size", type=int, default=1024, help="pixels on a side (default %(default)s)")
    three.add_argument("--geometry", default="rsun", help="rsun (default), arcsec or none")
    three.add_argument("--photometry", default="nominal", help="nominal (default), dn or dn_per_s")
    three.add_argument("--degradation", help="CSV or JSON table of throughput to divide by (default: none)")
    three.add_argument("--dtype", default="float16", choices=["float16", "float32"])
    three.add_argument("--train-end", help="observations before this time train, later ones validate")
    three.add_argument("--gap", default="27D", help="gap between the parts (default %(default)s)")
    three.add_argument("--workers", type=int, help="local processes (default: the number of cores; 0: this one)")
    three.add_argument("--scheduler", help="address of a Dask cluster, as tcp://host:8786")
    three.add_argument("--overwrite", action="store_true", help="replace a dataset of other settings")
    three.add_argument("--retry-failures", action="store_true", help="do the shards again in which a file failed")
    three.set_defaults(run=prepare)

    for command in (two, three):
        command.add_argument("--anchor", default="hmi", help="modality whose slots are the rows (default %(default)s)")
        command.add_argument("--tolerance", default="6min", help="largest time difference (default %(default)s)")
        command.add_argument("--modalities", nargs="+", help="columns (default: all that are there)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Runs one step; bad input ends in one sentence and status 2."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("distributed").setLevel(logging.WARNING)
    arguments = parse(argv)
    try:
        arguments.run(arguments)
    except (ValueError, OSError, ImportError) as error:
        print(f"prepare_data.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
