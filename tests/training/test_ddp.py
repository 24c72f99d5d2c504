"""Data parallel training on two processes: nothing unused, nothing apart, and the gradients of the joint batch.

One test with subtests, since starting the processes takes longer than everything they do.
"""

import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from training.common import assert_equal
from training.ddp_worker import CASES, TRAINERS, joint_batch, make_model, run, with_trainer

HERE = Path(__file__).resolve().parent
WORLD = 2


def run_workers(folder):
    """What each process found: the name of a case -> gradients of the first step, parameters after the last."""
    paths = [str(HERE.parent), str(HERE.parent.parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "GLOO_SOCKET_IFNAME": "lo"}
    environment |= {"WORLD_SIZE": str(WORLD), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}  # for accelerate
    with ExitStack() as stack:
        processes = [
            stack.enter_context(
                subprocess.Popen(
                    [sys.executable, str(HERE / "ddp_worker.py"), str(rank), str(WORLD), str(folder)],
                    env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
            for rank in range(WORLD)
        ]
        for process in processes:
            stack.callback(process.kill)
        errors = [process.communicate(timeout=180)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * WORLD, "\n".join(errors)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]


def joint_gradients(changes, languages):
    """What one process finds for the documents of all in one batch."""
    model = make_model(changes)
    return run(model, lambda step: model(**joint_batch(languages, step, model)).loss)[0]


def test_two_processes(tmp_path, subtests):
    found = run_workers(tmp_path)
    for name, (changes, languages) in CASES.items():
        with subtests.test(name):
            first, second = (each[name] for each in found)
            assert not isinstance(first, str) and not isinstance(second, str), (first, second)
            assert_equal(first[0], second[0])
            assert_equal(first[1], second[1])
            expected = joint_gradients(changes, languages)
            assert any(gradient.abs().max() > 1e-3 for gradient in expected.values())
            assert_equal(first[0], expected, 1e-6)
    for name in TRAINERS:
        with subtests.test(name):
            expected, log = with_trainer("Trainer", tmp_path, size=4)
            figures = {
                key: value for key, value in log.items() if key.startswith(("expert_0_share/", "language_prior"))
            }
            assert {key.rpartition("/")[2] for key in figures} >= {"original", "uralic", "turkic"}
            for each in found:
                assert_equal(each[name][0], expected, 1e-6)
                assert each[name][1]["tokens_per_pass/original"] == 5
                assert {key: each[name][1][key] for key in figures} == pytest.approx(figures, abs=1e-6)
    with subtests.test("a stream that one process reads for all"):
        assert all("dispatch_batches" in each["refusal"] for each in found)
