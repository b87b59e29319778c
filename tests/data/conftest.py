"""Fixtures of the data tests."""

from pathlib import Path

import pytest
from small_archive import write_archive


@pytest.fixture(scope="session")
def small_archive(tmp_path_factory) -> Path:
    """Twelve days of HMI, AIA 171 and AIA 1700, without a fault."""
    folder = tmp_path_factory.mktemp("archive")
    write_archive(folder, days=12)
    return folder


@pytest.fixture
def deadly(tmp_path, monkeypatch):
    """Makes every child process die by SIGKILL when it opens a file called `deadly.fits`."""
    hook = (
        "import builtins, os\n"
        "plain = builtins.open\n"
        "def deadly(file, *arguments, **options):\n"
        "    if str(file).endswith('deadly.fits'):\n"
        "        os.kill(os.getpid(), 9)\n"
        "    return plain(file, *arguments, **options)\n"
        "builtins.open = deadly\n"
    )
    folder = tmp_path / "hooks"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(hook)
    monkeypatch.setenv("PYTHONPATH", str(folder), prepend=":")
    return "deadly.fits"
