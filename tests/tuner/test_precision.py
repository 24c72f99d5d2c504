"""Dtypes: the router decides in fp32 whatever runs around it, and experts have the dtype that was asked for."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from builders import in_bf16, logits, moe_config, moe_layers, pico, token_batch, upcycle
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


ROADS = {
    "get_peft_model": lambda base, config, folder, cast: get_peft_model(base(), config(), autocast_adapter_dtype=cast),
    "from_pretrained": lambda base, config, folder, cast: PeftModel.from_pretrained(
        base(), folder, autocast_adapter_dtype=cast
    ),
    "add_adapter": lambda base, config, folder, cast: second(
        get_peft_model(base(), config(), autocast_adapter_dtype=cast), config(), cast
    ),
    "transformers": lambda base, config, folder, cast: AutoModelForCausalLM.from_pretrained(folder),
}


def second(model, config, cast):
    """The model with an adapter more."""
    model.add_adapter("second", config, autocast_adapter_dtype=cast)
    return model


@pytest.mark.parametrize("cast", [True, False], ids=["autocast", "as the base"])
@pytest.mark.parametrize("road", ROADS.values(), ids=ROADS)
def test_experts_have_the_dtype_that_lora_would_have(road, cast, tmp_path):
    """Over a bf16 base, for files in either dtype."""
    in_bf16(pico()).save_pretrained(tmp_path / "base")
    configs = {"lora": lambda: LoraConfig(target_modules=["up_proj"], r=2)}
    configs |= {"full": moe_config, "low-rank": lambda: moe_config(expert_rank=2)}

    def base():
        return AutoModelForCausalLM.from_pretrained(tmp_path / "base")

    def dtypes(name, saved):
        folder = tmp_path / f"{name} {saved}"
        get_peft_model(base(), configs[name](), autocast_adapter_dtype=saved).save_pretrained(folder)
        model = road(base, configs[name], folder, cast)
        return {p.dtype for key, p in model.named_parameters() if "lora_" in key or "moe_delta_experts" in key}

    for saved in (True, False):
        expected = dtypes("lora", saved)
        assert len(expected) == 1 and dtypes("full", saved) == dtypes("low-rank", saved) == expected


def test_loading_into_empty_weights_keeps_the_numbers_of_the_file(tmp_path):
    """PEFT rounds LoRA's matrices to the base's dtype on this road, even where they are fp32 in the end."""
    model = upcycle(in_bf16(pico()), trained=True)
    model.save_pretrained(tmp_path)
    for cast in (True, False):
        loaded = PeftModel.from_pretrained(
            in_bf16(pico()), tmp_path, low_cpu_mem_usage=True, autocast_adapter_dtype=cast
        )
        for name, parameter in model.named_parameters():
            assert torch.equal(loaded.get_parameter(name), parameter)
