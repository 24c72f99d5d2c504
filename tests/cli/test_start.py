"""The command line starts without PyTorch: help, and every mistake that can be seen before there is work to do."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import peft_moe_delta
from graft.test_explain import saved
from peft_moe_delta import program

ROOT = Path(__file__).parents[2]
HEAVY = {"torch", "transformers", "peft", "accelerate", "numpy", "huggingface_hub"}
SCRIPT = "from peft_moe_delta.cli import main\nmain()\n"
"""What an installer writes for the entry point."""


def started(*command: str) -> tuple[int, str, set[str]]:
    """The status of a Python process, its last line and the packages it imported."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    run = subprocess.run(
        [sys.executable, "-X", "importtime", *command], capture_output=True, text=True, env=environment
    )
    lines = run.stderr.splitlines()
    imported = {line.rpartition("|")[2].strip() for line in lines if line.startswith("import time:")}
    said = run.stdout.splitlines() + [line for line in lines if not line.startswith("import time:")]
    return run.returncode, (said or [""])[-1], imported


@pytest.fixture
def misspelt(tmp_path):
    (tmp_path / "recipe.yaml").write_text("modle: base\n")
    (tmp_path / "grow.yaml").write_text("adapter: a\noutput: b\nlangauges: {}\n")
    (tmp_path / "measure.yaml").write_text("modle: base\n")
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["--help"], 0, "--version"),
        (["--version"], 0, rf"peft-moe-delta {re.escape(program.VERSION)}"),
        (["rnu"], 2, "Did you mean run?"),
        (["graft", "--help"], 0, ""),
        (["run", "{}/recipe.yaml", "--quik"], 2, "no option --quik. Did you mean --quick?"),
        (["delta", "compute", "a", "b", "--rnak", "2", "--output", "{}/d"], 2, "Did you mean --rank?"),
        (["allocate", "--strategy", "unifrom"], 2, "Did you mean uniform?"),
        (["train", "{}/recipe.yaml"], 2, r"unknown fields \['modle'\].*Did you mean model\?"),
        (["harness-tasks", "{}/recipe.yaml", "{}/tasks"], 2, r"Did you mean model\?"),
        (["grow", "{}/grow.yaml"], 2, r"Did you mean languages\?"),
        (["measure", "--config", "{}/measure.yaml", "--output", "{}/s.json"], 2, r"Did you mean model\?"),
    ],
    ids=lambda given: " ".join(given) if isinstance(given, list) else None,
)
def test_help_and_mistakes_need_no_pytorch(misspelt, arguments, status, said):
    given = [argument.format(misspelt) for argument in arguments]
    ended, line, imported = started("-m", "peft_moe_delta", *given)
    assert (ended, imported & HEAVY) == (status, set())
    assert re.search(said, line)


def test_the_installed_program_starts_as_fast(misspelt):
    script = misspelt / "peft-moe-delta"
    script.write_text(SCRIPT)
    status, line, imported = started(str(script), "run", str(misspelt / "recipe.yaml"))
    assert (status, imported & HEAVY) == (2, set()) and "Did you mean model?" in line


@pytest.mark.parametrize(
    ("typed", "found"),
    [("gr", {"grow", "group", "graft"}), ("run --q", {"--quick", "--quiet"}), ("allocate --strategy u", {"uniform"})],
)
def test_the_tab_key_completes(tmp_path, monkeypatch, typed, found):
    pytest.importorskip("argcomplete")
    line = f"peft-moe-delta {typed}"
    shell = {"_ARGCOMPLETE": "1", "_ARGCOMPLETE_IFS": "\n", "COMP_LINE": line, "COMP_POINT": str(len(line))}
    for name, value in {**shell, "_ARGCOMPLETE_STDOUT_FILENAME": str(tmp_path / "found")}.items():
        monkeypatch.setenv(name, value)
    status, _, imported = started("-m", "peft_moe_delta")
    assert (status, imported & HEAVY) == (0, set())
    assert {word.strip() for word in (tmp_path / "found").read_text().split("\n")} == found


def test_the_version_is_the_installed_one():
    assert peft_moe_delta.__version__ == program.VERSION == version(program.NAME)


def test_with_work_to_do_the_tuner_is_registered(tmp_path):
    _, adapter = saved(tmp_path)
    status, line, imported = started("-m", "peft_moe_delta", "explain", str(adapter))
    assert status == 0 and line.startswith("remote code ")  # the last row of the engines' table
    assert {"torch", "peft"} < imported


@pytest.mark.parametrize(
    ("argv", "orig_argv", "ours"),
    [
        (["/usr/bin/peft-moe-delta", "run"], ["python", "/usr/bin/peft-moe-delta", "run"], True),
        (["peft-moe-delta.exe"], ["peft-moe-delta.exe"], True),
        (["-m", "run"], ["python", "-m", "peft_moe_delta", "run"], True),
        (["-m"], ["python", "-X", "dev", "-m", "peft_moe_delta"], True),
        (["-m"], ["python", "-m", "trainer", "-m", "peft_moe_delta"], False),
        (["-m"], ["python", "-m", "peft_moe_delta.other"], False),
        (["-m"], ["python", "-Im", "peft_moe_delta"], False),
        (["train.py", "-m", "peft_moe_delta"], ["python", "train.py", "-m", "peft_moe_delta"], False),
        (["/usr/bin/peft-moe-delta-lm-eval"], ["python", "/usr/bin/peft-moe-delta-lm-eval"], False),
        (["-c"], ["python", "-c", "import peft_moe_delta"], False),
        ([""], ["python"], False),
        ([], [], False),
    ],
)
def test_any_other_program_gets_the_whole_package_at_once(monkeypatch, argv, orig_argv, ours):
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(sys, "orig_argv", orig_argv)
    assert program.is_command_line() is ours
