"""docs/tour.md: its commands, typed as they stand there, from three files to an answer of a server."""

from __future__ import annotations

import doctest
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest

from builders import perturbed
from recipe.pico_recipe import pico_model, pico_tokenizer
from served.pico_export import TEMPLATE

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/tour.md"
SAME = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
TEXT = {
    "hu": ("A {} minden {} a piac mellett várja a barátait.", ("tanár", "diák", "orvos", "pék", "festő")),
    "el": ("Ο {} περιμένει κάθε {} τους φίλους του στην αγορά.", ("δάσκαλος", "μαθητής", "γιατρός", "ράφτης")),
    "en": (
        "The {} waits for friends beside the market every {}.",
        ("teacher", "student", "doctor", "baker", "painter"),
    ),
}
DAYS = {
    "hu": ("hétfőn", "kedden", "szerdán", "csütörtökön", "pénteken", "szombaton", "vasárnap"),
    "el": ("Δευτέρα", "Τρίτη", "Τετάρτη", "Πέμπτη", "Παρασκευή", "Σάββατο", "Κυριακή"),
    "en": ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
}


def documents(code: str) -> list[str]:
    sentence, people = TEXT[code]
    lines = [sentence.format(person, day) for person, day in product(people, DAYS[code])]
    return [f"{line} {other}" for line, other in product(lines, lines[:2])]


def write_inputs(folder: Path) -> None:
    """A base model, its chat sibling, and text in three formats."""
    tokenizer = pico_tokenizer()
    tokenizer.chat_template = TEMPLATE
    base = pico_model()
    for name, model in (("base", base), ("chat", perturbed(base, scale=0.05))):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    (folder / "hu.txt").write_text("".join(f"{text}\n" for text in documents("hu")), encoding="utf-8")
    rows = [f'{number},"{text}"\n' for number, text in enumerate(documents("el"), start=1)]
    (folder / "el.csv").write_text("".join(["id,body\n", *rows]), encoding="utf-8")
    lines = [json.dumps({"text": text}) + "\n" for text in documents("en")]
    (folder / "en.jsonl").write_text("".join(lines), encoding="utf-8")


def console(page: str) -> list[tuple[str, str]]:
    """What is typed after each `$`, and what the page says that it prints."""
    shown = "".join(re.findall(r"```console\n(.*?)```", page, flags=re.DOTALL))
    typed = re.findall(r"^\$ ((?:.*\\\n)*.*\n)((?:(?!\$ ).*\n)*)", shown, flags=re.MULTILINE)
    return [(command.strip(), printed) for command, printed in typed]


def typed_in(folder: Path, commands: list[str]) -> list[str]:
    """What each command prints, progress aside, in one shell that stops at the first that fails."""
    program = folder / "bin/peft-moe-delta"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m peft_moe_delta "$@"\n', encoding="utf-8")
    program.chmod(0o755)
    marker = "== what the next command prints =="
    script = "set -e\ntrap 'kill $(jobs -p) 2>/dev/null || true' EXIT\n"
    script += "".join(f"echo '{marker}'\n{command}\n" for command in commands)
    paths = {"PATH": f"{program.parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", "-c", script], cwd=folder, env=os.environ | paths, capture_output=True, text=True)
    printed = done.stdout.split(f"{marker}\n")[1:]
    assert done.returncode == 0, f"{commands[len(printed) - 1]}\n{printed[-1]}\n{done.stderr[-3000:]}"
    return printed


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.mark.slow
def test_the_tour_is_as_its_page_says(tmp_path):
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")
    if missing := [name for name in ("bash", "curl") if shutil.which(name) is None]:
        pytest.skip(f"no {' and no '.join(missing)} on this machine")
    write_inputs(tmp_path)
    steps = console(PAGE.read_text(encoding="utf-8"))
    port = str(free_port())
    printed = typed_in(tmp_path, [command.replace("8000", port) for command, _ in steps])
    for (command, expected), got in zip(steps, printed, strict=True):
        got = got.replace(port, "8000")
        assert doctest.OutputChecker().check_output(expected, got, SAME), f"$ {command}\n{got}"


def test_the_page_goes_from_text_to_a_request():
    commands = [command for command, _ in console(PAGE.read_text(encoding="utf-8"))]
    wanted = ["head", "peft-moe-delta init", "run recipe.yaml --dry-run", "run recipe.yaml", "serve", "verify-served"]
    places = [next(i for i, command in enumerate(commands) if word in command) for word in [*wanted, "curl"]]
    assert places[:4] == sorted(places[:4]) and "curl" in commands[-2]
