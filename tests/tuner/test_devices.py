"""No operation mixes devices, and what runs on another one gives the CPU's values. The device here is pretended."""

from __future__ import annotations

import pytest
import torch

from builders import pico, token_batch, upcycle
from peft_moe_delta.mixing.statistics import RouterStatistics
from pretend import DEVICE, pretending
from reading import mixed, reader

KINDS = {
    "learned": {},
    "language": {"routing": "language"},
    "classifier": {"routing": "classifier", "classifier_layers": [0]},
    "attention": {"attention_experts": "shared_kv"},
}


def in_eager(model):
    """The same model with attention in plain operations, as there are no kernels for the pretended device."""
    (model.get_base_model() if hasattr(model, "get_base_model") else model).set_attn_implementation("eager")
    return model


def eager():
    return in_eager(pico())


def batch():
    tokens = token_batch()
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    return {"input_ids": tokens, "attention_mask": mask}


def moved(pretend, arguments):
    return {name: pretend.put(value) if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_pass_gives_the_values_of_the_cpu(kind):
    model = upcycle(eager(), trained=True, **KINDS[kind])
    arguments = {**batch(), "language_ids": torch.tensor([0, 1, 3])}
    with torch.no_grad():
        expected = model(**arguments).logits
        with pretending(model) as pretend:
            found = model(**moved(pretend, arguments)).logits
            assert found.device == DEVICE
            torch.testing.assert_close(pretend.read(found), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("stage", "kind"), [*(("expansion", kind) for kind in KINDS), ("review", "learned"), ("review", "classifier")]
)
def test_training_losses_are_computed_there(stage, kind):
    model = upcycle(eager(), trained=True, router_z_loss_coef=0.1, **KINDS[kind])
    if stage == "review":
        model.start_review()
    tokens = batch()
    arguments = {**tokens, "labels": tokens["input_ids"], "language_ids": torch.tensor([0, 1, 3])}
    model.train()
    expected = model(**arguments).loss.detach()
    with pretending(model) as pretend:
        found = model(**moved(pretend, arguments)).loss
        torch.testing.assert_close(pretend.read(found), expected, atol=1e-5, rtol=0)
    assert model.get_base_model()._moe_delta_context.read_statistics()


def test_languages_are_read_there_and_remembered():
    model, ids = in_eager(reader()), mixed()
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        with pretending(model) as pretend:
            first = model(input_ids=pretend.put(ids[:, :20]), use_cache=True)
            second = model(input_ids=pretend.put(ids[:, 20:]), past_key_values=first.past_key_values)
            torch.testing.assert_close(pretend.read(second.logits), expected[:, 20:], atol=1e-5, rtol=0)


def test_a_cache_that_began_with_embeddings_goes_on():
    model, ids = in_eager(reader()), mixed()
    with torch.no_grad(), pretending(model) as pretend:
        embedded = model.get_input_embeddings()(pretend.put(ids[:, :20]))
        cache = model(inputs_embeds=embedded, language="hu", use_cache=True).past_key_values
        assert model(input_ids=pretend.put(ids[:, 20:]), past_key_values=cache).logits.device == DEVICE


def test_ids_of_languages_may_stay_on_the_cpu():
    model, ids = upcycle(eager(), trained=True, routing="language"), torch.tensor([0, 1, 3])
    with torch.no_grad():
        expected = model(**batch(), language_ids=ids).logits
        with pretending(model) as pretend:
            found = model(**moved(pretend, batch()), language_ids=ids).logits
            torch.testing.assert_close(pretend.read(found), expected, atol=1e-5, rtol=0)


def test_statistics_from_a_file_take_sums_of_the_device():
    with pretending() as pretend:
        read = RouterStatistics({"router": torch.eye(2)}, {"router": {"uralic": torch.ones(2)}}, ["hu"])
        sums = pretend.put(torch.ones(2, 2)), pretend.put(torch.ones(2))
        read.add("az", "turkic", {"router": sums}, 2.0)
        assert pretend.read(read.A["router"]).tolist() == [[1.5, 0.5], [0.5, 1.5]]
        assert {column.device for column in read.b["router"].values()} == {DEVICE}
