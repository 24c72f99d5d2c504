"""A byte-level BPE tokenizer of 70-odd tokens, small enough to see through, and Greek text that it cuts into bytes."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

ENGLISH = ["the cat sat on the mat and the dog sat on the cat"] * 3
GREEK = [
    "η γάτα και ο σκύλος και η γάτα",
    "ο σκύλος είναι στο σπίτι και η γάτα",
    "η γάτα είναι στο σπίτι",
    "και ο σκύλος είναι μαζί με τη γάτα",
    "στο σπίτι είναι η γάτα και ο σκύλος",
    "η γάτα και ο σκύλος είναι στο σπίτι",
]


def make_tokenizer(*, special=("<pad>", "<bos>", "<eos>"), vocab_size=290):
    """Trained on English: Greek letters are two bytes each."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        show_progress=False,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    backend.train_from_iterator(ENGLISH, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
    )
