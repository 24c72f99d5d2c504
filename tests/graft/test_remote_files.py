"""Remote code from files to files: the same folder as in memory, for what no stock architecture holds."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from graft.test_files import assert_same_tensors
from peft_moe_delta import graft_checkpoint
from peft_moe_delta.checkpoint import CheckpointReader, verify
from peft_moe_delta.cli import main
from peft_moe_delta.errors import CheckpointError, GraftError

F32, BF16 = torch.float32, torch.bfloat16
UNEQUAL = {"uralic": [2, 1], "turkic": [1, 0]}


def assert_same_folder(trio, **options):
    """`graft_checkpoint(target="remote_code")` against `merge_and_graft(remote_code=True)`; gives the report."""
    output, expected = trio.folder / "out", trio.folder / "expected"
    report = graft_checkpoint(*trio.paths, output, target="remote_code", shard_size="20KB", check=True, **options)
    merged = trio.model.merge_and_graft(trio.folder / "post", remote_code=True, **options)
    merged.save_pretrained(expected)
    assert_same_tensors(CheckpointReader(output), CheckpointReader(expected))
    configs = [json.loads((folder / "config.json").read_text()) for folder in (output, expected)]
    assert configs[0] == configs[1]
    file = "modeling_moe_delta.py"
    assert (output / file).read_bytes() == (expected / file).read_bytes()
    assert file in verify(output)["files"]
    assert report.layout == merged.graft_report.layout == configs[0]["model_type"]
    assert report.max_logit_difference <= 1e-4
    return report


@pytest.mark.parametrize("expert_rank", [None, 4])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "bloom"])
def test_unequal_experts_and_other_families(make_trio, family, expert_rank):
    tied = family in ("gemma2", "gpt2", "bloom")
    trio = make_trio(family, experts=UNEQUAL, expert_rank=expert_rank, tied=tied)
    with pytest.raises(GraftError, match='target="remote_code"'):
        graft_checkpoint(*trio.paths, trio.folder / "out")
    assert_same_folder(trio, scale={"self_attn": 0.5}, expert_scale=0.5)


def test_sixteen_bits_keep_routers_in_fp32(make_trio, holds):
    trio = make_trio("llama", (BF16, BF16, BF16), experts=UNEQUAL)
    report = assert_same_folder(trio)
    assert CheckpointReader(trio.folder / "out").dtypes["model.layers.0.mlp.router.weight"] == F32
    holds(report.route_agreement, above=0.9)


def test_routing_by_language(make_trio):
    trio = make_trio("qwen3", routing="language")
    with pytest.raises(GraftError, match='target="remote_code"'):
        graft_checkpoint(*trio.paths, trio.folder / "out")
    assert_same_folder(trio)
    with pytest.raises(GraftError, match="'az' runs on is a plain 'qwen3' model.*target=\"stock\""):
        graft_checkpoint(*trio.paths, trio.folder / "az", target="remote_code", language="az")


@pytest.mark.parametrize("expert_rank", [None, 4])
@pytest.mark.parametrize("kind", ["shared_kv", "full"])
@pytest.mark.parametrize("routing", ["learned", "language"])
def test_attention_experts(make_trio, kind, routing, expert_rank):
    trio = make_trio("qwen3", attention_experts=kind, routing=routing, expert_rank=expert_rank)
    assert_same_folder(trio, expert_scale=0.5)


def test_one_language_with_attention_experts_is_a_dense_model(make_trio):
    trio = make_trio("llama", attention_experts="full", routing="language", experts={"uralic": 1, "turkic": 1})
    report = graft_checkpoint(*trio.paths, trio.folder / "out", language="az", check=True)
    assert report.layout == "llama"
    merged = trio.model.merge_and_graft(trio.folder / "post", language="az")
    merged.save_pretrained(trio.folder / "expected")
    assert_same_tensors(CheckpointReader(trio.folder / "out"), CheckpointReader(trio.folder / "expected"))


def test_a_mixture_of_one_language_with_attention_experts(make_trio):
    trio = make_trio("llama", attention_experts="shared_kv", routing="language")
    assert_same_folder(trio, language="hu")


def test_classifiers(make_trio):
    trio = make_trio(routing="classifier", classifier_layers=[1])
    with pytest.raises(GraftError, match='no gate before them.*target="remote_code"'):
        graft_checkpoint(*trio.paths, trio.folder / "out")
    assert_same_folder(trio)


def test_weights_that_are_not_renormalised(make_trio):
    assert_same_folder(make_trio(top_k=1, norm_topk_prob=False))


@pytest.mark.parametrize("tied", [False, True])
def test_new_tokens(make_trio_with_tokens, tied):
    assert_same_folder(make_trio_with_tokens(tied=tied, experts=UNEQUAL))


def test_where_a_stock_architecture_would_do_the_target_is_still_what_was_asked_for(make_trio, capsys):
    trio = make_trio("llama")
    report = graft_checkpoint(*trio.paths, trio.folder / "out", target="remote_code", check=True)
    assert report.layout == "moe_delta_llama"
    main(["graft", *map(str, trio.paths), str(trio.folder / "again"), "--target", "remote_code"])
    assert capsys.readouterr().out.startswith("moe_delta_llama checkpoint: ")
    assert_same_tensors(CheckpointReader(trio.folder / "again"), CheckpointReader(trio.folder / "out"))
    with pytest.raises(GraftError, match="leave out replicate_dense_layers"):
        graft_checkpoint(*trio.paths, trio.folder / "no", target="remote_code", replicate_dense_layers=True)
    with pytest.raises(GraftError, match="one of: stock, remote_code, adapter"):
        graft_checkpoint(*trio.paths, trio.folder / "no", target="gguf")


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("0.mlp.moe_delta_classifier", "lacks classifiers of the layers"),
        ("1.self_attn.moe_delta_experts.1", "attention experts in the layers"),
        ("1.mlp.moe_delta_router", "MLP experts in the layers"),
        ("embed_tokens.moe_delta_rows", "lacks the rows of its config's new tokens"),
    ],
)
def test_an_adapter_that_lacks_a_part_is_refused(make_trio_with_tokens, part, message):
    trio = make_trio_with_tokens(tied=True, attention_experts="full", routing="classifier", classifier_layers=[0, 1])
    file = trio.folder / "adapter" / "adapter_model.safetensors"
    save_file({name: tensor for name, tensor in load_file(file).items() if f"{part}." not in name}, file)
    with pytest.raises(CheckpointError, match=message):
        graft_checkpoint(*trio.paths, trio.folder / "out", target="adapter")
    assert not (trio.folder / "out").exists()
