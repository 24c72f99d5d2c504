"""Mixing: equal branches change nothing, a branch alone is that branch, averages are averages, misfits are refused."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from builders import logits, moe_layers, perturbed, pico, token_batch
from mixing.branches import EXPERT_PARTS, write_branches
from peft_moe_delta import MoeDeltaConfig, mix
from peft_moe_delta.checkpoint import CheckpointReader
from peft_moe_delta.errors import CheckpointError, GraftError, PlanError
from training.common import make_tokenizer

LANGUAGES = {"hu": "uralic", "en": "original", "az": "turkic"}
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "cohere")
VARIANTS = pytest.mark.parametrize("variant", EXPERT_PARTS)
TOKENS = token_batch()
CLOSE = {"atol": 5e-5, "rtol": 0}


def load(path):
    return AutoModelForCausalLM.from_pretrained(path).eval()


def branches_in(checkpoints):
    return {name: path for name, path in checkpoints.items() if name != "seed"}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Branches whose every weight has moved."""
    return write_branches(tmp_path_factory.mktemp("branches"))


@VARIANTS
@pytest.mark.parametrize("family", FAMILIES)
def test_with_every_branch_equal_to_the_seed_nothing_changes(family, variant, tmp_path):
    seed = pico(family)
    seed.save_pretrained(tmp_path / "seed")
    equal = {"uralic": tmp_path / "seed", "turkic": tmp_path / "seed"}
    with pytest.warns(UserWarning, match="equals the seed"):
        mixed = mix(tmp_path / "seed", equal, LANGUAGES, attention_experts=variant)
    torch.testing.assert_close(logits(mixed, TOKENS), logits(seed, TOKENS), **CLOSE)


@VARIANTS
@pytest.mark.parametrize("family", FAMILIES)
def test_a_branch_alone_is_that_branch(family, variant, tmp_path):
    """Branches that moved in what experts hold, and nowhere else."""
    checkpoints = write_branches(tmp_path, family, EXPERT_PARTS[variant])
    options = {"routing": "language", "attention_experts": variant}
    mixed = mix(checkpoints["seed"], branches_in(checkpoints), LANGUAGES, **options)
    for code, name in {"en": "seed", "hu": "uralic", "az": "turkic"}.items():
        expected = logits(load(checkpoints[name]), TOKENS)
        torch.testing.assert_close(logits(mixed, TOKENS, language=code), expected, **CLOSE)


@pytest.mark.parametrize(
    ("others", "shares"),
    [
        ("average", {"seed": 1 / 3, "uralic": 1 / 3, "turkic": 1 / 3}),
        ({"original": 1, "turkic": 3}, {"seed": 0.25, "uralic": 0, "turkic": 0.75}),
    ],
    ids=["average", "weighted"],
)
@VARIANTS
def test_averaged_weights_make_a_new_base_that_the_adapter_names(checkpoints, tmp_path, others, shares, variant):
    options = {"others": others, "base_output": tmp_path / "base", "attention_experts": variant}
    mixed = mix(checkpoints["seed"], branches_in(checkpoints), LANGUAGES, **options)
    written, sources = CheckpointReader(tmp_path / "base"), {n: CheckpointReader(p) for n, p in checkpoints.items()}
    assert set(written) == set(sources["seed"])
    for name, tensor in written.items():
        mean = sum(share * sources[source][name].double() for source, share in shares.items())
        in_expert = any(part in name for part in EXPERT_PARTS[variant])
        expected = sources["seed"][name] if in_expert else mean.float()
        torch.testing.assert_close(tensor, expected, atol=1e-7, rtol=1e-6)
    mixed.save_pretrained(tmp_path / "adapter")
    base = MoeDeltaConfig.from_pretrained(tmp_path / "adapter").base_model_name_or_path
    assert base == str(tmp_path / "base")
    reloaded = PeftModel.from_pretrained(load(base), tmp_path / "adapter")
    assert torch.equal(logits(reloaded, TOKENS), logits(mixed, TOKENS))
    with pytest.raises(GraftError, match='average.*others="seed"'):
        mixed.graft(load(checkpoints["seed"]))


def test_a_mix_over_the_seed_is_an_adapter_of_the_seed_and_grafts(checkpoints, tmp_path):
    mixed = mix(checkpoints["seed"], branches_in(checkpoints), LANGUAGES)
    mixed.save_pretrained(tmp_path)
    reloaded = PeftModel.from_pretrained(load(checkpoints["seed"]), tmp_path)
    assert torch.equal(logits(reloaded, TOKENS), logits(mixed, TOKENS))
    assert reloaded.active_peft_config.record.mixed["branches"]["uralic"] == str(checkpoints["uralic"])
    chat = perturbed(load(checkpoints["seed"]), scale=0.05)
    stock, adapter = mixed.merge_and_graft(chat), mixed.graft(chat)
    torch.testing.assert_close(logits(stock, TOKENS), logits(adapter, TOKENS), **CLOSE)


def test_no_more_than_one_tensor_of_a_branch_is_in_memory(checkpoints, tmp_path, monkeypatch):
    alive: weakref.WeakSet = weakref.WeakSet()
    most = 0
    read = CheckpointReader.__getitem__

    def counted(reader, name):
        nonlocal most
        tensor = read(reader, name)
        alive.add(tensor)
        gc.collect()
        most = max(most, len(alive))
        return tensor

    monkeypatch.setattr(CheckpointReader, "__getitem__", counted)
    gc.freeze()  # what was there before is not looked through sixty times
    try:
        mix(checkpoints["seed"], branches_in(checkpoints), others="average", base_output=tmp_path / "base")
    finally:
        gc.unfreeze()
    assert most == 1


def test_languages_are_named_after_the_groups_unless_given(checkpoints):
    mixed = mix(checkpoints["seed"], branches_in(checkpoints))
    assert mixed.active_peft_config.languages == {"uralic": "uralic", "turkic": "turkic"}
    assert [len(layer.experts("default")) for layer in moe_layers(mixed)] == [3, 3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"branches": {"uralic": "x"}}, "two or more groups.*load_experts"),
        ({"branches": {"original": "x", "uralic": "x"}}, "none of them 'original'"),
        ({"others": "average"}, "base_output.*goes together"),
        ({"base_output": "x"}, "goes together"),
        ({"others": {"nobody": 1}, "base_output": "x"}, "weights.*over original, turkic, uralic"),
        ({"others": {"uralic": -1}, "base_output": "x"}, "none negative"),
        ({"others": {"uralic": 0}, "base_output": "x"}, "not all 0"),
    ],
)
def test_unusable_requests_are_refused(checkpoints, arguments, message):
    with pytest.raises(PlanError, match=message):
        mix(**{"seed": checkpoints["seed"], "branches": branches_in(checkpoints), **arguments})


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"intermediate_size": 64}, r"mlp\.\w+\.weight \(.*48.*\) and \(.*64"),
        ({"vocab_size": 105}, "embed_tokens.*99.*105.*another vocabulary"),
        ({"num_hidden_layers": 1}, "missing model.layers.1"),
        ({"num_key_value_heads": 4}, "num_key_value_heads 2.*4"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}}, "rope_parameters"),
    ],
)
def test_branches_of_another_shape_are_refused(checkpoints, tmp_path, sizes, message):
    pico("llama", **sizes).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        mix(checkpoints["seed"], {"uralic": checkpoints["uralic"], "turkic": tmp_path})


def test_branches_of_another_family_are_refused(checkpoints, tmp_path):
    pico("mistral").save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="model_type 'llama'.*'mistral'"):
        mix(checkpoints["seed"], {"uralic": checkpoints["uralic"], "turkic": tmp_path})


def test_branches_with_another_tokenizer_are_refused(tmp_path):
    checkpoints = write_branches(tmp_path)
    for number, path in enumerate(checkpoints.values()):
        tokenizer: PreTrainedTokenizerFast = make_tokenizer()
        if number == 2:
            tokenizer.add_tokens(["ő"])
        tokenizer.save_pretrained(path)
    with pytest.raises(CheckpointError, match=r"tokenizers.*turkic differ in 1 tokens, such as 'ő'"):
        mix(checkpoints["seed"], branches_in(checkpoints))
