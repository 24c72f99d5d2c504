"""`evaluate`, `harness-tasks` and `harness-results`, carried out."""

from __future__ import annotations

from argparse import Namespace
from functools import partial

from tqdm import tqdm

from ...errors import DataError
from ...evaluation import TaskSet, evaluate_languages
from ...evaluation.figures import check_installed
from ...evaluation.harness_files import with_harness_results, write_harness_tasks
from ...evaluation.page import markdown, write_report
from ...evaluation.report import EvalReport
from ...files import read_text
from ...sources import read_tasks, read_texts
from ..options import pairs_of


def evaluate(arguments: Namespace) -> str:
    check_installed()
    models = pairs_of("--model", arguments.model)
    texts = pairs_of("--text", arguments.text)
    if not models or not texts:
        raise DataError("evaluate needs at least one --model NAME=MODEL and one --text LANGUAGE=FILE.")
    about = pairs_of("--task-language", arguments.task_language)
    tasks = {name: TaskSet(read_tasks(f), about.get(name)) for name, f in pairs_of("--tasks", arguments.tasks).items()}
    report = evaluate_languages(
        models,
        {code: read_texts(file, arguments.limit_bytes, language=code) for code, file in texts.items()},
        languages=pairs_of("--group", arguments.group) or None,
        references=arguments.reference,
        tasks=tasks,
        prompts={
            code: read_texts(file, language=code) for code, file in pairs_of("--prompts", arguments.prompts).items()
        },
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


def harness_tasks(arguments: Namespace) -> str:
    recipe = arguments.recipe
    names = write_harness_tasks(
        arguments.output,
        {code: language.test for code, language in recipe.languages.items()},
        {name: tasks.test for name, tasks in recipe.tasks.items()},
    )
    return ",".join(names)


def harness_results(arguments: Namespace) -> str:
    folder = arguments.report if arguments.report.is_dir() else arguments.report.parent
    return str(
        with_harness_results(EvalReport.load(arguments.report), arguments.results, model=arguments.model).save(folder)
    )
