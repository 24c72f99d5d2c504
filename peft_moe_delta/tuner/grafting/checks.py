"""Which models a delta may go between; held by grafts in memory and from files alike."""

from __future__ import annotations

from transformers import PreTrainedModel

from ...errors import GraftError
from ..config import MoeDeltaConfig
from ..layer import MoeDeltaLayer


def check_has_delta(config: MoeDeltaConfig) -> None:
    """Refuse a model that no post-trained one descends from.

    Raises:
        GraftError: it was mixed, and not with its seed's own weights outside of experts.
    """
    if (config.mixed or {}).get("others", "seed") != "seed":
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


def check_siblings(base: PreTrainedModel, post_trained: PreTrainedModel) -> None:
    """Refuse a post-trained model that cannot be the base model's own.

    Raises:
        GraftError: another architecture, or no dense model.
    """
    check_same_kind(base.config.model_type, post_trained.config.model_type)
    if any(isinstance(module, MoeDeltaLayer) for module in post_trained.modules()):
        raise GraftError("The post-trained model is upcycled already. Pass the dense post-trained checkpoint.")
