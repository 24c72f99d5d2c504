"""`run`, `train` and `grow`, carried out."""

from __future__ import annotations

from ...evaluation.page import markdown
from ...hub import push_to_hub
from ...hub.card import CARD_FILE
from ...recipe import Recipe, growing
from ...recipe.growth import Growth
from ...recipe.reporting import OURS
from ...recipe.run import Run
from .publish import card_files


def run(recipe: Recipe) -> str:
    job = Run(recipe)
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


def train(recipe: Recipe) -> str:
    return f"adapter: {Run(recipe).adapter().folder}"


def grow(growth: Growth) -> str:
    return f"adapter: {growing.grow(growth)}"
