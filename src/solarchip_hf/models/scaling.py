"""Invertible intensity transforms: signed log1p (the default), asinh, linear, each followed by a z-score.

All take and give float32 arrays of any shape; NaN stays NaN. The argument is in the physical unit that the statistics
name (DN or gauss), so that "one" in log1p(|x|) and asinh(x) means one DN or one gauss.
"""

from collections.abc import Callable

import numpy as np


def _signed_log1p(x: np.ndarray) -> np.ndarray:
    return np.copysign(np.log1p(np.abs(x)), x)


def _signed_expm1(y: np.ndarray) -> np.ndarray:
    return np.copysign(np.expm1(np.abs(y)), y)


_TRANSFORMS: dict[str, tuple[Callable[[np.ndarray], np.ndarray], Callable[[np.ndarray], np.ndarray]]] = {
    "log1p": (_signed_log1p, _signed_expm1),
    "asinh": (np.arcsinh, np.sinh),
    "linear": (np.array, np.array),
}
SCALINGS: tuple[str, ...] = tuple(_TRANSFORMS)


def _transform(scaling: str) -> tuple[Callable[[np.ndarray], np.ndarray], Callable[[np.ndarray], np.ndarray]]:
    if scaling not in _TRANSFORMS:
        raise ValueError(f"scaling: expected one of {', '.join(SCALINGS)}, got {scaling!r}.")
    return _TRANSFORMS[scaling]


def compress(physical: np.ndarray, scaling: str = "log1p") -> np.ndarray:
    """The transform without the z-score: what `mean` and `std` are statistics of.

    Args:
        physical: (...) in physical units.
        scaling: `"log1p"` (sign(x) log(1 + |x|)), `"asinh"` or `"linear"`.

    Returns:
        (...) float32.
    """
    return _transform(scaling)[0](np.asarray(physical, dtype=np.float32))


def expand(values: np.ndarray, scaling: str = "log1p") -> np.ndarray:
    """The inverse of `compress`; (...) float32."""
    return _transform(scaling)[1](np.asarray(values, dtype=np.float32))


def standardize(physical: np.ndarray, mean: float, std: float, scaling: str = "log1p") -> np.ndarray:
    """Transform and z-score: (compress(x) - mean) / std.

    Args:
        physical: (...) in physical units.
        mean: Mean of the transformed image.
        std: Standard deviation of the transformed image, positive.
        scaling: As in `compress`.

    Returns:
        (...) float32.
    """
    values = compress(physical, scaling)
    values -= np.float32(mean)
    values /= np.float32(std)
    return values


def unstandardize(values: np.ndarray, mean: float, std: float, scaling: str = "log1p") -> np.ndarray:
    """The inverse of `standardize`; (...) float32 in physical units."""
    return expand(np.asarray(values, dtype=np.float32) * np.float32(std) + np.float32(mean), scaling)


__all__ = ["SCALINGS", "compress", "expand", "standardize", "unstandardize"]
