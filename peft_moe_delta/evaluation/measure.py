"""`evaluate_languages`: any number of models, side by side, on the same held-out material.

In: models (folders, Hub ids, adapters, models in memory) and, by language, texts, tasks and prompts. Out: `EvalReport`.
Models are loaded and measured one after another, so that only one is in memory at a time.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ..errors import DataError
from .compare import (
    Items,
    all_pairs,
    check_references,
    compare,
    confusion_items,
    status_of,
    transfer,
)
from .confusion import check_can_score, language_confusion
from .fertility import fertility
from .forward import Progress
from .generation import generate
from .identification import wrong_language
from .loading import Measured, Source, load
from .report import Agreement, EvalReport, Fertility, Generation, Model, Routing, TokenView
from .routes import first_choice_agreement, routing_by_language, token_view
from .scoring import Material, TaskSet, score_material

PROMPTS = "answers"
"""The task that language confusion is measured on."""

_PACKAGES = ("peft-moe-delta", "peft", "torch", "transformers")
_ROUTED_TEXTS = 8  # of a language, for routing shares
_SHOWN_CHARACTERS = 200  # of a text, in the token view
_SHOWN_PROMPTS = 3  # of a language, side by side


def evaluate_languages(
    models: Mapping[str, Source],
    datasets: Mapping[str, Sequence[str]],
    *,
    languages: Mapping[str, str] | None = None,
    references: Sequence[str] = (),
    tasks: Mapping[str, TaskSet] | None = None,
    prompts: Mapping[str, Sequence[str]] | None = None,
    trained: Mapping[str, Sequence[str]] | None = None,
    agreement: Sequence[tuple[str, str]] = (),
    english: Collection[str] | None = None,
    chat: bool = False,
    max_length: int = 512,
    batch_size: int = 8,
    max_new_tokens: int = 64,
    progress: Progress | None = None,
) -> EvalReport:
    """Measure models on the same material.

    Args:
        models: name -> a folder or Hub id of a model or adapter, or `(model, tokenizer)`.
        datasets: language -> held-out documents, for bits per byte.
        languages: language -> group, `"original"` or another; None to take the adapters' own. A language in no group
            is unseen.
        references: models that the others are compared with, on the same items; the one for retention first.
        tasks: name -> tasks with exact answers.
        prompts: language -> prompts whose answers should be in it, for language confusion and to read.
        trained: model -> the languages it was trained on, for the transfer matrix against the first reference.
        agreement: pairs of models of one plan (before and after grafting, say) whose routes are compared.
        english: English words for the word pass rate; see `language_confusion`.
        chat: put prompts through the chat template.
        max_length: tokens a window of text; see `bits_per_byte`.
        batch_size: rows a forward pass.
        max_new_tokens: of an answer.
        progress: wraps lists of batches, e.g. `tqdm.tqdm`.

    Raises:
        DataError: no texts, tasks or prompts where some are named; or a name that is none of the models.
        CheckpointError: a model cannot be loaded.
    """
    material = Material(texts=dict(datasets), tasks=dict(tasks or {}), prompts=dict(prompts or {}))
    check_references(models, [*references, *(trained or ()), *(name for pair in agreement for name in pair)])
    if trained and not references:
        raise DataError("trained: a transfer matrix needs a reference to gain on. Name one in `references`.")
    for code in material.prompts:
        check_can_score(code)
    warnings = doubts(material)  # first: they need an extra that may be missing
    options: dict[str, Any] = {"max_length": max_length, "batch_size": batch_size, "progress": progress}
    rows, items, routing, tokens, fertile = [], {}, [], [], []
    answers: dict[str, dict[str, list[str]]] = {}
    groups = dict(languages or {})
    for name, source in models.items():
        measured = load(source)
        if languages is None:
            groups = measured.groups | groups
        items[name], model_row = measure_items(measured, name, material, **options)
        rows.append(model_row)
        for code, asked in material.prompts.items():
            written = generate(
                measured.model,
                measured.tokenizer,
                asked,
                language=measured.spoken(code),
                max_new_tokens=max_new_tokens,
                chat=chat,
                progress=progress,
            )
            answers.setdefault(code, {})[name] = written
            items[name] += confusion_items(PROMPTS, code, language_confusion(written, code, english=english))
        fertile += fertility_rows(measured, name, material.texts)
        routed, viewed = look_at_routing(measured, name, material.texts)
        routing += routed
        tokens += viewed
    scores, differences = compare(items, groups, all_pairs(models, references))
    return EvalReport(
        models=rows,
        languages={code: status_of(code, groups) or "unseen" for code in (*material.texts, *material.prompts)},
        references=list(references),
        scores=scores,
        differences=differences,
        routing=routing,
        agreement=[row for pair in agreement for row in _agreements(pair, models, material.texts)],
        tokens=tokens,
        generations=side_by_side(material.prompts, answers),
        transfer=transfer(items, trained, references[0]) if trained else [],
        fertility=fertile,
        warnings=warnings,
        command=command(),
        versions=versions(),
    )


def measure_items(
    measured: Measured, name: str, material: Material, *, max_length: int, batch_size: int, progress: Progress | None
) -> tuple[list[Items], Model]:
    """Text and tasks of one model, item by item, and what scoring the text cost."""
    peak = _Peak()
    scores = score_material(
        measured,
        material,
        text_options={"max_length": max_length, "batch_size": batch_size},
        task_options={},
        bar=lambda label: progress,
    )
    row = Model(
        name=name,
        source=measured.source,
        parameters=sum(p.numel() for p in measured.model.parameters()),
        tokens_per_second=scores.tokens_per_second,
        peak_memory_bytes=peak.read(),
    )
    return scores.items({task: listed.language for task, listed in material.tasks.items()}), row


def look_at_routing(
    measured: Measured, name: str, texts: Mapping[str, Sequence[str]], experts: Sequence[str] | None = None
) -> tuple[list[Routing], list[TokenView]]:
    """Routing shares of a few texts a language, and the first of them token by token; nothing of a dense model."""
    shares, views = [], []
    for code, documents in texts.items():
        options: dict[str, Any] = {"name": name, "language": code, "experts": experts}
        options["spoken"] = measured.spoken(code)
        row = routing_by_language(measured.model, measured.tokenizer, documents[:_ROUTED_TEXTS], **options)
        view = token_view(measured.model, measured.tokenizer, documents[0][:_SHOWN_CHARACTERS], **options)
        if row is not None and view is not None:
            shares.append(row)
            views.append(view)
    return shares, views


def fertility_rows(measured: Measured, name: str, texts: Mapping[str, Sequence[str]]) -> list[Fertility]:
    """What a model's tokenizer makes of each language."""
    counts = {code: fertility(documents, measured.tokenizer) for code, documents in texts.items()}
    return [
        Fertility(model=name, language=code, tokens_per_word=c.tokens_per_word, bytes_per_token=c.bytes_per_token)
        for code, c in counts.items()
    ]


def _agreements(
    pair: tuple[str, str], models: Mapping[str, Source], texts: Mapping[str, Sequence[str]]
) -> list[Agreement]:
    """Of two models, language by language."""
    model, reference = load(models[pair[0]]), load(models[pair[1]])
    found = (
        first_choice_agreement(
            model.model,
            reference.model,
            model.tokenizer,
            documents[:_ROUTED_TEXTS],
            names=pair,
            language=code,
            spoken=(model.spoken(code), reference.spoken(code)),
        )
        for code, documents in texts.items()
    )
    return [row for row in found if row is not None]


def side_by_side(
    prompts: Mapping[str, Sequence[str]], answers: Mapping[str, Mapping[str, Sequence[str]]]
) -> list[Generation]:
    """The first prompts of each language with every model's answer, from language -> model -> answers."""
    return [
        Generation(language=code, prompt=prompt, answers={name: texts[index] for name, texts in answers[code].items()})
        for code, asked in prompts.items()
        for index, prompt in enumerate(asked[:_SHOWN_PROMPTS])
    ]


def doubts(material: Material) -> list[str]:
    """What a reader should know of the material: a language that is another, or too little to be sure of anything."""
    found = [wrong_language(texts, code, f"The text of {code!r}") for code, texts in material.texts.items()]
    few = [code for code, texts in material.texts.items() if len(texts) == 1]
    if few:
        found.append(f"One document alone has no interval: {', '.join(few)}. Bring more documents.")
    return [doubt for doubt in found if doubt is not None]


def command() -> list[str]:
    """The command line, its program by name: where it is installed is nobody's business."""
    return [Path(sys.argv[0]).name, *sys.argv[1:]]


def versions() -> dict[str, str]:
    """Package -> version of what the numbers depend on."""
    return {package: version(package) for package in _PACKAGES}


class _Peak:
    """Most memory held since it was made: of the GPU where there is one, else of the process; None where neither is
    known (Linux says it, and forgets it when asked)."""

    _STATUS, _FORGET = Path("/proc/self/status"), Path("/proc/self/clear_refs")

    def __init__(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        elif self._FORGET.exists():
            self._FORGET.write_text("5")

    def read(self) -> int | None:
        if torch.cuda.is_available():
            return int(torch.cuda.max_memory_allocated())
        if not self._STATUS.exists():
            return None
        (line,) = (line for line in self._STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
