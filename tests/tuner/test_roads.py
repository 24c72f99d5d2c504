"""Every PEFT road to a model gives the same logits, and every road back leaves the base model."""

import copy
import inspect
import json
import pickle
import re
import subprocess
import sys

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from builders import (
    HIDDEN,
    LANGUAGES,
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
from peft_moe_delta.errors import CheckpointError, LanguageError
from peft_moe_delta.tuner.context import ForwardContext

IDS = torch.tensor([0, 1, 3])
SECOND = {
    "languages": {"sw": "bantu", "en": "original"},
    "experts": {"bantu": 2},
    "layers_to_transform": [1],
    "routing": "language",
    "expert_rank": 2,
}
"""An adapter with other languages, layers, routing and kind of experts than the default one."""


def loaded_by_transformers(saved, **options):
    base = saved.load_base()
    base.load_adapter(saved.adapter, **options)
    return base


def injected_and_filled(saved):
    base = saved.load_base()
    base.add_adapter(MoeDeltaConfig.from_pretrained(saved.adapter))
    state = {key.removeprefix("base_model.model."): tensor for key, tensor in adapter_tensors(saved.adapter).items()}
    set_peft_model_state_dict(base, state)
    return base.eval()


def adapter_tensors(folder):
    return load_file(folder / "adapter_model.safetensors")


def through_pickle(saved):
    return pickle.loads(pickle.dumps(PeftModel.from_pretrained(saved.load_base(), saved.adapter)))


ROADS = {
    "PeftModel": lambda s: PeftModel.from_pretrained(s.load_base(), s.adapter),
    "PeftModel, other adapter name": lambda s: PeftModel.from_pretrained(s.load_base(), s.adapter, "swahili"),
    "PeftModel, is_trainable": lambda s: PeftModel.from_pretrained(s.load_base(), s.adapter, is_trainable=True).eval(),
    "PeftModel, low_cpu_mem_usage": lambda s: PeftModel.from_pretrained(
        s.load_base(), s.adapter, low_cpu_mem_usage=True
    ),
    "PeftModel, config": lambda s: PeftModel.from_pretrained(
        s.load_base(), s.adapter, config=PeftConfig.from_pretrained(s.adapter)
    ),
    "AutoPeftModelForCausalLM": lambda s: AutoPeftModelForCausalLM.from_pretrained(s.adapter),
    "AutoModelForCausalLM": lambda s: AutoModelForCausalLM.from_pretrained(s.adapter),
    "load_adapter": loaded_by_transformers,
    "load_adapter, other name": lambda s: loaded_by_transformers(s, adapter_name="swahili"),
    "load_adapter, low_cpu_mem_usage": lambda s: loaded_by_transformers(s, low_cpu_mem_usage=True),
    "load_adapter, is_trainable": lambda s: loaded_by_transformers(s, is_trainable=True).eval(),
    "add_adapter": injected_and_filled,
    "deepcopy": lambda s: copy.deepcopy(PeftModel.from_pretrained(s.load_base(), s.adapter)),
    "pickle": through_pickle,
}


@pytest.mark.parametrize("road", ROADS)
def test_every_road_gives_the_same_logits(saved, road):
    model = ROADS[road](saved)
    assert not any(parameter.is_meta for parameter in model.parameters())
    assert torch.equal(logits(model, **saved.batch), saved.logits)


@pytest.mark.parametrize("rank", [None, 2], ids=["full", "low-rank"])
def test_low_cpu_mem_usage_takes_no_memory_before_weights_come(rank):
    model = get_peft_model(pico(), moe_config(expert_rank=rank), low_cpu_mem_usage=True)
    assert {name for name, p in model.named_parameters() if p.is_meta} == {
        name for name, p in model.named_parameters() if "moe_delta_" in name
    }


@pytest.mark.parametrize("road", ["PeftModel", "load_adapter", "AutoModelForCausalLM"])
def test_a_loaded_adapter_is_frozen_unless_asked_for(saved, road):
    assert not any(parameter.requires_grad for parameter in ROADS[road](saved).parameters())


@pytest.mark.parametrize("road", ["PeftModel, is_trainable", "load_adapter, is_trainable"])
def test_a_trainable_adapter_trains_what_it_trained_before(saved, road):
    trainable = {name for name, p in ROADS[road](saved).named_parameters() if p.requires_grad}
    assert trainable
    assert all("moe_delta_" in name for name in trainable)


@pytest.mark.parametrize("road", ["PeftModel", "load_adapter"])
def test_a_trainable_adapter_trains_what_its_stage_trains(road, tmp_path):
    model = upcycle(pico(), routing="classifier", classifier_layers=[0])
    model.start_review()
    expected = {name.partition("base_model.model.")[2] for name, p in model.named_parameters() if p.requires_grad}
    assert expected and not any("experts" in name for name in expected)
    model.save_pretrained(tmp_path)
    loaded = pico()
    if road == "PeftModel":
        PeftModel.from_pretrained(loaded, tmp_path, is_trainable=True)
    else:
        loaded.load_adapter(tmp_path, is_trainable=True)
    trainable = {name for name, p in loaded.named_parameters() if p.requires_grad}
    assert trainable == expected


def cut(folder, *, part, fault):
    """An adapter's file with one tensor missing, or of another shape."""
    tensors = adapter_tensors(folder)
    key = next(key for key in sorted(tensors) if part in key)
    tensor = tensors.pop(key)
    if fault == "misshapen":
        tensors[key] = tensor[:-1].clone()
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("fault", ["missing", "misshapen"])
@pytest.mark.parametrize("part", ["experts.1.", "router", "classifier", "embed_tokens.moe_delta_rows", "lm_head"])
@pytest.mark.parametrize("road", ["AutoModelForCausalLM", "load_adapter", "state dict"])
def test_transformers_refuses_an_incomplete_file_as_peft_does(road, part, fault, tmp_path):
    base = pico()
    base.save_pretrained(tmp_path / "base")
    options = {"modules_to_save": ["lm_head"]} if part == "lm_head" else {}
    model = upcycle(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"), routing="classifier", classifier_layers=[0], **options
    )
    if "rows" in part:
        model.add_tokens(["x", "y"], VOCABULARY, [[3, 4], [5]])
    model.save_pretrained(tmp_path / "adapter")
    cut(tmp_path / "adapter", part=part, fault=fault)
    with pytest.raises(CheckpointError, match="lacks 1 of its tensors.*" + re.escape(part.removesuffix("1."))):
        if road == "AutoModelForCausalLM":
            AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
        elif road == "load_adapter":
            base.load_adapter(tmp_path / "adapter")
        else:
            config = MoeDeltaConfig.from_pretrained(tmp_path / "adapter")
            state = {k.removeprefix("base_model.model."): v for k, v in adapter_tensors(tmp_path / "adapter").items()}
            base.load_adapter(peft_config=config, adapter_state_dict=state)
    assert "_load_pretrained_model" not in vars(base)
    assert torch.equal(logits(base.eval(), token_batch()), logits(pico(), token_batch()))


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
@pytest.mark.parametrize("road", ["PeftModel", "transformers"])
def test_an_incomplete_second_adapter_leaves_the_first(road, tmp_path):
    upcycle(pico(), trained=True).save_pretrained(tmp_path)
    cut(tmp_path, part="router", fault="missing")
    first = upcycle(pico(), trained=True, **SECOND)
    expected = logits(first, token_batch(), language="sw")
    model = first if road == "PeftModel" else first.base_model.model
    if road == "transformers":
        model._hf_peft_config_loaded = True
    with pytest.raises(CheckpointError, match="lacks 1 of its tensors"):
        model.load_adapter(tmp_path, "second")
    assert list(model.peft_config) == ["default"]
    assert torch.equal(logits(model, token_batch(), language="sw"), expected)
    assert not any(".second." in name for name in model.state_dict())


def test_a_fresh_process_needs_only_the_import(all_saved, tmp_path):
    torch.save([saved.batch for saved in all_saved], tmp_path / "batches.pt")
    script = f"""
import torch
import peft_moe_delta
from transformers import AutoModelForCausalLM
found = []
for adapter, batch in zip({[str(saved.adapter) for saved in all_saved]}, torch.load({str(tmp_path / "batches.pt")!r})):
    model = AutoModelForCausalLM.from_pretrained(adapter)
    tokens, ids = batch["tokens"], batch["language_ids"]
    with torch.no_grad():
        found.append(model(tokens, attention_mask=torch.ones_like(tokens), language_ids=ids).logits)
torch.save(found, {str(tmp_path / "logits.pt")!r})
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    for found, saved in zip(torch.load(tmp_path / "logits.pt"), all_saved, strict=True):
        torch.testing.assert_close(found, saved.logits, atol=1e-6, rtol=0)


def test_transformers_saves_what_peft_loads(tmp_path):
    model = pico()
    model.add_adapter(moe_config())
    randomise_experts(model).save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(pico(), tmp_path)
    assert torch.equal(logits(again, token_batch()), logits(model.eval(), token_batch()))


def test_languages_out_of_alphabetical_order_survive_saving(tmp_path):
    model = upcycle(pico(), trained=True, routing="language")
    expected = {code: logits(model, token_batch(), language=code) for code in LANGUAGES}
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    assert list(stored["languages"]) == sorted(LANGUAGES) != list(LANGUAGES), "PEFT has sorted the mapping"
    again = PeftModel.from_pretrained(pico(), tmp_path)
    table = again.active_peft_config.language_table
    assert table.codes == tuple(LANGUAGES)
    assert table.groups == ("original", "uralic", "turkic")
    assert again.plan() == model.plan()
    for index, code in enumerate(LANGUAGES):
        assert torch.equal(logits(again, token_batch(), language=code), expected[code])
        assert torch.equal(logits(again, token_batch(), language_ids=torch.full((3,), index)), expected[code])


@pytest.mark.parametrize("rank", [None, 2], ids=["full", "low-rank"])
def test_saved_files_hold_experts_and_routers_alone(rank, tmp_path):
    model = upcycle(pico(), trained=True, expert_rank=rank)
    model.save_pretrained(tmp_path)
    tensors = adapter_tensors(tmp_path)
    assert {key.split(".mlp.")[1].split(".")[0] for key in tensors} == {"moe_delta_experts", "moe_delta_router"}
    assert not any("default" in key or "base_layer" in key for key in tensors)
    assert sum(tensor.numel() for tensor in tensors.values()) == model.get_nb_trainable_parameters()[0]
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    assert stored["peft_type"] == "MOE_DELTA"
    assert "verify_base" not in stored


def test_trainable_parameters_are_the_plans(capsys):
    model = upcycle(pico())
    expected = model.plan().num_params(expert_params=3 * HIDDEN * 48, hidden_size=HIDDEN)
    assert model.get_nb_trainable_parameters()[0] == expected
    model.print_trainable_parameters()
    assert f"trainable params: {expected:,}" in capsys.readouterr().out


def two_adapters():
    """A model with the default adapter and `SECOND`, and the logits that each gives alone."""
    alone = [
        logits(upcycle(pico(), trained=True), token_batch()),
        logits(upcycle(pico(), trained=True, **SECOND), token_batch(), language="sw"),
    ]
    model = upcycle(pico(), trained=True, adapter="first")
    model.add_adapter("second", moe_config(**SECOND))
    return randomise_experts(model.eval(), "second"), alone


def test_two_adapters_take_turns():
    model, (first, second) = two_adapters()
    for _ in range(2):
        assert torch.equal(logits(model, token_batch()), first)
        model.set_adapter("second")
        assert torch.equal(logits(model, token_batch(), language="sw"), second)
        assert torch.equal(logits(model, token_batch(), language="en"), logits(pico(), token_batch()))
        model.set_adapter("first")


def test_each_adapter_is_saved_and_loaded_by_itself(tmp_path):
    model, (first, second) = two_adapters()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(pico(), tmp_path / "second", "second")
    assert torch.equal(logits(again, token_batch(), language="sw"), second)
    again.load_adapter(tmp_path / "first", "first")
    assert torch.equal(logits(again, token_batch(), language="sw"), second), "loading does not activate"
    again.set_adapter("first")
    assert torch.equal(logits(again, token_batch()), first)


def test_each_adapter_knows_its_own_languages():
    model, _ = two_adapters()
    model.set_adapter("second")
    with pytest.raises(ValueError, match="Unknown language 'hu'.*sw, en"):
        model.set_language("hu")
    with pytest.raises(ValueError, match="Unknown language 'hu'.*sw, en"):
        logits(model, token_batch(), language="hu")


def test_a_default_language_is_for_adapters_that_know_it():
    model, (first, second) = two_adapters()
    model.set_language("hu")
    in_hungarian = logits(model, token_batch())
    model.set_adapter("second")
    with pytest.raises(LanguageError, match="needs the language of every token.* was given"):
        logits(model, token_batch())
    assert torch.equal(logits(model, token_batch(), language="sw"), second)
    model.set_language("en")
    assert torch.equal(logits(model, token_batch()), logits(pico(), token_batch()))
    model.set_adapter("first")
    model.set_language("hu")
    assert torch.equal(logits(model, token_batch()), in_hungarian)
    model.set_language(None)
    assert torch.equal(logits(model, token_batch()), first)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
def test_a_default_language_is_for_adapters_that_know_it_on_a_plain_transformers_model():
    model = pico()
    model.add_adapter(moe_config(), "first")
    model.add_adapter(moe_config(**{**SECOND, "routing": "learned"}), "second")
    ForwardContext.of(model).language = "hu"
    assert torch.equal(logits(model.eval(), token_batch()), logits(model, token_batch(), language="sw"))


@pytest.mark.filterwarnings("ignore:Adapter .* was active which is now deleted")
@pytest.mark.parametrize("active", ["first", "second"])
@pytest.mark.parametrize("deleted", ["first", "second"])
def test_a_deleted_adapter_leaves_the_other(deleted, active):
    model, alone = two_adapters()
    model.set_adapter(active)
    model.delete_adapter(deleted)
    rest = "second" if deleted == "first" else "first"
    assert list(model.peft_config) == model.active_adapters == [rest]
    assert torch.equal(
        logits(model, token_batch(), language="sw" if rest == "second" else "hu"), alone[rest == "second"]
    )
    assert not any(f".{deleted}." in name for name in model.state_dict())


@pytest.mark.filterwarnings("ignore:Adapter .* was active which is now deleted")
def test_deleting_the_active_adapter_activates_one_other_in_every_layer():
    model = upcycle(pico(), adapter="first")
    model.add_adapter("second", moe_config(layers_to_transform=[1]))
    model.add_adapter("third", moe_config())
    model.delete_adapter("first")
    (active,) = model.active_adapters
    assert {tuple(layer.active_adapters) for layer in moe_layers(model)} == {(active,)}
    assert model.active_adapter == active


def test_deleting_the_only_adapter_leaves_the_base_model():
    model = upcycle(pico(), trained=True)
    model.delete_adapter("default")
    assert torch.equal(logits(model.base_model.model, token_batch()), logits(pico(), token_batch()))


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
def test_two_adapters_on_a_plain_transformers_model():
    _, (first, second) = two_adapters()
    model = pico()
    plain = logits(model, token_batch())
    model.add_adapter(moe_config(), "first")
    model.add_adapter(moe_config(**SECOND), "second")
    for name in ("first", "second"):
        randomise_experts(model, name)
    assert model.eval().active_adapters() == ["second"]
    assert torch.equal(logits(model, token_batch(), language="sw"), second)
    model.set_adapter("first")
    assert torch.equal(logits(model, token_batch()), first)
    model.disable_adapters()
    assert torch.equal(logits(model, token_batch()), plain)
    model.enable_adapters()
    model.delete_adapter("second")
    assert torch.equal(logits(model, token_batch()), first)
    model.delete_adapter("first")
    assert torch.equal(logits(model, token_batch()), plain)


@pytest.mark.parametrize("fields", [{}, {"expert_rank": 2, "modules_to_save": ["lm_head"]}], ids=["plain", "all"])
def test_unload_gives_the_base_model_back(fields):
    base = pico()
    before = {name: type(module) for name, module in base.named_modules()}
    signature = inspect.signature(base.forward)
    expected = logits(base, token_batch())
    model = upcycle(base, trained=True, **fields)
    again = model.unload()
    assert again is base
    assert {name: type(module) for name, module in again.named_modules()} == before
    assert inspect.signature(again.forward) == signature
    assert not again._forward_hooks and not again._forward_pre_hooks
    assert torch.equal(logits(again, token_batch()), expected)
    assert torch.equal(
        logits(upcycle(again, trained=True), token_batch()), logits(upcycle(pico(), trained=True), token_batch())
    )


@pytest.mark.parametrize("method", ["merge_and_unload", "merge_adapter", "unmerge_adapter"])
def test_merging_names_the_alternative_and_touches_nothing(method):
    model = upcycle(pico(), trained=True)
    expected = logits(model, token_batch())
    with pytest.raises(NotImplementedError, match="merge_and_graft"):
        getattr(model, method)()
    assert len(moe_layers(model)) == 2
    assert torch.equal(logits(model, token_batch()), expected)


def test_modules_to_save_are_trained_saved_and_loaded(tmp_path):
    model = upcycle(pico(), trained=True, modules_to_save=["lm_head"])
    plain = logits(pico(), token_batch())
    model.base_model.model.lm_head.modules_to_save["default"].weight.data += 1.0
    expected = logits(model, token_batch())
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(pico(), tmp_path, is_trainable=True).eval()
    assert torch.equal(logits(again, token_batch()), expected)
    assert again.base_model.model.lm_head.weight.requires_grad
    with again.disable_adapter():
        assert torch.equal(logits(again, token_batch()), plain)


def test_a_copy_shares_nothing_with_its_original():
    model = upcycle(pico(), trained=True, expert_rank=2, routing="language")
    expected = logits(model, token_batch(), language="hu")
    moved = perturbed(model)
    moved.set_language("az")
    assert torch.equal(logits(model, token_batch(), language="hu"), expected)
    assert not torch.equal(logits(moved, token_batch(), language="hu"), expected)
    with pytest.raises(ValueError, match="language"):
        logits(model, token_batch())


def test_one_config_object_serves_two_base_models():
    config = moe_config()
    first, second = pico(), pico(seed=1)
    for base in (first, second):
        expected = logits(base, token_batch())
        base.add_adapter(config)
        torch.testing.assert_close(logits(base.eval(), token_batch()), expected, atol=5e-5, rtol=0)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize("options", [{}, {"low_cpu_mem_usage": True}], ids=["plain", "low_cpu_mem_usage"])
def test_a_second_adapter_leaves_what_the_first_trains(options, trainable, tied, tmp_path):
    for name, changes in (("first", {}), ("second", SECOND)):
        model = upcycle(pico(tie_word_embeddings=tied), trained=True, **changes)
        model.add_tokens(["x", "y"], VOCABULARY, [[3, 4], [5]])
        model.save_pretrained(tmp_path / name)
    model = PeftModel.from_pretrained(
        pico(tie_word_embeddings=tied), tmp_path / "first", "first", is_trainable=True, **options
    )
    before = {name for name, p in model.named_parameters() if p.requires_grad}
    assert any("moe_delta_rows" in name for name in before)
    model.load_adapter(tmp_path / "second", "second", is_trainable=trainable, **options)
    after = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name in after if ".second." not in name} == before
    assert not any(p.is_meta for p in model.parameters())


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
def test_transformers_reports_nothing_missing_where_nothing_is(saved, caplog):
    model = saved.load_base()
    model.load_adapter(saved.adapter, "first")
    model.load_adapter(saved.adapter, "second")
    assert "MISSING" not in caplog.text
