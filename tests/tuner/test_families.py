"""Every model family: untrained experts change nothing, trained ones come back from disk as they were."""

import copy

import pytest
import torch
from peft import PeftModel
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

from builders import FAMILIES, GATED, SIZES, logits, moe_layers, perturbed, pico, token_batch, upcycle
from peft_moe_delta.errors import ArchitectureError, GraftError

RANKS = pytest.mark.parametrize("rank", [None, 2], ids=["full", "low-rank"])
IDS = torch.tensor([0, 1, 3])  # one row of each group


@pytest.mark.parametrize("routing", ["learned", "language"])
@RANKS
@pytest.mark.parametrize("family", FAMILIES)
def test_upcycled_equals_base(family, rank, routing):
    base = pico(family)
    expected = logits(base, token_batch())
    model = upcycle(base, expert_rank=rank, routing=routing)
    assert len(moe_layers(model)) == 2
    torch.testing.assert_close(logits(model, token_batch(), language_ids=IDS), expected, atol=5e-5, rtol=0)


@RANKS
@pytest.mark.parametrize("family", FAMILIES)
def test_trained_experts_survive_saving(family, rank, tmp_path):
    base = pico(family)
    plain = copy.deepcopy(base)
    model = upcycle(base, trained=True, expert_rank=rank)
    expected = logits(model, token_batch())
    assert (expected - logits(plain, token_batch())).abs().amax(dim=(1, 2)).min() > 0.1, "training shows in every row"
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(plain, tmp_path), token_batch()), expected)


def test_only_the_text_decoder_of_a_multimodal_model_is_upcycled():
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    base = Gemma3ForConditionalGeneration(
        Gemma3Config(
            text_config={"model_type": "gemma3_text", **SIZES, **GATED},
            vision_config={**vision, "image_size": 8, "patch_size": 4},
        )
    ).eval()
    expected = logits(base, token_batch())
    post_trained = perturbed(base, scale=0.05)
    model = upcycle(base)
    changed = [name for name, module in base.named_modules() if module in moe_layers(model)]
    assert changed == ["model.language_model.layers.0.mlp", "model.language_model.layers.1.mlp"]
    torch.testing.assert_close(logits(model, token_batch()), expected, atol=5e-5, rtol=0)
    after = logits(post_trained, token_batch())
    torch.testing.assert_close(
        logits(model.graft(copy.deepcopy(post_trained)), token_batch()), after, atol=5e-5, rtol=0
    )
    for options in ({}, {"remote_code": True}):
        with pytest.raises(GraftError, match="'gemma3' is a multimodal model.*with `graft`"):
            model.merge_and_graft(post_trained, **options)


@pytest.mark.parametrize(
    ("family", "sizes", "reason"),
    [
        ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32}, "'opt' models.*side by side.*no MLP module"),
        ("xglm", {"ffn_dim": 48}, "'xglm' models.*side by side.*no MLP module"),
        ("persimmon", {"intermediate_size": 48}, r"Unknown model type 'persimmon'.*target_modules"),
    ],
)
def test_a_family_without_a_known_mlp_is_refused_with_the_reason(family, sizes, reason):
    base = pico(family, **sizes)
    with pytest.raises(ArchitectureError, match=reason):
        upcycle(base)
    assert moe_layers(base) == []


def test_an_unknown_family_works_through_target_modules():
    base = pico("persimmon", intermediate_size=48)
    expected = logits(base, token_batch())
    model = upcycle(base, target_modules=["mlp"])
    assert len(moe_layers(model)) == 2
    torch.testing.assert_close(logits(model, token_batch()), expected, atol=5e-5, rtol=0)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "granitemoe"])
def test_a_mixture_of_experts_is_not_upcycled_again(family):
    base = pico(family, intermediate_size=48)
    block = "block_sparse_moe" if family == "granitemoe" else "mlp"
    with pytest.raises(ArchitectureError, match="already a mixture of experts"):
        upcycle(base, target_modules=[block])
    assert moe_layers(base) == []
