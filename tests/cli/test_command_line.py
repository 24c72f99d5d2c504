"""What holds for every command: one reader of NAME=VALUE, and errors of one line with an exit status that is not 0."""

from __future__ import annotations

import importlib
import os
import re
import resource
import signal
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from graft.test_explain import saved
from peft_moe_delta.allocation import SOURCES, STRATEGIES
from peft_moe_delta.cli import COMMANDS, failure, main
from peft_moe_delta.cli import allocation as cli_allocation
from peft_moe_delta.cli.failure import failure_of
from peft_moe_delta.cli.options import pairs_of
from peft_moe_delta.cli.work.graft import _expert_scale
from peft_moe_delta.errors import CheckpointError, DataError, GraftError, HubError, PlanError, RecipeError
from peft_moe_delta.recipe import stages


@pytest.mark.parametrize(
    ("given", "kind", "read"),
    [
        (["a=1", "b=x=y"], str, {"a": "1", "b": "x=y"}),
        (["a=b.safetensors=0.5"], float, {"a=b.safetensors": 0.5}),
        ({"no": "x", "n": 3}, str, {"no": "x", "n": "3"}),
        ({"a": 1e-3}, float, {"a": 1e-3}),
        ([], str, {}),
    ],
)
def test_pairs_are_read_one_way(given, kind, read):
    assert pairs_of("--option", given, kind) == read


@pytest.mark.parametrize(
    ("given", "kind", "message"),
    [
        (["a"], str, "--option takes NAME=VALUE; got 'a'"),
        (["=b"], str, "takes NAME=VALUE"),
        (["a="], str, "takes NAME=VALUE"),
        ("a=b", str, "any number of times"),
        ({"a": None}, str, "takes NAME=VALUE"),
        (["a=1", "a=2"], str, "each name once; 'a' comes twice"),
        (["a=x"], float, "finite number; got 'x'"),
        (["a=nan"], float, "finite number; got 'nan'"),
        (["a=1e999"], float, "finite number"),
    ],
)
def test_what_is_no_pair_is_refused(given, kind, message):
    with pytest.raises(RecipeError, match=message):
        pairs_of("--option", given, kind)


@pytest.mark.parametrize(
    ("given", "scale"),
    [
        ([], 1.0),
        (["0.5"], 0.5),
        (["turkic=0.75"], {"turkic": 0.75}),
        (["0.5", "turkic=0.75"], {"uralic": 0.5, "turkic": 0.75}),
        (["turkic=0.75", "0.5"], {"uralic": 0.5, "turkic": 0.75}),
    ],
)
def test_a_number_for_all_groups_and_one_for_some_both_count(tmp_path, given, scale):
    _, adapter = saved(tmp_path)
    assert _expert_scale(str(adapter), given) == scale


def test_two_numbers_for_all_groups_are_refused():
    with pytest.raises(RecipeError, match="takes one number for all"):
        _expert_scale("anywhere", ["0.5", "0.75"])


@pytest.mark.parametrize(
    "line",
    [
        [], ["nothing"], ["graft"], ["graft", "a", "b", "c", "d", "--scale", "x"], ["measure", "--tokens", "many"],
        ["delta", "compute"], ["group", "--source", "guess"], ["train", "a", "b"],
        ["card", "\0"], ["card", "\ud800"],
    ],
    ids=lambda line: ascii(" ".join(line)),
)  # fmt: skip
def test_a_command_line_that_cannot_be_read_ends_in_one_line_and_status_2(line, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(line)
    assert stopped.value.code == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("error: ") and said.err.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (PlanError("no"), 1),
        (GraftError("no"), 1),
        (RecipeError("no"), 2),
        (DataError("no"), 3),
        (CheckpointError("no"), 3),
        (HubError("no"), 3),
        (OSError("no"), 3),
        (SafetensorError("no"), 3),
        (MemoryError("no"), 4),
        (torch.OutOfMemoryError("no"), 4),
        (KeyboardInterrupt(), 130),
    ],
    ids=lambda given: type(given).__name__,
)
def test_every_kind_of_failure_has_its_status_and_one_line(error, status):
    failure = failure_of(error)
    assert failure is not None and failure.code == status
    assert str(failure).startswith("interrupted: " if status == 130 else "error: ") and "\n" not in str(failure)


@pytest.mark.parametrize("error", [ZeroDivisionError(), RuntimeError("ours"), ValueError(), SystemExit(0)])
def test_a_mistake_of_ours_keeps_its_traceback(error):
    assert failure_of(error) is None


def test_the_statuses_are_those_of_the_table():
    told = {int(number) for number in re.findall(r"^\| (\d+) ", failure.__doc__, re.MULTILINE)}
    assert told == {1, 2, 3, 4, 130}


@pytest.mark.parametrize("where", ["before", "after"])
def test_quiet_leaves_the_result_and_the_errors(recipe_fields, write_recipe, capfd, where):
    path = write_recipe({**recipe_fields, "output": recipe_fields["output"] + where})
    del recipe_fields["review"]
    line = ["train", path, "--set", "review="]
    main(["--quiet", *line] if where == "before" else [*line, "--quiet"])
    said = capfd.readouterr()
    assert said.out.startswith("adapter: ") and said.err == ""
    with pytest.raises(SystemExit) as stopped:
        main([*line, "--quiet", "--set", "expand.step=1"])
    assert stopped.value.code == 2
    assert capfd.readouterr().err.splitlines()[-1].startswith("error: ")


def test_verbose_says_where_an_error_arose(write_recipe, capsys):
    with pytest.raises(SystemExit):
        main(["train", "nowhere.yaml", "--verbose"])
    first, *_, last = capsys.readouterr().err.splitlines()
    assert first.startswith("Traceback") and last.startswith("error: Cannot read nowhere.yaml")


def test_no_colours_are_used(monkeypatch, capsys):
    monkeypatch.setenv("NO_COLOR", "1")
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "\x1b" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "heavy"),
    [
        (cli_allocation.SOURCES, SOURCES),
        (cli_allocation.STRATEGIES, STRATEGIES),
    ],
)
def test_choices_are_those_of_the_work(options, heavy):
    assert options == tuple(heavy)


@pytest.fixture
def listening():
    """What a shell starts in the background is told to ignore Ctrl-C, and so are these tests there."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("listening")
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_in_one_line_and_status_130(recipe_fields, write_recipe, monkeypatch, capsys, sent):
    monkeypatch.setattr(stages, "get_peft_model", lambda *arguments: signal.raise_signal(sent))
    with pytest.raises(SystemExit) as stopped:
        main(["train", write_recipe(recipe_fields)])
    assert stopped.value.code == 130
    assert capsys.readouterr().err.splitlines()[-1].startswith("interrupted: ")
    assert sorted(p.name for p in Path(recipe_fields["output"]).iterdir()) == ["base"]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.fixture
def full_disk():
    """No file may grow beyond some bytes, as on a disk that is nearly full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_ends_in_one_line_and_leaves_nothing_half_done(recipe_fields, write_recipe, full_disk):
    with pytest.raises(SystemExit, match="error: .*too large.*Nothing was left behind") as stopped:
        main(["train", write_recipe(recipe_fields)])
    assert "\n" not in str(stopped.value)
    assert sorted(p.name for p in Path(recipe_fields["output"]).iterdir()) == ["base"]


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_an_output_that_cannot_be_made_ends_in_one_line(recipe_fields, write_recipe, tmp_path, capsys, command):
    (tmp_path / "file").write_text("mine")
    output = str(tmp_path / "file" / "below")
    line = {
        "train": ["train", write_recipe(recipe_fields | {"output": output})],
        "evaluate": [
            *("evaluate", "--model", f"a={recipe_fields['model']}", "--output", output, "--max-length", "16"),
            f"--text=en={recipe_fields['languages']['en']['test']}",
        ],
    }[command]
    with pytest.raises(SystemExit) as stopped:
        main(line)
    said = capsys.readouterr().err.splitlines()
    assert stopped.value.code in (2, 3) and sum(text.startswith("error: ") for text in said) == 1
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "model.safetensors"])
@pytest.mark.parametrize("command", ["train", "measure", "mix", "delta"])
def test_a_damaged_model_ends_in_one_line(recipe_fields, write_recipe, tmp_path, name, command):
    if (name, command) == ("config.json", "delta"):
        pytest.skip("a delta reads no config")
    model = Path(recipe_fields["model"])
    (model / name).write_bytes((model / name).read_bytes()[:-50])
    texts = [f"--text={code}={language['train']}" for code, language in recipe_fields["languages"].items()]
    line = {
        "train": ["train", write_recipe(recipe_fields)],
        "measure": ["measure", "--model", str(model), *texts, "--output", str(tmp_path / "new" / "statistics.json")],
        "mix": ["mix", str(model), "--branch", f"a={model}", "--output", str(tmp_path / "new")],
        "delta": ["delta", "compute", str(model), str(model), "--output", str(tmp_path / "new" / "delta")],
    }[command]
    with pytest.raises(SystemExit, match="error: ") as stopped:
        main(line)
    assert "\n" not in str(stopped.value)
    assert not (tmp_path / "new").exists() or not os.listdir(tmp_path / "new")


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_every_command_has_help_and_something_to_do(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([command.name, "--help"])
    assert stopped.value.code == 0
    assert command.summary[:20] in capsys.readouterr().out
    module, _, function = command.work.partition(":")
    if module == "serve":
        pytest.importorskip("fastapi", reason="the extra `serve` is not installed")
        pytest.importorskip("uvicorn")
    assert callable(getattr(importlib.import_module(f"peft_moe_delta.cli.work.{module}"), function))
