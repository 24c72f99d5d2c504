"""From models to a report: each is measured once, alone in memory, and what was found is put side by side.

In: models (folders, Hub ids, adapters, models in memory) and, by language, texts, tasks and prompts. Out: `EvalReport`.
`evaluate_languages` does it in one go; a recipe keeps each model's `Findings` as a file and assembles them at its end.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ..errors import DataError
from ..program import called
from .compare import Items, all_pairs, check_references, compare, confusion_items, status_of, transfer
from .confusion import check_can_score, language_confusion
from .fertility import fertility
from .forward import Progress
from .generation import generate, in_chat
from .identification import wrong_language
from .loading import Measured, Source, load
from .report import Agreement, EvalReport, Fertility, Generation, Model, Routing, TokenView
from .routes import drift_doubts, route_drift, routing_by_language, token_view
from .scoring import Material, TaskSet, score_material

PROMPTS = "answers"
"""The task that language confusion is measured on."""

_PACKAGES = ("peft-moe-delta", "peft", "torch", "transformers")
_ROUTED_TEXTS = 8  # of a language, for routing shares
_SHOWN_CHARACTERS = 200  # of a text, in the token view
_SHOWN_PROMPTS = 3  # of a language, side by side

Bar = Callable[[str], Progress | None]
"""What is being done -> what wraps its list of batches."""


@dataclass(frozen=True, kw_only=True)
class Findings:
    """All that was found out about one model.

    Attributes:
        model: its row in the report.
        groups: language -> group, of an adapter of this package.
        items: its measures, item by item.
        routing, tokens, fertility: rows of the report.
        answers: language -> what it wrote, prompt by prompt.
    """

    model: Model
    groups: dict[str, str] = field(default_factory=dict)
    items: list[Items] = field(default_factory=list)
    routing: list[Routing] = field(default_factory=list)
    tokens: list[TokenView] = field(default_factory=list)
    fertility: list[Fertility] = field(default_factory=list)
    answers: dict[str, list[str]] = field(default_factory=dict)

    def with_experts(self, experts: Sequence[str]) -> Findings:
        """The same, with names for its experts: a stock model does not know them, its adapter's plan does."""
        return replace(
            self,
            routing=[replace(row, experts=list(experts[: len(row.experts)])) for row in self.routing],
            tokens=[replace(row, experts=list(experts[: len(row.experts)])) for row in self.tokens],
        )

    def save(self, path: Path) -> None:
        """Write a JSON file that `load` reads."""
        rows = {name: [vars(row) for row in getattr(self, name)] for name in _FOUND}
        data = {"model": asdict(self.model), "groups": self.groups, "items": [one.to_json() for one in self.items]}
        path.write_text(json.dumps({**data, **rows, "answers": self.answers}, ensure_ascii=False), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Findings:
        """Read what `save` wrote."""
        data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        data |= {name: [kind(**row) for row in data[name]] for name, kind in _FOUND.items()}
        data |= {"model": Model(**data["model"]), "items": [Items.from_json(one) for one in data["items"]]}
        return cls(**data)


_FOUND: dict[str, Callable[..., Any]] = {"routing": Routing, "tokens": TokenView, "fertility": Fertility}


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
        models: name -> a folder or Hub id of a model or adapter, or `(model, tokenizer)`; the last is the one that the
            report is about.
        datasets: language -> held-out documents, for bits per byte.
        languages: language -> group, `"original"` or another; None to take the adapters' own. A language in no group
            is unseen.
        references: models that the others are compared with, on the same items; the one for retention first.
        tasks: name -> tasks with exact answers.
        prompts: language -> prompts whose answers should be in it, for language confusion and to read.
        trained: model -> the languages it was trained on, for the transfer matrix against the first reference.
        agreement: pairs of models of one plan, the one after grafting (say) and the one before: whether their routes
            agree, on the texts and, with `chat`, on the prompts as the model sees them.
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
    material = Material(texts=datasets, tasks=tasks or {}, prompts=prompts or {})
    check_references(models, [*references, *(trained or ()), *(name for pair in agreement for name in pair)])
    if trained and not references:
        raise DataError("trained: a transfer matrix needs a reference to gain on. Name one in `references`.")
    for code in material.prompts:
        check_can_score(code)
    warnings = doubts(material)  # first: they need an extra that may be missing
    found: dict[str, Findings] = {}
    for name, source in models.items():
        measured = load(source)
        found[name] = measure(
            measured,
            name,
            material,
            max_length=max_length,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            chat=chat,
            bar=lambda label: progress,
        )
        found[name].items.extend(
            row
            for code, written in found[name].answers.items()
            for row in confusion_items(PROMPTS, code, language_confusion(written, code, english=english))
        )
    for after, before in agreement:
        found[after] = _named_as(found[after], found[before])
    groups: dict[str, str] = {}
    for findings in found.values():
        groups = findings.groups | groups
    drift = [row for pair in agreement for row in _drift(pair, models, material, chat)]
    return assemble(
        found,
        material.prompts,
        groups=groups if languages is None else languages,
        languages=[*material.texts, *material.prompts],
        references=references,
        own=list(models)[-1:],
        pairs=all_pairs(models, references),
        trained=trained,
        agreement=drift,
        warnings=warnings,
    )


def measure(
    measured: Measured,
    name: str,
    material: Material,
    *,
    max_length: int = 512,
    batch_size: int = 8,
    max_new_tokens: int = 64,
    chat: bool = False,
    bar: Bar = lambda label: None,
) -> Findings:
    """One model: scored on texts and tasks, asked the prompts, and its routes looked at."""
    peak = _Peak()
    scores = score_material(measured, material, max_length=max_length, batch_size=batch_size, bar=bar)
    row = Model(
        name=name,
        source=measured.source,
        parameters=sum(p.numel() for p in measured.model.parameters()),
        tokens_per_second=scores.tokens_per_second,
        peak_memory_bytes=peak.read(),
        measured=date.today().isoformat(),
    )
    routing, views = look_at_routing(measured, name, material.texts)
    answers = {
        code: generate(
            measured.model,
            measured.tokenizer,
            asked,
            language=measured.spoken(code),
            max_new_tokens=max_new_tokens,
            chat=chat,
            progress=bar(f"{code} prompts"),
        )
        for code, asked in material.prompts.items()
    }
    return Findings(
        model=row,
        groups=measured.groups,
        items=scores.items(material.tasks),
        routing=routing,
        tokens=views,
        fertility=fertility_rows(measured, name, material.texts),
        answers=answers,
    )


def assemble(
    found: Mapping[str, Findings],
    prompts: Mapping[str, Sequence[str]],
    *,
    groups: Mapping[str, str],
    languages: Iterable[str],
    references: Sequence[str],
    own: Sequence[str],
    pairs: Sequence[tuple[str, str]],
    trained: Mapping[str, Sequence[str]] | None = None,
    agreement: Sequence[Agreement] = (),
    warnings: Sequence[str] = (),
) -> EvalReport:
    """What was found out about each model, side by side.

    Args:
        found: by the models' names, in the order of the tables.
        prompts: what they were asked, by language.
        groups: language -> group; one without is unseen.
        languages: codes, in order.
        references, trained: as in `evaluate_languages`.
        own: the models that the report is about, the first one first.
        pairs: models whose difference is taken.
        agreement: of the routes of models before and after a graft; where they drift, a warning comes first.
        warnings: beside those.
    """
    items = {name: findings.items for name, findings in found.items()}
    scores, differences = compare(items, groups, pairs)
    statuses = {code: status_of(code, groups) or "unseen" for code in languages}
    answers = {code: {name: f.answers[code] for name, f in found.items() if code in f.answers} for code in prompts}
    return EvalReport(
        models=[findings.model for findings in found.values()],
        languages=statuses,
        references=list(references),
        own=list(own),
        scores=scores,
        differences=differences,
        routing=[row for findings in found.values() for row in findings.routing],
        agreement=list(agreement),
        tokens=[row for findings in found.values() for row in findings.tokens],
        generations=side_by_side(prompts, answers),
        transfer=transfer(items, trained, references[0]) if trained else [],
        fertility=[row for findings in found.values() for row in findings.fertility],
        warnings=[*drift_doubts(agreement, statuses), *warnings],
        command=command(),
        versions=versions(),
    )


def look_at_routing(
    measured: Measured, name: str, texts: Mapping[str, Sequence[str]]
) -> tuple[list[Routing], list[TokenView]]:
    """Routing shares of a few texts a language, and the first of them token by token; nothing of a dense model."""
    shares, views = [], []
    for code, documents in texts.items():
        options: dict[str, Any] = {"name": name, "language": code, "spoken": measured.spoken(code)}
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


def _named_as(after: Findings, before: Findings) -> Findings:
    """Of two models of one plan, the one after the graft may be an export, whose experts have no names."""
    names = max((row.experts for row in before.routing), key=len, default=[])
    alike = all(len(row.experts) == len(names) for row in after.routing)
    return after.with_experts(names) if before.groups and not after.groups and alike else after


def _drift(pair: tuple[str, str], models: Mapping[str, Source], material: Material, chat: bool) -> list[Agreement]:
    """Of two models, on the texts and on the prompts as a chat model sees them."""
    after, before = load(models[pair[0]]), load(models[pair[1]])
    texts = {code: documents[:_ROUTED_TEXTS] for code, documents in material.texts.items()}
    rows = route_drift(before, after, texts, names=pair)
    if chat:
        asked = {code: [in_chat(after.tokenizer, text) for text in texts] for code, texts in material.prompts.items()}
        rows += route_drift(before, after, asked, names=pair, kind="chat")
    return rows


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
    """The command line, its program by name."""
    return [called(), *sys.argv[1:]]


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
