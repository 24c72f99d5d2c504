"""Exact match on tasks with known answers: would greedy decoding write exactly this answer, and then stop?

In: tasks `{"prompt", "answer"}`. Out: 0 or 1 for each. Nothing is generated: greedy decoding writes the answer exactly
when, fed the answer, the model's argmax before every answer token is that token. So one forward scores a whole batch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..errors import DataError
from ..padding import beginning_of_prompt
from .forward import Progress, batches_by_length, evaluating, logits_at

IGNORED = -100  # the label that PyTorch's cross-entropy and every Trainer leave out of the loss


@dataclass(frozen=True, eq=False)
class TaskScore:
    """1.0 for each task answered exactly, else 0.0, in the order the tasks came in; and how they were scored."""

    correct: np.ndarray
    definition: str

    @property
    def value(self) -> float:
        """The share of tasks answered exactly."""
        return float(self.correct.mean())


def encode_task(tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str) -> tuple[list[int], list[int]]:
    """`(input_ids, labels)` of one task, for training and scoring alike: [bos] prompt answer eos.

    Prompt and answer are tokenized apart, so that the prompt's tokens are those a user would send; labels are
    the answer's tokens and the end, and -100 before.
    """
    if tokenizer.eos_token_id is None:
        raise DataError("tokenizer: got no eos token, expected one to end an answer with. Set tokenizer.eos_token.")
    context = beginning_of_prompt(tokenizer) + tokenizer(prompt, add_special_tokens=False)["input_ids"]
    target = tokenizer(answer, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    if not context or len(target) == 1:
        raise DataError(
            f"task: got prompt {prompt!r} and answer {answer!r}, expected both to have at least one token. "
            "Drop tasks without text."
        )
    return context + target, [IGNORED] * len(context) + target


def exact_match(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Mapping[str, str]],
    *,
    language: str | None = None,
    batch_size: int = 32,
    progress: Progress | None = None,
) -> TaskScore:
    """Score every task. `language` is handed to the model's forward when given; `progress` wraps the list of batches,
    e.g. `tqdm.tqdm`."""
    encoded = _encode(tokenizer, tasks)
    batches = batches_by_length([len(input_ids) for input_ids, _ in encoded], batch_size)
    correct = np.zeros(len(tasks))
    with evaluating(model):
        for batch in progress(batches) if progress else batches:
            correct[batch] = _answered(model, [encoded[index] for index in batch], language)
    begins = tokenizer.convert_ids_to_tokens(beginning_of_prompt(tokenizer))
    definition = "the greedy answer is the expected one, token by token to the end; every prompt begins with "
    return TaskScore(correct=correct, definition=definition + (begins[0] if begins else "its own first token"))


def _encode(
    tokenizer: PreTrainedTokenizerBase, tasks: Sequence[Mapping[str, str]]
) -> list[tuple[list[int], list[int]]]:
    if len(tasks) == 0:
        raise DataError("tasks: got an empty list, expected at least one task. Check the file they came from.")
    for index, task in enumerate(tasks):
        if not isinstance(task, Mapping) or not {"prompt", "answer"} <= task.keys():
            got = f"the keys {sorted(task)}" if isinstance(task, Mapping) else f"{task!r:.60}"
            raise DataError(f"tasks[{index}]: got {got}, expected 'prompt' and 'answer'. Rename the columns.")
    return [encode_task(tokenizer, task["prompt"], task["answer"]) for task in tasks]


def _answered(model: nn.Module, encoded: list[tuple[list[int], list[int]]], language: str | None) -> list[bool]:
    """Whether each encoded task's every answer token is the argmax one position before it."""
    starts = [sum(label == IGNORED for label in labels) for _, labels in encoded]
    offset = min(starts) - 1
    longest = max(len(input_ids) for input_ids, _ in encoded) - 1  # nothing follows the end: it is no input
    rows = [input_ids[:-1] for input_ids, _ in encoded]
    predicted = logits_at(model, rows, range(offset, longest), language).argmax(dim=-1).cpu()
    return [
        torch.equal(row[start - 1 - offset :][: len(labels) - start], torch.tensor(labels[start:]))
        for row, (_, labels), start in zip(predicted, encoded, starts, strict=True)
    ]
