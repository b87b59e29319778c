"""A local Hub, and processes that push to it and load from it."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_worker import Worker
from local_hub import OTHER_TOKEN, TOKEN, LocalHub


@pytest.fixture(scope="session")
def hub() -> Iterator[LocalHub]:
    """A Hub on this machine, with one organisation and a stranger."""
    with LocalHub({TOKEN: "solarchip", OTHER_TOKEN: "somebody"}) as server:
        yield server


@pytest.fixture(scope="session")
def owner(hub, tmp_path_factory) -> Iterator[Worker]:
    """A process with the package and the owner's token."""
    worker = Worker(hub.environment(tmp_path_factory.mktemp("owner"), TOKEN))
    yield worker
    worker.close()


@pytest.fixture(scope="session")
def stranger_home(tmp_path_factory) -> Path:
    """Where the stranger's process keeps its cache."""
    return tmp_path_factory.mktemp("stranger")


@pytest.fixture(scope="session")
def stranger(hub, stranger_home) -> Iterator[Worker]:
    """A process without the package, nor more than torch, transformers, numpy, astropy and Pillow; without a token."""
    blocked = ("solarchip_hf", "diffusers", "sunpy", "scipy", "pandas", "datasets", "matplotlib", "dask", "sklearn")
    worker = Worker(hub.environment(stranger_home), blocked)
    yield worker
    worker.close()
