"""Route agreement: 1 for equal models in every form, the right share for a router changed by hand."""

import copy

import pytest
import torch

from builders import in_bf16, moe_layers, perturbed, pico, token_batch, upcycle
from peft_moe_delta.errors import GraftError
from peft_moe_delta.graft.memory import to_stock
from peft_moe_delta.tuner.agreement import route_agreement

BATCHES = [{"input_ids": token_batch()}, {"input_ids": token_batch(2, 5, seed=6)}]


@pytest.mark.parametrize(
    ("family", "experts"),
    [
        ("llama", {"uralic": 2, "turkic": 1}),
        ("qwen2", {"uralic": 2, "turkic": 1}),
        ("qwen3", {"uralic": 2, "turkic": 1}),
        ("olmo2", {"uralic": 2, "turkic": 1}),
        ("granite", {"uralic": 2, "turkic": 1}),
        ("gemma2", {"uralic": [2, 1], "turkic": 1}),
    ],
)
def test_an_exact_export_routes_as_the_adapter_does(family, experts):
    model = upcycle(pico(family), trained=True, experts=experts)
    assert route_agreement(model, to_stock(model, remote_code=True), BATCHES) == {0: 1.0, 1: 1.0}


def test_routing_by_language_is_compared_where_a_group_has_a_choice():
    model = upcycle(pico(), trained=True, routing="language", experts={"uralic": [3, 3], "turkic": [1, 1]})
    batches = [{"input_ids": token_batch(), "language_ids": torch.tensor([0, 1, 3])}]
    exported = to_stock(model, remote_code=True)
    assert route_agreement(model, exported, batches) == {0: 1.0, 1: 1.0}


def test_the_share_is_that_of_the_tokens_with_the_same_set():
    """Top-1 of two experts whose logits are +s and -s of one hidden unit: turning the sign turns every choice."""
    model = upcycle(pico(), top_k=1, experts={"uralic": 1, "turkic": 1})
    other = copy.deepcopy(model)
    with torch.no_grad():
        for one, two in zip(moe_layers(model), moe_layers(other), strict=True):
            weight = one.moe_delta_router["default"].weight
            weight.zero_()[:, 0] = torch.tensor([1.0, -1.0, 0.0])
            two.moe_delta_router["default"].weight.copy_(weight)
        moe_layers(other)[1].moe_delta_router["default"].weight.neg_()
    assert route_agreement(model, other, BATCHES) == {0: 1.0, 1: 0.0}


def test_padding_does_not_count():
    model = upcycle(pico(), trained=True)
    padded = {"input_ids": token_batch(), "attention_mask": torch.ones_like(token_batch())}
    padded["attention_mask"][0, :6] = 0
    alone = [{"input_ids": token_batch()[:1, 6:]}]
    assert route_agreement(model, perturbed_routers(model), [padded]).keys() == {0, 1}
    with pytest.raises(GraftError, match="no routes to compare"):
        route_agreement(model, pico(), alone)
    with pytest.raises(GraftError, match="no routes to compare"):
        route_agreement(model, model, [])


def perturbed_routers(model):
    other = copy.deepcopy(model)
    for layer in moe_layers(other):
        perturbed_weight = layer.moe_delta_router["default"].weight
        perturbed_weight.data += 0.1
    return other


def test_before_and_after_grafting(holds):
    model = upcycle(pico(), trained=True)
    near, far = (model.graft(perturbed(pico(), scale=scale)) for scale in (0.02, 0.2))
    near, far = (sum(route_agreement(model, grafted, BATCHES).values()) for grafted in (near, far))
    holds(near - far, above=0)
    assert near <= 2.0


def test_a_16_bit_export_reports_its_agreement_and_an_exact_one_does_not(holds):
    report = to_stock(upcycle(in_bf16(pico()), trained=True)).graft_report
    holds(report.route_agreement, above=0.5)
    assert report.route_agreement <= 1
    assert to_stock(upcycle(pico(), trained=True)).graft_report.route_agreement is None
