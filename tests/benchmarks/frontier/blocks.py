"""Block expansion (LLaMA-Pro, arXiv 2401.02415): new decoder blocks among the old ones, which at first add nothing.

In: a dense model and how many blocks to add. Out: a deeper model of the same function. A new block is a copy of the one
before it whose output projections are zero, so that only its residual is left.
"""

from __future__ import annotations

import torch
from pairs import Making
from transformers import PreTrainedModel

from .material import Material

_BLOCK = "model.layers."
_OUTPUTS = ("self_attn.o_proj.weight", "mlp.down_proj.weight")


def new_blocks(model: PreTrainedModel, parameters: int) -> int:
    """How many blocks have about so many parameters."""
    own = sum(p.numel() for name, p in model.named_parameters() if name.startswith(f"{_BLOCK}0."))
    return max(1, round(parameters / own))


def order(layers: int, count: int) -> list[tuple[int, bool]]:
    """Which block each of the deeper model's begins as, and whether it is new; those are spread evenly."""
    found = []
    for layer in range(layers):
        new = (layer + 1) * count // layers - layer * count // layers
        found += [(layer, False), *[(layer, True)] * new]
    return found


@torch.no_grad()
def expanded(
    making: Making, model: PreTrainedModel, text: Material, count: int, train_new: bool = False
) -> PreTrainedModel:
    """The deeper model; `train_new`: nothing but new blocks is trained in it."""
    blocks = order(model.config.num_hidden_layers, count)
    deeper = making.new_model(text.tokenizer, num_hidden_layers=len(blocks))
    old = dict(model.named_parameters())
    for name, parameter in deeper.named_parameters():
        source, new = name, False
        if name.startswith(_BLOCK):
            index, _, rest = name.removeprefix(_BLOCK).partition(".")
            layer, new = blocks[int(index)]
            source = f"{_BLOCK}{layer}.{rest}"
        parameter.copy_(torch.zeros_like(parameter) if new and name.endswith(_OUTPUTS) else old[source])
        parameter.requires_grad_(new or not train_new)
    return deeper.eval()
