"""A causal LM whose MLP blocks are mixtures of experts: what an upcycled model is where no stock architecture holds it.

Written by peft-moe-delta, and not needed by it: torch and transformers are enough. Load the folder it lies in with
`AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)`. Attention, norms and embeddings are the host
architecture's own code in transformers. `config.moe_delta` says which layers have how many experts.

    logits_t = W_r x_t in fp32;  p_t = softmax over the experts token t may use;  y_t = sum of the top k, renormalised

Under routing by language the model takes `language`, a code in `config.moe_delta["languages"]`, or `language_ids`,
LongTensor (batch,) or (batch, sequence) of positions in that list. Otherwise it needs neither, and ignores them.

Shape legend: T tokens, D hidden size, E experts, K chosen experts a token, G language groups.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig as HostConfig
from transformers import LlamaForCausalLM as HostModel
from transformers import LlamaModel as HostBase

from ..routing import Routes, choose_experts, classifier_logits, recognised, router_logits


class Rows(nn.Module):
    """A router's rows, (E, D), or those of the gate before it; in fp32 whatever the model's dtype."""

    def __init__(self, number: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(number, width, dtype=torch.float32))

    def forward(self, x_TD: Tensor) -> Tensor:
        return router_logits(x_TD, self.weight)


class Mixture(nn.Module):
    """Equally shaped modules of a decoder layer and their router, in the place and with the call of one of them."""

    def __init__(self, first: nn.Module, config: MoeDeltaConfig, layer: str) -> None:
        super().__init__()
        moe = config.moe_delta
        self.experts = nn.ModuleList([first, *(self.copy_of(first) for _ in range(moe["experts"][layer] - 1))])
        self.router = Rows(len(self.experts), config.hidden_size)
        self.allowed: list[list[bool]] | None = None if moe["languages"] is None else moe["allowed"][layer]
        self.groups_T: Tensor | None = None  # set in the model's forward pass

    @staticmethod
    def copy_of(first: nn.Module) -> nn.Module:
        return copy.deepcopy(first)

    def allowed_TE(self) -> Tensor | None:
        """The experts that each token's language may use; None where all may use all."""
        if self.allowed is None or self.groups_T is None:
            return None
        return torch.tensor(self.allowed, device=self.groups_T.device)[self.groups_T]


class MlpMixture(Mixture):
    """MLP blocks: each token is sent to its top k."""

    def __init__(self, first: nn.Module, config: MoeDeltaConfig, layer: str) -> None:
        super().__init__(first, config, layer)
        moe = config.moe_delta
        self.top_k, self.renormalise = moe["top_k"], moe["norm_topk_prob"]
        gates = moe["classifiers"].get(layer, 0)
        self.classifier = Rows(gates, config.hidden_size + 1) if gates else None

    def routes(self, x_TD: Tensor) -> Routes:
        """Where tokens go."""
        allowed_TE = self.allowed_TE()
        if self.classifier is not None:  # what it takes for an original language stays on expert 0
            original_T = recognised(classifier_logits(x_TD, self.classifier.weight))
            allowed_TE = ~original_T[:, None] | (torch.arange(len(self.experts), device=x_TD.device) == 0)
        return choose_experts(self.router(x_TD), self.top_k, allowed_TE, renormalise=self.renormalise)

    def forward(self, hidden_states: Tensor, residual: Tensor | None = None) -> Tensor:
        x_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        routes = self.routes(x_TD)
        y_TD = torch.zeros_like(x_TD, dtype=torch.promote_types(x_TD.dtype, torch.float32))
        for index, expert in enumerate(self.experts):
            token, rank = (routes.indices_TK == index).nonzero(as_tuple=True)
            rows = x_TD[token]
            # BLOOM and MPT add the residual inside of the MLP: give it zeros, and add it once below
            rows = expert(rows) if residual is None else expert(rows, torch.zeros_like(rows))
            y_TD = y_TD.index_add(0, token, (rows * routes.weights_TK[token, rank, None]).to(y_TD.dtype))
        y = y_TD.to(hidden_states.dtype).view(hidden_states.shape)
        return y if residual is None else residual + y


MIXTURES: dict[str, type[Mixture]] = {"mlp": MlpMixture}


def with_experts(plan: dict[str, Any] | None) -> dict[str, Any] | None:
    """A tensor-parallel plan that cuts an expert as it cuts the MLP the expert stands for. Routers stay whole, so every
    process sends the same tokens to the same experts."""
    return plan and {**plan, **{name.replace(".mlp.", ".mlp.experts.*."): style for name, style in plan.items()}}


class MoeDeltaConfig(HostConfig):
    """The host's config with one more field, `moe_delta`: a dictionary.

    - parts: name of a module inside a decoder layer -> what it is, "mlp" or "attention"
    - experts: layer (as a string) -> number of experts of each part; other layers stay dense
    - top_k, norm_topk_prob: experts a token, and whether their weights are renormalised
    - classifiers: layer -> rows of the gate that keeps tokens of original languages on expert 0
    - languages: codes by id, under routing by language; else None
    - group_of: index of each language's group, by id
    - allowed: layer -> (G, E) booleans, the experts a group may use
    """

    model_type = f"moe_delta_{HostConfig.model_type}"
    base_model_tp_plan = with_experts(HostConfig.base_model_tp_plan)  # type: ignore[assignment]


def put_mixtures_into(model: nn.Module, config: MoeDeltaConfig) -> None:
    """Put them in the place of the host's modules."""
    moe = config.moe_delta
    for name, block in list(model.named_modules()):
        layer = name.rpartition(".")[2]
        if layer in moe["experts"] and all(hasattr(block, part) for part in moe["parts"]):
            for part, kind in moe["parts"].items():
                setattr(block, part, MIXTURES[kind](getattr(block, part), config, layer))


class MoeDeltaModel(HostBase):
    """The decoder without its head, which engines that run transformers' models ask `AutoModel` for.

    It has no input for languages, so it refuses a model that chooses experts by them.
    """

    config_class = MoeDeltaConfig
    _keep_in_fp32_modules_strict = [*(HostBase._keep_in_fp32_modules_strict or []), "router", "classifier"]  # noqa: RUF012

    def __init__(self, config: MoeDeltaConfig) -> None:
        if config.moe_delta["languages"] is not None:
            raise ValueError("This model chooses experts by language: load it with AutoModelForCausalLM.")
        super().__init__(config)
        put_mixtures_into(self, config)
        self.post_init()


class MoeDeltaForCausalLM(HostModel):
    config_class = MoeDeltaConfig
    _keep_in_fp32_modules_strict = [*(HostModel._keep_in_fp32_modules_strict or []), "router", "classifier"]  # noqa: RUF012

    def __init__(self, config: MoeDeltaConfig) -> None:
        super().__init__(config)
        put_mixtures_into(self, config)
        self.post_init()

    def forward(
        self, *args: Any, language: str | None = None, language_ids: Tensor | None = None, **kwargs: Any
    ) -> Any:
        tokens = kwargs.get("input_ids", args[0] if args else None)
        tokens = kwargs.get("inputs_embeds") if tokens is None else tokens
        if self.config.moe_delta["languages"] is not None and tokens is not None:
            self._tell(groups_T := self._groups(language, language_ids, tokens))
            for module in self.modules() if self.training else ():
                if (function := module.__dict__.get("_gradient_checkpointing_func")) is not None:
                    # What is recomputed has the languages of its own pass, whichever ran since; torch says where
                    # use_reentrant=True cannot.
                    contexts = partial(self._contexts, groups_T)
                    module.__dict__["_gradient_checkpointing_func"] = partial(function, context_fn=contexts)
        return super().forward(*args, **kwargs)

    # Trainer and `generate` read the names of the arguments.
    forward.__signature__ = inspect.signature(HostModel.forward).replace(  # type: ignore[attr-defined]
        parameters=[
            *(p for p in inspect.signature(HostModel.forward).parameters.values() if p.kind is not p.VAR_KEYWORD),
            *(inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, default=None) for n in ("language", "language_ids")),
            inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD),
        ]
    )

    def _tell(self, groups_T: Tensor | None) -> None:
        for module in self.modules():
            if isinstance(module, Mixture):
                module.groups_T = groups_T

    def _contexts(self, groups_T: Tensor) -> tuple[Any, Any]:
        """Of a checkpointed layer's forward pass and of its recomputation."""

        @contextmanager
        def replayed() -> Iterator[None]:
            before = next(module.groups_T for module in self.modules() if isinstance(module, Mixture))
            self._tell(groups_T)
            try:
                yield
            finally:
                self._tell(before)

        return nullcontext(), replayed()

    def _groups(self, language: str | None, language_ids: Tensor | None, tokens: Tensor) -> Tensor:
        """The group of every token, (T,)."""
        moe, (rows, sequence) = self.config.moe_delta, tokens.shape[:2]
        if language_ids is None and language in moe["languages"]:
            language_ids = torch.full((rows,), moe["languages"].index(language), device=tokens.device)
        elif language_ids is None or language is not None:
            raise ValueError(
                f"This model chooses experts by language. Pass language, one of {moe['languages']}, or language_ids: a "
                f"LongTensor, (batch,) or (batch, sequence), of positions in that list. Got language={language!r}."
            )
        if language_ids.dim() == 1:
            language_ids = language_ids[:, None].expand(-1, sequence)
        language_ids = language_ids[:, -sequence:]  # in cached generation the last token's language goes on
        return torch.tensor(moe["group_of"], device=language_ids.device)[language_ids.clamp(min=0)].reshape(-1)


MoeDeltaConfig.register_for_auto_class()
MoeDeltaModel.register_for_auto_class("AutoModel")
MoeDeltaForCausalLM.register_for_auto_class("AutoModelForCausalLM")
