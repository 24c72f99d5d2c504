"""What a plan says, against a real training step: weights, gradients, AdamW's states, and the allocator's own peak."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig

from peft_moe_delta import MoeDeltaConfig
from peft_moe_delta.budget import Job, measure
from peft_moe_delta.budget.measure import build, rows, run

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 500,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def job(family: str = "llama", sizes: dict[str, Any] | None = None, **changes: Any) -> Job:
    adapter = {"experts": {"expanded": 1}, **{name: changes.pop(name) for name in list(changes) if name in ADAPTER}}
    config = MoeDeltaConfig(languages={"en": "original", "hu": "expanded"}, **adapter)
    model = AutoConfig.for_model(family, **{**SIZES, **(sizes or {})})
    return Job(model, config, **{"batch_size": 2, "sequence_length": 64, "autocast": False, **changes})


ADAPTER = ("experts", "routing", "expert_rank", "classifier_layers", "top_k")
JOBS = {
    "llama, learned, bf16 arithmetic": job(experts={"expanded": 3}, autocast=True),
    "qwen3 in bf16, experts too, by language": job(
        "qwen3", {"head_dim": 16}, routing="language", expert_rank=4, dtype=torch.bfloat16, experts_as_base=True
    ),
    "gpt2, classifier, checkpointing": job(
        "gpt2", experts={"expanded": 2}, routing="classifier", classifier_layers=[0], checkpointing=True
    ),
}


@dataclass(frozen=True)
class Real:
    """A training step that was taken, in bytes."""

    weights: int
    gradients: int
    optimizer: int
    activations: int


def taken_by(job: Job) -> Real:
    """Train a step, then look at what the allocator gives out in a further pass, whose gradients add up."""
    model, batch = build(job), rows(job)
    batch["input_ids"] = torch.randint(3, 500, batch["input_ids"].shape)  # routers choose by what tokens are
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    run(job, model, batch)
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiled:
        run(job, model, batch)
    states = [t for state in optimizer.state.values() for t in state.values()]
    return Real(
        weights=sum(p.nbytes for p in model.parameters()),
        gradients=sum(p.grad.nbytes for p in trained),
        optimizer=sum(t.nbytes for t in states),
        activations=peak(profiled),
    )


def peak(profiled: profile) -> int:
    """The most bytes that were given out at once."""
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


@pytest.mark.parametrize("name", list(JOBS))
def test_a_plan_is_within_10_percent_of_a_real_step(name):
    planned, taken = measure(JOBS[name]), taken_by(JOBS[name])
    assert planned.base + planned.experts == taken.weights
    assert planned.gradients == taken.gradients
    assert planned.optimizer == taken.optimizer
    assert planned.activations == pytest.approx(taken.activations, rel=0.1)
    # Beside a model's weights, activations of few tokens are little: all together could hide an error of theirs.
    assert taken.activations > 0.3 * taken.weights


def test_work_is_what_torch_counts():
    by_language = job("llama", {"attn_implementation": "eager"}, routing="language")
    model = build(by_language)
    with FlopCounterMode(display=False) as counted:
        run(by_language, model, rows(by_language))
    assert measure(by_language).flops == counted.get_total_flops() > 0


def test_nothing_is_loaded_for_a_large_model():
    sizes = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 1, "num_attention_heads": 64}
    found = measure(job("llama", {**sizes, "num_key_value_heads": 8, "vocab_size": 128_256}, dtype=torch.bfloat16))
    attention, mlp, norms = 2 * 8192 * (8192 + 1024), 3 * 8192 * 28672, 3 * 8192
    assert found.parameters == attention + mlp + norms + 2 * 8192 * 128_256
    assert found.trainable == mlp + 2 * 8192
    assert found.outside == 2 * (2 * 8192 * 128_256 + 8192)
    assert found.linear == attention + mlp
