"""The part of `modeling_moe_delta.py` that models with attention experts have in addition (BAM, arXiv 2408.08274).

Read, not run: `remote_code` puts one of the two kinds into the file, with the sources of what it uses of `attention`.

Shape legend: B batch, S sequence, T = B * S tokens, D hidden size, E experts.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..attention import Borrowed, OwnSlot, SharedKeyValues, cache_slots
from .modeling_moe_delta import Mixture


class AttentionMixture(Mixture):
    """Attention modules mixed softly: `y_t = sum_e g_te Attention_e(x)_t` over the experts token t may use."""

    def forward(
        self, hidden_states: Tensor, *args: Any, past_key_values: Any = None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        x_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        logits_TE, allowed_TE = self.router(x_TD), self.allowed_TE()
        usable = list(range(len(self.experts)))
        if allowed_TE is not None:
            logits_TE = logits_TE.masked_fill(~allowed_TE, -torch.inf)
            if not self.training:  # in training every expert gets a gradient, if only zeros
                usable = allowed_TE.any(dim=0).nonzero().flatten().tolist()
        weights_BSE = logits_TE.softmax(dim=-1).view(*hidden_states.shape[:-1], -1)
        y_BSD: Any = 0
        for index, cache in self.caches(past_key_values, usable, hidden_states.dtype):
            output_BSD = self.experts[index](hidden_states, *args, past_key_values=cache, **kwargs)[0]
            y_BSD = y_BSD + weights_BSE[..., index, None] * output_BSD
        return y_BSD.to(hidden_states.dtype), None

    def caches(self, cache: Any, usable: list[int], dtype: torch.dtype) -> Iterator[tuple[int, Any]]:
        """The experts to run, and what each sees as its cache."""
        raise NotImplementedError


class SharedAttention(AttentionMixture):
    """Experts with queries and outputs of their own; keys, values and the cache are the first one's."""

    @staticmethod
    def copy_of(first: nn.Module) -> nn.Module:
        return copy.deepcopy(first, {id(first.config): first.config, **Borrowed.of(first)})

    def caches(self, cache: Any, usable: list[int], dtype: torch.dtype) -> Iterator[tuple[int, Any]]:
        shared = SharedKeyValues(cache, dtype)
        for index in usable:
            shared.lend(self.experts[index])
            yield index, shared


class OwnAttention(AttentionMixture):
    """Experts with everything their own, each with a layer of its own in the cache."""

    @staticmethod
    def copy_of(first: nn.Module) -> nn.Module:
        return copy.deepcopy(first, {id(first.config): first.config})

    def caches(self, cache: Any, usable: list[int], dtype: torch.dtype) -> Iterator[tuple[int, Any]]:
        slots = dict.fromkeys(usable) if cache is None else cache_slots(cache, self.experts[0], usable)
        for index, slot in slots.items():
            yield index, None if slot is None else OwnSlot(cache, slot)
