"""The report that a recipe ends with, from what its steps have found: nothing is measured twice.

In: the findings about each model, and how its routes drifted. Out: `EvalReport`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from ..evaluation import EvalReport
from ..evaluation.measure import Findings, assemble, doubts
from ..evaluation.report import Agreement
from .fields import Recipe
from .scoring import DRIFT, FINDINGS, material_of

BASE, POST_TRAINED, DENSE = "base", "post-trained", "dense continual pre-training + delta"
OURS, OURS_BY_CONTEXT = "ours, grafted", "ours, grafted, by context"


def report(recipe: Recipe, scores: Mapping[str, Path], drift: Path) -> EvalReport:
    """Everything about the models, in the order of `scores`: model -> folder of its findings."""
    kept = json.loads((drift / DRIFT).read_text(encoding="utf-8"))
    found = {name: _named(Findings.load(folder / FINDINGS), kept["experts"]) for name, folder in scores.items()}
    material = material_of(recipe)
    references = [name for name in (POST_TRAINED, BASE, DENSE, OURS_BY_CONTEXT) if name in found]
    pairs = [(name, POST_TRAINED) for name in found if name != POST_TRAINED]
    pairs += [(OURS, reference) for reference in references[1:]]
    return assemble(
        found,
        material.prompts,
        groups={code: language.group for code, language in recipe.languages.items()},
        languages=[*recipe.languages, *recipe.unseen],
        references=references,
        pairs=pairs,
        agreement=[Agreement(**row) for row in kept["agreement"]],
        warnings=[*kept["doubts"], *doubts(material)],
    )


def _named(findings: Findings, experts: list[str]) -> Findings:
    """A stock model does not know its experts' names: its adapter's plan does."""
    return replace(
        findings,
        routing=[replace(row, experts=experts[: len(row.experts)]) for row in findings.routing],
        tokens=[replace(row, experts=experts[: len(row.experts)]) for row in findings.tokens],
    )
