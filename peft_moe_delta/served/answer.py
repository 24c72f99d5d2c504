"""One answer as it is written: text piece by piece, where it ends, and what is known of its tokens.

In: a `Job` and the token ids that a model chooses for it, one after another. Out: `Piece`s, whose texts together are
the answer, streamed or not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tokenizers.decoders import DecodeStream
from torch import Tensor

CONTEXT = 16  # tokens of the prompt that say how an answer's first token is written, such as with a space


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; what is None is as the model's own generation config has it. Temperature 0 is greedy."""

    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None


@dataclass(frozen=True)
class Token:
    """A token of a prompt or an answer.

    Attributes:
        logprob: its log-probability; None where nobody asked, and for the first of a prompt.
        top: the likeliest tokens at its place with theirs, best first.
    """

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Piece:
    """What has become certain of an answer since the piece before.

    Attributes:
        finish: "stop" or "length" with the last piece, else None.
        prompt: whether these are the prompt's own tokens, which come first where a request asks for them.
    """

    text: str
    tokens: tuple[Token, ...] = ()
    finish: str | None = None
    prompt: bool = False


@dataclass(eq=False)
class Job:
    """A prompt to be answered.

    Attributes:
        prompt: its token ids.
        language: as `Hosted.resolved` has it.
        max_tokens: of the answer; 0 where only the prompt is to be scored.
        deliver: takes each piece, or the error that ended the answer; called from the thread that runs the model.
        stop: texts before which the answer ends.
        top: how many likely tokens to tell at each place; None for no log-probabilities.
        echo: whether the prompt's tokens are delivered first.
        cancelled: nobody waits for it any more.
    """

    prompt: tuple[int, ...]
    language: str | None
    max_tokens: int
    deliver: Callable[[Piece | Exception], None]
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    top: int | None = None
    echo: bool = False
    cancelled: bool = False


class Row:
    """The answer to one job, a row of a batch.

    Args:
        job: what is asked.
        tokenizer: a fast one.
        ends: tokens that end an answer; they are no part of it.
    """

    def __init__(self, job: Job, tokenizer: Any, ends: Sequence[int]) -> None:
        self.job, self.ends, self.done = job, frozenset(ends), False
        self._backend = tokenizer.backend_tokenizer
        self._context = list(job.prompt[-CONTEXT:])
        self._decoded = DecodeStream(ids=list(self._context), skip_special_tokens=True)
        self._ids: list[int] = []
        self._tokens: list[Token] = []  # not yet delivered
        self._read = ""  # what the tokens so far say
        self._held = ""  # the end of it that may be the beginning of a stop text

    def take(self, token: int, logprobs: Tensor | None) -> None:
        """The next token, and (V,) log-probabilities at its place, where they were asked for."""
        if token in self.ends:
            self._finish("stop")
            return
        self._ids.append(token)
        self._tokens.append(told(token, logprobs, self.job.top))
        new = self._decoded.step(self._backend, token) or ""
        self._read += new
        text, stopped = self._certain(self._held + new)
        if stopped:
            self._deliver(text, "stop")
        elif len(self._ids) == self.job.max_tokens:
            self._finish("length", text)
        elif text:
            self._deliver(text)

    def _certain(self, text: str) -> tuple[str, bool]:
        """What may be told of a text, the rest being held back, and whether it ends in a stop text."""
        places = [place for stop in self.job.stop if (place := text.find(stop)) >= 0]
        if places:
            return text[: min(places)], True
        held = max((_overlap(text, stop) for stop in self.job.stop), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held], False

    def _finish(self, reason: str, text: str = "") -> None:
        """The rest: what was held back, and bytes that never became a character."""
        before = self._backend.decode(self._context, skip_special_tokens=True)
        whole = self._backend.decode(self._context + self._ids, skip_special_tokens=True)[len(before) :]
        rest = whole[len(self._read) :] if whole.startswith(self._read) else ""
        self._deliver(text + self._held + rest, reason)

    def _deliver(self, text: str, finish: str | None = None) -> None:
        self.done = finish is not None
        tokens, self._tokens = tuple(self._tokens), []
        self.job.deliver(Piece(text, tokens, finish))


def told(token: int, logprobs: Tensor | None, top: int | None) -> Token:
    """A token with what was asked of its (V,) log-probabilities."""
    if logprobs is None or top is None:
        return Token(token)
    values, ids = logprobs.topk(min(top, len(logprobs)))
    return Token(token, float(logprobs[token]), tuple(zip(ids.tolist(), values.tolist(), strict=True)))


def _overlap(text: str, stop: str) -> int:
    """How much of the end of a text may be the beginning of a stop text."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0)
