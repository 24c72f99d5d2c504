"""A pico export with a tokenizer and a chat template, and the same in GGUF."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from builders import SIZES, pico
from greek import make_tokenizer

TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}> {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
WORDS = 290  # of greek.make_tokenizer
POSITIONS = 512


def with_tokenizer(folder: Path) -> Path:
    """Put the tokenizer beside a model of `WORDS` tokens."""
    tokenizer = make_tokenizer(vocab_size=WORDS)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def pico_model(family: str = "llama", **config: Any) -> Any:
    """A pico model whose vocabulary is the tokenizer's."""
    return pico(family, **{"vocab_size": WORDS, "max_position_embeddings": POSITIONS, **config})


def export(folder: Path, **config: Any) -> Path:
    """A dense export: what routing by language ships for one language."""
    pico_model(**config).save_pretrained(folder)
    return with_tokenizer(folder)


def to_gguf(folder: Path, file: Path) -> Path:
    """A llama export as llama.cpp's own converter writes it, in fp32."""
    import gguf

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    config, heads = model.config, SIZES["num_attention_heads"]
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    _add_tokenizer(writer, tokenizer, config.vocab_size, gguf)
    for name, tensor in model.state_dict().items():
        writer.add_tensor(_gguf_name(name), _permuted(name, tensor, heads, config.num_key_value_heads).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _add_tokenizer(writer: Any, tokenizer: Any, size: int, gguf: Any) -> None:
    import json

    backend = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    words = {index: word for word, index in tokenizer.get_vocab().items()}
    special = set(tokenizer.all_special_ids)
    kinds = gguf.TokenType
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([words.get(index, f"[PAD{index}]") for index in range(size)])
    writer.add_token_types(
        [kinds.CONTROL if i in special else kinds.NORMAL if i in words else kinds.UNUSED for i in range(size)]
    )
    writer.add_token_merges([" ".join(pair) for pair in backend["merges"]])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_add_bos_token(False)
    writer.add_chat_template(tokenizer.chat_template)


def _gguf_name(name: str) -> str:
    parts = {
        "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output", "model.layers": "blk",
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
        "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    }  # fmt: skip
    for ours, theirs in parts.items():
        name = name.replace(ours, theirs)
    return name


def _permuted(name: str, tensor: torch.Tensor, heads: int, key_value_heads: int) -> torch.Tensor:
    """llama.cpp's llama turns pairs of neighbours, transformers' turns halves."""
    if ".q_proj" not in name and ".k_proj" not in name:
        return tensor
    number = heads if ".q_proj" in name else key_value_heads
    return tensor.reshape(number, 2, tensor.shape[0] // number // 2, -1).swapaxes(1, 2).reshape(tensor.shape)
