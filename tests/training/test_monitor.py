"""Training that goes bad: it stops in time, keeps what was good, and says so wherever the adapter goes."""

import json

import pytest
import torch
from transformers import Trainer, TrainerCallback

from builders import moe_layers, perturbed
from peft_moe_delta import AuxiliaryLossMixin, TrainingMonitor, graft_checkpoint, monitor
from peft_moe_delta.errors import PeftMoeDeltaError
from peft_moe_delta.hub import CardFacts, render_card
from training.common import assert_equal, base_model, documents, expert_model, parameters, train

SMALL = "ignore:This training is doubtful. the experts of:UserWarning"
POISON = 98
"""A token whose embedding is infinite."""
TEXT = [
    {**d, "input_ids": [i if i != POISON else 3 for i in d["input_ids"]]} for d in documents([6, 5, 7], ["hu", "az"])
]
DATA = [*TEXT, {"input_ids": [5, POISON, 6], "language": "hu"}]
ONE_BY_ONE = {"per_device_train_batch_size": 1, "max_steps": 4}


class MixedTrainer(AuxiliaryLossMixin, Trainer):
    """Brings the monitor along."""


class Recorder(TrainerCallback):
    """The parameters before the first step and after each."""

    def __init__(self):
        self.states = []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.states.append(parameters(model))

    on_step_end = on_train_begin


def poisoned(**changes):
    model = expert_model(trained=False, **changes)
    model.get_input_embeddings().weight.data[POISON] = torch.inf
    return model


@pytest.mark.filterwarnings(SMALL)
@pytest.mark.parametrize("rank", [None, 4])
@pytest.mark.parametrize("own", [False, True], ids=["monitor", "mixin"])
def test_a_gradient_that_is_not_finite_stops_the_training_before_it_reaches_the_weights(tmp_path, own, rank):
    model, recorder = poisoned(expert_rank=rank), Recorder()
    arguments = {"trainer_class": MixedTrainer} if own else {"callbacks": [TrainingMonitor()]}
    arguments["callbacks"] = [*arguments.get("callbacks", []), recorder]
    with pytest.warns(UserWarning, match=r"stopped at step \d of 4.*gradient of .*moe_delta_\w+.*was not finite"):
        trainer = train(model, DATA, tmp_path, save_strategy="epoch", **ONE_BY_ONE, **arguments)
    assert_equal(recorder.states[-1], recorder.states[-2])
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained and all(p.isfinite().all() for p in trained)
    step = trainer.state.global_step
    assert step == len(recorder.states) - 1
    assert (tmp_path / f"checkpoint-{step}" / "adapter_model.safetensors").is_file()


def test_weights_that_are_not_finite_stop_any_training(tmp_path):
    """Without the monitor, in the pass after."""
    with pytest.raises(PeftMoeDeltaError, match=r"diverged: .*moe_delta_\w+\S* is not finite.*TrainingMonitor"):
        train(poisoned(), DATA * 2, tmp_path, **ONE_BY_ONE | {"max_steps": 8})


@pytest.mark.filterwarnings(SMALL)
@pytest.mark.parametrize("rank", [None, 4])
def test_experts_that_move_too_far_are_doubted(tmp_path, rank):
    model = expert_model(trained=False, expert_rank=rank)
    with pytest.warns(UserWarning, match=r"diverged: one has moved.*expert 1 of .*mlp, by \d+%"):
        train(model, TEXT, tmp_path, callbacks=[TrainingMonitor()], max_steps=4, learning_rate=1.0)
    assert len([doubt for doubt in model.active_peft_config.record.doubts if "diverged" in doubt]) == 1


@pytest.mark.filterwarnings("ignore:This training is doubtful:UserWarning")
@pytest.mark.parametrize("rank", [None, 4])
def test_how_far_an_expert_has_moved_is_a_share_of_its_weights(monkeypatch, rank):
    model = expert_model(expert_rank=rank)
    shares = []
    for layer in moe_layers(model):
        for number in (1, 2, 3):
            own = layer.expert_weights("default", number)
            pairs = [(weight, layer.base_layer.get_parameter(name)) for name, weight in own.items()]
            change, before = (
                sum(part.square().sum() for part in parts)
                for parts in ([w - b for w, b in pairs], [b for _, b in pairs])
            )
            shares.append((change / before).sqrt().item())
    for factor, doubted in ((0.999, True), (1.001, False)):
        monkeypatch.setattr(monitor, "FAR", max(shares) * factor)
        monitor._doubt_distance(model)
        assert bool(model.active_peft_config.record.doubts) == doubted
        model.active_peft_config.change(doubts=[])


def test_few_tokens_for_an_expert_s_size_are_doubted(tmp_path):
    """An expert of two layers has 9,216 parameters: 10 tokens are enough, 9 are not."""
    for lengths, doubted in (([5, 5], False), ([5, 4], True)):
        model = expert_model(trained=False, experts={"uralic": 1, "turkic": 1}, routing="language", top_k=1)
        data = documents(lengths, ["hu", "hu"]) + documents([12], ["az"])
        if doubted:
            with pytest.warns(UserWarning, match="experts of 'uralic' have 9,216 parameters and saw 9 tokens"):
                train(model, data, tmp_path, callbacks=[TrainingMonitor()])
        else:
            train(model, data, tmp_path, callbacks=[TrainingMonitor()])
        assert len(model.active_peft_config.record.doubts) == doubted


@pytest.mark.filterwarnings("ignore:This training is doubtful:UserWarning")
@pytest.mark.filterwarnings("ignore:Grafting looks doubtful:UserWarning")
def test_a_doubt_goes_wherever_the_adapter_goes(tmp_path):
    """Its folder, the report of a graft on either road, and the card."""
    model = expert_model()
    train(model, TEXT[:1], tmp_path, callbacks=[TrainingMonitor()])
    doubt = "the experts of 'uralic' have"
    for name, made in {"base": base_model(), "post": perturbed(base_model())}.items():
        made.save_pretrained(tmp_path / name)
    model.save_pretrained(tmp_path / "adapter")
    saved = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert saved["record"]["doubts"][-1].startswith(doubt)
    report = graft_checkpoint(
        tmp_path / "base", tmp_path / "post", tmp_path / "adapter", tmp_path / "files", target="adapter"
    )
    grafted = model.graft(tmp_path / "post")
    assert report.warnings == grafted.graft_report.warnings == tuple(saved["record"]["doubts"])
    for folder in ("adapter", "files"):
        assert f"**Doubtful**: {doubt}" in render_card(CardFacts.of(tmp_path / folder, name="x"))
