"""What an exported checkpoint answers in plain transformers: one prompt at a time, without padding.

Shape legend: S prompt tokens, N new tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..errors import DataError
from ..evaluation.forward import evaluating
from ..evaluation.loading import load
from .hosted import Hosted

Messages = Sequence[dict[str, str]]


@dataclass(frozen=True)
class Answer:
    """What the checkpoint says of one prompt.

    Attributes:
        prompt: its token ids, S of them.
        prompt_logprobs: S - 1 log-probabilities, of every token but the first.
        ids: N new tokens, chosen greedily, without the one that ends the text.
        logprobs: their N log-probabilities.
        near: for each of them and for the one after, the tokens whose log-probability is within the tolerance of the
            best: what an exact server may choose instead.
    """

    prompt: tuple[int, ...]
    prompt_logprobs: tuple[float, ...]
    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    near: tuple[frozenset[int], ...]


class Reference:
    """An exported checkpoint, or an adapter, in the dtype it is stored in.

    Args:
        export: its folder or Hub id.
        language: which it answers in, where it has to be told.
        tolerance: how far log-probabilities of a server may be off; by default 1e-3 for an fp32 checkpoint and 0.1 for
            a 16-bit one, whose sums every engine rounds in its own order.
        trust_remote_code: for an export of `remote_code`.

    Raises:
        CheckpointError: it cannot be loaded.
        LanguageError: it does not know the language, or has to be told one.
    """

    def __init__(
        self,
        export: str,
        *,
        language: str | None = None,
        tolerance: float | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        hosted = Hosted(load(export, trust_remote_code=trust_remote_code))
        self.model: Any = hosted.model
        self.tokenizer: PreTrainedTokenizerBase = hosted.tokenizer
        self.ends, self.positions = hosted.ends, hosted.positions
        self.options = hosted.arguments([hosted.resolved(language)]) if hosted.codes else {}
        exact = self.model.dtype == torch.float32
        self.tolerance = (1e-3 if exact else 0.1) if tolerance is None else tolerance

    def ids_of(self, text: str) -> list[int]:
        """As the tokenizer cuts a text by default, with the special tokens it adds."""
        return list(self.tokenizer(text)["input_ids"])

    def ids_of_chat(self, messages: Messages) -> list[int] | None:
        """The tokens of a conversation, ready for an answer; None where there is no chat template."""
        if self.tokenizer.chat_template is None:
            return None
        text = self.tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def text_of(self, ids: Sequence[int], prompt: Sequence[int]) -> str:
        """New tokens as text that follows the prompt."""
        before = self.tokenizer.decode(list(prompt), skip_special_tokens=True)
        after = self.tokenizer.decode([*prompt, *ids], skip_special_tokens=True)
        return str(after)[len(str(before)) :]

    def answer(self, prompt: Sequence[int], max_tokens: int) -> Answer:
        """
        Raises:
            DataError: the model has no positions for the prompt and its answer.
        """
        most = self.positions
        if most is not None and len(prompt) + max_tokens > most:
            raise DataError(
                f"A prompt has {len(prompt)} tokens, and {max_tokens} more are to be written, but the model reads at "
                f"most {most}. Give shorter texts, or a smaller --max-tokens or --max-prompt-tokens."
            )
        input_ids = torch.tensor([list(prompt)], device=self.model.device)
        with evaluating(self.model):
            written = self._greedy(input_ids, max_tokens)
        scores = torch.cat(written.scores).float().log_softmax(-1)  # (N, V), with the model's own penalties
        raw = torch.cat(written.logits).float().log_softmax(-1)
        ids = written.sequences[0, len(prompt) :]
        own = [int(token) for token in ids if int(token) not in self.ends]
        return Answer(
            tuple(prompt),
            tuple(self.logprobs(prompt).tolist()),
            tuple(own),
            tuple(_at(raw, ids)[: len(own)]),
            tuple(frozenset(_near(row, self.tolerance)) for row in scores),
        )

    def logprobs(self, prompt: Sequence[int]) -> Tensor:
        """Log-probabilities of every token of a prompt but the first, (S - 1,) in fp32."""
        input_ids = torch.tensor([list(prompt)], device=self.model.device)
        with evaluating(self.model):
            scored = self.model(input_ids=input_ids, **self.options).logits[0].float().log_softmax(-1)
        return scored[:-1].gather(-1, input_ids[0, 1:, None])[:, 0]

    def _greedy(self, input_ids: Tensor, max_tokens: int) -> Any:
        return self.model.generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=max_tokens,
            do_sample=False,
            eos_token_id=self.ends,
            pad_token_id=self.ends[0] if self.ends else 0,
            output_scores=True,
            output_logits=True,
            return_dict_in_generate=True,
            **self.options,
        )


def _at(logprobs: Tensor, ids: Tensor) -> list[float]:
    found: list[float] = logprobs.gather(-1, ids[:, None])[:, 0].tolist()
    return found


def _near(logprobs: Tensor, tolerance: float) -> list[int]:
    found: list[int] = (logprobs >= logprobs.max() - tolerance).nonzero()[:, 0].tolist()
    return found
