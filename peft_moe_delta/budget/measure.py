"""What one training step takes, from configs alone.

In: a `Job`. Out: `Measured`, bytes and operations. The model is built with its adapter, and runs forward and backward,
on tensors without content (`weightless.py`): nothing is estimated by formula, so what holds for a family, a routing or
a dtype is what its code does.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.pytorch_utils import Conv1D

from ..languages import ORIGINAL_GROUP
from ..tuner import MoeDeltaConfig
from ..tuner.base import MoeDeltaTuner
from ..tuner.router import Router
from .weightless import Meter, Weightless

_STATES = 2
"""Tensors that AdamW keeps of each weight that trains; beside them it keeps the number of its steps, in fp32."""
_STEP_BYTES = 4


@dataclass(frozen=True)
class Job:
    """A training to plan, as one process sees it.

    Attributes:
        model: the base model's config.
        adapter: what it gets; planned in the stage that it says, which is expansion unless it was changed.
        batch_size: rows of a pass.
        sequence_length: tokens of a row.
        dtype: of the base weights.
        autocast: whether products are computed in bf16 (`bf16=True` of `TrainingArguments`).
        checkpointing: whether decoder layers are computed again in the backward pass, instead of kept.
        experts_as_base: whether experts over 16-bit weights are in their dtype (`autocast_adapter_dtype=False`) and
            not in fp32, as PEFT makes them.
    """

    model: PretrainedConfig
    adapter: MoeDeltaConfig
    batch_size: int
    sequence_length: int
    dtype: torch.dtype = torch.float32
    autocast: bool = True
    checkpointing: bool = False
    experts_as_base: bool = False

    @property
    def tokens(self) -> int:
        """Of one pass."""
        return self.batch_size * self.sequence_length


@dataclass(frozen=True)
class Measured:
    """What a step of AdamW takes in one process, in bytes where nothing else is said.

    Attributes:
        parameters: how many numbers the base's weights are.
        trainable: how many train.
        base: the base's weights.
        experts: experts, routers and whatever else the adapter brings.
        gradients: of what trains.
        optimizer: AdamW's two states.
        activations: the most that a forward and backward pass holds beside these, kept and passing, while gradients
            add up. Copies of weights that autocast makes are among them.
        layer: weights of the largest decoder layer, experts included.
        layer_gradients: of the decoder layer that has most of them.
        outside: weights outside of decoder layers, embeddings above all.
        linear: numbers in linear maps of the base's decoder layers, which quantisation packs.
        linear_bytes: what they take.
        flops: operations of a forward and backward pass.
    """

    parameters: int
    trainable: int
    base: int
    experts: int
    gradients: int
    optimizer: int
    activations: int
    layer: int
    layer_gradients: int
    outside: int
    linear: int
    linear_bytes: int
    flops: int

    @property
    def total(self) -> int:
        """All that a process holds, as it is while gradients of several passes add up."""
        return self.base + self.experts + self.gradients + self.optimizer + self.activations


def measure(job: Job) -> Measured:
    """What a training takes.

    Raises:
        ArchitectureError: the model cannot be upcycled.
        PlanError: the adapter does not fit the model.
    """
    with Weightless() as weightless:
        model = build(job)
        for module in model.modules():
            if type(module) is Router:  # not gates: those recognise nobody here, as at the start of a review
                module.register_forward_hook(lambda module, given, logits: weightless.draw(logits))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.empty_like(parameter)  # as of an earlier pass of the step
        batch = rows(job)
        with Meter() as meter:
            run(job, model, batch)
    return _measured(model, meter)


def build(job: Job) -> nn.Module:
    """The model with its adapter, ready to train."""
    base = AutoModelForCausalLM.from_config(copy.deepcopy(job.model), dtype=job.dtype)
    if job.checkpointing:
        # Under its newer name where transformers has it, from 5.23 on.
        enable = getattr(base, "activation_checkpointing_enable", base.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
    adapter = copy.deepcopy(job.adapter)
    return get_peft_model(base, adapter, autocast_adapter_dtype=not job.experts_as_base).train()


def rows(job: Job) -> dict[str, Tensor]:
    """Full rows, each in one of the languages that have experts, as `LanguageCollator` makes them."""
    languages = job.adapter.languages
    ids = [number for number, group in enumerate(languages.values()) if group != ORIGINAL_GROUP]
    language_ids = torch.tensor([ids[row % len(ids)] for row in range(job.batch_size)])
    tokens = torch.ones(job.batch_size, job.sequence_length, dtype=torch.int64)
    return {
        "input_ids": tokens,
        "labels": tokens,
        "attention_mask": tokens,
        "language_ids": language_ids[:, None].expand_as(tokens),
    }


def run(job: Job, model: nn.Module, batch: dict[str, Tensor]) -> None:
    """A pass forward and backward."""
    with torch.autocast("cpu", torch.bfloat16, enabled=job.autocast):
        loss = model(**batch).loss
    loss.backward()


def _measured(model: Any, meter: Meter) -> Measured:
    tuner = model.base_model
    assert isinstance(tuner, MoeDeltaTuner)
    named = dict(tuner.model.named_parameters())
    ours = {name: p for name, p in named.items() if tuner.prefix in name}
    base = {name: p for name, p in named.items() if name not in ours}
    trained = {name: p for name, p in named.items() if p.requires_grad}
    layers, linear = _by_layer(named), list(_linear_weights(tuner))
    return Measured(
        parameters=sum(p.numel() for p in base.values()),
        trainable=sum(p.numel() for p in trained.values()),
        base=_bytes(base.values()),
        experts=_bytes(ours.values()),
        gradients=_bytes(trained.values()),
        optimizer=_STATES * _bytes(trained.values()) + _STEP_BYTES * len(trained),
        activations=meter.peak,
        layer=max(_bytes(weights) for index, weights in layers.items() if index is not None),
        layer_gradients=max(_bytes(weights) for weights in _by_layer(trained).values()),
        outside=_bytes(layers.get(None, [])),
        linear=sum(p.numel() for p in linear),
        linear_bytes=_bytes(linear),
        flops=meter.flops,
    )


def _by_layer(named: Mapping[str, Tensor]) -> dict[int | None, list[Tensor]]:
    """Decoder layer -> its weights; None -> those outside of decoder layers."""
    found: dict[int | None, list[Tensor]] = {}
    for name, parameter in named.items():
        found.setdefault(_layer(name), []).append(parameter)
    return found


def _linear_weights(tuner: MoeDeltaTuner) -> Iterator[Tensor]:
    """Of the base's decoder layers."""
    for name, module in tuner.model.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and tuner.prefix not in name and _layer(name) is not None:
            yield module.weight


def _layer(name: str) -> int | None:
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
