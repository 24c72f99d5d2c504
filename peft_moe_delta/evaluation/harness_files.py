"""The files that lm-evaluation-harness reads and writes: our held-out text and tasks as its tasks, its results as ours.

In: text, and tasks with `prompt` and `answer`. Out: task files for `lm_eval --include_path`, and beside them what we
read, as jsonl: the harness sees the same documents, whatever they were kept in. In: the `results_*.json` that
`lm_eval --output_path` wrote. Out: rows of an `EvalReport`. Needs no `lm_eval`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from ..errors import DataError
from ..files import write_text
from ..languages import closest_code, closest_code_in_name
from ..sources import TaskSource, TextSource, each_text, read_tasks
from .report import TEXT, EvalReport, Model, Score

TEXT_TASK = "moe_delta_text"
"""What the names of the tasks on held-out text begin with; the language's code follows."""

_OURS = {"bits_per_byte": TEXT}
_NORMAL_95 = 1.96


def write_harness_tasks(
    folder: str | Path, texts: Mapping[str, str | Path | TextSource], tasks: Mapping[str, str | Path | TaskSource]
) -> list[str]:
    """Write one task file for each language's text and each set of tasks, with its data.

    Args:
        folder: for `lm_eval --include_path`; made if need be.
        texts: language -> held-out text: bits per byte by rolling log-likelihood.
        tasks: name -> tasks with `prompt` and `answer`: exact match of a greedy answer. The name may end in a language.

    Returns:
        The tasks' names, for `lm_eval --tasks`.

    Raises:
        DataError: a file that is not there, or not what it should be.
    """
    folder = Path(folder)
    for code, source in texts.items():
        rows = [{"text": text} for text in each_text(source, code)]
        _write_task(folder, f"{TEXT_TASK}_{code}", rows, _TEXT_TASK)
    for name, tasks_source in tasks.items():
        _write_task(folder, _task_name(name), read_tasks(tasks_source), _EXACT_TASK)
    return [*(f"{TEXT_TASK}_{code}" for code in texts), *map(_task_name, tasks)]


_TEXT_TASK: Mapping[str, Any] = {
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{text}}",
    "metric_list": [{"metric": "bits_per_byte"}],
}
_EXACT_TASK: Mapping[str, Any] = {
    "output_type": "generate_until",
    "doc_to_text": "{{prompt}}",
    "doc_to_target": "{{answer}}",
    "target_delimiter": "",
    "generation_kwargs": {"until": [], "do_sample": False, "max_gen_toks": 32},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}


def _write_task(folder: Path, name: str, rows: list[dict[str, str]], asked: Mapping[str, Any]) -> None:
    data = folder / f"{name}.jsonl"
    write_text(data, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    fields = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data.resolve())}},
        "test_split": "test",
        **asked,
        "metadata": {"version": 1.0},
    }
    write_text(folder / f"{name}.yaml", yaml.safe_dump(fields, sort_keys=False))


def _task_name(name: str) -> str:
    return re.sub(r"\W+", "_", name.strip().lower())


def with_harness_results(
    report: EvalReport, path: str | Path, *, model: str, languages: Mapping[str, str] | None = None
) -> EvalReport:
    """A report with the scores of a `results_*.json` added.

    Args:
        report: what to add to.
        path: the file, or a folder with exactly one such file below it.
        model: what the report calls the model that was run; a new name becomes a new row.
        languages: task -> language; None to read it from the tasks' names, where it is one of the report's in
            any standard (`arc_hun_Latn` is in `hu`).

    Raises:
        DataError: no such file, or not what lm_eval writes.
    """
    file = _results_file(Path(path))
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        results: dict[str, dict[str, Any]] = data["results"]
        rows = [row for task in results for row in _scores(data, task, model, report, languages or {})]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise DataError(f"{file} is no result of lm_eval: {error!r}. Pass what --output_path wrote.") from error
    known = [named.name for named in report.models]
    models = report.models if model in known else [*report.models, Model(name=model)]
    versions = {**report.versions, "lm_eval": str(data["lm_eval_version"])} if "lm_eval_version" in data else None
    return replace(report, models=models, scores=[*report.scores, *rows], versions=versions or report.versions)


def _results_file(path: Path) -> Path:
    if path.is_file():
        return path
    found = sorted(path.rglob("results_*.json"))
    if len(found) != 1:
        raise DataError(f"{path} holds {len(found)} files results_*.json, expected one. Pass the file itself.")
    return found[0]


def _scores(
    data: Mapping[str, Any], task: str, model: str, report: EvalReport, languages: Mapping[str, str]
) -> list[Score]:
    """The rows of one task: every number that is a metric, with its interval where lm_eval gives a standard error."""
    measured: dict[str, Any] = data["results"][task]
    stated = languages.get(task)
    language = (
        closest_code(stated, report.languages) or stated if stated else closest_code_in_name(task, report.languages)
    )
    rows = []
    for key, value in measured.items():
        metric, comma, filtered = key.partition(",")
        if not comma or metric.endswith("_stderr") or isinstance(value, bool) or not isinstance(value, int | float):
            continue
        error = measured.get(f"{metric}_stderr,{filtered}")
        spread = _NORMAL_95 * error if isinstance(error, int | float) else None
        own = task.startswith(TEXT_TASK) and metric in _OURS
        rows.append(
            Score(
                model=model,
                task=f"{_OURS[metric]} (lm_eval)" if own else task,
                metric=metric if filtered == "none" else f"{metric} ({filtered})",
                language=language,
                status=report.languages.get(language) if language else None,
                value=float(value),
                low=None if spread is None else value - spread,
                high=None if spread is None else value + spread,
                items=data.get("n-samples", {}).get(task, {}).get("effective"),
                definition=f"by lm-evaluation-harness {data.get('lm_eval_version', '')}".strip(),
                higher_is_better=bool(data.get("higher_is_better", {}).get(task, {}).get(metric, True)),
            )
        )
    return rows
