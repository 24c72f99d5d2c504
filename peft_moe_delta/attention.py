"""What attention experts share, wherever they run: keys and values, or places in one cache (BAM, arXiv 2408.08274).

In: a host's attention module and its cache. Out: stand-ins for both, of which the module notices nothing. An adapter's
attention uses them, and so does the modelling file that remote code ships, which has this source.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from .errors import ArchitectureError, LanguageError


class Borrowed(nn.Module):
    """A projection of the base model's own attention inside an expert: called, not owned.

    Attributes:
        PARTS: what is borrowed of an attention module where keys and values are shared.
        idle: whether keys and values are known already; then nothing is computed and the result, in the right shape,
            is thrown away by `SharedKeyValues`.
    """

    PARTS = ("k_proj", "v_proj", "k_norm")

    @classmethod
    def of(cls, attention: nn.Module) -> dict[int, Any]:
        """For `copy.deepcopy`: what stands in an expert in the place of keys and values of its own."""
        children = dict(attention.named_children())
        return {id(children[name]): cls(children[name]) for name in cls.PARTS if name in children}

    def __init__(self, frozen: nn.Module) -> None:
        super().__init__()
        self._frozen = (frozen,)  # in a tuple, so that torch does not register it
        self.idle = False

    @property
    def weight(self) -> Tensor:
        """The base model's own."""
        return self._frozen[0].get_parameter("weight")

    @property
    def bias(self) -> Tensor:
        """The base model's own."""
        return self._frozen[0].get_parameter("bias")

    def forward(self, x: Tensor) -> Tensor:
        frozen = self._frozen[0]
        if not self.idle:
            cast = x.to(self.weight.dtype) if self.weight.is_floating_point() else x  # a quantised one takes any
            result: Tensor = frozen.forward(cast)  # past hooks: who calls first depends on the batch
            return result.to(x.dtype)
        return x.new_zeros(()).expand(*x.shape[:-1], frozen.out_features) if isinstance(frozen, nn.Linear) else x


class SharedKeyValues:
    """What attention modules see as their cache: the first one's keys and values, kept in the real cache, for all."""

    def __init__(self, cache: Any, dtype: torch.dtype) -> None:
        self.cache, self.dtype = cache, dtype
        self.states: tuple[Tensor, Tensor] | None = None

    def lend(self, expert: nn.Module) -> None:
        """Make an expert ready for its call: what it borrows rests once keys and values are known."""
        for part in expert.children():
            if isinstance(part, Borrowed):
                part.idle = self.states is not None

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        """Keys and values of all tokens so far, (B, heads, length, head size), in the caller's dtype."""
        if self.states is None:
            self.states = keys.to(self.dtype), values.to(self.dtype)
            if self.cache is not None:
                self.states = self.cache.update(*self.states, *args, **kwargs)
        return tuple(state.to(keys.dtype) for state in self.states)


class OwnSlot:
    """What an attention module sees as its cache: the real one, at another layer."""

    def __init__(self, cache: Any, slot: int) -> None:
        self.cache, self.slot = cache, slot

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """As `Cache.update`, with the slot in place of the layer."""
        return self.cache.update(keys, values, self.slot, *args, **kwargs)


def cache_slots(cache: Any, attention: Any, usable: list[int]) -> dict[int, int]:
    """Expert -> its layer in the cache; chosen when a decoder layer first meets the cache, and kept on it.

    The first expert takes the host's own layer, from which the host reads how many tokens there are; for the others,
    empty copies of that layer are appended.

    Args:
        cache: the host's.
        attention: a module of the host's class, which says which decoder layer this is.
        usable: the experts that tokens of this pass may use.

    Raises:
        LanguageError: a token needs an expert that has not seen the tokens before.
        ArchitectureError: the cache was begun without attention experts.
    """
    layer = attention.layer_idx
    all_slots: dict[int, dict[int, int]] = cache.__dict__.setdefault("moe_delta_slots", {})
    if layer not in all_slots:
        while len(cache.layers) < attention.config.num_hidden_layers:  # a cache that was made without config
            cache.layers.append(cache.layer_class_to_replicate())
        if cache.layers[layer].get_seq_length():
            raise ArchitectureError(
                "The cache holds tokens that attention experts have not seen. Begin generation with an empty cache."
            )
        all_slots[layer] = {usable[0]: layer}
        for expert in usable[1:]:
            all_slots[layer][expert] = len(cache.layers)
            cache.layers.append(copy.deepcopy(cache.layers[layer]))
    if not set(usable) <= set(all_slots[layer]):
        raise LanguageError(
            'With attention_experts="full" each language has keys and values of its own, and this one\'s lack the '
            "text so far. Begin with an empty cache, or name every language of a text in its prompt; "
            'attention_experts="shared_kv" has no such limit.'
        )
    return all_slots[layer]
