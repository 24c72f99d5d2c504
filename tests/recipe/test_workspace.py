"""Steps are kept, run again when what they depend on changes, and leave nothing behind when they fail."""

from __future__ import annotations

import json

import pytest

from peft_moe_delta.recipe.workspace import RECORD, Workspace, file_hash


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
    assert record["depends_on"] == {"a": 1}
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
