"""What cannot work is refused by name, and leaves the model as it was."""

import copy
import re
import warnings
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.error import NoMatchingPeftModuleError
from torch import nn

from builders import (
    EXPERTS,
    VOCABULARY,
    logits,
    moe_config,
    moe_layers,
    perturbed,
    pico,
    randomise_experts,
    token_batch,
    upcycle,
)
from peft_moe_delta import MoeDeltaConfig
from peft_moe_delta.errors import ArchitectureError, CheckpointError, LanguageError, PeftMoeDeltaError, PlanError
from peft_moe_delta.tuner.context import ForwardContext
from peft_moe_delta.tuner.record import RECORDED


def condition(model):
    """Everything about a model that a refused call could have changed."""
    modules = [
        (name, type(module), len(module._forward_hooks), len(module._forward_pre_hooks), sorted(module.__dict__))
        for name, module in model.named_modules()
    ]
    parameters = [(name, id(p), p._version, p.requires_grad) for name, p in model.named_parameters()]
    return modules, parameters


@contextmanager
def refused(model, error, words):
    """The block raises `error` with all `words` in its message, in order, and changes nothing about the model."""
    before = condition(model)
    with pytest.raises(error, match=".*".join(map(re.escape, words))):
        yield
    assert condition(model) == before


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"languages": {}}, LanguageError, ["`languages` must map", '"hu": "expanded"']),
        ({"languages": ["hu"]}, LanguageError, ["`languages` must map"]),
        ({"languages": {"hu": ["uralic", "turkic"]}}, LanguageError, ["one group a language", "hu"]),
        ({"languages": {"hu": None}}, LanguageError, ["non-empty strings", "hu"]),
        ({"routing": "random"}, PlanError, ["Unknown routing 'random'", "learned", "language"]),
        ({"stage": "dreaming"}, PlanError, ["Unknown stage 'dreaming'", "expansion", "review"]),
        ({"top_k": 0}, PlanError, ["`top_k`", "at least 1", "0"]),
        ({"top_k": -1}, PlanError, ["`top_k`", "at least 1"]),
        ({"top_k": 1.5}, PlanError, ["`top_k`", "whole number"]),
        ({"expert_rank": 0}, PlanError, ["`expert_rank`", "at least 1"]),
        ({"languages": 3}, LanguageError, ["`languages` must map", "3"]),
        ({"routing": ["learned"]}, PlanError, ["`routing` must be text", "learned"]),
        ({"classifier_layers": 1}, PlanError, ["`classifier_layers` must be a list", "1"]),
        ({"layers_to_transform": ["0"]}, PlanError, ["`layers_to_transform`[0] must be a whole number"]),
        ({"load_balancing_coef": float("nan")}, PlanError, ["`load_balancing_coef`", "finite number", "nan"]),
        ({"language_prior_coef": "0.1"}, PlanError, ["`language_prior_coef` must be a finite number", "'0.1'"]),
        ({"language_prior_groups": 0.5}, PlanError, ["`language_prior_groups` must be a list", "0.5"]),
        ({"norm_topk_prob": "no"}, PlanError, ["`norm_topk_prob` must be true or false", "'no'"]),
        ({"growth": [{"before": 1}]}, PlanError, ["`growth`[0]", "missing fields ['groups']"]),
        ({"open_steps": -1}, PlanError, ["`open_steps`", "at least 0", "-1"]),
        ({"record": {"format": 2, "doubts": "none"}}, PlanError, ["`doubts` must be a list", "'none'"]),
        ({"record": {"format": 2, "steps": 1}}, PlanError, ["`record` has unknown fields ['steps']", "open_steps"]),
        ({"expert": {}}, TypeError, ["unexpected keyword argument 'expert'. Did you mean experts?", "top_k"]),
        ({"lora_alpha": 8}, TypeError, ["unexpected keyword argument 'lora_alpha'. Its fields: ", "expert_rank"]),
        ({"record": 2}, PlanError, ["`record` is filled in", "2", "Leave it out"]),
        ({"layers_to_transform": [1, 0]}, PlanError, ["`layers_to_transform`", "ascending", "[1, 0]"]),
        (
            {"target_modules": "*mlp"},
            PlanError,
            ["`target_modules`", "'*mlp'", "a regular expression: nothing to repeat"],
        ),
        ({"exclude_modules": "["}, PlanError, ["`exclude_modules`", "'['", "unterminated"]),
        ({"layers_pattern": ["h", "("]}, PlanError, ["`layers_pattern`", "'('", "missing )"]),
        ({"target_modules": ".*mlp", "layers_to_transform": [0]}, PlanError, ["`layers_to_transform`", "no effect"]),
    ],
    ids=str,
)
def test_a_configuration_that_makes_no_sense(changes, error, words):
    with pytest.raises(error, match=".*".join(map(re.escape, words))):
        moe_config(**changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"experts": {"uralic": 1}}, ["['uralic']", "['turkic', 'uralic']", "needs a count"]),
        ({"experts": {}}, ["needs a count"]),
        ({"experts": 3}, ["must be a plan, or map groups", "3", '{"expanded": 3}']),
        ({"expert_rank": 2**63}, ["expert_rank=", "exceeds 32"]),
        ({"experts": {**EXPERTS, "slavic": 1}}, ["slavic", "only those"]),
        ({"experts": {**EXPERTS, "original": 1}}, ['"original"', "exactly expert 0"]),
        ({"languages": {"en": "original"}, "experts": {}}, ["Every language", '"original"']),
        ({"experts": {**EXPERTS, "uralic": 0}}, ["'uralic'", "no expert in any layer"]),
        ({"experts": {**EXPERTS, "uralic": -1}}, ["'uralic'", "none negative"]),
        ({"experts": {**EXPERTS, "uralic": [1, 2, 3]}}, ["'uralic'", "3 counts", "2 transformed layers"]),
        ({"experts": {**EXPERTS, "uralic": [1, 2]}, "layers_to_transform": [1]}, ["2 counts", "1 transformed"]),
        ({"top_k": 5}, ["top_k=5 exceeds 4", "learned"]),
        ({"top_k": 3, "routing": "language"}, ["top_k=3 exceeds 2", "language"]),
        ({"layers_to_transform": [1, 7]}, ["`layers_to_transform`", "[7]", "['mlp']"]),
    ],
    ids=str,
)
def test_experts_that_do_not_fit_the_model(changes, words):
    base = pico()
    with refused(base, PlanError, words):
        upcycle(base, **changes)


def with_offloaded_weights():
    return pico().to("meta")


def with_weights_of(dtype):
    model = pico()
    for layer in model.model.layers:
        for linear in (layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj):
            linear.weight = nn.Parameter(linear.weight.data.to(dtype), requires_grad=False)
    return model


@pytest.mark.parametrize(
    ("base", "words"),
    [
        (with_offloaded_weights, ["model.layers.0.mlp", "meta device"]),
        (lambda: with_weights_of(torch.int8), ["model.layers.0.mlp", "quantised", "torch.int8"]),
        (lambda: with_weights_of(torch.float8_e4m3fn), ["model.layers.0.mlp", "quantised", "torch.float8_e4m3fn"]),
    ],
    ids=["offloaded", "int8", "float8"],
)
def test_weights_that_cannot_be_copied(base, words):
    base = base()
    with refused(base, ArchitectureError, words):
        upcycle(base)


def test_low_rank_experts_over_parameters_that_they_would_not_cover():
    base = pico()
    base.model.layers[1].mlp.scale = nn.Parameter(torch.ones(()))
    with refused(base, ArchitectureError, ["model.layers.1.mlp", "scale", "expert_rank=None"]):
        upcycle(base, expert_rank=2)
    assert len(moe_layers(upcycle(base))) == 2


@pytest.mark.parametrize("target", ["down_proj", "q_proj", "self_attn", "lm_head", "input_layernorm", "act_fn"])
def test_target_modules_that_are_no_mlp_blocks(target):
    base = pico()
    with refused(base, ArchitectureError, [target]):
        upcycle(base, target_modules=[target])


@pytest.mark.parametrize("target", ["all-linear", "ALL-LINEAR"])
def test_all_linear_maps_are_no_mlp_blocks(target):
    base = pico()
    with refused(base, ArchitectureError, ["all-linear", "Leave `target_modules` out"]):
        upcycle(base, target_modules=target)


def test_two_target_modules_in_a_layer():
    base = pico()
    base.model.layers[0].second = copy.deepcopy(base.model.layers[0].mlp)
    with refused(base, ArchitectureError, ["matches two modules in layer 0"]):
        upcycle(base, target_modules=["mlp", "second"])


@pytest.mark.parametrize(
    ("config", "changes", "words"),
    [
        (LoraConfig(target_modules=["up_proj"]), {}, ["layers.0.mlp.up_proj", "Merge it"]),
        (LoraConfig(target_modules=["up_proj"]), {"expert_rank": 2}, ["layers.0.mlp.up_proj", "Merge it"]),
        (LoraConfig(target_modules=["q_proj"], modules_to_save=["mlp"]), {}, ["layers.0.mlp ", "Merge it"]),
        (LoraConfig(target_modules=["q_proj"]), {"attention_experts": "full"}, ["self_attn.q_proj", "Merge it"]),
    ],
    ids=["full", "low rank", "modules to save", "attention"],
)
@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute", "ignore:You are trying to modify a model")
def test_another_methods_adapter_inside_the_block(config, changes, words):
    model = get_peft_model(pico(), copy.deepcopy(config))
    with refused(model.base_model.model, ArchitectureError, words):
        upcycle(model.base_model.model, **changes)
    plain = pico()
    plain.add_adapter(copy.deepcopy(config), "lora")
    with refused(plain, ArchitectureError, words):
        plain.add_adapter(moe_config(**changes), "moe")
    assert list(plain.peft_config) == ["lora"]


def test_a_merged_adapter_of_another_method_is_part_of_the_base():
    lora = get_peft_model(pico(), LoraConfig(target_modules=["up_proj"], init_lora_weights=False))
    base = lora.merge_and_unload()
    expected = logits(base, token_batch())
    torch.testing.assert_close(logits(upcycle(base), token_batch()), expected, atol=5e-5, rtol=0)


def test_target_modules_that_do_not_exist():
    base = pico()
    with refused(base, ValueError, ["feed_forward"]):
        upcycle(base, target_modules=["feed_forward"])


def test_a_refused_configuration_is_not_filled_in():
    config = moe_config(top_k=5)
    before = copy.deepcopy(config)
    with pytest.raises(PlanError):
        get_peft_model(pico(), config)
    assert config == before


def test_a_refused_second_adapter_leaves_the_first():
    model = upcycle(pico(), trained=True)
    expected = logits(model, token_batch())
    with refused(model, PlanError, ["'uralic'", "none negative"]):
        model.add_adapter("second", moe_config(experts={**EXPERTS, "uralic": -1}))
    assert list(model.peft_config) == ["default"]
    assert torch.equal(logits(model, token_batch()), expected)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
def test_a_refused_second_adapter_of_a_plain_transformers_model():
    model = pico()
    model.add_adapter(moe_config())
    with refused(model, PlanError, ["'uralic'", "none negative"]):
        model.add_adapter(moe_config(experts={**EXPERTS, "uralic": -1}), "second")
    assert list(model.peft_config) == ["default"]
    model.add_adapter(moe_config(), "second")
    assert model.active_adapters() == ["second"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, ["needs the language of every token", "hu, en, fi, az", "set_language"]),
        ({"language": "de"}, ["Unknown language 'de'", "hu, en, fi, az"]),
        ({"language": ["hu", "de", "az"]}, ["Unknown language 'de'", "hu, en, fi, az"]),
        ({"language": ["hu", "az"]}, ["2 codes for a batch of 3"]),
        ({"language_ids": torch.tensor([0, 1, 4])}, ["[0, 1, 4]", "0 to 3", "hu, en, fi, az"]),
        ({"language_ids": torch.tensor([0, 1, -1])}, ["[-1, 0, 1]", "0 to 3"]),
        ({"language_ids": [0, 1, 3]}, ["tensor of whole numbers", "[0, 1, 3]"]),
        ({"language_ids": torch.tensor([0.0, 1.0, 3.0])}, ["tensor of whole numbers"]),
        ({"language_ids": torch.tensor([0, 1])}, ["shape (2,)", "(3,) or (3, 7)"]),
        ({"language_ids": torch.zeros(3, 5, dtype=torch.int64)}, ["shape (3, 5)", "(3,) or (3, 7)"]),
    ],
    ids=str,
)
def test_languages_of_a_call(arguments, words):
    model = upcycle(pico(), trained=True, routing="language")
    expected = logits(model, token_batch(), language="hu")
    with refused(model, LanguageError, words):
        logits(model, token_batch(), **arguments)
    assert ForwardContext.of(model.base_model.model).current is None
    assert torch.equal(logits(model, token_batch(), language="hu"), expected)


def test_an_unknown_default_language():
    model = upcycle(pico(), trained=True, routing="language")
    model.set_language("hu")
    expected = logits(model, token_batch())
    with refused(model, LanguageError, ["Unknown language 'de'", "hu, en, fi, az"]):
        model.set_language("de")
    assert torch.equal(logits(model, token_batch()), expected)
    model.set_language(None)
    with refused(model, LanguageError, ["needs the language of every token"]):
        logits(model, token_batch())


def test_training_a_layer_outside_of_its_model():
    model = upcycle(pico(), trained=True).train()
    with refused(model, PeftMoeDeltaError, ["outside of its model's forward pass"]):
        moe_layers(model)[0](torch.randn(1, 2, 32))


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
def test_two_active_adapters():
    with_tokens = upcycle(pico(), adapter="first")
    with_tokens.add_tokens(["x"], VOCABULARY, [[3]])
    with_tokens.add_adapter("second", moe_config())
    with refused(with_tokens.base_model.model, PlanError, ["One adapter"]):
        with_tokens.base_model.set_adapter(["first", "second"])
    assert {tuple(m.active_adapters) for m in with_tokens.modules() if isinstance(m, BaseTunerLayer)} == {("first",)}
    model = upcycle(pico(), adapter="first")
    model.add_adapter("second", moe_config())
    with refused(model, PlanError, ["One adapter", "['first', 'second']"]):
        model.base_model.set_adapter(["first", "second"])
    plain = pico()
    for name in ("first", "second"):
        plain.add_adapter(moe_config(), name)
    with refused(plain, PlanError, ["One adapter", "['first', 'second']"]):
        plain.set_adapter(["first", "second"])


@pytest.fixture
def adapter(tmp_path):
    upcycle(pico(), trained=True).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"intermediate_size": 40}, ["another base model", "shapes", "[32, 48]", "[32, 40]"]),
        ({"num_hidden_layers": 3}, ["another base model", "blocks", "2", "3"]),
    ],
    ids=str,
)
def test_an_adapter_of_a_base_with_other_shapes(adapter, sizes, words):
    base = pico(**sizes)
    for options in ({}, {"verify_base": False}):
        with refused(base, CheckpointError, words):
            PeftModel.from_pretrained(base, adapter, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_adapter_of_a_base_with_other_weights(adapter, dtype):
    base = perturbed(pico(), scale=0.05).to(dtype)
    with refused(base, CheckpointError, ["other base weights", "verify_base=False", "graft"]):
        PeftModel.from_pretrained(base, adapter)
    model = PeftModel.from_pretrained(base, adapter, verify_base=False)
    assert logits(model, token_batch()).isfinite().all()


@pytest.mark.parametrize("trained_in", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loaded_in", [torch.float32, torch.bfloat16, torch.float16])
def test_the_same_base_in_another_dtype_is_recognised(trained_in, loaded_in, tmp_path):
    upcycle(pico().to(trained_in), trained=True).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(pico().to(loaded_in), tmp_path)
    assert logits(model, token_batch()).dtype == loaded_in


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
def test_experts_beside_another_methods_adapter():
    """LoRA on attention and experts in place of MLPs: both at once, each alone."""
    model = pico()
    model.add_adapter(LoraConfig(target_modules=["q_proj"], init_lora_weights=False), "lora")
    with_lora = logits(model.eval(), token_batch())
    model.add_adapter(moe_config(), "moe")
    randomise_experts(model, "moe")
    expected = logits(upcycle(pico(), trained=True), token_batch())
    assert torch.equal(logits(model.eval(), token_batch()), expected)
    model.set_adapter("lora")
    assert torch.equal(logits(model, token_batch()), with_lora)
    model.set_adapter(["lora", "moe"])
    both = logits(model, token_batch())
    assert not torch.equal(both, with_lora) and not torch.equal(both, expected)
    model.set_adapter("moe")
    assert torch.equal(logits(model, token_batch()), expected)


def test_rows_of_a_batch_with_different_adapters():
    model = upcycle(pico(), trained=True)
    model.add_adapter("second", moe_config())
    with refused(model, PlanError, ["One adapter with experts serves a whole batch", "set_adapter"]):
        logits(model, token_batch(), adapter_names=["default", "second", "__base__"])
    with pytest.raises(PlanError, match="whole batch"):
        model.generate(input_ids=token_batch(), adapter_names=["default", "second", "__base__"], max_new_tokens=1)


def test_adapters_are_not_added_up():
    model = upcycle(pico(), trained=True)
    model.add_adapter("second", moe_config())
    with refused(model, NotImplementedError, ["cannot be added up", "add_languages"]):
        model.add_weighted_adapter(["default", "second"], [0.5, 0.5], "sum")


@pytest.mark.parametrize("state", [{"model.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(1)}, {}, None])
def test_tensors_of_another_adapter_where_one_is_injected(state):
    base = pico()
    own = get_peft_model_state_dict(upcycle(pico(), layers_to_transform=[1]))
    with refused(base, CheckpointError, ["The state dict has experts in", "model.layers.0.mlp", "of one adapter"]):
        inject_adapter_in_model(moe_config(), base, state_dict=own if state is None else state)
    inject_adapter_in_model(moe_config(layers_to_transform=[1]), base, state_dict=own)
    assert len(moe_layers(base)) == 1


def test_more_tokens_than_positions():
    model = upcycle(pico("gpt2"))
    with refused(model, ArchitectureError, ["A row of 70 tokens", "64 positions", "max_length"]):
        logits(model, token_batch(1, 70))


@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "SEQ_2_SEQ_LM"])
def test_tasks_without_a_next_token(task):
    with pytest.raises(PlanError, match=f"causal language models.*got '{task}'.*merge_and_graft"):
        moe_config(task_type=task)


FIELDS = sorted({*MoeDeltaConfig.__annotations__, *RECORDED})
JUNK = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 4) | st.floats() | st.text(max_size=3) | st.sampled_from(["mlp", "hu"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2) | st.just("uralic"), inner, max_size=3)
    ),
    max_leaves=4,
)


@pytest.mark.slow
@given(
    st.dictionaries(st.sampled_from(sorted({*MoeDeltaConfig.__annotations__, *RECORDED})), JUNK, min_size=1, max_size=2)
)
@settings(max_examples=400, deadline=None, database=None, derandomize=True)
def test_any_value_of_any_field_works_or_is_refused_by_name(changes):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = upcycle(pico(num_hidden_layers=1), **changes)
        except (PeftMoeDeltaError, NoMatchingPeftModuleError) as error:
            assert len(str(error)) > 20
            return
        except ValueError as error:
            assert str(error).startswith("Invalid task type"), "PEFT's own"
            return
        arguments = {"language": "hu"} if "hu" in model.active_config.languages else {}
        if model.active_config.routing != "language" or arguments:
            assert logits(model, token_batch(), **arguments).shape[-1] >= VOCABULARY
