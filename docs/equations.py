"""Hook of MkDocs: ```math blocks become SVG at build, so that the pages need no script from elsewhere.

GitHub shows the same blocks by itself. matplotlib sets them, and knows a part of TeX only; what it does not know ends
the build. An empty line between lines of a block starts a new row.
"""

import html
import io
import re

from matplotlib import rc_context
from matplotlib.font_manager import FontProperties
from matplotlib.mathtext import math_to_image

_BLOCK = re.compile(r"^```math\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_SIZE = re.compile(r'<svg [^>]*?width="([\d.]+)pt"[^>]*?>')


def _draw(formula: str) -> str:
    stream = io.StringIO()
    with rc_context({"mathtext.fontset": "stix", "svg.fonttype": "path", "svg.hashsalt": "solarchip_hf"}):
        math_to_image(f"${formula}$", stream, prop=FontProperties(size=15), dpi=72, format="svg", color="#123456")
    picture = stream.getvalue()
    picture = picture[picture.index("<svg") :].replace("#123456", "currentColor")
    picture = re.sub(r"<metadata>.*?</metadata>", "", picture, flags=re.DOTALL)
    # Identifiers are of one picture; a page has many.
    mark = f"{abs(hash(formula)):x}"
    picture = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{mark}-", picture)
    label = html.escape(formula, quote=True)
    return f'<div class="equation" role="math" aria-label="{label}">{" ".join(picture.split())}</div>'


def on_page_markdown(markdown: str, **_: object) -> str:
    """Replaces the page's ```math blocks."""
    return _BLOCK.sub(
        lambda block: "\n".join(_draw(" ".join(row.split())) for row in block[1].strip().split("\n\n")), markdown
    )
