"""Files from an enemy: an error of ours, or the right tensors; never anything else."""

import json
import random
import struct

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from peft_moe_delta.checkpoint import (
    INDEX_FILE,
    MANIFEST_FILE,
    CheckpointReader,
    read_manifest,
    verify,
    write_manifest,
)
from peft_moe_delta.errors import CheckpointError

TENSORS = {
    "model.embed.weight": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "model.layers.0.mlp.up.weight": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3),
    "model.layers.1.mlp.up.weight": torch.arange(6, dtype=torch.float16).reshape(3, 2),
    "model.norm.weight": torch.ones(1, dtype=torch.float16),
    "empty": torch.zeros(0, 4),
    "ids": torch.tensor(7, dtype=torch.int64),
}


TELLING = b'{}[]",:0123456789.-eE\\ \x00\xffAFB'
"""Bytes that mean something in a header."""


def raw(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def mutations(content, first, last, per_position, seed=0):
    """Every byte position is changed, dropped, doubled or cut at; the rest of the file stays."""
    generator = random.Random(seed)
    for position in range(first, last):
        for _ in range(per_position):
            kind = generator.randrange(6)
            byte = bytes(
                [generator.choice(b'{}[]",:0123456789.-eE\\ \x00\xffAFB') if kind else generator.randrange(256)]
            )
            if kind < 3:
                yield content[:position] + byte + content[position + 1 :]
            elif kind == 3:
                yield content[:position] + byte + content[position:]
            elif kind == 4:
                yield content[:position] + content[position + 1 :]
            else:
                length = generator.randrange(1, 40)
                yield content[:position] + content[position + length :]


def test_two_thousand_broken_headers(tmp_path):
    file = tmp_path / "model.safetensors"
    save_file(TENSORS, file, metadata={"format": "pt"})
    content = file.read_bytes()
    length = 8 + struct.unpack("<Q", content[:8])[0]
    tried = accepted = 0
    for mutated in mutations(content, 0, length, per_position=5):
        tried += 1
        file.write_bytes(mutated)
        try:
            reader = CheckpointReader(tmp_path)
            found = {name: reader[name] for name in reader}
        except CheckpointError:
            continue
        accepted += 1
        try:
            expected = load_file(file)  # the library must take what we take, and read the same
        except SafetensorError:
            pytest.fail(f"taken, but refused by the library: {mutated[:length]!r}")
        assert found.keys() == expected.keys()
        for name, tensor in found.items():
            assert tensor.dtype == expected[name].dtype and tensor.shape == expected[name].shape
            assert torch.equal(raw(tensor), raw(expected[name]))
    assert tried >= 2000
    assert 0 < accepted < tried / 3


def test_a_thousand_broken_indexes(tmp_path):
    names = list(TENSORS)
    shards = {"a.safetensors": names[:3], "b.safetensors": names[3:]}
    for shard, held in shards.items():
        save_file({name: TENSORS[name] for name in held}, tmp_path / shard)
    weight_map = {name: shard for shard, held in shards.items() for name in held}
    content = json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}).encode()
    tried = 0
    for mutated in mutations(content, 0, len(content), per_position=4):
        tried += 1
        (tmp_path / INDEX_FILE).write_bytes(mutated)
        try:
            reader = CheckpointReader(tmp_path)
        except CheckpointError:
            continue
        assert all(torch.equal(raw(reader[name]), raw(TENSORS[name])) for name in reader)
    assert tried >= 1000


def test_a_thousand_broken_manifests(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    write_manifest(tmp_path, {"command": "test", "request": {"scale": 1.0}, "inputs": {"base": {}}}, {})
    content, expected = (tmp_path / MANIFEST_FILE).read_bytes(), read_manifest(tmp_path)
    tried = 0
    for mutated in mutations(content, 0, len(content), per_position=3):
        tried += 1
        (tmp_path / MANIFEST_FILE).write_bytes(mutated)
        try:
            assert verify(tmp_path) == expected
        except CheckpointError:
            continue
    assert tried >= 1000


def header(entries, data=b"", metadata=None, length=None):
    """A file with this header; `entries` may be text of its own."""
    text = entries if isinstance(entries, bytes) else json.dumps({"__metadata__": metadata or {}, **entries}).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype="F32", shape=(2,), offsets=(0, 8), **more):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


EIGHT = b"\0" * 8


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it has no header"),
        (header({}, length=2**63), "its header should have 9,223,372,036,854,775,808 bytes"),
        (header(b"[]"), "no JSON object"),
        (header(b"{" * 100_000), "no whole safetensors file"),
        (header(b'{"a":' * 100_000), "no whole safetensors file"),
        (header({"a": entry()}, b"\0" * 7), "its tensors end at byte"),
        (header({"a": entry()}, b"\0" * 9), "its tensors end at byte"),
        (header({"a": entry(), "b": entry()}, EIGHT), "'b' starts at byte .*, the tensor before it ends at"),
        (header({"a": entry(), "b": entry(offsets=(4, 12))}, b"\0" * 12), "'b' starts at byte"),
        (header({"a": entry(), "b": entry(offsets=(9, 17))}, b"\0" * 17), "'b' starts at byte"),
        (header({"a": entry(offsets=(-8, 0))}, EIGHT), "must be whole numbers"),
        (header({"a": entry(shape=(-2,))}, EIGHT), "must be whole numbers"),
        (header({"a": entry(shape=(True, 2))}, EIGHT), "must be whole numbers"),
        (header({"a": entry(shape=(2.0,))}, EIGHT), "must be whole numbers"),
        (header({"a": entry(shape=(2**40, 2**40, 0), offsets=(0, 0))}), "absurd shape"),
        (header({"a": entry(shape=(2**70,))}, EIGHT), "absurd shape"),
        (header({"a": entry(shape=(1,) * 65, offsets=(0, 4))}, EIGHT), "absurd shape"),
        (header({"a": entry(shape=(3,))}, EIGHT), r"of shape \[3\] in F32 has 8 bytes"),
        (header({"a": entry("F4")}, EIGHT), "is stored as F4; can read F64.*unquantised"),
        (header({"a": entry(["F32"])}, EIGHT), "is stored as"),
        (header({"a": entry(more=1)}, EIGHT), "not dtype, shape and data_offsets"),
        (header({"a": [1]}), "not dtype, shape and data_offsets"),
        (header({}, metadata={"a": 1}), "metadata are no strings"),
        (header(b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":{}}'), "'a' is given twice"),
        (header(b'{"\\ud800":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'), "surrogates"),
        (header(b'{"a":NaN}'), "NaN is no JSON"),
        (header(b'{"a":' + b"9" * 5000 + b"}"), "no whole safetensors file"),
        (header(b'{"\xff":1}'), "no whole safetensors file"),
    ],
)
def test_bad_headers_are_refused_with_their_reason(tmp_path, content, message):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as refusal:
        CheckpointReader(tmp_path)
    str(refusal.value).encode()  # can be printed


def test_a_shard_that_is_a_link_out_of_the_folder_is_refused(tmp_path):
    folder, secret = tmp_path / "model", tmp_path / "secret.safetensors"
    folder.mkdir()
    save_file(TENSORS, secret)
    (folder / "model.safetensors").symlink_to(secret)
    with pytest.raises(CheckpointError, match=r"a link that points outside its folder, to .*secret"):
        CheckpointReader(folder)
    with pytest.raises(CheckpointError, match="no whole safetensors|points outside|Cannot"):
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors").symlink_to(tmp_path / "snapshots" / "model.safetensors")
        (tmp_path / "snapshots").mkdir()
        save_file(TENSORS, tmp_path / "snapshots" / "model.safetensors")
        CheckpointReader(folder)


def test_an_index_that_gives_a_tensor_twice_is_refused(tmp_path):
    save_file(TENSORS, tmp_path / "a.safetensors")
    (tmp_path / INDEX_FILE).write_text('{"weight_map": {"ids": "a.safetensors", "ids": "b.safetensors"}}')
    with pytest.raises(CheckpointError, match="'ids' is given twice"):
        CheckpointReader(tmp_path)


def test_a_file_that_shrinks_while_it_is_read_is_an_error(tmp_path):
    file = tmp_path / "model.safetensors"
    save_file(TENSORS, file)
    reader = CheckpointReader(tmp_path)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="cut short while in use"):
        dict(reader)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "a.json").write_text("[]"), r"a.json has other content"),
        (lambda folder: (folder / "a.json").write_text("{} "), r"a.json has 3 bytes instead of 2"),
        (lambda folder: (folder / "a.json").unlink(), r"a.json is missing"),
        (lambda folder: (folder / "model.safetensors").touch(), r"model.safetensors is not in the manifest"),
        (lambda folder: (folder / MANIFEST_FILE).unlink(), r"has no manifest.json"),
    ],
)
def test_verify_says_what_is_wrong(tmp_path, change, message):
    (tmp_path / "a.json").write_text("{}")
    write_manifest(tmp_path, {}, {})
    (tmp_path / "README.md").touch()
    (tmp_path / ".gitattributes").touch()
    verify(tmp_path)
    change(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        verify(tmp_path)
