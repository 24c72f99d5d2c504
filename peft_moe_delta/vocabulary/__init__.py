"""New tokens for new languages: choose them from text, give them to a tokenizer and to an upcycled model."""

from .extend import extend_vocabulary, give_tokens
from .growth import TokenizerGrowth
from .propose import propose_tokens
from .sentencepiece import save_tokenizer

__all__ = ["TokenizerGrowth", "extend_vocabulary", "give_tokens", "propose_tokens", "save_tokenizer"]
