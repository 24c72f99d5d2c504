"""16-bit training: the experts may round, the router decides in fp32."""

import pytest
import torch

from builders import moe_layers
from training.common import context_of, documents, expert_model, train

DATA = documents([7, 5, 9, 6], ["en", "hu", "az", "fi"])


def watched(model):
    """The dtypes of the routers' inputs and logits, filled during forward passes."""
    dtypes = []
    for layer in moe_layers(model):
        layer.moe_delta_router["default"].register_forward_hook(
            lambda _, args, out: dtypes.append((args[0].dtype, out.dtype))
        )
    return dtypes


def log_of(trainer):
    return next(entry for entry in trainer.state.log_history if "loss" in entry)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("stage", ["expansion", "review"])
@pytest.mark.parametrize("routing", ["learned", "language"])
def test_autocast_step_is_close_to_fp32(tmp_path, routing, stage, checkpointing):
    logs = []
    for bf16 in (False, True):
        model = expert_model(routing=routing, stage=stage)
        dtypes = watched(model)
        before = [layer.moe_delta_router["default"].weight.clone() for layer in moe_layers(model)]
        arguments = {"bf16": bf16, "gradient_checkpointing": checkpointing, "max_grad_norm": 1e9}
        logs.append(log_of(train(model, DATA, tmp_path, **arguments)))
        assert dtypes and all(logits == torch.float32 for _, logits in dtypes)
        for layer, weight in zip(moe_layers(model), before, strict=True):
            after = layer.moe_delta_router["default"].weight
            assert after.dtype == torch.float32 and after.isfinite().all() and not after.equal(weight)
        assert not context_of(model).current
    assert float(logs[1]["loss"]) == pytest.approx(float(logs[0]["loss"]), rel=0.02)
    assert float(logs[1]["grad_norm"]) == pytest.approx(float(logs[0]["grad_norm"]), rel=0.1)
    assert logs[0]["loss"] != logs[1]["loss"]


@pytest.mark.parametrize("routing", ["learned", "language"])
def test_a_bf16_base_trains_fp32_experts_and_routers(tmp_path, routing):
    model = expert_model(routing=routing, base={"dtype": torch.bfloat16})
    reference = expert_model(routing=routing)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    dtypes = watched(model)
    losses = [float(log_of(train(m, DATA, tmp_path))["loss"]) for m in (model, reference)]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    assert set(dtypes) == {(torch.bfloat16, torch.float32)}
