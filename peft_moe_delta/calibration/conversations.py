"""Conversations that a chat model makes up by itself (Magpie, arXiv 2406.08464): what it was tuned on, without the
data.

In: a post-trained model, and its tokenizer with a chat template. Out: conversations as text, template applied. The
model is given the beginning of a user's turn and samples on, then it answers: so the questions are of the kind that it
was tuned on. They are text of an original language, and show routers and identifiers what chat looks like.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import torch
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..errors import DataError
from ..evaluation.forward import evaluating, most_tokens
from ..evaluation.generation import ends_of, generate, in_chat

_MARK = "What-the-user-says"  # stands for it in the template; no tokenizer sees it
_ROUNDS = 4  # of sampling: turns of nothing but spaces are drawn anew


def made_up_conversations(
    model: PeftModel | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    number: int,
    *,
    seed: int = 0,
    temperature: float = 1.0,
    max_new_tokens: int = 64,
    batch_size: int = 16,
    progress: Callable[[list[Any]], Iterable[Any]] | None = None,
) -> list[str]:
    """Conversations of one question and its answer; the same seed and batch size give the same ones.

    Args:
        model: the post-trained model, or a graft over it, whose adapter is left aside.
        tokenizer: the post-trained model's own.
        number: how many. A model that ends its user's turn at once may give fewer.
        seed: of the draw; torch's own random state is left as it is.
        temperature: of the questions; answers are greedy.
        max_new_tokens: of a question, and of an answer; fewer where the model has no positions for both.
        batch_size: conversations at a time.
        progress: wraps lists of batches, e.g. `tqdm.tqdm`.

    Raises:
        DataError: the tokenizer has no chat template, the template does not show what the user says, or the model says
            nothing in the user's place.
    """
    if number < 1 or not temperature > 0:
        raise DataError(
            f"number: got {number}, expected 1 or more; temperature: got {temperature}, expected above 0. For none, do "
            "not ask for any."
        )
    beginning, end = turn_of_user(tokenizer)
    ids = tokenizer(beginning, add_special_tokens=False)["input_ids"]
    if not ids:
        raise DataError("The chat template begins with what the user says, so there is nothing to sample on from.")
    most, own = most_tokens(model), len(ids) + len(tokenizer(end, add_special_tokens=False)["input_ids"])
    longest = max_new_tokens if most is None else max(1, min(max_new_tokens, (most - own) // 2))
    aside = model.disable_adapter() if isinstance(model, PeftModel) else nullcontext()
    said: list[str] = []
    device = next(model.parameters()).device
    with aside, torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        for _ in range(_ROUNDS):
            starts = list(range(len(said), number, batch_size))
            for start in progress(starts) if progress else starts:
                rows = min(batch_size, number - start)
                said += filter(None, _questions(model, tokenizer, ids, end, rows, temperature, longest))
        if not said:
            raise DataError(
                "The model says nothing in the user's place: it ends its turn at once. Pass conversations of your own."
            )
        answers = generate(
            model, tokenizer, said, chat=True, max_new_tokens=longest, batch_size=batch_size, progress=progress
        )
    return [_rendered(tokenizer, *turns) for turns in zip(said, answers, strict=True)]


def turn_of_user(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """What stands before and behind the user's words in a prompt.

    Raises:
        DataError: no template, or one that does not show those words as they are, once.
    """
    if tokenizer.chat_template is None:
        raise DataError(
            "The tokenizer has no chat template, so the model cannot be asked to make up conversations. Set "
            "tokenizer.chat_template to that of the post-trained model, or go on with raw text alone: conversations=[]."
        )
    parts = in_chat(tokenizer, _MARK).split(_MARK)
    if len(parts) != 2:
        raise DataError(
            f"The chat template shows what the user says {len(parts) - 1} times, expected once. Pass conversations of "
            "your own, template applied, or none: conversations=[], in a recipe `calibrate: {conversations: 0}`."
        )
    return parts[0], parts[1]


@torch.inference_mode()
def _questions(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    ids: list[int],
    end: str,
    rows: int,
    temperature: float,
    max_new_tokens: int,
) -> list[str]:
    """What the model says in the user's place, up to where the template ends that turn; empty where that is nothing."""
    closing = tokenizer(end, add_special_tokens=False)["input_ids"][:1]
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=True,
        temperature=temperature,
        top_k=0,
        eos_token_id=sorted({*ends_of(model, tokenizer), *(t for t in closing if t in tokenizer.all_special_ids)}),
        pad_token_id=tokenizer.eos_token_id or 0,
    )
    prompt = torch.tensor([ids] * rows, device=next(model.parameters()).device)
    with evaluating(model):
        output = model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), generation_config=config)
    words = end.split()
    texts = []
    for written in tokenizer.batch_decode(output[:, len(ids) :], skip_special_tokens=True):
        text = written.split(words[0])[0] if words else written  # templates whose turns end in plain text
        texts.append(text.replace("\ufffd", "").strip())  # half a character was no text
    return texts


def _rendered(tokenizer: PreTrainedTokenizerBase, question: str, answer: str) -> str:
    """A whole conversation, as the template ends one."""
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return str(tokenizer.apply_chat_template(messages, tokenize=False))
