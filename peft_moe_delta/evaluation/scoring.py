"""Scoring one model on held-out material: every text, then every set of tasks.

In: a model that is ready to be measured, and `Material`. Out: `Scores`, item by item, and how fast text was scored.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .bits_per_byte import TextScore, bits_per_byte
from .compare import Items, task_items, text_items
from .exact_match import TaskScore, exact_match
from .forward import Progress
from .loading import Measured


@dataclass(frozen=True)
class TaskSet:
    """Tasks with exact answers.

    Attributes:
        tasks: `{"prompt", "answer"}` each.
        language: what they are in or about; None where there is none.
    """

    tasks: Sequence[Mapping[str, str]]
    language: str | None = None


@dataclass(frozen=True, kw_only=True)
class Material:
    """What models are measured on: language -> held-out texts; name -> tasks; language -> prompts."""

    texts: Mapping[str, Sequence[str]]
    tasks: Mapping[str, TaskSet] = field(default_factory=dict)
    prompts: Mapping[str, Sequence[str]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What one model was given, item by item.

    Attributes:
        texts: by language.
        tasks: by name.
        tokens_per_second: of scoring the texts; None without any.
    """

    texts: dict[str, TextScore]
    tasks: dict[str, TaskScore]
    tokens_per_second: float | None

    def items(self, task_languages: Mapping[str, str | None]) -> list[Items]:
        """As `compare` takes them; `task_languages`: name -> language of every set of tasks."""
        texts = [text_items(code, score) for code, score in self.texts.items()]
        return texts + [task_items(name, task_languages[name], score) for name, score in self.tasks.items()]


def score_material(
    measured: Measured,
    material: Material,
    *,
    text_options: Mapping[str, Any],
    task_options: Mapping[str, Any],
    bar: Callable[[str], Progress | None] = lambda label: None,
) -> Scores:
    """Score a model on all texts and tasks.

    Args:
        text_options, task_options: of `bits_per_byte` and `exact_match`.
        bar: what is being scored -> what wraps its list of batches.
    """
    model, tokenizer = measured.model, measured.tokenizer
    texts: dict[str, TextScore] = {}
    seconds, tokens = 0.0, 0
    for code, documents in material.texts.items():
        spoken = measured.spoken(code)
        started = time.perf_counter()
        texts[code] = bits_per_byte(
            model, tokenizer, documents, language=spoken, progress=bar(f"{code} text"), **text_options
        )
        seconds += time.perf_counter() - started
        tokens += sum(map(len, tokenizer(list(documents), add_special_tokens=False)["input_ids"]))
    tasks: dict[str, TaskScore] = {}
    for name, listed in material.tasks.items():
        spoken = None if listed.language is None else measured.spoken(listed.language)
        tasks[name] = exact_match(model, tokenizer, listed.tasks, language=spoken, progress=bar(name), **task_options)
    return Scores(texts=texts, tasks=tasks, tokens_per_second=tokens / seconds if seconds else None)
