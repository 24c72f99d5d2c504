"""The gate passes what is equal and catches the mistakes an export could make."""

import copy

import pytest
import torch

from builders import pico
from export.upcycled import Mixture, plan_of, upcycle
from peft_moe_delta.errors import GraftError
from peft_moe_delta.export import build_model, check_equal_logits, choose_layout
from peft_moe_delta.export.gate import random_batch


@pytest.fixture(scope="module", params=["llama", "qwen2", "qwen3", "olmo2", "granite", "gemma", "phi3"])
def exported(request):
    """The explicit mixture, its weights, and the exported model."""
    dense = pico(request.param, num_hidden_layers=3)
    weights = upcycle(dense, plan_of([(1, 2)] * 3))
    return Mixture(dense, weights), weights, build_model(weights, choose_layout(weights))


def rebuilt(model, **fields):
    """The same tensors under another config."""
    config = copy.deepcopy(model.config)
    for field, value in fields.items():
        setattr(config, field, value)
    other = type(model)(config).eval()
    other.load_state_dict(model.state_dict())
    return other


def test_equal_models_pass_with_a_small_difference_that_does_not_vary(exported):
    reference, _, model = exported
    first = check_equal_logits(reference, model)
    assert 0 <= first <= 1e-4
    assert check_equal_logits(reference, model) == first
    assert check_equal_logits(model, model) == 0


def test_each_model_gets_the_tokens_on_its_own_device(exported):
    _, _, model = exported

    class Elsewhere(torch.nn.Module):
        """Tells where its tokens are, and answers with the exported model's logits."""

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.empty(1, device="meta"))

        def forward(self, **batch):
            assert {tensor.device.type for tensor in batch.values()} == {"meta"}
            return model(**random_batch(model))

    assert check_equal_logits(Elsewhere(), model) == 0


def test_a_wrong_rope_is_caught(exported):
    reference, _, model = exported
    wrong = rebuilt(model, rope_parameters={"rope_type": "default", "rope_theta": 5e3})
    with pytest.raises(GraftError, match="not exact: its logits differ"):
        check_equal_logits(reference, wrong)


def test_missing_renormalisation_is_caught(exported):
    reference, weights, model = exported
    if model.config.model_type == "flex_olmo":
        pytest.skip("its layers normalise what the experts give, so that a factor does not show")
    with pytest.raises(GraftError, match="not exact"):
        check_equal_logits(Mixture(reference.model, weights, renormalise=False), model)
    if hasattr(model.config, "norm_topk_prob"):
        with pytest.raises(GraftError, match="not exact"):
            check_equal_logits(reference, rebuilt(model, norm_topk_prob=False))


def test_a_wrong_top_k_is_caught(exported):
    reference, _, model = exported
    for top_k in (1, 3):
        with pytest.raises(GraftError, match="not exact"):
            check_equal_logits(reference, rebuilt(model, num_experts_per_tok=top_k))


def test_one_changed_expert_is_caught(exported):
    reference, _, model = exported
    wrong = copy.deepcopy(model)
    experts = wrong.get_parameter(
        next(name for name in dict(wrong.named_parameters()) if "2." in name and "down" in name)
    )
    with torch.no_grad():
        experts[1] *= 1.01
    with pytest.raises(GraftError, match="not exact"):
        check_equal_logits(reference, wrong)


def test_not_a_number_is_never_equal(exported):
    reference, _, model = exported
    wrong = copy.deepcopy(model)
    with torch.no_grad():
        wrong.model.norm.weight[0] = float("nan")
    with pytest.raises(GraftError, match="by up to nan"):
        check_equal_logits(reference, wrong)


def test_16_bit_models_and_other_vocabularies_are_refused(exported):
    reference, _, model = exported
    with pytest.raises(GraftError, match=r"checked in fp32.*torch.bfloat16 from the exported.*\.float\(\)"):
        check_equal_logits(reference, copy.deepcopy(model).bfloat16())
    with pytest.raises(GraftError, match=r"shape \(4, 24, 99\), the original's \(4, 24, 120\)"):
        check_equal_logits(pico("llama", vocab_size=120), model)


def test_training_mode_is_off_during_the_check_and_restored(exported):
    reference, _, model = exported
    model.train()
    model.model.norm.eval()
    modes = [module.training for module in model.modules()]
    check_equal_logits(reference, model)
    assert [module.training for module in model.modules()] == modes
    model.eval()
