"""Checks of settings that configurations and the image processor share, with errors that say what was expected."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import Any


def refuse_typos(owner: str, names: Iterable[str], keywords: Iterable[str]) -> None:
    """transformers keeps or drops keyword arguments that it does not know; one that resembles a name of ours is a typo.

    Args:
        owner: The class whose settings they are.
        names: Its settings.
        keywords: What it was given and does not know.

    Raises:
        ValueError: A keyword resembles a name.
    """
    names = list(names)
    for key in keywords:
        close = difflib.get_close_matches(key, names, n=1, cutoff=0.8)
        if close and key not in names:
            raise ValueError(f"{owner}: expected a known field, got {key!r}. Did you mean {close[0]!r}?")


def choice(name: str, value: Any, choices: Sequence[str]) -> str:
    """`value` if it is one of `choices`, else a ValueError that lists them."""
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}.")
    return value


def square_size(size: Any) -> int:
    """The side of a square image from a number, or from a mapping of equal numbers as transformers writes sizes."""
    if isinstance(size, Mapping):
        sides = set(size.values())
        if len(sides) != 1:
            raise ValueError(f"size: expected one number, since the canonical image is square, got {dict(size)}.")
        size = sides.pop()
    side = float(size) if isinstance(size, Real) and not isinstance(size, bool) else 0.5
    if not side.is_integer() or side < 8:
        raise ValueError(f"size: expected a whole number of pixels, 8 or more, got {size!r}.")
    return int(side)


__all__ = ["choice", "refuse_typos", "square_size"]
