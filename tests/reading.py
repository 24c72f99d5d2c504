"""What tests of routing by context share: languages that are ranges of words, and pico models that read them."""

from __future__ import annotations

import torch
from peft import PeftModel

from builders import pico, upcycle
from chance import shifted
from peft_moe_delta import fit_identifier
from peft_moe_delta.tuner.identifier import Identifiers
from training.common import make_tokenizer

WORDS = {"en": range(3, 27), "hu": range(27, 51), "fi": range(51, 75), "az": range(75, 99)}
MEMORY = 8


def text_of(code, length, generator):
    """Token ids that are mostly a language's own."""
    own = torch.randint(WORDS[code].start, WORDS[code].stop, (length,), generator=generator)
    any_ = torch.randint(3, 99, (length,), generator=generator)
    return own.where(torch.rand(length, generator=generator) < 0.9, any_)


def texts(codes=tuple(WORDS), documents=20, seed=0):
    generator = torch.Generator().manual_seed(shifted(seed))
    return {
        code: [" ".join(f"w{i}" for i in text_of(code, 60, generator).tolist()) for _ in range(documents)]
        for code in codes
    }


def reader(family="llama", fitted=True, **changes):
    """A pico model with trained experts, routed by context."""
    model = upcycle(pico(family), trained=True, **{"routing": "context", **changes})
    if fitted:
        fit_identifier(model, texts(), make_tokenizer(), memory=MEMORY)
    return model


def mixed(rows=3, seed=5):
    """(rows, 36): each row three languages, one after another."""
    generator = torch.Generator().manual_seed(shifted(seed))
    order = [("en", "hu", "az"), ("fi", "en", "hu"), ("az", "fi", "en")]
    return torch.stack([torch.cat([text_of(c, 12, generator) for c in order[row % 3]]) for row in range(rows)])


def give_counts(model: PeftModel) -> None:
    """An identifier of made-up counts, for a model without tokenizer: a language prefers a third of all tokens."""
    tuner = model.base_model
    vocabulary = len(tuner.model.get_input_embeddings().weight) + len(tuner.active_config.record.new_tokens)
    generator = torch.Generator().manual_seed(shifted(4))
    counts = {
        code: (torch.rand(vocabulary, generator=generator) < 1 / 3) * 50 + 1 for code in tuner.active_config.languages
    }
    Identifiers.fill(tuner.model, "default", tuner.active_config, counts, MEMORY)
