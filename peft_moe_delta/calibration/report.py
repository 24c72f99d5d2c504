"""What a calibration found, on text that was held back from it.

In: figures of each source, before and after, and of each weight that was tried. Out: frozen rows that
`dataclasses.asdict` turns into JSON, and doubts in words.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from ..evaluation.routes import AGREE, STRAY

TEXT, CHAT = "text", "chat"


@dataclass(frozen=True)
class Routed:
    """How held-out text of one source fares.

    Attributes:
        language: its code; of the conversations, the original language that they count as.
        kind: `"text"` or `"chat"`.
        original: whether it belongs on expert 0.
        right: share of its own tokens whose first expert is one of its group's, mean over layers.
        loss: nats per token.
        told: nats per token under routing by language.
        divergence: of the predictions from those under routing by language, in nats per token. Of an original source
            that is from the post-trained model's own.
        answers: share of the conversations whose answer is, word for word, still what would be written greedily; 1 for
            text.
    """

    language: str
    kind: str
    original: bool
    right: float
    loss: float
    told: float
    divergence: float
    answers: float

    @property
    def cost(self) -> float:
        """What routing costs here, nats per token. An original source is to stay what the post-trained model makes of
        it, whatever that is; text of a new language is to be predicted well."""
        return self.divergence if self.original else self.loss - self.told


@dataclass(frozen=True)
class Trial:
    """The closed form under one weight: a point of the curve between what is kept and what is won.

    Attributes:
        weight: of an error on an original token.
        original_right, new_right: shares of tokens on the right experts, means over sources.
        original_cost, new_cost: nats per token beyond routing by language, likewise.
        answers: share of answers in chat that stay as they are; 1 without conversations.
    """

    weight: float
    original_right: float
    new_right: float
    original_cost: float
    new_cost: float
    answers: float

    def cost(self, answer_cost: float) -> float:
        """What is to be small. All answers lost count as much as `answer_cost` nats on every token of new languages:
        means alone would not tell, as one token in the wrong expert spoils an answer and hardly moves a mean."""
        return self.original_cost + self.new_cost + answer_cost * (1 - self.answers)


@dataclass(frozen=True)
class Calibration:
    """What a calibration found, on text held back from it.

    Attributes:
        kept: `"before"` where the routers are left as they were, `"closed form"` or `"review"`.
        weight: of an error on an original token in the closed form; the best of the curve.
        curve: one trial a weight.
        before, after: a row a source.
        conversations: how many were used, those held back included.
        steps: of the review that was tried.
        answer_cost: what the loss of all answers counted as, in nats per token.
    """

    kept: str
    weight: float
    curve: tuple[Trial, ...] = field(repr=False)
    before: tuple[Routed, ...] = field(repr=False)
    after: tuple[Routed, ...] = field(repr=False)
    conversations: int
    steps: int
    answer_cost: float

    @property
    def doubts(self) -> tuple[str, ...]:
        """Where tokens still go astray, and what to do about it."""
        found = []
        for row in self.after:
            least = 1 - STRAY if row.original else AGREE
            if row.right < least:
                where = "expert 0" if row.original else "their own experts"
                found.append(
                    f"After calibration {row.right:.0%} of held-out {row.language!r} tokens ({row.kind}) go to {where} "
                    f"(before: {_same(row, self.before).right:.0%}), which costs {row.loss - row.told:+.2f} nats a "
                    "token beside routing by language. Routers see one token at a time; routing by language, or by "
                    "context, does not depend on them."
                )
        return tuple(found)


def _same(row: Routed, rows: Iterable[Routed]) -> Routed:
    """The row of the same source."""
    return next(other for other in rows if (other.language, other.kind) == (row.language, row.kind))
