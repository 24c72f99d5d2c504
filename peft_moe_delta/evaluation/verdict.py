"""The verdict of a report: what its own model gained, kept and lost, in words that the intervals carry.

In: `EvalReport`. Out: a statement about each thing that was measured of the model and of a reference on the same items,
and the sentence that page, command line and card print. No statement says more than a 95% interval does: what it leaves
open is undecided. Each interval stands alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

from .names import language_name
from .report import TEXT, Difference, EvalReport, Score, heading

TEXT_MARGIN, MARGIN = 0.01, 0.02
"""How much worse still counts as kept: of bits per byte this share of the reference's; of other metrics, which are
shares, so much."""

RULE = (
    f"Kept: no more than {TEXT_MARGIN:.0%} of the reference's bits per byte, or {100 * MARGIN:.0f} points of anything "
    "else, can have been lost, as far as the 95% interval of the difference goes. Better, worse: the interval holds no "
    "0, and is not that close to it on both sides. Undecided: it is too wide to say. Each interval stands alone."
)
"""What the words mean."""

Judgement = Literal["better", "kept", "worse", "undecided"]

_LONGEST = 4  # statements of one kind that are made one by one


@dataclass(frozen=True)
class Statement:
    """One part of a verdict.

    Attributes:
        text: such as `Hungarian −23% bits`.
        judgement: what the interval says; None where the statement has none.
        difference: the row that it rests on.
    """

    text: str
    judgement: Judgement | None = None
    difference: Difference | None = None


@dataclass(frozen=True)
class Verdict:
    """What a model gained, kept and lost beside a reference. As text it is one sentence.

    Attributes:
        model, reference: their names in the report.
        parts: statements of each kind: new languages' text, other text, tasks, and where tokens go.
    """

    model: str
    reference: str
    parts: list[list[Statement]]

    @property
    def statements(self) -> list[Statement]:
        """All of them, in order."""
        return [statement for part in self.parts for statement in part]

    def __str__(self) -> str:
        said = "; ".join(", ".join(statement.text for statement in part) for part in self.parts)
        return f"{self.model!r} beside {self.reference!r}: {said}."


def verdict(report: EvalReport, model: str | None = None) -> Verdict | None:
    """The verdict of a report about a model, which is the report's own if none is named.

    Returns:
        None where the model was compared with nothing. The reference is the report's first that it was compared with.
    """
    model = report.subjects()[0] if model is None and report.models else model
    compared = [reference for name, reference in report.pairs() if name == model]
    known = [reference for reference in report.references if reference in compared] or compared
    if model is None or not known:
        return None
    rows = [row for row in report.differences if (row.model, row.reference) == (model, known[0])]
    new = [row for row in rows if row.task == TEXT and row.status == "expanded"]
    other = [row for row in rows if row.task == TEXT and row.status != "expanded"]
    tasks = [row for row in rows if row.task != TEXT]
    parts = [
        _in_brief([_of_new_text(report, row) for row in new], "new languages"),
        _in_brief([_of_kept_text(report, row) for row in other], "other languages"),
        _in_brief([_of_tasks(report, row) for row in tasks], "sets of tasks"),
        _where_tokens_go(report, model),
    ]
    return Verdict(model, known[0], [part for part in parts if part])


def judge(report: EvalReport, difference: Difference) -> Judgement:
    """What a difference's interval says; see `RULE`."""
    if difference.low is None or difference.high is None or _nothing(report, difference):
        return "undecided"
    margin = margin_of(report, difference)
    harm = (-difference.high, -difference.low) if difference.higher_is_better else (difference.low, difference.high)
    if -margin <= harm[0] and harm[1] <= margin:
        return "kept"
    if harm[1] < 0:
        return "better"
    if harm[0] > 0:
        return "worse"
    return "kept" if harm[1] <= margin else "undecided"


def margin_of(report: EvalReport, difference: Difference) -> float:
    """How much worse than the reference still counts as kept, in the unit of the difference."""
    if difference.metric != "bits_per_byte":
        return MARGIN
    scored = report.score(difference.reference, difference)
    return TEXT_MARGIN * scored.value if scored else 0.0


def _nothing(report: EvalReport, difference: Difference) -> bool:
    """Whether neither model solved a single task: there was nothing to keep."""
    scores = [report.score(model, difference) for model in (difference.model, difference.reference)]
    return difference.higher_is_better and all(score is not None and score.value == 0 for score in scores)


def measures(report: EvalReport) -> list[Score]:
    """The report's columns as a verdict has them: text of new languages, of those spoken before, of others, tasks."""
    order = ("expanded", "original", "unseen", None)
    return sorted(report.columns(), key=lambda c: (c.task != TEXT, c.task == TEXT and order.index(c.status)))


def _of_new_text(report: EvalReport, row: Difference) -> Statement:
    """A language that was taught: it gained, or it did not, or nobody knows."""
    judgement, name = judge(report, row), language_name(row.language or "")
    if judgement in ("better", "worse"):
        return Statement(f"{name} {_bits(report, row)}", judgement, row)
    margin = margin_of(report, row)
    same = judgement == "kept" and row.low is not None and row.low >= -margin
    return Statement(f"{name} {'unchanged' if same else 'undecided'}", "kept" if same else "undecided", row)


def _of_kept_text(report: EvalReport, row: Difference) -> Statement:
    """A language that was to stay as it is."""
    judgement, name = judge(report, row), language_name(row.language or "")
    told = _bits(report, row) if judgement in ("better", "worse") else judgement
    return Statement(f"{name} {told}", judgement, row)


def _of_tasks(report: EvalReport, row: Difference) -> Statement:
    """Tasks: what post-training brought, in languages that it knew and in others."""
    if _nothing(report, row):
        return Statement(f"{heading(row)} solved by neither", "undecided", row)
    judgement = judge(report, row)
    if judgement in ("better", "worse"):
        return Statement(f"{heading(row)} {_signed(100 * row.value, '.1f')} points", judgement, row)
    within = f" within {100 * MARGIN:.0f} points" if judgement == "kept" and row.status == "expanded" else ""
    return Statement(f"{heading(row)} {judgement}{within}", judgement, row)


def _where_tokens_go(report: EvalReport, model: str) -> list[Statement]:
    """The share of each original language's tokens that the post-trained model's own MLP serves."""
    shares = {row.language: 1 - row.off for row in report.agreement if row.model == model and row.kind == "text"}
    shares |= {
        row.language: row.first_on_0 for row in report.routing if row.model == model and row.first_on_0 is not None
    }
    shares = {code: share for code, share in shares.items() if report.languages.get(code) == "original"}
    if len(shares) > _LONGEST:
        return [Statement(f"{_share(fmean(shares.values()))} of original languages' tokens on expert 0")]
    return [Statement(f"{_share(share)} of {language_name(code)} tokens on expert 0") for code, share in shares.items()]


def _in_brief(statements: Sequence[Statement], what: str) -> list[Statement]:
    """The statements, or of many how many there are of each judgement: those that are worse by name."""
    if len(statements) <= _LONGEST:
        return list(statements)
    found = []
    for judgement in ("worse", "better", "kept", "undecided"):
        of_kind = [statement for statement in statements if statement.judgement == judgement]
        if of_kind:
            names = f" ({_joined(s.text for s in of_kind)})" if judgement == "worse" else ""
            found.append(
                Statement(f"{len(of_kind)} of {len(statements)} {what} {judgement}{names}", of_kind[0].judgement)
            )
    return found


def _joined(texts: Iterable[str]) -> str:
    """The first few of them."""
    listed = list(texts)
    more = len(listed) - _LONGEST
    return ", ".join([*listed[:_LONGEST], *([f"{more} more"] if more > 0 else [])])


def _bits(report: EvalReport, row: Difference) -> str:
    """A change of bits per byte as a share of the reference's."""
    scored = report.score(row.reference, row)
    if scored is None or scored.value == 0:
        return f"{_signed(row.value, '.3f')} bits/byte"
    change = row.value / scored.value
    return f"{_signed(100 * change, '.0f' if abs(change) >= 0.095 else '.1f')}% bits"


def _signed(value: float, form: str) -> str:
    """With a minus sign that is one."""
    return format(value, f"+{form}").replace("-", "−")


def _share(value: float) -> str:
    """A share in whole percent; all of it, or none, only where that is so."""
    percent = round(100 * value)
    return f"{percent if value in (0, 1) else min(99, max(1, percent))}%"
