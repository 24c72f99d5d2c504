"""An export of every form that the engines' table has a row for, small and in fp32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from builders import pico
from builders import upcycle as adapter
from export.test_export import GRANITE_SCALES, LINEAR, LLAMA3, UNIFORM, WITH_DENSE, YARN
from export.upcycled import plan_of, upcycle
from peft_moe_delta.export import build_model, choose
from peft_moe_delta.graft.memory import to_stock
from served.pico_export import POSITIONS, WORDS, with_tokenizer

SIZES: dict[str, Any] = {
    "vocab_size": WORDS, "max_position_embeddings": POSITIONS, "num_hidden_layers": 3, "hidden_size": 128,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "intermediate_size": 96,
}  # fmt: skip
"""vLLM's attention on a CPU wants heads of 32 or more."""
WINDOW = 16
REMOTE_CODE, BY_LANGUAGE = "remote code", "remote code by language, or with attention experts"
DENSE, WINDOWED = "dense, one language", "dense Mistral with a sliding window"

STOCK: dict[str, tuple[str, dict[str, Any], list[tuple[int, int]], str]] = {
    "Mixtral": ("llama", {}, UNIFORM, "mixtral"),
    "Mixtral with its own head_dim": ("llama", {"head_dim": 64}, UNIFORM, "mixtral"),
    "Mixtral with llama3 rope scaling": ("llama", {"rope_parameters": LLAMA3}, UNIFORM, "mixtral"),
    "Mixtral with YaRN": ("llama", {"rope_parameters": YARN}, UNIFORM, "mixtral"),
    "Mixtral with another rope scaling": ("llama", {"rope_parameters": LINEAR}, UNIFORM, "mixtral"),
    "Mixtral with a sliding window": ("mistral", {"sliding_window": WINDOW}, UNIFORM, "mixtral"),
    "Qwen2-MoE": ("qwen2", {}, UNIFORM, "qwen2_moe"),
    "Qwen2-MoE with dense layers": ("qwen2", {}, WITH_DENSE, "qwen2_moe"),
    "Qwen3-MoE": ("qwen3", {}, UNIFORM, "qwen3_moe"),
    "Qwen3-MoE with dense layers": ("qwen3", {}, WITH_DENSE, "qwen3_moe"),
    "Qwen3-MoE with biases": ("qwen3", {"attention_bias": True}, UNIFORM, "qwen3_moe"),
    "Qwen-MoE with YaRN": ("qwen3", {"rope_parameters": YARN}, UNIFORM, "qwen3_moe"),
    "Qwen-MoE with another rope scaling": ("qwen3", {"rope_parameters": LINEAR}, UNIFORM, "qwen3_moe"),
    "GraniteMoe": ("granite", GRANITE_SCALES, UNIFORM, "granitemoe"),
    "GraniteMoe with biases": ("llama", {"attention_bias": True}, UNIFORM, "granitemoe"),
    "GraniteMoe with rope scaling or its own head_dim": (
        "llama", {"attention_bias": True, "rope_parameters": LLAMA3}, UNIFORM, "granitemoe",
    ),
    "FlexOlmo": ("olmo2", {}, UNIFORM, "flex_olmo"),
}  # fmt: skip
FORMS = (*STOCK, DENSE, WINDOWED, REMOTE_CODE, BY_LANGUAGE)


def make(form: str, folder: Path) -> Path:
    """Export a model in a form, with a tokenizer."""
    if form in STOCK:
        family, config, counts, architecture = STOCK[form]
        weights = upcycle(pico(family, **{**SIZES, **config}), plan_of(counts))
        model = build_model(weights, choose(weights, architecture=architecture).layout)
    elif form in (DENSE, WINDOWED):
        dense = pico("llama", **SIZES) if form == DENSE else pico("mistral", **SIZES, sliding_window=WINDOW)
        weights = upcycle(dense, plan_of(UNIFORM)).for_group("original")
        model = build_model(weights, choose(weights).layout)
    else:
        experts = {"uralic": [2, 1, 2], "turkic": [1, 0, 1]}
        routing = "language" if form == BY_LANGUAGE else "learned"
        upcycled = adapter(pico("llama", **SIZES), trained=True, experts=experts, routing=routing)
        model = to_stock(upcycled, remote_code=True)
    model.save_pretrained(folder)
    return with_tokenizer(folder)
