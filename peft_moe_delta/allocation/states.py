"""Statistics of hidden states, from one pass over the text and without gradients.

In: a model and a language's rows. Out: of every layer the mean unit vector of the tokens at the MLP's input, and the
mean hidden state behind the layer.

The mean cosine over all pairs of tokens of two languages is the inner product of the two mean unit vectors (LayerMoE,
arXiv 2505.22582, without its tokens x tokens matrix):
`mean_uv <x_u/|x_u|, x_v/|x_v|> = <mean_u x_u/|x_u|, mean_v x_v/|x_v|>`. So one vector a layer is summed up, in fp64,
padding left out.

Shapes: B rows, T positions, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .blocks import Block
from .text import Batch


class StateMeans:
    """Running sums over tokens: `unit_sum` at the MLP's input and `hidden_sum` behind the layer, (H,) a layer, fp64."""

    def __init__(self, blocks: Sequence[Block]) -> None:
        self.blocks = blocks
        self.tokens = 0
        self.unit_sum: dict[int, Tensor] = {}
        self.hidden_sum: dict[int, Tensor] = {}
        self._mask: Tensor | None = None

    def read(self, model: nn.Module, batches: Iterable[Batch]) -> StateMeans:
        """Run the batches through the model and sum up what passes. Returns itself."""
        with self._listening(), torch.no_grad():
            for batch in batches:
                self._mask = batch.attention_mask.bool()
                self.tokens += int(self._mask.sum())
                model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
        return self

    def mean_unit_vectors(self) -> list[Tensor]:
        """(H,) of each layer, fp64."""
        return [self.unit_sum[block.index] / self.tokens for block in self.blocks]

    def mean_hidden_states(self) -> list[Tensor]:
        """(H,) of each layer, fp64."""
        return [self.hidden_sum[block.index] / self.tokens for block in self.blocks]

    @contextmanager
    def _listening(self) -> Iterator[None]:
        """Hooks on every block, removed at the end."""
        handles = []
        try:
            for block in self.blocks:
                handles.append(block.mlp.register_forward_pre_hook(self._unit_hook(block.index)))
                handles.append(block.layer.register_forward_hook(self._hidden_hook(block.index)))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _unit_hook(self, index: int) -> Any:
        def hook(_: nn.Module, arguments: tuple[Any, ...]) -> None:
            self._add(self.unit_sum, index, nn.functional.normalize(arguments[0].float(), dim=-1))

        return hook

    def _hidden_hook(self, index: int) -> Any:
        def hook(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
            self._add(self.hidden_sum, index, output[0] if isinstance(output, tuple) else output)

        return hook

    def _add(self, sums: dict[int, Tensor], index: int, states: Tensor) -> None:
        """Add the states (B, T, H) of the tokens that are no padding."""
        assert self._mask is not None
        summed = states.reshape(*self._mask.shape, -1)[self._mask].double().sum(dim=0)
        sums[index] = sums[index] + summed if index in sums else summed
