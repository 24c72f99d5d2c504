"""`EvalReport`: everything that was measured of some models, side by side, as rows of plain numbers.

In: rows that the measures of this folder make. Out: a JSON file that tables, figures, the HTML page and the model card
are drawn from, so that each of their numbers can be found in it. Results are kept per language x task x status
(original, expanded, unseen) and never as one average: cross-lingual transfer depends on all three (arXiv 2504.16677).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from ..errors import DataError
from ..files import write_text
from .names import language_name

FORMAT = 2
"""Of the file: raised when a reader of the old one would misread the new one."""

FILE = "report.json"

TEXT = "held-out text"
"""The task that bits per byte is measured on."""

_MODELS_SHOWN, _SCORES_SHOWN = 4, 4  # in a notebook

Status = Literal["original", "expanded", "unseen"]
"""Whether the base model spoke a language, experts were trained on it, or neither."""


@dataclass(frozen=True)
class Metric:
    """How a kind of number is called, and which way is up."""

    name: str
    label: str
    higher_is_better: bool


METRICS = {
    metric.name: metric
    for metric in (
        Metric("bits_per_byte", "bits/byte", False),
        Metric("exact_match", "exact match", True),
        Metric("line_pass_rate", "lines in the right language", True),
        Metric("word_pass_rate", "no English words", True),
        Metric("word_pass_rate_web2", "no words of Webster's", True),
    )
}
"""What the measures of this folder make. Rows read from elsewhere may have other metrics."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """One column of comparisons.

    Attributes:
        name: as it stands in every row.
        about: what it is, in a few words.
        source: folder or Hub id, where there is one.
        parameters: all of them, experts included.
        tokens_per_second: of scoring held-out text on the machine of `EvalReport.versions`; ratios in one report mean
            something, absolute numbers little.
        peak_memory_bytes: most memory held while scoring.
        measured: the day that it was measured, as 2026-11-30.
    """

    name: str
    about: str | None = None
    source: str | None = None
    parameters: int | None = None
    tokens_per_second: float | None = None
    peak_memory_bytes: int | None = None
    measured: str | None = None


@dataclass(frozen=True, kw_only=True)
class Score:
    """One number of one model.

    Attributes:
        model: its name in `EvalReport.models`.
        task: `"held-out text"`, or the name of a set of tasks or prompts.
        metric: a key of `METRICS`, or the name another tool gave it.
        language: a code, or None where a set of tasks has none.
        status: of the language; None where there is none.
        value: in the metric's own unit: bits a byte, or a share between 0 and 1.
        low, high: 95% bootstrap interval; None where the tool gave none.
        items: documents or tasks it was measured on.
        tokens: how many of them were scored; None where that is not counted.
        definition: how the number came about: windows, beginning of texts, precision, whatever it depends on.
        higher_is_better: which way is up.
    """

    model: str
    task: str
    metric: str
    language: str | None
    status: Status | None
    value: float
    low: float | None = None
    high: float | None = None
    items: int | None = None
    tokens: int | None = None
    definition: str | None = None
    higher_is_better: bool = True


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A model's score minus a reference's on the same items, paired; fields as in `Score`."""

    model: str
    reference: str
    task: str
    metric: str
    language: str | None
    status: Status | None
    value: float
    low: float | None = None
    high: float | None = None
    higher_is_better: bool = True


@dataclass(frozen=True, kw_only=True)
class Routing:
    """Where a language's tokens went.

    Attributes:
        model, language: whose.
        layers: indices of the routed layers, in order.
        experts: names of the experts, expert 0 first; as many as the layer with the most has.
        shares: for each layer and expert the share of choices that went there, summing to 1 over a layer's experts.
        entropy: for each layer the mean entropy of the router's probabilities, in bits.
        tokens: tokens counted.
        first_on_0: share of tokens whose first expert is expert 0, mean over layers.
    """

    model: str
    language: str
    layers: list[int]
    experts: list[str]
    shares: list[list[float]]
    entropy: list[float]
    tokens: int
    first_on_0: float | None = None


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Whether two models of one plan (before and after a graft, say) send tokens to the same experts, layer by layer.

    Attributes:
        shares: tokens whose set of chosen experts is the same in both, [layer].
        kind: what the tokens are of: `"text"`, or `"chat"` as the chat template writes it.
        off: tokens whose first expert is not expert 0, mean over layers; `reference_off` in the other model.
        tokens: how many.
    """

    model: str
    reference: str
    language: str
    layers: list[int]
    shares: list[float]
    kind: str = "text"
    off: float = 0.0
    reference_off: float = 0.0
    tokens: int | None = None


@dataclass(frozen=True, kw_only=True)
class TokenView:
    """One short text, token by token.

    Attributes:
        tokens: the text of each token.
        layers: indices of the routed layers, in order.
        experts: names of the experts, expert 0 first.
        probabilities: router probabilities, [layer][token][expert].
    """

    model: str
    language: str
    tokens: list[str]
    layers: list[int]
    experts: list[str]
    probabilities: list[list[list[float]]]


@dataclass(frozen=True, kw_only=True)
class Generation:
    """What models wrote, greedily, after the same prompt: model -> text."""

    language: str | None
    prompt: str
    answers: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """Trained on one language, tested on another: the gain over the reference in bits per byte (positive is better)."""

    model: str
    reference: str
    trained: str
    tested: str
    gain: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, kw_only=True)
class Fertility:
    """What a model's tokenizer makes of a language."""

    model: str
    language: str
    tokens_per_word: float
    bytes_per_token: float


@dataclass(frozen=True, kw_only=True)
class EvalReport:
    """All rows, and what they came from.

    Attributes:
        models: all of them.
        languages: code -> status.
        references: the models that differences are taken against, the one for retention (usually the post-trained
            model) first.
        own: the models that the report is about, the first of which the verdict is of; empty: the last of `models`.
        scores, differences, routing, agreement, tokens, generations, transfer, fertility: rows.
        warnings: what a reader should know before believing a number, one sentence each.
        command: the command line that made it.
        versions: package -> version.
    """

    models: list[Model]
    languages: dict[str, Status]
    references: list[str] = field(default_factory=list)
    own: list[str] = field(default_factory=list)
    scores: list[Score] = field(default_factory=list)
    differences: list[Difference] = field(default_factory=list)
    routing: list[Routing] = field(default_factory=list)
    agreement: list[Agreement] = field(default_factory=list)
    tokens: list[TokenView] = field(default_factory=list)
    generations: list[Generation] = field(default_factory=list)
    transfer: list[Transfer] = field(default_factory=list)
    fertility: list[Fertility] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)

    def __repr__(self) -> str:
        """The first scores of the first models, those that the report is about before the others."""
        shown, columns = self.own_first(), self.columns()
        lines = [f"EvalReport(models={len(shown)}, scores={len(self.scores)}, warnings={len(self.warnings)})"]
        for model in shown[:_MODELS_SHOWN]:
            scores = [(column, self.score(model.name, column)) for column in columns[:_SCORES_SHOWN]]
            told = ", ".join(f"{heading(column)} {score.value:.3f}" for column, score in scores if score is not None)
            lines.append(f"{model.name}: {told or 'no scores'}{', ...' if len(columns) > _SCORES_SHOWN else ''}")
        return "\n  ".join([*lines, *(["..."] if len(shown) > _MODELS_SHOWN else [])])

    def subjects(self) -> list[str]:
        """The models that the report is about, the first one first."""
        return self.own or [model.name for model in self.models[-1:]]

    def own_first(self) -> list[Model]:
        """The models in the order of the tables: those that the report is about, then the others."""
        own = self.subjects()
        return sorted(self.models, key=lambda row: own.index(row.name) if row.name in own else len(own))

    def measured_on(self) -> str:
        """The day of measuring, or the first and the last; empty where it is not known."""
        days = sorted({model.measured for model in self.models if model.measured})
        return " to ".join(dict.fromkeys([*days[:1], *days[-1:]]))

    def columns(self) -> list[Score]:
        """One score of every task x metric x language, in order of appearance: the columns of a table."""
        found: dict[tuple[str, str, str | None], Score] = {}
        for score in self.scores:
            found.setdefault(_key(score), score)
        return list(found.values())

    def score(self, model: str, column: Score | Difference) -> Score | None:
        """A model's score of the same task, metric and language as another row; None where it was not measured."""
        return next((s for s in self.scores if s.model == model and _key(s) == _key(column)), None)

    def difference(self, model: str, reference: str, column: Score | Difference) -> Difference | None:
        """A model's difference to a reference, of the same task, metric and language as another row."""
        of_pair = (d for d in self.differences if (d.model, d.reference) == (model, reference))
        return next((d for d in of_pair if _key(d) == _key(column)), None)

    def pairs(self) -> list[tuple[str, str]]:
        """`(model, reference)` of every comparison, in order of appearance."""
        return list(dict.fromkeys((d.model, d.reference) for d in self.differences))

    def definitions(self) -> list[str]:
        """What the numbers of each column are: how many items and tokens, and how they were scored."""
        told: dict[str, list[str]] = {}
        for column in self.columns():
            scores = [s for s in self.scores if _key(s) == _key(column)]
            for text in dict.fromkeys(s.definition for s in scores if s.definition):
                same = [s for s in scores if s.definition == text]
                tokens = _range([s.tokens for s in same])
                counts = f"{heading(column)} ({_range([s.items for s in same])} items{tokens and f', {tokens} tokens'})"
                told.setdefault(text, []).append(counts)
        return [f"{', '.join(columns)}: {text}." for text, columns in told.items()]

    def save(self, folder: str | Path) -> Path:
        """Write `report.json` into a folder, which is made if need be. Returns the file."""
        path = Path(folder) / FILE
        data = {"format": FORMAT, **asdict(self)}
        write_text(path, "{\n" + ",\n".join(map(_as_text, data.items())) + "\n}\n")
        return path

    @classmethod
    def load(cls, path: str | Path) -> EvalReport:
        """Read what `save` wrote, given the file or its folder.

        Raises:
            DataError: no such file, not a report, or one of a newer format.
        """
        path = Path(path)
        path = path / FILE if path.is_dir() else path
        if not path.is_file():
            raise DataError(f"No report at {path}. `peft-moe-delta evaluate` writes one.")
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise DataError(f"{path} is no JSON file: {error}. `peft-moe-delta evaluate` writes it anew.") from error
        written = data.pop("format", None) if isinstance(data, dict) else None
        if not isinstance(written, int):
            raise DataError(f"{path} is no report: it names no format. Pass the {FILE} that `evaluate` wrote.")
        if written > FORMAT:
            raise DataError(
                f"{path} has format {written}; this version of peft-moe-delta reads formats up to {FORMAT}. "
                "Update peft-moe-delta."
            )
        try:
            rows: dict[str, Any] = {name: [kind(**row) for row in data.pop(name, [])] for name, kind in _ROWS.items()}
            return cls(**rows, **data)
        except (TypeError, AttributeError) as error:
            raise DataError(f"{path} is no whole report: {error}. `peft-moe-delta evaluate` writes it anew.") from error


_ROWS: dict[str, Any] = {
    "models": Model,
    "scores": Score,
    "differences": Difference,
    "routing": Routing,
    "agreement": Agreement,
    "tokens": TokenView,
    "generations": Generation,
    "transfer": Transfer,
    "fertility": Fertility,
}


def _as_text(item: tuple[str, Any]) -> str:
    """A field of the file, a row a line: readable, and a change shows where it is."""
    key, value = item
    write = partial(json.dumps, ensure_ascii=False, allow_nan=False)
    if key in _ROWS and value:
        return f"{write(key)}: [\n " + ",\n ".join(map(write, value)) + "\n]"
    return f"{write(key)}: {write(value)}"


def heading(column: Score | Difference) -> str:
    """What a column of numbers is called: `Hungarian bits/byte`, or the name of the tasks."""
    label = METRICS[column.metric].label if column.metric in METRICS else column.metric
    language = column.language and language_name(column.language)
    if column.task == TEXT:
        return f"{language} {label}"
    if column.metric == "exact_match":
        return column.task
    return " ".join(part for part in (language, column.task, label) if part)


def _range(counts: Iterable[int | None]) -> str:
    """`40`, or `1,200 to 1,300` where models differ; nothing where it is not known."""
    known = sorted({count for count in counts if count is not None})
    return " to ".join(f"{count:,}" for count in dict.fromkeys([*known[:1], *known[-1:]]))


def _key(row: Score | Difference) -> tuple[str, str, str | None]:
    return row.task, row.metric, row.language
