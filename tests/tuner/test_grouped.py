"""Experts that run as one: what they compute is what they compute one after another."""

from __future__ import annotations

import pytest
import torch

from builders import FAMILIES, moe_layers, pico, token_batch, upcycle
from peft_moe_delta.errors import PlanError
from peft_moe_delta.tuner.grouped import can_be_grouped

KINDS = {
    "learned": {"routing": "learned"},
    "language": {"routing": "language"},
    "classifier": {"routing": "classifier", "classifier_layers": [1]},
    "low rank": {"routing": "learned", "expert_rank": 2},
    "low rank, language": {"routing": "language", "expert_rank": 2, "experts": {"uralic": 1, "turkic": 1}},
}
LANGUAGE_IDS = torch.tensor([0, 1, 3])


def computed(model, **labels):
    """Logits, loss and gradients of one pass; in training mode, so that auxiliary losses are among them."""
    tokens = token_batch()
    model.zero_grad()
    output = model(input_ids=tokens, labels=tokens, language_ids=LANGUAGE_IDS)
    output.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": output.logits.detach(), "loss": output.loss.detach(), **gradients}


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model.train()


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_grouped_experts_compute_what_single_ones_compute(family, kind):
    model = without_dropout(upcycle(pico(family), trained=True, **kind))
    expected = computed(model)
    model.base_model.set_experts_implementation("grouped_mm")
    assert all(can_be_grouped(layer.experts("default")) for layer in moe_layers(model)) == (family != "falcon")
    found = computed(model)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(
            found[name], tensor, atol=2e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )
    model.base_model.set_experts_implementation("eager")
    assert all(torch.equal(computed(model)[name], tensor) for name, tensor in expected.items())


def test_what_is_left_in_memory_does_not_matter():
    """A choice that is not used has a row that nobody computes."""
    model = without_dropout(upcycle(pico("gpt_neox"), trained=True, routing="language"))
    expected = computed(model)
    model.base_model.set_experts_implementation("grouped_mm")
    for _ in range(3):
        left = [torch.full((rows, size), torch.nan) for rows in range(1, 48) for size in (32, 64)]
        del left
        found = computed(model)
        assert all(tensor.isfinite().all() for tensor in found.values())
        torch.testing.assert_close(found["loss"], expected["loss"])


def test_experts_in_fp32_over_a_16_bit_model_are_not_rounded():
    model = upcycle(pico().bfloat16(), trained=True, routing="learned")
    assert {p.dtype for p in moe_layers(model)[0].new_experts("default").parameters()} == {torch.float32}
    with torch.no_grad():
        expected = model(input_ids=token_batch()).logits
        model.base_model.set_experts_implementation("grouped_mm")
        found = model(input_ids=token_batch()).logits
    torch.testing.assert_close(found, expected, atol=0.05, rtol=0.05)


def test_experts_that_somebody_watches_run_one_after_another():
    model = upcycle(pico(), trained=True, routing="learned")
    expected = model(input_ids=token_batch()).logits
    model.base_model.set_experts_implementation("grouped_mm")
    seen = []
    layer = moe_layers(model)[0]
    layer.base_layer.up_proj.register_forward_hook(lambda *_: seen.append(True))
    torch.testing.assert_close(model(input_ids=token_batch()).logits, expected, atol=1e-5, rtol=0)
    assert seen and not can_be_grouped(layer.experts("default"))


def test_another_implementation_is_refused():
    with pytest.raises(PlanError, match="one of eager, grouped_mm; got 'fast'"):
        upcycle(pico()).base_model.set_experts_implementation("fast")
