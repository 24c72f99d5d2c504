"""Routing by context: as by language, where the text so far says which language it is.

A language is a property of a text, and a token alone says little of it. So evidence is added up over the last tokens of
the text, for every language that has experts, between two bounds:

    evidence_l(t) = min(30, max(-15, evidence_l(t - 1) + score_l(x_t))),  from 0, over the last `memory` tokens,
    score_l(x) = log p_l(x) - log(sum_o p_o(x) + exp(-H_l - margin)),

where p_l are a language's token frequencies, o runs over the original languages, and H_l is the entropy of l. The last
term stands for a language that nobody named: text that is less typical of l than l's own by more than the margin is not
taken for l. A token belongs to the language with most evidence, if that is above a threshold, and else to an original
one, on expert 0. It depends on no weight of the model, so it is the same in every layer, before and after a graft.

The bounds are those of a cumulative sum test (Page 1954). A long text gathers more evidence than it takes to be sure;
without the upper bound it would take as long to undo it where the language changes, and without the lower one, text of
another language before would count for as long against the new one. So what is remembered can be long, which a text
with names and code in it needs, and a change is still followed soon.

Scores and evidence are whole numbers, so that one pass, token by token, any batch and any device agree exactly. What is
remembered of a text lies in the cache, as one more layer of it.

Shape legend: B batch, S sequence, V vocabulary, L languages, C languages with experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.cache_utils import Cache, DynamicLayer

from .language import LanguageRouting

UNITS = 16
"""Of a score or of evidence, in a nat."""

CLIP = 4.0
"""Nats: what one token says at most."""

MARGIN = 2.5
"""Nats a token: by how much text may be less typical of a language than the language's own, and still be taken for it.
Between 2 and 3, 99 to 100% of the tokens of German, French, Spanish and Turkish stay on expert 0 of an adapter for
Hungarian and Greek (tests/benchmarks/bench_identifier.py)."""

THRESHOLD = 3 * UNITS
"""Evidence that a language needs, 3 nats: odds of 20 to 1."""


class ContextRouting(LanguageRouting):
    """As by language; where no language is named, an identifier reads it from the tokens so far."""

    name = "context"


def token_scores(counts_LV: Tensor, original: list[bool], margin: float = MARGIN) -> Tensor:
    """`score_l` of every token for each language with experts, (V, C) int8, in 1/16 nat.

    Args:
        counts_LV: how often each token occurs in each language's text, whole numbers; -1 for one that says nothing of
            any language, such as the special tokens of a chat template, and scores 0.
        original: (L,) which languages are original; the others are the columns, in their order.
        margin: see `MARGIN`.

    Frequencies are smoothed as by Witten and Bell
    (1991): a language with N tokens of K kinds has seen `(n_x + K / V) / (N + K)` of token x.
    """
    says_nothing_V = (counts_LV < 0).any(0)
    counts_LV = counts_LV.double().masked_fill(says_nothing_V, 0)
    total_L1, kinds_L1 = counts_LV.sum(1, keepdim=True), (counts_LV > 0).sum(1, keepdim=True).double()
    log_p_LV = ((counts_LV + kinds_L1 / counts_LV.shape[1]) / (total_L1 + kinds_L1)).log()
    entropy_L1 = -(counts_LV / total_L1 * log_p_LV).sum(1, keepdim=True)
    is_original_L = torch.tensor(original, device=counts_LV.device)
    others_V = log_p_LV[is_original_L].logsumexp(0) if any(original) else log_p_LV.new_tensor(-torch.inf)
    log_p_CV, entropy_C1 = log_p_LV[~is_original_L], entropy_L1[~is_original_L]
    scores_CV = log_p_CV - torch.logaddexp(others_V, (-entropy_C1 - margin).expand_as(log_p_CV))
    scores_CV = (scores_CV.clamp(-CLIP, CLIP) * UNITS).round().masked_fill(says_nothing_V, 0)
    return scores_CV.T.to(torch.int8).contiguous()


def recognise(
    ids_BS: Tensor,
    scores_VC: Tensor,
    memory: int,
    threshold: int,
    earlier_BM: Tensor | None = None,
    starts_BS: Tensor | None = None,
) -> Tensor:
    """The language of every token: (B, S) int64, 1 + its column of the scores, or 0 for an original or unknown one.

    Args:
        ids_BS: token ids, -1 for what says nothing; as do ids beyond the scores.
        scores_VC: see `token_scores`.
        memory: how many tokens are remembered, the token itself included.
        threshold: evidence that a language needs, in the units of the scores.
        earlier_BM: ids of the tokens that came before, as many as are known.
        starts_BS: True where another document begins.
    """
    length = ids_BS.shape[1]
    if earlier_BM is not None:
        earlier_BM = earlier_BM[:, max(0, earlier_BM.shape[1] - memory + 1) :]
        ids_BS = torch.cat([earlier_BM.to(ids_BS), ids_BS], dim=1)
    known_BS = (ids_BS >= 0) & (ids_BS < len(scores_VC))
    scores_BSC = scores_VC[ids_BS.clamp(0, len(scores_VC) - 1)].int() * known_BS[..., None]
    begins_BS1 = None if starts_BS is None else F.pad(starts_BS, (ids_BS.shape[1] - length, 0))[..., None]
    evidence_BSC = EvidenceSteps.of(scores_BSC, begins_BS1).over_last(memory).from_zero()
    most_BS, column_BS = evidence_BSC[:, ids_BS.shape[1] - length :].max(-1)
    return (column_BS + 1) * (most_BS > threshold)


@dataclass(frozen=True)
class EvidenceSteps:
    """For each position, what some tokens up to it do to evidence: x becomes min(high, max(low, x + added)).

    One such step after another is such a step again, so those of many tokens are put together by doubling. All are
    (B, S, C) int32.
    """

    added: Tensor
    low: Tensor
    high: Tensor

    @classmethod
    def of(cls, scores_BSC: Tensor, begins_BS1: Tensor | None) -> EvidenceSteps:
        """Of single tokens; where a document begins, nothing before it counts."""
        most, least = 30 * 16, -15 * 16  # 30 nats for a language, and 15 against it, in the units of the scores
        low, high = torch.full_like(scores_BSC, least), torch.full_like(scores_BSC, most)
        if begins_BS1 is not None:
            low, high = (torch.where(begins_BS1, scores_BSC, bound) for bound in (low, high))
        return cls(scores_BSC, low, high)

    def over_last(self, tokens: int) -> EvidenceSteps:
        """Of that many tokens up to each position, or of as many as there are."""
        whole, covered, part, size = None, 0, self, 1
        while True:
            if tokens & size:
                whole = part if whole is None else whole.after(part.earlier(covered))
                covered += size
            if covered == tokens:
                assert whole is not None
                return whole
            part, size = part.after(part.earlier(size)), 2 * size

    def after(self, first: EvidenceSteps) -> EvidenceSteps:
        """Both, the other one first."""
        low, high = (torch.clamp(bound + self.added, self.low, self.high) for bound in (first.low, first.high))
        return EvidenceSteps(first.added + self.added, low, high)

    def earlier(self, tokens: int) -> EvidenceSteps:
        """Those of so many positions before; where there are none, what changes nothing."""
        length, unbounded = self.added.shape[1], 1 << 30

        def moved(part_BSC: Tensor, fill: int) -> Tensor:
            return F.pad(part_BSC, (0, 0, tokens, 0), value=fill)[:, :length]

        return EvidenceSteps(moved(self.added, 0), moved(self.low, -unbounded), moved(self.high, unbounded))

    def from_zero(self) -> Tensor:
        """Evidence at each position, (B, S, C)."""
        return torch.clamp(self.added, self.low, self.high)


class TokenMemory(DynamicLayer):
    """One more layer of a cache: the ids of its tokens, (B, 1, S, 1), reordered, cropped and repeated as keys are."""

    @classmethod
    def of(cls, cache: Any) -> TokenMemory | None:
        """A cache's own; None where there is none."""
        return next((layer for layer in getattr(cache, "layers", ()) if isinstance(layer, cls)), None)

    @classmethod
    def extend(cls, cache: Any, ids_BS: Tensor) -> None:
        """Remember the tokens of a pass, after it: by then the cache has all layers of the host."""
        memory = cls.of(cache)
        if memory is None:
            memory = cls()
            # Where one layer says no, transformers takes all for growing ones, and attention sees others' unused end.
            memory.is_compileable = cache.is_compileable
            cache.layers.append(memory)
        memory.update(ids_BS[:, None, :, None], ids_BS[:, None, :, None])

    @property
    def ids_BS(self) -> Tensor | None:
        """The ids; None where it is empty."""
        return None if self.keys is None or not self.keys.numel() else self.keys[:, 0, :, 0]


@dataclass(frozen=True)
class PassTokens:
    """The tokens of one call of a model, and the cache of those before.

    Attributes:
        ids_BS: their ids, -1 for padding, and for embeddings that came without ids: they say nothing.
        mask_BS: False for padding; None where there is none.
        starts_BS: True where a packed document begins; None where nothing is packed.
        cache: None where the call was given none.
    """

    ids_BS: Tensor
    mask_BS: Tensor | None
    starts_BS: Tensor | None
    cache: Any

    @classmethod
    def of(cls, ids_BS: Tensor | None, shape: tuple[int, int], arguments: Mapping[str, Any]) -> PassTokens:
        """Read them off a call's arguments."""
        mask, place, cache = (arguments.get(name) for name in ("attention_mask", "position_ids", "past_key_values"))
        mask_BS = mask[:, -shape[1] :].bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None
        ids_BS = torch.full(shape, -1, device=arguments["inputs_embeds"].device) if ids_BS is None else ids_BS
        if mask_BS is not None:
            ids_BS = ids_BS.masked_fill(~mask_BS.to(ids_BS.device), -1)
        starts_BS = None
        if isinstance(place, Tensor) and place.dim() == 2 and cache is None:
            starts_BS = (place == 0).expand(shape)
        return cls(ids_BS, mask_BS, starts_BS, cache)

    def languages(self, scores_VC: Tensor, memory: int, threshold: int) -> Tensor:
        """`recognise`, of this call's tokens."""
        earlier = None if self.cache is None else TokenMemory.of(self.cache)
        earlier_BM = None if earlier is None else earlier.ids_BS
        return recognise(self.ids_BS, scores_VC, memory, threshold, earlier_BM, self.starts_BS)

    def remember(self, output: Any) -> None:
        """Put the tokens into the call's cache: the one it was given, or the one that it made, in its output."""
        cache = self.cache
        if cache is None:
            parts = output.values() if isinstance(output, dict) else output if isinstance(output, tuple) else ()
            cache = next((part for part in parts if isinstance(part, Cache)), None)
        if isinstance(getattr(cache, "layers", None), list):
            TokenMemory.extend(cache, self.ids_BS)
