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
        group: `original` if the base model speaks the language. Languages with the same other name share experts.
        train: the text that experts and routers are trained on.
        test: the text that every model is scored on.
        validation: the text on which an `expert_scale` of `auto` is chosen.
    """

    group: str
    train: str | TextSource
    test: str | TextSource
    validation: str | TextSource | None = None


@dataclass(frozen=True)
class Tasks:
    """A set of tasks with exact answers: files with `prompt` and `answer`.

    Attributes:
        test: the tasks that every model is scored on.
        validation: the tasks on which, beside text, an `expert_scale` of `auto` is chosen.
        language: the code of the tasks' language.
    """

    test: str | TaskSource
    validation: str | TaskSource | None = None
    language: str | None = None


@dataclass(frozen=True, kw_only=True)
class Training:
    """One run of the plain Trainer.

    Attributes:
        steps: number of optimizer steps.
        batch_size: sequences per forward pass. A step reads as many, or more if `trainer` sets
            `gradient_accumulation_steps`.
        learning_rate: the highest rate; it is reached by a warm-up and then falls along a cosine.
        sequence_length: tokens per sequence.
        trainer: any other arguments of transformers' `TrainingArguments`, such as `weight_decay: 0.1`,
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
    """Supervised tuning of the base model on tasks, for recipes without a `post_trained` model.

    Attributes:
        tasks: the tasks' file, with columns `prompt` and `answer`.
    """

    tasks: str | TaskSource


@dataclass(frozen=True)
class Adapter:
    """The fields of `MoeDeltaConfig` that a recipe can set.

    Attributes:
        experts: group -> new experts per layer, as one number for all layers or as a list with a number for each; or
            the path of a plan that `allocate` wrote.
        routing: `learned`, `language`, `context` or `classifier`.
        top_k: experts that each token uses; None means 2.
        expert_rank: rank of low-rank experts; None means full copies of the MLP.
        layers_to_transform: the layers that get experts; None means all.
        classifier_layers: the layers with a gate, under `classifier`.
    """

    experts: dict[str, Any] | str
    routing: str = "learned"
    top_k: Count | None = None
    expert_rank: Count | None = None
    layers_to_transform: list[Index] | None = None
    classifier_layers: list[Index] | None = None


@dataclass(frozen=True, kw_only=True)
class Review(Training):
    """The review stage, which trains the routers alone, as `MoeDeltaModel.start_review` does.

    Attributes:
        routing: the routing from this stage on; None keeps the adapter's.
        language_prior_coef: weight of the loss that sends each language to the experts of its group; None means 0.1.
        language_prior_groups: the groups that this loss concerns; None means those that existed before.
    """

    routing: str | None = None
    language_prior_coef: NotNegative | None = None
    language_prior_groups: list[str] | None = None


@dataclass(frozen=True)
class Graft:
    """How the delta is applied, and in which form the model is saved; most fields are those of `merge_and_graft`.

    Attributes:
        expert_scale: the share of the experts' own change that is kept: one number, a number for each group, or `auto`
            to choose it on validation text.
        scale: the share of the post-training delta that is added.
        language: under routing by language, save the dense model of this language.
        replicate_dense_layers: if the stock architecture has no dense layers, fill those layers with copies of the MLP.
        remote_code: save a modelling file with the model if no stock architecture can express it.
        by_context: also save the model routed by context, as remote code in the folder `by_context`. The adapter gets
            an identifier of its languages, too.
        architecture: the stock architecture to use; None means the first that is exact.
        serve_with: the engine that must be able to run the stock checkpoint: vllm, llama.cpp, mlx, openvino, sglang or
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
    """How `calibrate_routers` fits the routers to the grafted model. Routing by language needs no calibration.

    Attributes:
        documents: how many documents of each language's training text to use, drawn at random.
        conversations: how many conversations the post-trained model makes up; none if its tokenizer has no chat
            template.
        steps: training steps after the closed form; 0 leaves them out.
        answer_cost: how much losing all answers counts when routers are chosen, in nats per token of the new languages.
            With less, the new languages gain more and more answers may change.
        sequence_length: how many tokens of a document to use.
    """

    documents: Annotated[int, Within(2)] = 100
    conversations: Annotated[int, Within(0)] = 100
    steps: Annotated[int, Within(0)] = 60
    answer_cost: NotNegative = 1.0
    sequence_length: Annotated[int, Within(2)] = 128


@dataclass(frozen=True)
class Limits:
    """How much held-out material is scored; None means all of it.

    Attributes:
        test_documents, validation_documents: number of documents for each language, drawn at random.
        document_bytes: how many bytes of each document to score, from its beginning.
        test_tasks, validation_tasks: number of tasks from each set.
    """

    test_documents: Count | None = None
    validation_documents: Count | None = None
    document_bytes: Count | None = None
    test_tasks: Count | None = None
    validation_tasks: Count | None = None


@dataclass(frozen=True)
class Card:
    """What you add to the model cards.

    Attributes:
        name: the stand-alone model's title. The adapter's is the same with `-adapter`.
        base_model, post_trained: the models' Hub ids, if the recipe names folders.
        parents: model -> licence, for parents whose own cards do not state one.
        licence: the licence to state; None means the strictest of the parents'.
        data: what the model was trained on, and under which terms.
        limits: what users must know.
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
    """A whole run, from the base model to the grafted one and its report.

    Attributes:
        model: the base model's folder or Hub id.
        output: the folder in which every step gets a folder.
        languages: language code -> its group and text.
        adapter: experts and routing.
        expand: stage 1, which trains the experts on the text of the new languages.
        review: stage 2, which trains the routers on the text of all languages; None leaves it out.
        post_trained: the post-trained model's folder or Hub id; None if `tune` makes one. If it is the same as `model`,
            experts are trained over the post-trained model itself and nothing is grafted.
        tune: supervised tuning that makes the post-trained model.
        dense: for comparison, continual pre-training of the dense base on the same tokens as `expand`, plus the delta.
        graft: how the delta is applied.
        calibrate: how routers are calibrated after the graft; false leaves it out.
        tasks: name -> tasks with exact answers, which are scored beside the text.
        unseen: language code -> held-out text of languages that the adapter does not know, to see how they change.
        limits: how much is scored.
        card: what to add to the model cards; None means no cards.
        push: the Hub repository to upload the stock checkpoint to at the end; None means no upload.
        num_hidden_layers: use only so many of the base model's first layers, to try a recipe out.
        precision: of the arithmetic; `auto` takes what is faster on this machine. Weights are trained in fp32.
        seed: the seed of every random choice.
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
