"""`python tests/distributed_table.py`: what equals one process under which engine, on two gloo processes on CPU.

Prints a Markdown table of stages and engines. "equal" has the largest difference of losses, gradients, parameters,
logits or files, over all routings, from one process that sees all documents at once; "refused" has the number of the
message below. DeepSpeed's columns need it installed. `--write` puts the table into docs/training.md.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
os.environ.setdefault("DS_ACCELERATOR", "cpu")

from engines.cases import ROUTINGS, STAGES  # noqa: E402
from engines.engines import ENGINES  # noqa: E402
from engines.launch import ORDER, outcomes, references  # noqa: E402

PAGE = HERE.parent / "docs" / "training.md"
BEGINNING, END = "<!-- tests/distributed_table.py writes this table -->\n", "<!-- end of the table -->\n"


def cell(results: dict[str, dict[str, Any]], messages: list[str]) -> str:
    """What came of a stage under an engine, by routing: one word where they agree."""
    parts = []
    for word in ORDER:
        found = {routing: result for routing, result in results.items() if result["outcome"] == word}
        if not found:
            continue
        where = "" if len(found) == len(results) else f"{', '.join(found)}: "
        if word in ("equal", "wrong"):
            parts.append(f"{where}{word} ({max(result['difference'] for result in found.values()):.0e})")
            continue
        texts = dict.fromkeys(" ".join(result["message"].split())[:400] for result in found.values())
        messages += [text for text in texts if text not in messages]
        parts.append(f"{where}{word} " + "".join(f"[{messages.index(text) + 1}]" for text in texts))
    return "; ".join(parts) or "-"


def table(found: dict[str, dict[str, Any]], engines: list[str], stages: list[str]) -> str:
    """Stages by engines, and the messages of what was refused."""
    messages: list[str] = []
    lines = ["| " + " | ".join(["stage", *engines]) + " |", "|---" * (len(engines) + 1) + "|"]
    for stage in stages:
        cells = []
        for engine in engines:
            keys = {key.split("/")[1]: key for key in found if key.split("/")[::2] == [engine, stage]}
            cells.append(cell({routing: found[key] for routing, key in keys.items()}, messages))
        lines.append("| " + " | ".join([stage, *cells]) + " |")
    return "\n".join([*lines, "", *(f"{number}. {text}" for number, text in enumerate(messages, 1))]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engines", nargs="*", default=list(ENGINES), choices=list(ENGINES))
    parser.add_argument("--routings", nargs="*", default=list(ROUTINGS), choices=list(ROUTINGS))
    parser.add_argument("--stages", nargs="*", default=list(STAGES), choices=list(STAGES))
    parser.add_argument("--json", type=Path, help="also write everything that was found, traces included")
    parser.add_argument("--read", type=Path, help="run nothing: make the table of what --json wrote")
    parser.add_argument("--write", action="store_true", help=f"put the table into docs/{PAGE.name}")
    options = parser.parse_args()
    has_deepspeed = importlib.util.find_spec("deepspeed") is not None
    engines = [name for name in options.engines if has_deepspeed or not name.startswith("ZeRO")]
    if options.read:
        found = json.loads(options.read.read_text())
    else:
        with tempfile.TemporaryDirectory() as folder:
            possible = references(Path(folder), [(r, s) for s in options.stages for r in options.routings])
            found = outcomes([f"{e}/{r}/{s}" for e in engines for r, s in possible], Path(folder))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))
    text = table(found, engines, options.stages)
    print(text)
    if options.write:
        before, _, rest = PAGE.read_text().partition(BEGINNING)
        PAGE.write_text(f"{before}{BEGINNING}\n{text}\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main()
