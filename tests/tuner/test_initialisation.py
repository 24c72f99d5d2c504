"""Experts from dense checkpoints: they hold what the checkpoint has in their place, or nothing changes."""

import pytest
import torch

from builders import HIDDEN, logits, moe_layers, perturbed, pico, token_batch, upcycle
from peft_moe_delta.errors import CheckpointError, PlanError

TOKENS = token_batch()


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "gpt_neox", "bloom"])
def test_an_expert_alone_computes_as_the_checkpoint_with_the_base_models_rest(family, tmp_path):
    base, other = pico(family), pico(family, seed=3)
    other.save_pretrained(tmp_path)
    expected = pico(family)
    with torch.no_grad():
        for (name, parameter), theirs in zip(expected.named_parameters(), other.parameters(), strict=True):
            if ".mlp." in name:
                parameter.copy_(theirs)
    model = upcycle(base, routing="language")
    model.load_experts({"turkic": tmp_path})
    torch.testing.assert_close(logits(model, TOKENS, language="az"), logits(expected, TOKENS), atol=5e-5, rtol=0)
    for layer in moe_layers(model):  # the other group's expert is still a copy of the base MLP
        own = dict(layer.base_layer.named_parameters())
        assert all(torch.equal(tensor, own[name]) for name, tensor in layer.expert_weights("default", 1).items())


def test_a_group_takes_one_checkpoint_for_all_its_experts_or_one_each():
    base = pico()
    states = [perturbed(base, seed).state_dict() for seed in (31, 32)]
    model = upcycle(base)
    model.load_experts({"uralic": states, "turkic": states[1]})
    for index, layer in enumerate(moe_layers(model)):
        for expert, state in zip((1, 2, 3), (states[0], states[1], states[1]), strict=True):
            for name, tensor in layer.expert_weights("default", expert).items():
                assert torch.equal(tensor, state[f"model.layers.{index}.mlp.{name}"])


def test_a_checkpoint_of_the_bare_backbone_is_read(tmp_path):
    other = pico(seed=3)
    other.model.save_pretrained(tmp_path)
    model = upcycle(pico())
    model.load_experts({"turkic": tmp_path})
    loaded = moe_layers(model)[1].expert_weights("default", 3)
    assert torch.equal(loaded["up_proj.weight"], other.model.layers[1].mlp.up_proj.weight)


@pytest.mark.parametrize(
    ("changes", "given", "error", "message"),
    [
        ({}, {"nobody": {}}, PlanError, "groups with experts are uralic, turkic"),
        ({}, {"original": {}}, PlanError, "Expert 0 is the base model's own"),
        ({}, {"uralic": [{}, {}, {}]}, PlanError, "3 checkpoints.*has 2 experts"),
        ({"expert_rank": 2}, {"uralic": {}}, PlanError, "Low-rank experts cannot"),
        ({}, {"uralic": {"x": torch.zeros(1)}}, CheckpointError, "has no model.layers.0.mlp.gate_proj.weight.*holds x"),
        ({}, {"uralic": "sizes"}, CheckpointError, rf"in shape \(64, {HIDDEN}\).*has \(48, {HIDDEN}\)"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_changes(changes, given, error, message):
    model = upcycle(pico(), **changes)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if given == {"uralic": "sizes"}:
        given = {"uralic": pico(intermediate_size=64).state_dict()}
    with pytest.raises(error, match=message):
        model.load_experts(given)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
