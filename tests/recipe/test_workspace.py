"""Steps are kept, run again when what they depend on changes, and leave nothing behind when they fail."""

from __future__ import annotations

import json
import logging
import os

import pytest

from peft_moe_delta.errors import CheckpointError, RecipeError
from peft_moe_delta.recipe.workspace import RECORD, Workspace, file_hash, model_files


def make(folder):
    (folder / "result.txt").write_text("done")


def test_a_step_runs_once_and_again_when_its_inputs_change(tmp_path):
    runs = []

    def counted(folder):
        runs.append(folder)
        make(folder)

    for depends_on in ({"a": 1}, {"a": 1}, {"a": 2}, {"a": 2}):
        step = Workspace(tmp_path).step("one", depends_on, counted)
    assert len(runs) == 2
    assert (step.folder / "result.txt").read_text() == "done"


def test_a_step_depends_on_the_steps_before_it(tmp_path):
    keys = []
    for a in (1, 2):
        first = Workspace(tmp_path).step("first", {"a": a}, make)
        keys.append(Workspace(tmp_path).step("second", {"first": first}, make).key)
    assert keys[0] != keys[1]


def test_the_record_says_what_the_result_came_from(tmp_path):
    step = Workspace(tmp_path).step("one", {"a": 1}, make)
    record = json.loads((step.folder / RECORD).read_text())
    assert record["inputs"] == {"a": 1}
    assert record["files"] == {"result.txt": file_hash(step.folder / "result.txt")}
    assert {"torch", "transformers", "peft", "peft-moe-delta"} == set(record["versions"])


def test_a_failed_step_leaves_nothing_and_keeps_what_was_there(tmp_path):
    Workspace(tmp_path).step("one", {"a": 1}, make)

    def fail(folder):
        (folder / "half.txt").write_text("half")
        raise RuntimeError("no power")

    with pytest.raises(RuntimeError, match="no power"):
        Workspace(tmp_path).step("one", {"a": 2}, fail)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one"]
    assert sorted(p.name for p in (tmp_path / "one").iterdir()) == ["result.txt", RECORD]


def said(caplog):
    """What was logged about running again."""
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


@pytest.mark.parametrize(
    ("before", "now", "reason"),
    [
        ({"expand": {"steps": 2}}, {"expand": {"steps": 3}}, "expand.steps was 2 and is 3"),
        (
            {"model": {"merges.txt": "sha256:a"}},
            {"model": {"merges.txt": "sha256:b"}},
            "the content of model.merges.txt",
        ),
        ({"graft": {}}, {"graft": {"language": None}}, "graft.language is new"),
        ({"a": 1, "b": 2}, {"a": 1}, "b is gone"),
        ({"order of languages": ["hu", "el"]}, {"order of languages": ["el", "hu"]}, "order of languages was"),
        ({n: 1 for n in "abcde"}, {n: 2 for n in "abcde"}, "c was 1 and is 2 and 2 more"),
    ],
)
def test_a_step_says_why_it_runs_again(tmp_path, caplog, before, now, reason):
    for inputs in (before, before):
        Workspace(tmp_path).step("one", inputs, make)
    assert said(caplog) == []
    Workspace(tmp_path).step("one", now, make)
    (text,) = said(caplog)
    assert text.startswith("one: runs again, since ") and reason in text


def test_a_step_runs_again_when_its_result_is_no_longer_what_it_was(tmp_path, caplog):
    folder = Workspace(tmp_path).step("one", {"a": 1}, make).folder
    os.utime(folder / "result.txt", (1, 1))  # copied elsewhere, say
    Workspace(tmp_path).step("one", {"a": 1}, make)
    assert said(caplog) == []
    (folder / "result.txt").write_text("gone")
    Workspace(tmp_path, overwrite=True).step("one", {"a": 1}, make)
    (folder / "result.txt").unlink()
    Workspace(tmp_path).step("one", {"a": 1}, make)
    (folder / RECORD).write_text("{")
    Workspace(tmp_path).step("one", {"a": 1}, make)
    assert [text.partition("since its ")[2] for text in said(caplog)] == [
        "result.txt was changed",
        "result.txt is missing",
        f"{RECORD} is damaged, or of an earlier version",
    ]
    assert (folder / "result.txt").read_text() == "done"


def test_what_was_edited_is_replaced_only_where_that_is_wanted(tmp_path):
    folder = Workspace(tmp_path).step("one", {"a": 1}, make).folder
    (folder / "result.txt").write_text("mine")
    for inputs in ({"a": 1}, {"a": 2}):
        with pytest.raises(RecipeError, match="one would run again, since .*edited in .*would be lost.*--overwrite"):
            Workspace(tmp_path).step("one", inputs, make)
    assert (folder / "result.txt").read_text() == "mine"


def test_a_folder_that_no_step_has_left_is_never_replaced(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "mine.txt").write_text("mine")
    with pytest.raises(RecipeError, match="not the result of a step"):
        Workspace(tmp_path).step("one", {"a": 1}, make)
    assert (tmp_path / "one" / "mine.txt").read_text() == "mine"


def test_every_file_that_a_model_is_loaded_from_counts(tmp_path):
    names = [
        "model.safetensors",
        "pytorch_model.bin",
        "config.json",
        "merges.txt",
        "vocab.txt",
        "spiece.model",
        "a.jinja",
    ]
    names.append("additional_chat_templates/tool.jinja")
    (tmp_path / "additional_chat_templates").mkdir()
    for name in [*names, "README.md", ".gitattributes"]:
        (tmp_path / name).write_text(name)
    before = model_files(str(tmp_path))
    assert sorted(before) == sorted(names)
    for name in names:
        (tmp_path / name).write_text("another")
        after = model_files(str(tmp_path))
        assert [n for n in names if after[n] != before[n]] == [name]
        before = after
    with pytest.raises(CheckpointError, match="no folder here"):
        model_files(str(tmp_path / "nowhere"))
