"""The recipes for real models, checked without weights: fields, groups, forms, and that a GPU of 80 GB holds them."""

from argparse import Namespace
from pathlib import Path

import pytest
from transformers import AutoConfig

from peft_moe_delta.cli.work.budget import plan
from peft_moe_delta.recipe import checks, read_recipe

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SHARED = {"num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 32_768}
QWEN = ("qwen3", {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
                  "num_attention_heads": 16, "vocab_size": 151_936, "tie_word_embeddings": True})  # fmt: skip
MODELS = {
    "qwen3-0.6b": QWEN,
    "qwen3-0.6b-chat": QWEN,
    "llama-3.1-8b": ("llama", {"hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32,
                               "num_attention_heads": 32, "vocab_size": 128_256}),
}  # fmt: skip


@pytest.fixture(params=MODELS)
def recipe(request, tmp_path):
    """A recipe over folders that have its models' configs and nothing else."""
    family, sizes = MODELS[request.param]
    AutoConfig.for_model(family, **SHARED, **sizes).save_pretrained(tmp_path)
    changes = [f"model={tmp_path}", f"post_trained={tmp_path}"]
    return read_recipe(EXAMPLES / f"{request.param}.yaml", changes=changes)


def test_it_can_be_carried_out_to_its_end(recipe):
    checks.check_training(recipe)
    checks.check_graft(recipe)
    checks.check_unseen(recipe)


@pytest.mark.slow
def test_one_gpu_of_80_gb_holds_it(recipe):
    arguments = {"gpus": 1, "memory": 80 * 10**9, "tflops": 200, "base_dtype": "float32", "expert_dtype": "float32"}
    said = plan((recipe, Namespace(**arguments, precision="bf16", checkpointing=True)))
    assert "What fits: one GPU" in said
    assert f"{recipe.expand.steps:,} steps" in said and "GPU hours at 200 TFLOP a second" in said
