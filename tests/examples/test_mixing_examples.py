"""The two examples that mix dense models run from top to bottom on pico inputs, and go on after an interruption."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

import branch_train_mix
import no_training
from recipe.pico_recipe import pico_recipe

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")


@pytest.fixture
def inputs(tmp_path, monkeypatch) -> Path:
    fields = pico_recipe(tmp_path)
    (tmp_path / "text").mkdir()
    (tmp_path / "tasks").mkdir()
    for code, language in fields["languages"].items():
        for split in ("train", "validation"):
            shutil.move(language[split], tmp_path / f"text/{code}.{split}.jsonl")
    shutil.move(Path(fields["tune"]["tasks"]), tmp_path / "tasks/train.jsonl")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(module, monkeypatch, capsys, *arguments: str) -> list[str]:
    monkeypatch.setattr(sys, "argv", ["example", "--inputs", ".", "--output", "out", "--steps", "4", *arguments])
    module.main()
    return [line.split()[0] for line in capsys.readouterr().out.splitlines() if "bits per byte" in line]


def test_branches_train_apart_and_are_kept(inputs, monkeypatch, capsys):
    run(branch_train_mix, monkeypatch, capsys, "--only", "hu")
    weights = inputs / "out/branch-hu/model.safetensors"
    written = weights.stat().st_mtime_ns
    shutil.rmtree(inputs / "out/work-hu")
    assert run(branch_train_mix, monkeypatch, capsys) == ["en", "hu", "el"]
    assert weights.stat().st_mtime_ns == written and not (inputs / "out/work-hu").exists()
    assert (inputs / "out/mixture/adapter_model.safetensors").is_file() and (inputs / "out/base").is_dir()


def test_an_interrupted_branch_goes_on_from_its_checkpoint(inputs, monkeypatch, capsys):
    run(branch_train_mix, monkeypatch, capsys, "--only", "hu")
    straight = (inputs / "out/branch-hu/model.safetensors").read_bytes()
    shutil.rmtree(inputs / "out")
    trained = branch_train_mix.Trainer.train

    def interrupted(trainer, **options):
        trained(trainer, **options)
        shutil.rmtree(Path(trainer.args.output_dir) / "checkpoint-4")  # as if killed in the last step
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(branch_train_mix.Trainer, "train", interrupted)
        run(branch_train_mix, monkeypatch, capsys, "--only", "hu")
    assert [path.name for path in (inputs / "out/work-hu").glob("checkpoint-*")] == ["checkpoint-3"]
    assert not (inputs / "out/branch-hu").exists()
    run(branch_train_mix, monkeypatch, capsys, "--only", "hu")
    assert (inputs / "out/branch-hu/model.safetensors").read_bytes() == straight


def test_no_training(inputs, monkeypatch, capsys):
    assert run(no_training, monkeypatch, capsys) == ["en", "hu", "el"]
    assert AutoModelForCausalLM.from_pretrained("out/chat").config.model_type == "mixtral"
