"""SIGTERM ends any command as Ctrl-C does: real processes, stopped while something half done lies on the disk."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mixing.test_command import arguments
from peft_moe_delta.cli.failure import sigterm_as_ctrl_c
from served.pico_export import export

ROOT = Path(__file__).parents[2]
CONVERTER = """
import pathlib, sys, time
def main():
    pathlib.Path(sys.argv[sys.argv.index("--outfile") + 1]).write_bytes(b"half of it")
    time.sleep(3600)
"""


def gguf(folder: Path) -> list[str]:
    """A conversion that comes to no end: `gguf` is waiting for llama.cpp's converter, which has begun its file."""
    (folder / "llama.cpp").mkdir()
    (folder / "llama.cpp" / "convert_hf_to_gguf.py").write_text(CONVERTER)
    exported = export(folder / "export")
    return ["gguf", str(exported), str(folder / "out"), "--llama-cpp", str(folder / "llama.cpp")]


def hidden(folder: Path) -> list[Path]:
    """What lies beside its place, files and folders."""
    return [path for path in folder.rglob("*") if path.name.startswith(".")]


@pytest.mark.slow
@pytest.mark.parametrize("command", [gguf, arguments], ids=["a file", "a folder"])
def test_sigterm_leaves_nothing_half_done(command, tmp_path):
    line = command(tmp_path)
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    assert not hidden(tmp_path)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    with subprocess.Popen(
        [sys.executable, "-m", "peft_moe_delta", *line, "--quiet"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
    ) as run:  # fmt: skip
        while not hidden(tmp_path):
            assert run.poll() is None, run.communicate()
            time.sleep(0.002)
        run.send_signal(signal.SIGTERM)
        out, err = run.communicate(timeout=600)
    assert run.returncode == 130 and out == ""
    assert err.startswith("interrupted: ") and err.count("\n") == 1
    assert not hidden(tmp_path) and {path for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_handler_of_somebody_else_stays():
    came: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: came.append(number))
    try:
        with sigterm_as_ctrl_c():
            signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    assert came == [signal.SIGTERM]
