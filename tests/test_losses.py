"""The routers' two losses against values and gradients worked by hand, and the prior loss doing its job on a toy."""

import itertools
import math

import pytest
import torch
from torch import nn

from builders import VOCABULARY, alike, moe_layers, pico, token_batch, upcycle
from peft_moe_delta.losses import classifier_loss, language_prior_loss, load_balancing_loss

LOG3 = math.log(3.0)


def prior(logits, targets, counted=None):
    logits = torch.as_tensor(logits)
    counted = [True] * len(logits) if counted is None else counted
    loss = language_prior_loss(
        logits_TE=logits, targets_TE=torch.tensor(targets, dtype=torch.bool), counted_T=torch.tensor(counted)
    )
    return loss.total(), loss.tokens


@pytest.mark.parametrize(
    ("logits", "targets", "expected"),
    [
        ([[0.0, LOG3]], [[1, 0]], math.log(4)),  # p = (1/4, 3/4)
        ([[0.0, LOG3]], [[0, 1]], math.log(4 / 3)),
        ([[0.0, 0.0, LOG3]], [[1, 0, 1]], math.log(5 / 4)),  # a set: p = 1/5 + 3/5
        ([[0.0, LOG3]], [[1, 1]], 0.0),  # every expert will do
        ([[-200.0, 0.0]], [[1, 0]], 200.0),  # one softmax: a second one would bound the loss by log(1 + e)
        ([[0.0, LOG3], [LOG3, 0.0]], [[1, 0], [1, 0]], math.log(4) + math.log(4 / 3)),
    ],
)
def test_prior_loss_by_hand(logits, targets, expected):
    loss, tokens = prior(logits, targets)
    assert loss.item() == pytest.approx(expected, abs=1e-5)
    assert tokens.item() == len(logits)
    assert loss.dtype == tokens.dtype == torch.float32


@pytest.mark.parametrize(("targets", "counted"), [([[0, 0]] * 2, None), ([[1, 0]] * 2, [False, False])])
def test_prior_loss_without_a_token_to_speak_for_is_zero_with_zero_gradient(targets, counted):
    logits = torch.randn(2, 2, requires_grad=True)
    loss, tokens = prior(logits, targets, counted)
    loss.backward()
    assert (loss.item(), tokens.item()) == (0.0, 0.0)
    assert torch.equal(logits.grad, torch.zeros(2, 2))


def test_prior_loss_leaves_padding_and_untargeted_tokens_out():
    logits = torch.randn(4, 3)
    targets = [[1, 0, 0], [1, 0, 0], [0, 0, 0], [0, 1, 1]]
    loss, tokens = prior(logits, targets, [True, False, True, True])
    alone = [prior(logits[t : t + 1], targets[t : t + 1])[0] for t in (0, 3)]
    assert loss.item() == pytest.approx(sum(alone).item(), rel=1e-6)
    assert tokens.item() == 2


def test_prior_loss_gradient_is_softmax_minus_softmax_within_the_target():
    logits = torch.randn(5, 4, requires_grad=True)
    targets = torch.tensor([[1, 0, 0, 0], [0, 1, 1, 0], [0, 0, 0, 1], [1, 1, 0, 0], [0, 1, 1, 1]], dtype=torch.bool)
    prior(logits, targets.tolist())[0].backward()
    within = logits.detach().masked_fill(~targets, -torch.inf).softmax(-1)
    torch.testing.assert_close(logits.grad, logits.detach().softmax(-1) - within)


def published_prior(logits, targets):
    """MoE-LPR's code: a cross-entropy, which applies a softmax of its own, of probabilities."""
    return nn.functional.cross_entropy(logits.softmax(-1), targets)


@pytest.mark.parametrize("published", [False, True])
def test_prior_loss_teaches_a_router_to_tell_separable_languages_apart(published, holds):
    """Within 200 steps to under 0.05; the published double softmax stays above log(1 + 2/e) = 0.55 with 3 experts."""
    centre = torch.randn(16)
    x_TD = torch.randn(64, 16) * 0.5 + torch.where(torch.arange(64)[:, None] < 32, centre, -centre)
    targets = torch.tensor([0] * 32 + [2] * 32)
    router = nn.Linear(16, 3, bias=False)
    optimiser = torch.optim.AdamW(router.parameters(), lr=0.05)
    losses = []
    for _ in range(200):
        loss, tokens = prior(router(x_TD), nn.functional.one_hot(targets, 3).tolist())
        mean = published_prior(router(x_TD), targets) if published else loss / tokens
        losses.append(mean.item())
        optimiser.zero_grad()
        mean.backward()
        optimiser.step()
    holds(losses[0], above=0.3, name="at first")
    if published:
        holds(losses[-1], above=0.55, name="published")
    else:
        holds(losses[-1], below=0.05, name="ours")


def test_double_softmax_starves_badly_routed_tokens_of_gradient():
    """At p_0 = 0.002 of 4 experts: 0.998 against 0.0024 (the derivative by the target's logit)."""
    rest = math.log(0.998 / 3 / 0.002)
    for ours, expected in ((True, 0.998), (False, 0.0024)):
        logits = torch.tensor([[0.0, rest, rest, rest]], requires_grad=True)
        loss = prior(logits, [[1, 0, 0, 0]])[0] if ours else published_prior(logits, torch.tensor([0]))
        loss.backward()
        assert -logits.grad[0, 0].item() == pytest.approx(expected, rel=0.5 if not ours else 1e-3)


def classify(logits, original, counted=None):
    loss = classifier_loss(
        logits_T=torch.tensor(logits),
        original_T=torch.tensor(original),
        counted_T=torch.tensor([True] * len(logits) if counted is None else counted),
    )
    return loss.total(), loss.tokens


def test_classifier_loss_by_hand():
    loss, tokens = classify([LOG3, LOG3, 0.0, 50.0], [True, False, True, False], [True, True, True, False])
    # Two original tokens weigh 3/4 each, the other one 3/2.
    assert loss.item() == pytest.approx(0.75 * (math.log(4 / 3) + math.log(2)) + 1.5 * math.log(4), abs=1e-5)
    assert tokens.item() == 3


@pytest.mark.parametrize("original", [True, False])
def test_classifier_loss_of_one_answer_alone_is_the_plain_sum(original):
    loss, tokens = classify([0.0, 0.0], [original] * 2)
    assert (loss / tokens).item() == pytest.approx(math.log(2))


def test_classifier_loss_is_zero_without_tokens():
    loss, tokens = classify([1.0], [True], [False])
    assert loss.item() == tokens.item() == 0


def test_classifier_loss_does_not_depend_on_how_much_there_is_of_either():
    """A gate that tells nothing apart ends at even odds, not at the odds of the mix."""
    bias = torch.zeros((), requires_grad=True)
    original = torch.tensor([True] + [False] * 9)
    counted = torch.ones(10, dtype=torch.bool)
    classifier_loss(logits_T=bias.expand(10), original_T=original, counted_T=counted).total().backward()
    assert bias.grad.item() == pytest.approx(0.0, abs=1e-6)


def balance(probabilities, indices, sets=None, allowed=None, counted=None):
    probabilities = torch.as_tensor(probabilities)
    count, experts = probabilities.shape
    loss = load_balancing_loss(
        probabilities_TE=probabilities,
        indices_TK=torch.tensor(indices),
        sets_T=torch.tensor([0] * count if sets is None else sets),
        allowed_SE=torch.tensor([[True] * experts] if allowed is None else allowed),
        counted_T=torch.tensor([True] * count if counted is None else counted),
    )
    return loss.total(), loss.tokens


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("experts", [2, 3, 5])
def test_load_balancing_is_one_at_balance_and_the_number_of_experts_at_collapse(experts, top_k):
    even = torch.full((experts, experts), 1 / experts)
    turns = [[(token + rank) % experts for rank in range(top_k)] for token in range(experts)]
    total, tokens = balance(even, turns)
    assert (total / tokens).item() == pytest.approx(1.0)
    collapsed = nn.functional.one_hot(torch.zeros(7, dtype=torch.int64), experts).float()
    total, tokens = balance(collapsed, [[0]] * 7)
    assert (total / tokens).item() == pytest.approx(experts)
    assert tokens.item() == 7


def test_load_balancing_by_hand():
    # f = (3/4, 1/4), P = (0.6, 0.4): L = 2 (0.45 + 0.1) = 1.1, over 4 tokens
    total, tokens = balance([[0.9, 0.1], [0.6, 0.4], [0.7, 0.3], [0.2, 0.8]], [[0], [0], [0], [1]])
    assert (total.item(), tokens.item()) == (pytest.approx(4 * 1.1), 4.0)


def test_load_balancing_counts_first_choices_where_a_token_uses_every_expert():
    # Top-2 of two: shares by rank would be halves whatever the router says. P = (0.7, 0.3), first choices (3/4, 1/4).
    probabilities = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.4, 0.6]], requires_grad=True)
    total, tokens = balance(probabilities, [[0, 1], [0, 1], [0, 1], [1, 0]])
    assert (total / tokens).item() == pytest.approx(2 * (0.75 * 0.7 + 0.25 * 0.3))
    total.backward()
    torch.testing.assert_close(probabilities.grad, torch.tensor([[1.5, 0.5]]).expand(4, 2))


def test_load_balancing_is_within_each_set_and_skips_sets_of_one():
    # Set 0: expert 0 alone, nothing to balance. Set 1: experts 1 and 2, the hand-worked case. Set 2: 0 and 3, balanced.
    allowed = [[True, False, False, False], [False, True, True, False], [True, False, False, True]]
    first = [[1.0, 0, 0, 0]] * 3
    second = [[0, 0.9, 0.1, 0], [0, 0.6, 0.4, 0], [0, 0.7, 0.3, 0], [0, 0.2, 0.8, 0]]
    third = [[0.5, 0, 0, 0.5]] * 2
    total, tokens = balance(
        first + second + third,
        [[0]] * 3 + [[1], [1], [1], [2]] + [[0], [3]],
        sets=[0] * 3 + [1] * 4 + [2] * 2,
        allowed=allowed,
    )
    assert tokens.item() == 4 + 2
    assert total.item() == pytest.approx(4 * 1.1 + 2 * 1.0)


def test_load_balancing_skips_unused_slots_and_padding():
    # Top-3 of a set of two: the third slot holds E = 3, "not used". The last token is padding.
    probabilities = [[0.5, 0.5, 0.0], [0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]
    indices = [[0, 1, 3], [1, 0, 3], [0, 1, 3]]
    total, tokens = balance(probabilities, indices, allowed=[[True, True, False]], counted=[True, True, False])
    assert (total.item(), tokens.item()) == (pytest.approx(2.0), 2.0)


def test_load_balancing_of_nothing_is_zero():
    total, tokens = balance([[1.0, 0.0]], [[0]], counted=[False])
    assert (total.item(), tokens.item()) == (0.0, 0.0)


def test_load_balancing_gradient_flows_through_the_probabilities_alone():
    probabilities = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.7, 0.3], [0.2, 0.8]], requires_grad=True)
    total, _ = balance(probabilities, [[0], [0], [0], [1]])
    total.backward()
    # n L = |A| sum_e f_e sum_t p_te with f = (3/4, 1/4)
    torch.testing.assert_close(probabilities.grad, torch.tensor([[1.5, 0.5]]).expand(4, 2))


@pytest.mark.parametrize("routing", ["learned", "language", "classifier"])
def test_load_balancing_wherever_a_token_may_choose(routing, holds):
    """In a whole layer: a gradient that is not zero, and less for balanced than for collapsed routing."""
    base = alike(pico(), range(VOCABULARY))  # a direction that all tokens share
    model = upcycle(base, trained=True, routing=routing, experts={"uralic": 2, "turkic": 3}, classifier_layers=[0])
    model.start_expansion(load_balancing_coef=1.0)
    tokens, ids = token_batch(4, 12), torch.tensor([0, 2, 3, 3])
    layers = moe_layers(model)

    def figure():
        model.train()(input_ids=tokens, language_ids=ids, labels=tokens)
        return layers[0].context.read_statistics()["load_balancing_loss"]

    for layer in layers:
        layer.router("default").weight.data *= 0.01
    balanced = figure()
    for layer in layers:
        rows = layer.router("default").weight.data
        rows[[0, 1, 3]] = rows[[0, 1, 3]] + layer_direction(model, layer, tokens)
    collapsed = figure()
    holds(balanced, below=1.3, name="balanced")
    holds(collapsed, above=1.3, name="collapsed")
    model.zero_grad()
    auxiliary = model.train()(input_ids=tokens, language_ids=ids, labels=tokens).loss
    auxiliary.backward()
    assert all(layer.router("default").weight.grad.abs().max() > 0 for layer in layers)


def layer_direction(model, layer, tokens):
    """The direction that most of a layer's tokens share."""
    seen = []
    hook = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    with torch.no_grad():
        model.eval()(input_ids=tokens, language="hu")
    hook.remove()
    return seen[0].flatten(0, 1).mean(0)


@pytest.mark.parametrize("tokens", [[0, 40], [0, 10, 40], [0, 1, 2, 40]], ids=str)
def test_parts_weighed_by_the_joint_counts_add_up_to_the_loss_of_all(tokens):
    """What processes do: the losses of parts are those of the whole where the counts are, and are not by themselves."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(40, 4, generator=generator)
    probabilities, indices = logits.softmax(-1), logits.topk(2).indices
    sets = torch.randint(2, (40,), generator=generator)
    allowed = torch.tensor([[True, True, True, False], [True, False, True, True]])
    counted = torch.rand(40, generator=generator) < 0.8

    def losses(part):
        return (
            classifier_loss(logits_T=logits[part, 0], original_T=sets[part] == 0, counted_T=counted[part]),
            load_balancing_loss(
                probabilities_TE=probabilities[part],
                indices_TK=indices[part],
                sets_T=sets[part],
                allowed_SE=allowed,
                counted_T=counted[part],
            ),
        )

    parts = [losses(slice(a, b)) for a, b in itertools.pairwise(tokens)]
    for whole, *of_parts in zip(losses(slice(None)), *parts, strict=True):
        counts = torch.stack([part.counts for part in of_parts]).sum(dim=0)
        torch.testing.assert_close(sum(part.total(counts) for part in of_parts), whole.total())
        if len(parts) > 1:
            assert abs(sum(part.total() for part in of_parts) - whole.total()) > 1e-3
