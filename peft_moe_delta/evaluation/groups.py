"""Which group's experts suit a text best: where the experts of a new language had better start (DMoE, 2506.12388).

In: an upcycled model and documents of a language it may never have seen. Out: bits per byte under each group's experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from ..languages import LanguageTable
from .bits_per_byte import bits_per_byte


def score_groups(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, documents: Sequence[str], **options: Any
) -> dict[str, float]:
    """Bits per byte of the documents with every token sent to one group's experts, by group; lower is more similar.

    Args:
        model: the upcycled model; `"original"` stands for expert 0, the base model itself.
        tokenizer, options: as in `bits_per_byte`.

    Returns:
        One figure for every group that has a language.
    """
    tuner: Any = model.base_model
    table: LanguageTable = tuner.active_config.language_table
    with tuner.in_routing("language"):
        return {
            group: bits_per_byte(model, tokenizer, documents, language=members[0], **options).value
            for group in table.groups
            if (members := table.members(group))
        }


def closest_group(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, documents: Sequence[str], **options: Any
) -> str:
    """The group whose experts suit the documents best, for `add_languages(..., start_from=...)`."""
    scores = score_groups(model, tokenizer, documents, **options)
    return min(scores, key=scores.__getitem__)
