"""`init`, `run`, `train`, `status` and `grow`, carried out."""

from __future__ import annotations

import logging

from ...evaluation.page import markdown
from ...hub import push_to_hub
from ...hub.card import CARD_FILE
from ...recipe import Recipe, growing, preview
from ...recipe.foresight import Outlook, expansion_of, look_ahead
from ...recipe.growth import Growth
from ...recipe.growth_foresight import look_ahead_of_growth
from ...recipe.reporting import OURS
from ...recipe.run import Run
from ...recipe.stages import settled_precision
from ...recipe.starter import starter
from ...recipe.timing import estimate
from ..pipeline import Dry
from .publish import card_files

log = logging.getLogger(__name__)


def init(given: tuple[str, str | None, dict[str, str], dict[str, str]]) -> str:
    return starter(*given).rstrip("\n")


def run(given: tuple[Recipe, Dry, bool]) -> str:
    recipe, dry, overwrite = given
    outlook = look_ahead(recipe, whole=True)
    if dry is not None:
        return _foreseen(outlook, dry)
    _warn(outlook)
    job = Run(recipe, overwrite=overwrite)
    report = job.report()
    cards = job.cards(report)
    lines = [markdown(report, OURS), ""]
    if job.recipe.push is not None:
        files = card_files(cards[0]) if cards else None
        address = push_to_hub(job.grafted().folder, job.recipe.push, extra_files=files)
        lines.append(f"The stock checkpoint went to {address}.")
    lines += [f"A model card: {folder / CARD_FILE}" for folder in cards]
    lines.append(f"The report with its pictures: {job.page}")
    if job.recipe.graft.by_context:
        lines.append(f"Routed by context, with a modelling file of its own: {job.by_context().folder}.")
    lines.append(f"Everything is in {job.recipe.output}; the stock checkpoint is {job.grafted().folder}.")
    return "\n".join(lines)


def train(given: tuple[Recipe, Dry, bool]) -> str:
    recipe, dry, overwrite = given
    outlook = look_ahead(recipe, whole=False)
    if dry is not None:
        return _foreseen(outlook, dry)
    _warn(outlook)
    return f"adapter: {Run(recipe, overwrite=overwrite).adapter().folder}"


def status(recipe: Recipe) -> str:
    return preview.status(recipe)


def grow(given: tuple[Growth, Dry]) -> str:
    growth, dry = given
    if dry is None:
        return f"adapter: {growing.grow(growth)}"
    outlook = look_ahead_of_growth(growth)
    training = growth.expand or growth.review
    if dry == "look" or training is None:
        return str(outlook)
    return f"{outlook}\n{estimate(outlook.job, training)}"


def _foreseen(outlook: Outlook, dry: Dry) -> str:
    if dry == "look":
        return str(outlook)
    recipe = outlook.recipe
    job = expansion_of(recipe, autocast=settled_precision(recipe.precision) == "bf16")
    return f"{outlook}\n{estimate(job, recipe.expand)}"


def _warn(outlook: Outlook) -> None:
    for doubt in outlook.doubts:
        log.warning("doubtful: %s", doubt)
