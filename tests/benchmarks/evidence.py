"""The frontier study: every method's retention against its expansion, at several lengths and random seeds.

    python tests/benchmarks/evidence.py run --workers 2    # hours; stop and start again at any time
    python tests/benchmarks/evidence.py pages              # tables and pictures, from the scores alone

`make evidence` and `make evidence-quick` do both. The text is that of ../shared (LibreOffice's help) and of Home
Assistant's interface, which examples/demo_inputs.py makes; without them there is nothing to do.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from frontier.material import PAIRS
from frontier.pictures import draw
from frontier.scores import Results
from frontier.study import Study, carry_out_all, quick
from frontier.tables import BEGIN, END, filled, page
from pairs import SHARED

from peft_moe_delta.files import write_text

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "tests" / "benchmarks" / "results" / "frontier"
PAGE = ROOT / "docs" / "evidence.md"


def run(arguments: argparse.Namespace) -> int:
    """Train and score. Returns the exit code."""
    missing = [folder for folder in (arguments.shared, arguments.interface) if not folder.is_dir()]
    if missing:
        print(f"skipped: no text in {', '.join(map(str, missing))}. The first is ../shared's, the other is made by "
              "examples/demo_inputs.py --output build/demo/inputs --also en hu el ru de")  # fmt: skip
        return 0
    study = Study(arguments.shared, arguments.interface, arguments.results, ROOT / "build" / "frontier" / "pairs")
    study = quick(study) if arguments.quick else study
    wanted = arguments.pairs or study.lengths
    study = replace(study, lengths={name: steps for name, steps in study.lengths.items() if name in wanted})
    failed = carry_out_all(study, arguments.workers)
    if failed:
        print(f"{failed} runs failed; the same command tries them again.", file=sys.stderr)
    return min(failed, 1)


def pages(arguments: argparse.Namespace) -> int:
    """Write tables and pictures; a page that is not there yet has nothing but them."""
    results, file = Results.read(arguments.results), arguments.page
    figures = draw(results, file.parent / "figures") if results.settings else []
    text = file.read_text(encoding="utf-8") if file.is_file() else f"# Evidence\n\n{BEGIN}{END}\n"
    write_text(file, filled(text, page(results, figures)))
    print(file)
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    doing = commands.add_parser("run", help="train and score what is not there yet")
    doing.add_argument("--quick", action="store_true", help="one seed, one length, one learning rate, few methods")
    doing.add_argument("--pairs", nargs="+", choices=list(PAIRS), help="these pairs of models alone")
    doing.add_argument("--workers", type=int, default=2, help="runs side by side, of one thread each")
    doing.add_argument("--shared", type=Path, default=SHARED, help="folder of LibreOffice's help")
    doing.add_argument("--interface", type=Path, default=ROOT / "build" / "demo" / "inputs" / "more_text")
    making = commands.add_parser("pages", help="make the tables and pictures")
    making.add_argument("--page", type=Path, default=PAGE, help="the page whose tables are made anew")
    for command in (doing, making):
        command.add_argument("--results", type=Path, default=RESULTS, help="folder of the scores")
    arguments = parser.parse_args()
    return run(arguments) if arguments.command == "run" else pages(arguments)


if __name__ == "__main__":
    sys.exit(main())
