"""A language's LoRA over the post-trained model is the grafted adapter in that language."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file

from builders import logits, perturbed, pico, token_batch, upcycle
from peft_moe_delta.cli import main
from peft_moe_delta.errors import GraftError
from peft_moe_delta.graft.lora import to_lora

TOKENS = token_batch()
ONE_EACH = {"uralic": 1, "turkic": [0, 1]}
LOW_RANK = {"routing": "language", "experts": ONE_EACH, "expert_rank": 2}
FAMILIES = ["llama", "qwen2", "qwen3", "gemma3_text", "phi3", "gpt2", "gpt_neox", "bloom"]


def grafted_adapter(family="llama", **changes):
    """With half of one group's change and all of the other's."""
    model = upcycle(pico(family), trained=True, **{**LOW_RANK, **changes})
    return model.graft(post_trained(family), expert_scale={"uralic": 0.5, "turkic": 1.0})


def post_trained(family="llama"):
    return perturbed(pico(family))


def assert_equal_by_language(grafted, folder, family="llama", codes=("hu", "fi", "az")):
    for code in codes:
        served = PeftModel.from_pretrained(post_trained(family), folder / code).eval()
        expected = logits(grafted, TOKENS, language=code)
        torch.testing.assert_close(logits(served, TOKENS), expected, atol=1e-5, rtol=1e-5)
        with served.disable_adapter():
            english = logits(served, TOKENS)
        assert torch.equal(english, logits(post_trained(family), TOKENS))
        torch.testing.assert_close(logits(grafted, TOKENS, language="en"), english, atol=1e-5, rtol=1e-5)
        assert (expected - english).abs().max() > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_each_language_is_a_lora_and_english_the_untouched_model(family, tmp_path):
    grafted = grafted_adapter(family)
    assert to_lora(grafted, tmp_path / "lora") == {"hu": "hu", "en": None, "fi": "fi", "az": "az"}
    assert_equal_by_language(grafted, tmp_path / "lora", family)


@pytest.mark.parametrize(
    "changes", [{"routing": "context"}, {"attention_experts": "full"}, {"attention_experts": "shared_kv"}]
)
def test_routing_by_context_and_attention_experts(changes, tmp_path):
    grafted = grafted_adapter(**changes)
    to_lora(grafted, tmp_path / "lora")
    assert_equal_by_language(grafted, tmp_path / "lora")


def test_what_is_written_says_whose_it_is_and_names_only_what_it_changes(tmp_path):
    to_lora(grafted_adapter("gpt2"), tmp_path / "lora")
    assert json.loads((tmp_path / "lora" / "languages.json").read_text())["languages"]["en"] is None
    with safe_open(tmp_path / "lora" / "az" / "adapter_model.safetensors", "pt") as file:
        assert (file.metadata()["language"], file.metadata()["group"]) == ("az", "turkic")
        assert {key.split(".h.")[1][0] for key in file.keys()} == {"1"}  # noqa: SIM118
    config = json.loads((tmp_path / "lora" / "az" / "adapter_config.json").read_text())
    assert config["layers_to_transform"] == [1] and config["fan_in_fan_out"] is True
    assert sorted(config["target_modules"]) == ["c_fc", "mlp.c_proj"], "attention has a c_proj, too"
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (2, 2, "LORA")


def test_two_languages_are_switched_over_one_model(tmp_path):
    grafted = grafted_adapter()
    to_lora(grafted, tmp_path / "lora")
    served = PeftModel.from_pretrained(post_trained(), tmp_path / "lora" / "hu", adapter_name="hu").eval()
    served.load_adapter(tmp_path / "lora" / "az", adapter_name="az")
    for code in ("az", "hu"):
        served.set_adapter(code)
        torch.testing.assert_close(logits(served, TOKENS), logits(grafted, TOKENS, language=code), atol=1e-5, rtol=1e-5)


def test_the_command_reads_a_grafted_adapter_from_files(make_trio, tmp_path, capsys):
    trio = make_trio(**LOW_RANK)
    main(["graft", *map(str, trio.paths), str(tmp_path / "grafted"), "--target", "adapter"])
    main(["lora", str(tmp_path / "grafted"), str(tmp_path / "lora")])
    assert f"hu: {tmp_path / 'lora' / 'hu'}\nen: the model itself, without a LoRA" in capsys.readouterr().out
    config = json.loads((tmp_path / "lora" / "hu" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(trio.folder / "post")
    to_lora(trio.model.graft(trio.folder / "post"), tmp_path / "memory")
    for code in ("hu", "az"):
        files, memory = (load_file(tmp_path / name / code / "adapter_model.safetensors") for name in ("lora", "memory"))
        assert files.keys() == memory.keys() and all(torch.equal(files[name], memory[name]) for name in files)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"expert_rank": None}, "full copies of the MLP.*language=.*expert_rank=16"),
        ({"routing": "learned"}, "mixes experts token by token.*to_stock"),
        ({"experts": {"uralic": 2, "turkic": 1}}, r"Groups \['uralic'\] have several experts.*language="),
        ({"modules_to_save": ["norm"]}, r"0 new tokens and the modules \['norm'\]"),
    ],
)
def test_what_is_no_lora_is_refused_with_what_to_do(changes, message, tmp_path):
    model = upcycle(pico(), trained=True, **{**LOW_RANK, **changes})
    with pytest.raises(GraftError, match=message):
        to_lora(model, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()
