"""Equations of the pages are drawn at build, in the text's colour, with their source as label."""

import runpy

import pytest
from run_blocks import ROOT

on_page_markdown = runpy.run_path(str(ROOT / "docs" / "equations.py"))["on_page_markdown"]


def test_every_row_becomes_a_picture():
    page = on_page_markdown("Before\n\n```math\na < \\dfrac{b}{2}\n\nc\n```\n\nAfter")
    rows = [line for line in page.splitlines() if line.startswith('<div class="equation"')]
    assert len(rows) == 2
    assert 'aria-label="a &lt; \\dfrac{b}{2}"' in rows[0]
    assert all(row.count("<svg") == 1 and "currentColor" in row and "#123456" not in row for row in rows)
    assert page.startswith("Before\n\n")
    assert page.endswith("\n\nAfter")
    assert "<metadata>" not in page


def test_what_cannot_be_drawn_ends_the_build():
    with pytest.raises(ValueError, match="nosuchcommand"):
        on_page_markdown("```math\n\\nosuchcommand{x}\n```")


def test_other_blocks_stay():
    text = "```python\na = 1\n```\n"
    assert on_page_markdown(text) == text
