"""A random two-layer model and tokenizers that need no download."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from chance import shifted


def wrap(backend: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>")


@pytest.fixture
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, but for the pair "th": 259 tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<bos>", "<eos>", *alphabet, "th"])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[("t", "h")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return wrap(backend)


@pytest.fixture
def word_tokenizer() -> PreTrainedTokenizerFast:
    """Words w0 to w19, split on spaces: any sequence of tokens can be written down as text and read back."""
    words = ["<bos>", "<eos>", *(f"w{index}" for index in range(20))]
    backend = Tokenizer(models.WordLevel(vocab={word: index for index, word in enumerate(words)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return wrap(backend)


@pytest.fixture
def pico_model():
    """Makes a random two-layer Llama in fp32 for a vocabulary; weights large enough for its predictions to differ."""

    def make(vocabulary_size: int) -> LlamaForCausalLM:
        torch.manual_seed(shifted(0))
        config = LlamaConfig(
            vocab_size=vocabulary_size,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.3,
            bos_token_id=0,
            eos_token_id=1,
        )
        return LlamaForCausalLM(config)

    return make
