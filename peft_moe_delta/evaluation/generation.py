"""What a model writes: greedy continuations of prompts.

In: prompts, as they are or through the tokenizer's chat template. Out: one text a prompt, without the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from ..documents import check_documents
from ..errors import DataError
from ..padding import beginning_of_prompt
from .forward import Progress, batches_by_length, check_positions, evaluating


def generate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    language: str | None = None,
    max_new_tokens: int = 64,
    chat: bool = False,
    batch_size: int = 16,
    progress: Progress | None = None,
) -> list[str]:
    """Continue every prompt greedily until the model ends it or `max_new_tokens` are written.

    `language` is handed to the model when given; `chat` puts prompts through the tokenizer's chat template.

    Raises:
        DataError: `chat`, and the tokenizer has no chat template; or no prompts.
    """
    rows = [_encode(tokenizer, prompt, chat) for prompt in check_documents(prompts, "prompts", blank=True)]
    written = [""] * len(rows)
    with evaluating(model):
        batches = batches_by_length([len(row) for row in rows], batch_size)
        for batch in progress(batches) if progress else batches:
            texts = _continue(model, tokenizer, [rows[index] for index in batch], language, max_new_tokens)
            for index, text in zip(batch, texts, strict=True):
                written[index] = text
    return written


def in_chat(tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """A prompt as a chat model sees it: a user's turn in the chat template, and the beginning of the answer.

    Raises:
        DataError: the tokenizer has no chat template.
    """
    if tokenizer.chat_template is None:
        raise DataError("The tokenizer has no chat template. Set tokenizer.chat_template, or pass chat=False.")
    messages = [{"role": "user", "content": prompt}]
    return str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))


def _encode(tokenizer: PreTrainedTokenizerBase, prompt: str, chat: bool) -> list[int]:
    if chat:  # a template brings its own beginning
        return list(tokenizer(in_chat(tokenizer, prompt), add_special_tokens=False)["input_ids"])
    return beginning_of_prompt(tokenizer) + list(tokenizer(prompt, add_special_tokens=False)["input_ids"])


def _continue(
    model: Any, tokenizer: PreTrainedTokenizerBase, rows: list[list[int]], language: str | None, max_new_tokens: int
) -> list[str]:
    """One batch, padded on the left; the padding's id does not matter, as it is masked."""
    longest = max(len(row) for row in rows)
    check_positions(model, longest + max_new_tokens)
    padding = tokenizer.eos_token_id or 0
    input_ids = torch.tensor([[padding] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    device = next(model.parameters()).device
    config = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=ends_of(model, tokenizer), pad_token_id=padding
    )
    options = {} if language is None else {"language": language}
    output = model.generate(
        input_ids=input_ids.to(device), attention_mask=mask.to(device), generation_config=config, **options
    )
    return [text.strip() for text in tokenizer.batch_decode(output[:, longest:], skip_special_tokens=True)]


def ends_of(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end a text: the model's own, as chat models have several, and the tokenizer's."""
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    listed = own if isinstance(own, list) else [own]
    return sorted({end for end in (*listed, tokenizer.eos_token_id) if end is not None})
