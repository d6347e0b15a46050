"""What all tests share: one thread per worker, deterministic torch, offline, and the way to data that a user lacks."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

SHARED_DATA = Path(__file__).parents[1] / "../shared/data"


def pytest_configure() -> None:
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Audits take minutes: they start first, and those that look at the same one share a worker."""
    items.sort(key=lambda item: "studies" not in item.path.parts)
    for item in items:
        if "report" in getattr(item, "fixturenames", ()) and "studies" in item.path.parts:
            item.add_marker(pytest.mark.xdist_group(item.path.name))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def no_grad() -> Iterator[None]:
    """A test without gradients: a module asks for it with `pytestmark = pytest.mark.usefixtures("no_grad")`."""
    with torch.no_grad():
        yield


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real texts and data sets that stands beside the repository."""
    if not SHARED_DATA.is_dir():
        pytest.skip("needs ../shared/data, which is not part of the repository")
    return SHARED_DATA.resolve()
