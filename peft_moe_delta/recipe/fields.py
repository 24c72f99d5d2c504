"""What a recipe file says, read and checked.

In: a YAML file. Out: `Recipe`, frozen. Every field has the name it has in the file; an unknown or missing field, or a
value out of bounds, is an error that names it. Paths are relative to the working folder; models may be Hub ids.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch

from ..errors import RecipeError
from ..kinds import Count, Finite, Index, NotNegative, Within, read_fields
from ..plan import ExpertPlan
from ..routing import routing_named
from .reader import read_yaml

AUTO = "auto"
"""An expert scale that is chosen on held-out text, or the precision that this machine is faster in."""

Seed = Annotated[int, Within(0, 2**32 - 1)]
"""What NumPy takes as a seed."""


@dataclass(frozen=True)
class Language:
    """One language: its group, and jsonl files with a `text` column."""

    group: str
    train: str
    test: str
    validation: str | None = None


@dataclass(frozen=True)
class Tasks:
    """A set of tasks with exact answers: jsonl files with `prompt` and `answer`; and the language they are about."""

    test: str
    validation: str | None = None
    language: str | None = None


@dataclass(frozen=True, kw_only=True)
class Training:
    """One run of the plain Trainer. `sequence_length` is in tokens: one to read and one to predict at the least."""

    steps: Count
    batch_size: Count
    learning_rate: NotNegative
    sequence_length: Annotated[int, Within(2)] = 128


@dataclass(frozen=True, kw_only=True)
class Tuning(Training):
    """Supervised tuning of the base model on tasks, for recipes that bring no post-trained model."""

    tasks: str


@dataclass(frozen=True)
class Adapter:
    """`MoeDeltaConfig`, as far as a recipe sets it. `experts` may be the file of a plan, which `allocate` wrote."""

    experts: dict[str, Any] | str
    routing: str = "learned"
    top_k: Count | None = None
    expert_rank: Count | None = None
    layers_to_transform: list[Index] | None = None
    classifier_layers: list[Index] | None = None


@dataclass(frozen=True, kw_only=True)
class Review(Training):
    """The review stage; the fields beyond `Training` as in `MoeDeltaModel.start_review`."""

    routing: str | None = None
    language_prior_coef: NotNegative | None = None
    language_prior_groups: list[str] | None = None


@dataclass(frozen=True)
class Graft:
    """How the post-training delta is applied, and as what the model is shipped; most fields as in `merge_and_graft`.

    Attributes:
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
        sequence_length: tokens of a document that are used.
    """

    documents: Annotated[int, Within(2)] = 100
    conversations: Annotated[int, Within(0)] = 100
    steps: Annotated[int, Within(0)] = 60
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
        post_trained: folder or Hub id; None where `tune` makes one.
        tune: supervised tuning that makes the post-trained model.
        dense: continual pre-training of the dense base on the very tokens of `expand`, plus the delta, to compare with.
        graft: how the delta is applied.
        calibrate: what is done for the routers after the graft, where the model ships any; false to leave it out.
        tasks: name -> tasks with exact answers, scored beside the text.
        unseen: code -> held-out text (jsonl with a `text` column) of languages that nobody names: what becomes of them.
        limits: how much is scored.
        card: what the model cards say; None for no cards.
        push: Hub repository that the stock checkpoint goes to when everything is done; None to keep it here.
        num_hidden_layers: cut the base model down to its first layers, to try a recipe out.
        precision: `"bf16"` or `"fp32"`, of the arithmetic, or `"auto"`, which `read_recipe` replaces by the faster one
            of this machine; weights are trained in fp32.
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
    calibrate: Calibrate | None = field(default_factory=Calibrate)
    tasks: dict[str, Tasks] = field(default_factory=dict)
    unseen: dict[str, str] = field(default_factory=dict)
    limits: Limits = field(default_factory=Limits)
    card: Card | None = None
    push: str | None = None
    num_hidden_layers: Count | None = None
    precision: str = "auto"
    seed: Seed = 0

    @property
    def expanded_languages(self) -> list[str]:
        """The languages that are to be learnt, in order."""
        return [code for code, language in self.languages.items() if language.group != "original"]

    @property
    def calibration(self) -> Calibrate | None:
        """What is done for the routers after the graft; None where none is asked, as under routing by language."""
        routing = (self.review.routing if self.review is not None else None) or self.adapter.routing
        return None if routing_named(routing).needs_language else self.calibrate


def read_recipe(path: str | Path, *, quick: bool = False) -> Recipe:
    """Read a recipe; with `quick`, its section `quick` is laid over the rest.

    Raises:
        RecipeError: no such file, not YAML, or a field that is unknown, missing or of the wrong kind.
    """
    data = read_yaml(path)
    changes = data.pop("quick", None)
    if quick and changes is None:
        raise RecipeError(f"{path} has no section `quick`, so --quick has nothing to change. Add one, or run without.")
    data = _laid_over(data, changes) if quick else data
    if isinstance(chosen := data.get("calibrate"), bool):
        data["calibrate"] = {} if chosen else None
    recipe: Recipe = read_fields(Recipe, data, str(path))
    if (recipe.post_trained is None) == (recipe.tune is None):
        raise RecipeError(f"{path} must have either `post_trained` (a model) or `tune` (how to make one), not both.")
    precision = settled_precision(recipe.precision, str(path))
    return dataclasses.replace(recipe, adapter=_with_plan(recipe.adapter, str(path)), precision=precision)


def settled_precision(precision: str, where: str) -> str:
    """`"auto"` as what this machine computes faster in.

    Without matrix units a processor multiplies bf16 at half the speed of fp32, even where it has instructions for it.

    Raises:
        RecipeError: no precision that there is.
    """
    if precision not in ("auto", "bf16", "fp32"):
        raise RecipeError(f'{where}: `precision` must be "auto", "bf16" or "fp32"; got {precision!r}.')
    if precision != "auto":
        return precision
    knows: Mapping[str, Any] = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    # PyTorch may be told to leave them alone (ATEN_CPU_CAPABILITY), and its attention in bf16 then fails.
    matrix_units = knows.get("amx_bf16", False) and torch.backends.cpu.get_cpu_capability() == "AVX512"
    return "bf16" if matrix_units or (torch.cuda.is_available() and torch.cuda.is_bf16_supported()) else "fp32"


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


def _laid_over(data: Any, changes: Any) -> Any:
    """Nested fields replaced one by one, anything else whole."""
    if not (isinstance(data, Mapping) and isinstance(changes, Mapping)):
        return changes
    return {**data, **{key: _laid_over(data.get(key), value) for key, value in changes.items()}}
