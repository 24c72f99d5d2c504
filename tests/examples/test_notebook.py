"""The notebook runs from its first cell to its last, and the model it makes has learnt something."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = Path(__file__).parents[2] / "examples/quickstart.ipynb"


def test_the_notebook(tmp_path, monkeypatch, holds):
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
    before, after = (names["scores"][name] for name in ("post-trained", "grafted"))
    assert after["en"] == pytest.approx(before["en"], abs=1e-6) and type(names["stock"]).__name__ == "LlamaForCausalLM"
    holds(after["hu"] - before["hu"], below=-1.0)


def test_the_notebook_is_committed_without_outputs():
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)
