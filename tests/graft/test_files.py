"""Files to files: the same tensors as in memory, and known ones byte for byte."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from builders import logits, token_batch
from peft_moe_delta import extend_vocabulary, graft_checkpoint
from peft_moe_delta.checkpoint import CheckpointReader, verify
from peft_moe_delta.errors import CheckpointError, GraftError
from peft_moe_delta.graft.memory import to_stock

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
STOCK = ("llama", "mistral", "qwen2", "qwen3")
TOKENS = token_batch()


def raw(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def assert_same_tensors(found, expected):
    assert set(found) == set(expected)
    different = [name for name in found if found.dtypes[name] != expected.dtypes[name] or not torch.equal(
        raw(found[name]), raw(expected[name]))]  # fmt: skip
    assert different == []


def in_memory(trio, folder, **options):
    trio.model.merge_and_graft(trio.folder / "post", **options).save_pretrained(folder)
    return CheckpointReader(folder)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("expert_rank", [None, 4])
@pytest.mark.parametrize("family", STOCK)
def test_files_are_what_is_grafted_in_memory(make_trio, family, expert_rank, tied):
    trio = make_trio(family, tied=tied, expert_rank=expert_rank)
    output = trio.folder / "out"
    report = graft_checkpoint(*trio.paths, output, expert_scale={"uralic": 0.5}, shard_size="20KB")
    expected = in_memory(trio, trio.folder / "expected", expert_scale={"uralic": 0.5})
    assert_same_tensors(CheckpointReader(output), expected)
    assert len(list(output.glob("model-*.safetensors"))) > 3
    ours, theirs = (json.loads((f / "config.json").read_text()) for f in (output, trio.folder / "expected"))
    assert ours == theirs
    assert report.layout == theirs["model_type"]
    assert verify(output)["request"]["scale"] == 1.0
    assert sorted(path.name for path in trio.folder.iterdir()) == ["adapter", "base", "expected", "out", "post"]
    stock = AutoModelForCausalLM.from_pretrained(output).eval()
    grafted = trio.model.graft(trio.folder / "post", expert_scale={"uralic": 0.5}).eval()
    torch.testing.assert_close(logits(stock, TOKENS), logits(grafted, TOKENS), atol=1e-4, rtol=0)


@pytest.mark.parametrize("expert_rank", [None, 4])
@pytest.mark.parametrize("dtypes", [(BF16, BF16, F32), (BF16, BF16, BF16), (F16, F16, F32), (F32, BF16, F32)])
def test_sixteen_bit_and_mixed_files(make_trio, dtypes, expert_rank):
    trio = make_trio("qwen2", dtypes, expert_rank=expert_rank)
    graft_checkpoint(*trio.paths, trio.folder / "out")
    found = CheckpointReader(trio.folder / "out")
    if dtypes[0] == dtypes[1]:
        assert_same_tensors(found, in_memory(trio, trio.folder / "expected"))
    assert set(found.dtypes.values()) == {dtypes[1]}


def expert_zero(name):
    return name.replace(".mlp.", ".block_sparse_moe.experts.0.").replace("gate_proj", "w1").replace(
        "up_proj", "w3").replace("down_proj", "w2")  # fmt: skip


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("scale", [1.0, 0.0])
def test_at_scale_one_and_zero_known_tensors_are_the_files_bytes(make_trio, scale, dtype):
    trio = make_trio("llama", (dtype,) * 3)
    graft_checkpoint(*trio.paths, trio.folder / "out", scale=scale)
    found, known = CheckpointReader(trio.folder / "out"), CheckpointReader(trio.folder / ("post" if scale else "base"))
    assert all(torch.equal(raw(found[expert_zero(name)]), raw(known[name])) for name in known)
    if not scale:
        to_stock(trio.model).save_pretrained(trio.folder / "ungrafted")
        assert_same_tensors(found, CheckpointReader(trio.folder / "ungrafted"))


@pytest.mark.parametrize("expert_rank", [None, 4])
def test_partial_scales(make_trio, expert_rank):
    trio = make_trio("llama", expert_rank=expert_rank)
    scale = {"self_attn": 0.25, "mlp": 0.5}
    graft_checkpoint(*trio.paths, trio.folder / "out", scale=scale, expert_scale=0.7)
    expected = in_memory(trio, trio.folder / "expected", scale=scale, expert_scale=0.7)
    assert_same_tensors(CheckpointReader(trio.folder / "out"), expected)


@pytest.mark.parametrize("language", ["hu", "en", "az"])
def test_one_language_of_a_hard_routed_adapter(make_trio, language):
    trio = make_trio("qwen3", routing="language")
    with pytest.raises(GraftError, match=r"cannot be encoded.*language="):
        graft_checkpoint(*trio.paths, trio.folder / "out")
    report = graft_checkpoint(*trio.paths, trio.folder / "out", language=language)
    expected = in_memory(trio, trio.folder / "expected", language=language)
    assert_same_tensors(CheckpointReader(trio.folder / "out"), expected)
    assert report.layout == ("qwen3_moe" if language == "hu" else "qwen3")


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "phi3", "bloom", "gpt_neox"])
@pytest.mark.parametrize("expert_rank", [None, 4])
def test_one_language_in_other_families(make_trio, family, expert_rank):
    trio = make_trio(family, routing="language", expert_rank=expert_rank, tied=family in ("gpt2", "gemma2", "bloom"))
    graft_checkpoint(*trio.paths, trio.folder / "out", language="az")
    stock = AutoModelForCausalLM.from_pretrained(trio.folder / "out").eval()
    grafted = trio.model.graft(trio.folder / "post").eval()
    torch.testing.assert_close(logits(stock, TOKENS), logits(grafted, TOKENS, language="az"), atol=1e-4, rtol=0)


def assert_same_adapter(trio, **options):
    """`graft_checkpoint(target="adapter")` against `graft`."""
    graft_checkpoint(*trio.paths, trio.folder / "out", target="adapter", expert_scale=0.5, **options)
    trio.model.graft(trio.folder / "post", expert_scale=0.5).save_pretrained(trio.folder / "expected")
    file = "adapter_model.safetensors"
    assert_same_tensors(CheckpointReader(trio.folder / "out" / file), CheckpointReader(trio.folder / "expected" / file))
    ours, theirs = (json.loads((trio.folder / f / "adapter_config.json").read_text()) for f in ("out", "expected"))
    assert ours == theirs
    post = AutoModelForCausalLM.from_pretrained(trio.folder / "post")
    PeftModel.from_pretrained(post, trio.folder / "out")


@pytest.mark.parametrize("expert_rank", [None, 4])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_grafted_adapter(make_trio, family, expert_rank):
    trio = make_trio(family, expert_rank=expert_rank, modules_to_save=["lm_head"] if family == "llama" else None)
    assert_same_adapter(trio)
    with pytest.raises(GraftError, match="scale must be 1"):
        graft_checkpoint(*trio.paths, trio.folder / "no", target="adapter", scale=0.5)


@pytest.mark.parametrize("expert_rank", [None, 4])
@pytest.mark.parametrize("kind", ["shared_kv", "full"])
@pytest.mark.parametrize("routing", ["learned", "language"])
def test_a_grafted_adapter_with_attention_experts(make_trio, kind, routing, expert_rank):
    trio = make_trio("qwen3", attention_experts=kind, routing=routing, expert_rank=expert_rank)
    assert_same_adapter(trio, check=True)
    with pytest.raises(GraftError, match="no attention experts|cannot be encoded"):
        graft_checkpoint(*trio.paths, trio.folder / "no")


def test_a_grafted_adapter_with_classifiers_that_has_grown(make_trio):
    trio = make_trio(routing="classifier", classifier_layers=[0, 1])
    trio.model.add_languages({"bn": "indic"}, {"indic": 1})
    trio.model.start_review()
    trio.model.save_pretrained(trio.folder / "adapter")
    assert_same_adapter(trio, check=True)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("tied", [False, True])
def test_a_grafted_adapter_with_new_tokens(make_trio_with_tokens, tied, dtype):
    assert_same_adapter(make_trio_with_tokens(tied=tied, dtype=dtype), check=True)


@pytest.mark.parametrize(("family", "tied"), [("llama", False), ("qwen3", True)])
@pytest.mark.parametrize("options", [{"scale": 0.5}, {"expert_scale": 0.5}])
def test_new_tokens_get_rows_and_the_tokenizer_knows_them(make_trio_with_tokens, family, tied, options):
    trio = make_trio_with_tokens(family, tied=tied)
    report = graft_checkpoint(*trio.paths, trio.folder / "out", check=True, **options)
    merged = trio.model.merge_and_graft(trio.folder / "post", **options)
    merged.save_pretrained(trio.folder / "expected")
    assert_same_tensors(CheckpointReader(trio.folder / "out"), CheckpointReader(trio.folder / "expected"))
    ours, theirs = (json.loads((trio.folder / f / "config.json").read_text()) for f in ("out", "expected"))
    assert ours == theirs
    assert report.new_tokens == merged.graft_report.new_tokens and report.new_tokens
    assert report.first_new_token_id == merged.graft_report.first_new_token_id
    chat = AutoTokenizer.from_pretrained(trio.folder / "post")
    written = AutoTokenizer.from_pretrained(trio.folder / "out")
    assert written.get_vocab() == extend_vocabulary(merged, chat).get_vocab()
    assert len(written) == ours["vocab_size"]
    assert (trio.folder / "out" / "tokenizer.json").name in verify(trio.folder / "out")["files"]


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_embeddings_of_another_number_of_rows_are_matched_by_token(make_trio_with_tokens, scale):
    trio = make_trio_with_tokens(new_tokens=False, modules_to_save=["lm_head"])
    graft_checkpoint(*trio.paths, trio.folder / "out", scale=scale, check=True)
    assert_same_tensors(CheckpointReader(trio.folder / "out"), in_memory(trio, trio.folder / "expected", scale=scale))
    before, after = ((trio.folder / f / "tokenizer.json").read_bytes() for f in ("post", "out"))
    assert before == after


def test_a_base_of_averaged_weights_is_refused_as_in_memory(make_trio):
    trio = make_trio()
    trio.model.peft_config["default"].change(mixed={"others": "average"})
    trio.model.save_pretrained(trio.folder / "adapter")
    for graft in (trio.model.graft, lambda post: graft_checkpoint(*trio.paths, trio.folder / "out")):
        with pytest.raises(GraftError, match="are an average of the models"):
            graft(trio.folder / "post")


def test_a_wrong_base_is_refused_before_anything_is_written(make_trio):
    trio = make_trio()
    _, post, adapter = trio.paths
    with pytest.raises(CheckpointError, match="other base weights"):
        graft_checkpoint(post, post, adapter, trio.folder / "deep" / "out")
    assert not (trio.folder / "deep").exists()


def test_weights_that_are_not_renormalised_are_refused(make_trio):
    trio = make_trio(top_k=1, norm_topk_prob=False)
    with pytest.raises(GraftError, match="norm_topk_prob=False does not"):
        graft_checkpoint(*trio.paths, trio.folder / "out")
    assert not (trio.folder / "out").exists()
