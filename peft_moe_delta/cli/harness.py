"""lm-evaluation-harness: its own command line with our model in it, and its files.

`lm_eval` finds models in a table of its own and has no plug-ins, so the program `peft-moe-delta-lm-eval` enters ours
and hands over; arguments and output are `lm_eval`'s.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

from ..evaluation.harness_files import with_harness_results, write_harness_tasks
from ..evaluation.report import EvalReport
from ..recipe import read_recipe
from .options import Command, new_folder


def lm_eval_main() -> None:
    """`peft-moe-delta-lm-eval`: everything after it is for `lm_eval`, which now knows `--model moe_delta`."""
    try:
        from lm_eval.__main__ import cli_evaluate

        from ..evaluation import harness  # noqa: F401  # registers the model
    except ImportError as error:
        sys.exit(f"error: lm-evaluation-harness is not installed ({error}). pip install 'peft-moe-delta[lm-eval]'")
    cli_evaluate()


def _add_task_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("recipe", help="the recipe whose test text and tasks are to be run")
    parser.add_argument("output", type=new_folder, help="folder for the task files, for lm_eval's --include_path")


def _tasks(arguments: Namespace) -> str:
    recipe = read_recipe(arguments.recipe)
    names = write_harness_tasks(
        arguments.output,
        {code: language.test for code, language in recipe.languages.items()},
        {name: tasks.test for name, tasks in recipe.tasks.items()},
    )
    return ",".join(names)


def _add_result_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("report", type=Path, help="report.json or its folder; it gets the new rows")
    parser.add_argument("results", type=Path, help="what lm_eval's --output_path wrote")
    parser.add_argument("--model", required=True, help="what the report calls the model that was run")


def _results(arguments: Namespace) -> str:
    folder = arguments.report if arguments.report.is_dir() else arguments.report.parent
    return str(
        with_harness_results(EvalReport.load(arguments.report), arguments.results, model=arguments.model).save(folder)
    )


COMMANDS = (
    Command("harness-tasks", "task files for lm_eval; prints their names for --tasks", _add_task_arguments, _tasks),
    Command("harness-results", "lm_eval's results into a report", _add_result_arguments, _results),
)
