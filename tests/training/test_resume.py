"""A run that stops and goes on from its checkpoint ends, bit for bit, where the straight run ends."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from peft_moe_delta import RoutingCallback, TrainingMonitor, monitor
from training.common import assert_equal, base_model, documents, expert_model, parameters, train

HERE = Path(__file__).resolve().parent
DATA = documents(range(3, 15), ["en", "hu", "az", "fi"])
CASES = {
    "expansion": {},
    "expansion, by language": {"routing": "language"},
    "expansion, low rank": {"expert_rank": 4},
    "review": {"stage": "review"},
}
STEPS = 6


def run(model, folder, **arguments):
    train(
        model,
        DATA,
        folder,
        **{"max_steps": STEPS, "save_strategy": "steps", "save_steps": STEPS // 2, "lr_scheduler_type": "cosine"},
        **{"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
        **arguments,
    )
    return parameters(model)


@pytest.fixture(params=CASES, scope="module")
def straight(request, tmp_path_factory):
    """The changes of the model, the folder of its checkpoints, and the parameters at the end. Those who go on from the
    checkpoint in the middle write the last one again."""
    changes, folder = CASES[request.param], tmp_path_factory.mktemp("straight")
    model = expert_model(**changes)
    before = parameters(model)
    after = run(model, folder)
    assert any(not after[name].equal(before[name]) for name in before)
    return changes, folder, after


def test_new_objects_go_on(straight):
    changes, folder, expected = straight
    model = expert_model(**{**changes, "trained": False})  # its own weights do not matter
    assert_equal(run(model, folder, resume_from_checkpoint=str(folder / "checkpoint-3")), expected)


def test_a_loaded_adapter_goes_on(straight):
    """As in a new session: the stage comes with the adapter."""
    _, folder, expected = straight
    model = PeftModel.from_pretrained(base_model(), folder / "checkpoint-3", is_trainable=True)
    assert_equal(run(model, folder, resume_from_checkpoint=str(folder / "checkpoint-3")), expected)


@pytest.mark.slow
def test_a_new_process_goes_on(tmp_path):
    expected = run(expert_model(stage="review"), tmp_path)
    program = (
        "import sys, torch; from training import test_resume as t; "
        "model = t.PeftModel.from_pretrained(t.base_model(), sys.argv[1] + '/checkpoint-3', is_trainable=True); "
        "torch.save(t.run(model, sys.argv[1], resume_from_checkpoint=True), sys.argv[1] + '/end.pt')"
    )
    (tmp_path / "checkpoint-6").rename(tmp_path / "end")  # so that checkpoint 3 is the last
    paths = os.pathsep.join([str(HERE.parent), str(HERE.parent.parent), os.environ.get("PYTHONPATH", "")])
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], env={**os.environ, "PYTHONPATH": paths}, check=True)
    assert_equal(torch.load(tmp_path / "end.pt", weights_only=True), expected)


@pytest.mark.filterwarnings("ignore:This training is doubtful:UserWarning")
def test_what_callbacks_count_goes_on(tmp_path, monkeypatch):
    """Means over a line of the log with a checkpoint in its middle, and how much text the experts have seen."""

    monkeypatch.setattr(monitor, "PARAMETERS_PER_TOKEN", 10)

    def trained(model, **arguments):
        callbacks = [RoutingCallback(), TrainingMonitor()]
        saving = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "logging_steps": 2}
        trainer = train(model, DATA, tmp_path, callbacks=callbacks, **saving, **arguments)
        lines = [
            {k: v for k, v in line.items() if "/" in k or k.endswith("ing_loss")} for line in trainer.state.log_history
        ]
        return [line for line in lines if line], model.active_peft_config.record.doubts

    expected = trained(expert_model())
    assert len(expected[0]) == 3 and any("tokens_per_pass/uralic" in line for line in expected[0])
    assert any("saw" in doubt for doubt in expected[1])
    assert trained(expert_model(trained=False), resume_from_checkpoint=str(tmp_path / "checkpoint-3")) == expected
