"""A training step: losses and gradients by routing and stage, checkpointing, 16-bit arithmetic, and Trainer."""

from __future__ import annotations

import pytest
import torch

from builders import pico, token_batch, upcycle
from gpu.conftest import assert_near, gradients, moved, on
from gpu.test_passes import KINDS
from peft_moe_delta import RoutingCallback, TrainingMonitor
from training.common import checkpoint, documents, train


def batch():
    tokens = token_batch()
    return {
        "input_ids": tokens, "labels": tokens, "attention_mask": torch.ones_like(tokens),
        "language_ids": torch.tensor([0, 1, 3]),
    }  # fmt: skip


def model_of(kind, stage="expansion"):
    model = upcycle(pico(), trained=True, router_z_loss_coef=0.01, **KINDS[kind])
    if stage == "review":
        model.start_review()
    return model.train()


def step(model, arguments):
    loss = model(**arguments).loss
    loss.backward()
    return loss


@pytest.mark.parametrize("stage", ["expansion", "review"])
@pytest.mark.parametrize("kind", list(KINDS))
def test_losses_and_gradients_equal_the_cpu(kind, stage, device):
    model = model_of(kind, stage)
    there = on(model, device)
    assert_near(step(there, moved(batch(), device)), step(model, batch()))
    expected, found = gradients(model), gradients(there)
    assert found.keys() == expected.keys() and expected
    for name, gradient in expected.items():
        assert_near(found[name], gradient)


@pytest.mark.parametrize("kind", ["learned", "language", "learned, low-rank"])
def test_grouped_experts_have_the_same_gradients(kind, device):
    model = model_of(kind)
    there = on(model, device)
    there.base_model.set_experts_implementation("grouped_mm")
    assert_near(step(there, moved(batch(), device)), step(model, batch()))
    for name, gradient in gradients(model).items():
        assert_near(gradients(there)[name], gradient)


def test_checkpointed_layers_compute_the_same(device):
    model = model_of("learned")
    there = on(model, device)
    checkpoint(there, use_reentrant=False)
    step(model, batch())
    step(there, moved(batch(), device))
    for name, gradient in gradients(model).items():
        assert_near(gradients(there)[name], gradient)


@pytest.mark.parametrize("kind", ["learned", "language", "learned, low-rank"])
def test_16_bit_arithmetic_trains(kind, device):
    model = on(model_of(kind), device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        with torch.autocast(device.type, torch.bfloat16):
            loss = model(**moved(batch(), device)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning", "ignore:This training is doubtful")
def test_trainer_runs_both_stages(device, folder):
    model = on(upcycle(pico()), device)
    data = documents([9, 7, 12, 5, 8, 6], ["hu", "en", "fi", "az"])
    options = {"use_cpu": device.type == "cpu", "max_steps": 2, "learning_rate": 1e-4}
    options["callbacks"] = [RoutingCallback(), TrainingMonitor()]
    first = train(model, data, folder / "expansion", **options)
    model.start_review()
    second = train(model, data, folder / "review", **options)
    assert next(model.parameters()).device.type == device.type
    for trainer in (first, second):
        logged = trainer.state.log_history[0]
        assert "load_balancing_loss" in logged or "language_prior_loss" in logged
