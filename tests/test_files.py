"""Texts and tasks read from files, and files that appear whole or not at all."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

import quickstart
from peft_moe_delta.checkpoint import folder, resumable_folder, whole_folder, write_safetensors
from peft_moe_delta.cli import main
from peft_moe_delta.errors import CheckpointError, DataError
from peft_moe_delta.evaluation.harness_files import write_harness_tasks
from peft_moe_delta.files import read_tasks, read_text, read_texts, write_text
from peft_moe_delta.graft.delta import PostTrainingDelta

LINE_ENDS = "\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e"
"""What `str.splitlines` takes for the end of a line, beside the line feed."""


def test_characters_that_end_lines_elsewhere_stay_in_their_text(tmp_path):
    file = tmp_path / "text.jsonl"
    texts = [f"one{LINE_ENDS}two", "\ufeffthree", "four\r\n\r"]
    file.write_text("".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in texts), encoding="utf-8-sig")
    assert read_texts(file) == texts
    plain = tmp_path / "plain.jsonl"
    plain.write_text(file.read_text(encoding="utf-8-sig"), encoding="utf-8")
    assert quickstart.read(plain, "text") == texts


def test_documents_are_whole_up_to_a_number_of_bytes(tmp_path):
    file = tmp_path / "text.jsonl"
    file.write_text('{"text": "ένα"}\n\n{"text": "δύο"}\n{"text": "τρία"}\n', encoding="utf-8")
    assert read_texts(file) == ["ένα", "δύο", "τρία"]
    assert [len(read_texts(file, limit)) for limit in (1, 6, 7, 12, 13)] == [1, 1, 2, 2, 3]


WHOLE = b'{"text": "a", "prompt": "a", "answer": "a"}\n'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\n \n", "is empty"),
        (WHOLE + b'{"text": ', r"line 2: expected a JSON object"),
        (WHOLE + b'["a"]', r"line 2: expected an object; got list"),
        (WHOLE + b'{"text": "", "prompt": "a"}', r"line 2: expected (a `text` with at least one|`prompt` and)"),
        (b'{"text": 1, "prompt": 1}', r"line 1: expected"),
        (b'{"text": "\\ud800", "prompt": "\\ud800", "answer": "a"}', "line 1: holds half of a surrogate pair"),
        (b'{"text": "\xff"}', "no jsonl file in UTF-8"),
        (b"[" * 100_000, "line 1: expected a JSON object"),
        (b'{"text": ' + b"9" * 5000 + b"}", "line 1: expected a JSON object"),
    ],
)
def test_what_cannot_be_read_is_said_with_its_line(tmp_path, content, message):
    file = tmp_path / "text.jsonl"
    file.write_bytes(content)
    for read in (read_texts, read_tasks):
        with pytest.raises(DataError, match=message) as refusal:
            read(file)
        str(refusal.value).encode()  # can be printed


@pytest.mark.parametrize("read", [read_texts, read_tasks, read_text])
def test_no_file_is_said(tmp_path, read):
    for path in (tmp_path, tmp_path / "nowhere", tmp_path / ("x" * 300)):
        with pytest.raises(DataError, match="No file"):
            read(path)


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
    long = tmp_path / ("x" * 300)
    for place in (tmp_path / "file" / "a", long):
        for write in (
            lambda path: write_text(path, "new"),
            lambda path: write_safetensors(path, {"w": torch.ones(2)}),
            lambda path: make_folder(whole_folder(path)),
            lambda path: make_folder(resumable_folder(path, "key")),
            lambda path: write_harness_tasks(path, {"hu": tmp_path / "file"}, {}),
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


def make_folder(making):
    with making:
        pass


def test_a_command_without_room_ends_with_one_message(tmp_path, full_disk):
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    before = sorted(tmp_path.iterdir())
    with pytest.raises(SystemExit, match=r"error: Cannot write .*card\.json: No space left on device"):
        main(["card", str(tmp_path)])
    assert sorted(tmp_path.iterdir()) == before
