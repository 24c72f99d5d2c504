"""All subjects, run one after another in a folder of their own."""

from __future__ import annotations

import itertools
import logging
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from unittest import mock

from huggingface_hub import constants

from fuzz import command_line, config, data, recipes, workspace
from fuzz.runner import Case, Tally
from fuzz.runner import run as run_cases

SUBJECTS: dict[str, Callable[[int, Path], Iterator[Case]]] = {
    "config": lambda seed, folder: config.cases(seed),
    "recipes": recipes.cases,
    "command_line": command_line.cases,
    "data": lambda seed, folder: data.cases(seed),
}


def run(
    subjects: Sequence[str], number: int, seed: int = 0, report: Callable[[str], object] = lambda line: None
) -> Tally:
    """`number` inputs of each subject. Nothing outside of a temporary folder is written, and no Hub is asked."""
    total = Tally()
    with tempfile.TemporaryDirectory() as place, mock.patch.object(constants, "HF_HUB_OFFLINE", True):
        folder = workspace.make(Path(place) / "work")
        pristine = shutil.copytree(folder, Path(place) / "pristine")

        def restore() -> None:
            shutil.rmtree(folder)
            shutil.copytree(pristine, folder)
            (folder / "cwd").mkdir()

        for name in subjects:
            restore()  # what an earlier subject has left behind is none of this one's files
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what a bad value is warned of is not what is looked for
                found = itertools.islice(SUBJECTS[name](seed, folder), number)
                logging.disable(logging.CRITICAL)
                try:
                    tally = run_cases(found, folder, restore)
                finally:
                    logging.disable(logging.NOTSET)
            report(f"{name}: {tally}")
            for problem in [*tally.tracebacks, *tally.lost]:
                report(f"  {problem}")
            total = total + tally
    report(f"all: {total}")
    return total
