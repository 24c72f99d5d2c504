"""Experts that keep less for the backward pass: same results, less kept, and the plain way where that does not fit."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from bench_activations import kept_bytes
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from builders import FAMILIES, moe_layers, pico, token_batch, upcycle
from peft_moe_delta.tuner.lean import can_be_lean, run_lean
from peft_moe_delta.tuner.passes import ForwardState

KINDS = {"full": {}, "low rank": {"expert_rank": 2}}
NO_DROPOUT = {"gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}}
OTHERS = ("bloom", "mpt", "falcon")  # two add the residual, one has linear maps of its own


def computed(model, autocast=False):
    """Logits and gradients of a training pass, auxiliary losses included."""
    tokens = token_batch()
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = model(input_ids=tokens, labels=tokens, language_ids=torch.tensor([0, 1, 3]))
    output.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": output.logits.detach(), **gradients}


def plain(model):
    """The model with experts that keep everything, as autograd has it."""
    for layer in moe_layers(model):
        layer._lean = False
    return model


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_computed_again_is_what_was_computed(family, kind, autocast):
    model = upcycle(pico(family, **NO_DROPOUT.get(family, {})), trained=True, **kind).train()
    assert all(layer._lean == (family not in OTHERS) for layer in moe_layers(model))
    found, expected = computed(model, autocast), computed(plain(model), autocast)
    assert found.keys() == expected.keys()
    rounding = {"atol": 2e-2, "rtol": 2e-2} if autocast and kind else {"atol": 1e-6, "rtol": 1e-5}
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, **rounding, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_two_experts_a_token_keep_at_most_one_and_a_half_times_what_the_mlp_keeps(implementation):
    model = upcycle(pico(intermediate_size=112), top_k=2, experts={"uralic": 2, "turkic": 1}).train()
    model.base_model.set_experts_implementation(implementation)
    layer = moe_layers(model)[0]
    x = torch.randn(1, 64, 32, requires_grad=True)
    mlp = copy.deepcopy(layer.base_layer).requires_grad_()
    dense = kept_bytes(mlp, mlp, x)
    hungarian = torch.zeros(1, 64, dtype=torch.int64)

    def run(x):
        grouped = implementation == "grouped_mm"
        layer.context.current = ForwardState((1, 64), language_ids=hungarian, recording=True, grouped=grouped)
        return layer(x)

    assert kept_bytes(layer, run, x) <= 1.5 * dense


def test_in_a_checkpoint_nothing_of_an_expert_is_kept():
    expert, x = pico().model.layers[0].mlp, torch.randn(6, 32, requires_grad=True)
    expected = torch.autograd.grad(expert(x).square().sum(), [x, *expert.parameters()])
    in_checkpoint = lambda x: checkpoint(lambda x: run_lean(expert, x), x, use_reentrant=False)  # noqa: E731
    assert kept_bytes(expert, in_checkpoint, x) <= x.untyped_storage().nbytes()
    found = torch.autograd.grad(in_checkpoint(x).square().sum(), [x, *expert.parameters()])
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
def test_a_checkpoint_computes_the_first_maps_again_and_no_other(autocast):
    expert, x = pico().model.layers[0].mlp, torch.randn(6, 32, requires_grad=True)

    def operations(run):
        with FlopCounterMode(display=False) as counted, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            run(x).sum().backward()
        return counted.get_total_flops()

    first = 2 * 6 * 32 * 48 * 2  # gate and up
    again = operations(lambda x: checkpoint(lambda x: run_lean(expert, x), x, use_reentrant=False))
    assert again - operations(lambda x: run_lean(expert, x)) == first
    assert operations(lambda x: run_lean(expert, x)) == operations(expert)


def test_whoever_watches_an_expert_sees_it_run():
    expert, x, seen = pico().model.layers[0].mlp, torch.randn(6, 32, requires_grad=True), []

    class Watch(ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            seen.append(module)
            return args, kwargs

    add_hook_to_module(expert.down_proj, Watch())
    run_lean(expert, x).sum().backward()
    assert seen == [expert.down_proj]


class Own(nn.Module):
    """An MLP of somebody else's; `what` is done beside its two maps."""

    def __init__(self, what):
        super().__init__()
        self.up, self.down, self.what = nn.Linear(8, 8), nn.Linear(8, 8), what
        self.more, self.dropout = nn.Linear(8, 8), nn.Dropout(0.1 if what == "chance" else 0.0)

    def forward(self, x):
        h = self.up(x).relu()
        if self.what == "input":
            h = h * x
        if self.what == "three":
            h = self.more(h).relu()
        y = self.dropout(self.down(h))
        return y * 2 if self.what == "scale" else y


@pytest.mark.parametrize("what", ["input", "three", "scale", "chance", "nothing"])
def test_code_of_another_form_runs_as_it_is(what):
    assert can_be_lean(Own(what)) == (what == "nothing")
