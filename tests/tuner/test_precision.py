"""Dtypes: the router decides in fp32 whatever runs around it, and experts have the dtype that was asked for."""

import pytest
import torch
from peft import get_peft_model
from torch.nn import functional as F

from builders import logits, moe_config, moe_layers, pico, token_batch, upcycle
from peft_moe_delta.tuner.layer import Router


def expert_dtypes(model):
    return {p.dtype for layer in moe_layers(model) for p in layer.moe_delta_experts.parameters()}


def router_dtypes(model):
    return {p.dtype for layer in moe_layers(model) for p in layer.moe_delta_router.parameters()}


@pytest.fixture
def seen(monkeypatch):
    """What the routers received and answered."""
    calls = []
    forward = Router.forward

    def watched(self, x_TD):
        answer = forward(self, x_TD)
        calls.append((self.weight, x_TD, answer))
        return answer

    monkeypatch.setattr(Router, "forward", watched)
    return calls


@pytest.mark.parametrize("precision", ["autocast", "bf16 base", "bf16 throughout"])
def test_router_logits_are_computed_in_fp32(precision, seen):
    model = upcycle(pico() if precision == "autocast" else pico().bfloat16(), trained=True)
    if precision == "bf16 throughout":
        model.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        logits(model, token_batch())
    assert len(seen) == 2
    for weight, x, answer in seen:
        assert answer.dtype == torch.float32
        assert torch.equal(answer, F.linear(x.float(), weight.float()))
        assert not torch.equal(answer, F.linear(x.bfloat16(), weight.bfloat16()).float()), "the control"


@pytest.mark.parametrize(("autocast", "dtype"), [(True, torch.float32), (False, torch.bfloat16)])
@pytest.mark.parametrize("rank", [None, 2], ids=["full", "low-rank"])
def test_experts_over_a_16_bit_base_are_fp32_unless_refused(rank, autocast, dtype):
    base = pico().bfloat16()
    expected = logits(base, token_batch()).float()
    model = get_peft_model(base, moe_config(expert_rank=rank), autocast_adapter_dtype=autocast).eval()
    assert expert_dtypes(model) == {dtype}
    assert router_dtypes(model) == {torch.float32}
    assert {p.dtype for layer in moe_layers(model) for p in layer.base_layer.parameters()} == {torch.bfloat16}
    found = logits(model, token_batch())
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, atol=0.1, rtol=0)
