"""What every test gets: one thread, fixed seeds, and where the shared development data lie."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch

REPOSITORY = Path(__file__).resolve().parent.parent
SEED = 0


def pytest_configure() -> None:
    """Several test processes share few cores: one thread each is the fastest, and sums come out in one order."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded() -> int:
    """Every test starts from the same random state, alone or after others. Returns the seed."""
    random.seed(SEED)
    np.random.seed(SEED)
    torch.manual_seed(SEED)
    return SEED


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of development data beside the repository; it is no part of it, so tests skip where it is absent."""
    folder = REPOSITORY.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no ../shared/data beside the repository: development data are not part of a clone")
    return folder
