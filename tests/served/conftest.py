"""A pico model that servers are asked about."""

from __future__ import annotations

import pytest

from served.pico_export import export


@pytest.fixture(scope="session")
def dense(tmp_path_factory):
    """A dense export's folder."""
    return export(tmp_path_factory.mktemp("dense"))
