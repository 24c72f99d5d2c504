"""Remote code from files to files: the same folder as in memory, for what no stock architecture holds."""

from __future__ import annotations

import json

import pytest
import torch

from peft_moe_delta import graft_checkpoint
from peft_moe_delta.checkpoint import CheckpointReader, verify
from peft_moe_delta.errors import GraftError
from streaming.test_graft_checkpoint import assert_same_tensors

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


def test_sixteen_bits_keep_routers_in_fp32(make_trio):
    trio = make_trio("llama", (BF16, BF16, BF16), experts=UNEQUAL)
    report = assert_same_folder(trio)
    assert CheckpointReader(trio.folder / "out").dtypes["model.layers.0.mlp.router.weight"] == F32
    assert report.route_agreement > 0.9


def test_routing_by_language(make_trio):
    trio = make_trio("qwen3", routing="language")
    with pytest.raises(GraftError, match='target="remote_code"'):
        graft_checkpoint(*trio.paths, trio.folder / "out")
    assert_same_folder(trio)
    with pytest.raises(GraftError, match="'az' runs on is a plain 'qwen3' model.*target=\"stock\""):
        graft_checkpoint(*trio.paths, trio.folder / "az", target="remote_code", language="az")


def test_where_a_stock_architecture_would_do_the_target_is_still_what_was_asked_for(make_trio):
    trio = make_trio("llama")
    report = graft_checkpoint(*trio.paths, trio.folder / "out", target="remote_code", check=True)
    assert report.layout == "moe_delta_llama"
    with pytest.raises(GraftError, match="leave out replicate_dense_layers"):
        graft_checkpoint(*trio.paths, trio.folder / "no", target="remote_code", replicate_dense_layers=True)
    with pytest.raises(GraftError, match="one of: stock, remote_code, adapter"):
        graft_checkpoint(*trio.paths, trio.folder / "no", target="gguf")
