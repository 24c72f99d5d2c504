"""Requests that wait are answered together: one call of `generate` for a batch, with one language a row.

In: jobs, from any thread. Out: their pieces, from the one thread that runs the model.

Shape legend: B rows, S longest prompt, V vocabulary.
"""

from __future__ import annotations

import copy
import logging
import threading
from collections import deque
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from ..errors import ServingError
from ..tuner.identifier import AUTO
from .answer import Job, Piece, Row, Token, told
from .hosted import Hosted

log = logging.getLogger(__name__)


class QueueFull(Exception):
    """So many requests wait already that one more is refused."""


class Batches:
    """A queue of jobs, and the thread that answers them.

    A batch holds jobs that choose tokens in the same way, in the order in which they came; what comes while it runs
    waits for its end.

    Args:
        hosted: the model.
        batch_size: most rows of a batch.
        waiting: most jobs that wait.

    Raises:
        ServingError: the tokenizer is not a fast one.
    """

    def __init__(self, hosted: Hosted, *, batch_size: int, waiting: int) -> None:
        if not hosted.tokenizer.is_fast:
            raise ServingError(
                "The model's tokenizer is written in Python, and answers are put together by tokenizers' DecodeStream. "
                "Save the model with a fast tokenizer (a tokenizer.json)."
            )
        self.hosted, self.batch_size, self.most = hosted, batch_size, waiting
        self.tokenizer = copy.deepcopy(hosted.tokenizer)  # one is not to be used by two threads at once
        self._waiting: deque[Job] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="peft-moe-delta batches", daemon=True)
        self._thread.start()

    def submit(self, jobs: Sequence[Job]) -> None:
        """Put jobs into the queue, all or none.

        Raises:
            QueueFull: there is no place for them.
        """
        with self._changed:
            if self._closing or len(self._waiting) + len(jobs) > self.most:
                raise QueueFull
            self._waiting.extend(jobs)
            self._changed.notify()

    def close(self) -> None:
        """Answer nothing more, and wait for the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        while jobs := self._next():
            try:
                answer(self.hosted, self.tokenizer, jobs, lambda: self._closing)
            except Exception as error:  # whatever it is, the thread has to outlive it: nobody else answers
                log.exception("a batch of %d requests failed", len(jobs))
                for job in jobs:
                    job.deliver(error)

    def _next(self) -> list[Job]:
        """The next batch, waited for; nothing at the end."""
        with self._changed:
            while not self._closing:
                waiting = [job for job in self._waiting if not job.cancelled]
                batch = _batch(waiting, self.batch_size)
                self._waiting = deque(job for job in waiting if job not in batch)
                if batch:
                    return batch
                self._changed.wait()
            return []


def answer(hosted: Hosted, tokenizer: Any, jobs: Sequence[Job], closing: Any = lambda: False) -> None:
    """Answer jobs of one kind in one batch, and deliver their pieces.

    Args:
        tokenizer: a copy of the model's own for this thread alone.
        closing: asked after each token; True ends all answers.
    """
    for job in jobs:
        if job.echo:
            job.deliver(_prompt(hosted, tokenizer, job))
        if not job.max_tokens:
            job.deliver(Piece("", finish="length"))
    rows = [Row(job, tokenizer, hosted.ends) for job in jobs if job.max_tokens]
    if not rows:
        return
    input_ids, attention_mask = _padded_left([row.job.prompt for row in rows], (hosted.ends or [0])[0])
    recorder = Recorder()
    asked = any(row.job.top is not None for row in rows)
    device = hosted.model.device
    with torch.random.fork_rng(enabled=rows[0].job.sampling.seed is not None):
        if (seed := rows[0].job.sampling.seed) is not None:
            torch.manual_seed(seed)
        hosted.model.generate(
            input_ids=input_ids.to(device),
            attention_mask=attention_mask.to(device),
            generation_config=_config(hosted, rows),
            logits_processor=LogitsProcessorList([recorder] if asked else []),
            stopping_criteria=StoppingCriteriaList([Watch(rows, recorder, closing)]),
            **hosted.arguments([row.job.language for row in rows]),
        )


class Recorder(LogitsProcessor):
    """Keeps the (B, V) log-probabilities of the step under way: after penalties that the model's generation config may
    have, before temperature and `top_p`."""

    logprobs: Tensor | None = None

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        self.logprobs = scores.float().log_softmax(-1)
        return scores


class Watch(StoppingCriteria):
    """Hands each row its new token, and says which rows are done: `generate` asks after every step."""

    def __init__(self, rows: Sequence[Row], recorder: Recorder, closing: Any) -> None:
        self.rows, self.recorder, self.closing = rows, recorder, closing

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        logprobs = self.recorder.logprobs
        for index, (row, token) in enumerate(zip(self.rows, input_ids[:, -1].tolist(), strict=True)):
            if not row.done:
                row.take(token, None if logprobs is None else logprobs[index])
                row.done = row.done or row.job.cancelled or self.closing()
        return torch.tensor([row.done for row in self.rows], device=input_ids.device)


def _batch(waiting: Sequence[Job], size: int) -> list[Job]:
    """The first of those who wait, and who can be answered with it."""
    if not waiting or waiting[0].sampling.seed is not None:  # what a seed gives must not depend on who else is asked
        return list(waiting[:1])
    kind = _kind(waiting[0])
    return [job for job in waiting if _kind(job) == kind][:size]


def _kind(job: Job) -> Hashable:
    """What jobs of a batch have in common."""
    named = job.language if job.language in (None, AUTO) else "named"
    return job.sampling, named


def _config(hosted: Hosted, rows: Sequence[Row]) -> GenerationConfig:
    """The model's own, with what the jobs of a batch ask for."""
    sampling, config = rows[0].job.sampling, copy.deepcopy(hosted.model.generation_config)
    config.max_new_tokens, config.max_length, config.num_beams = max(row.job.max_tokens for row in rows), None, 1
    config.eos_token_id, config.pad_token_id = hosted.ends or None, (hosted.ends or [0])[0]
    if sampling.temperature is not None:
        config.do_sample = sampling.temperature > 0
        config.temperature = sampling.temperature
    if sampling.top_p is not None:
        config.top_p = sampling.top_p
    if not config.do_sample:
        config.temperature = config.top_p = config.top_k = None  # transformers warns of what greedy choice ignores
    return config


@torch.no_grad()
def _prompt(hosted: Hosted, tokenizer: Any, job: Job) -> Piece:
    """A job's prompt with its tokens: alone, so that no padding is in it."""
    text = tokenizer.decode(list(job.prompt), skip_special_tokens=True)
    if job.top is None:
        return Piece(text, tuple(map(Token, job.prompt)), prompt=True)
    input_ids = torch.tensor([job.prompt], device=hosted.model.device)
    options = hosted.arguments([job.language])
    logits = hosted.model(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), **options).logits
    logprobs = logits[0, :-1].float().log_softmax(-1)
    scored = (told(token, row, job.top) for token, row in zip(job.prompt[1:], logprobs, strict=True))
    return Piece(text, (Token(job.prompt[0]), *scored), prompt=True)


def _padded_left(rows: Iterable[Sequence[int]], padding: int) -> tuple[Tensor, Tensor]:
    """Ids and attention mask, int64 (B, S); the padding's id does not matter, as it is masked."""
    rows = list(rows)
    longest = max(map(len, rows))
    ids = torch.tensor([[padding] * (longest - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return ids, mask
