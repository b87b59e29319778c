"""Downloads SDO images into an archive that `prepare_data.py scan` reads.

    python examples/download_sdo.py ARCHIVE --start 2015-01-01 --end 2015-02-01
    python examples/download_sdo.py ARCHIVE --start 2024-05-10 --end 2024-05-12 --cadence 1h --modalities hmi 171 304

Call it again after an interruption: files that are there are not fetched again. One day of all channels at one image a
day is eleven files, some 25 MB. JSOC serves the files to everybody; be kind to it and keep `--threads` small.
"""

import argparse
import logging
import sys
from pathlib import Path

from solarchip_hf.data import download_sdo
from solarchip_hf.data.download import JSOC
from solarchip_hf.data.durations import read_time


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="root of the archive")
    parser.add_argument(
        "--start", required=True, help="first slot, as 2015-01-01 or 2015-01-01T06:00 (UTC; of HMI TAI)"
    )
    parser.add_argument("--end", required=True, help="end of the range, exclusive")
    parser.add_argument("--cadence", default="1D", help="time between slots, as 1D, 6h, 12min (default %(default)s)")
    parser.add_argument("--modalities", nargs="+", help="channels (default: all eleven)")
    parser.add_argument("--tolerance", default="6min", help="how far a frame may lie from its slot (%(default)s)")
    parser.add_argument("--source", nargs="+", default=[JSOC], help="the tree's address, then mirrors (%(default)s)")
    parser.add_argument("--nrt", action="store_true", help="ask the near-real-time series where there is no other file")
    parser.add_argument("--search", choices=["tree", "fido"], default="tree", help="what finds AIA files (%(default)s)")
    parser.add_argument("--retries", type=int, default=4, help="further tries after a failure (default %(default)s)")
    parser.add_argument("--backoff", type=float, default=2.0, help="seconds before the first of them (%(default)s)")
    parser.add_argument("--threads", type=int, default=4, help="files at a time (default %(default)s)")
    parser.add_argument("--retry-absent", action="store_true", help="ask again for what no source had")
    parser.add_argument("--show", type=int, default=20, help="how many failures to print (default %(default)s)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Downloads, and says what came; the status is 1 where a file failed that may come later, 2 for bad input."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    arguments = parse(argv)
    try:
        if Path(arguments.folder).is_file():
            raise NotADirectoryError(f"folder: expected the root of an archive, got the file {arguments.folder}.")
        table = download_sdo(
            read_time(arguments.start, "--start"),
            read_time(arguments.end, "--end"),
            arguments.folder,
            modalities=arguments.modalities,
            cadence=arguments.cadence,
            tolerance=arguments.tolerance,
            sources=arguments.source,
            near_real_time=arguments.nrt,
            search=arguments.search,
            retries=arguments.retries,
            backoff=arguments.backoff,
            threads=arguments.threads,
            retry_absent=arguments.retry_absent,
        )
    except (ValueError, ImportError, OSError) as error:
        print(f"download_sdo.py: {error}", file=sys.stderr)
        return 2
    report = table.attrs["report"]
    print(", ".join(f"{count} {state}" for state, count in report.items()), f"in {arguments.folder}")
    failed = table[table["status"] == "failed"]
    for row in failed.head(arguments.show).itertuples():
        print(f"  failed: {row.modality} {row.time_nominal:%Y-%m-%d %H:%M}: {row.reason}")
    if len(failed) > arguments.show:
        print(f"  ... and {len(failed) - arguments.show} more")
    if len(failed):
        sys.exit("Call the same command again to fetch what failed.")
    print(f"next: python examples/prepare_data.py scan {arguments.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
