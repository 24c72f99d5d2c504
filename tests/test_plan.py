"""`ExpertPlan`: each layer's experts shared out among the groups, by hand once; what does not fit is refused."""

import json

import pytest

from peft_moe_delta.errors import PlanError
from peft_moe_delta.plan import ExpertPlan

GROUPS = ("original", "uralic", "turkic")
PLAN = ExpertPlan.build((2, 5, 7), GROUPS, {"turkic": 1, "uralic": [2, 0, 3]})
DENSE = ExpertPlan.build((0, 1, 2), ("original", "new"), {"new": [0, 2, 0]})


def test_groups_own_experts_in_the_order_of_the_groups():
    assert PLAN.counts == ((1, 2, 1), (1, 0, 1), (1, 3, 1))
    assert [list(PLAN.experts_of(2, group)) for group in GROUPS] == [[0], [1, 2], [3]]
    assert [list(PLAN.experts_of(5, group)) for group in GROUPS] == [[0], [], [1]]
    assert [PLAN.num_experts(layer) for layer in (2, 5, 7)] == [4, 2, 5]


@pytest.mark.parametrize("plan", [PLAN, DENSE], ids=["three groups", "dense layers"])
def test_every_expert_belongs_to_exactly_one_group(plan):
    for layer in plan.layers:
        owned = [expert for group in plan.groups for expert in plan.experts_of(layer, group)]
        assert owned == list(range(plan.num_experts(layer)))
        assert [plan.group_of_expert(layer, expert) for expert in owned] == [
            group for group in plan.groups for _ in plan.experts_of(layer, group)
        ]


def test_layers_without_new_experts_are_dense():
    assert DENSE.moe_layers == (1,)
    assert DENSE.num_experts(0) == DENSE.num_experts(99) == 1
    assert list(DENSE.experts_of(99, "original")) == [0]
    assert list(DENSE.experts_of(99, "new")) == []


def test_parameters_are_counted_in_moe_layers_alone():
    # one layer of two new experts of 1,000 and a router of three rows of 32
    assert DENSE.num_params(expert_params=1_000, hidden_size=32) == 2 * 1_000 + 3 * 32
    assert PLAN.num_params(expert_params=10, hidden_size=1) == (3 + 1 + 4) * 10 + (4 + 2 + 5)


def test_one_token_passes_through_its_experts_and_every_router():
    sizes = {"expert_params": 1_000, "hidden_size": 32}
    assert DENSE.num_active_params(top_k=2, **sizes) == (1 + 2 + 1) * 1_000 + 3 * 32
    assert DENSE.num_active_params(top_k=9, **sizes) == (1 + 3 + 1) * 1_000 + 3 * 32


def test_a_plan_may_know_its_sizes():
    plan = DENSE.with_sizes(expert_params=1_000, hidden_size=32)
    assert plan == DENSE
    assert plan.num_params() == DENSE.num_params(1_000, 32)
    assert ExpertPlan.from_json(plan.to_json()).num_params() == plan.num_params()
    with pytest.raises(PlanError, match="does not know the size of an expert"):
        DENSE.num_params()


def test_a_plan_prints_and_draws(tmp_path):
    assert PLAN.table().splitlines() == [
        "| layer | original | uralic | turkic | experts |",
        "| --- | ---: | ---: | ---: | ---: |",
        "| 2 | 1 | 2 | 1 | 4 |",
        "| 5 | 1 | 0 | 1 | 2 |",
        "| 7 | 1 | 3 | 1 | 5 |",
        "| all | 3 | 5 | 3 | 11 |",
    ]
    PLAN.draw(tmp_path / "plan.png")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("plan", [PLAN, DENSE], ids=["three groups", "dense layers"])
def test_json_round_trip(plan):
    assert ExpertPlan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize(
    "change",
    [
        {"counts": [[1, 1], [1, 1]]},
        {"counts": [[1, 2, 1], [1, 0]]},
        {"counts": [[2, 2, 1], [1, 0, 1], [1, 3, 1]]},
        {"counts": [[1, -1, 1], [1, 0, 1], [1, 3, 1]]},
        {"groups": ["uralic", "original", "turkic"]},
        {"layers": None},
    ],
    ids=str,
)
def test_a_damaged_document_is_refused(change):
    with pytest.raises(PlanError, match="Not an expert plan"):
        ExpertPlan.from_json(json.dumps({**json.loads(PLAN.to_json()), **change}))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"layers": [0]}'])
def test_another_document_is_refused(text):
    with pytest.raises(PlanError, match="Not an expert plan"):
        ExpertPlan.from_json(text)


@pytest.mark.parametrize(
    ("experts", "message"),
    [
        ({"uralic": 1}, "Every group but"),
        ({"uralic": 1, "turkic": 1, "slavic": 1}, "Every group but"),
        ({"uralic": 1, "turkic": 1, "original": 1}, '"original", which always owns exactly expert 0'),
        ({"uralic": 1, "turkic": 0}, "'turkic' has no expert in any layer"),
        ({"uralic": 1, "turkic": [0, 0, 0]}, "'turkic' has no expert in any layer"),
        ({"uralic": 1, "turkic": [1, 1]}, "lists 2 counts, but the model has 3"),
        ({"uralic": 1, "turkic": -1}, "none negative"),
        ({"uralic": 1, "turkic": [1, -1, 1]}, "none negative"),
        ({"uralic": 2**31, "turkic": 1}, "got 2147483648 experts in a layer, expected 10,000 at most"),
        ({"uralic": 1, "turkic": 1.5}, "number of experts or one number a layer"),
        ({"uralic": 1, "turkic": True}, "number of experts or one number a layer"),
        ({"uralic": 1, "turkic": "2"}, "number of experts or one number a layer"),
    ],
    ids=str,
)
def test_counts_that_do_not_fit_are_refused(experts, message):
    with pytest.raises(PlanError, match=message):
        ExpertPlan.build((0, 1, 2), GROUPS, experts)


def test_a_plan_without_new_languages_is_refused():
    with pytest.raises(PlanError, match="Every language is in the group"):
        ExpertPlan.build((0, 1), ("original",), {})


def test_in_a_console_a_plan_is_a_line():
    plan = ExpertPlan.build(range(40), ("original", "uralic", "turkic"), {"uralic": 2, "turkic": [0] * 20 + [3] * 20})
    assert repr(plan) == "ExpertPlan(40 layers, new experts in each: uralic 2, turkic 0 to 3)"
