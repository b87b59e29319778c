"""Runs every python and bash block of the README and of docs/, in the order in which a reader meets them.

    python tests/docs/run_blocks.py                  # README.md, then the pages in the order of mkdocs.yml
    python tests/docs/run_blocks.py --until docs/tutorials/pretrain.md --keep scratch
    python tests/docs/run_blocks.py --only docs/tutorials/search.md --keep scratch   # what is there is used
    python tests/docs/run_blocks.py --list

The README runs in one scratch folder and, side by side with it, the pages together in another, so that a page finds
what an earlier one made. Python blocks of a page share their names. A block is left out only behind a comment that says
why:

    <!-- not run: downloads from the archive -->

What the blocks take for granted is put into the folder first: `examples/` and `benchmarks/`; for the README two FITS
files, an archive of them and a tiny untrained model named `solarchip/vit-base`; for the pages a tiny checkpoint of the
research code.
"""

import argparse
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import chdir
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
RUN = ("python", "bash")
SHOWN = ("text", "yaml", "json", "math", "mermaid")
_FENCE = re.compile(r"^(?P<indent> *)```(?P<info>[^\n`]*)\n(?P<code>.*?)^(?P=indent)```[ ]*$", re.MULTILINE | re.DOTALL)
_MARK = re.compile(r"<!-- not run: (?P<reason>(?:(?!-->).)+) -->\s*\Z", re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block: its page, first line, language, code, and why it is not run (empty: it is)."""

    page: Path
    line: int
    language: str
    code: str
    reason: str

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"


def read_blocks(page: Path, text: str) -> list[Block]:
    """The blocks of a page that run, or that say why not.

    Raises:
        ValueError: A block of no known language, or a mark that stands before nothing that would run.
    """
    blocks, marks = [], len(re.findall("<!-- not run:", text))
    for match in _FENCE.finditer(text):
        language, line = (match["info"].split() or [""])[0], text[: match.start()].count("\n") + 1
        if language not in RUN + SHOWN:
            raise ValueError(f"{page}:{line}: expected a block of {', '.join(RUN + SHOWN)}, got {language!r}.")
        if language in SHOWN:
            continue
        mark = _MARK.search(text[: match.start()])
        marks -= mark is not None
        indent = len(match["indent"])
        code = "".join(row[indent:] if row.strip() else "\n" for row in match["code"].splitlines(keepends=True))
        blocks.append(Block(page, line, language, code, " ".join(mark["reason"].split()) if mark else ""))
    if marks:
        raise ValueError(f"{page}: expected every `not run` mark right before a block that would run.")
    return blocks


def pages() -> list[Path]:
    """README.md and the pages of the navigation, relative to the repository."""

    def walk(node: Any) -> Iterator[str]:
        if isinstance(node, str):
            yield node
        else:
            for child in node.values() if isinstance(node, dict) else node:
                yield from walk(child)

    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    return [Path("README.md"), *(Path("docs") / name for name in walk(nav))]


def prepare_readme(folder: Path) -> None:
    """What the README's reader has: two files, an archive, a pretrained model (here tiny and untrained)."""
    from solarchip_hf import SolarChipConfig, SolarChipImageProcessor, SolarChipModel, SyntheticSun

    names = ["hmi", "aia171"]
    sun = SyntheticSun(seed=0, start="2024-01-01", days=2, size=64)
    sun.write_archive(folder / "archive", sun.times("1D"), names, progress=False)
    for name in ("AIA20240101_0000_0171.fits", "hmi.M_720s.20240101_000000_TAI.fits"):
        shutil.copyfile(next((folder / "archive").rglob(name)), folder / name)
    config = SolarChipConfig.from_name("vit-tiny", modalities=names, image_size=64)
    SolarChipModel(config).save_pretrained(folder / "solarchip" / "vit-base")
    SolarChipImageProcessor(modalities=names, size=64).save_pretrained(folder / "solarchip" / "vit-base")


def prepare_pages(folder: Path) -> None:
    """What the pages' reader has besides what they make: a checkpoint of the research code, tiny."""
    sys.path.insert(0, str(ROOT / "tests" / "hub"))
    from research_layout import random_state, save_checkpoint, vit_table

    (folder / "old").mkdir()
    table = vit_table(size=32, patch=8, width=32, layers=2, projection=16)
    save_checkpoint(folder / "old" / "epoch=199.ckpt", random_state(table, ["hmi", "aia"]))


def run_block(block: Block, names: dict[str, Any], environment: dict[str, str]) -> str:
    """Runs one block in the current folder; returns what went wrong, or nothing."""
    if block.language == "bash":
        result = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", block.code],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        return "" if result.returncode == 0 else f"exit status {result.returncode}\n{result.stdout[-4000:]}"
    try:
        exec(compile("\n" * block.line + block.code, str(ROOT / block.page), "exec"), names)
    except Exception:
        return traceback.format_exc()
    return ""


def run(folder: Path, blocks: list[Block], environment: dict[str, str]) -> tuple[int, int, int]:
    """Runs blocks in a folder; returns how many passed, failed and were left out."""
    passed = failed = skipped = 0
    page, names = None, {}
    for block in blocks:
        if block.page != page:
            page, names = block.page, {"__name__": "__main__"}
        if block.reason:
            skipped += 1
            print(f"skipped {block.place}: {block.reason}", flush=True)
            continue
        start = time.perf_counter()
        with chdir(folder):
            trouble = run_block(block, names, environment)
        seconds = time.perf_counter() - start
        print(f"{'FAILED' if trouble else 'passed'}  {block.place} ({block.language}, {seconds:.1f} s)", flush=True)
        if trouble:
            failed += 1
            print(block.code + trouble, flush=True)
            break  # later blocks build upon this one
        passed += 1
    return passed, failed, skipped


def prepare_and_run(name: str, folder: Path, blocks: list[Block]) -> tuple[int, int, int]:
    """Makes the folder of the README or of the pages, unless it is there, and runs blocks in it."""
    os.environ.update({"HF_HUB_OFFLINE": "1", "MPLBACKEND": "Agg"})
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    if blocks and not folder.exists():
        folder.mkdir(parents=True)
        for room in ("benchmarks", "examples"):
            (folder / room).symlink_to(ROOT / room)
        {"readme": prepare_readme, "pages": prepare_pages}[name](folder)
    return run(folder, blocks, dict(os.environ))


def main(arguments: list[str] | None = None) -> int:
    """The command; returns 0 if no block failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--until", type=Path, help="the last page to run")
    parser.add_argument("--only", type=Path, help="run this page alone, in the folder that --keep left")
    parser.add_argument("--keep", type=Path, help="run in this folder and leave it")
    parser.add_argument("--list", action="store_true", help="list the blocks instead")
    options = parser.parse_args(arguments)
    order = pages()
    if options.only is not None and options.keep is None:
        parser.error("--only: expected --keep with the folder of an earlier run")
    if options.until is not None:
        order = order[: order.index(options.until) + 1]
    blocks = {page: read_blocks(page, (ROOT / page).read_text(encoding="utf-8")) for page in order}
    if options.list:
        for block in (block for found in blocks.values() for block in found):
            print(f"{block.place} {block.language}{f': not run: {block.reason}' if block.reason else ''}")
        return 0
    readme, *others = order
    wanted = {"readme": blocks[readme], "pages": [block for page in others for block in blocks[page]]}
    # Side by side, each in a process of its own, since Python blocks change the working folder.
    with (
        tempfile.TemporaryDirectory(prefix="docs-") as scratch,
        ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool,
    ):
        runs = []
        for name, found in wanted.items():
            chosen = [block for block in found if options.only in (None, block.page)]
            folder = (options.keep or Path(scratch)).absolute() / name
            runs.append(pool.submit(prepare_and_run, name, folder, chosen))
        passed, failed, skipped = (sum(counts) for counts in zip(*(one.result() for one in runs), strict=True))
    print(f"{passed} passed, {failed} failed, {skipped} skipped")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
