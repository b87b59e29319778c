"""Fixtures shared by all tests: where the real files lie, and quiet third parties."""

import os
from pathlib import Path

import pytest

# A folder of real public SDO files beside the checkout; where it is absent the tests that need it are skipped.
SHARED = Path(os.environ.get("SOLARCHIP_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data"))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder with real SDO files and flare lists."""
    if not SHARED.is_dir():
        pytest.skip(f"real files not found at {SHARED}: set SOLARCHIP_SHARED_DATA to a folder that holds them")
    return SHARED


@pytest.fixture(scope="session")
def sdo_folder(shared_data: Path) -> Path:
    """Folder with real FITS and JPEG2000 files."""
    return shared_data / "sdo"
