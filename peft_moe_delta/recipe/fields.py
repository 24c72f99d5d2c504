"""What a recipe file says, read and checked.

In: a YAML file. Out: `Recipe`, frozen. Every field has the name it has in the file; an unknown or missing field, or a
value out of bounds, is an error that names it. Paths are relative to the working folder; models may be Hub ids.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from ..errors import RecipeError
from ..kinds import Count, Finite, Index, NotNegative, Switch, Within, read_fields
from ..plan import ExpertPlan
from ..sources import TaskSource, TextSource
from .reader import laid_over, read_change, read_yaml

AUTO = "auto"
"""An expert scale that is chosen on held-out text, or the precision that this machine is faster in."""

Seed = Annotated[int, Within(0, 2**32 - 1)]
"""What NumPy takes as a seed."""

Precision = Literal["auto", "bf16", "fp32"]


@dataclass(frozen=True)
class Language:
    """One language: its group, and where its text is.

    Attributes:
        group: `original` for a language that the base model speaks; others share the experts of their group.
        train: text that experts and routers learn from.
        test: text that every model is scored on.
        validation: text that an expert scale of `auto` is chosen on.
    """

    group: str
    train: str | TextSource
    test: str | TextSource
    validation: str | TextSource | None = None


@dataclass(frozen=True)
class Tasks:
    """A set of tasks with exact answers: files with `prompt` and `answer`.

    Attributes:
        test: what every model is scored on.
        validation: what an expert scale of `auto` is chosen on, beside text.
        language: the code of the language that the tasks are about.
    """

    test: str | TaskSource
    validation: str | TaskSource | None = None
    language: str | None = None


@dataclass(frozen=True, kw_only=True)
class Training:
    """One run of the plain Trainer.

    Attributes:
        steps: of the optimiser.
        batch_size: sequences in a pass, and in each step, unless `trainer` accumulates gradients over several passes.
        learning_rate: at its highest, after a warm-up; a cosine follows.
        sequence_length: in tokens: one to read and one to predict at the least.
        trainer: other arguments of transformers' `TrainingArguments` by their names, such as `weight_decay: 0.1`,
            `gradient_accumulation_steps: 8`, `report_to: tensorboard` or `save_steps: 500`.
    """

    steps: Count
    batch_size: Count
    learning_rate: NotNegative
    sequence_length: Annotated[int, Within(2)] = 128
    trainer: dict[str, Any] = field(default_factory=dict)

    @property
    def sequences(self) -> int:
        """Read in all steps."""
        return self.steps * self.batch_size * int(self.trainer.get("gradient_accumulation_steps", 1))

    @property
    def checkpointing(self) -> bool:
        """Whether activations are computed again, by transformers' new or old name."""
        return any(self.trainer.get(f"{name}_checkpointing") for name in ("activation", "gradient"))


@dataclass(frozen=True, kw_only=True)
class Tuning(Training):
    """Supervised tuning of the base model on tasks, for recipes that bring no post-trained model.

    Attributes:
        tasks: where they are, with `prompt` and `answer`.
    """

    tasks: str | TaskSource


@dataclass(frozen=True)
class Adapter:
    """`MoeDeltaConfig`, as far as a recipe sets it.

    Attributes:
        experts: group -> experts in each layer, one number for all or a list; or the file of a plan, which `allocate`
            wrote.
        routing: `learned`, `language`, `context` or `classifier`.
        top_k: experts per token; None for 2.
        expert_rank: rank of low-rank experts; None for full copies of the MLP.
        layers_to_transform: layers that get experts; None for all.
        classifier_layers: layers with a gate, under `classifier`.
    """

    experts: dict[str, Any] | str
    routing: str = "learned"
    top_k: Count | None = None
    expert_rank: Count | None = None
    layers_to_transform: list[Index] | None = None
    classifier_layers: list[Index] | None = None


@dataclass(frozen=True, kw_only=True)
class Review(Training):
    """The review stage, in which the routers alone learn, as in `MoeDeltaModel.start_review`.

    Attributes:
        routing: from here on; None for that of the adapter.
        language_prior_coef: weight of the loss that sends languages to the experts of their group; None
            for 0.1.
        language_prior_groups: the groups that this loss is about; None for those that were there before.
    """

    routing: str | None = None
    language_prior_coef: NotNegative | None = None
    language_prior_groups: list[str] | None = None


@dataclass(frozen=True)
class Graft:
    """How the post-training delta is applied, and as what the model is shipped; most fields as in `merge_and_graft`.

    Attributes:
        expert_scale: share of the experts' own change: of all, or by group; or `auto`, chosen on held-out text.
        scale: share of the post-training delta.
        language: under routing by language, the one to ship: what it runs on.
        replicate_dense_layers: where no architecture keeps dense layers, write copies of their one expert.
        remote_code: ship a modelling file with it, which holds what no stock architecture does.
        by_context: ship it once more, routed by context, as remote code in the folder `by_context`; the adapter then
            can tell its languages apart as well.
        architecture: the stock architecture to take; none for the first that is exact.
        serve_with: the engine that is to run the stock checkpoint: vllm, llama.cpp, mlx, openvino, sglang or
            transformers.
    """

    expert_scale: Finite | dict[str, Finite] | str = 1.0
    scale: Finite = 1.0
    language: str | None = None
    replicate_dense_layers: bool = False
    remote_code: bool = False
    by_context: bool = False
    architecture: str | None = None
    serve_with: str | None = None


@dataclass(frozen=True)
class Calibrate:
    """How routers are calibrated on the grafted model, as in `calibrate_routers`; routing by language needs none.

    Attributes:
        documents: of each language's training text, drawn at random.
        conversations: that the post-trained model makes up itself; none where its tokenizer has no chat template.
        steps: of the review behind the closed form; 0 to leave it out.
        answer_cost: what the loss of all answers counts as, in nats per token of the new languages.
        sequence_length: tokens of a document that are used.
    """

    documents: Annotated[int, Within(2)] = 100
    conversations: Annotated[int, Within(0)] = 100
    steps: Annotated[int, Within(0)] = 60
    answer_cost: NotNegative = 1.0
    sequence_length: Annotated[int, Within(2)] = 128


@dataclass(frozen=True)
class Limits:
    """How much held-out material is scored; None for all of it.

    Attributes:
        test_documents, validation_documents: documents of each language, drawn at random.
        document_bytes: of each of them, from its beginning.
        test_tasks, validation_tasks: tasks of each set.
    """

    test_documents: Count | None = None
    validation_documents: Count | None = None
    document_bytes: Count | None = None
    test_tasks: Count | None = None
    validation_tasks: Count | None = None


@dataclass(frozen=True)
class Card:
    """What a model card says beyond what the steps know.

    Attributes:
        name: the stand-alone model's title; its adapter is called the same with `-adapter`.
        base_model, post_trained: Hub ids, where the recipe's models are folders.
        parents: model -> licence, for parents whose own cards do not state one.
        licence: what to state; None for the strictest of the parents'.
        data: what was trained on, and under which terms.
        limits: what a user must know.
    """

    name: str
    base_model: str | None = None
    post_trained: str | None = None
    parents: dict[str, str] = field(default_factory=dict)
    licence: str | None = None
    data: str | None = None
    limits: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Recipe:
    """The whole job.

    Attributes:
        model: the base model: folder or Hub id.
        output: where every step leaves its folder.
        languages: code -> group and text.
        adapter: experts and routing.
        expand: stage 1, on the text of the languages that are not original.
        review: stage 2, routers only, on the text of all languages; None to leave it out.
        post_trained: folder or Hub id; None where `tune` makes one. The same as `model` where experts are trained over
            the post-trained model itself, and so without a graft.
        tune: supervised tuning that makes the post-trained model.
        dense: continual pre-training of the dense base on the very tokens of `expand`, plus the delta, to compare with.
        graft: how the delta is applied.
        calibrate: what is done for the routers after the graft, where the model ships any; false to leave it out.
        tasks: name -> tasks with exact answers, scored beside the text.
        unseen: code -> held-out text of languages that nobody names: what becomes of them.
        limits: how much is scored.
        card: what the model cards say; None for no cards.
        push: Hub repository that the stock checkpoint goes to when everything is done; None to keep it here.
        num_hidden_layers: cut the base model down to its first layers, to try a recipe out.
        precision: of the arithmetic; `auto` for the faster one on this machine. Weights are trained in fp32.
        seed: of every random choice.
    """

    model: str
    output: str
    languages: dict[str, Language]
    adapter: Adapter
    expand: Training
    review: Review | None = None
    post_trained: str | None = None
    tune: Tuning | None = None
    dense: Training | None = None
    graft: Graft = field(default_factory=Graft)
    calibrate: Annotated[Calibrate | None, Switch()] = field(default_factory=Calibrate)
    tasks: dict[str, Tasks] = field(default_factory=dict)
    unseen: dict[str, str | TextSource] = field(default_factory=dict)
    limits: Limits = field(default_factory=Limits)
    card: Card | None = None
    push: str | None = None
    num_hidden_layers: Count | None = None
    precision: Precision = "auto"
    seed: Seed = 0

    @property
    def expanded_languages(self) -> list[str]:
        """The languages that are to be learnt, in order."""
        return [code for code, language in self.languages.items() if language.group != "original"]

    @property
    def over_post_trained(self) -> bool:
        """Whether experts are trained over the post-trained model itself, to which no delta is added."""
        return self.post_trained == self.model


def read_recipe(path: str | Path, *, quick: bool = False, changes: Sequence[str] = ()) -> Recipe:
    """Read a recipe; with `quick`, its section `quick` is laid over the rest, and then come `changes`, in order.

    Args:
        changes: fields and their values, as `expand.steps=200`.

    Raises:
        RecipeError: no such file, not YAML, or a field that is unknown, missing or of the wrong kind.
    """
    data = read_yaml(path)
    shorter = data.pop("quick", None)
    if quick and shorter is None:
        raise RecipeError(f"{path} has no section `quick`, so --quick has nothing to change. Add one, or run without.")
    data = laid_over(data, shorter) if quick else data
    for change in changes:
        data = laid_over(data, read_change(change))
    recipe: Recipe = read_fields(Recipe, data, str(path))
    if (recipe.post_trained is None) == (recipe.tune is None):
        raise RecipeError(f"{path} must have either `post_trained` (a model) or `tune` (how to make one), not both.")
    return dataclasses.replace(recipe, adapter=_with_plan(recipe.adapter, str(path)))


def _with_plan(adapter: Adapter, where: str) -> Adapter:
    """A plan's file replaced by what it says, so that a step's record shows it and changes with it."""
    if not isinstance(adapter.experts, str):
        return adapter
    if adapter.layers_to_transform is not None:
        raise RecipeError(f"{where}: `experts` names a plan, which knows its layers. Remove `layers_to_transform`.")
    try:
        text = Path(adapter.experts).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{where}: `experts` must be a section, or the file of a plan: {error}") from error
    return dataclasses.replace(adapter, **ExpertPlan.from_json(text).config_fields())
