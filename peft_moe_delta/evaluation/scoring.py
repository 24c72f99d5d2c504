"""The one scorer: a model on held-out material, every text, then every set of tasks.

In: a model that is ready to be measured, and `Material`. Out: `Scores`, item by item, and how fast text was scored.
`evaluate`, recipes, the choice of an expert scale and whatever else scores text and tasks come through here, with one
set of defaults, so that one model on one text has one number.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from ..documents import check_documents, check_languages
from ..errors import DataError
from .bits_per_byte import TextScore, bits_per_byte
from .compare import Items, task_items, text_items
from .exact_match import TaskScore, exact_match
from .forward import Progress
from .loading import Measured

_TASKS_A_TEXT = 8  # tasks are short: this many are run in the place of one text


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
    """What models are measured on: language -> held-out texts; name -> tasks; language -> prompts.

    Raises:
        DataError: one text where a list of them is expected, or a list without any.
    """

    texts: Mapping[str, Sequence[str]]
    tasks: Mapping[str, TaskSet] = field(default_factory=dict)
    prompts: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for what, listed in (("text", self.texts), ("prompts", self.prompts)):
            check_languages(listed, what)
            for code, documents in listed.items():
                texts = check_documents(documents, f"The {what} of {code!r}", blank=True)
                if empty := [index for index, text in enumerate(texts) if not text.strip()]:
                    raise DataError(
                        f"The {what} of {code!r}: {len(empty)} of {len(texts)} are empty, the first at index "
                        f"{empty[0]}. Drop them."
                    )


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

    def items(self, tasks: Mapping[str, TaskSet]) -> list[Items]:
        """As `compare` takes them."""
        texts = [text_items(code, score) for code, score in self.texts.items()]
        return texts + [task_items(name, tasks[name].language, score) for name, score in self.tasks.items()]


def score_material(
    measured: Measured,
    material: Material,
    *,
    max_length: int = 512,
    batch_size: int = 8,
    bar: Callable[[str], Progress | None] = lambda label: None,
) -> Scores:
    """Score a model on all texts and tasks.

    Args:
        max_length: as in `bits_per_byte`.
        batch_size: texts a forward pass; of tasks, which are short, eight times as many.
        bar: what is being scored -> what wraps its list of batches.
    """
    model, tokenizer = measured.model, measured.tokenizer
    texts: dict[str, TextScore] = {}
    started = time.perf_counter()
    for code, documents in material.texts.items():
        texts[code] = bits_per_byte(
            model,
            tokenizer,
            documents,
            language=measured.spoken(code),
            max_length=max_length,
            batch_size=batch_size,
            progress=bar(f"{code} text"),
        )
    seconds = time.perf_counter() - started
    tasks: dict[str, TaskScore] = {}
    for name, listed in material.tasks.items():
        tasks[name] = exact_match(
            model,
            tokenizer,
            listed.tasks,
            language=None if listed.language is None else measured.spoken(listed.language),
            batch_size=_TASKS_A_TEXT * batch_size,
            progress=bar(name),
        )
    tokens = sum(int(score.tokens.sum()) for score in texts.values())
    return Scores(texts=texts, tasks=tasks, tokens_per_second=tokens / seconds if tokens else None)
