"""Pico checkpoints on disk: a base, its post-trained sibling, and an adapter trained on the base."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from builders import moe_layers, perturbed, pico, randomise, upcycle
from greek import GREEK, make_tokenizer
from peft_moe_delta import extend_vocabulary, propose_tokens
from peft_moe_delta.tuner.vocabulary import grown_layers
from reading import give_counts


@dataclass
class Trio:
    """Three folders, and the adapter in memory."""

    folder: Path
    model: PeftModel

    @property
    def paths(self):
        return [self.folder / name for name in ("base", "post", "adapter")]


def store(model, folder, dtype, **options):
    type(model).from_pretrained(None, config=model.config, state_dict=model.state_dict(), dtype=dtype).save_pretrained(
        folder, **options
    )


def trio_in(folder, family="llama", dtypes=(torch.float32,) * 3, tied=False, **options):
    """The three in a folder; `dtypes` of base, post-trained model and experts, `options` of the adapter."""
    base = pico(family, tie_word_embeddings=tied)
    store(base, folder / "base", dtypes[0], max_shard_size="30KB")
    store(perturbed(base), folder / "post", dtypes[1], max_shard_size="20KB")
    model = upcycle(AutoModelForCausalLM.from_pretrained(folder / "base", dtype=dtypes[0]), trained=True, **options)
    for number, layer in enumerate(moe_layers(model)):
        randomise(layer.moe_delta_classifier, number)
    for name, parameter in model.named_parameters():
        if "moe_delta_experts" in name:
            parameter.data = parameter.data.to(dtypes[2])
    if model.peft_config["default"].routing == "context":
        give_counts(model)
    model.save_pretrained(folder / "adapter")
    return Trio(folder, model)


def trio_with_tokens_in(folder, family="llama", dtype=torch.float32, tied=False, new_tokens=True, **options):
    """The same with tokenizers, the post-trained one with two special tokens more, and Greek tokens in the adapter."""
    tokenizer = make_tokenizer()
    base = pico(family, vocab_size=len(tokenizer) + 6, tie_word_embeddings=tied)
    store(base, folder / "base", dtype)
    tokenizer.save_pretrained(folder / "base")
    chat = copy.deepcopy(tokenizer)
    chat.add_special_tokens({"additional_special_tokens": ["<chat>", "</chat>"]})
    post = perturbed(base)
    post.resize_token_embeddings(len(chat) + 3, mean_resizing=False)
    store(post, folder / "post", dtype)
    chat.save_pretrained(folder / "post")
    model = upcycle(AutoModelForCausalLM.from_pretrained(folder / "base", dtype=dtype), trained=True, **options)
    if new_tokens:
        extend_vocabulary(model, tokenizer, propose_tokens(GREEK, tokenizer, 20))
        for layer in grown_layers(model.base_model.model):
            randomise(layer.moe_delta_rows, 3, 0.5)
    if model.peft_config["default"].routing == "context":
        give_counts(model)
    model.save_pretrained(folder / "adapter")
    return Trio(folder, model)
