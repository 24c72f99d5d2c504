"""Rows for tokens that the base model does not know, beside its input and output embeddings.

In: token ids and last hidden states. Out: embeddings and logits, with the new tokens' rows laid over the base's
(padding rows first, then beyond the end). The rows are parameters of their own, so nothing that trains them
(weight decay included) can move an old row, and no gradient of the whole embedding is ever formed.

Shape legend: N new tokens, D hidden size, V the base's rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from ..errors import ArchitectureError, PlanError
from ..tensors import with_new_rows
from .config import MoeDeltaConfig, check_one_active

ROWS = "moe_delta_rows"


class NewRows(nn.Module):
    """`weight` is (N, D)."""

    def __init__(self, num_tokens: int, like: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_tokens, like.shape[1], dtype=like.dtype, device=like.device))


class GrownLayer(nn.Module, BaseTunerLayer):
    """What input and output embeddings have in common: the rows, for one or more adapters, in `moe_delta_rows`."""

    adapter_layer_names = (ROWS,)
    other_param_names = ("settings",)

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.moe_delta_rows = nn.ModuleDict()
        self.settings: dict[str, MoeDeltaConfig] = {}
        self.merged_adapters: list[str] = []
        self.frozen_peft_weight_names: dict[str, tuple[str, ...]] = {}

    def add_rows(self, adapter_name: str, config: MoeDeltaConfig) -> None:
        """Make room for an adapter's new tokens, zeros at first."""
        weight = self.base_layer.get_parameter("weight")
        self.moe_delta_rows[adapter_name] = NewRows(len(config.record.new_tokens), weight)
        self.settings[adapter_name] = config

    def rows(self, adapter_name: str) -> nn.Parameter:
        """The new tokens' rows, (N, D)."""
        return self.moe_delta_rows[adapter_name].get_parameter("weight")

    def first(self, adapter_name: str) -> int:
        """Id of the first new token."""
        first = self.settings[adapter_name].record.first_new_token_id
        assert first is not None
        return first

    def grown_weight(self, adapter_name: str) -> Tensor:
        """The whole embedding in force, detached."""
        weight = self.base_layer.get_parameter("weight").detach()
        return with_new_rows(weight, self.rows(adapter_name).detach(), self.first(adapter_name))

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        """Activate one adapter; its rows train in the expansion they were added for, and never again."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        check_one_active(self.settings, names)
        for name, config in self.settings.items():
            settled = config.record.stage == "review" or config.newest_step > config.record.new_tokens_step
            self.frozen_peft_weight_names[name] = (ROWS,) if settled else ()
        super().set_adapter(names, inference_mode=inference_mode)

    @property
    def in_force(self) -> str | None:
        """The active adapter, where it has new tokens."""
        if self.disable_adapters:
            return None
        return next((name for name in self.active_adapters if name in self.settings), None)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        if adapter_name in self.moe_delta_rows and not self.rows(adapter_name).is_meta:
            self.moe_delta_rows[adapter_name].to(device or self.base_layer.get_parameter("weight").device)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise NotImplementedError("New tokens are merged by merge_and_graft(post_trained), with the experts.")

    def unmerge(self) -> None:
        raise NotImplementedError("New tokens are never merged in place, so there is nothing to undo.")


class GrownEmbedding(GrownLayer):
    """An input embedding: (...) token ids -> (..., D)."""

    @property
    def num_embeddings(self) -> int:
        """Token ids that are in force."""
        name, known = self.in_force, len(self.base_layer.get_parameter("weight"))
        return known if name is None else max(known, self.first(name) + len(self.rows(name)))

    @property
    def embedding_dim(self) -> int:
        """Width of a row."""
        return self.base_layer.get_parameter("weight").shape[1]

    def forward(self, ids: Tensor) -> Tensor:
        name = self.in_force
        if name is None:
            self._check_known(ids)
            return self.base_layer(ids)
        rows, place = self.rows(name), ids - self.first(name)
        is_new = (place >= 0) & (place < len(rows))
        # What the base's own lookup adds to the row (Gemma's scale) is done to the new rows too.
        known = self.base_layer(ids.masked_fill(is_new, 0))
        new = F.embedding(place.clamp(0, len(rows) - 1), rows).to(known.dtype)
        scale = getattr(self.base_layer, "embed_scale", None)
        return torch.where(is_new[..., None], new if scale is None else new * scale.to(new.dtype), known)

    def _check_known(self, ids: Tensor) -> None:
        """Refuse new tokens where the adapter that has them is not in force; a lookup beyond the end is no clear error.

        Raises:
            PlanError: there are some.
        """
        if ids.numel() and (largest := int(ids.max())) >= self.num_embeddings:
            raise PlanError(
                f"Token {largest} is none of the base model's {self.num_embeddings}: it is an adapter's new token, and "
                "that adapter is disabled or not active. Tokenize for the base model with the base model's tokenizer."
            )


class GrownHead(GrownLayer):
    """An output embedding: (..., D) -> (..., V or more) logits. A tied one uses the input embedding's rows."""

    def __init__(self, base_layer: nn.Module, tied_to: GrownEmbedding | None) -> None:
        super().__init__(base_layer)
        self._tied_to = [] if tied_to is None else [tied_to]  # a list, so that it is no child of this module

    def add_rows(self, adapter_name: str, config: MoeDeltaConfig) -> None:
        if self._tied_to:
            self.settings[adapter_name] = config
        else:
            super().add_rows(adapter_name, config)

    def rows(self, adapter_name: str) -> nn.Parameter:
        return self._tied_to[0].rows(adapter_name) if self._tied_to else super().rows(adapter_name)

    def forward(self, x: Tensor) -> Tensor:
        known, name = self.base_layer(x), self.in_force
        if name is None:
            return known
        rows, first = self.rows(name), self.first(name)
        weight = rows if torch.is_autocast_enabled(x.device.type) else rows.to(x.dtype)
        new = F.linear(x, weight).to(known.dtype)
        return torch.cat([known[..., :first], new, known[..., first + len(rows) :]], dim=-1)


class GrownLoss:
    """A model's loss function, told the number of logits there are instead of the config's `vocab_size`."""

    def __init__(self, wrapped: Any) -> None:
        self.wrapped = wrapped

    def __call__(self, logits: Tensor, labels: Tensor, vocab_size: int, *args: Any, **kwargs: Any) -> Tensor:
        return self.wrapped(logits, labels, logits.shape[-1], *args, **kwargs)


def check_can_grow(model: PreTrainedModel, config: MoeDeltaConfig) -> None:
    """Refuse embeddings that new tokens cannot be laid over, before anything is changed.

    Raises:
        ArchitectureError: they are no plain embedding and linear head without bias.
        PlanError: they are in `modules_to_save`, or the ids would leave a gap.
    """
    embedding, head = (
        module.base_layer if isinstance(module, GrownLayer) else module
        for module in (model.get_input_embeddings(), model.get_output_embeddings())
    )
    if not isinstance(embedding, nn.Embedding) or not isinstance(head, nn.Linear) or head.bias is not None:
        raise ArchitectureError(
            f"{type(model).__name__} cannot take new tokens: it has {type(embedding).__name__} and "
            f"{type(head).__name__}; expected an nn.Embedding and an nn.Linear without bias, neither in "
            "modules_to_save."
        )
    names = {name.rpartition(".")[2] for name, module in model.named_modules() if module in (embedding, head)}
    if names & set(config.modules_to_save or ()):
        raise PlanError(
            f"`modules_to_save` {config.modules_to_save} trains whole embeddings; new tokens train their own rows "
            "only. Leave the embeddings out of it."
        )
    first = config.record.first_new_token_id
    if first is None or first > len(embedding.weight):
        raise PlanError(
            f"The new tokens start at id {first}, the base's embedding has "
            f"{len(embedding.weight)} rows. The tokenizer is not that of this model."
        )


def grow(model: PreTrainedModel, adapter_name: str, config: MoeDeltaConfig) -> None:
    """Lay an adapter's `new_tokens` over a model's embeddings, once; their rows are zeros until filled or loaded."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not isinstance(embedding, GrownEmbedding):
        tied = head.weight is embedding.weight
        embedding = GrownEmbedding(embedding)
        head = GrownHead(head, embedding if tied else None)
        model.set_input_embeddings(embedding)
        model.set_output_embeddings(head)
        model.loss_function = GrownLoss(model.loss_function)
    for layer in (embedding, head):
        if adapter_name not in layer.settings:
            layer.add_rows(adapter_name, config)


@torch.no_grad()
def start_from_pieces(model: PreTrainedModel, adapter_name: str, pieces: list[list[int]], dtype: torch.dtype) -> None:
    """Each new token starts as the mean of the tokens that spelled it so far, in `dtype`."""
    for layer in grown_layers(model) or ():
        if adapter_name in layer.moe_delta_rows:
            weight = layer.base_layer.get_parameter("weight")
            rows = layer.rows(adapter_name)
            rows.data = torch.stack([weight[ids].float().mean(dim=0) for ids in pieces]).to(dtype)


def ungrow(model: PreTrainedModel) -> None:
    """Give a model that was unloaded its own loss back."""
    if isinstance(model.loss_function, GrownLoss):
        model.loss_function = model.loss_function.wrapped


def grown_layers(model: PreTrainedModel) -> tuple[GrownEmbedding, GrownHead] | None:
    """A model's grown embeddings; None where no adapter has new tokens."""
    layers = model.get_input_embeddings(), model.get_output_embeddings()
    return layers if isinstance(layers[0], GrownEmbedding) else None  # type: ignore[return-value]
