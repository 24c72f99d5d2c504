"""Answers in OpenAI's shapes: whole, or as the chunks of a stream."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from .answer import Job, Piece, Token

Json = dict[str, Any]


@dataclass
class Choice:
    """One answer of a request: what has come of it so far."""

    index: int
    job: Job
    pieces: list[Piece] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces)

    @property
    def finish(self) -> str | None:
        return next((piece.finish for piece in self.pieces if piece.finish), None)

    @property
    def written(self) -> list[Token]:
        """The tokens of the answer."""
        return [token for piece in self.pieces if not piece.prompt for token in piece.tokens]


@dataclass(frozen=True)
class Shape:
    """How one request is answered.

    Attributes:
        model: the name of the model.
        tokenizer: turns tokens into text.
        chat: whether it is a conversation.
        ids: whether token ids are told.
        id, created: of all chunks alike.
    """

    model: str
    tokenizer: PreTrainedTokenizerBase
    chat: bool
    ids: bool
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, choices: Sequence[Choice]) -> Json:
        """A request's answers when all are there."""
        answers = [self._choice(choice) for choice in choices]
        return {**self._head(chunk=False), "choices": answers, "usage": usage(choices)}

    def begin(self, choices: Sequence[Choice]) -> list[Json]:
        """What a stream begins with: who speaks, in a conversation."""
        if not self.chat:
            return []
        return [self._chunk(one, {"delta": {"role": "assistant", "content": ""}}, None) for one in choices]

    def chunk(self, choice: Choice, piece: Piece) -> Json:
        """A piece of a stream."""
        if self.chat:
            said: Json = {"delta": {"content": piece.text} if piece.text else {}}
        else:
            said = {"text": piece.text, "logprobs": self._logprobs(choice.job, [piece])}
        if self.ids:
            said["token_ids"] = [token.id for token in piece.tokens if not piece.prompt]
        return self._chunk(choice, said, piece.finish)

    def end(self, choices: Sequence[Choice]) -> Json:
        """The chunk that tells the usage."""
        return {**self._head(chunk=True), "choices": [], "usage": usage(choices)}

    def _head(self, *, chunk: bool) -> Json:
        kind = ("chat.completion.chunk" if chunk else "chat.completion") if self.chat else "text_completion"
        prefix = "chatcmpl" if self.chat else "cmpl"
        return {"id": f"{prefix}-{self.id}", "object": kind, "created": self.created, "model": self.model}

    def _chunk(self, choice: Choice, said: Json, finish: str | None) -> Json:
        return {**self._head(chunk=True), "choices": [{"index": choice.index, **said, "finish_reason": finish}]}

    def _choice(self, choice: Choice) -> Json:
        answer: Json = {"index": choice.index, "finish_reason": choice.finish}
        if self.chat:
            answer["message"] = {"role": "assistant", "content": choice.text}
        else:
            answer |= {"text": choice.text, "logprobs": self._logprobs(choice.job, choice.pieces)}
        if self.ids:
            answer |= {"prompt_token_ids": list(choice.job.prompt), "token_ids": [t.id for t in choice.written]}
        return answer

    def _logprobs(self, job: Job, pieces: Sequence[Piece]) -> Json | None:
        """OpenAI's lists, one entry a token."""
        if job.top is None:
            return None
        tokens = [token for piece in pieces for token in piece.tokens]
        texts = [self._text(token.id) for token in tokens]
        likely = [
            {self._text(i): value for i, value in reversed(token.top)} for token in tokens
        ]  # of equal texts the best
        return {
            "tokens": texts,
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [top or None for top in likely],
            "text_offset": [len("".join(texts[:place])) for place in range(len(texts))],
        }

    def _text(self, token: int) -> str:
        return str(self.tokenizer.decode([token]))


def usage(choices: Sequence[Choice]) -> Json:
    """Tokens read and written."""
    read, wrote = (sum(map(len, each)) for each in ((c.job.prompt for c in choices), (c.written for c in choices)))
    return {"prompt_tokens": read, "completion_tokens": wrote, "total_tokens": read + wrote}


def error(
    message: str, *, kind: str = "invalid_request_error", field: str | None = None, code: str | None = None
) -> Json:
    """An error as OpenAI's clients read it."""
    return {"error": {"message": message, "type": kind, "param": field, "code": code}}
