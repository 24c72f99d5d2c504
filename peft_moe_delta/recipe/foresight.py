"""Whether a run can come to its end, found out in seconds and before anything is made: every fault at once.

In: a recipe. Out: an `Outlook`, or an error that names the fields and says what to do. Of text the first documents are
read, of models configs and the headers of weights; memory and disk are arithmetic. What this cannot know is looked at
before the first training (`checks.check_text`): whether the last row of a file is as good as the first ones.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path
from typing import Any

import psutil
import torch
from huggingface_hub import get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # it is documented, not exported
from transformers import PreTrainedTokenizerBase

from ..budget.measure import Job, Measured, measure
from ..checkpoint import CheckpointReader
from ..errors import PeftMoeDeltaError, RecipeError
from ..evaluation.figures import check_installed
from ..evaluation.identification import wrong_language_or_script
from ..kinds import size_text
from ..languages import read_code
from ..loading import load_config, load_tokenizer
from ..sources import TaskSource, TextSource, each_text, files_of, is_on_hub, read_tasks, read_texts, source_of
from ..sources.formats import format_of
from . import cards, checks
from .fields import Recipe
from .preview import Seen, seen_steps, table, trainings
from .stages import BY_CONTEXT, adapter_config, settled_precision

LOOKED_AT = 30  # rows of every file
_COUNTED = 50_000  # tokens of a language, before its text is judged by its size
_FULL_TRAINING = 4  # weights, gradients and two states of AdamW, of a model that trains whole
_WHOLE = {"tune": "give `post_trained` instead of `tune`", "dense": "leave `dense` out"}
"""Sections that train a whole model, and what to do without."""
_PICKLES = "*.bin"


@dataclass(frozen=True)
class Outlook:
    """What a run would do.

    Attributes:
        recipe: the run's.
        steps: in order.
        form: what the model is shipped as; None where the adapter is the end.
        memory: bytes that its training takes at the most, and bytes that there are.
        disk: bytes that its steps write, and bytes that are free.
        doubts: what looks wrong, and need not be.
    """

    recipe: Recipe = field(repr=False)
    steps: list[Seen]
    form: str | None
    memory: tuple[int, int]
    disk: tuple[int, int]
    doubts: list[str]

    def __str__(self) -> str:
        tokens = {name: str(self._amount(name)) for name in trainings(self.recipe)}
        rows = [(step.name, tokens.get(step.name, ""), step.state) for step in self.steps]
        lines = [table([("step", "trains on", "this run"), *rows]), ""]
        if self.form is not None:
            lines.append(f"The result: {self.form}, in {self.recipe.output}/grafted.")
            if self.recipe.over_post_trained:
                lines.append("The experts are trained over the post-trained model itself, so no delta is grafted.")
            if self.recipe.graft.by_context:
                lines.append(f"The same model routed by context, as remote code, in {self.recipe.output}/{BY_CONTEXT}.")
        (needed, there), (written, free) = (map(size_text, pair) for pair in (self.memory, self.disk))
        lines.append(f"Training takes about {needed} of memory; there are {there}.")
        lines.append(f"The steps that run write about {written}; {free} are free.")
        return "\n".join([*lines, *(f"Doubtful: {doubt}" for doubt in self.doubts), "Nothing was run."])

    def _amount(self, name: str) -> str:
        training = trainings(self.recipe)[name]
        rows = training.sequences
        return f"{rows:,} tasks" if name == "post_trained" else f"{rows * training.sequence_length:,} tokens"


@dataclass
class Found:
    """Faults and doubts, as checks find them."""

    faults: list[PeftMoeDeltaError] = field(default_factory=list)
    doubts: list[str] = field(default_factory=list)

    @contextmanager
    def of(self, name: str = "") -> Iterator[None]:
        """Take an error as one fault of several; `name` is the field's, where the error does not say it."""
        try:
            yield
        except PeftMoeDeltaError as error:
            self.faults.append(type(error)(f"{name}: {error}") if name else error)

    def refuse(self) -> None:
        """Raise what was found; one error for all of them."""
        messages = list(dict.fromkeys(map(str, self.faults)))
        if len(messages) == 1:
            raise self.faults[0]
        if messages:
            listed = " ".join(f"({number}) {message}" for number, message in enumerate(messages, start=1))
            raise RecipeError(f"{len(messages)} faults stand in the way. {listed}")


def look_ahead(recipe: Recipe, *, whole: bool) -> Outlook:
    """Check a recipe, and say what its run would do.

    Args:
        recipe: the run's.
        whole: whether the model is grafted and scored; else the adapter is the end.

    Raises:
        PeftMoeDeltaError: something stands in the way; with several faults a `RecipeError` that lists them.
    """
    checks.check_training(recipe)  # what follows needs a model that this fits
    found, form = Found(), None
    _look_at_text(recipe, found, whole=whole)
    _look_at_tasks(recipe, found, whole=whole)
    _look_at_models(recipe, found, whole=whole)
    if whole:
        with found.of():
            form = checks.check_graft(recipe).target
        _look_at_the_end(recipe, found)
    with found.of():
        measured, memory = _look_at_memory(recipe)
    found.refuse()
    steps = seen_steps(recipe, whole=whole)
    return Outlook(recipe, steps, form, memory, _look_at_disk(recipe, steps, measured), found.doubts)


def _look_at_text(recipe: Recipe, found: Found, *, whole: bool) -> None:
    """The first documents of every source that is read, and whether there are enough of them."""
    tokenizer = None
    with found.of("model"):
        tokenizer = load_tokenizer(recipe.model)
        if tokenizer.eos_token_id is None:
            raise RecipeError("its tokenizer has no end token to put between documents. Set `eos_token` in it.")
    needed = _needed_tokens(recipe)
    for name, code, source in _texts(recipe, whole=whole):
        with found.of(name):
            look_at_documents(name, code, source, found)
            if tokenizer is not None and name.endswith(".train") and code in needed:
                check_amount(source, code, tokenizer, *needed[code])


def look_at_documents(name: str, code: str, source: str | TextSource, found: Found) -> None:
    """Read the first documents, and doubt those that are in another language.

    Raises:
        DataError: they cannot be read.
    """
    first = read_texts(source, language=code, documents=LOOKED_AT)
    if doubt := wrong_language_or_script(first, code, f"{name}: {source_of(source, TextSource)}"):
        found.doubts.append(doubt)


def _texts(recipe: Recipe, *, whole: bool) -> Iterator[tuple[str, str, str | TextSource]]:
    """Field, language and source of all text that is read."""
    reads = checks.reads_languages(recipe) or recipe.graft.by_context
    trains = recipe.languages if reads or (whole and checks.calibration(recipe)) else _needed_tokens(recipe)
    for code, language in recipe.languages.items():
        if code in trains:
            yield f"languages.{code}.train", code, language.train
        for split, source in (("test", language.test), ("validation", language.validation)):
            if whole and source is not None:
                yield f"languages.{code}.{split}", code, source
    for code, source in recipe.unseen.items() if whole else ():
        yield f"unseen.{code}", code, source


def _needed_tokens(recipe: Recipe) -> dict[str, tuple[int, str]]:
    """Language -> the most tokens that a training takes of it, and that training."""
    needed: dict[str, tuple[int, str]] = {}
    for name, training, codes in (
        ("expand", recipe.expand, recipe.expanded_languages),
        ("review", recipe.review, list(recipe.languages)),
    ):
        for code in codes if training is not None else ():
            assert training is not None
            each = ceil(training.sequences / len(codes)) * training.sequence_length
            needed[code] = max(needed.get(code, (0, "")), (each, name))
    return needed


def check_amount(
    source: str | TextSource, code: str, tokenizer: PreTrainedTokenizerBase, needed: int, stage: str
) -> None:
    """Count tokens while that is quick; of more text, judge by its size, which is the most that it can have."""
    counted, size, at_end = count_tokens(each_text(source, code), tokenizer, needed)
    there, about = counted, ""
    if not at_end and counted < needed:
        most = bytes_on_disk(source)
        there, about = (needed if most is None else most * counted // size), "at most about "
    if there < needed:
        raise RecipeError(
            f"{source_of(source, TextSource)} has {about}{there:,} tokens, and {stage} needs {needed:,} of each "
            f"language (steps x batch_size x sequence_length over the languages). Bring more text, or lower "
            f"{stage}.steps."
        )


def count_tokens(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, needed: int = _COUNTED
) -> tuple[int, int, bool]:
    """Tokens and bytes of text, as far as it was read: to its end, or until there are enough to tell."""
    counted = size = 0
    for text in texts:
        counted += len(tokenizer(text, verbose=False)["input_ids"]) + 1  # an end token follows each document
        size += len(text.encode())
        if counted >= min(needed, _COUNTED):
            return counted, size, False
    return counted, size, True


def bytes_on_disk(given: str | TextSource) -> int | None:
    """A source's size where that bounds its text; None for what is compressed, on the Hub or cut short."""
    source = source_of(given, TextSource)
    files = files_of(source)
    plain = all(found is not None and found[0] != ".parquet" and not found[1] for found in map(format_of, files))
    if not plain or source.limit is not None or any(map(is_on_hub, source.paths)):
        return None
    return sum(file.stat().st_size for file in files)


def _look_at_tasks(recipe: Recipe, found: Found, *, whole: bool) -> None:
    listed: list[tuple[str, str | TaskSource | None]] = []
    if recipe.tune is not None:
        listed.append(("tune.tasks", recipe.tune.tasks))
    for name, tasks in recipe.tasks.items() if whole else ():
        listed += [(f"tasks.{name}.test", tasks.test), (f"tasks.{name}.validation", tasks.validation)]
        with found.of(f"tasks.{name}.language"):
            if tasks.language is not None and read_code(tasks.language) is None:
                raise RecipeError(
                    f"{tasks.language!r} is no code of a language. Write one such as hu, or leave it out."
                )
    for name, source in listed:
        with found.of(name):
            if source is not None:
                read_tasks(source, LOOKED_AT)


def _look_at_models(recipe: Recipe, found: Found, *, whole: bool) -> None:
    """Whether the weights of folders are there, by their headers."""
    models = {"model": recipe.model, "post_trained": recipe.post_trained if whole else None}
    for name, model in models.items():
        with found.of(name):
            if model is not None and Path(model).is_dir() and not any(Path(model).glob(_PICKLES)):
                CheckpointReader(model)
    with found.of("post_trained"):
        if whole and recipe.post_trained is not None:
            load_tokenizer(recipe.post_trained)


def _look_at_the_end(recipe: Recipe, found: Found) -> None:
    """What is needed once the model is made: its report, its card, its way to the Hub."""
    with found.of():
        check_installed()
    with found.of():
        checks.check_unseen(recipe)
    if recipe.card is not None:
        with found.of("card"):
            cards.check_card(recipe, recipe.card)
    if recipe.push is not None:
        with found.of("push"):
            _check_push(recipe.push)


def _check_push(repository: str) -> None:
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise RecipeError(f"{error} Write OWNER/NAME.") from error
    if get_token() is None:
        raise RecipeError("nobody is logged in to the Hub. Run `hf auth login`, or set HF_TOKEN.")


def expansion_of(recipe: Recipe, **changes: Any) -> Job:
    """The expansion as the budget measures it; `changes` are fields of `Job`."""
    cut = {} if recipe.num_hidden_layers is None else {"num_hidden_layers": recipe.num_hidden_layers}
    usual: dict[str, Any] = {"checkpointing": recipe.expand.checkpointing}
    return Job(
        model=load_config(recipe.model, **cut),
        adapter=adapter_config(recipe),
        batch_size=recipe.expand.batch_size,
        sequence_length=recipe.expand.sequence_length,
        **{**usual, **changes},
    )


def _look_at_memory(recipe: Recipe) -> tuple[Measured, tuple[int, int]]:
    """What the expansion takes; and bytes that trainings take at the most, and that there are.

    Raises:
        RecipeError: as `check_memory`.
    """
    measured = measure(expansion_of(recipe, autocast=settled_precision(recipe.precision) == "bf16"))
    needs = {
        name: (
            _FULL_TRAINING * measured.base,
            f"It trains all weights of the model: {instead}, or take another machine.",
        )
        for name, instead in _WHOLE.items()
        if getattr(recipe, name)
    }
    needs["expand"] = (
        measured.total,
        "Lower expand.batch_size or expand.sequence_length, set adapter.expert_rank, or take another machine: "
        "`peft-moe-delta plan` says what fits.",
    )
    return measured, check_memory(needs)


def check_memory(needs: Mapping[str, tuple[int, str]]) -> tuple[int, int]:
    """Bytes that trainings take at the most, and that there are.

    Args:
        needs: section of a training -> what it takes, and what to do where that is too much.

    Raises:
        RecipeError: one takes more than there are.
    """
    there = memory_here()
    for name, (size, advice) in needs.items():
        if size > there:
            raise RecipeError(
                f"{name}: its training takes {size_text(size)} of memory, and there are {size_text(there)}. {advice}"
            )
    return max(size for size, _ in needs.values()), there


def memory_here() -> int:
    """Bytes of the first GPU, else of the machine or of the container that this runs in."""
    if torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(0).total_memory)
    limit = Path("/sys/fs/cgroup/memory.max")
    allowed = limit.read_text(encoding="ascii").strip() if limit.is_file() else "max"
    there = int(psutil.virtual_memory().total)
    return min(there, int(allowed)) if allowed.isdecimal() else there


def _look_at_disk(recipe: Recipe, steps: list[Seen], measured: Measured) -> tuple[int, int]:
    """What the steps that run write, in fp32 as they train, and what is free.

    Raises:
        RecipeError: it is not enough, or nothing can be written there.
    """
    place = Path(recipe.output).absolute()
    while not place.exists():
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise RecipeError(f"output: {place} is no folder, or is read-only. Choose another one for {recipe.output}.")
    dense, adapter = measured.base, measured.experts
    sizes = {
        "base": dense if recipe.num_hidden_layers is not None else 0,
        "post_trained": dense if recipe.tune is not None else 0,
        **dict.fromkeys(("expanded", "reviewed", "identified"), adapter),
        **dict.fromkeys(("dense", "dense_grafted"), dense),
        "grafted": dense if recipe.graft.language is not None else dense + adapter,
        BY_CONTEXT: dense + adapter,
    }
    written = sum(sizes.get(step.name, 0) for step in steps if step.reason is not None)
    free = shutil.disk_usage(place).free
    if written > free:
        raise RecipeError(
            f"output: the steps that run write about {size_text(written)}, and {place} has {size_text(free)} "
            "free. Make room, or choose another `output`."
        )
    return written, free
