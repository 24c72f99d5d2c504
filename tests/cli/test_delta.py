"""`peft-moe-delta delta`: the three jobs on files, and what they refuse."""

from __future__ import annotations

import copy
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from builders import perturbed, pico, randomise_experts, upcycle
from greek import make_tokenizer
from peft_moe_delta.cli import main
from peft_moe_delta.graft.delta import PostTrainingDelta
from peft_moe_delta.graft.files import graft_checkpoint
from peft_moe_delta.graft.stored import DeltaFile


@pytest.fixture
def pair(tmp_path):
    """Base and post-trained checkpoints, the latter with one special token more, and an adapter of the former."""
    tokenizer = make_tokenizer()
    base = pico(vocab_size=len(tokenizer) + 4)
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    chat = copy.deepcopy(tokenizer)
    chat.add_special_tokens({"additional_special_tokens": ["<chat>"]})
    post = perturbed(base, scale=0.05)
    post.resize_token_embeddings(len(chat), mean_resizing=False)
    post.save_pretrained(tmp_path / "post", max_shard_size="20KB")
    chat.save_pretrained(tmp_path / "post")
    return tmp_path


def run(capsys, *arguments):
    main(["delta", *map(str, arguments)])
    return capsys.readouterr().out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_shared_delta_brings_back_the_post_trained_checkpoint(pair, capsys, dtype):
    for side in ("base", "post"):
        AutoModelForCausalLM.from_pretrained(pair / side, dtype=dtype).save_pretrained(pair / side)
    text = run(capsys, "compute", pair / "base", pair / "post", "--output", pair / "d.safetensors")
    assert "bit for bit" in text and "| mlp |" in text and "Doubtful" not in text
    found = PostTrainingDelta.load(pair / "d.safetensors", pair / "base").post_trained
    expected = AutoModelForCausalLM.from_pretrained(pair / "post", dtype=dtype).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert text.startswith(run(capsys, "inspect", pair / "d.safetensors").strip()[:200])


def test_a_small_form_says_what_it_costs(pair, capsys):
    exact, small = pair / "d.safetensors", pair / "s.safetensors"
    run(capsys, "compute", pair / "base", pair / "post", "--output", exact)
    text = run(
        capsys, "compute", pair / "base", pair / "post", "--rank", 2, "--dtype", "bfloat16", "--output", small
    )  # fmt: skip
    assert "in low rank" in text and "come back otherwise" in text
    assert small.stat().st_size < exact.stat().st_size / 3
    assert max(row.error for row in DeltaFile.open(small).report().families) > 0.1


@pytest.mark.parametrize("expert_rank", [None, 4])
def test_experts_are_compared_with_the_delta(pair, capsys, expert_rank):
    model = upcycle(AutoModelForCausalLM.from_pretrained(pair / "base"), expert_rank=expert_rank)
    randomise_experts(model)
    if expert_rank is None:  # the first expert undoes what post-training does
        base, post = (AutoModelForCausalLM.from_pretrained(pair / side).state_dict() for side in ("base", "post"))
        for index, layer in enumerate(model.base_model.layers().values()):
            for name, parameter in layer.experts("default")[1].named_parameters():
                key = f"model.layers.{index}.mlp.{name}"
                parameter.data = 2 * base[key] - post[key]
    model.save_pretrained(pair / "adapter")
    file = pair / "d.safetensors"
    run(capsys, "compute", pair / "base", pair / "post", "--output", file)
    text = run(capsys, "inspect", file, "--base", pair / "base", "--adapter", pair / "adapter")
    rows = [line.split("|") for line in text.splitlines() if line.startswith(("| 1 |", "| 2 |", "| 3 |"))]
    assert len(rows) == 3
    assert all(abs(float(row[2])) < 0.2 for row in rows[1:])
    assert ("Doubtful: expert 1" in text) == (expert_rank is None)
    if expert_rank is None:
        assert float(rows[0][2]) == pytest.approx(-1, abs=1e-3)


def test_deltas_are_combined_and_drawn(pair, capsys):
    pytest.importorskip("matplotlib")
    file, both = pair / "d.safetensors", pair / "both.safetensors"
    run(capsys, "compute", pair / "base", pair / "post", "--output", file)
    (pair / "again").write_bytes(file.read_bytes())
    text = run(capsys, "combine", "--delta", f"{file}=0.5", "--delta", f"{pair}/again=-0.25", "--output", both)
    assert "A combination" in text
    one, quarter = (DeltaFile.open(path).delta("model.norm.weight") for path in (file, both))
    torch.testing.assert_close(quarter, one / 4)
    run(capsys, "inspect", file, "--picture", pair / "d.png")
    assert (pair / "d.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_error_says_so(pair, capsys, monkeypatch):
    run(capsys, "compute", pair / "base", pair / "post", "--output", pair / "d.safetensors")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SystemExit, match="needs matplotlib"):
        run(capsys, "inspect", pair / "d.safetensors", "--picture", pair / "d.png")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("inspect", "nowhere"), "no such folder"),
        (("inspect", "{base}/model.safetensors"), "no post-training delta"),
        (("inspect", "{base}/model.safetensors", "--adapter", "x"), "go together"),
        (("compute", "{base}", "{base}", "--rank", "0", "--output", "{base}/d"), "at least 1"),
        (("combine", "--delta", "x=y", "--output", "{base}/d"), "finite number"),
    ],
)
def test_what_cannot_be_done_is_refused(pair, capsys, arguments, message):
    with pytest.raises(SystemExit, match=message):
        run(capsys, *(argument.format(base=pair / "base") for argument in arguments))


def test_a_delta_applied_is_the_post_trained_model_and_grafts_as_it_does(pair, capsys):
    delta, again = pair / "d.safetensors", pair / "again"
    run(capsys, "compute", pair / "base", pair / "post", "--output", delta)
    with pytest.raises(SystemExit, match="pass its folder.*--like"):
        main(["delta", "apply", str(delta), str(pair / "base"), "--output", str(again)])
    assert not list(pair.glob("*again*"))
    like = pair / "like"  # what a Hub repository without weights would hold
    shutil.copytree(pair / "post", like, ignore=shutil.ignore_patterns("*.safetensors*"))
    run(capsys, "apply", delta, pair / "base", "--like", like, "--output", again)
    expected, found = (AutoModelForCausalLM.from_pretrained(folder) for folder in (pair / "post", again))
    assert all(torch.equal(found.state_dict()[name], tensor) for name, tensor in expected.state_dict().items())
    assert AutoTokenizer.from_pretrained(again).get_vocab() == AutoTokenizer.from_pretrained(like).get_vocab()

    adapter = upcycle(AutoModelForCausalLM.from_pretrained(pair / "base"))
    randomise_experts(adapter)
    adapter.save_pretrained(pair / "adapter")
    for name, post in (("one", pair / "post"), ("other", again)):
        graft_checkpoint(pair / "base", post, pair / "adapter", pair / name)
    one, other = (load_file(pair / name / "model.safetensors") for name in ("one", "other"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_combination_applied(pair, capsys, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(pair / "base")
    for name, seed in (("first", 1), ("second", 2)):
        perturbed(base, seed=seed, scale=0.05).save_pretrained(pair / name)
        run(capsys, "compute", pair / "base", pair / name, "--output", pair / f"{name}.safetensors")
    weights = [f"--delta={pair / name}.safetensors={share}" for name, share in (("first", 1.0), ("second", 0.5))]
    run(capsys, "combine", *weights, "--output", pair / "both.safetensors")
    run(capsys, "apply", pair / "both.safetensors", pair / "base", "--output", pair / "both")
    own, one, other, both = (
        AutoModelForCausalLM.from_pretrained(pair / name).state_dict() for name in ("base", "first", "second", "both")
    )
    for name, weight in own.items():
        expected = (
            weight.double() + (one[name].double() - weight.double()) + 0.5 * (other[name].double() - weight.double())
        )
        assert (both[name].double() - expected).abs().max() < 1e-7, name
    with pytest.raises(SystemExit, match="another base model"):
        main(["delta", "apply", str(pair / "both.safetensors"), str(pair / "first"), "--output", str(pair / "none")])
    assert not list(pair.glob("*none*"))
