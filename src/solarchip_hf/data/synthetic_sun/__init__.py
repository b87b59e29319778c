"""A seeded, physically motivated Sun that is drawn, not observed: the package's embedded data."""

from .sun import SyntheticSun

__all__ = ["SyntheticSun"]
