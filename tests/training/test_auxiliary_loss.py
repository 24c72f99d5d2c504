"""The loss a training pass returns: next-token loss plus the routers' losses, worked out here token by token."""

import math
import warnings

import pytest
import torch
from torch.nn import functional as F

from builders import LANGUAGES, moe_layers, token_batch
from peft_moe_delta import LanguageCollator
from peft_moe_delta.errors import LanguageError
from training.common import (
    GradientRecorder,
    assert_equal,
    context_of,
    documents,
    expert_model,
    gradients,
    make_tokenizer,
    train,
)

OWN = {"original": [0], "uralic": [1, 2], "turkic": [3]}
MIXED = documents([7, 5, 3, 6], ["en", "hu", "az", "fi"])
NEW = documents([7, 5, 3, 6], ["hu", "az", "fi"])


def run(model, batch):
    """Output, next-token loss, and for each layer and counted token: its group and its fp32 router probabilities."""
    inputs = {}
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, i=i: inputs.__setitem__(i, args[0].detach()))
        for i, layer in enumerate(moe_layers(model))
    ]
    output = model(**batch)
    for hook in hooks:
        hook.remove()
    next_token = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    codes = [list(LANGUAGES)[i] for i in batch["language_ids"].amax(dim=1)]
    counted = [(b, s) for b, s in torch.nonzero(batch["attention_mask"]).tolist()]
    layers = []
    for i, layer in enumerate(moe_layers(model)):
        logits = inputs[i] @ layer.moe_delta_router["default"].weight.T
        layers.append([(LANGUAGES[codes[b]], logits[b, s]) for b, s in counted])
    return output, next_token.item(), layers


def balance(tokens, top_k, sets):
    """Token-weighted mean of `|A| sum_e f_e P_e` over sets of more than one expert; the others weigh in with 0."""
    total = 0.0
    for groups, experts in sets:
        own = [logits[experts].softmax(-1) for group, logits in tokens if group in groups]
        if len(experts) == 1 or not own:
            continue
        k = top_k if top_k < len(experts) else 1  # where all are used anyway, first choices count
        chosen = [e for p in own for e in p.topk(k).indices.tolist()]
        shares = [chosen.count(e) / len(chosen) for e in range(len(experts))]
        means = torch.stack(own).mean(0).tolist()
        total += len(own) * len(experts) * sum(f * p for f, p in zip(shares, means, strict=True))
    return total / len(tokens)


def prior(tokens, targets):
    """`-log sum_{e in target} p(e)`, summed over the tokens that have a target, over all tokens."""
    losses = [-math.log(sum(logits.softmax(-1)[targets[g]].tolist())) for g, logits in tokens if g in targets]
    return sum(losses) / len(tokens)


def batch_of(model, data, side="right"):
    return LanguageCollator(make_tokenizer(padding_side=side), model)(data)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    ("routing", "top_k"), [("learned", 1), ("learned", 2), ("learned", 3), ("language", 1), ("language", 2)]
)
def test_expansion_adds_load_balancing(routing, top_k, side):
    model = expert_model(routing=routing, top_k=top_k)
    output, next_token, layers = run(model, batch_of(model, MIXED, side))
    sets = [(list(OWN), [0, 1, 2, 3])] if routing == "learned" else [([g], own) for g, own in OWN.items()]
    expected = sum(balance(tokens, top_k, sets) for tokens in layers) / len(layers)
    assert expected > 0.3
    assert output.loss.item() == pytest.approx(next_token + 0.01 * expected, abs=1e-6)


@pytest.mark.parametrize("routing", ["learned", "language"])
def test_review_adds_the_prior_on_original_languages(routing):
    model = expert_model(routing=routing)
    model.start_review()
    output, next_token, layers = run(model, batch_of(model, MIXED))
    expected = sum(prior(tokens, {"original": [0]}) for tokens in layers) / len(layers)
    assert expected > 0.3
    assert output.loss.item() == pytest.approx(next_token + 0.1 * expected, abs=1e-6)


@pytest.mark.parametrize("data", [MIXED, NEW[:1]], ids=["mixed", "Hungarian"])
def test_the_mean_is_over_the_same_layers_whoever_is_in_the_batch(data):
    """With one Uralic expert in the first layer and two in the second, only the second has anything to balance: it
    alone is averaged over, and that in a batch without Uralic text, too."""
    model = expert_model(routing="language", experts={"uralic": [1, 2], "turkic": 1})
    output, next_token, layers = run(model, batch_of(model, data))
    expected = balance(layers[1], 2, [(["original"], [0]), (["uralic"], [1, 2]), (["turkic"], [3])])
    assert expected > 0.4
    assert output.loss.item() == pytest.approx(next_token + 0.01 * expected, abs=1e-6)


def test_prior_in_expansion_classifies_every_group():
    """DMoE's first stage."""
    model = expert_model(routing="language")
    model.start_expansion(load_balancing_coef=0.0, language_prior_coef=1.28)
    output, next_token, layers = run(model, batch_of(model, MIXED))
    expected = sum(prior(tokens, OWN) for tokens in layers) / len(layers)
    assert output.loss.item() == pytest.approx(next_token + 1.28 * expected, abs=1e-5)


def test_both_coefficients_at_once():
    model = expert_model(load_balancing_coef=0.5, language_prior_coef=0.25, stage="review")
    output, next_token, layers = run(model, batch_of(model, MIXED))
    sets = [(list(OWN), [0, 1, 2, 3])]
    expected = sum(0.5 * balance(t, 2, sets) + 0.25 * prior(t, {"original": [0]}) for t in layers) / len(layers)
    assert output.loss.item() == pytest.approx(next_token + expected, abs=1e-6)


@pytest.mark.parametrize("stage", ["expansion", "review"])
@pytest.mark.parametrize("mode", ["eval", "no_grad"])
def test_nothing_is_added_outside_of_training(stage, mode):
    model = expert_model(stage=stage).train(mode == "no_grad")
    with torch.no_grad():
        output, next_token, _ = run(model, batch_of(model, MIXED))
    assert output.loss.item() == pytest.approx(next_token, abs=1e-6)


@pytest.mark.parametrize("routing", ["learned", "language"])
def test_review_without_an_original_token_adds_zero(routing):
    model = expert_model(routing=routing)
    model.start_review()
    batch = batch_of(model, NEW)
    output, next_token, _ = run(model, batch)
    assert output.loss.item() == pytest.approx(next_token, abs=1e-6)
    output.loss.backward()
    found = gradients(model)
    model.start_review(language_prior_coef=0.0)
    model.zero_grad()
    output = model(**batch)
    if output.loss.requires_grad:  # hard routing without the prior trains nothing here
        output.loss.backward()
    assert all(gradient.isfinite().all() for gradient in found.values())
    assert_equal({n: found[n] for n in gradients(model)}, gradients(model), 1e-7)


def test_review_without_languages_is_an_error():
    model = expert_model(stage="review")
    tokens = token_batch()
    with pytest.raises(LanguageError, match="LanguageCollator"):
        model(input_ids=tokens, labels=tokens)


def test_a_training_pass_without_labels_warns_and_keeps_the_loss():
    model = expert_model()
    batch = batch_of(model, MIXED)
    complete, next_token, _ = run(model, batch)
    del batch["labels"]
    with pytest.warns(UserWarning, match=r"model\.auxiliary_loss"):
        model(**batch)
    assert model.auxiliary_loss.item() == pytest.approx(complete.loss.item() - next_token, abs=1e-6)
    model.auxiliary_loss.backward()
    assert any(g.abs().sum() > 0 for name, g in gradients(model).items() if "router" in name)
    with warnings.catch_warnings(action="error"), torch.no_grad():
        model.eval()(**batch)
    assert model.auxiliary_loss is None


ACCUMULATION = {
    "equal": documents([6, 6, 6, 6], ["en", "hu", "en", "az"]),
    "unequal": documents([3, 9, 5, 7], ["en", "hu", "en", "az"]),
    "originals in one half": documents([3, 9, 4, 8], ["en", "en", "hu", "az"]),
}
"""Four documents; whichever two come first, both halves have about as many targets to a token."""


@pytest.mark.parametrize("data", ACCUMULATION.values(), ids=ACCUMULATION)
def test_gradient_accumulation_adds_up(tmp_path, data):
    """A step on one batch of 4 equals two of 2; the coefficient is large, so that the prior dominates the gradient."""
    steps = []
    for size in (4, 2):
        recorder = GradientRecorder()
        accumulation = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 4 // size}
        model = expert_model(stage="review", language_prior_coef=10.0)
        train(model, data, tmp_path, callbacks=[recorder], max_grad_norm=0.0, **accumulation)
        steps += recorder.steps
    assert len(steps) == 2
    assert_equal(steps[1], steps[0], 1e-5)
    without = expert_model(stage="review", language_prior_coef=0.0)
    without(**batch_of(without, data)).loss.backward()
    assert all((steps[0][name] - gradient).norm() > gradient.norm() for name, gradient in gradients(without).items())


def auxiliary(model, batch):
    """The auxiliary loss of one training pass."""
    with context_of(model).collect(1.0) as collected:
        model.train()(**batch)
    return collected[0].item()


def masked(batch, count):
    """The same batch with its first `count` tokens no targets, as prompts are in completion-only training."""
    labels = batch["labels"].clone()
    labels.view(-1)[:count] = -100
    return {**batch, "labels": labels}


LOSSES = {
    "balance": {"load_balancing_coef": 1.0},
    "prior": {"stage": "review", "language_prior_coef": 1.0},
    "z-loss": {"load_balancing_coef": 0.0, "router_z_loss_coef": 1.0},
    "gate": {"stage": "review", "routing": "classifier", "classifier_layers": [0, 1], "language_prior_coef": 0.0},
}


@pytest.mark.parametrize("changes", LOSSES.values(), ids=LOSSES)
def test_auxiliary_losses_do_not_depend_on_what_is_masked(changes):
    """Of 32 tokens 0 to 31 are no target; routing, and what a router learns from it, is the same."""
    model = expert_model(**changes)
    batch = batch_of(model, documents([32], ["en"]))
    expected = auxiliary(model, batch)
    assert expected > 0.01
    for count in (0, 16, 28, 30, 32):
        step = masked(batch, count)
        items = step["labels"][:, 1:].ne(-100).sum()
        own = model.eval()(**step, num_items_in_batch=items.clamp(min=1)).loss
        total = model.train()(**step, num_items_in_batch=items.clamp(min=1)).loss
        assert (total - own).item() == pytest.approx(expected if items else 0.0, abs=1e-5)


def test_balanced_routing_costs_one_whatever_is_masked():
    model = expert_model(load_balancing_coef=1.0, trained=False)
    batch = batch_of(model, documents([32], ["hu"]))
    for layer in moe_layers(model):
        layer.router("default").weight.data *= 0.01
    for count in (0, 28):
        step = masked(batch, count)
        total = model.train()(**step, num_items_in_batch=step["labels"][:, 1:].ne(-100).sum()).loss
        assert (total - model.eval()(**step).loss).item() == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("counts", [(0, 0), (10, 2), (12, 5)], ids=str)
def test_a_pass_weighs_as_its_targets_do(counts):
    """Two passes of one step: shares by targets, which add up to 1, and nothing from a pass without any."""
    model = expert_model(load_balancing_coef=1.0)
    passes = [
        masked(batch_of(model, documents([12], [code], seed=seed)), count)
        for seed, (code, count) in enumerate(zip(("hu", "az"), counts, strict=True))
    ]
    items = [p["labels"][:, 1:].ne(-100).sum().item() for p in passes]
    for each, own in zip(passes, items, strict=True):
        expected = auxiliary(model, each) * own / sum(items)
        total = model(**each, num_items_in_batch=sum(items)).loss
        found = total - model.eval()(**each, num_items_in_batch=sum(items)).loss
        assert found.item() == pytest.approx(expected, abs=1e-5)
