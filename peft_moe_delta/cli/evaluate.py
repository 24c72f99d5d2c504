"""`evaluate`: any number of models on the same held-out material, into a report with pictures.

`harness-tasks` and `harness-results` exchange files with lm-evaluation-harness.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from functools import partial
from pathlib import Path

from ..recipe import read_recipe
from .options import Command, new_folder


def _add_arguments(parser: ArgumentParser) -> None:
    add = partial(parser.add_argument, action="append", default=[])
    add("--model", metavar="NAME=MODEL", help="a folder or Hub id of a model or adapter; the last one is yours")
    add("--text", metavar="LANGUAGE=FILE", help="held-out text: .jsonl, .csv, .txt, a folder, hf://owner/name ...")
    add("--group", metavar="LANGUAGE=GROUP", help="`original` or another (default: as the adapters say)")
    add("--tasks", metavar="NAME=FILE", help="tasks with exact answers: `prompt` and `answer`")
    add("--task-language", metavar="NAME=LANGUAGE", help="the language that tasks are about")
    add("--prompts", metavar="LANGUAGE=FILE", help="prompts whose answers should be in it")
    add("--reference", metavar="NAME", help="a model to compare with, the one for retention first")
    add("--trained", metavar="NAME=LANGUAGES", help="what a model was trained on (hu,el): adds the transfer matrix")
    add("--agreement", metavar="NAME=NAME", help="two models of one plan whose routes to compare")
    parser.add_argument("--english-words", type=Path, help="the paper's list for the word pass rate, a word a line")
    parser.add_argument("--chat", action="store_true", help="put prompts through the chat template")
    parser.add_argument("--limit-bytes", type=int, help="of each language's text (default: all)")
    parser.add_argument("--max-length", type=int, default=512, help="tokens a window of text (default: 512)")
    parser.add_argument("--batch-size", type=int, default=8, help="rows a forward pass (default: 8)")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="of an answer (default: 64)")
    parser.add_argument(
        "--output", type=new_folder, required=True, help="folder for report.json, report.html and figures"
    )


def _add_task_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("recipe", help="the recipe whose test text and tasks are to be run")
    parser.add_argument("output", type=new_folder, help="folder for the task files, for lm_eval's --include_path")


def _read_task_arguments(arguments: Namespace) -> Namespace:
    return Namespace(recipe=read_recipe(arguments.recipe), output=arguments.output)


def _add_result_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("report", type=Path, help="report.json or its folder; it gets the new rows")
    parser.add_argument("results", type=Path, help="what lm_eval's --output_path wrote")
    parser.add_argument("--model", required=True, help="what the report calls the model that was run")


COMMANDS = (
    Command(
        "evaluate", "models side by side: a report of what they gained and lost", _add_arguments, "evaluate:evaluate"
    ),
    Command(
        "harness-tasks",
        "task files for lm_eval; prints their names for --tasks",
        _add_task_arguments,
        "evaluate:harness_tasks",
        _read_task_arguments,
    ),
    Command("harness-results", "lm_eval's results into a report", _add_result_arguments, "evaluate:harness_results"),
)
