"""The runner of the documentation's blocks: what it finds, what it refuses, and that failures are seen."""

import os
import re
from pathlib import Path

import pytest
import run_blocks
from run_blocks import ROOT, Block, read_blocks

PAGE = Path("docs/page.md")


def fence(language: str, code: str, indent: str = "") -> str:
    return "".join(f"{indent}{line}\n" for line in (f"```{language}", *code.splitlines(), "```"))


def test_blocks_are_found_in_order_with_their_place():
    text = (
        "# Title\n\n" + fence("python title='x'", "a = 1\n\nb = a") + fence("text", "1") + fence("bash", "ls", "    ")
    )
    assert [(block.language, block.line, block.code, block.reason) for block in read_blocks(PAGE, text)] == [
        ("python", 3, "a = 1\n\nb = a\n", ""),
        ("bash", 11, "ls\n", ""),
    ]


def test_a_block_is_left_out_with_a_reason_only():
    text = "<!-- not run: downloads\nfor hours -->\n" + fence("bash", "wget") + fence("bash", "ls")
    assert [block.reason for block in read_blocks(PAGE, text)] == ["downloads for hours", ""]
    with pytest.raises(ValueError, match="expected every `not run` mark right before a block"):
        read_blocks(PAGE, "<!-- not run: downloads -->\nA sentence between.\n" + fence("bash", "wget"))
    with pytest.raises(ValueError, match="right before a block"):
        read_blocks(PAGE, "<!-- not run: shown only -->\n" + fence("text", "1"))


@pytest.mark.parametrize("language", ["", "py", "shell"])
def test_a_block_of_no_known_language_is_refused(language):
    with pytest.raises(ValueError, match=re.escape("docs/page.md:1: expected a block of python, bash, text")):
        read_blocks(PAGE, fence(language, "x"))


def test_failures_are_seen_and_names_are_shared_within_a_page(tmp_path, capsys):
    other = Path("docs/other.md")
    blocks = [
        Block(PAGE, 1, "python", "a = 1\n", ""),
        Block(PAGE, 5, "bash", "echo made > file\n", ""),
        Block(PAGE, 9, "python", "from pathlib import Path\nassert Path('file').read_text() and a == 1\n", ""),
        Block(PAGE, 13, "bash", "exit 3\n", "leaves"),
        Block(other, 1, "python", "a\n", ""),
        Block(other, 5, "python", "print('not reached')\n", ""),
    ]
    assert run_blocks.run(tmp_path, blocks, dict(os.environ)) == (3, 1, 1)
    said = capsys.readouterr().out
    assert "NameError: name 'a' is not defined" in said
    assert "skipped docs/page.md:13: leaves" in said
    assert "not reached" not in said.replace("print('not reached')", "")
    assert Path.cwd() != tmp_path
    assert run_blocks.run(tmp_path, [Block(PAGE, 1, "bash", "ls | false | cat\n", "")], dict(os.environ))[1] == 1


def test_the_pages_of_the_repository_can_be_read():
    order = run_blocks.pages()
    assert order[0] == Path("README.md")
    assert set(order[1:]) == {path.relative_to(ROOT) for path in (ROOT / "docs").rglob("*.md")}  # none is forgotten
    blocks = [block for page in order for block in read_blocks(page, (ROOT / page).read_text(encoding="utf-8"))]
    assert sum(not block.reason for block in blocks) > 25
    for block in blocks:
        if block.language == "python" and not block.reason:
            compile(block.code, block.place, "exec")
