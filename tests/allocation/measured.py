"""Statistics small enough to work out by hand; a model, a tokenizer and text small enough to measure in a blink."""

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from builders import pico
from peft_moe_delta.allocation import LanguageStatistics

STATISTICS = LanguageStatistics(
    languages=("en", "hu", "el"),
    layers=(0, 1),
    grams={
        "similarity": np.array(
            [[[0.9, 0.1, 0.3], [0.1, 0.8, 0.2], [0.3, 0.2, 0.7]], [[0.9, 0.5, 0.5], [0.5, 0.8, 0.4], [0.5, 0.4, 0.7]]]
        ),
        "deviation": np.array(
            [[[4.0, 2.0, 0.0], [2.0, 4.0, 1.0], [0.0, 1.0, 1.0]], [[9.0, 3.0, 1.0], [3.0, 16.0, 2.0], [1.0, 2.0, 4.0]]]
        ),
    },
    model={"name": "made up", "expert_params": 110, "hidden_size": 10},
    settings={"similarity": {"tokens": 5}},
)
"""Three languages in two layers. Norms of the deviation: en 2 3, hu 2 4, el 1 2."""

SENTENCES = {
    "en": "the quick brown fox jumps over the lazy dog and says what it thinks of number",
    "hu": "egy tucat kolt kitart minden zord szelben es csak megy tovabb az uton",
    "el": "ξεσκεπάζω την ψυχοφθόρα βδελυγμία",
}
TEXTS = {code: [f"{sentence} {index}" for index in range(12)] for code, sentence in SENTENCES.items()}
"""A few hundred bytes a language."""


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, after three special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<bos>", "<eos>", *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")


def byte_model(family: str = "llama") -> PreTrainedModel:
    """A pico model for those tokens."""
    return pico(family, vocab_size=300, max_position_embeddings=64)
