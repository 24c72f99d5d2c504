"""Which models a delta may go between; grafts in memory and from files ask the same."""

from __future__ import annotations

from ..errors import GraftError
from ..tuner.config import MoeDeltaConfig
from .dense import Dense
from .rows import VocabularyMap, match_tokenizers, num_rows


def check_has_delta(config: MoeDeltaConfig) -> None:
    """Refuse a model that no post-trained one descends from.

    Raises:
        GraftError: it was mixed, and not with its seed's own weights outside of experts.
    """
    if (config.record.mixed or {}).get("others", "seed") != "seed":
        raise GraftError(
            "This model's weights outside of experts are an average of the models it was mixed from. A "
            'post-training delta belongs to the seed alone: mix with others="seed" and graft that.'
        )


def check_same_kind(base: str, post_trained: str) -> None:
    """Refuse two model types.

    Raises:
        GraftError: they differ.
    """
    if base != post_trained:
        raise GraftError(
            f"The base model is a {base!r}, the other one a {post_trained!r}. A post-training delta exists only "
            "between a model and its own tuned descendant."
        )


def match_vocabularies(
    base_name: str, base: Dense, post_trained_name: str, post_trained: Dense, config: MoeDeltaConfig
) -> VocabularyMap | None:
    """How the rows of two models' embeddings belong together, by the tokenizers beside them; None without those."""
    return match_tokenizers(
        base_name,
        post_trained_name,
        base_rows=num_rows(base.tensors),
        post_trained_rows=num_rows(post_trained.tensors),
        new_tokens=config.record.new_tokens,
    )
