"""Forward passes: every routing and dtype, autocast, compiled code, padding, and languages that are read."""

from __future__ import annotations

import pytest
import torch

from builders import logits, pico, token_batch, upcycle
from gpu.conftest import assert_near, moved, on
from peft_moe_delta.identifier import recognised_languages
from reading import mixed, reader

KINDS = {
    "learned": {},
    "learned, low-rank": {"expert_rank": 2},
    "learned, top-1": {"top_k": 1},
    "language": {"routing": "language"},
    "language, low-rank": {"routing": "language", "expert_rank": 2},
    "classifier": {"routing": "classifier", "classifier_layers": [0]},
    "attention": {"attention_experts": "full"},
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def padded():
    """Rows in three languages, one of them padded."""
    tokens = token_batch()
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    return {"input_ids": tokens, "attention_mask": mask, "language_ids": torch.tensor([0, 1, 3])}


def run(model, arguments):
    with torch.no_grad():
        return model(**arguments).logits[arguments["attention_mask"].bool()]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", list(KINDS))
def test_a_pass_equals_the_cpu(kind, dtype, device):
    model = upcycle(pico(), trained=True, **KINDS[kind])
    expected = run(model, padded())
    assert_near(run(on(model, device, dtype), moved(padded(), device)), expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["learned", "learned, low-rank", "language"])
def test_grouped_experts_equal_the_cpu(kind, dtype, device):
    model = upcycle(pico(), trained=True, **KINDS[kind])
    there = on(model, device, dtype)
    there.base_model.set_experts_implementation("grouped_mm")
    assert_near(run(there, moved(padded(), device)), run(model, padded()), dtype)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gpt2", "bloom"])
def test_families(family, device):
    model = upcycle(pico(family), trained=True)
    assert_near(run(on(model, device), moved(padded(), device)), run(model, padded()))


@pytest.mark.parametrize("kind", ["learned", "language"])
def test_autocast_leaves_the_router_in_fp32(kind, device):
    model = upcycle(pico(), trained=True, **KINDS[kind])
    expected, there = run(model, padded()), on(model, device)
    with torch.autocast(device.type, torch.bfloat16):
        assert_near(run(there, moved(padded(), device)), expected, torch.bfloat16)


def test_languages_are_read_the_same(device):
    model, ids = reader(), mixed()
    there = on(model, device)
    assert recognised_languages(there, ids.to(device)) == recognised_languages(model, ids)
    assert_near(logits(there, ids.to(device)), logits(model, ids))


def test_ids_of_languages_may_stay_on_the_cpu(device):
    model = upcycle(pico(), trained=True, routing="language")
    there, arguments = on(model, device), moved(padded(), device)
    arguments["language_ids"] = arguments["language_ids"].cpu()
    assert_near(run(there, arguments), run(model, padded()))


@pytest.mark.parametrize("rank", [None, 2], ids=["full", "low-rank"])
def test_one_language_compiles_as_one_graph(rank, device):
    experts = {"uralic": 1, "turkic": 1}
    model = upcycle(pico(), trained=True, routing="language", experts=experts, expert_rank=rank)
    backend = "inductor" if device.type == "cuda" else "aot_eager"
    compiled = torch.compile(on(model, device), backend=backend, fullgraph=True)
    for language in ("hu", "en"):
        expected = logits(model, token_batch(), language=language)
        assert_near(logits(compiled, token_batch().to(device), language=language), expected)


@pytest.mark.parametrize("kind", ["learned", "language"])
def test_tokens_of_several_languages_compile(kind, device):
    model = upcycle(pico(), trained=True, **KINDS[kind])
    compiled = torch.compile(on(model, device), backend="aot_eager", fullgraph=True)
    assert_near(run(compiled, moved(padded(), device)), run(model, padded()))
