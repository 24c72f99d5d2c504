"""The quickstart runs from top to bottom on pico inputs."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

import quickstart
from recipe.pico_recipe import pico_recipe


@pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")
def test_quickstart(tmp_path, monkeypatch, capsys):
    fields = pico_recipe(tmp_path)
    for code, language in fields["languages"].items():
        for split in ("train", "validation"):
            (tmp_path / "text").mkdir(exist_ok=True)
            shutil.move(language[split], tmp_path / f"text/{code}.{split}.jsonl")
    (tmp_path / "tasks").mkdir()
    shutil.move(Path(fields["tune"]["tasks"]), tmp_path / "tasks/train.jsonl")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["quickstart.py", "--inputs", str(tmp_path), "--output", "out", "--steps", "2"])
    quickstart.main()
    lines = [line for line in capsys.readouterr().out.splitlines() if "bits per byte" in line]
    assert [line.split()[0] for line in lines] == ["en", "hu", "el"]
    assert AutoModelForCausalLM.from_pretrained("out/chat").config.model_type == "mixtral"
