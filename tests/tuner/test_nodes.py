"""Each node of a layer alone, between fake neighbours: router, choice, dispatch, experts, combination, idle parts.

Shape legend: T tokens, D hidden size, E experts, K chosen experts a token, R rows.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from builders import logits, moe_config, moe_layers, pico, token_batch, upcycle
from peft_moe_delta.errors import LanguageError
from peft_moe_delta.routing import Routes, choose_experts
from peft_moe_delta.tuner.context import ForwardContext
from peft_moe_delta.tuner.dispatch import Dispatch, with_idle
from peft_moe_delta.tuner.experts import Experts, LowRankLinear, parameters_of, unhooked
from peft_moe_delta.tuner.layer import MoeDeltaLayer
from peft_moe_delta.tuner.passes import ForwardState
from peft_moe_delta.tuner.router import Router
from peft_moe_delta.tuner.settings import LayerSettings

D = 4


class Times(nn.Module):
    """A fake expert: multiplies, and notes how many rows it was given."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor([[factor]]))
        self.rows: list[int] = []

    def forward(self, x):
        self.rows.append(len(x))
        return self.factor * x


class Says(Router):
    """A fake router: the same logits for every token, whatever it is."""

    def __init__(self, *logits: float) -> None:
        super().__init__(D, len(logits), torch.device("cpu"))
        self.says = torch.tensor(logits)

    def forward(self, x_TD):
        return self.says.expand(len(x_TD), -1)


def layer_of(*factors, says=None, **changes):
    """A layer whose experts multiply, expert 0 by the first number."""
    groups = [f"g{i}" for i in range(len(factors) - 1)]
    languages = {"en": "original", **{f"l{i}": group for i, group in enumerate(groups)}}
    config = moe_config(languages=languages, experts=dict.fromkeys(groups, 1), **changes)
    layer = MoeDeltaLayer(Times(factors[0]), ForwardContext())
    layer.add_experts("default", LayerSettings.build(config, (1,) * len(factors), 0), D)
    layer.set_adapter("default")
    layer.moe_delta_experts["default"] = Experts(map(Times, factors[1:]))
    layer.moe_delta_router["default"] = Says(*(says or [0.0] * len(factors)))
    return layer


def run(layer, x_TD, recording=False, **languages):
    layer.context.current = ForwardState((1, len(x_TD)), recording=recording, **languages)
    y_TD = layer(x_TD)
    state, layer.context.current = layer.context.current, None
    return y_TD, state


# -- dispatch and combination -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("unused", [False, True], ids=["all choices used", "some unused"])
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_rows_reach_their_experts_and_come_back_weighted(top_k, unused):
    T, E = 11, 5
    indices_TK = torch.stack([torch.randperm(E)[:top_k] for _ in range(T)])
    if unused:
        indices_TK[::3, -1] = E
    weights_TK = torch.rand(T, top_k).masked_fill(indices_TK == E, 0.0)
    routes, x_TD = Routes(indices_TK, weights_TK, torch.zeros(T, E), normalised=top_k == 2), torch.randn(T, D)
    dispatch = Dispatch.of(indices_TK, E)
    inputs = dispatch.rows(x_TD)
    assert dispatch.counts == tuple((indices_TK == e).sum().item() for e in range(E))
    for e, rows_RD in inputs.items():
        assert torch.equal(rows_RD, x_TD[(indices_TK == e).any(dim=1)]), "in the order of tokens"
    y_TD = dispatch.combine([(e + 1) * rows for e, rows in inputs.items()], x_TD, routes)
    factors_TK = torch.where(indices_TK == E, 0.0, indices_TK + 1.0)
    torch.testing.assert_close(y_TD, (weights_TK * factors_TK).sum(dim=1, keepdim=True) * x_TD)


def test_a_pass_on_one_expert_moves_no_row():
    x_TD = torch.randn(3, D)
    dispatch = Dispatch.to_one(2, 3)
    assert dispatch.rows(x_TD)[2] is x_TD and list(dispatch.rows(x_TD)) == [2]
    assert dispatch.combine([x_TD], x_TD, None) is x_TD


# -- the layer between a fake router and fake experts -----------------------------------------------------------------


def test_a_layer_weighs_what_its_experts_say():
    layer, x_TD = layer_of(1.0, 10.0, 100.0, says=[1.0, 3.0, 2.0]), torch.randn(6, D)
    p = torch.tensor([3.0, 2.0]).softmax(-1)
    torch.testing.assert_close(run(layer, x_TD)[0], (10 * p[0] + 100 * p[1]) * x_TD)
    assert layer.base_layer.rows == [], "nobody would notice"
    assert [expert.rows for expert in layer.experts("default")[1:]] == [[6], [6]]


def test_who_has_hooks_on_expert_0_hears_of_every_pass():
    layer = layer_of(1.0, 10.0, says=[1.0, 3.0], top_k=1)
    layer.base_layer.register_forward_hook(lambda *_: None)
    run(layer, torch.randn(6, D))
    assert layer.base_layer.rows == [0]


def test_a_layer_runs_nobody_but_the_experts_of_its_languages():
    layer, x_TD = layer_of(1.0, 10.0, 100.0, routing="language", top_k=1), torch.randn(4, D)
    y_TD, _ = run(layer, x_TD, language_ids=torch.tensor([[0, 2, 2, -100]]))
    torch.testing.assert_close(y_TD, torch.tensor([1.0, 100.0, 100.0, 1.0])[:, None] * x_TD)
    assert [expert.rows for expert in layer.experts("default")] == [[2], [], [2]]


@pytest.mark.parametrize("recording", [False, True])
def test_a_layer_without_a_choice_asks_no_router(recording):
    layer = layer_of(1.0, 10.0, routing="language", top_k=1)
    layer.router("default").register_forward_hook(lambda *_: pytest.fail("called"))
    _, state = run(layer.train(recording), torch.randn(2, D), recording, language_ids=torch.tensor([[0, 1]]))
    assert not state.places
    assert layer.context.read_statistics() == (
        {"expert_0_share/original": 1, "expert_0_share/g0": 0} if recording else {}
    )


def test_growth_steps_that_nobody_may_use_take_no_part_in_a_choice():
    logits_TE = torch.tensor([[0.3, 0.2, 9.0]])
    allowed_TE = torch.tensor([[True, True, False]])
    within = choose_experts(logits_TE, 2, allowed_TE)
    assert torch.equal(within.weights_TK, choose_experts(logits_TE[:, :2], 2).weights_TK)


# -- experts as one module --------------------------------------------------------------------------------------------


def test_experts_run_past_their_hooks_and_without_only_where_there_are_some():
    mlp = nn.Sequential(nn.Linear(D, D), nn.Dropout(0.5), nn.Linear(D, D)).eval()
    assert unhooked(mlp) is mlp
    mlp[0].register_forward_hook(lambda *_: pytest.fail("a hook ran"))
    mlp.register_forward_pre_hook(lambda *_: pytest.fail("a hook ran"))
    view, x = unhooked(mlp), torch.randn(2, D)
    expected = torch.nn.functional.linear(
        torch.nn.functional.linear(x, mlp[0].weight, mlp[0].bias), *mlp[2].parameters()
    )
    torch.testing.assert_close(view(x), expected)
    mlp[0].weight = nn.Parameter(torch.zeros(D, D))
    assert view[0].weight is mlp[0].weight, "a parameter that is replaced is replaced in both"
    assert [p for p in parameters_of(view)] == list(parameters_of(mlp)) == list(mlp.parameters())


def test_low_rank_experts_run_past_the_hooks_of_the_base_models_maps():
    frozen = nn.Linear(D, D)
    frozen.register_forward_hook(lambda *_: pytest.fail("a hook ran"))
    x = torch.randn(2, D)
    torch.testing.assert_close(LowRankLinear(frozen, 1)(x), frozen.forward(x))


def test_idle_parameters_get_zero_gradients_in_one_operation():
    class Count(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.calls += 1
            return function(*args, **(kwargs or {}))

    idle = [nn.Parameter(torch.randn(2, 3)) for _ in range(50)]
    idle[7].requires_grad_(False)
    y = torch.randn(4, D, requires_grad=True)
    with Count() as seen:
        out = with_idle(y, idle)
    assert seen.calls <= 3
    assert torch.equal(out, y)
    out.sum().backward()
    assert torch.equal(y.grad, torch.ones_like(y))
    assert idle.pop(7).grad is None
    assert all(torch.equal(p.grad, torch.zeros(2, 3)) for p in idle)
    assert with_idle(y, []) is y


def test_a_batch_that_nothing_trains_on_has_a_backward_pass():
    model = upcycle(pico(), routing="language").train()
    model(input_ids=token_batch(), labels=token_batch(), language="en").loss.backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


# -- how often the host waits -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "arguments", "waits"),
    [
        ({"routing": "language", "experts": {"uralic": 1, "turkic": 1}}, {"language_ids": torch.tensor([0, 1, 3])}, 2),
        ({"routing": "language"}, {"language_ids": torch.tensor([1, 3, 3])}, 2),
        ({"routing": "language"}, {"language_ids": torch.tensor([1, 1, 1])}, 1),
        ({"routing": "language", "experts": {"uralic": 1, "turkic": 1}}, {"language": "hu"}, 0),
        ({"routing": "learned"}, {}, 4),
    ],
    ids=["languages", "languages without a choice", "one language in ids", "one language by name", "learned"],
)
def test_the_host_waits_once_for_what_holds_for_all_layers(monkeypatch, changes, arguments, waits):
    model = upcycle(pico(num_hidden_layers=4), trained=True, **changes)
    logits(model, token_batch(), **arguments)
    waited = []
    for name in ("tolist", "item", "unique", "bincount", "nonzero", "__bool__", "__int__", "__float__"):
        real = getattr(torch.Tensor, name)

        def noted(self, *given, real=real, name=name, **options):
            waited.append(name)
            return real(self, *given, **options)

        monkeypatch.setattr(torch.Tensor, name, noted)
    x = torch.randn(6, 32)
    context = moe_layers(model)[0].context
    names = {k: v[:, None].expand(3, 2) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    context.current = ForwardState((3, 2), **names)
    with torch.no_grad():
        for layer in moe_layers(model):
            layer(x)
    context.current = None
    assert waited == ["tolist"] * waits


@pytest.mark.parametrize("wrong", [4, -1, 999])
def test_an_id_that_nobody_has_is_refused(wrong):
    with pytest.raises(LanguageError, match=f"{wrong}.*expected 0 to 3"):
        logits(upcycle(pico()), token_batch(), language_ids=torch.tensor([0, 1, wrong]))
