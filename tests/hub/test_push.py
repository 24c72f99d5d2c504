"""Models go to the Hub and come back as they were, whatever fails on the way."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel

import peft_moe_delta
from builders import logits
from hub import client
from hub.loopback import READER, USER, Fault, LoopbackHub, lfs_oid
from peft_moe_delta.checkpoint import CheckpointReader
from peft_moe_delta.errors import CheckpointError, HubError

KINDS = ("adapter", "grafted", "stock")


def assert_same(found: list, expected: list) -> None:
    """Logits of two processes: where tensors lie in memory decides the order of sums, so the last bits may differ."""
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected))


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_arrives_in_one_commit_and_comes_back_byte_equal(call, hub: LoopbackHub, models, kind):
    repo = f"{USER}/{kind}"
    address = call(client.push, str(models[kind]), repo)
    repository = hub.repositories[repo]
    assert repository.messages == ["initial commit", "Upload with peft-moe-delta"]
    assert address.endswith(repository.branches["main"])

    here = {path.name: path.read_bytes() for path in models[kind].iterdir() if path.name != "README.md"}
    back = {path.name: path.read_bytes() for path in Path(call(client.download, repo)).iterdir()}
    assert {name: back[name] for name in here} == here
    weights = [name for name in here if name.endswith(".safetensors")]
    assert weights and all(lfs_oid(here[name]) in hub.objects for name in weights)
    assert set(back) - set(here) == {"README.md", ".gitattributes"}
    assert "peft-moe-delta" in call(client.card_metadata, repo)["tags"]


def test_models_in_memory_arrive_whole(call, hub: LoopbackHub, models):
    """Base and post-trained model are Hub ids by then, as the models that name them are used elsewhere."""
    base, post_trained = f"{USER}/base", f"{USER}/post-trained"
    call(client.push, str(models["base"]), base)
    call(client.push, str(models["post_trained"]), post_trained)
    call(client.push_loaded, base, str(models["adapter"]), post_trained, f"{USER}/loaded")
    for kind in KINDS:
        files = hub.files(f"{USER}/loaded-{kind}")
        weights = "model.safetensors" if kind == "stock" else "adapter_model.safetensors"
        assert files[weights] == (models[kind] / weights).read_bytes()
        assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "README.md"} <= set(files)
        assert ("graft.json" if kind == "stock" else "plan.json") in files
        assert call(client.chat_template, f"{USER}/loaded-{kind}") == "{{ messages }}"
        assert len(hub.repositories[f"{USER}/loaded-{kind}"].messages) == 2
    assert call(client.card_metadata, f"{USER}/loaded-grafted")["base_model"] == [post_trained]

    expected = logits(PeftModel.from_pretrained(client.load(models["base"]), models["adapter"]), client.TOKENS).tolist()
    assert_same(call(client.adapter_logits, base, f"{USER}/loaded-adapter"), expected)
    grafted = logits(client.load(models["stock"]), client.TOKENS).tolist()
    assert_same(call(client.graft_logits, base, f"{USER}/loaded-adapter", post_trained), grafted)
    assert_same(call(client.model_logits, f"{USER}/loaded-stock"), grafted)


def test_the_stock_model_needs_none_of_this_package(call, hub_environment, models, tmp_path):
    call(client.push, str(models["stock"]), f"{USER}/stand-alone")
    script, proof = Path(peft_moe_delta.__file__).parent / "recipe/reload.py", tmp_path / "proof.safetensors"
    environment = {**os.environ, **hub_environment, "HF_HOME": str(tmp_path / "home")}
    arguments = [sys.executable, str(script), f"{USER}/stand-alone", str(proof)]
    subprocess.run(arguments, env=environment, cwd=tmp_path, check=True, capture_output=True)
    found = CheckpointReader(proof)
    assert found.metadata["architecture"] == "MixtralForCausalLM"
    torch.testing.assert_close(logits(client.load(models["stock"]), found["input_ids"]), found["logits"])


def test_a_revision_keeps_its_own_weights(call, hub: LoopbackHub, models, tmp_path):
    repo = f"{USER}/revisions"
    other = PeftModel.from_pretrained(client.load(models["base"]), models["adapter"])
    for parameter in other.parameters():
        parameter.data *= 1.5
    other.save_pretrained(tmp_path)
    call(client.push, str(models["adapter"]), repo)
    before = hub.files(repo)
    call(client.push, str(tmp_path), repo, revision="stronger")
    assert hub.files(repo) == before
    base = str(models["base"])
    assert call(client.adapter_logits, base, repo) != call(client.adapter_logits, base, repo, "stronger")
    first = hub.repositories[repo].branches["main"]
    assert_same(call(client.adapter_logits, base, repo), call(client.adapter_logits, base, repo, first))


def test_resolve_finds_weights_and_no_pickles(call, hub: LoopbackHub, models):
    repo = f"{USER}/resolved"
    call(client.push, str(models["stock"]), repo)
    repository = hub.repositories[repo]
    repository.commit("main", {**hub.files(repo), "pytorch_model.bin": b"evil"}, "by somebody else")
    names = call(client.resolved, repo)
    assert "model.safetensors" in names and "pytorch_model.bin" not in names
    with pytest.raises(CheckpointError, match="at revision 'nowhere'"):
        call(client.resolved, repo, "nowhere")
    with pytest.raises(CheckpointError, match="is no folder here, and the Hub does not give it"):
        call(client.resolved, f"{USER}/nothing-there")


def test_the_next_upload_replaces_all_weights(call, hub: LoopbackHub, models):
    """A file left over beside the new ones could be the one that is loaded."""
    repo = f"{USER}/replaced"
    call(client.push, str(models["adapter"]), repo)
    repository = hub.repositories[repo]
    repository.commit("main", {**hub.files(repo), "pytorch_model.bin": b"", "NOTES.txt": b"mine"}, "by hand")
    call(client.push, str(models["stock"]), repo)
    files = hub.files(repo)
    assert [name for name in files if name.endswith((".safetensors", ".bin"))] == ["model.safetensors"]
    assert files["NOTES.txt"] == b"mine"


@pytest.mark.parametrize(("token", "status"), [("hf_expired", 401), (READER, 403)])
def test_a_refused_token_is_said_so(call, hub: LoopbackHub, models, token, status):
    with pytest.raises(HubError, match=rf"refuses to let this token write to {USER}/secret.*hf auth login") as caught:
        call(client.push, str(models["adapter"]), f"{USER}/secret", token=token)
    assert token not in str(caught.value)
    assert f"{USER}/secret" not in hub.repositories


def test_somebody_elses_name_is_refused(call, hub: LoopbackHub, models):
    with pytest.raises(HubError, match="refuses to let this token write to google/mine"):
        call(client.push, str(models["adapter"]), "google/mine")
    with pytest.raises(HubError, match="no repository name"):
        call(client.push, str(models["adapter"]), "no such/name")


def test_a_hub_out_of_reach_is_said_so(call, models):
    with pytest.raises(HubError, match="could not be reached"):
        call(client.push_to_nobody, str(models["adapter"]), f"{USER}/unreached")


@pytest.mark.parametrize("status", [None, 503], ids=["line cut half way", "service unavailable"])
def test_a_broken_upload_is_retried(call, hub: LoopbackHub, models, status):
    hub.objects.clear()
    hub.faults = [Fault("PUT", "/objects/", status)]
    repo = f"{USER}/retried-{status}"
    call(client.push, str(models["adapter"]), repo)
    assert hub.asked("PUT", "/objects/") == 2
    weights = "adapter_model.safetensors"
    assert hub.files(repo)[weights] == (models["adapter"] / weights).read_bytes()


@pytest.mark.parametrize(
    "step", ["POST /api/repos/create", "GET /tree/", "POST /preupload/", "PUT /objects/", "POST /commit/"]
)
@pytest.mark.parametrize(("status", "said"), [(404, "The Hub answers, but"), (403, "refuses"), (413, "status 413")])
def test_whatever_the_hub_refuses_is_said_with_its_status(call, hub: LoopbackHub, models, step, status, said):
    hub.objects.clear()
    hub.faults = [Fault(*step.split(), status, times=9)]
    with pytest.raises(HubError, match=rf"{said}.*out of order"):
        call(client.push, str(models["adapter"]), f"{USER}/refused-{status}")


def test_what_a_training_leaves_behind_stays_home(call, hub: LoopbackHub, models, tmp_path):
    folder = shutil.copytree(models["adapter"], tmp_path / "adapter")
    for name in ("training_args.bin", "optimizer.pt", "rng_state_0.pth", "scheduler.pt", "trainer_state.json"):
        (folder / name).write_bytes(b"{}")
    shutil.copytree(models["adapter"], folder / "checkpoint-20")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "notes.json").write_text("{}")
    call(client.push, str(folder), f"{USER}/trained")
    call(client.push, str(models["adapter"]), f"{USER}/saved")
    assert set(hub.files(f"{USER}/trained")) == set(hub.files(f"{USER}/saved"))
    (folder / "pytorch_model.bin").write_bytes(b"evil")
    with pytest.raises(CheckpointError, match=r"pickled weights \(pytorch_model.bin\)"):
        call(client.push, str(folder), f"{USER}/trained")


def test_the_command_prints_the_address_and_no_requests(hub: LoopbackHub, hub_environment, models):
    script = "from peft_moe_delta.cli import main; main()"
    command = [sys.executable, "-c", script, "push", str(models["stock"]), f"{USER}/from-the-command-line"]
    environment = {**os.environ, **hub_environment}
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    assert re.fullmatch(r"http://\S+/from-the-command-line/commit/\w+\n", done.stdout)
    assert "HTTP Request" not in done.stderr


def test_after_a_failure_nothing_is_visible_and_what_arrived_is_not_sent_again(call, hub: LoopbackHub, models):
    hub.objects.clear()
    hub.faults = [Fault("POST", "/commit/", 400)]
    repo = f"{USER}/failed"
    with pytest.raises(HubError, match=r"failed \(status 400\).*as it was. Try again"):
        call(client.push, str(models["stock"]), repo)
    assert list(hub.files(repo)) == [".gitattributes"]
    call(client.push, str(models["stock"]), repo)
    assert hub.asked("PUT", "/objects/") == 1
    assert hub.files(repo)["model.safetensors"] == (models["stock"] / "model.safetensors").read_bytes()


def test_only_safetensors_are_published(call, hub: LoopbackHub, models, tmp_path):
    with pytest.raises(CheckpointError, match="holds no safetensors"):
        call(client.push, str(tmp_path), f"{USER}/bad")
    (tmp_path / "pytorch_model.bin").write_bytes(b"evil")
    with pytest.raises(CheckpointError, match=r"pickled weights \(pytorch_model.bin\)"):
        call(client.push, str(tmp_path), f"{USER}/bad")
    with pytest.raises(CheckpointError, match="no such folder"):
        call(client.push, str(tmp_path / "nowhere"), f"{USER}/bad")
    assert f"{USER}/bad" not in hub.repositories


def test_a_link_out_of_the_folder_is_not_followed(call, hub: LoopbackHub, models, tmp_path):
    """What it points at may be anybody's; a Hub cache's links to its own files are how that cache works."""
    secret = tmp_path / "secret.json"
    secret.write_text("{}")
    folder = shutil.copytree(models["adapter"], tmp_path / "adapter")
    (folder / "notes.json").symlink_to(secret)
    with pytest.raises(
        CheckpointError, match=r"notes\.json is a link that points outside its folder, to .*secret\.json"
    ):
        call(client.push, str(folder), f"{USER}/linked")
    (folder / "notes.json").unlink()
    (folder / "secret.txt").symlink_to(secret)  # not published by any name
    call(client.push, str(folder), f"{USER}/linked")
    assert "secret.txt" not in hub.files(f"{USER}/linked")

    snapshot, blobs = tmp_path / "cache" / "snapshots" / "c0ffee", tmp_path / "cache" / "blobs"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in models["adapter"].iterdir():
        shutil.copy(path, blobs / path.name)
        (snapshot / path.name).symlink_to(blobs / path.name)
    call(client.push, str(snapshot), f"{USER}/cached")
    weights = "adapter_model.safetensors"
    assert hub.files(f"{USER}/cached")[weights] == (models["adapter"] / weights).read_bytes()


def test_an_adapter_over_a_local_folder_says_that_nobody_has_it(models):
    from peft_moe_delta.hub.push import _with_base

    config = (models["adapter"] / "adapter_config.json").read_bytes()
    with pytest.warns(UserWarning, match=r"names '.*base' as its base model, which nobody else has. Pass base_model"):
        assert _with_base(config, None) == config


def test_transformers_own_method_works_as_well(call, hub: LoopbackHub, models):
    call(client.push_as_transformers_does, str(models["stock"]), f"{USER}/plain")
    assert_same(call(client.model_logits, f"{USER}/plain"), call(client.model_logits, str(models["stock"])))
