"""Closed-form routers: the streamed fit is the least-squares solution, whatever the order, and can be added to."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from builders import alike, moe_layers, pico, upcycle
from chance import shifted
from peft_moe_delta import RouterStatistics, fit_routers
from peft_moe_delta.errors import CheckpointError, DataError, LanguageError
from peft_moe_delta.mixing.routers import set_routers, statistics_of
from training.common import make_tokenizer

RIDGE, TEMPERATURE = 1e-2, 0.1


def documents(first, last, number=6):
    """Seeded documents of different lengths over the words `first` to `last`."""
    generator = np.random.default_rng(shifted(first))
    return [" ".join(f"w{w}" for w in generator.integers(first, last, size=5 + 3 * i)) for i in range(number)]


TEXTS = {"hu": documents(3, 40), "fi": documents(30, 60, 3), "en": documents(50, 99, 9), "az": documents(3, 99)}


WORDS = {"hu": range(3, 22), "fi": range(22, 41), "en": range(41, 60), "az": range(60, 79), "bn": range(79, 99)}
OWN_WORDS = {code: documents(words.start, words.stop) for code, words in WORDS.items()}
"""Texts of languages that share no word. `separable` is a model that a linear map can tell them apart in."""


def model(base=None, **changes):
    return upcycle(pico() if base is None else base, trained=True, **changes)


def separable():
    return alike(pico(), *WORDS.values())


def own_words(*codes):
    return {code: OWN_WORDS[code] for code in codes}


def fit(model, texts=TEXTS, **options):
    return fit_routers(model, texts, make_tokenizer(), **options)


def router_weights(model):
    return [layer.moe_delta_router["default"].weight.detach().clone() for layer in moe_layers(model)]


def inputs_of(model, code, text):
    """What enters each router while one document runs alone on its language's experts."""
    seen = []
    handles = [layer.register_forward_pre_hook(lambda _, args: seen.append(args[0][0])) for layer in moe_layers(model)]
    model.active_peft_config.routing, before = "language", model.active_peft_config.routing
    with torch.no_grad():
        model(torch.tensor([make_tokenizer()(text)["input_ids"]]), language=code)
    model.active_peft_config.routing = before
    for handle in handles:
        handle.remove()
    return seen


def least_squares(model, layer, weights):
    """Columns by the definition, at once: every language weighs as much as it is said to."""
    groups = {"en": 0, "hu": 1, "fi": 1, "az": 2}
    rows, targets = [], []
    for code, texts in TEXTS.items():
        x = torch.cat([inputs_of(model, code, text)[layer] for text in texts]).double()
        y = torch.zeros(len(x), 3, dtype=torch.float64)
        y[:, groups[code]] = 1
        rows.append(x * (weights[code] / len(x)) ** 0.5)
        targets.append(y * (weights[code] / len(x)) ** 0.5)
    x, y = torch.cat(rows), torch.cat(targets)
    damping = (RIDGE * (x.T @ x).trace() / x.shape[1]).sqrt() * torch.eye(x.shape[1], dtype=x.dtype)
    return torch.linalg.lstsq(torch.cat([x, damping]), torch.cat([y, torch.zeros(len(damping), 3)])).solution


def test_in_a_console_statistics_are_a_line():
    statistics = RouterStatistics()
    statistics.add("hu", "uralic", {"layer": (torch.eye(64), torch.ones(64))}, tokens=2)
    assert repr(statistics) == "RouterStatistics(languages=['hu'])"


def test_the_streamed_fit_is_the_direct_least_squares_solution():
    fitted = model()
    fit(fitted, batch_size=4)
    for layer, found in enumerate(router_weights(fitted)):
        W = least_squares(fitted, layer, dict.fromkeys(TEXTS, 1.0))
        expected = (W / W.norm(dim=0))[:, [0, 1, 1, 2]].T / TEMPERATURE
        torch.testing.assert_close(found.double(), expected, atol=5e-5, rtol=0)
        torch.testing.assert_close(found.norm(dim=1), torch.full((4,), 1 / TEMPERATURE))


@pytest.mark.parametrize("weight", [0.5, 8.0])
def test_a_weight_on_original_tokens_is_that_of_their_errors_in_the_least_squares(weight):
    fitted, tokenizer = model(), make_tokenizer()
    rows = {code: [tokenizer(text)["input_ids"] for text in texts] for code, texts in TEXTS.items()}
    others = statistics_of(fitted, [(code, rows[code]) for code in ("hu", "fi", "az")])
    set_routers(fitted, statistics_of(fitted, [("en", rows["en"])], batch_size=2), others, weight)
    for layer, found in enumerate(router_weights(fitted)):
        W = least_squares(fitted, layer, {**dict.fromkeys(TEXTS, 1.0), "en": weight})
        expected = (W / W.norm(dim=0).mean())[:, [0, 1, 1, 2]].T / TEMPERATURE
        torch.testing.assert_close(found.double(), expected, atol=5e-5, rtol=0)


def test_the_odds_of_a_gate_are_the_prior_of_linear_discriminant_analysis():
    generator = torch.Generator().manual_seed(shifted(4))
    samples = {code: torch.randn(400, 6, generator=generator, dtype=torch.float64) for code in ("en", "hu")}
    samples["en"] += torch.randn(6, generator=generator, dtype=torch.float64)
    statistics = RouterStatistics()
    for code, group in (("en", "original"), ("hu", "uralic")):
        x = samples[code]
        statistics.add(code, group, {"gate": (x.T @ x, x.sum(0))}, len(x))
    found = statistics.discriminant("gate", {"original": 1}, {"uralic": 1}, ridge=1e-12, odds=5.0)
    u, v = samples["en"].mean(0), samples["hu"].mean(0)
    within = sum((x - x.mean(0)).T @ (x - x.mean(0)) / len(x) for x in samples.values()) / 2
    w = torch.linalg.solve(within, u - v)
    expected = torch.cat([w, (np.log(5.0) - w @ (u + v) / 2)[None]])
    torch.testing.assert_close(found / found.norm(), expected / expected.norm())


def test_the_order_of_documents_and_languages_and_the_batch_size_do_not_matter():
    one, other = model(), model()
    fit(one, batch_size=2)
    fit(other, {code: TEXTS[code][::-1] for code in reversed(TEXTS)}, batch_size=5)
    for a, b in zip(router_weights(one), router_weights(other), strict=True):
        torch.testing.assert_close(a, b, atol=5e-5, rtol=0)


def test_the_routers_there_were_and_the_mode_do_not_matter_and_are_kept():
    fitted, same = model(), model(routing="language").train()
    fit(fitted)
    for layer in moe_layers(same):
        torch.nn.init.normal_(layer.moe_delta_router["default"].weight)
    fit(same)
    assert all(torch.equal(a, b) for a, b in zip(router_weights(fitted), router_weights(same), strict=True))
    assert same.training and same.active_peft_config.routing == "language"
    assert fitted.active_peft_config.routing == "learned"


def test_a_language_that_joins_later_only_adds(tmp_path):
    whole, grown = model(), model()
    fit(whole)
    statistics = fit(grown, {code: TEXTS[code] for code in ("hu", "en", "az")})
    without = router_weights(grown)
    statistics.save(tmp_path / "routers.safetensors")
    loaded = RouterStatistics.load(tmp_path / "routers.safetensors")
    assert loaded.languages == ["hu", "en", "az"]
    fit(grown, {"fi": TEXTS["fi"]}, statistics=loaded)
    for before, a, b in zip(without, router_weights(grown), router_weights(whole), strict=True):
        assert not torch.allclose(before, a)
        torch.testing.assert_close(a, b, atol=5e-5, rtol=0)


def test_a_layer_without_a_groups_experts_sends_its_tokens_to_expert_0(holds):
    fitted = model(separable(), experts={"uralic": [2, 2], "turkic": [0, 1]})
    fit(fitted, own_words("hu", "fi", "en", "az"))
    first = router_weights(fitted)[0]
    x = torch.cat([x for text in OWN_WORDS["az"] for x in inputs_of(fitted, "az", text)[:1]])
    assert len(first) == 3
    share = ((x @ first.T).argmax(-1) == 0).float().mean()
    holds(share, above=0.5)


def test_soft_attention_routers_are_fitted_as_well():
    fitted = model(attention_experts="full")
    statistics = fit(fitted)
    assert len(statistics.A) == len(moe_layers(fitted)) == 4
    for weight in router_weights(fitted):
        torch.testing.assert_close(weight.norm(dim=1), torch.full((4,), 1 / TEMPERATURE))


def test_without_an_original_language_expert_0_is_for_what_nobody_claims():
    fitted = upcycle(pico(), languages={"hu": "uralic", "az": "turkic"}, experts={"uralic": 1, "turkic": 1})
    fit(fitted, {code: TEXTS[code] for code in ("hu", "az")})
    for weight in router_weights(fitted):
        assert not weight[0].any() and weight[1:].any(dim=1).all()


# -- an adapter that has grown, and gates -----------------------------------------------------------------------------


def grown(**changes):
    """A fitted mixture that a Bengali group of two experts has joined."""
    model_ = model(**changes)
    fit(model_)
    model_.add_languages({"bn": "indic"}, {"indic": 2})
    return model_


GROWN = {**TEXTS, "bn": documents(70, 99, 8)}


def test_newest_rows_are_the_direct_least_squares_solution_beside_the_earlier_ones():
    fitted = grown()
    earlier = router_weights(fitted)
    fit(fitted, GROWN, only="newest", margin=3.0, earlier_weight=4.0, ridge=1e-3)
    assert all(torch.equal(a, b) for a, b in zip(earlier, router_weights(fitted), strict=True))
    for layer, module in enumerate(moe_layers(fitted)):
        rows, targets = [], []
        for code, texts in GROWN.items():
            x = torch.cat([inputs_of(fitted, code, text)[layer] for text in texts]).double()
            offset = (x @ earlier[layer].double().T).logsumexp(dim=-1)
            root = ((1.0 if code == "bn" else 4.0) / len(x)) ** 0.5
            rows.append(x * root)
            targets.append((offset + (3.0 if code == "bn" else -3.0)) * root)
        x, y = torch.cat(rows), torch.cat(targets)[:, None]
        damping = (1e-3 * (x.T @ x).trace() / x.shape[1]).sqrt() * torch.eye(x.shape[1], dtype=x.dtype)
        w = torch.linalg.lstsq(torch.cat([x, damping]), torch.cat([y, torch.zeros(len(damping), 1)])).solution
        found = module.router("default").grown_3
        torch.testing.assert_close(found.double(), w.T.expand(2, -1), atol=1e-4, rtol=1e-4)


def test_newest_rows_take_the_new_language_and_leave_the_earlier_ones(holds):
    fitted = model(separable())
    fit(fitted, own_words("hu", "fi", "en", "az"))
    fitted.add_languages({"bn": "indic"}, {"indic": 2})
    fit(fitted, OWN_WORDS, only="newest", ridge=1e-4)
    assert fitted.active_peft_config.record.open_steps == 1
    module = moe_layers(fitted)[0]
    share = {}
    for code, texts in OWN_WORDS.items():
        x = torch.cat([inputs_of(fitted, code, text)[0] for text in texts])
        with torch.no_grad():
            share[code] = module.router("default")(x).softmax(-1)[:, -2:].sum(-1).mean().item()
    holds(share.pop("bn") - max(share.values()), above=0.3)


def test_an_adapter_that_has_not_grown_has_only_newest_rows():
    one, other = model(), model()
    fit(one)
    fit(other, only="newest")
    assert all(torch.equal(a, b) for a, b in zip(router_weights(one), router_weights(other), strict=True))


def test_gates_alone_leave_the_routers():
    fitted = model(classifier_layers=[0])
    before = router_weights(fitted)
    fit(fitted, only="gates")
    assert all(torch.equal(a, b) for a, b in zip(before, router_weights(fitted), strict=True))
    assert gate_rows(fitted)[0].any()


def test_removing_what_was_fitted_gives_back_the_rows_before():
    fitted = grown(routing="classifier", classifier_layers=[0])
    before = {name: tensor.clone() for name, tensor in fitted.state_dict().items() if "grown" not in name}
    fit(fitted, GROWN, only="newest")
    fitted.remove_group("indic")
    after = fitted.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in after)


def gate_rows(model):
    return list(moe_layers(model)[0].classifier("default").parameters())


def test_a_gate_is_the_linear_discriminant_of_the_original_languages():
    fitted = model(classifier_layers=[0])
    fit(fitted, ridge=1e-3)
    x = {code: torch.cat([inputs_of(fitted, code, t)[0] for t in texts]).double() for code, texts in TEXTS.items()}
    mean = {code: states.mean(0) for code, states in x.items()}
    middle = torch.stack(list(mean.values())).mean(0)
    covariance = torch.stack([(s - middle).T @ (s - middle) / len(s) for s in x.values()]).mean(0)
    u, v = mean["en"], (mean["hu"] + mean["fi"] + mean["az"]) / 3
    damping = 1e-3 * covariance.trace() / len(covariance) * torch.eye(len(covariance), dtype=torch.float64)
    w = torch.linalg.solve(covariance + damping, u - v)
    expected = torch.cat([w, -(w @ (u + v) / 2)[None]])
    torch.testing.assert_close(gate_rows(fitted)[0][0].double(), expected, atol=1e-4, rtol=1e-4)


def test_a_fitted_gate_recognises_languages_of_words_of_their_own(holds):
    fitted = model(separable(), classifier_layers=[0])
    fit(fitted, own_words("hu", "fi", "en", "az"), ridge=1e-4)
    gate = moe_layers(fitted)[0].classifier("default")
    for code in ("hu", "fi", "en", "az"):
        x = torch.cat([inputs_of(fitted, code, text)[0] for text in OWN_WORDS[code]])
        share = gate.recognises(x, 0).float().mean().item()
        holds(share, **({"above": 0.8} if code == "en" else {"below": 0.2}), name=code)


def test_a_gate_and_what_is_returned_weigh_languages_alike():
    found = []
    for weight in (1.0, 4.0):
        fitted = grown(routing="classifier", classifier_layers=[0])
        statistics = fit(fitted, GROWN, only="newest", earlier_weight=weight)
        found.append((gate_rows(fitted)[1], *statistics.A.values()))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_only_the_newest_row_of_a_gate_is_fitted():
    fitted = grown(routing="classifier", classifier_layers=[0])
    first = gate_rows(fitted)[0].detach().clone()
    assert first.any() and not gate_rows(fitted)[1].any()
    fit(fitted, GROWN, only="newest")
    assert torch.equal(gate_rows(fitted)[0], first) and gate_rows(fitted)[1].any()


@pytest.mark.parametrize(
    ("texts", "options", "error", "message"),
    [
        ({"hu": ["w3"]}, {}, LanguageError, r"groups \['original', 'turkic'\].*en; az"),
        ({**TEXTS, "xx": ["w3"]}, {}, LanguageError, "Unknown language 'xx'"),
        ({**TEXTS, "en": []}, {}, DataError, "no text of 'en'"),
        (TEXTS, {"temperature": 0}, DataError, "must be positive"),
        (TEXTS, {"only": "oldest"}, DataError, "'oldest'"),
        (TEXTS, {"only": "newest", "statistics": RouterStatistics()}, DataError, "text of every group"),
        (TEXTS, {"statistics": RouterStatistics(languages=["hu"])}, LanguageError, r"hold \['hu'\] already"),
    ],
)
def test_what_would_leave_a_router_ignorant_is_refused(texts, options, error, message):
    fitted = model()
    before = router_weights(fitted)
    with pytest.raises(error, match=message):
        fit(fitted, texts, **options)
    assert all(torch.equal(a, b) for a, b in zip(before, router_weights(fitted), strict=True))


def test_gates_cannot_tell_texts_apart_that_are_one_token():
    texts = {code: ["w3"] for code in TEXTS}
    with pytest.raises(DataError, match="nothing tells their languages apart"):
        fit(model(routing="classifier", classifier_layers=[0]), texts)


def test_a_missing_tokenizer_and_a_foreign_file_are_refused(tmp_path):
    with pytest.raises(DataError, match="No tokenizer"):
        fit_routers(model(), TEXTS)
    pico().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="no router statistics"):
        RouterStatistics.load(tmp_path / "model.safetensors")
