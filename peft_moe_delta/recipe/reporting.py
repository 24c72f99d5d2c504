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

ABOUT = {
    BASE: "what the experts were trained on",
    POST_TRAINED: "what the delta comes from: all that is to be kept",
    DENSE: "the whole base trained on the same text, then the delta",
    OURS: "the experts and the delta in a checkpoint of their own",
    OURS_BY_CONTEXT: "the same experts, chosen by the language that is read from the text",
}
"""What each row of a recipe's report is."""


def report(recipe: Recipe, scores: Mapping[str, Path], drift: Path) -> EvalReport:
    """Everything about the models, in the order of `scores`: model -> folder of its findings."""
    kept = json.loads((drift / DRIFT).read_text(encoding="utf-8"))
    found = {name: _described(name, folder, kept["experts"]) for name, folder in scores.items()}
    material = material_of(recipe)
    references = [name for name in (POST_TRAINED, BASE, DENSE, OURS_BY_CONTEXT) if name in found]
    own = [name for name in (OURS, OURS_BY_CONTEXT) if name in found]
    pairs = [(name, POST_TRAINED) for name in found if name != POST_TRAINED]
    pairs += [(name, reference) for reference in references[1:] for name in own if name != reference]
    return assemble(
        found,
        material.prompts,
        groups={code: language.group for code, language in recipe.languages.items()},
        languages=[*recipe.languages, *recipe.unseen],
        references=references,
        own=own,
        pairs=pairs,
        agreement=[Agreement(**row) for row in kept["agreement"]],
        warnings=[*kept["doubts"], *doubts(material)],
    )


def _described(name: str, folder: Path, experts: list[str]) -> Findings:
    """What was found of a model, with what it is and the names of its experts."""
    findings = Findings.load(folder / FINDINGS)
    return replace(findings, model=replace(findings.model, about=ABOUT[name])).with_experts(experts)
