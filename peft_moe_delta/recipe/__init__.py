"""A pipeline from a file: base model, text and tasks in; a grafted stock checkpoint and a report of what it gained out.

- `fields`: what the file says; `workspace`: steps whose results are kept; `data`: texts and tasks
- `stages`: the steps that train; `grafting`: the graft, tried out; `scoring`, `reporting`: what came of it
- `cards`: what to tell others about it
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from ..evaluation import EvalReport
from ..evaluation.figures import check_installed
from ..evaluation.page import PAGE, write_report
from . import cards, grafting, reporting, scoring, stages
from .fields import Graft, Recipe, read_recipe
from .reporting import BASE, DENSE, OURS, OURS_WHOLE, POST_TRAINED
from .workspace import Step, Workspace, file_hash, model_identity

__all__ = ["OURS", "Recipe", "Run", "read_recipe"]


class Run:
    """One run of a recipe. Each property is a step; asking for it runs what it needs and keeps the results."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.workspace = Workspace(recipe.output)
        self._common = {"precision": recipe.precision, "seed": recipe.seed}
        self._steps: dict[str, Step] = {}

    def base(self) -> Step:
        """The base model; a copy only where the recipe cuts it down."""
        recipe = self.recipe
        identity = {"model": model_identity(recipe.model), "layers": recipe.num_hidden_layers}

        def cut(folder: Path) -> None:
            if recipe.num_hidden_layers is None:
                return
            model = stages.load_model(recipe.model, num_hidden_layers=recipe.num_hidden_layers)
            stages.save_with_tokenizer(model, recipe.model, folder)

        return self._step("base", identity, cut)

    def post_trained(self) -> Step:
        """The post-trained model: the recipe's own, or tuned on its tasks."""
        recipe = self.recipe
        if recipe.tune is None:
            assert recipe.post_trained is not None  # a recipe has one of the two
            return self._step("post_trained", {"model": model_identity(recipe.post_trained)}, lambda folder: None)
        depends_on = {"base": self.base(), "tune": recipe.tune, "tasks": file_hash(recipe.tune.tasks)}
        make = lambda folder: stages.tune(recipe, self.base_model, recipe.tune, folder)  # noqa: E731
        return self._step("post_trained", depends_on, make)

    def expanded(self) -> Step:
        """The adapter after stage 1."""
        recipe = self.recipe
        depends_on = {"base": self.base(), "adapter": recipe.adapter, "expand": recipe.expand, "text": self._text()}
        return self._step("expanded", depends_on, lambda folder: stages.expand(recipe, self.base_model, folder))

    def adapter(self) -> Step:
        """The adapter after all its training: reviewed, where the recipe has a review."""
        recipe, expanded = self.recipe, self.expanded()
        if recipe.review is None:
            return expanded
        depends_on = {"expanded": expanded, "review": recipe.review}
        return self._step(
            "reviewed",
            depends_on,
            lambda folder: stages.review(recipe, self.base_model, expanded.folder, recipe.review, folder),
        )

    def dense(self) -> Step:
        """Dense continual pre-training on the tokens of stage 1, plus the delta; where the recipe has it."""
        recipe, fields = self.recipe, self.recipe.dense
        assert fields is not None
        depends_on = {"base": self.base(), "expand": recipe.expand, "dense": fields, "text": self._text()}
        tuned = self._step("dense", depends_on, lambda folder: stages.dense(recipe, self.base_model, fields, folder))
        return self._step(
            "dense_grafted",
            {"dense": tuned, "post_trained": self.post_trained()},
            lambda folder: grafting.graft_dense(self.base_model, tuned.folder, self.post_trained_model, folder),
        )

    def grafted(self, name: str = "grafted", fields: Graft | None = None) -> Step:
        """The stock checkpoint."""
        recipe, fields, adapter = self.recipe, fields or self.recipe.graft, self.adapter()
        depends_on: dict[str, Any] = {"adapter": adapter, "post_trained": self.post_trained(), "graft": fields}
        if fields.expert_scale == "auto":
            depends_on |= {"text": self._text(), "tasks": recipe.tasks, "limits": recipe.limits}
        return self._step(
            name,
            depends_on,
            lambda folder: grafting.graft(
                recipe, self.base_model, adapter.folder, self.post_trained_model, fields, folder
            ),
        )

    def report(self) -> EvalReport:
        """Every model, scored and looked at; written beside the steps as page, JSON and pictures."""
        check_installed()
        models: dict[str, tuple[str, Path | str, Step]] = {
            BASE: ("base", self.base_model, self.base()),
            POST_TRAINED: ("post_trained", self.post_trained_model, self.post_trained()),
        }
        if self.recipe.dense is not None:
            dense = self.dense()
            models[DENSE] = ("dense_grafted", dense.folder, dense)
        ours = self.grafted()
        if self.recipe.graft.expert_scale != 1.0:
            whole = self.grafted("grafted_whole", replace(self.recipe.graft, expert_scale=1.0))
            models[OURS_WHOLE] = ("grafted_whole", whole.folder, whole)
        models[OURS] = ("grafted", ours.folder, ours)
        scores = {row: self._scores(*model).folder for row, model in models.items()}
        report = reporting.report(self.recipe, scores, self._looked(models).folder)
        write_report(report, self.page.parent)
        return report

    @property
    def page(self) -> Path:
        """Where the report is to be read."""
        return self.workspace.output / "report" / PAGE

    def cards(self, report: EvalReport) -> list[Path]:
        """The folders of the model cards, the stock checkpoint's first; none where the recipe has no `card`."""
        if self.recipe.card is None:
            return []
        return cards.write(
            self.recipe,
            self.recipe.card,
            self.workspace.output / "cards",
            adapter=self.adapter(),
            grafted=self.grafted(),
            stages={
                "post-training": self.post_trained(),
                "expansion": self.expanded(),
                "review": self.adapter(),
            },
            report=replace(report, routing=[], agreement=[], tokens=[], generations=[]),  # what a card has no room for
        )

    @property
    def base_model(self) -> Path | str:
        """Where the base model is loaded from."""
        return self.recipe.model if self.recipe.num_hidden_layers is None else self.base().folder

    @property
    def post_trained_model(self) -> Path | str:
        """Where the post-trained model is loaded from."""
        return self.recipe.post_trained or self.post_trained().folder

    def _scores(self, name: str, checkpoint: Path | str, step: Step) -> Step:
        recipe = self.recipe
        depends_on = {"model": step, "text": self._text(), "tasks": self._task_files(), "limits": recipe.limits}
        return self._step(f"scores/{name}", depends_on, lambda folder: scoring.score(recipe, checkpoint, folder))

    def _looked(self, models: dict[str, tuple[str, Path | str, Step]]) -> Step:
        recipe, adapter = self.recipe, self.adapter()
        places = {row: place for row, (_, place, _) in models.items()}
        depends_on = {"models": {row: step for row, (_, _, step) in models.items()}, "adapter": adapter}
        return self._step(
            "looked",
            depends_on | {"text": self._text(), "tasks": self._task_files()},
            lambda folder: reporting.look(recipe, places, self.base_model, adapter.folder, folder),
        )

    def _text(self) -> dict[str, Any]:
        """Languages with the hashes of their files."""
        return {
            code: {"group": language.group}
            | {s: file_hash(f) for s in ("train", "validation", "test") if (f := getattr(language, s))}
            for code, language in self.recipe.languages.items()
        }

    def _task_files(self) -> dict[str, str]:
        return {name: file_hash(tasks.test) for name, tasks in self.recipe.tasks.items()}

    def _step(self, name: str, depends_on: dict[str, Any], make: Any) -> Step:
        if name not in self._steps:
            self._steps[name] = self.workspace.step(name, self._common | depends_on, make)
        return self._steps[name]
