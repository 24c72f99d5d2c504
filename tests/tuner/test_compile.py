"""An upcycled model under torch.compile."""

import pytest
import torch

from builders import logits, pico, token_batch, upcycle
from reading import mixed, reader

KINDS = {
    "learned": {"routing": "learned"},
    "language": {"routing": "language"},
    "classifier": {"routing": "classifier", "classifier_layers": [1]},
    "low rank": {"routing": "language", "expert_rank": 4},
}


@pytest.mark.slow
@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_any_languages_are_one_graph_of_any_length(kind, training):
    """Without a break, whatever is in the batch. (The statistics of training have begun in a pass before.)"""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    model = upcycle(pico(), trained=True, **kind).train(training)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    for length, ids in ((12, [0, 1, 3]), (20, [0, 0, 0]), (17, [3, 2, 1])):
        tokens = token_batch(length=length)
        expected, found = (passed(m, tokens, torch.tensor(ids), training) for m in (model, compiled))
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, atol=5e-5, rtol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def passed(model, tokens, language_ids, training):
    """Logits, and in training the gradients of the loss."""
    model.zero_grad()
    output = model(input_ids=tokens, labels=tokens, language_ids=language_ids, use_cache=False)
    if not training:
        return {"logits": output.logits.detach()}
    output.loss.backward()
    gradients = {
        n.removeprefix("_orig_mod."): p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
    }
    return {"logits": output.logits.detach(), **gradients}


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
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    expected = logits(model, ids)
    torch.testing.assert_close(logits(compiled, ids), expected, atol=5e-5, rtol=0)
    with torch.no_grad():
        first = compiled(ids[:, :20], use_cache=True)
        second = compiled(ids[:, 20:], past_key_values=first.past_key_values)
    torch.testing.assert_close(second.logits, expected[:, 20:], atol=5e-5, rtol=0)
