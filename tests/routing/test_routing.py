"""Who may serve a token, and the choice among those: rules worked by hand, weights that sum to 1."""

import math

import pytest
import torch

from peft_moe_delta.errors import PlanError
from peft_moe_delta.routing import ROUTINGS, choose_experts, routing_named

COUNTS = [(1, 1), (1, 3), (1, 2, 1), (1, 0, 2), (1, 2, 0), (1, 0, 1, 0, 3)]


@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_learned_routing_allows_everything(counts):
    assert routing_named("learned").allowed_experts(counts) == ((True,) * sum(counts),) * len(counts)


def test_language_routing_by_hand():
    # experts: 0 | 1 2 | none | 3
    assert routing_named("language").allowed_experts((1, 2, 0, 1)) == (
        (True, False, False, False),
        (False, True, True, False),
        (True, False, False, False),
        (False, False, False, True),
    )


@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_language_routing_gives_every_expert_to_one_group_and_every_group_an_expert(counts):
    table = routing_named("language").allowed_experts(counts)
    assert [sum(row) for row in table] == [max(count, 1) for count in counts]
    owners = [group for group, count in enumerate(counts) for _ in range(count)]
    assert all(table[owner][expert] for expert, owner in enumerate(owners))


def test_only_language_routing_needs_languages():
    assert {name: rule.needs_language for name, rule in ROUTINGS.items() if name in ("learned", "language")} == {
        "learned": False,
        "language": True,
    }


def test_an_unknown_routing_is_told_the_known_ones():
    with pytest.raises(PlanError, match="Unknown routing 'random'.*learned.*language"):
        routing_named("random")


def test_weights_are_the_renormalised_probabilities_of_the_best():
    logits = torch.tensor([[0.0, math.log(3.0), math.log(4.0)]])  # p = (1, 3, 4) / 8
    routes = choose_experts(logits, 2)
    assert routes.indices_TK.tolist() == [[2, 1]]
    torch.testing.assert_close(routes.weights_TK, torch.tensor([[4 / 7, 3 / 7]]))
    torch.testing.assert_close(routes.probabilities_TE, torch.tensor([[1 / 8, 3 / 8, 4 / 8]]))


def test_softmax_runs_over_the_allowed_experts_alone():
    logits = torch.tensor([[100.0, 0.0, math.log(3.0)], [0.0, 100.0, 50.0]])
    allowed = torch.tensor([[False, True, True], [True, False, False]])
    routes = choose_experts(logits, 2, allowed)
    torch.testing.assert_close(routes.probabilities_TE, torch.tensor([[0.0, 0.25, 0.75], [1.0, 0.0, 0.0]]))
    assert routes.indices_TK.tolist() == [[2, 1], [0, 3]], "3 marks the slot that the second token cannot fill"
    torch.testing.assert_close(routes.weights_TK, torch.tensor([[0.75, 0.25], [1.0, 0.0]]))


@pytest.mark.parametrize("restricted", [False, True])
@pytest.mark.parametrize("top_k", [1, 2, 3, 9])
def test_weights_sum_to_one_over_distinct_allowed_experts(top_k, restricted):
    logits = torch.randn(50, 5) * 4
    allowed = torch.rand(50, 5) < 0.5 if restricted else torch.ones(50, 5, dtype=torch.bool)
    allowed[:, 0] |= ~allowed.any(dim=1)
    routes = choose_experts(logits, top_k, allowed if restricted else None)
    torch.testing.assert_close(routes.weights_TK.sum(-1), torch.ones(50))
    torch.testing.assert_close(routes.probabilities_TE.sum(-1), torch.ones(50))
    for token in range(50):
        used = [i for i in routes.indices_TK[token].tolist() if i < 5]
        assert len(set(used)) == len(used) == min(top_k, int(allowed[token].sum()))
        assert all(allowed[token, used])
        assert routes.weights_TK[token, len(used) :].tolist() == [0.0] * (routes.indices_TK.shape[1] - len(used))


def test_a_single_choice_weighs_exactly_one():
    assert torch.equal(choose_experts(torch.randn(100, 6) * 10, 1).weights_TK, torch.ones(100, 1))


def test_the_choice_is_made_in_fp32():
    routes = choose_experts(torch.randn(4, 3, dtype=torch.bfloat16), 2)
    assert routes.weights_TK.dtype == routes.probabilities_TE.dtype == torch.float32
