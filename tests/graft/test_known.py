"""What an earlier version made still loads, and is still made: the same bytes."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM

from builders import pico
from graft.known import CASES, exact_noise, exact_weights, of_folder
from peft_moe_delta import graft_checkpoint

BEFORE = "674a637"
FIXTURE = Path(__file__).with_name(f"made_by_{BEFORE}")
REPOSITORY = Path(__file__).resolve().parents[2]
SMALL = {
    "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
    "vocab_size": 64,
}  # fmt: skip


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    """Base and post-trained model of an adapter that an earlier version saved, and that adapter."""
    folder = tmp_path_factory.mktemp("known")
    base = exact_weights(pico("llama", **SMALL))
    base.save_pretrained(folder / "base")
    exact_noise(copy.deepcopy(base), 1299709, 8192).save_pretrained(folder / "post")
    shutil.copytree(FIXTURE, folder / "adapter")
    return folder


@pytest.mark.parametrize(
    ("form", "options"),
    [("grafted", {"expert_scale": 0.75}), ("stock", {"scale": 0.5, "expert_scale": {"turkic": 0.25}})],
)
def test_an_adapter_of_an_earlier_version_grafts_to_the_same_bytes(known, tmp_path, form, options):
    expected = json.loads((FIXTURE / "hashes.json").read_text())[form]
    base = AutoModelForCausalLM.from_pretrained(known / "base")
    model = PeftModel.from_pretrained(base, known / "adapter")
    graft = model.graft if form == "grafted" else model.merge_and_graft
    graft(known / "post", **options).save_pretrained(tmp_path / form)
    assert without_gates(of_folder(tmp_path / form)) == without_gates(expected)
    where = (known / "base", known / "post", known / "adapter", tmp_path / "files")
    graft_checkpoint(*where, target="adapter" if form == "grafted" else "stock", **options)
    assert without_gates(of_folder(tmp_path / "files")) == without_gates(expected)


def without_gates(parts):
    """An empty shared expert has a gate of ones now, where it was one of zeros: llama.cpp divided zero by zero."""
    return {name: value for name, value in parts.items() if not name.endswith("shared_expert_gate.weight")}


def made_by(package, output, cases):
    """Run `known` with the package and the tests of a checkout."""
    environment = {**os.environ, "PYTHONPATH": f"{package}{os.pathsep}{package / 'tests'}", "OMP_NUM_THREADS": "1"}
    script = Path(__file__).with_name("known.py")
    subprocess.run([sys.executable, script, output, *cases], cwd=package, env=environment, check=True)
    return json.loads(output.read_text())


@pytest.mark.slow
def test_everything_has_the_bytes_it_had_before(tmp_path):
    git = ["git", "-C", str(REPOSITORY)]
    if subprocess.run([*git, "cat-file", "-e", f"{BEFORE}^{{commit}}"], capture_output=True).returncode:
        pytest.skip(f"commit {BEFORE} is not in this clone")
    before = tmp_path / "before"
    subprocess.run([*git, "worktree", "add", "--detach", str(before), BEFORE], check=True, capture_output=True)
    try:
        expected = made_by(before, tmp_path / "before.json", CASES)
    finally:
        subprocess.run([*git, "worktree", "remove", "--force", str(before)], check=True)
    found = made_by(REPOSITORY, tmp_path / "now.json", CASES)
    for case, parts in expected.items():
        if case.startswith("gpt_neox") and "embed_out.weight" in found[case]["stock"]:
            # A dense GPT-NeoX model is saved under its family's own name for the head, in memory as from files.
            parts["stock"]["embed_out.weight"] = parts["stock"].pop("lm_head.weight")
        for form in parts.keys() | found[case].keys():
            ours, theirs = found[case].get(form), parts.get(form)
            if isinstance(ours, dict) and isinstance(theirs, dict):
                ours, theirs = without_gates(ours), without_gates(theirs)
            assert ours == theirs, (case, form)
