"""Remote code: what no stock architecture holds, exact, and usable where this package is not installed."""

import ast
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, DynamicCache

from builders import (
    FAMILIES,
    GATED,
    LANGUAGES,
    in_bf16,
    logits,
    moe_layers,
    perturbed,
    pico,
    randomise,
    token_batch,
    upcycle,
)
from greek import make_tokenizer
from peft_moe_delta.attention import Borrowed, OwnSlot, SharedKeyValues
from peft_moe_delta.errors import GraftError
from peft_moe_delta.export.remote_code import modelling_source
from peft_moe_delta.graft.memory import to_stock
from peft_moe_delta.loading import load_tokenizer
from peft_moe_delta.routing import Routes, choose_experts, classifier_logits, router_logits
from peft_moe_delta.routing.context import PassTokens, TokenMemory, recognise
from peft_moe_delta.tuner import route_agreement
from reading import mixed, reader
from training.common import checkpoint

TOKENS = token_batch()
UNEQUAL = {"uralic": [2, 1], "turkic": [1, 0]}
SIZES = {**FAMILIES, "olmo": GATED, "olmo3": GATED}
REFUSED_BY_STOCK = [
    "llama", "gemma2", "gemma3_text", "olmo", "olmo3", "smollm3", "stablelm", "cohere", "gpt2", "gpt_neox", "falcon",
    "bloom", "mpt",
]  # fmt: skip


def adapter(family="llama", **changes):
    config = SIZES[family] if family not in FAMILIES else {}
    return upcycle(pico(family, **config), trained=True, **{"experts": UNEQUAL, **changes})


@pytest.mark.parametrize("family", REFUSED_BY_STOCK)
def test_remote_code_holds_what_no_stock_architecture_does(family):
    model = adapter(family)
    with pytest.raises(GraftError, match="remote_code=True"):
        to_stock(model)
    exported = to_stock(model, remote_code=True)
    assert exported.graft_report.layout == f"moe_delta_{family}"
    assert exported.graft_report.choice.startswith("remote code, as it holds every plan. No stock")
    torch.testing.assert_close(logits(exported, TOKENS), logits(model, TOKENS), atol=5e-5, rtol=0)


def test_a_stock_architecture_comes_first():
    exported = to_stock(adapter(experts={"uralic": 1, "turkic": 1}), remote_code=True)
    assert exported.graft_report.layout == "mixtral"
    assert exported.graft_report.choice == "mixtral, which holds this 'llama' model exactly."


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_routing_by_language_takes_language_ids(family):
    model = adapter(family, routing="language", experts={"uralic": [2, 1], "turkic": 1})
    with pytest.raises(GraftError, match=r"language=.*remote_code=True"):
        to_stock(model)
    exported = to_stock(model, remote_code=True)
    assert exported.config.moe_delta["languages"] == list(LANGUAGES)
    by_row, by_token = torch.tensor([0, 1, 3]), torch.arange(TOKENS.numel()).view(TOKENS.shape) % 4
    for ids in (by_row, by_token):
        torch.testing.assert_close(
            logits(exported, TOKENS, language_ids=ids), logits(model, TOKENS, language_ids=ids), atol=5e-5, rtol=0
        )
    with pytest.raises(ValueError, match=r"Pass language, .*\['hu', 'en', 'fi', 'az'\]"):
        exported(TOKENS)


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_routing_by_context_reads_as_the_adapter_does(family):
    """Told, read in one pass, and read token by token."""
    model, ids = reader(family, experts=UNEQUAL), mixed()
    exported = to_stock(model, remote_code=True)
    told = {"language_ids": torch.tensor([0, 1, 3])}
    for arguments in ({}, told):
        torch.testing.assert_close(
            logits(exported, ids, **arguments), logits(model, ids, **arguments), atol=5e-5, rtol=0
        )
    cache = DynamicCache()
    parts = [
        logits(exported, part, past_key_values=cache, attention_mask=None) for part in ids.split([9, 1, 1, 25], dim=1)
    ]
    torch.testing.assert_close(torch.cat(parts, dim=1), logits(model, ids), atol=5e-5, rtol=0)
    with pytest.raises(ValueError, match="pass input_ids"):
        exported(inputs_embeds=exported.get_input_embeddings()(ids))
    with pytest.raises(GraftError, match=r"language=.*remote_code=True"):
        to_stock(model)
    spoken = to_stock(model, language="az")
    torch.testing.assert_close(logits(spoken, ids), logits(model, ids, language="az"), atol=5e-5, rtol=0)


def test_grafting_and_remote_code_go_together():
    model, post = adapter("gemma2"), perturbed(pico("gemma2"))
    exported = model.merge_and_graft(post, remote_code=True)
    torch.testing.assert_close(logits(exported, TOKENS), logits(model.graft(post), TOKENS), atol=5e-5, rtol=0)


@pytest.mark.parametrize("rank", [None, 2], ids=["full-rank", "low-rank"])
@pytest.mark.parametrize("routing", ["learned", "language"])
@pytest.mark.parametrize("kind", ["shared_kv", "full"])
@pytest.mark.parametrize("family", ["mistral", "cohere"])
def test_attention_experts(family, kind, routing, rank):
    model = adapter(family, attention_experts=kind, routing=routing, expert_rank=rank)
    with pytest.raises(GraftError, match="remote_code=True"):
        to_stock(model)
    exported = to_stock(model, remote_code=True)
    ids = torch.tensor([0, 1, 3])
    arguments = {"language_ids": ids} if routing == "language" else {}
    torch.testing.assert_close(
        logits(exported, TOKENS, **arguments), logits(model, TOKENS, language_ids=ids), atol=5e-5, rtol=0
    )
    own = {name for name in exported.state_dict() if "layers.0.self_attn.experts.1." in name and ".k_proj." in name}
    assert bool(own) == (kind == "full"), "keys and values are owned once or by each"


def test_one_language_of_attention_experts_goes_on_in_its_own_cache():
    model = adapter(attention_experts="full", routing="language", experts={"uralic": 1, "turkic": 1})
    exported = to_stock(model, remote_code=True)
    ids = torch.tensor([0])
    cache = exported(TOKENS[:1], language_ids=ids, use_cache=True).past_key_values
    assert len(cache.layers) == 2
    with pytest.raises(ValueError, match="lack the text so far"):
        exported(TOKENS[:1, :1], language_ids=torch.tensor([3]), past_key_values=cache)


def test_classifiers(holds):
    model = adapter(routing="classifier", classifier_layers=[0, 1])
    for number, layer in enumerate(moe_layers(model)):
        randomise(layer.moe_delta_classifier, number)
    model.add_languages({"bn": "indic"}, {"indic": 1})
    with pytest.raises(GraftError, match="not open to every language"):
        to_stock(model, remote_code=True)
    model.start_review()
    for number, layer in enumerate(moe_layers(model)):
        randomise(layer.moe_delta_classifier, 7 + number)
    exported = to_stock(model, remote_code=True)
    assert exported.config.moe_delta["classifiers"] == {"0": 2, "1": 2}
    torch.testing.assert_close(logits(exported, TOKENS), logits(model, TOKENS), atol=5e-5, rtol=0)
    kept = [(mixture.routes(torch.randn(200, 32)).indices_TK == 0).any(-1) for mixture in mixtures(exported)]
    holds(torch.stack(kept).float().mean(), above=0.05, below=0.95)
    assert set(route_agreement(model, exported, [{"input_ids": TOKENS}]).values()) == {1.0}


def mixtures(exported):
    return [module for module in exported.modules() if type(module).__name__ == "MlpMixture"]


def test_weights_that_are_not_renormalised():
    model = adapter(top_k=1, norm_topk_prob=False)
    exported = to_stock(model, remote_code=True)
    torch.testing.assert_close(logits(exported, TOKENS), logits(model, TOKENS), atol=5e-5, rtol=0)


def test_a_wrong_expert_is_caught_by_the_gate():
    from peft_moe_delta.export import check_equal_logits

    model = adapter()
    exported = to_stock(model, remote_code=True)
    with torch.no_grad():
        exported.model.layers[0].mlp.experts[1].down_proj.weight *= 1.05
    with pytest.raises(GraftError, match="not exact"):
        check_equal_logits(model, exported)


@pytest.mark.parametrize(
    ("attention", "parts", "lines"),
    [
        (None, (), 290), ("shared_kv", (Borrowed, SharedKeyValues), 400), ("full", (OwnSlot,), 400),
        ("context", (recognise, TokenMemory, PassTokens), 480),
    ],
)  # fmt: skip
def test_the_file_has_this_packages_own_source_and_imports_nothing_of_it(attention, parts, lines):
    context, attention = attention == "context", None if attention == "context" else attention
    source = modelling_source("Gemma2Config", "Gemma2Model", "Gemma2ForCausalLM", attention, context)
    for part in (Routes, choose_experts, classifier_logits, router_logits, *parts):
        assert inspect.getsource(part) in source
    imported = {
        node.module if isinstance(node, ast.ImportFrom) else alias.name
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    assert {name.split(".")[0] for name in imported} <= {
        "__future__", "collections", "contextlib", "copy", "dataclasses", "functools", "inspect", "typing", "torch",
        "transformers",
    }  # fmt: skip
    assert "Gemma2Config as HostConfig" in source and "Gemma2Model as HostBase" in source
    defined = {node.name for node in ast.parse(source).body if isinstance(node, ast.ClassDef | ast.FunctionDef)}
    assert ("AttentionMixture" in defined) == (attention is not None)
    assert "noqa" not in source and "type: ignore" not in source and "LanguageError" not in source
    assert len(source.splitlines()) < lines


@pytest.fixture(scope="module")
def reloaded(tmp_path_factory):
    """Exports used in one process without this package: name -> (adapter, folder, batch, proof)."""
    models = {
        "llama": (adapter(), {}),
        "llama tied, bf16": (upcycle(in_bf16(pico(tie_word_embeddings=True)), trained=True, experts=UNEQUAL), {}),
        "gemma3_text": (adapter("gemma3_text"), {}),
        "gpt2": (adapter("gpt2"), {}),
        "by language": (adapter(routing="language"), {"language_ids": torch.tensor([0, 1, 3])}),
        "by context": (reader(experts=UNEQUAL), {"input_ids": mixed()[:, -TOKENS.shape[1] :].contiguous()}),
        "classifier": (adapter(routing="classifier", classifier_layers=[1]), {}),
        "shared_kv": (adapter("qwen3", attention_experts="shared_kv"), {}),
        "full": (adapter("qwen3", attention_experts="full"), {}),
        "full by language": (
            adapter("qwen3", attention_experts="full", routing="language"), {"language_ids": torch.tensor([0, 1, 3])},
        ),
        "shared_kv, bf16": (
            upcycle(in_bf16(pico()), trained=True, experts=UNEQUAL, attention_experts="shared_kv"), {},
        ),
    }  # fmt: skip
    for layer in moe_layers(models["classifier"][0]):
        randomise(layer.moe_delta_classifier, 1)
    root = tmp_path_factory.mktemp("remote")
    for name, (model, arguments) in models.items():
        to_stock(model, remote_code=True).save_pretrained(root / name)
        save_file({"input_ids": TOKENS, **arguments}, root / name / "batch.safetensors")
    script = Path(__file__).with_name("reload_remote.py")
    environment = {**os.environ, "HF_MODULES_CACHE": str(root / "modules"), "HF_HUB_OFFLINE": "1"}
    folders = [str(root / name) for name in models]
    subprocess.run([sys.executable, str(script), *folders], check=True, env=environment, capture_output=True)
    return {
        name: (model, root / name, arguments, load_file(root / name / "proof.safetensors"))
        for name, (model, arguments) in models.items()
    }


@pytest.mark.parametrize(
    "name",
    [
        "llama", "llama tied, bf16", "gemma3_text", "gpt2", "by language", "by context", "classifier", "shared_kv",
        "full", "full by language", "shared_kv, bf16",
    ],
)  # fmt: skip
def test_it_generates_and_trains_with_plain_transformers(reloaded, name):
    model, folder, arguments, proof = reloaded[name]
    tolerance = 0.1 if "bf16" in name else 1e-4  # the adapter's experts are fp32
    expected = logits(model, TOKENS, **arguments)
    torch.testing.assert_close(proof["logits"], expected, atol=tolerance, rtol=tolerance)
    mask = torch.ones_like(TOKENS)
    mask[0, :2] = mask[1, :4] = 0
    padded, shown = logits(model, TOKENS, attention_mask=mask, **arguments), mask.bool()
    torch.testing.assert_close(proof["padded"][shown], padded[shown], atol=tolerance, rtol=tolerance)
    assert torch.equal(proof["again"], proof["logits"]), "what it saves itself is the same model"
    assert proof["cached"].shape == (3, TOKENS.shape[1] + 4)
    if "bf16" not in name:  # there two tokens may tie to within rounding, and the kernels decide
        assert torch.equal(proof["cached"], proof["uncached"])
    assert ("decoder" in proof) == ("language_ids" not in arguments and name != "by context")
    assert torch.equal(proof.get("decoder", torch.tensor(0)), proof.get("own decoder", torch.tensor(0)))
    assert (proof["gradients"] > 0).all()
    assert not proof["without_gradient"].any()
    assert torch.equal(proof["router"], moe_layers(model)[0].moe_delta_router["default"].weight), "fp32 throughout"
    assert (folder / "modeling_moe_delta.py").is_file()
    assert (folder / "again" / "modeling_moe_delta.py").is_file()


def test_without_its_head_it_refuses_to_choose_experts_by_language():
    exported = to_stock(adapter(routing="language"), remote_code=True)
    assert set(exported.config.auto_map) == {"AutoConfig", "AutoModelForCausalLM"}
    with pytest.raises(ValueError, match="load it with AutoModelForCausalLM"):
        sys.modules[type(exported).__module__].MoeDeltaModel(exported.config)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
def test_its_tensor_parallel_plan_cuts_experts_as_the_mlp_and_leaves_routers_whole(family):
    exported, host = to_stock(adapter(family), remote_code=True), pico(family).base_model
    plan, own = exported.base_model.tp_plan or {}, host.tp_plan or {}

    def style(model_plan, name):
        return model_plan.get(re.sub(r"\.\d+", ".*", name))

    for name, module in exported.base_model.named_modules():
        if "router" in name or not isinstance(module, torch.nn.Linear):
            assert "router" not in name or style(plan, name) is None
        else:
            assert style(plan, name) == style(own, re.sub(r"\.experts\.\d+", "", name)), name
    assert bool(plan) == (family != "gpt2")


def test_its_tokenizer_loads_without_trust_in_code(tmp_path, capsys):
    to_stock(adapter(), remote_code=True).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=False)("the cat")["input_ids"]
    load_tokenizer(tmp_path)
    assert "custom code" not in capsys.readouterr().out  # transformers would ask


def test_by_language_it_takes_a_code_as_the_adapter_does():
    model = adapter(routing="language")
    exported = to_stock(model, remote_code=True)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones_like(TOKENS)}
    for index, code in enumerate(LANGUAGES):
        torch.testing.assert_close(
            logits(exported, TOKENS, language=code), logits(model, TOKENS, language=code), atol=5e-5, rtol=0
        )
        for way in ({}, {"num_beams": 2}, {"use_cache": False}):
            by_code = exported.generate(TOKENS, language=code, **options, **way)
            assert torch.equal(
                by_code, exported.generate(TOKENS, language_ids=torch.full((3,), index), **options, **way)
            )
    for arguments in ({"language": "sw"}, {"language": "hu", "language_ids": torch.zeros(3, dtype=torch.int64)}):
        with pytest.raises(ValueError, match=r"one of \['hu', 'en'.*Got language='(sw|hu)'"):
            exported(TOKENS, **arguments)
    with pytest.raises(ValueError, match="Pass language, one of"):
        exported(TOKENS)


def test_by_language_checkpointing_recomputes_each_pass_in_its_own():
    """Two passes before one backward pass."""
    exported = to_stock(adapter(routing="language"), remote_code=True).train()
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            checkpoint(exported, use_reentrant=False)
        exported.zero_grad()
        sum(exported(TOKENS, labels=TOKENS, language=code).loss for code in ("hu", "az")).backward()
        found.append({name: p.grad.clone() for name, p in exported.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, atol=1e-6, rtol=1e-4)
    checkpoint(exported, use_reentrant=True)
    with pytest.raises(ValueError, match="use_reentrant"):
        exported(TOKENS, labels=TOKENS, language="hu")


def test_where_experts_are_not_chosen_by_language_a_code_changes_nothing():
    exported = to_stock(adapter(), remote_code=True)
    assert torch.equal(logits(exported, TOKENS, language="hu"), logits(exported, TOKENS))
