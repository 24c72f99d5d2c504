"""Tables of who may use which expert: compiled where something changes, never in a forward pass, never stale."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import PeftModel

from builders import LANGUAGES, logits, moe_layers, pico, token_batch, upcycle
from peft_moe_delta import fit_routers
from peft_moe_delta.errors import LanguageError, PlanError
from peft_moe_delta.languages import LanguageTable
from peft_moe_delta.tuner.settings import LayerTables
from training.common import make_tokenizer

CHANGES: dict[str, Callable[[Any], Any]] = {
    "nothing": lambda model: None,
    "review": lambda model: model.start_review(),
    "review with a prior": lambda model: model.start_review(language_prior_groups=["turkic"]),
    "expansion": lambda model: model.start_expansion(),
    "another routing": lambda model: model.start_review(routing="learned"),
    "growth": lambda model: model.add_languages({"sw": "bantu"}, {"bantu": 2}),
    "growth and its review": lambda model: (
        model.add_languages({"sw": "bantu"}, {"bantu": 2}),
        model.start_review(),
    ),
    "a language that joins": lambda model: model.add_languages({"et": "uralic"}),
    "a group taken away": lambda model: (
        model.add_languages({"sw": "bantu"}, {"bantu": 2}),
        model.remove_group("bantu"),
    ),
    "another adapter": lambda model: (
        model.add_adapter("other", copy.deepcopy(model.active_peft_config)),
        model.set_adapter("other"),
    ),
    "fitted routers": lambda model: fit_routers(model, {c: ["w3 w4 w5"] for c in LANGUAGES}, make_tokenizer()),
    "the field itself": lambda model: setattr(model.active_peft_config, "routing", "learned"),
}


@pytest.fixture
def builds(monkeypatch) -> list[str]:
    """A note of every table that is built."""
    built: list[str] = []
    build, init = LanguageTable.build.__func__, LayerTables.__init__

    def counted_build(cls, *arguments, **options):
        built.append("languages")
        return build(cls, *arguments, **options)

    def counted_init(*arguments, **options):
        built.append("layer")
        init(*arguments, **options)

    monkeypatch.setattr(LanguageTable, "build", classmethod(counted_build))
    monkeypatch.setattr(LayerTables, "__init__", counted_init)
    return built


CASES = [(change, routing, None) for change in CHANGES for routing in ("learned", "language", "classifier")] + [
    (change, "language", "shared_kv") for change in ("nothing", "review", "a language that joins")
]


@pytest.mark.parametrize(("change", "routing", "attention"), CASES)
def test_a_forward_pass_builds_no_table(builds, change, routing, attention):
    model = upcycle(pico(), trained=True, routing=routing, classifier_layers=[0], attention_experts=attention)
    CHANGES[change](model)
    assert "layer" in builds
    builds.clear()
    ids = torch.tensor([0, 1, 3])
    logits(model, token_batch(), language_ids=ids)
    model.train()(input_ids=token_batch(), labels=token_batch(), language_ids=ids).loss.backward()
    assert builds == []
    with model.base_model.in_routing("language"):
        builds.clear()
        logits(model, token_batch(), language="hu")
        assert builds == []
    builds.clear()
    logits(model, token_batch(), language="hu")
    assert builds == []


def test_a_loaded_copied_or_pickled_model_builds_no_table_in_a_pass(builds, tmp_path):
    model = upcycle(pico(), trained=True, routing="language")
    model.save_pretrained(tmp_path)
    expected = logits(model, token_batch(), language="hu")
    for again in (
        PeftModel.from_pretrained(pico(), tmp_path).eval(),
        PeftModel.from_pretrained(pico(), tmp_path, low_cpu_mem_usage=True).eval(),
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
    ):
        builds.clear()
        assert torch.equal(logits(again, token_batch(), language="hu"), expected)
        assert builds == []


@pytest.mark.parametrize(
    ("field", "value"),
    [("routing", "learned"), ("stage", "review"), ("language_prior_coef", 1.0), ("language_prior_groups", ["turkic"])],
)
def test_a_field_that_is_changed_by_hand_reaches_every_layer(field, value):
    model = upcycle(pico(), trained=True, routing="language")
    logits(model, token_batch(), language="hu")
    model.active_peft_config.change(**{field: value})
    expected = upcycle(pico(), trained=True, **{"routing": "language", field: value})
    for ours, theirs in zip(moe_layers(model), moe_layers(expected), strict=True):
        ours, theirs = (layer.settings["default"].tables for layer in (ours, theirs))
        for part in ("allowed", "prior_targets", "uses_router", "routing"):
            assert getattr(ours, part) == getattr(theirs, part), part
    assert torch.equal(*(logits(m, token_batch(), language="hu") for m in (model, expected)))


@pytest.mark.parametrize(
    ("field", "value", "error"), [("routing", "guess", PlanError), ("languages", {"hu": "uralic"}, LanguageError)]
)
def test_a_field_that_does_not_fit_is_refused_where_it_is_set(field, value, error):
    model = upcycle(pico(), trained=True)
    expected = logits(model, token_batch())
    with pytest.raises(error):
        setattr(model.active_peft_config, field, value)
    assert getattr(model.active_peft_config, field) != value
    assert torch.equal(logits(model, token_batch()), expected)


def test_layers_of_equal_counts_share_their_tables():
    model = upcycle(pico(num_hidden_layers=3), experts={"uralic": [1, 2, 1], "turkic": 1})
    first, second, third = (layer.settings["default"].tables for layer in moe_layers(model))
    assert first is third and first is not second


def test_tables_lie_on_the_device_of_the_tokens_and_stay_behind_in_a_file():
    tables = moe_layers(upcycle(pico()))[0].settings["default"].tables
    meta = torch.device("meta")
    assert tables.tensor("allowed", meta).device == meta
    assert tables.tensor("allowed", meta) is tables.tensor("allowed", meta)
    assert copy.deepcopy(tables) is tables
    assert not pickle.loads(pickle.dumps(tables))._tensors
