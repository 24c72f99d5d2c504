"""A run that stops and goes on from its checkpoint ends, bit for bit, where the straight run ends."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel

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
