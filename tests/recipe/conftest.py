"""A pico recipe and a way to write it down."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from recipe.pico_recipe import pico_recipe


@pytest.fixture
def recipe_fields(tmp_path: Path) -> dict[str, Any]:
    """The fields of a recipe whose files exist."""
    return pico_recipe(tmp_path)


@pytest.fixture
def write_recipe(tmp_path: Path):
    """Writes fields to a recipe file."""

    def write(fields: dict[str, Any]) -> str:
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(fields, allow_unicode=True, sort_keys=False), encoding="utf-8")
        return str(path)

    return write
