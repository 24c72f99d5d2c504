"""Files that appear whole or not at all."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from peft_moe_delta.checkpoint import folder, resumable_folder, whole_folder, write_safetensors
from peft_moe_delta.cli import main
from peft_moe_delta.errors import CheckpointError, DataError
from peft_moe_delta.evaluation.harness_files import write_harness_tasks
from peft_moe_delta.files import read_text, write_text
from peft_moe_delta.graft.delta import PostTrainingDelta


def test_no_file_is_said(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere", tmp_path / ("x" * 300)):
        with pytest.raises(DataError, match="No file"):
            read_text(path)


@pytest.fixture
def full_disk(monkeypatch):
    """A disk that fills up when the file would be moved to its place: what was there must stay."""

    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", fail)


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path, full_disk):
    file = tmp_path / "a.json"
    file.write_text("old")
    weights = {"w": torch.ones(2)}
    for write in (
        lambda: write_text(file, "new"),
        lambda: write_safetensors(file, weights),
        lambda: PostTrainingDelta.from_checkpoints(weights, {"w": torch.zeros(2)}).save(file),
    ):
        with pytest.raises(CheckpointError, match=r"Cannot write .*a\.json: No space left on device"):
            write()
        assert [path.name for path in tmp_path.iterdir()] == ["a.json"] and file.read_text() == "old"


def test_what_the_safetensors_library_cannot_write_is_our_error(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(folder, "save_file", fail)
    with pytest.raises(CheckpointError, match="Cannot write .*No space left"):
        write_safetensors(tmp_path / "w.safetensors", {"w": torch.ones(2)})


def test_a_place_that_is_no_folder_is_our_error(tmp_path):
    (tmp_path / "file").write_text("here")
    text = tmp_path.with_suffix(".txt")
    text.write_text("here")
    long = tmp_path / ("x" * 300)
    for place in (tmp_path / "file" / "a", long):
        for write in (
            lambda path: write_text(path, "new"),
            lambda path: write_safetensors(path, {"w": torch.ones(2)}),
            lambda path: make_folder(whole_folder(path)),
            lambda path: make_folder(resumable_folder(path, "key")),
            lambda path: write_harness_tasks(path, {"hu": text}, {}),
        ):
            with pytest.raises(
                CheckpointError, match=rf"Cannot write {place}.*: (File exists|Not a directory|File name too long)"
            ):
                write(place)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("kind", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), SafetensorError("(os error 28)")])
def test_a_disk_that_fills_up_within_a_folder_is_our_error_and_what_was_there_stays(tmp_path, kind):
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "old").touch()
    for making in (whole_folder(tmp_path / "output", overwrite=True), resumable_folder(tmp_path / "new", "key")):
        with pytest.raises(CheckpointError, match=r"Cannot write .*: (No space left|.*os error 28)"), making:
            raise kind
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["old", "output"]


def test_a_folder_that_cannot_be_moved_to_its_place_leaves_the_old_one_there(tmp_path, monkeypatch):
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "old").touch()
    rename = Path.rename

    def fail_once(self, target):
        if (self / "new").exists():
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_once)
    making = whole_folder(tmp_path / "output", overwrite=True)
    with pytest.raises(CheckpointError, match="Input/output error"), making as partial:
        (partial / "new").touch()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["old", "output"]


@pytest.mark.parametrize(("number", "left"), [(1, "old"), (2, "new")])
def test_ctrl_c_between_two_renames_leaves_one_whole_folder(tmp_path, monkeypatch, number, left):
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "old").touch()
    rename, count = Path.rename, iter((1, 2, 3))

    def interrupted(self, target):
        moved = rename(self, target)
        if next(count) == number:
            raise KeyboardInterrupt
        return moved

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt), whole_folder(tmp_path / "output", overwrite=True) as partial:
        (partial / "new").touch()
    assert sorted(path.name for path in tmp_path.rglob("*")) == sorted([left, "output"])


def make_folder(making):
    with making:
        pass


def test_a_command_without_room_ends_with_one_message(tmp_path, full_disk):
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    before = sorted(tmp_path.iterdir())
    with pytest.raises(SystemExit, match=r"error: Cannot write .*card\.json: No space left on device"):
        main(["card", str(tmp_path)])
    assert sorted(tmp_path.iterdir()) == before
