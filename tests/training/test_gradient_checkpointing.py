"""Gradient checkpointing runs a layer again when its forward pass is over: with the same languages, counted once."""

from contextlib import contextmanager

import pytest
import torch
from peft import get_peft_model

from builders import moe_config, pico, token_batch, upcycle
from peft_moe_delta.errors import PeftMoeDeltaError
from training.common import assert_equal, checkpoint, context_of, expert_model, gradients

TOKENS = token_batch(4, 6)
IDS = {"mixed": torch.tensor([0, 1, 2, 3]), "Finnish": torch.full((4,), 2), "English": torch.full((4,), 1)}
MASK = torch.ones_like(TOKENS)
MASK[0, 4:] = 0


def loss(model, languages):
    batch = {"input_ids": TOKENS, "labels": TOKENS.where(MASK.bool(), -100), "attention_mask": MASK}
    return model(**batch, language_ids=IDS[languages], use_cache=False).loss


@pytest.mark.parametrize("languages", IDS)
@pytest.mark.parametrize("stage", ["expansion", "review"])
@pytest.mark.parametrize("routing", ["learned", "language"])
def test_gradients_and_statistics_are_the_same(routing, stage, languages):
    found = []
    for checkpointing in (False, True):
        model = expert_model(routing=routing, stage=stage, base={"num_hidden_layers": 3})
        if checkpointing:
            checkpoint(model, use_reentrant=False)
        value = loss(model, languages)
        if value.requires_grad:  # under hard routing English trains nothing in expansion
            value.backward()
        found.append((gradients(model), context_of(model).read_statistics(), value.detach()))
    assert_equal(found[1][0], found[0][0])
    assert found[1][1:] == found[0][1:]


@pytest.mark.parametrize("routing", ["learned", "language"])
def test_two_forward_passes_before_one_backward_pass(routing):
    found = []
    for checkpointing in (False, True):
        model = expert_model(routing=routing)
        if checkpointing:
            checkpoint(model, use_reentrant=False)
        (loss(model, "mixed") + 3 * loss(model, "Finnish")).backward()
        found.append(gradients(model))
    assert_equal(found[1], found[0])


@pytest.mark.parametrize("arguments", [{"use_reentrant": True}, {}])
def test_reentrant_checkpointing_is_refused(arguments):
    """`{}`: what torch falls back to where the caller says nothing."""
    model = expert_model()
    checkpoint(model, **arguments)
    with pytest.raises(PeftMoeDeltaError, match=r'"use_reentrant": False'):
        loss(model, "mixed")


def test_a_user_s_own_contexts_are_entered():
    entered = []

    @contextmanager
    def note(name):
        entered.append(name)
        yield

    expected = expert_model()
    loss(expected, "mixed").backward()
    model = expert_model()
    checkpoint(model, use_reentrant=False, context_fn=lambda: (note("forward"), note("again")))
    loss(model, "mixed").backward()
    assert entered == ["forward", "forward", "again", "again"]
    assert_equal(gradients(model), gradients(expected))


def test_a_model_that_was_unloaded_and_upcycled_again_uses_its_own_languages():
    base = pico()
    first = upcycle(base, trained=True, routing="language").train()
    checkpoint(first, use_reentrant=False)
    loss(first, "mixed").backward()
    plain = first.unload().requires_grad_(True)
    plain(input_ids=TOKENS, labels=TOKENS).loss.backward()  # nobody's languages
    torch.manual_seed(1)
    second = get_peft_model(plain, moe_config(routing="language")).train()
    loss(second, "Finnish").backward()
    found = gradients(second)
    for module in second.modules():
        module.__dict__.pop("gradient_checkpointing", None)
    second.zero_grad()
    loss(second, "Finnish").backward()
    assert_equal(found, gradients(second))
