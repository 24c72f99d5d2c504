"""An upcycled model under torch.compile."""

import pytest
import torch

from builders import logits, pico, token_batch, upcycle
from reading import mixed, reader


@pytest.mark.slow
@pytest.mark.parametrize("routing", ["learned", "language"])
def test_compiled_equals_eager(routing):
    torch.compiler.reset()
    model = upcycle(pico(), trained=True, routing=routing)
    compiled = torch.compile(model, backend="aot_eager")
    for ids in (torch.tensor([0, 0, 0]), torch.tensor([0, 1, 3]), torch.tensor([1, 1, 1])):
        expected = logits(model, token_batch(), language_ids=ids)
        torch.testing.assert_close(logits(compiled, token_batch(), language_ids=ids), expected, atol=5e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [None, 2], ids=["full", "low-rank"])
def test_one_language_by_name_is_one_graph(rank):
    torch.compiler.reset()
    experts = {"uralic": 1, "turkic": 1}
    model = upcycle(pico(), trained=True, routing="language", experts=experts, expert_rank=rank)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for language in ("hu", "az", "en"):
        expected = logits(model, token_batch(), language=language)
        torch.testing.assert_close(logits(compiled, token_batch(), language=language), expected, atol=5e-5, rtol=0)


@pytest.mark.slow
def test_layers_compiled_one_by_one_see_the_pass_they_are_in():
    torch.compiler.reset()
    model = upcycle(pico(), trained=True, routing="language", experts={"uralic": 1, "turkic": 1})
    expected = {language: logits(model, token_batch(), language=language) for language in ("hu", "az", "en")}
    for layer in model.get_base_model().model.layers:
        layer.compile(backend="aot_eager")
    for language, each in expected.items():
        torch.testing.assert_close(logits(model, token_batch(), language=language), each, atol=5e-5, rtol=0)


@pytest.mark.slow
def test_languages_are_read_in_compiled_passes_and_remembered_between_them():
    torch.compiler.reset()
    model, ids = reader(), mixed()
    compiled = torch.compile(model, backend="aot_eager")
    expected = logits(model, ids)
    torch.testing.assert_close(logits(compiled, ids), expected, atol=5e-5, rtol=0)
    with torch.no_grad():
        first = compiled(ids[:, :20], use_cache=True)
        second = compiled(ids[:, 20:], past_key_values=first.past_key_values)
    torch.testing.assert_close(second.logits, expected[:, 20:], atol=5e-5, rtol=0)
