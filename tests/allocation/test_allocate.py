"""`allocate_experts`: the published figures, budgets met exactly for whatever statistics, and what cannot be met."""

import json
from dataclasses import replace

import numpy as np
import pytest
from peft import get_peft_model

from allocation.measured import STATISTICS
from builders import pico
from peft_moe_delta import ExpertPlan, MoeDeltaConfig, allocate_experts
from peft_moe_delta.allocation.allocate import largest_remainder
from peft_moe_delta.errors import DataError, LanguageError, PlanError

LLAMA_SIMILARITY = [
    *(0.0359, 0.0402, 0.0352, 0.0503, 0.0636, 0.0698, 0.0842, 0.0960, 0.0945, 0.0978, 0.1060, 0.1094, 0.1164, 0.1074),
    *(0.1152, 0.1109, 0.0973, 0.0907, 0.0830, 0.0835, 0.0778, 0.0683, 0.0685, 0.0548, 0.0498, 0.0497, 0.0481, 0.0453),
]
"""LayerMoE's own measurement (arXiv 2505.22582): Llama-3.2-3B, new languages el, hu, tr."""
LLAMA_EXPERTS = [5, 5, 5, 4, 3, 3] + [2] * 12 + [3] * 5 + [4] * 5
"""What its authors made of it, with delta 70: experts in each of 28 layers, expert 0 among them."""


def totals(plan: ExpertPlan) -> list[int]:
    return [plan.num_experts(layer) for layer in plan.layers]


def new_experts(plan: ExpertPlan) -> int:
    return sum(totals(plan)) - len(plan.layers)


def test_published_rounding_gives_the_published_counts():
    plan = allocate_experts(LLAMA_SIMILARITY, "inverse_similarity_published", 70)
    assert totals(plan) == LLAMA_EXPERTS
    assert sum(totals(plan)) == 84


def test_published_deviation_gives_the_published_layers(shared_data):
    measured = json.loads((shared_data.parent / "reference/dmoe/deviation_bloom_560m.json").read_text())
    table = {code: rows["delta_norm_ffn"] for code, rows in measured.items()}
    for threshold, index in ((0.6, 15728671), (0.8, 14680064)):
        plan = allocate_experts(table, "deviation_threshold", threshold=threshold)
        assert sum(1 << layer for layer in plan.moe_layers) == index
    assert allocate_experts(table, "deviation_threshold").moe_layers == (0, 1, 2, 3, 4, 20, 21, 22, 23)


@pytest.mark.parametrize("seed", range(20))
def test_any_budget_is_met_and_less_alike_never_gets_fewer(seed):
    rng = np.random.default_rng(seed)
    weights = rng.gamma(0.5, size=rng.integers(1, 30)) + 1e-3
    floor = int(rng.integers(0, 3))
    ceiling = None if seed % 2 else floor + int(rng.integers(1, 5))
    most = 8 if ceiling is None else ceiling
    total = int(rng.integers(floor * len(weights), most * len(weights) + 1))
    counts = np.array(largest_remainder(weights, total, floor, ceiling))
    assert counts.sum() == total
    assert counts.min() >= floor and (ceiling is None or counts.max() <= ceiling)
    assert all(np.diff(counts[np.argsort(weights)]) >= 0)


def test_shares_that_are_whole_are_kept():
    assert largest_remainder(np.array([3.0, 1.0, 2.0]), 12, 0, None) == [6, 2, 4]
    assert largest_remainder(np.array([1.0, 1.0, 1.0]), 4, 1, None) == [2, 1, 1]  # a tie falls to the first
    assert largest_remainder(np.array([100.0, 1.0, 1.0]), 9, 1, 4) == [4, 3, 2]  # clipped; the rest by remainder


def test_inverse_similarity_counts_new_experts():
    assert totals(allocate_experts([0.1, 0.2, 0.4], "inverse_similarity", 7)) == [5, 3, 2]  # shares 4, 2, 1


def test_similarity_that_has_no_inverse_gets_the_most_experts():
    assert totals(allocate_experts([-0.1, 0.0, 0.5], "inverse_similarity", 9, ceiling=4)) == [5, 5, 2]


def test_deviation_by_threshold_by_count_and_by_budget():
    deviation = {"hu": [1.0, 5.0, 2.0, 4.0], "el": [1.0, 3.0, 2.0, 4.0]}  # mean 1 4 2 4, normalised 0 1 1/3 1
    languages = {"en": "original", "hu": "uralic", "el": "hellenic"}
    chosen = [
        {"threshold": 0.6},
        {"top_layers": 2},
        {"budget": 4},
        {"budget": 5},
    ]
    for options in chosen:
        plan = allocate_experts(deviation, "deviation_threshold", languages=languages, **options)
        assert plan.counts == ((1, 0, 0), (1, 1, 1), (1, 0, 0), (1, 1, 1))
        assert plan.groups == ("original", "uralic", "hellenic")
    assert allocate_experts(deviation, "deviation_threshold", threshold=0.3).moe_layers == (1, 2, 3)
    assert allocate_experts(deviation, "deviation_threshold", top_layers=1).moe_layers == (1,)  # a tie


@pytest.mark.parametrize("measured", [STATISTICS, STATISTICS.deviation()], ids=["measured", "figures"])
def test_languages_that_the_plan_does_not_name_have_no_say(measured):
    others = {code: 100.0 * np.arange(2, 0, -1) for code in ("de", "fr")}  # would choose layer 0
    rows = STATISTICS.deviation() | others
    if not isinstance(measured, dict):
        grams = np.stack([np.diag([row[layer] ** 2 for row in rows.values()]) for layer in range(2)])
        rows = replace(STATISTICS, languages=tuple(rows), grams={"deviation": grams})
    plan = allocate_experts(rows, "deviation_threshold", languages={"en": "original", "hu": "new", "el": "new"})
    assert plan.moe_layers == (1,)
    assert allocate_experts(rows, "deviation_threshold").moe_layers == (0,)
    with pytest.raises(LanguageError, match="xx.*not measured"):
        allocate_experts(rows, "deviation_threshold", languages={"xx": "new"})


def test_parameters_may_be_the_budget():
    for params, layers in ((1_000_000, 2), (2 * 110 + 2 * 20, 2), (2 * 110 + 2 * 20 - 1, 1)):
        plan = allocate_experts(STATISTICS, "deviation_threshold", max_params=params)
        assert len(plan.moe_layers) == layers
        assert plan.num_params() <= params
    with pytest.raises(PlanError, match="130 or more"):
        allocate_experts(STATISTICS, "deviation_threshold", max_params=129)


def test_uniform():
    assert totals(allocate_experts([0.0] * 3, "uniform")) == [2, 2, 2]
    assert totals(allocate_experts([0.0] * 3, "uniform", 9)) == [4, 4, 4]
    languages = {"en": "original", "hu": "a", "el": "b"}
    assert allocate_experts([0.0] * 3, "uniform", languages=languages, experts_per_group=2).counts == ((1, 2, 2),) * 3


def test_groups_are_dealt_a_layer_s_experts_in_turn():
    languages = {"hu": "a", "el": "b"}
    plan = allocate_experts([1.0] * 4, "inverse_similarity", 12, languages=languages)
    assert plan.counts == ((1, 2, 1), (1, 1, 2), (1, 2, 1), (1, 1, 2))


def test_measured_statistics_know_which_languages_are_new():
    languages = {"en": "original", "hu": "expanded", "el": "expanded"}
    # new-new .2 and .4, new-original the means of .1 and .3, of .5 and .5
    np.testing.assert_allclose(STATISTICS.similarity(["hu", "el"], ["en"]), [0.2, 0.45])
    np.testing.assert_allclose(STATISTICS.similarity(["hu"], ["en"]), [0.1, 0.5])
    np.testing.assert_allclose(STATISTICS.similarity(["hu", "el"]), [0.2, 0.4])
    plan = allocate_experts(STATISTICS, budget=13, languages=languages)
    assert totals(plan) == [10, 5]  # 13 * .45 / .65 = 9, 13 * .2 / .65 = 4
    assert plan.num_params() == 13 * 110 + 15 * 10
    assert plan.num_active_params(top_k=2) == 4 * 110 + 15 * 10


def test_a_plan_goes_straight_into_the_config_and_survives_saving(tmp_path):
    plan = allocate_experts([0.1, 0.4], "inverse_similarity", 5)
    languages = {"en": "original", "hu": "expanded"}
    by_plan = MoeDeltaConfig(languages=languages, experts=plan)
    assert by_plan.to_dict() == MoeDeltaConfig(languages=languages, **plan.config_fields()).to_dict()
    by_plan.save_pretrained(tmp_path)
    assert MoeDeltaConfig.from_pretrained(tmp_path).experts == {"expanded": [4, 1]}
    assert get_peft_model(pico(), by_plan).base_model.plan() == plan


def test_a_plan_for_some_layers_names_them():
    plan = allocate_experts([0.1, 0.4], "inverse_similarity", 5, layers=[1, 3])
    config = MoeDeltaConfig(languages={"hu": "expanded"}, experts=plan)
    assert config.layers_to_transform == [1, 3]
    with pytest.raises(PlanError, match="The plan is for the layers"):
        MoeDeltaConfig(languages={"hu": "expanded"}, experts=plan, layers_to_transform=[0, 1])


def test_a_plan_for_another_model_is_refused():
    plan = allocate_experts([0.1, 0.4, 0.2], "inverse_similarity", 5)
    with pytest.raises(PlanError, match="lists 3 counts, but the model has 2"):
        get_peft_model(pico(), MoeDeltaConfig(languages={"hu": "expanded"}, experts=plan))


@pytest.mark.parametrize(
    ("figures", "options", "error", "message"),
    [
        ([0.1, 0.2], {"strategy": "best"}, PlanError, "Unknown strategy 'best'"),
        ([0.1, 0.2], {}, PlanError, "needs a budget"),
        ([0.1, 0.2], {"budget": 1}, PlanError, "got 1 new experts, expected 2 to"),
        ([0.1, 0.2], {"budget": 5, "ceiling": 2}, PlanError, "expected 2 to 4"),
        ([0.1, 0.2], {"budget": 5, "floor": 3, "ceiling": 2}, PlanError, "Change the budget, the floor"),
        ([0.1, 0.2], {"budget": 5, "floor": -1}, PlanError, "floor: got -1"),
        ([0.1, 0.2], {"budget": 5, "layers": [0]}, PlanError, "speak of 2 layers, but 1 are named"),
        ([-0.1, 0.0], {"budget": 5}, PlanError, "No layer has a positive similarity"),
        ([0.1, 0.2], {"strategy": "uniform", "budget": 5}, PlanError, "a multiple of 2 layers"),
        ([0.1, 0.2], {"strategy": "deviation_threshold", "threshold": 60}, PlanError, "threshold: got 60"),
        ([0.2, 0.2], {"strategy": "deviation_threshold"}, PlanError, "All layers deviate alike"),
        ([0.1, 0.2], {"strategy": "deviation_threshold", "top_layers": 3}, PlanError, "top_layers: got 3"),
        ([0.1, 0.2], {"strategy": "deviation_threshold", "budget": 0}, PlanError, "pays for 0 new experts"),
        ([0.1, 0.2], {"strategy": "deviation_threshold", "budget": 1, "top_layers": 1}, PlanError, "not both"),
        ([0.1, 0.2], {"strategy": "deviation_threshold", "max_params": 9}, PlanError, "knows? an expert's size"),
        ([0.1, 0.2], {"budget": 5, "languages": {"en": "original"}}, PlanError, "nothing to allocate"),
        ({"hu": [0.1, 0.2], "el": [0.1]}, {"budget": 5}, DataError, "rows of \\[1, 2\\] layers"),
        ([0.1, float("nan")], {"budget": 5}, DataError, "one finite number a layer"),
        ([], {"budget": 5}, DataError, "one finite number a layer"),
        (["a", "b"], {"budget": 5}, DataError, "Expected one number a layer"),
        (STATISTICS, {"budget": 5, "languages": {"fi": "a", "hu": "a"}}, LanguageError, "'fi'\\] were not measured"),
        (STATISTICS, {"budget": 5, "languages": {"hu": "a"}}, LanguageError, "two new languages"),
        (STATISTICS, {"budget": 5, "layers": [0, 1]}, PlanError, "know their own"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_cannot_be_allocated_is_refused(figures, options, error, message):
    with pytest.raises(error, match=message):
        allocate_experts(figures, **options)
