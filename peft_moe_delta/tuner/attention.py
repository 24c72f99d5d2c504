"""`MoeDeltaAttention`: a decoder layer's attention and the attention experts that grew beside it (BAM, 2408.08274).

In: what the host hands its attention module. Out: `y_t = sum_e g_te Attention_e(x)_t` with `g_t = softmax(W_a x_t)`
over the experts the token may use: soft, not top-k, and weighted after each expert's own output projection. Expert 0 is
the host's own module, unchanged and frozen. Every expert is a module of the host's class, so that grouped queries,
rotary variants, sliding windows and attention implementations are the host's.

- `"full"`: an expert owns all of the module. Each has a layer of its own in the host's cache, beyond the host's layers.
- `"shared_kv"`: keys and values, and so the cache, are the base model's; an expert owns the rest (queries, output).

Shape legend: B batch, S sequence, T = B * S tokens, D hidden size, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..attention import Borrowed, OwnSlot, SharedKeyValues, cache_slots
from .config import MoeDeltaConfig
from .deposits import Deposits
from .dispatch import with_idle
from .experts import full_expert, input_dtype, low_rank_expert, unhooked
from .layer import MoeDeltaLayer, Parts
from .processes import parallel
from .router import Router


class MoeDeltaAttention(MoeDeltaLayer):
    """An attention module with experts. Parameters are in `moe_delta_experts` and `moe_delta_router`."""

    is_attention = True

    @staticmethod
    def calling_convention(base_layer: nn.Module) -> bool:
        """Attention never adds the residual itself."""
        return False

    def new_expert(self, config: MoeDeltaConfig) -> nn.Module:
        """An untrained expert. All experts read the host's one config, as where it switches its implementation."""
        keep: dict[int, Any] = {id(self.base_layer.config): self.base_layer.config}
        if config.attention_experts == "shared_kv":
            keep |= Borrowed.of(self.base_layer)
        rank = config.expert_rank
        return full_expert(self.base_layer, keep) if rank is None else low_rank_expert(self.base_layer, rank, keep)

    def forward(
        self, hidden_states: Tensor, *args: Any, past_key_values: Any = None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        name = self.in_force
        if name is None:
            return self.base_layer(hidden_states, *args, past_key_values=past_key_values, **kwargs)
        parts = self._parts(name)
        weights_BSE, usable = self._weights(hidden_states, name, parts.router)
        settings = self.settings[name]
        shared = SharedKeyValues(past_key_values, hidden_states.dtype)
        slots: dict[int, int] = {}
        if settings.config.attention_experts == "full" and past_key_values is not None:
            slots = cache_slots(past_key_values, self.base_layer, usable)

        def attend(index: int, expert: nn.Module, x_BSD: Tensor) -> Tensor:
            cache: Any = OwnSlot(past_key_values, slots[index]) if slots else None
            if settings.config.attention_experts == "shared_kv":
                cache = shared
            return self._attend(expert, x_BSD, cache, args, kwargs)

        inputs = dict.fromkeys(slots or usable, hidden_states)
        # Attention cannot be called without a token, so nobody's hooks see expert 0 either: it runs or not.
        outputs = {0: attend(0, unhooked(self.base_layer), inputs.pop(0))} if 0 in inputs else {}
        outputs |= parts.experts(inputs, attend)
        y_BSD: Any = 0
        for index, output_BSD in outputs.items():
            if weights_BSE is not None:
                y_BSD = y_BSD + weights_BSE[..., index, None] * output_BSD
            elif index in usable:
                y_BSD = output_BSD
        return self._with_idle(y_BSD, parts, usable).to(hidden_states.dtype), None

    def _weights(self, x_BSD: Tensor, name: str, router: Router) -> tuple[Tensor | None, list[int]]:
        """Weights of the experts, fp32, and which of them any token may use; no weights where there is only one."""
        settings, x_TD = self.settings[name], x_BSD.reshape(-1, x_BSD.shape[-1])
        state = self.context.state(len(x_TD), self.training)
        state.expect(dict.fromkeys(settings.tables.logit_losses, 0), x_TD.device)
        reach = self._reach(state, name, x_TD)
        usable = list(reach.usable)
        logits_TE = router(x_TD) if settings.calls_router else None
        if len(usable) == 1 and not (state.recording and settings.needs_logits):
            return None, usable
        if logits_TE is None:  # nobody has a choice, but not everybody has the same expert
            return reach.forced_routes.probabilities_TE.view(*x_BSD.shape[:-1], -1), usable
        if state.recording:
            Deposits(self.context, settings, state, reach.groups).of_logits(logits_TE)
        allowed_TE = reach.allowed(self._sets(reach, name, None)[0])
        if allowed_TE is not None:
            logits_TE = logits_TE.masked_fill(~allowed_TE, -torch.inf)
        return logits_TE.softmax(dim=-1).view(*x_BSD.shape[:-1], -1), usable

    def _attend(self, expert: nn.Module, x_BSD: Tensor, cache: Any, args: tuple[Any, ...], kwargs: Any) -> Tensor:
        """One expert in its own dtype (new experts are fp32 by PEFT's default)."""
        if isinstance(cache, SharedKeyValues):
            cache.lend(expert)
        if not torch.is_autocast_enabled(x_BSD.device.type):
            dtype = input_dtype(expert) or x_BSD.dtype
            x_BSD = x_BSD.to(dtype)
            mask = kwargs.get("attention_mask")
            if isinstance(mask, Tensor) and mask.is_floating_point():
                kwargs = {**kwargs, "attention_mask": mask.to(dtype)}
        output: Tensor = expert(x_BSD, *args, past_key_values=cache, **kwargs)[0]
        return output

    def _with_idle(self, y_BSD: Tensor, parts: Parts, used: Sequence[int]) -> Tensor:
        """As `MoeDeltaLayer._needs_idle`: parameters of idle experts take part with nothing."""
        if not torch.is_grad_enabled() or not (parallel() or not y_BSD.requires_grad):
            return y_BSD
        return with_idle(y_BSD, self._idle(used, parts.experts, [parts.router]))
