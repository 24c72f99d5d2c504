"""Ctrl-C or SIGTERM ends a run in one line; the next run goes on where it was and ends with the same bytes."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from peft_moe_delta.cli import main
from peft_moe_delta.errors import RecipeError
from peft_moe_delta.recipe import read_recipe
from peft_moe_delta.recipe.interruption import Interruption
from peft_moe_delta.recipe.preview import seen_steps
from peft_moe_delta.recipe.run import Run
from peft_moe_delta.recipe.trainer import StepMonitor
from peft_moe_delta.recipe.unfinished import Checkpoints
from recipe.kept import contents

ROOT = Path(__file__).parents[2]
MOMENTS = 10


@pytest.fixture
def listening():
    """What a shell starts in the background is told to ignore Ctrl-C, and so are these tests there."""
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def fields(recipe_fields) -> dict[str, Any]:
    """A run with a few more steps than the usual one, whose log has lines of several steps."""
    for name in ("tune", "expand", "review"):
        recipe_fields[name] = recipe_fields[name] | {"steps": 5, "trainer": {"logging_steps": 2}}
    recipe_fields["adapter"] |= {"expert_rank": 2}  # what a new adapter draws at random
    return recipe_fields


def signal_at(monkeypatch: pytest.MonkeyPatch, signals: dict[int, signal.Signals]) -> None:
    """Signals in the optimizer steps of these numbers, counted over everything that trains from now on."""
    count = iter(range(1, 1000))
    plain = StepMonitor.on_pre_optimizer_step

    def sent(self: StepMonitor, *arguments: Any, **options: Any) -> None:
        plain(self, *arguments, **options)
        if (step := next(count)) in signals:
            signal.raise_signal(signals[step])

    monkeypatch.setattr(StepMonitor, "on_pre_optimizer_step", sent)


def interrupted(recipe: str, capsys: pytest.CaptureFixture[str]) -> str:
    """The line that an interrupted training ends with."""
    with pytest.raises(SystemExit) as stopped:
        main(["train", recipe])
    assert stopped.value.code == 130
    err = capsys.readouterr().err
    assert "Traceback" not in err
    return err.splitlines()[-1]


@pytest.mark.usefixtures("listening")
def test_a_training_goes_on_where_a_signal_has_stopped_it(fields, write_recipe, monkeypatch, capsys):
    """In the middle of a line of the log; in the very last step, whose result is kept; and in the stage after that."""
    output, recipe = Path(fields["output"]), write_recipe(fields)
    run = Run(read_recipe(recipe))
    run.post_trained()  # what was made before in the same process changes nothing
    run.adapter()
    expected = {name: contents(output / name) for name in ("base", "expanded", "reviewed")}
    shutil.rmtree(output)
    with monkeypatch.context() as patched:
        signal_at(patched, {3: signal.SIGINT, 5: signal.SIGINT, 5 + 3: signal.SIGTERM})
        assert "expanded has a checkpoint of step 3 of 5" in interrupted(recipe, capsys)
        assert sorted(path.name for path in output.iterdir()) == [".expanded.checkpoints", "base"]
        assert seen_steps(read_recipe(recipe), whole=False)[1].state == "goes on from step 3 of 5"
        assert "checkpoint" not in interrupted(recipe, capsys)
        assert sorted(path.name for path in output.iterdir()) == ["base", "expanded"]
        assert "reviewed has a checkpoint of step 3 of 5" in interrupted(recipe, capsys)
        Run(read_recipe(recipe)).adapter()
    assert {name: contents(output / name) for name in expected} == expected
    assert sorted(path.name for path in output.iterdir()) == sorted(expected)


@pytest.mark.usefixtures("listening")
@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_at_once(first):
    with pytest.raises(KeyboardInterrupt, match="second"), Interruption() as interruption:
        interruption.hold()
        signal.raise_signal(first)
        assert interruption.asked and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise KeyboardInterrupt("second") from None
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.usefixtures("listening")
def test_a_signal_that_somebody_else_handles_is_left_to_them():
    came: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: came.append(number))
    with Interruption() as interruption:
        interruption.hold()
        signal.raise_signal(signal.SIGTERM)
    assert came == [signal.SIGTERM] and not interruption.asked


@pytest.mark.usefixtures("listening")
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_what_fails_after_a_signal_is_its_consequence(sent):
    """A terminal, or a scheduler, sends it to worker processes as well, whose end is then an error."""
    with pytest.raises(KeyboardInterrupt, match="not saved: a worker has died"), Interruption() as interruption:
        interruption.hold()
        signal.raise_signal(sent)
        raise RuntimeError("a worker has died")


def test_only_a_whole_checkpoint_of_the_same_training_is_gone_on_from(tmp_path, caplog):
    """From one of the last step Trainer would make a step too many."""
    checkpoints = Checkpoints(tmp_path / "expanded", {"a": 1})
    assert checkpoints.begin() is None
    for step, state in ((2, '{"global_step": 2, "max_steps": 4}'), (3, '{"global_step"'), (4, None)):
        folder = checkpoints.folder / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "trainer_state.json").write_text(state or '{"global_step": 4, "max_steps": 4}')
    last = Checkpoints(tmp_path / "expanded", {"a": 1}).last()
    assert last is not None and last.step == 2
    other = Checkpoints(tmp_path / "expanded", {"a": 2})
    assert other.last() is None and not caplog.records
    assert other.begin() is None
    (said,) = caplog.messages
    assert said == "expanded: begins anew and drops its checkpoint of step 2 of 4, since a was 1 and is 2"
    assert [path.name for path in checkpoints.folder.iterdir()] == ["inputs.json"]


def test_checkpoints_are_written_as_often_as_asked_and_change_nothing(fields, write_recipe):
    run = Run(read_recipe(write_recipe(fields)))
    step, made = run.expanded(), []
    fields["expand"]["trainer"] |= {"save_steps": 2}
    recipe = read_recipe(write_recipe(fields))
    assert seen_steps(recipe, whole=False)[1].state == "kept"
    shutil.rmtree(step.folder)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(StepMonitor, "on_save", lambda self, args, state, *rest, **more: made.append(state.global_step))
        Run(recipe).expanded()
    assert made == [2, 4]
    assert not list(Path(fields["output"]).glob(".*"))


def test_a_training_is_replaced_only_where_that_is_wanted(recipe_fields, write_recipe, capsys):
    """Every file of the model counts, and status names it; a changed test set trains nothing."""
    del recipe_fields["review"]
    recipe_fields["adapter"]["routing"] = "learned"
    recipe = write_recipe(recipe_fields)
    main(["train", recipe])
    trained = contents(Path(recipe_fields["output"]) / "expanded")

    def states() -> dict[str, str]:
        capsys.readouterr()
        main(["status", recipe])
        rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
        return {row[0]: " ".join(row[1:]) for row in rows}

    test = Path(recipe_fields["languages"]["hu"]["test"])
    test.write_text(json.dumps({"text": "one more"}) + "\n" + test.read_text())
    assert all(states()[name].endswith("kept") for name in ("base", "expanded"))
    files = [file for file in Path(recipe_fields["model"]).iterdir() if file.is_file()]
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= {f.name for f in files}
    for file in files:
        before = file.read_bytes()
        file.write_bytes(before + b" ")
        seen = states()
        assert seen["base"].endswith(f"runs again, since the content of model.{file.name} has changed")
        assert seen["expanded"].endswith("runs again, since base is another (needs --overwrite)")
        file.write_bytes(before)
    config = Path(recipe_fields["model"]) / "config.json"
    config.write_bytes(config.read_bytes() + b" ")
    with pytest.raises(SystemExit, match="error: expanded would run again, since base is another.*--overwrite"):
        main(["train", recipe])
    assert contents(Path(recipe_fields["output"]) / "expanded") == trained
    with pytest.raises(RecipeError, match="the training in .*expanded would be lost"):
        Run(read_recipe(recipe)).expanded()
    Run(read_recipe(recipe), overwrite=True).expanded()
    assert states()["expanded"].endswith("kept")


def differing(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """Names of files that are not the same, or only in one of two runs."""
    return [name for name in {**expected, **found} if found.get(name) != expected.get(name)]


def run_until(recipe: str, moment: float | None) -> tuple[bool, str, float]:
    """Whether a run came to its end, the last line on standard error, and its seconds; SIGINT is sent at a moment."""
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    started = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "peft_moe_delta", "run", recipe],
        env={**os.environ, "PYTHONPATH": paths},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        out, err = process.communicate(timeout=moment)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=300)
    last = err.splitlines()[-1]
    assert "Traceback" not in err
    if not out:  # with its result printed it is over, and Python may be taking itself apart when the signal comes
        assert process.returncode == 130 and last.startswith("interrupted: "), err
    return bool(out), last, time.monotonic() - started


@pytest.mark.slow
def test_sigint_at_random_moments(fields, write_recipe):
    """Ten times into one run or several; whenever one comes to its end, all of its files are as without."""
    for name in ("tune", "expand", "review", "dense"):
        fields[name] = fields[name] | {"steps": 50}  # so that many moments are in a training
    output, recipe = Path(fields["output"]), write_recipe(fields)
    over, _, seconds = run_until(recipe, None)
    expected = contents(output)
    assert over and "report/report.json" in expected
    shutil.rmtree(output)
    moments = random.Random(0)
    for _ in range(MOMENTS):
        moment = moments.uniform(0.1, 0.9) * seconds
        over, last, _ = run_until(recipe, moment)
        print(f"after {moment:.1f} of {seconds:.1f} s: {'finished before' if over else last}", flush=True)
        if over:
            assert differing(contents(output), expected) == []
            shutil.rmtree(output)
    assert run_until(recipe, None)[0]
    assert differing(contents(output), expected) == []
