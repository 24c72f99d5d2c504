"""What a method makes: not one model but a family, over what a user may turn after training for free.

`a` is the share of the training's own change that is kept, `s` the scale of the post-training delta:

    W_0 + a (T - W_0) + s (P - W_0)

with W_0 base, P post-trained and T trained, for dense weights and for experts alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from pairs import LENGTH, copy_of
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from peft_moe_delta import calibrate_routers, made_up_conversations
from peft_moe_delta.graft.arithmetic import graft_tensor
from peft_moe_delta.graft.memory import grafted_adapter, tuner_of
from peft_moe_delta.graft.scale import Scale

from .material import Material, Pair

SHARES, SCALES = (0.125, 0.25, 0.5, 1.0), (0.5, 1.0)
CALIBRATION: Mapping[str, Any] = {"steps": 30, "max_length": LENGTH}
CALIBRATED_ON, CONVERSATIONS = 100, 64  # documents of each language; made up by the post-trained model


@dataclass(frozen=True)
class Family:
    """Models by `(a, s)`.

    Attributes:
        at: `(a, s)` -> the model, in evaluation mode. It may be the same object each time, filled anew.
        trained: parameters that were trained.
        told: whether it is told the language of every text.
        shares, scales: the `a` and `s` that make a difference.
    """

    at: Callable[[float, float], nn.Module]
    trained: int = 0
    told: bool = False
    shares: tuple[float, ...] = field(default_factory=lambda: SHARES)
    scales: tuple[float, ...] = field(default_factory=lambda: SCALES)


def dense_family(base: PreTrainedModel, tuned: PreTrainedModel, model: PreTrainedModel, trained: int) -> Family:
    """Of a dense model that was trained on from `base`; `tuned` may be the same as `base` where there is no delta."""
    before, after = ({n: p.detach() for n, p in one.named_parameters()} for one in (base, tuned))
    own = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    @torch.no_grad()
    def at(share: float, scale: float) -> nn.Module:
        for name, parameter in model.named_parameters():
            parameter.copy_(graft_tensor(before[name], after[name], own[name], scale=scale, expert_scale=share))
        return model.eval()

    return Family(at, trained, scales=(1.0,) if base is tuned else SCALES)


def grafted(model: PeftModel, tuned: PreTrainedModel, share: float, scale: float) -> PeftModel:
    """The experts of `model` over the post-trained model, its delta scaled."""
    return grafted_adapter(tuner_of(model), copy_of(tuned), Scale(scale), share, warn=False).eval()


def grafted_family(model: PeftModel, tuned: PreTrainedModel, *, told: bool = False, **turned: Any) -> Family:
    """Of a model with experts."""
    return Family(lambda a, s: grafted(model, tuned, a, s), added(model), told, **turned)


def calibrated_family(
    model: PeftModel, pair: Pair, text: Material, seed: int, options: Mapping[str, Any] = {}, **turned: Any
) -> Family:
    """Of a model with learned routing, whose routers are calibrated after the graft, once for each scale."""
    return Family(Calibrated(model, pair.tuned, text, seed, {**CALIBRATION, **options}), added(model), **turned)


@dataclass
class Calibrated:
    """`at` of a calibrated family; the routers are those of the grafted model that keeps all of the experts' change."""

    model: PeftModel
    tuned: PreTrainedModel
    text: Material
    seed: int
    options: Mapping[str, Any]
    routers: dict[float, list[Tensor]] = field(default_factory=dict)

    def __call__(self, share: float, scale: float) -> nn.Module:
        if scale not in self.routers:
            found = grafted(self.model, self.tuned, 1.0, scale)
            texts = {code: documents[:CALIBRATED_ON] for code, documents in self.text.train.items()}
            chats = self.conversations
            calibrate_routers(found, texts, self.text.tokenizer, conversations=chats, seed=self.seed, **self.options)
            self.routers[scale] = [rows.detach().clone() for rows in routers_of(found)]
        found = grafted(self.model, self.tuned, share, scale)
        with torch.no_grad():
            for rows, calibrated in zip(routers_of(found), self.routers[scale], strict=True):
                rows.copy_(calibrated)
        return found.eval()

    @cached_property
    def conversations(self) -> list[str]:
        """Those of the whole post-trained model, for every scale."""
        return made_up_conversations(self.tuned, self.text.tokenizer, CONVERSATIONS, seed=self.seed)


def routers_of(model: PeftModel) -> list[Tensor]:
    """Weights of all routers."""
    tuner = tuner_of(model)
    return [p for _, _, layer in tuner.expert_layers() for p in layer.router(tuner.active_adapters[0]).parameters()]


def added(model: PeftModel) -> int:
    """Parameters of experts and routers."""
    return sum(p.numel() for name, p in model.named_parameters() if "moe_delta_" in name)


def trainable(model: nn.Module) -> int:
    """Parameters that want a gradient."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
