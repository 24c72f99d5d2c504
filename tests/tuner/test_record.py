"""What a config asks for and what is filled in: apart, saved as one section, and read as it was before it was one."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model

from builders import logits, moe_config, moe_layers, pico, token_batch, upcycle
from peft_moe_delta import MoeDeltaConfig
from peft_moe_delta.errors import CheckpointError, PlanError
from peft_moe_delta.graft.adapter import Adapter
from peft_moe_delta.hub.card import CardFacts
from peft_moe_delta.tuner import AdapterRecord
from peft_moe_delta.tuner.record import FORMAT, RECORDED, GrowthStep

FLAT = Path(__file__).parents[1] / "graft" / "made_by_674a637"
FULL = AdapterRecord(
    stage="review",
    train_earlier_rows=True,
    language_ids=("fi", "hu", "en", "az"),
    group_order=("original", "uralic", "turkic"),
    growth=(GrowthStep(("turkic",), {"stage": "review", "routing": "learned"}),),
    open_steps=1,
    new_tokens=("ház", " ház"),
    first_new_token_id=99,
    new_tokens_step=1,
    base_fingerprint={"version": 2, "blocks": 2},
    graft={"post_trained": "post", "expert_scales": {"uralic": 0.5}},
    mixed={"seed": "seed", "others": "seed"},
    doubts=("it diverged",),
)


def edited(folder, change):
    """The folder of an adapter, after `change(config)`."""
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text())
    change(config)
    file.write_text(json.dumps(config))
    return folder


def test_what_a_user_asks_for_fits_one_screen():
    asked = {f.name for f in dataclasses.fields(MoeDeltaConfig)} - {f.name for f in dataclasses.fields(PeftConfig)}
    assert not asked & set(RECORDED)
    assert len(asked) <= 20
    assert len((MoeDeltaConfig.__doc__ or "").splitlines()) <= 50


def test_a_record_comes_back_as_it_was_saved(tmp_path):
    config = moe_config(record=FULL)
    config.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    assert not set(stored) & set(RECORDED)
    assert stored["record"]["format"] == FORMAT
    for kind in (PeftConfig, MoeDeltaConfig):
        assert kind.from_pretrained(tmp_path) == config
    assert config.record == FULL


def test_flat_names_of_an_earlier_version_are_its_record(tmp_path):
    stored = json.loads((FLAT / "adapter_config.json").read_text())
    record = PeftConfig.from_pretrained(FLAT).record
    assert record.language_ids == tuple(stored["language_ids"]) == ("hu", "en", "fi", "az")
    assert record.group_order == ("original", "uralic", "turkic")
    assert (record.stage, record.new_tokens, record.base_fingerprint) == ("review", (), stored["base_fingerprint"])
    assert PeftConfig.from_peft_type(**stored | {"growth": [{"groups": ["turkic"], "before": {}}]}).steps == (0, 0, 1)
    with pytest.warns(UserWarning, match=re.escape("Unexpected keyword arguments ['of_a_newer_peft']")):
        again = PeftConfig.from_peft_type(**stored, of_a_newer_peft=1)
    assert again.record == record


def test_an_adapter_of_a_newer_format_is_refused(tmp_path):
    upcycle(pico()).save_pretrained(tmp_path)
    edited(tmp_path, lambda config: config["record"].update(format=FORMAT + 1, later="?"))
    for load in (
        PeftConfig.from_pretrained,
        lambda folder: PeftModel.from_pretrained(pico(), folder),
        Adapter.of_folder,
        lambda folder: CardFacts.of(folder, name="m"),
    ):
        with pytest.raises(CheckpointError, match=f"record has format {FORMAT + 1}.*reads format {FORMAT}.*upgrade"):
            load(tmp_path)
    with pytest.raises(CheckpointError, match="format None.*damaged"):
        PeftConfig.from_pretrained(edited(tmp_path, lambda config: config["record"].clear()))


def test_a_change_of_the_record_reaches_every_layer_or_nothing():
    model = upcycle(pico(), trained=True, routing="language")
    config = model.active_peft_config
    before = [layer.settings["default"].tables for layer in moe_layers(model)]
    config.change(stage="review", language_prior_coef=0.5)
    assert config.record.stage == "review"
    targets = [layer.settings["default"].tables.prior_targets for layer in moe_layers(model)]
    assert all(now != then.prior_targets for now, then in zip(targets, before, strict=True))
    kept, expected = dict(vars(config)), logits(model, token_batch(), language="hu")
    for values, error in (
        ({"stage": "dreaming", "top_k": 1}, PlanError),
        ({"doubts": ["one"], "routing": "guess"}, PlanError),
        ({"doubts": ["one"], "top_k": 0}, PlanError),
        ({"doubts": ["one"], "staeg": "review"}, TypeError),
    ):
        with pytest.raises(error):
            config.change(**values)
        assert vars(config) == kept
    assert torch.equal(logits(model, token_batch(), language="hu"), expected)


def test_a_record_is_not_changed_in_place():
    record = moe_config().record
    with pytest.raises(dataclasses.FrozenInstanceError):
        record.stage = "review"
    assert {type(value) for value in vars(record).values()} <= {str, int, bool, tuple, type(None)}


def test_the_config_that_a_user_gives_stays_as_it_is():
    config = moe_config()
    model = get_peft_model(pico(), config)
    model.start_review()
    model.add_languages({"sw": "bantu"}, {"bantu": 1})
    assert config == dataclasses.replace(moe_config(), base_model_name_or_path=config.base_model_name_or_path)
    assert model.active_peft_config.record.base_fingerprint is not None


def test_the_names_that_moved_are_still_taken_and_still_read_with_a_warning():
    config = moe_config(stage="review", new_tokens=None)
    assert config.record.stage == "review"
    for use in (lambda: config.stage, lambda: setattr(config, "stage", "expansion")):
        with pytest.warns(DeprecationWarning, match=r"`stage` has moved: read config\.record\.stage"):
            use()
    assert config.record.stage == "expansion"
    assert dataclasses.replace(config, stage="review").record.stage == "review"
