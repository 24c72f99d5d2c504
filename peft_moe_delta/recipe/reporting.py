"""The report that a recipe ends with, from the scores its steps have kept: nothing is scored twice.

In: the scores of each model, and a short look at each model (routing, tokens, what it writes). Out: `EvalReport`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import cast

from ..evaluation import EvalReport
from ..evaluation.compare import compare, status_of
from ..evaluation.generation import generate
from ..evaluation.loading import Measured
from ..evaluation.measure import command, doubts, fertility_rows, look_at_routing, side_by_side, versions
from ..evaluation.report import Model
from ..evaluation.routes import expert_names, first_choice_agreement
from ..evaluation.scoring import Material
from ..languages import closest_code
from ..loading import load_adapter, load_tokenizer
from ..tuner import MoeDeltaModel
from .data import read_tasks, read_texts
from .fields import Recipe
from .scoring import arithmetic, read_scores, ready
from .stages import load_made, load_model

BASE, POST_TRAINED, DENSE = "base", "post-trained", "dense continual pre-training + delta"
OURS_WHOLE, OURS = "ours, experts as trained", "ours, grafted"

_LOOKED_AT_BYTES = 1500  # of each language's text, for routing
_PROMPTS = 2  # of each set of tasks
_BEGINNING = 60  # characters of a document that models continue
_WRITTEN = 24  # tokens of each continuation


def look(recipe: Recipe, models: Mapping[str, Path | str], base: Path | str, adapter: Path, folder: Path) -> None:
    """Load every model once: what it writes, its size and its tokenizer, and where the grafted one's tokens go."""
    texts = {code: read_texts(language.test, _LOOKED_AT_BYTES) for code, language in recipe.languages.items()}
    warnings = doubts(Material(texts=texts))
    prompts = _prompts(recipe, texts)
    answers: dict[str, dict[str, list[str]]] = {code: {} for code in prompts}
    seen = EvalReport(models=[], languages={}, warnings=warnings)
    for name, checkpoint in models.items():
        model = ready(load_made(checkpoint, recipe), recipe)
        measured = Measured(model, load_tokenizer(checkpoint), str(checkpoint))
        size = sum(p.numel() for p in model.parameters())
        seen.models.append(Model(name=name, source=str(checkpoint), parameters=size))
        if not seen.fertility:  # all models of a recipe have one tokenizer
            seen.fertility.extend(fertility_rows(measured, name, texts))
        with arithmetic(recipe):
            everything = [
                prompt for asked in prompts.values() for prompt in asked
            ]  # one batch: none is told its language
            written = iter(generate(model, measured.tokenizer, everything, max_new_tokens=_WRITTEN))
            for code, asked in prompts.items():
                answers[code][name] = [next(written) for _ in asked]
            if name == OURS:
                _look_at_routes(recipe, measured, base, adapter, texts, seen)
    seen.generations.extend(side_by_side(prompts, answers))
    seen.save(folder)


def report(recipe: Recipe, scores: Mapping[str, Path], looked: Path) -> EvalReport:
    """Everything about the models, in the order of `scores`: model -> folder of its scores."""
    groups = {code: language.group for code, language in recipe.languages.items()}
    kept = {name: read_scores(folder) for name, folder in scores.items()}
    task_languages = {name: tasks.language for name, tasks in recipe.tasks.items()}
    items = {name: found.items(task_languages) for name, found in kept.items()}
    references = [name for name in (POST_TRAINED, BASE, DENSE, OURS_WHOLE) if name in items]
    pairs = [(name, POST_TRAINED) for name in items if name != POST_TRAINED]
    pairs += [(OURS, reference) for reference in references[1:]]
    values, differences = compare(items, groups, pairs)
    seen = EvalReport.load(looked)
    return EvalReport(
        models=[replace(row, tokens_per_second=kept[row.name].tokens_per_second) for row in seen.models],
        languages={code: status for code in groups if (status := status_of(code, groups))},
        references=references,
        scores=values,
        differences=differences,
        routing=seen.routing,
        agreement=seen.agreement,
        tokens=seen.tokens,
        generations=seen.generations,
        fertility=seen.fertility,
        warnings=seen.warnings,
        command=command(),
        versions=versions(),
    )


def _prompts(recipe: Recipe, texts: Mapping[str, list[str]]) -> dict[str, list[str]]:
    """By language: beginnings of held-out documents, and prompts of tasks that are in a language."""
    prompts: dict[str, list[str]] = {}
    for code, documents in texts.items():
        longest = max(documents, key=len)
        prompts[code] = [longest[:_BEGINNING].rsplit(" ", 1)[0]]
    for tasks in recipe.tasks.values():
        if tasks.language and (spoken := closest_code(tasks.language, prompts)):
            prompts[spoken] += [task["prompt"] for task in read_tasks(tasks.test, _PROMPTS)]
    return prompts


def _look_at_routes(
    recipe: Recipe, ours: Measured, base: Path | str, adapter: Path, texts: Mapping[str, list[str]], seen: EvalReport
) -> None:
    """Routing of the grafted model, and how often it agrees with the adapter before the graft."""
    before = load_adapter(load_model(base), adapter)
    plan = cast("MoeDeltaModel", before.base_model).plan()
    names = expert_names(plan.groups, [max(counts) for counts in zip(*plan.counts, strict=True)])
    routing, views = look_at_routing(ours, OURS, texts, names)
    seen.routing.extend(routing)
    seen.tokens.extend(views)
    speaking = Measured(before, ours.tokenizer, None)
    for code, documents in texts.items():
        agreement = first_choice_agreement(
            ours.model,
            before,
            ours.tokenizer,
            documents,
            names=(OURS, "its adapter before the graft"),
            language=code,
            spoken=(None, speaking.spoken(code)),
        )
        if agreement is not None:
            seen.agreement.append(agreement)
