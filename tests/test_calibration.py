"""Calibration after the graft: routers that were fitted to the base model are right again, and nothing else moves."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from peft import PeftModel

from builders import alike, moe_layers, perturbed, pico, upcycle
from chance import shifted
from peft_moe_delta import calibrate_routers, fit_routers, to_stock
from peft_moe_delta.errors import DataError, LanguageError
from test_conversations import CHAT, chat_tokenizer
from training.common import make_tokenizer, parameters

WORDS = {"hu": range(7, 30), "en": range(30, 53), "fi": range(53, 76), "az": range(76, 99)}
"""Languages that share no word; `w5` and `w6` are the template's."""


def documents(code, number=24):
    words = WORDS[code]
    drawn = np.random.default_rng(shifted(words.start))
    return [" ".join(f"w{w}" for w in drawn.integers(words.start, words.stop, size=12)) for _ in range(number)]


TEXTS = {code: documents(code) for code in WORDS}
CHATS = [f"w5 {text[:20].rpartition(' ')[0]} <eos> w6 {text[-7:].partition(' ')[2]} <eos>" for text in documents("en")]


def planted(folder=None, **changes):
    """A graft whose routers were fitted to the base: post-training moves what tells the languages apart elsewhere."""
    base = alike(pico(), *WORDS.values())
    post_trained = alike(perturbed(copy.deepcopy(base), scale=0.5), *WORDS.values(), range(5, 7), seed=9)
    with torch.no_grad():
        post_trained.get_input_embeddings().weight.sub_(2 * mean_directions(base))
    model = upcycle(base, trained=True, top_k=1, **changes)
    fit_routers(model, TEXTS, make_tokenizer())
    if folder is not None:
        post_trained.save_pretrained(folder)
    return model.graft(post_trained)


def mean_directions(model):
    """What the tokens of each language have in common, row by row."""
    weight = model.get_input_embeddings().weight
    common = torch.zeros_like(weight)
    for words in WORDS.values():
        common[list(words)] = weight[list(words)].mean(0)
    return common


def calibrate(model, texts=TEXTS, **options):
    options = {"conversations": CHATS, "steps": 4, "weights": (1.0, 4.0), **options}
    return calibrate_routers(model, texts, chat_tokenizer(), **options)


@pytest.mark.filterwarnings("ignore:Grafting looks doubtful")
def test_tokens_go_where_they_belong_again(holds):
    model = planted()
    found = calibrate(model)
    assert [(row.language, row.kind) for row in found.after] == [*((code, "text") for code in TEXTS), ("en", "chat")]
    holds(min(row.right for row in found.before), below=0.6, name="worst before")
    for row in found.after:
        holds(row.right, above=0.9, name=f"{row.language} {row.kind}")
    assert found.kept != "before" and found.doubts == ()
    (chat,) = (row for row in found.after if row.kind == "chat")
    assert chat.original and chat.divergence < next(row.divergence for row in found.before if row.kind == "chat")
    assert found.conversations == len(CHATS)


@pytest.mark.filterwarnings("ignore:Grafting looks doubtful")
@pytest.mark.parametrize("routing", ["learned", "classifier"])
def test_nothing_but_routers_and_gates_changes(routing):
    gates = {"classifier_layers": [0]} if routing == "classifier" else {}
    model = planted(routing=routing, **gates)
    before = parameters(model)
    found = calibrate(model)
    assert found.kept != "before"
    changed = {name for name, tensor in parameters(model).items() if not torch.equal(tensor, before[name])}
    assert changed and all("moe_delta_router" in name or "moe_delta_classifier" in name for name in changed)
    assert any("classifier" in name for name in changed) == (routing == "classifier")
    assert not model.training and model.active_peft_config.routing == routing


@pytest.mark.filterwarnings("ignore:Grafting looks doubtful")
def test_what_is_no_better_on_held_out_text_is_not_kept():
    model = planted()
    first = calibrate(model, steps=0)
    weights = [layer.moe_delta_router["default"].weight.detach().clone() for layer in moe_layers(model)]
    again = calibrate(model, weights=(1e-6,), steps=1, learning_rate=10.0)
    assert again.kept == "before" and again.before == again.after
    assert first.after == again.before
    for layer, weight in zip(moe_layers(model), weights, strict=True):
        assert torch.equal(layer.moe_delta_router["default"].weight, weight)


@pytest.mark.filterwarnings("ignore:Grafting looks doubtful")
def test_the_weight_moves_tokens_to_expert_0():
    found = calibrate(planted(), weights=(1e-3, 1.0, 1e3), steps=0)
    curve, tried = found.curve, [trial.weight for trial in found.curve]
    assert tried == sorted(tried) and {1e-3, 1.0, 1e3} < set(tried)
    best = min((trial for trial in curve if trial.weight in (1e-3, 1.0, 1e3)), key=lambda trial: trial.cost(1.0)).weight
    assert set(tried) - {1e-3, 1.0, 1e3} == {best / 2, best * 2}
    rights = [trial.original_right for trial in curve]
    assert rights == sorted(rights)
    assert [trial.new_right for trial in curve] == sorted((trial.new_right for trial in curve), reverse=True)


@pytest.mark.filterwarnings("ignore:Grafting looks doubtful")
@pytest.mark.parametrize("answer_cost", [0.0, 0.25, 100.0])
def test_what_a_lost_answer_costs_decides_which_weight_is_kept(answer_cost):
    found = calibrate(planted(), weights=(1e-2, 1.0, 1e2), steps=0, answer_cost=answer_cost)
    costs = {
        trial.weight: trial.original_cost + trial.new_cost + answer_cost * (1 - trial.answers) for trial in found.curve
    }
    assert found.answer_cost == answer_cost and costs[found.weight] == min(costs.values())
    if answer_cost == 100.0:
        kept = next(trial.answers for trial in found.curve if trial.weight == found.weight)
        assert kept == max(trial.answers for trial in found.curve)


@pytest.mark.filterwarnings("ignore:Grafting looks doubtful")
def test_a_calibrated_graft_is_exported_as_it_is_and_says_so(tmp_path):
    model = planted(tmp_path / "post_trained")
    found = calibrate(model)
    stock = to_stock(model)
    tokens = torch.tensor([chat_tokenizer()(CHATS[0])["input_ids"]])
    with torch.no_grad():
        torch.testing.assert_close(stock(tokens).logits, model(tokens).logits, atol=1e-4, rtol=0)
    report = stock.graft_report
    assert report.layout == "mixtral" and report.calibration["kept"] == found.kept
    assert report.calibration["doubts"] == list(found.doubts)
    model.save_pretrained(tmp_path / "adapter")
    post_trained = type(model.get_base_model()).from_pretrained(tmp_path / "post_trained")
    loaded = PeftModel.from_pretrained(post_trained, tmp_path / "adapter")
    assert to_stock(loaded).graft_report.calibration["weight"] == found.weight


@pytest.mark.filterwarnings("ignore:Grafting looks doubtful")
def test_the_conversations_are_made_up_where_none_are_given():
    model = planted()
    found = calibrate(model, conversations=9, steps=0, weights=(1.0,))
    assert found.conversations == 9 and found.after[-1].kind == "chat"
    silent = calibrate(model, conversations=[], steps=0, weights=(1.0,))
    assert {row.kind for row in silent.after} == {"text"}


@pytest.mark.filterwarnings("ignore:Grafting looks doubtful")
def test_tokens_that_stay_astray_are_doubted():
    """Two languages of the same words: no router can tell them apart."""
    model = planted()
    found = calibrate(model, {**TEXTS, "az": documents("en")})
    doubts = [doubt for doubt in found.doubts if "'az'" in doubt or "'en'" in doubt]
    assert doubts and all("by language" in doubt and "context" in doubt for doubt in doubts)
    assert model.active_peft_config.record.graft["calibration"]["doubts"] == list(found.doubts)


@pytest.mark.parametrize(
    ("texts", "options", "error", "message"),
    [
        ({**TEXTS, "xx": ["w7 w8"]}, {}, LanguageError, "Unknown language 'xx'"),
        (
            {code: TEXTS[code] for code in ("hu", "en")},
            {},
            LanguageError,
            r"No text stands for the groups \['turkic'\]",
        ),
        ({**TEXTS, "en": ["w31"]}, {}, DataError, "text of 'en': got 1 documents"),
        (TEXTS, {"conversations": [CHATS[0]]}, DataError, "chat of 'en': got 1"),
        (TEXTS, {"weights": ()}, DataError, "weights: got"),
        (TEXTS, {"weights": (0.0,)}, DataError, "weights: got"),
        (TEXTS, {"steps": -1}, DataError, "steps: got -1"),
        (TEXTS, {"answer_cost": -0.5}, DataError, "answer_cost: got -0.5"),
        (TEXTS, {"answer_cost": float("nan")}, DataError, "answer_cost: got nan"),
        (TEXTS, {"held_out": 1.0}, DataError, "held_out: got 1.0"),
    ],
)
def test_what_cannot_be_calibrated_is_refused_and_left_alone(texts, options, error, message):
    model = upcycle(pico(), trained=True)
    before = parameters(model)
    with pytest.raises(error, match=message):
        calibrate(model, texts, **options)
    assert all(torch.equal(tensor, before[name]) for name, tensor in parameters(model).items())


def test_routing_by_language_has_nothing_to_calibrate_and_no_template_no_chat():
    with pytest.raises(LanguageError, match="nothing to calibrate"):
        calibrate(upcycle(pico(), routing="language"))
    model = upcycle(pico(), trained=True)
    with pytest.raises(DataError, match="no chat template"):
        calibrate_routers(model, TEXTS, make_tokenizer())
    model = upcycle(pico(), trained=True, languages={"hu": "uralic", "fi": "uralic", "az": "turkic"})
    with pytest.raises(LanguageError, match="the adapter names none"):
        calibrate(model, {code: TEXTS[code] for code in ("hu", "fi", "az")})


def test_the_template_is_no_text_of_its_own():
    assert CHATS[0].startswith("w5 ") and CHATS[0].endswith(" <eos>") and "w6" in CHAT
