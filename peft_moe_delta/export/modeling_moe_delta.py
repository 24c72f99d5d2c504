"""A causal LM whose MLP blocks are mixtures of experts: what an upcycled model is where no stock architecture holds it.

Written by peft-moe-delta, and not needed by it: torch and transformers are enough. Load the folder it lies in with
`AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)`. Attention, norms and embeddings are the host
architecture's own code in transformers. `config.moe_delta` says which layers have how many experts.

    logits_t = W_r x_t in fp32;  p_t = softmax over the experts token t may use;  y_t = sum of the top k, renormalised

Under routing by language the model takes `language_ids`, LongTensor (batch,) or (batch, sequence): positions in
`config.moe_delta["languages"]`.

Shape legend: T tokens, D hidden size, E experts, K chosen experts a token, G language groups.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig as HostConfig
from transformers import LlamaForCausalLM as HostModel

from ..routing.base import Routes, choose_experts


class Router(nn.Module):
    """`logits = W_r x`, in fp32 whatever the model's dtype. `weight` is (E, D)."""

    def __init__(self, hidden_size: int, num_experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_experts, hidden_size, dtype=torch.float32))

    def forward(self, x_TD: Tensor) -> Tensor:
        with torch.autocast(x_TD.device.type, enabled=False):
            return F.linear(x_TD.float(), self.weight.float())


class Mixture(nn.Module):
    """Equally shaped MLP blocks and their router, in the place and with the call of one block."""

    def __init__(
        self, mlp: nn.Module, hidden_size: int, num_experts: int, top_k: int, allowed: list[list[bool]] | None
    ) -> None:
        super().__init__()
        self.experts = nn.ModuleList([mlp, *(copy.deepcopy(mlp) for _ in range(num_experts - 1))])
        self.router = Router(hidden_size, num_experts)
        self.top_k, self.allowed = top_k, allowed
        self.groups_T: Tensor | None = None  # set in the model's forward pass

    def forward(self, hidden_states: Tensor, residual: Tensor | None = None) -> Tensor:
        x_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        allowed_TE = None
        if self.allowed is not None:
            allowed_TE = torch.tensor(self.allowed, device=x_TD.device)[self.groups_T]
        routes: Routes = choose_experts(self.router(x_TD), self.top_k, allowed_TE)
        y_TD = torch.zeros_like(x_TD, dtype=torch.promote_types(x_TD.dtype, torch.float32))
        for index, expert in enumerate(self.experts):
            token, rank = (routes.indices_TK == index).nonzero(as_tuple=True)
            rows = x_TD[token]
            # BLOOM and MPT add the residual inside of the MLP: give it zeros, and add it once below
            rows = expert(rows) if residual is None else expert(rows, torch.zeros_like(rows))
            y_TD = y_TD.index_add(0, token, (rows * routes.weights_TK[token, rank, None]).to(y_TD.dtype))
        y = y_TD.to(hidden_states.dtype).view(hidden_states.shape)
        return y if residual is None else residual + y


class MoeDeltaConfig(HostConfig):
    """The host's config with one more field, `moe_delta`: a dictionary.

    - mlp: name of the MLP inside a decoder layer
    - experts: layer (as a string) -> number of experts; other layers stay dense
    - top_k: experts a token
    - languages: codes by id, under routing by language; else None
    - group_of: index of each language's group, by id
    - allowed: layer -> (G, E) booleans, the experts a group may use
    """

    model_type = f"moe_delta_{HostConfig.model_type}"


class MoeDeltaForCausalLM(HostModel):
    config_class = MoeDeltaConfig
    _keep_in_fp32_modules_strict = [*(HostModel._keep_in_fp32_modules_strict or []), "router"]  # noqa: RUF012

    def __init__(self, config: MoeDeltaConfig) -> None:
        super().__init__(config)
        moe = config.moe_delta
        for name, block in list(self.named_modules()):
            layer = name.rpartition(".")[2]
            if layer in moe["experts"] and hasattr(block, moe["mlp"]):
                allowed = None if moe["languages"] is None else moe["allowed"][layer]
                mlp = getattr(block, moe["mlp"])
                mixture = Mixture(mlp, config.hidden_size, moe["experts"][layer], moe["top_k"], allowed)
                setattr(block, moe["mlp"], mixture)
        self.post_init()

    def forward(self, *args: Any, language_ids: Tensor | None = None, **kwargs: Any) -> Any:
        tokens = kwargs.get("input_ids", args[0] if args else None)
        tokens = kwargs.get("inputs_embeds") if tokens is None else tokens
        if self.config.moe_delta["languages"] is not None and tokens is not None:
            groups_T = self._groups(language_ids, tokens.shape[1])
            for module in self.modules():
                if isinstance(module, Mixture):
                    module.groups_T = groups_T
        return super().forward(*args, **kwargs)

    # Trainer and `generate` read the names of the arguments.
    forward.__signature__ = inspect.signature(HostModel.forward).replace(  # type: ignore[attr-defined]
        parameters=[
            *(p for p in inspect.signature(HostModel.forward).parameters.values() if p.kind is not p.VAR_KEYWORD),
            inspect.Parameter("language_ids", inspect.Parameter.KEYWORD_ONLY, default=None),
            inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD),
        ]
    )

    def _groups(self, language_ids: Tensor | None, sequence: int) -> Tensor:
        """The group of every token, (T,)."""
        moe = self.config.moe_delta
        if language_ids is None:
            raise ValueError(
                "This model chooses experts by language. Pass language_ids: a LongTensor, (batch,) or (batch, "
                f"sequence), of positions in {moe['languages']}."
            )
        if language_ids.dim() == 1:
            language_ids = language_ids[:, None].expand(-1, sequence)
        language_ids = language_ids[:, -sequence:]  # in cached generation the last token's language goes on
        return torch.tensor(moe["group_of"], device=language_ids.device)[language_ids.clamp(min=0)].reshape(-1)


MoeDeltaConfig.register_for_auto_class()
MoeDeltaForCausalLM.register_for_auto_class("AutoModelForCausalLM")
