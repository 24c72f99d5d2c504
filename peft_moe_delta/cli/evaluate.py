"""`evaluate`: any number of models on the same held-out material, into a report with pictures.

`harness-tasks` and `harness-results` exchange files with lm-evaluation-harness.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from functools import partial
from pathlib import Path

from tqdm import tqdm

from ..errors import DataError
from ..evaluation import TaskSet, evaluate_languages
from ..evaluation.figures import check_installed
from ..evaluation.harness_files import with_harness_results, write_harness_tasks
from ..evaluation.page import markdown, write_report
from ..evaluation.report import EvalReport
from ..files import read_tasks, read_text, read_texts
from ..recipe import read_recipe
from .options import Command, new_folder, pairs_of


def _add_arguments(parser: ArgumentParser) -> None:
    add = partial(parser.add_argument, action="append", default=[])
    add("--model", metavar="NAME=MODEL", help="a folder or Hub id of a model or adapter; the last one is yours")
    add("--text", metavar="LANGUAGE=FILE", help="held-out text: jsonl with `text`")
    add("--group", metavar="LANGUAGE=GROUP", help="`original` or another (default: as the adapters say)")
    add("--tasks", metavar="NAME=FILE", help="tasks with exact answers: jsonl with `prompt` and `answer`")
    add("--task-language", metavar="NAME=LANGUAGE", help="the language that tasks are about")
    add("--prompts", metavar="LANGUAGE=FILE", help="jsonl with `text`: prompts whose answers should be in it")
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


def _evaluate(arguments: Namespace) -> str:
    check_installed()
    models = pairs_of("--model", arguments.model)
    texts = pairs_of("--text", arguments.text)
    if not models or not texts:
        raise DataError("evaluate needs at least one --model NAME=MODEL and one --text LANGUAGE=FILE.")
    about = pairs_of("--task-language", arguments.task_language)
    tasks = {name: TaskSet(read_tasks(f), about.get(name)) for name, f in pairs_of("--tasks", arguments.tasks).items()}
    report = evaluate_languages(
        models,
        {code: read_texts(file, arguments.limit_bytes) for code, file in texts.items()},
        languages=pairs_of("--group", arguments.group) or None,
        references=arguments.reference,
        tasks=tasks,
        prompts={code: read_texts(file) for code, file in pairs_of("--prompts", arguments.prompts).items()},
        trained={name: codes.split(",") for name, codes in pairs_of("--trained", arguments.trained).items()},
        agreement=list(pairs_of("--agreement", arguments.agreement).items()),
        english=arguments.english_words and read_text(arguments.english_words).split(),
        chat=arguments.chat,
        max_length=arguments.max_length,
        batch_size=arguments.batch_size,
        max_new_tokens=arguments.max_new_tokens,
        progress=partial(tqdm, leave=False),
    )
    page = write_report(report, arguments.output)
    return f"{markdown(report, report.models[-1].name)}\n\nThe report: {page}"


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
    Command("evaluate", "models side by side: a report of what they gained and lost", _add_arguments, _evaluate),
    Command("harness-tasks", "task files for lm_eval; prints their names for --tasks", _add_task_arguments, _tasks),
    Command("harness-results", "lm_eval's results into a report", _add_result_arguments, _results),
)
