"""What every test gets: one thread, fixed seeds, and where the shared development data lie."""

import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from chance import Holds, shifted

REPOSITORY = Path(__file__).resolve().parent.parent


def pytest_configure() -> None:
    """Several test processes share few cores: one thread each is the fastest. Their own subprocesses do the same."""
    torch.set_num_threads(int(os.environ.setdefault("OMP_NUM_THREADS", "1")))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A learning test is one that takes `holds`; before pytest chooses by marker."""
    for item in items:
        if "holds" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.learning)


@pytest.fixture(autouse=True)
def seeded() -> int:
    """Every test starts from the same random state, alone or after others. Returns the seed."""
    random.seed(shifted())
    np.random.seed(shifted())
    torch.manual_seed(shifted())
    return shifted()


@pytest.fixture
def holds(request: pytest.FixtureRequest) -> Holds:
    """The assertion of figures that differ from seed to seed; see `chance.py`."""
    return Holds(request.node.nodeid, os.environ.get("PEFT_MOE_DELTA_TEST_MARGINS"))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of development data beside the repository; it is no part of it, so tests skip where it is absent."""
    folder = REPOSITORY.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no ../shared/data beside the repository: development data are not part of a clone")
    return folder
