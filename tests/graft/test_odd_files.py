"""Checkpoints as people have them: heads stored once or twice or on their own, other prefixes, leftovers, templates.

Whatever grafts in memory grafts from files, with the same bytes.
"""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from builders import FAMILIES, logits, perturbed, pico, randomise, token_batch, upcycle
from graft.test_files import assert_same_tensors
from peft_moe_delta import PostTrainingDelta, graft_checkpoint
from peft_moe_delta.checkpoint import CheckpointReader, verify
from peft_moe_delta.errors import CheckpointError
from peft_moe_delta.graft.memory import to_stock

TOKENS = token_batch()

pytestmark = [
    pytest.mark.filterwarnings("ignore:Grafting looks doubtful. embeddings:UserWarning"),  # such as heads of their own
    pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings=True. and a tied layer:UserWarning"),  # peft 0.21
]


def rewrite(folder, change):
    """Change a checkpoint's tensors, {name: tensor} -> {name: tensor}, into one file."""
    weights = {}
    for file in folder.glob("*.safetensors"):
        weights |= load_file(file)
        file.unlink()
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    changed = {name: tensor.contiguous().clone() for name, tensor in change(weights).items()}
    save_file(changed, folder / "model.safetensors", {"format": "pt"})


def with_copied_head(weights):
    name = next(name for name in weights if name.endswith(("embed_tokens.weight", "wte.weight")))
    return weights | {"lm_head.weight": weights[name]}


def with_own_head(weights):
    copied = with_copied_head(weights)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(copied["lm_head.weight"].shape, generator=generator) / 6
    return copied | {"lm_head.weight": copied["lm_head.weight"] + noise}


def with_leftovers(weights):
    return weights | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}


def without_prefix(weights):
    return {name.removeprefix("transformer.").removeprefix("model."): tensor for name, tensor in weights.items()}


def check_same(trio, **options):
    """From files as in memory, where everything is loaded from these very files."""
    base = AutoModelForCausalLM.from_pretrained(trio.folder / "base")
    model = PeftModel.from_pretrained(base, trio.folder / "adapter").eval()
    report = graft_checkpoint(*trio.paths, trio.folder / "out", check=True, **options)
    memory = {"remote_code": True} if options.pop("target", None) == "remote_code" else {}
    merged = model.merge_and_graft(trio.folder / "post", **memory, **options)
    merged.save_pretrained(trio.folder / "expected")
    assert_same_tensors(CheckpointReader(trio.folder / "out"), CheckpointReader(trio.folder / "expected"))
    configs = [json.loads((trio.folder / name / "config.json").read_text()) for name in ("out", "expected")]
    assert configs[0] == configs[1]
    assert report.warnings == merged.graft_report.warnings
    return model, merged


@pytest.mark.parametrize("side", ["base", "post"])
@pytest.mark.parametrize(
    ("family", "tied", "change"),
    [
        ("llama", True, with_copied_head),
        ("llama", True, with_own_head),
        ("llama", False, with_leftovers),
        ("llama", False, without_prefix),
        ("gpt2", True, without_prefix),
        ("gpt2", True, with_copied_head),
    ],
)
def test_one_of_the_two_checkpoints_is_spelled_otherwise(make_trio, family, tied, change, side):
    trio = make_trio(family, tied=tied)
    rewrite(trio.folder / side, change)
    check_same(trio, target="stock" if family == "llama" else "remote_code")
    delta = PostTrainingDelta.from_checkpoints(trio.folder / "base", trio.folder / "post")
    assert ("lm_head.weight" in delta.names) == (not tied or change is with_own_head)


@pytest.mark.parametrize("scale", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("side", ["base", "post"])
def test_only_one_side_is_tied(make_trio, side, scale):
    """What is not whole of the delta needs two embeddings where the base had two."""
    trio = make_trio("llama", tied=False)
    tied = pico("llama", tie_word_embeddings=True, seed=0)
    (tied if side == "base" else perturbed(tied)).save_pretrained(trio.folder / side)
    for file in (trio.folder / side).glob("model-*"):
        file.unlink()
    (trio.folder / side / "model.safetensors.index.json").unlink()
    if side == "base":  # the adapter's
        model = upcycle(AutoModelForCausalLM.from_pretrained(trio.folder / "base"), trained=True)
        model.save_pretrained(trio.folder / "adapter")
    model, merged = check_same(trio, scale=scale)
    assert merged.config.tie_word_embeddings == (side == "post" and scale == 1.0)
    if scale == 0.0:
        torch.testing.assert_close(logits(merged, TOKENS), logits(model, TOKENS), atol=1e-4, rtol=0)


@pytest.mark.parametrize("module", ["embed_tokens", "lm_head"])
@pytest.mark.parametrize("target", ["stock", "remote_code"])
def test_an_adapter_that_trains_one_of_two_tied_embeddings_unties_them(make_trio, module, target):
    experts = {"uralic": [2, 1], "turkic": [1, 0]} if target == "remote_code" else {"uralic": 2, "turkic": 1}
    trio = make_trio("llama", tied=True, modules_to_save=[module], experts=experts)
    for name, saved in trio.model.base_model.model.named_modules():
        if name.endswith("modules_to_save.default"):
            randomise(saved, 7, 0.3)
    trio.model.save_pretrained(trio.folder / "adapter")
    model, merged = check_same(trio, target=target)
    assert merged.config.tie_word_embeddings is False
    grafted = model.graft(trio.folder / "post")
    torch.testing.assert_close(logits(merged, TOKENS), logits(grafted, TOKENS), atol=1e-4, rtol=0)
    if target == "stock":
        torch.testing.assert_close(logits(to_stock(model), TOKENS), logits(model, TOKENS), atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_streamed_remote_code_of_every_family(make_trio, family):
    """GPT-NeoX's files say `embed_out` for what the model calls `lm_head`."""
    trio = make_trio(family, tied=family in ("gpt2", "bloom", "mpt", "falcon", "gemma2"), routing="language")
    check_same(trio, target="remote_code")


@pytest.mark.parametrize("tied", [False, True])
def test_a_base_whose_embeddings_were_resized(make_trio, tied):
    """PEFT saves resized embeddings along with the adapter; they are the base's, and trained by nobody."""
    trio = make_trio("llama", tied=tied)
    post = perturbed(pico("llama", tie_word_embeddings=tied))
    post.resize_token_embeddings(107, mean_resizing=False)
    post.save_pretrained(trio.folder / "post107")
    base = AutoModelForCausalLM.from_pretrained(trio.folder / "base")
    base.resize_token_embeddings(107, mean_resizing=False)
    model = upcycle(base, trained=True)
    with pytest.warns(UserWarning, match="has been resized"):
        model.save_pretrained(trio.folder / "adapter")
    paths = [trio.folder / name for name in ("base", "post107", "adapter", "out")]
    graft_checkpoint(*paths, check=True)
    merged = model.merge_and_graft(trio.folder / "post107")
    merged.save_pretrained(trio.folder / "expected")
    assert_same_tensors(CheckpointReader(trio.folder / "out"), CheckpointReader(trio.folder / "expected"))


def test_a_checkpoint_that_lacks_weights_is_refused_on_both_roads(make_trio):
    trio = make_trio()
    rewrite(trio.folder / "post", lambda weights: {n: t for n, t in weights.items() if "0.mlp.up_proj" not in n})
    with pytest.raises(CheckpointError, match=r"lacks model\.layers\.0\.mlp\.up_proj\.weight of a LlamaForCausalLM"):
        graft_checkpoint(*trio.paths, trio.folder / "out")
    with pytest.raises(CheckpointError, match=r"lacks model\.layers\.0\.mlp\.up_proj\.weight of a LlamaForCausalLM"):
        trio.model.graft(trio.folder / "post")


@pytest.mark.parametrize("new_tokens", [False, True])
def test_several_chat_templates_come_along(make_trio_with_tokens, new_tokens):
    trio = make_trio_with_tokens(new_tokens=new_tokens)
    chat = AutoTokenizer.from_pretrained(trio.folder / "post")
    chat.chat_template = {"default": "{{ messages }}", "tool_use": "{{ messages }} {{ tools }}"}
    chat.save_pretrained(trio.folder / "post")
    output = trio.folder / "out"
    graft_checkpoint(*trio.paths, output)
    assert AutoTokenizer.from_pretrained(output).chat_template == chat.chat_template
    assert "additional_chat_templates/tool_use.jinja" in verify(output)["files"]
    extra = output / "additional_chat_templates" / "tool_use.jinja"
    extra.write_text("{{ evil }}")
    with pytest.raises(CheckpointError, match="tool_use.jinja has"):
        verify(output)
    (output / "additional_chat_templates" / "more.jinja").write_text("")
    with pytest.raises(CheckpointError, match="more.jinja is not in the manifest"):
        verify(output)


def test_a_tokenizer_with_an_id_beyond_the_rows(make_trio_with_tokens):
    trio = make_trio_with_tokens(new_tokens=False)
    for side in ("base", "post"):
        tokenizer = AutoTokenizer.from_pretrained(trio.folder / side)
        fill = 0
        while len(tokenizer) < len(CheckpointReader(trio.folder / side)["model.embed_tokens.weight"]):
            tokenizer.add_tokens([f"<fill{fill}>"])
            fill += 1
        tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]}, replace_extra_special_tokens=False)
        tokenizer.save_pretrained(trio.folder / side)
    check_same(trio)
