"""Kills, full disks, two runs at once, read-only and linked inputs: in real processes, on real files."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from peft_moe_delta import graft_checkpoint
from peft_moe_delta.checkpoint import folder as folders
from peft_moe_delta.checkpoint import verify
from peft_moe_delta.errors import CheckpointError

# Forked from a process that has imported everything, so that a run takes as long as its work.
RUNNER = """
import os, sys, json, shutil, time, resource
from peft_moe_delta import graft_checkpoint
from peft_moe_delta.errors import PeftMoeDeltaError
import peft_moe_delta.checkpoint.shards as shards
shards._CHUNK = 1 << 12
warm = False
for line in sys.stdin:
    arguments, limit, pause = json.loads(line)
    if not warm:  # so that no child has to import what is imported on first use
        graft_checkpoint(*arguments[:3], arguments[3] + ".warm")
        shutil.rmtree(arguments[3] + ".warm")
        warm = True
    child = os.fork()
    if child == 0:
        if limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        if pause:  # make every file take a while, so that a kill can fall anywhere
            finish = shards.Job.finish
            shards.Job.finish = lambda *given: (time.sleep(pause), finish(*given))
        try:
            graft_checkpoint(*arguments, shard_size="40KB")
            os._exit(0)
        except PeftMoeDeltaError as error:
            print(json.dumps(["error", str(error)]), flush=True)
            os._exit(1)
        except BaseException as error:
            print(json.dumps(["crash", repr(error)]), flush=True)
            os._exit(2)
    print(json.dumps(["pid", child]), flush=True)
    print(json.dumps(["done", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])]), flush=True)
"""


class Runner:
    """A process that forks one graft after another."""

    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", RUNNER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def start(self, paths, limit=0, pause=0.0):
        """The child's process id."""
        print(json.dumps([[str(path) for path in paths], limit, pause]), file=self.process.stdin, flush=True)
        kind, child = json.loads(self.process.stdout.readline())
        assert kind == "pid"
        return child

    def end(self):
        """Exit status and error message."""
        kind, content = json.loads(self.process.stdout.readline())
        message = ""
        if kind != "done":
            message, (kind, content) = f"{kind}: {content}", json.loads(self.process.stdout.readline())
        return content, message


@pytest.fixture(scope="module")
def runner():
    runner = Runner()
    yield runner
    runner.process.stdin.close()
    runner.process.stdout.close()
    runner.process.wait()


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def killed_and_resumed(trio, runner, kills, seed):
    """Kill a run at random moments, finish it, and compare with one that nobody disturbed."""
    generator = random.Random(seed)
    undisturbed, output = trio.folder / "undisturbed", trio.folder / "out"
    pause = 0.01
    runner.start([*trio.paths, undisturbed], pause=pause)
    started = time.monotonic()
    assert runner.end() == (0, "")
    whole = time.monotonic() - started
    kept = 0
    for _ in range(kills):
        child = runner.start([*trio.paths, output], pause=pause)
        time.sleep(generator.uniform(0, whole))
        with contextlib.suppress(ProcessLookupError):  # it was faster
            os.kill(child, signal.SIGKILL)
        status, message = runner.end()
        assert (status, message) in [(-signal.SIGKILL, ""), (0, "")]
        if output.exists():
            assert content(output) == content(undisturbed)
            shutil.rmtree(output)
        else:
            kept += any((trio.folder / ".out.partial").glob("folder/*.safetensors"))
    runner.start([*trio.paths, output])
    assert runner.end() == (0, "")
    assert content(output) == content(undisturbed)
    verify(output)
    assert sorted(path.name for path in trio.folder.iterdir()) == ["adapter", "base", "out", "post", "undisturbed"]
    return kept


def test_a_killed_run_goes_on_and_ends_as_if_nothing_had_been(make_trio, runner):
    killed_and_resumed(make_trio("llama", (torch.bfloat16,) * 3), runner, kills=5, seed=0)


@pytest.mark.slow
def test_twenty_kills(make_trio, runner):
    trio = make_trio("qwen2")
    assert killed_and_resumed(trio, runner, kills=20, seed=1) > 3


def test_finished_files_are_kept_and_damaged_ones_made_again(make_trio, runner, monkeypatch):
    trio = make_trio()
    graft_checkpoint(*trio.paths, trio.folder / "undisturbed", shard_size="40KB")
    finish, calls = folders.Job.finish, []

    def interrupted(job, name, sha256):
        finish(job, name, sha256)
        calls.append(name)
        if len(calls) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(folders.Job, "finish", interrupted)
    with pytest.raises(KeyboardInterrupt):
        graft_checkpoint(*trio.paths, trio.folder / "out", shard_size="40KB")
    assert not (trio.folder / "out").exists()
    work = trio.folder / ".out.partial" / "folder"
    (work / calls[2]).write_bytes(b"damaged")
    kept, calls[:] = calls[:2], []
    monkeypatch.setattr(folders.Job, "finish", lambda *given: (finish(*given), calls.append(given[1])))
    graft_checkpoint(*trio.paths, trio.folder / "out", shard_size="40KB")
    assert calls and not set(calls) & set(kept)
    assert content(trio.folder / "out") == content(trio.folder / "undisturbed")


def test_what_another_job_left_is_not_taken_up(make_trio, runner):
    trio = make_trio()
    child = runner.start([*trio.paths, trio.folder / "out"], pause=0.05)
    work = trio.folder / ".out.partial" / "folder"
    while not any(work.glob("*.safetensors")):
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    runner.end()
    graft_checkpoint(*trio.paths, trio.folder / "out", shard_size="40KB", scale=0.5)
    graft_checkpoint(*trio.paths, trio.folder / "expected", shard_size="40KB", scale=0.5)
    assert content(trio.folder / "out") == content(trio.folder / "expected")


def test_a_full_disk_is_a_clear_error_that_leaves_nothing(make_trio, runner):
    trio = make_trio()
    for limit in (100, 8_000, 30_000):
        runner.start([*trio.paths, trio.folder / "out"], limit=limit)
        status, message = runner.end()
        assert status == 1, message
        assert "error: Cannot write" in message and "Nothing was left behind" in message
        assert sorted(path.name for path in trio.folder.iterdir()) == ["adapter", "base", "post"]


def test_disk_space_is_asked_for_first(make_trio, monkeypatch):
    trio = make_trio()
    usage = shutil.disk_usage(trio.folder)
    monkeypatch.setattr(folders.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(CheckpointError, match=r"The output needs [\d.]+ [kM]B, and the disk of .* has 1\.0 kB free"):
        graft_checkpoint(*trio.paths, trio.folder / "out")
    assert sorted(path.name for path in trio.folder.iterdir()) == ["adapter", "base", "post"]


def test_the_second_of_two_runs_is_refused_and_the_first_ends_well(make_trio, runner):
    trio = make_trio()
    runner.start([*trio.paths, trio.folder / "out"], pause=0.1)
    while not (trio.folder / ".out.partial" / "progress.json").exists():
        time.sleep(0.005)
    with pytest.raises(CheckpointError, match="Another run is writing this output"):
        graft_checkpoint(*trio.paths, trio.folder / "out", shard_size="40KB")
    assert runner.end() == (0, "")
    verify(trio.folder / "out")


def test_an_output_that_exists_is_kept_and_the_same_run_again_does_nothing(make_trio):
    trio = make_trio()
    first = graft_checkpoint(*trio.paths, trio.folder / "out")
    before = {path.name: path.stat().st_mtime_ns for path in (trio.folder / "out").iterdir()}
    assert graft_checkpoint(*trio.paths, trio.folder / "out") == first
    assert {path.name: path.stat().st_mtime_ns for path in (trio.folder / "out").iterdir()} == before
    with pytest.raises(CheckpointError, match="a folder with files in it"):
        graft_checkpoint(*trio.paths, trio.folder / "out", scale=0.5)
    graft_checkpoint(*trio.paths, trio.folder / "out", scale=0.5, overwrite=True)
    assert verify(trio.folder / "out")["request"]["scale"] == 0.5


def test_read_only_inputs_in_a_hub_cache(make_trio):
    trio = make_trio()
    linked = []
    for path in trio.paths:
        blobs = trio.folder / "hub" / path.name / "blobs"
        snapshot = trio.folder / "hub" / path.name / "snapshots" / "0a1b"
        snapshot.mkdir(parents=True)
        blobs.mkdir()
        for index, file in enumerate(sorted(path.iterdir())):
            shutil.copyfile(file, blobs / str(index))
            (blobs / str(index)).chmod(0o444)
            (snapshot / file.name).symlink_to(f"../../blobs/{index}")
        snapshot.chmod(0o555)
        linked.append(snapshot)
    graft_checkpoint(*linked, trio.folder / "out")
    graft_checkpoint(*trio.paths, trio.folder / "expected")
    found, expected = content(trio.folder / "out"), content(trio.folder / "expected")
    different = {name for name in expected if found[name] != expected[name]}
    assert found.keys() == expected.keys() and different == {"manifest.json"}  # it names the inputs' paths


def test_links_out_of_an_input_are_refused(make_trio):
    trio = make_trio()
    secret = trio.folder / "secret.json"
    secret.write_text("{}")
    (trio.folder / "post" / "tokenizer_secret.json").symlink_to(secret)
    with pytest.raises(CheckpointError, match="a link that points outside its folder"):
        graft_checkpoint(*trio.paths, trio.folder / "out")
