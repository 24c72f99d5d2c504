"""Input rows of new tokens, distilled from the pieces they stand for (Token Distillation, arXiv 2505.20133).

In: an upcycled model with new rows, its grown tokenizer, text. Out: the same model, with the input rows R that minimise

    mean_t |x_t(R) - x_e(t)|^2

x_t(R) is what the MLP of a layer a quarter up the model gets at token t of the text, x_e(t) what it gets at that
token's last piece where the same text is spelt in known tokens. By that layer a model has put a word together, and no
layer above has to run. Where input and output rows are tied, the output's fit comes after (`fit`).

Shape legend: B windows of text, S tokens, P pieces, N new tokens, D hidden size.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ..export.gate import evaluating
from ..padding import beginning, padded
from ..tuner import MoeDeltaTuner
from ..tuner.blocks import mlp_blocks
from ..tuner.vocabulary import grown_layers
from .text import longest, options_for

DEPTH = 4
"""The layer: one in so many."""
STEPS, BATCH = 60, 8
RATE = 0.05
"""Adam's first learning rate as a multiple of the root mean square of a known row's entries; it falls to 0."""


class Window(NamedTuple):
    """Text as new and known tokens, and known tokens alone; `ends`: where among the pieces each token ends."""

    tokens: list[int]
    pieces: list[int]
    ends: list[int]


def distil_rows(
    tuner: MoeDeltaTuner,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    language: str | None,
    spelling: Sequence[Sequence[int]],
) -> None:
    """Distil the active adapter's new input rows, in place; texts without new tokens leave them.

    Args:
        spelling: the known tokens' ids of each new token.
    """
    grown = grown_layers(tuner.model)
    assert grown is not None
    embedding, name = grown[0], tuner.active_adapters[0]
    rows = embedding.rows(name)
    spelt = {embedding.first(name) + index: list(ids) for index, ids in enumerate(spelling)}
    windows = windows_of(tokenizer, texts, spelt, longest(tuner.model))
    if not windows:
        return
    random.Random(0).shuffle(windows)
    blocks = mlp_blocks(tuner.model, tuner.active_config)
    block = blocks[sorted(blocks)[len(blocks) // DEPTH]][1]
    first, options = beginning(tokenizer), options_for(language)

    def states(ids: Sequence[list[int]]) -> Tensor:
        input_ids, mask = padded([[first, *row] for row in ids])
        return _entering(tuner.model, block, input_ids.to(rows.device), mask.to(rows.device), options)

    scale = embedding.base_layer.get_parameter("weight").detach().float().pow(2).mean().sqrt().item()
    distilled = rows.detach().float().clone().requires_grad_()
    optimizer = torch.optim.Adam([distilled], lr=RATE * scale)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / STEPS)
    wanted = rows.requires_grad
    rows.requires_grad_(True)
    with evaluating(tuner.model), torch.enable_grad():
        for step in range(STEPS):
            batch = [windows[(step * BATCH + index) % len(windows)] for index in range(min(BATCH, len(windows)))]
            with torch.no_grad():
                taught = states([window.pieces for window in batch])
            found = states([window.tokens for window in batch])
            # Both begin with a token more, so a token's own state is one further than its place.
            pairs = [
                found[i, 1 : len(window.tokens) + 1] - taught[i, [end + 1 for end in window.ends]]
                for i, window in enumerate(batch)
            ]
            loss = torch.cat(pairs).float().pow(2).mean()
            distilled.grad = torch.autograd.grad(loss, [rows])[0].float()
            optimizer.step()
            schedule.step()
            rows.data.copy_(distilled.detach())
    rows.requires_grad_(wanted)


def windows_of(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], spelt: dict[int, list[int]], length: int
) -> list[Window]:
    """The texts cut at tokens, at most `length` - 1 pieces each; those without a new token are left out."""
    windows: list[Window] = []
    for tokens in tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]:
        while tokens:
            ends = [end - 1 for end in accumulate(len(spelt.get(token, (token,))) for token in tokens[:length])]
            fitting = max(1, sum(end < length - 1 for end in ends))
            taken, tokens = tokens[:fitting], tokens[fitting:]
            if any(token in spelt for token in taken):
                pieces = [piece for token in taken for piece in spelt.get(token, (token,))]
                windows.append(Window(taken, pieces, ends[:fitting]))
    return windows


class _Reached(Exception):
    """The layer has been reached: the rest of the pass would be for nothing."""


def _entering(model: nn.Module, block: nn.Module, ids: Tensor, mask: Tensor, options: dict[str, Any]) -> Tensor:
    """What enters a block, (B, S, D)."""
    entered: list[Tensor] = []

    def stop(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        entered.append(args[0] if args else kwargs["hidden_states"])
        raise _Reached

    hook = block.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        model(input_ids=ids, attention_mask=mask, use_cache=False, **options)
    except _Reached:
        pass
    finally:
        hook.remove()
    return entered[0].reshape(*ids.shape, -1)
