"""One run of a recipe: its steps, what each reads, and in which order they are made.

In: a `Recipe`. Out: folders of its output, kept from one run to the next, and the report.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from transformers import set_seed

from ..evaluation import EvalReport
from ..evaluation.figures import check_installed
from ..evaluation.page import PAGE, write_report
from ..sources import TaskSource, TextSource
from . import cards, checks, grafting, reporting, scoring, stages
from .data import Hashes, content_of
from .fields import AUTO, Recipe
from .reporting import BASE, DENSE, OURS, OURS_BY_CONTEXT, POST_TRAINED
from .trainer import what_counts
from .unfinished import Checkpoints
from .workspace import Step, Workspace, model_files


class Run:
    """One run of a recipe. Each property is a step; asking for it runs what it needs and keeps the results.

    Args:
        recipe: the run's.
        workspace: where its steps are; None for the recipe's `output`.
        overwrite: of that workspace.
    """

    def __init__(self, recipe: Recipe, workspace: Workspace | None = None, *, overwrite: bool = False) -> None:
        checks.check_training(recipe)
        self.recipe = replace(recipe, precision=stages.settled_precision(recipe.precision))
        self.workspace = workspace or Workspace(recipe.output, overwrite=overwrite)
        self._hash_of = Hashes(self.workspace.output / "hashes.json", saves=workspace is None)
        self._steps: dict[str, Step] = {}
        self._texts_checked = False

    def base(self) -> Step:
        """The base model; a copy only where the recipe cuts it down."""
        recipe = self.recipe

        def cut(folder: Path) -> None:
            if recipe.num_hidden_layers is None:
                return
            model = stages.load_model(recipe.model, num_hidden_layers=recipe.num_hidden_layers)
            stages.save_with_tokenizer(model, recipe.model, folder)

        return self._step(
            "base",
            lambda: {"model": model_files(recipe.model, self._hash_of), "num_hidden_layers": recipe.num_hidden_layers},
            cut,
        )

    def post_trained(self) -> Step:
        """The post-trained model: the recipe's own, or tuned on its tasks."""
        recipe, tune = self.recipe, self.recipe.tune
        if tune is None:
            assert recipe.post_trained is not None  # a recipe has one of the two
            given = recipe.post_trained
            return self._step(
                "post_trained", lambda: {"post_trained": model_files(given, self._hash_of)}, lambda folder: None
            )
        return self._train(
            "post_trained",
            lambda: {
                "base": self.base(),
                "tune": {**what_counts(tune), "tasks": content_of(tune.tasks, TaskSource, self._hash_of)},
                **self._arithmetic,
            },
            lambda folder, checkpoints: stages.tune(recipe, self.base_model, tune, folder, checkpoints),
        )

    def expanded(self) -> Step:
        """The adapter after stage 1."""
        recipe, base = self.recipe, self.base()
        return self._train(
            "expanded",
            lambda: {
                "base": base,
                "adapter": recipe.adapter,
                "groups": {code: language.group for code, language in recipe.languages.items()},
                "expand": what_counts(recipe.expand),
                **self._read("train", recipe.languages, recipe.expanded_languages),
                **self._arithmetic,
            },
            lambda folder, checkpoints: stages.expand(recipe, self.base_model, folder, checkpoints),
        )

    def adapter(self) -> Step:
        """The adapter after all its training: reviewed, where the recipe has a review; and with what it knows of its
        languages, where it is to read them from the text."""
        recipe, trained = self.recipe, self._trained()
        if not (checks.reads_languages(recipe) or recipe.graft.by_context):
            return trained
        return self._step(
            "identified",
            lambda: {"adapter": trained, **self._read("train", recipe.languages)},
            lambda folder: stages.identify(recipe, self.base_model, trained.folder, folder),
        )

    def _trained(self) -> Step:
        """The adapter after expansion and review."""
        recipe, fields, expanded = self.recipe, self.recipe.review, self.expanded()
        if fields is None:
            return expanded
        return self._train(
            "reviewed",
            lambda: {
                "expanded": expanded,
                "review": what_counts(fields),
                **self._read("train", recipe.languages),
                **self._arithmetic,
            },
            lambda folder, checkpoints: stages.review(
                recipe, self.base_model, expanded.folder, fields, folder, checkpoints
            ),
        )

    def dense(self) -> Step:
        """Dense continual pre-training on the tokens of stage 1, plus the delta; where the recipe has it."""
        recipe, fields, expand = self.recipe, self.recipe.dense, self.recipe.expand
        assert fields is not None
        tuned = self._train(
            "dense",
            lambda: {
                "base": self.base(),
                "dense": what_counts(fields),
                "tokens": {n: getattr(expand, n) for n in ("sequences", "sequence_length")},
                **self._read("train", recipe.languages, recipe.expanded_languages),
                **self._arithmetic,
            },
            lambda folder, checkpoints: stages.dense(recipe, self.base_model, fields, folder, checkpoints),
        )
        return self._step(
            "dense_grafted",
            lambda: {"dense": tuned, "post_trained": self.post_trained(), **self._validated},
            lambda folder: grafting.graft_dense(recipe, self.base_model, tuned.folder, self.post_trained_model, folder),
        )

    def grafted(self) -> Step:
        """The stock checkpoint."""
        recipe = self.recipe
        checks.check_graft(recipe)
        return self._step(
            "grafted",
            lambda: {
                "adapter": self.adapter(),
                "post_trained": self.post_trained(),
                "graft": replace(recipe.graft, by_context=False),  # a second form, which changes nothing here
                **self._validated,
                **self._calibrated,
            },
            lambda folder: grafting.graft(
                recipe, self.base_model, self.adapter().folder, self.post_trained_model, folder
            ),
        )

    def by_context(self) -> Step:
        """The same model, routed by context, as remote code."""
        recipe, stock = self.recipe, self.grafted()
        return self._step(
            stages.BY_CONTEXT,
            lambda: {"adapter": self.adapter(), "post_trained": self.post_trained(), "shares as in": stock},
            lambda folder: grafting.graft_by_context(
                recipe, self.base_model, self.adapter().folder, self.post_trained_model, stock.folder, folder
            ),
        )

    def report(self) -> EvalReport:
        """Every model, scored and looked at; written beside the steps as page, JSON and pictures."""
        check_installed()
        checks.check_graft(self.recipe)
        checks.check_held_out(self.recipe)
        if self.recipe.card is not None:
            cards.check_card(self.recipe, self.recipe.card)
        scores, drift = self.measured()
        report = reporting.report(self.recipe, {row: step.folder for row, step in scores.items()}, drift.folder)
        write_report(report, self.page.parent)
        return report

    def measured(self) -> tuple[dict[str, Step], Step]:
        """Every model, and what was measured of it: scores by the report's rows, and the drift of our routes."""
        models: dict[str, tuple[str, Path | str, Step]] = {
            BASE: ("base", self.base_model, self.base()),
            POST_TRAINED: ("post_trained", self.post_trained_model, self.post_trained()),
        }
        if self.recipe.dense is not None:
            dense = self.dense()
            models[DENSE] = ("dense_grafted", dense.folder, dense)
        self.adapter()
        ours = self.grafted()
        models[OURS] = ("grafted", ours.folder, ours)
        if self.recipe.graft.by_context:
            read = self.by_context()
            models[OURS_BY_CONTEXT] = (stages.BY_CONTEXT, read.folder, read)
        scores = {row: self._scores(row, *model) for row, model in models.items()}
        return scores, self._drift(OURS, ours)

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
                "review": self._trained(),
            },
            report=replace(report, routing=[], tokens=[], generations=[]),  # what a card has no room for
        )

    @property
    def base_model(self) -> Path | str:
        """Where the base model is loaded from."""
        return self.recipe.model if self.recipe.num_hidden_layers is None else self.base().folder

    @property
    def post_trained_model(self) -> Path | str:
        """Where the post-trained model is loaded from."""
        return self.recipe.post_trained or self.post_trained().folder

    @property
    def _validated(self) -> dict[str, Any]:
        """What a share is chosen on, where it is chosen."""
        recipe, limits = self.recipe, self.recipe.limits
        if recipe.graft.expert_scale != AUTO:
            return {}
        return {
            "limits": (limits.validation_documents, limits.document_bytes, limits.validation_tasks),
            **self._read("validation", recipe.languages, recipe.expanded_languages),
            **self._read("validation", recipe.tasks),
            **self._arithmetic,
        }

    @property
    def _calibrated(self) -> dict[str, Any]:
        """What routers are calibrated on, where they are."""
        fields = checks.calibration(self.recipe)
        if fields is None:
            return {}
        return {"calibrate": {**asdict(fields), **self._read("train", self.recipe.languages)}, **self._arithmetic}

    def _scores(self, row: str, name: str, checkpoint: Path | str, step: Step) -> Step:
        return self._step(
            f"scores/{name}",
            lambda: {"row": row, "model": step, **self._tested},
            lambda folder: scoring.score(self.recipe, row, checkpoint, folder),
        )

    def _drift(self, row: str, grafted: Step) -> Step:
        recipe, adapter = self.recipe, self.adapter()
        return self._step(
            "drift",
            lambda: {"row": row, "grafted": grafted, "adapter": adapter, **self._tested},
            lambda folder: scoring.drift(recipe, row, self.base_model, adapter.folder, grafted.folder, folder),
        )

    @property
    def _arithmetic(self) -> dict[str, Any]:
        return {"precision": self.recipe.precision, "seed": self.recipe.seed}

    @property
    def _tested(self) -> dict[str, Any]:
        """What models are scored on, and how."""
        languages, limits = {n: tasks.language for n, tasks in self.recipe.tasks.items()}, self.recipe.limits
        read = {**self._read("test", self.recipe.languages), **self._read("test", self.recipe.tasks)}
        unseen = {c: content_of(source, TextSource, self._hash_of) for c, source in self.recipe.unseen.items()}
        limited = (limits.test_documents, limits.document_bytes, limits.test_tasks)
        return {**read, "unseen": unseen, "task_languages": languages, "limits": limited, **self._arithmetic}

    def _read(self, split: str, sets: Mapping[str, Any], names: Sequence[str] | None = None) -> dict[str, Any]:
        """A split of languages or of tasks: their order, and the files' contents."""
        names = [name for name in (sets if names is None else names) if getattr(sets[name], split) is not None]
        kind, source = ("languages", TextSource) if sets is self.recipe.languages else ("tasks", TaskSource)
        read = {name: {split: content_of(getattr(sets[name], split), source, self._hash_of)} for name in names}
        return {f"order of {kind}": names, kind: read}

    def _train(
        self, name: str, inputs: Callable[[], dict[str, Any]], make: Callable[[Path, Checkpoints], None]
    ) -> Step:
        """A step that trains. Before the first that runs, the text of all of them is looked through."""

        def checked(folder: Path, checkpoints: Checkpoints) -> None:
            if not self._texts_checked:
                checks.check_text(self.recipe)
                self._texts_checked = True
            set_seed(self.recipe.seed)
            make(folder, checkpoints)

        if name not in self._steps:
            self._steps[name] = self.workspace.training(name, self._looked_up(inputs), checked)
        return self._steps[name]

    def _step(self, name: str, inputs: Callable[[], dict[str, Any]], make: Callable[[Path], None]) -> Step:
        def seeded(folder: Path) -> None:
            set_seed(self.recipe.seed)  # a step makes the same whether those before it ran now or earlier
            make(folder)

        if name not in self._steps:
            self._steps[name] = self.workspace.step(name, self._looked_up(inputs), seeded)
        return self._steps[name]

    def _looked_up(self, inputs: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        return inputs() if self.workspace.compares() else {}
