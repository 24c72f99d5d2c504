"""From a request to the pieces of its answers: prompts are made into jobs, or refused; jobs are waited for.

In: `CompletionRequest` and `ChatRequest`. Out: choices and their pieces, as they come. HTTP is `app`'s.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial

from anyio import CapacityLimiter, to_thread
from jinja2 import TemplateError

from ..errors import LanguageError
from .answer import Job, Piece, Sampling
from .batches import Batches, QueueFull
from .hosted import Hosted
from .requests import ChatRequest, CompletionRequest, Request, TokenizeRequest
from .responses import Choice, Shape


@dataclass(frozen=True)
class Limits:
    """What a server takes on.

    Attributes:
        max_tokens: of an answer, and its default.
        max_prompt_tokens: of a prompt.
        batch_size: most answers at once.
        waiting: most prompts that wait.
        timeout: seconds from a request to the end of its answer.
    """

    max_tokens: int = 512
    max_prompt_tokens: int = 4096
    batch_size: int = 8
    waiting: int = 128
    timeout: float = 300.0

    @property
    def bytes(self) -> int:
        """Of a request's body: tokens are seldom longer than 16 bytes, or 8 as a number in a list."""
        return 2**16 + 16 * self.max_prompt_tokens * self.batch_size


class Refused(Exception):
    """A request that is not answered, with its HTTP status and the field that is at fault."""

    def __init__(self, message: str, *, status: int = 400, field: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.field, self.code = status, field, code


class Service:
    """One model behind a queue.

    Args:
        hosted: the model.
        name: as clients call it.
        limits: what is refused.
    """

    def __init__(self, hosted: Hosted, name: str, limits: Limits) -> None:
        self.hosted, self.name, self.limits = hosted, name, limits
        self.batches = Batches(hosted, batch_size=limits.batch_size, waiting=limits.waiting)
        self._one = CapacityLimiter(1)  # a tokenizer is not to be used by two threads at once

    async def begin(self, request: CompletionRequest | ChatRequest) -> Answers:
        """Put a request's prompts into the queue.

        Raises:
            Refused: the request cannot be answered, or too many wait.
        """
        self._check_name(request)
        try:
            language = self.hosted.resolved(request.language)
        except LanguageError as error:
            raise Refused(str(error), field="language", code="unknown_language") from error
        chat = isinstance(request, ChatRequest)
        prompts = await to_thread.run_sync(self._prompts, request, limiter=self._one)
        answers = Answers(Shape(self.name, self.hosted.tokenizer, chat, request.return_token_ids), self.limits.timeout)
        for prompt in prompts:
            answers.add(self._job(request, prompt, language))
        try:
            self.batches.submit([choice.job for choice in answers.choices])
        except QueueFull as error:
            raise Refused(
                f"The queue is full ({self.limits.waiting} prompts). Try again later.", status=503, code="queue_full"
            ) from error
        return answers

    async def tokens(self, request: TokenizeRequest) -> list[int]:
        """A text's token ids."""
        self._check_name(request)
        return await to_thread.run_sync(self._tokens, request, limiter=self._one)

    def _tokens(self, request: TokenizeRequest) -> list[int]:
        cut = self.hosted.tokenizer(request.prompt, add_special_tokens=request.add_special_tokens)
        return list(cut["input_ids"])

    def _check_name(self, request: Request | TokenizeRequest) -> None:
        if request.model not in (None, self.name):
            raise Refused(
                f"There is no model {request.model!r} here, only {self.name!r}.",
                status=404, field="model", code="model_not_found",
            )  # fmt: skip

    def _prompts(self, request: CompletionRequest | ChatRequest) -> list[list[int]]:
        tokenizer = self.hosted.tokenizer
        if isinstance(request, CompletionRequest):
            return [p if isinstance(p, list) else list(tokenizer(p)["input_ids"]) for p in request.prompts]
        if tokenizer.chat_template is None:
            raise Refused("This model has no chat template. Ask /v1/completions instead.", field="messages")
        messages = [{"role": message.role, "content": message.text} for message in request.messages]
        try:
            text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        except TemplateError as error:
            raise Refused(f"The model's chat template refuses these messages: {error}.", field="messages") from error
        return [list(tokenizer(text, add_special_tokens=False)["input_ids"])]

    def _job(self, request: CompletionRequest | ChatRequest, prompt: list[int], language: str | None) -> Job:
        completion = request if isinstance(request, CompletionRequest) else None
        return Job(
            tuple(self._checked(prompt)),
            language,
            self._max_tokens(request, len(prompt)),
            deliver=lambda piece: None,
            sampling=Sampling(request.temperature, request.top_p, request.seed),
            stop=request.stops,
            top=None if completion is None else completion.logprobs,
            echo=completion is not None and completion.echo,
        )

    def _checked(self, prompt: list[int]) -> list[int]:
        most, rows = self.limits.max_prompt_tokens, self.hosted.model.get_input_embeddings().weight.shape[0]
        if not prompt:
            raise Refused("The prompt has no token.", field="prompt")
        if len(prompt) > most:
            raise Refused(
                f"The prompt has {len(prompt)} tokens; this server takes at most {most}.",
                field="prompt", code="context_length_exceeded",
            )  # fmt: skip
        if not 0 <= min(prompt) <= max(prompt) < rows:
            raise Refused(f"The prompt has a token id that is not from 0 to {rows - 1}.", field="prompt")
        return prompt

    def _max_tokens(self, request: CompletionRequest | ChatRequest, prompt: int) -> int:
        """Tokens of the answer: as asked for, or as many as there is place for."""
        asked = request.max_tokens
        if isinstance(request, ChatRequest) and request.max_completion_tokens is not None:
            asked = request.max_completion_tokens
        if asked == 0 and not (isinstance(request, CompletionRequest) and request.echo):
            raise Refused("max_tokens is 0, which only makes sense with echo.", field="max_tokens")
        if asked is not None and asked > self.limits.max_tokens:
            raise Refused(
                f"max_tokens is {asked}; this server writes at most {self.limits.max_tokens}.", field="max_tokens"
            )
        left = self.limits.max_tokens if self.hosted.positions is None else self.hosted.positions - prompt
        wanted = min(self.limits.max_tokens, max(left, 1)) if asked is None else asked
        if wanted > left:
            raise Refused(
                f"The prompt has {prompt} tokens and {wanted} are to be written; this model reads at most "
                f"{self.hosted.positions}.",
                field="max_tokens", code="context_length_exceeded",
            )  # fmt: skip
        return wanted


class Answers:
    """The answers to one request, as they come from the thread that runs the model."""

    def __init__(self, shape: Shape, timeout: float) -> None:
        self.shape, self.timeout = shape, timeout
        self.choices: list[Choice] = []
        self._loop = asyncio.get_running_loop()
        self._arrived: asyncio.Queue[tuple[Choice, Piece | Exception]] = asyncio.Queue()
        self._deadline = self._loop.time() + timeout

    def add(self, job: Job) -> None:
        """One more prompt."""
        choice = Choice(len(self.choices), job)
        self.choices.append(choice)
        job.deliver = partial(self._deliver, choice)

    async def pieces(self) -> AsyncGenerator[tuple[Choice, Piece], None]:
        """Every piece, until all answers have ended. Who stops asking cancels what is left.

        Raises:
            Refused: the time is over, or the model failed.
        """
        try:
            while any(choice.finish is None for choice in self.choices):
                choice, piece = await self._next()
                choice.pieces.append(piece)
                yield choice, piece
        finally:
            for choice in self.choices:
                choice.job.cancelled = True

    async def all(self) -> Sequence[Choice]:
        """The choices when all answers have ended."""
        async with aclosing(self.pieces()) as pieces:
            async for _ in pieces:
                pass
        return self.choices

    async def _next(self) -> tuple[Choice, Piece]:
        try:
            choice, piece = await asyncio.wait_for(self._arrived.get(), self._deadline - self._loop.time())
        except asyncio.TimeoutError as error:
            raise Refused(f"No whole answer within {self.timeout:g} seconds.", status=504, code="timeout") from error
        if isinstance(piece, Exception):
            raise Refused(f"The model failed ({type(piece).__name__}); the server's log says more.", status=500)
        return choice, piece

    def _deliver(self, choice: Choice, piece: Piece | Exception) -> None:
        """Called from the model's thread."""
        self._loop.call_soon_threadsafe(self._arrived.put_nowait, (choice, piece))
