"""Reading safetensors lazily, refusing what is not whole or not safe, writing whole or not at all."""

import json
import os
import pickle

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError

from builders import pico
from peft_moe_delta import checkpoint
from peft_moe_delta.checkpoint import CheckpointReader, resolve, whole_folder, write_safetensors
from peft_moe_delta.errors import CheckpointError


@pytest.fixture
def single(tmp_path):
    """A folder with one safetensors file, and its model."""
    model = pico("llama").bfloat16()
    model.save_pretrained(tmp_path)
    return tmp_path, model


@pytest.fixture
def sharded(tmp_path):
    """A folder with several shards and their index, and its model."""
    model = pico("llama")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    return tmp_path, model


def edit_index(folder, change):
    """Apply `change` to the index's weight map."""
    index = folder / checkpoint.INDEX_FILE
    content = json.loads(index.read_text())
    change(content["weight_map"])
    index.write_text(json.dumps(content))


@pytest.mark.parametrize("kind", ["single", "sharded"])
def test_reader_is_the_state_dict(kind, request):
    folder, model = request.getfixturevalue(kind)
    reader, state = CheckpointReader(folder), model.state_dict()
    assert reader.keys() == state.keys()
    assert len(reader) == len(state)
    for name, tensor in reader.items():
        assert torch.equal(tensor, state[name])
        assert reader.shapes[name] == tuple(tensor.shape)
        assert reader.dtypes[name] == tensor.dtype
    assert repr(reader) == f"CheckpointReader({str(folder)!r}, {len(state)} tensors)"


def test_opening_and_asking_for_names_shapes_and_dtypes_reads_no_tensor(sharded, monkeypatch):
    reader = CheckpointReader(sharded[0])
    monkeypatch.setattr(CheckpointReader, "__getitem__", lambda *_: pytest.fail("read a tensor"))
    assert "model.norm.weight" in reader
    assert "model.nothing" not in reader
    assert reader.shapes["model.norm.weight"] == (32,)
    assert reader.dtypes["model.norm.weight"] == torch.float32
    assert list(reader)


def test_a_tensor_that_is_not_there_is_a_key_error_as_in_any_mapping(single):
    reader = CheckpointReader(single[0])
    with pytest.raises(KeyError):
        reader["model.nothing"]
    assert reader.get("model.nothing") is None


def test_one_file_can_be_read_by_its_own_path(tmp_path):
    write_safetensors(tmp_path / "deep" / "delta.safetensors", {"a": torch.ones(2)}, {"origin": "test"})
    reader = CheckpointReader(tmp_path / "deep" / "delta.safetensors")
    assert torch.equal(reader["a"], torch.ones(2))
    assert reader.metadata == {"format": "pt", "origin": "test"}


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"No checkpoint at .*nowhere: there is no such folder"):
        CheckpointReader(tmp_path / "nowhere")


def test_a_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"holds neither model.safetensors nor model.safetensors.index.json"):
        CheckpointReader(tmp_path)


def test_pickles_are_refused_by_name_and_never_opened(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.abort, ()

    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(CheckpointError, match=r"only pickled weights \(pytorch_model.bin\).*save_pretrained"):
        CheckpointReader(tmp_path)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_truncated_file_is_refused_on_opening(single, keep):
    file = single[0] / "model.safetensors"
    content = file.read_bytes()[:keep]
    file.write_bytes(content)
    with pytest.raises(
        CheckpointError, match=rf"\({len(content):,} bytes\) is no whole safetensors file.*fetch it again"
    ):
        CheckpointReader(single[0])


def test_a_missing_shard_is_refused_on_opening(sharded):
    next(sharded[0].glob("model-00002*")).unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-\d+.safetensors is missing: the index names it"):
        CheckpointReader(sharded[0])


def test_an_index_that_names_what_its_shard_does_not_hold_is_refused(sharded):
    edit_index(sharded[0], lambda names: names.update({"model.extra.weight": names["model.norm.weight"]}))
    with pytest.raises(CheckpointError, match=r"does not hold model.extra.weight, which .*index.json places there"):
        CheckpointReader(sharded[0])


@pytest.mark.parametrize("place", ["../secret.safetensors", "/etc/secret.safetensors", "sub/x.safetensors", "..", ""])
def test_an_index_that_leaves_its_folder_is_refused(sharded, place):
    edit_index(sharded[0], lambda names: names.update({"model.norm.weight": place}))
    with pytest.raises(CheckpointError, match="points outside its folder"):
        CheckpointReader(sharded[0])


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": ["a"]}', '{"weight_map": {"a": ["b"]}}'])
def test_a_broken_index_is_refused(tmp_path, content):
    (tmp_path / checkpoint.INDEX_FILE).write_text(content)
    with pytest.raises(CheckpointError, match=r"is no index.*weight_map"):
        CheckpointReader(tmp_path)


@pytest.mark.parametrize("inside", ["0a1b", "0a1b/checkpoint-100", "0a1b/runs/2/checkpoint-100"])
def test_links_into_a_hub_cache_are_followed(single, inside):
    folder, blobs = single[0] / "snapshots" / inside, single[0] / "blobs"
    folder.mkdir(parents=True)
    blobs.mkdir()
    (single[0] / "model.safetensors").rename(blobs / "c0ffee")
    (folder / "model.safetensors").symlink_to(os.path.relpath(blobs / "c0ffee", folder))
    assert len(CheckpointReader(folder)) == len(single[1].state_dict())
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(single[0] / "elsewhere.safetensors")
    (blobs / "c0ffee").rename(single[0] / "elsewhere.safetensors")
    with pytest.raises(CheckpointError, match="points outside its folder"):
        CheckpointReader(folder)


def test_resolve_keeps_folders_and_downloads_no_pickles(tmp_path, monkeypatch):
    assert resolve(str(tmp_path)) == tmp_path
    asked = {}
    monkeypatch.setattr(
        checkpoint.paths, "snapshot_download", lambda name, **how: asked.update(how, name=name) or "/cache"
    )
    assert str(resolve("me/model", revision="v1")) == "/cache"
    assert (asked["name"], asked["revision"]) == ("me/model", "v1")
    kept = {pattern for pattern in asked["allow_patterns"] if pattern.endswith((".bin", ".pt", ".py", "*"))}
    assert kept == {"tokenizer*", "vocab*"}


@pytest.mark.parametrize("name", ["no/such/folder", "./nowhere", "me/model"])
def test_resolve_says_when_a_name_is_neither_folder_nor_repository(name, monkeypatch):
    def offline(*_, **__):
        raise LocalEntryNotFoundError("no connection and nothing cached")

    if name == "me/model":
        monkeypatch.setattr(checkpoint.paths, "snapshot_download", offline)
    with pytest.raises(CheckpointError, match=f"'{name}' is no folder here, and the Hub does not give it"):
        resolve(name)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    file = tmp_path / "delta.safetensors"
    write_safetensors(file, {"a": torch.zeros(3)})
    shared = torch.zeros(3)
    with pytest.raises(RuntimeError, match="share memory"):
        write_safetensors(file, {"a": shared, "b": shared})
    assert list(CheckpointReader(file)) == ["a"]
    assert list(tmp_path.iterdir()) == [file]


def test_views_and_parameters_are_written_as_what_they_hold(tmp_path):
    tensors = {"view": torch.arange(6).reshape(2, 3).t(), "parameter": torch.nn.Parameter(torch.ones(2).bfloat16())}
    write_safetensors(tmp_path / "x.safetensors", tensors)
    reader = CheckpointReader(tmp_path / "x.safetensors")
    assert all(torch.equal(reader[name], tensor) for name, tensor in tensors.items())


def test_a_folder_appears_only_when_it_is_whole(tmp_path):
    output = tmp_path / "deep" / "output"
    with whole_folder(output) as folder:
        assert not output.exists()
        assert folder.parent == output.parent, "moving it there must not copy"
        (folder / "config.json").write_text("{}")
    assert [path.name for path in output.parent.iterdir()] == ["output"]
    assert (output / "config.json").read_text() == "{}"
    assert output.stat().st_mode == tmp_path.joinpath("deep").stat().st_mode


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
def test_a_failure_leaves_no_trace_and_keeps_what_was_to_be_replaced(tmp_path, failure):
    output = tmp_path / "output"
    output.mkdir()
    (output / "old").touch()
    with pytest.raises(failure), whole_folder(output, overwrite=True) as folder:
        (folder / "new").touch()
        raise failure
    assert [path.name for path in tmp_path.rglob("*")] == ["output", "old"]


def test_overwriting_is_asked_for_and_replaces_everything(tmp_path):
    output = tmp_path / "output"
    output.mkdir()
    with whole_folder(output) as folder:  # an empty folder is no loss
        (folder / "old").touch()
    with pytest.raises(CheckpointError, match=r"a folder with files in it.*overwrite=True"), whole_folder(output):
        pytest.fail("must refuse before the work is done")
    with whole_folder(output, overwrite=True) as folder:
        (folder / "new").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["output", "new"]
    with pytest.raises(CheckpointError, match="is a file"), whole_folder(output / "new", overwrite=True):
        pytest.fail("must refuse before the work is done")
