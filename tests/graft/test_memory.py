"""Grafting: the invariants that follow from the algebra, then the two forms against each other, then refusals."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from builders import in_bf16, logits, moe_layers, perturbed, pico, token_batch, upcycle
from peft_moe_delta import fit_identifier
from peft_moe_delta.errors import CheckpointError, GraftError
from peft_moe_delta.graft.memory import to_stock
from peft_moe_delta.hub import CardFacts, render_card
from peft_moe_delta.tuner.identifier import Identifiers

STOCK = ("llama", "mistral", "qwen2", "qwen3", "olmo2", "granite", "gemma", "phi3")
OTHERS = ("gpt2", "gemma2", "bloom", "gpt_neox")
TOKENS = token_batch()


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_state(model, state):
    now = model.state_dict()
    assert now.keys() == state.keys()
    assert all(torch.equal(now[name], tensor) for name, tensor in state.items())


# -- what must hold ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("expert_rank", [None, 4])
@pytest.mark.parametrize("routing", ["learned", "language"])
@pytest.mark.parametrize("family", STOCK + OTHERS)
def test_untrained_experts_graft_to_the_post_trained_model(family, routing, expert_rank):
    base = pico(family)
    post = perturbed(base)
    expected = logits(post, TOKENS)
    grafted = upcycle(base, routing=routing, expert_rank=expert_rank).graft(post)
    for language in ("en", "hu", "az"):
        torch.testing.assert_close(logits(grafted, TOKENS, language=language), expected, atol=5e-5, rtol=0)


@pytest.mark.parametrize("family", STOCK + OTHERS)
@pytest.mark.parametrize("expert_scale", [1.0, 0.5])
def test_a_trained_expert_alone_is_the_post_trained_model_with_its_change(family, expert_scale):
    """The delta is computed here on its own, in fp64: P + a (E - W_0) in place of the MLP."""
    base = pico(family)
    post = perturbed(base)
    model = upcycle(base, trained=True, routing="language", experts={"uralic": 1, "turkic": 1})
    alone = copy.deepcopy(post)
    by_hand = dict(alone.named_parameters())
    names = {id(module): name for name, module in model.base_model.model.named_modules()}
    with torch.no_grad():
        for layer in moe_layers(model):
            for name, trained in layer.moe_delta_experts["default"][0].named_parameters():
                start = layer.base_layer.get_parameter(name).double()
                change = expert_scale * (trained.double() - start)
                parameter = by_hand[f"{names[id(layer)]}.{name}"]
                parameter.copy_(parameter.double() + change)
    grafted = model.graft(post, expert_scale=expert_scale)
    torch.testing.assert_close(logits(grafted, TOKENS, language="hu"), logits(alone, TOKENS), atol=5e-5, rtol=0)


@pytest.mark.parametrize("expert_rank", [None, 4])
def test_original_languages_run_on_the_post_trained_model_bit_for_bit(expert_rank):
    base = pico()
    post = perturbed(base)
    expected = logits(post, TOKENS)
    grafted = upcycle(base, trained=True, routing="language", expert_rank=expert_rank).graft(post)
    assert torch.equal(logits(grafted, TOKENS, language="en"), expected)


def test_grafting_leaves_the_adapter_as_it_was_bit_for_bit():
    base = pico()
    post = perturbed(base)
    model = upcycle(base, trained=True)
    before, config, untouched = state_of(model), copy.deepcopy(model.peft_config["default"]), state_of(post)
    model.merge_and_graft(post, scale=0.5, expert_scale=0.5)
    assert_same_state(post, untouched)
    model.graft(post)
    assert_same_state(model, before)
    assert model.peft_config["default"] == config


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("expert_rank", [None, 4])
@pytest.mark.parametrize("family", STOCK)
def test_both_forms_give_the_same_logits(family, expert_rank, tied):
    base = pico(family, tie_word_embeddings=tied)
    post = perturbed(base)
    model = upcycle(base, trained=True, expert_rank=expert_rank)
    stock = model.merge_and_graft(post)
    grafted = model.graft(post)
    torch.testing.assert_close(logits(stock, TOKENS), logits(grafted, TOKENS), atol=1e-4, rtol=0)
    assert stock.graft_report.max_logit_difference <= 1e-4
    assert "moe" in stock.config.model_type or stock.config.model_type in ("mixtral", "flex_olmo")


def test_dense_layers_are_replicated_if_asked_and_the_report_says_the_cost():
    base = pico("olmo2")
    post = perturbed(base)
    model = upcycle(base, trained=True, experts={"uralic": [2, 0], "turkic": [1, 0]})
    with pytest.raises(GraftError, match=r"replicate_dense_layers=True .*55,808 bytes more"):
        model.merge_and_graft(post)
    stock = model.merge_and_graft(post, replicate_dense_layers=True)
    assert (stock.graft_report.layout, stock.graft_report.replicated_bytes) == ("flex_olmo", 55_808)


@pytest.mark.parametrize("language", ["hu", "en", "az"])
def test_a_language_of_a_hard_routed_adapter_exports_alone(language):
    base = pico()
    post = perturbed(base)
    model = upcycle(base, trained=True, routing="language", top_k=2)
    stock = model.merge_and_graft(post, language=language)
    grafted = model.graft(post)
    expected = logits(grafted, TOKENS, language=language)
    torch.testing.assert_close(logits(stock, TOKENS), expected, atol=1e-4, rtol=0)
    # two Uralic experts make a mixture, one Turkic one or none a dense model
    assert stock.config.model_type == ("mixtral" if language == "hu" else "llama")


def test_what_is_known_is_copied_verbatim():
    base = in_bf16(pico())
    post = in_bf16(perturbed(pico()))
    model = upcycle(base, trained=True, experts={"uralic": 1, "turkic": 1})
    expected = state_of(post)
    stock = model.merge_and_graft(post)
    assert stock.dtype == torch.bfloat16
    found = stock.state_dict()
    for name, tensor in expected.items():
        if ".mlp." not in name:
            assert torch.equal(found[name], tensor), name
    gate_up = found["model.layers.0.mlp.experts.gate_up_proj"][0]
    gate, up = (expected[f"model.layers.0.mlp.{part}_proj.weight"] for part in ("gate", "up"))
    assert torch.equal(gate_up, torch.cat([gate, up]))
    assert torch.equal(
        found["model.layers.1.mlp.experts.down_proj"][0], expected["model.layers.1.mlp.down_proj.weight"]
    )


def test_sixteen_bit_experts_are_rounded_once():
    base = in_bf16(pico())
    post = in_bf16(perturbed(pico()))
    model = upcycle(base, trained=True, experts={"uralic": 1, "turkic": 1})  # fp32 experts, PEFT's default
    layer = moe_layers(model)[0]
    expert, start = layer.moe_delta_experts["default"][0].down_proj.weight, layer.base_layer.down_proj.weight
    assert expert.dtype == torch.float32
    delta = post.state_dict()["model.layers.0.mlp.down_proj.weight"].double() - start.double()
    expected = (expert.double() + delta).float().bfloat16()
    found = model.merge_and_graft(post).state_dict()["model.layers.0.mlp.experts.down_proj"][1]
    assert torch.equal(found, expected)


# -- scales -----------------------------------------------------------------------------------------------------------


def test_scale_zero_is_the_ungrafted_export():
    base = pico()
    post = perturbed(base)
    model = upcycle(base, trained=True)
    stock = model.merge_and_graft(post, scale=0.0)
    torch.testing.assert_close(logits(stock, TOKENS), logits(model, TOKENS), atol=5e-5, rtol=0)
    assert_same_state(to_stock(model), state_of(stock))


def test_scale_by_pattern():
    base = pico()
    post = perturbed(base)
    start = state_of(base)
    stock = upcycle(base).merge_and_graft(post, scale={"self_attn": 0.0, "embed": 0.5})
    found, end = stock.state_dict(), post.state_dict()
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(found[name], start[name])
    name = "model.embed_tokens.weight"
    torch.testing.assert_close(found[name], (start[name] + end[name]) / 2)
    assert torch.equal(found["model.norm.weight"], end["model.norm.weight"])


def test_expert_scale_of_a_group_leaves_the_others():
    base = pico()
    post = perturbed(base)
    model = upcycle(base, trained=True, routing="language")
    whole, halved = (
        logits(model.graft(copy.deepcopy(post), expert_scale=a), TOKENS, language="az") for a in (1.0, 0.5)
    )
    mixed = model.graft(copy.deepcopy(post), expert_scale={"uralic": 0.5})
    assert torch.equal(logits(mixed, TOKENS, language="az"), whole)
    assert not torch.allclose(halved, whole)
    shrunk = model.graft(copy.deepcopy(post), expert_scale=0.5)
    assert torch.equal(logits(mixed, TOKENS, language="hu"), logits(shrunk, TOKENS, language="hu"))


@pytest.mark.parametrize("expert_rank", [None, 4])
def test_expert_scale_zero_is_the_post_trained_model(expert_rank):
    base = pico()
    post = perturbed(base)
    expected = logits(post, TOKENS)
    grafted = upcycle(base, trained=True, expert_rank=expert_rank).graft(post, expert_scale=0.0)
    torch.testing.assert_close(logits(grafted, TOKENS), expected, atol=5e-5, rtol=0)


def test_auto_finds_the_expert_scale_that_scores_best():
    base = pico()
    post = perturbed(base)
    model = upcycle(base, trained=True)
    target = logits(model.graft(copy.deepcopy(post), expert_scale=0.75), TOKENS)

    def closeness(grafted: PeftModel) -> float:
        return -float((logits(grafted, TOKENS) - target).square().mean())

    grafted = model.graft(copy.deepcopy(post), expert_scale="auto", validation=closeness)
    assert grafted.graft_report.expert_scale == {"uralic": 0.75, "turkic": 0.75}
    assert [a for a, _ in grafted.graft_report.trials] == [0.25, 0.5, 0.75, 1.0]
    torch.testing.assert_close(logits(grafted, TOKENS), target)


# -- files ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    """Base and post-trained checkpoints on disk, and an adapter trained on the base."""
    base = pico()
    base.save_pretrained(tmp_path / "base")
    perturbed(base).save_pretrained(tmp_path / "post", max_shard_size="20KB")
    model = upcycle(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), trained=True)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path


def word_tokenizer(*words):
    backend = Tokenizer(models.WordLevel(vocab={word: index for index, word in enumerate(words)}, unk_token=words[0]))
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def load_adapter(saved):
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(saved / "base"), saved / "adapter").eval()


def test_a_grafted_adapter_loads_over_the_post_trained_checkpoint_only(saved):
    grafted = load_adapter(saved).graft(saved / "post")
    grafted.save_pretrained(saved / "grafted")
    post = AutoModelForCausalLM.from_pretrained(saved / "post")
    again = PeftModel.from_pretrained(post, saved / "grafted").eval()
    assert torch.equal(logits(again, TOKENS), logits(grafted, TOKENS))
    assert again.peft_config["default"].base_model_name_or_path == str(saved / "post")
    assert again.peft_config["default"].record.graft["expert_scale"] == {"uralic": 1.0, "turkic": 1.0}
    with pytest.raises(CheckpointError, match="other base weights"):
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(saved / "base"), saved / "grafted")


def test_an_export_loads_where_this_package_cannot_be_imported(saved):
    stock = load_adapter(saved).merge_and_graft(saved / "post")
    stock.save_pretrained(saved / "stock")
    code = (
        "import sys; sys.modules['peft_moe_delta'] = None\n"
        "import torch; from transformers import AutoModelForCausalLM; from safetensors.torch import save_file\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "ids = torch.arange(3, 24).view(3, 7)\n"
        "with torch.no_grad(): save_file({'logits': model(input_ids=ids).logits}, sys.argv[2])\n"
    )
    subprocess.run([sys.executable, "-c", code, str(saved / "stock"), str(saved / "proof")], check=True)
    expected = logits(stock, torch.arange(3, 24).view(3, 7))
    torch.testing.assert_close(load_file(saved / "proof")["logits"], expected, atol=5e-5, rtol=0)


def test_special_tokens_and_generation_settings_are_the_post_trained_ones():
    base = pico()
    post = perturbed(base)
    post.generation_config.temperature, post.generation_config.do_sample = 0.3, True
    post.config.eos_token_id = 7
    stock = upcycle(base).merge_and_graft(post)
    assert (stock.generation_config.temperature, stock.config.eos_token_id) == (0.3, 7)


def test_modules_to_save_are_grafted_too():
    base = pico()
    post = perturbed(base)
    model = upcycle(base, trained=True, modules_to_save=["lm_head"])
    head = model.base_model.model.lm_head.modules_to_save["default"].weight
    start = head.detach().clone()
    with torch.no_grad():
        head.add_(0.1)
    expected = post.lm_head.weight.detach() + (head.detach() - start)
    stock = model.merge_and_graft(post)
    torch.testing.assert_close(stock.lm_head.weight.detach(), expected)
    torch.testing.assert_close(logits(model.graft(post), TOKENS), logits(stock, TOKENS), atol=1e-4, rtol=0)


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["graft", "merge_and_graft"])
@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda base: pico("qwen2"), "'llama'.*'qwen2'"),
        (lambda base: pico(intermediate_size=64), "shape"),
        (lambda base: pico(num_hidden_layers=3), "model.layers.2"),
        (lambda base: pico(vocab_size=101), "vocabular"),
        (lambda base: upcycle(pico()).base_model.model, "upcycled already"),
    ],
)
def test_a_model_that_is_no_sibling_is_refused(method, other, message):
    base = pico()
    model = upcycle(base)
    with pytest.raises(GraftError, match=f"(?is){message}"):
        getattr(model, method)(other(base))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("method", ["graft", "merge_and_graft"])
def test_a_delta_that_is_not_finite_is_refused(method, value):
    base = pico()
    post = perturbed(base)
    post.model.layers[1].self_attn.k_proj.weight.data[0, 0] = value
    with pytest.raises(GraftError, match=r"layers\.1\.self_attn\.k_proj\.weight.*not finite"):
        getattr(upcycle(base), method)(post)


def test_an_unrelated_post_trained_model_is_doubted(tmp_path):
    """In a warning, in the report and in the card."""
    with pytest.warns(UserWarning, match="doubtful.*mlp"):
        grafted = upcycle(pico()).graft(pico(seed=3))
    assert any(reason.startswith("mlp: the change is") for reason in grafted.graft_report.warnings)
    assert "\n  doubtful: " in repr(grafted.graft_report)
    grafted.save_pretrained(tmp_path)
    assert "- **Doubtful**: mlp: the change is" in render_card(CardFacts.of(tmp_path, name="x"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scale": float("nan")}, "finite"),
        ({"scale": {"mlp": float("inf")}}, "finite"),
        ({"scale": {"*mlp": 1.0}}, "regular expression"),
        ({"expert_scale": float("nan")}, "finite"),
        ({"expert_scale": {"nobody": 1.0}}, "uralic, turkic"),
        ({"expert_scale": "auto"}, "validation"),
        ({"expert_scale": 0.5, "validation": lambda model: 0.0}, "auto"),
        ({"language": "hu"}, "Leave `language` out"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    base = pico()
    post = perturbed(base)
    with pytest.raises(GraftError, match=message):
        upcycle(base).merge_and_graft(post, **arguments)


def test_part_of_a_delta_needs_the_stand_alone_form():
    base = pico()
    post = perturbed(base)
    with pytest.raises(GraftError, match="merge_and_graft"):
        upcycle(base).graft(post, scale=0.5)


def test_routing_by_language_needs_a_language_to_export():
    base = pico()
    post = perturbed(base)
    with pytest.raises(GraftError, match="hu, en, fi, az"):
        upcycle(base, routing="language").merge_and_graft(post)


def test_another_tokenizer_is_refused(saved):
    word_tokenizer("a", "b", "c").save_pretrained(saved / "base")
    word_tokenizer("x", "y", "z").save_pretrained(saved / "post")
    with pytest.raises(GraftError, match="tokenizers differ"):
        load_adapter(saved).graft(saved / "post")
    word_tokenizer("b", "a", "c", "new").save_pretrained(saved / "post")  # renumbered and added tokens are fine
    load_adapter(saved).graft(saved / "post")


def test_the_identifier_follows_renumbered_tokens_and_learns_nothing_of_unknown_ones(saved):
    """Counts go by token string; what the post-trained tokenizer alone has speaks for no language, nor against one."""
    before, after = word_tokenizer("a", "b", "c"), word_tokenizer("b", "new", "a", "c")
    before.save_pretrained(saved / "base")
    after.save_pretrained(saved / "post")
    model = load_adapter(saved)
    words = {"hu": "abb", "en": "acc", "fi": "b", "az": "cab"}  # a document each
    fit_identifier(model, {code: list(documents) for code, documents in words.items()}, before, memory=4)
    counted = Identifiers.counts_of(model.base_model.model, "default")
    grafted = model.graft(saved / "post")
    kept = Identifiers.counts_of(grafted.base_model.model, "default")
    for code, counts in counted.items():
        found = {token: kept[code][row].item() for token, row in after.get_vocab().items()}
        assert found == {"new": -1} | {token: counts[row].item() for token, row in before.get_vocab().items()}
    assert grafted.active_peft_config.record.identifier.vocabulary == len(kept["hu"])


def damage_shard(folder):
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-5])


def drop_shard(folder):
    sorted(folder.glob("*.safetensors"))[1].unlink()


def only_pickle(folder):
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    torch.save({}, folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("damage", "message"), [(damage_shard, "truncated"), (drop_shard, "missing"), (only_pickle, "(?i)pickle")]
)
def test_damaged_files_are_refused(saved, damage, message):
    damage(saved / "post")
    before = sorted(saved.rglob("*"))
    with pytest.raises(CheckpointError, match=message):
        load_adapter(saved).merge_and_graft(saved / "post")
    assert sorted(saved.rglob("*")) == before


def test_a_checkpoint_that_does_not_exist_is_refused(saved):
    with pytest.raises(CheckpointError, match="nowhere"):
        load_adapter(saved).graft(saved / "nowhere")


def test_a_truncated_adapter_is_refused(saved):
    file = saved / "adapter" / "adapter_model.safetensors"
    weights = load_file(file)
    weights.popitem()
    save_file(weights, file)
    with pytest.raises(CheckpointError, match="lacks 1 of its tensors"):
        load_adapter(saved)
