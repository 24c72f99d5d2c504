"""What a stage trains and with which losses, by default and as asked."""

from __future__ import annotations

import pytest

from builders import moe_config, moe_layers, pico, upcycle
from peft_moe_delta.errors import LanguageError, PlanError
from peft_moe_delta.routing import routing_named


@pytest.mark.parametrize(
    ("stage", "balancing", "prior", "groups"),
    [("expansion", 0.01, 0.0, ("original", "uralic", "turkic")), ("review", 0.0, 0.1, ("original",))],
)
def test_a_stage_has_the_published_defaults(stage, balancing, prior, groups):
    config = moe_config(stage=stage)
    assert (config.load_balancing, config.language_prior, config.prior_groups) == (balancing, prior, groups)


def test_the_prior_sends_the_groups_it_speaks_for_to_their_own_experts():
    model = upcycle(pico())
    settings = moe_layers(model)[0].settings["default"]
    none, zero, uralic, turkic = ((False,) * 4, *(tuple(e in own for e in range(4)) for own in ({0}, {1, 2}, {3})))
    model.start_review()
    assert settings.tables.prior_targets == (zero, none, none)
    model.start_review(language_prior_groups=["original", "turkic"])
    assert settings.tables.prior_targets == (zero, none, turkic)
    model.start_expansion()
    assert settings.tables.prior_targets == (zero, uralic, turkic)


@pytest.mark.parametrize("stage", ["expansion", "review"])
def test_the_prior_sends_a_group_without_experts_to_expert_0(stage):
    """Where routing by language sends it, and `fit_routers`."""
    model = upcycle(pico(), experts={"uralic": [2, 1], "turkic": [0, 1]}, stage=stage)
    model.active_peft_config.language_prior_groups = ["original", "uralic", "turkic"]
    for layer in moe_layers(model):
        settings = layer.settings["default"]
        assert settings.tables.prior_targets == routing_named("language").allowed_experts(settings.counts)
    assert moe_layers(model)[0].settings["default"].tables.prior_targets[2] == (True, False, False)


def test_a_stage_that_does_not_fit_changes_nothing():
    model = upcycle(pico(), top_k=3)
    for error, change in (
        (LanguageError, {"language_prior_groups": ["nobody"]}),
        (PlanError, {"routing": "guess"}),
        (PlanError, {"routing": "language"}),  # where no token may use three experts
    ):
        with pytest.raises(error):
            model.start_review(**change)
        assert (model.active_config.record.stage, model.active_config.routing) == ("expansion", "learned")
