"""The part of a modelling file that reads languages from the text, for `remote_code` to put at its end.

Its names are those of `modeling_moe_delta.py` and of `routing/context.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..routing.context import PassTokens
from .modeling_moe_delta import MoeDeltaConfig, MoeDeltaForCausalLM


class MoeDeltaContextForCausalLM(MoeDeltaForCausalLM):
    """The same, where a call that names no language has the language of each token read from the text so far.

    `config.moe_delta["identifier"]` says how: `shape` of the scores, `memory` in tokens, `threshold`, and `group_of`.
    """

    def __init__(self, config: MoeDeltaConfig) -> None:
        super().__init__(config)
        shape = config.moe_delta["identifier"]["shape"]
        self.register_buffer("identifier_scores", torch.zeros(shape, dtype=torch.int8))

    def forward(
        self, *args: Any, language: str | None = None, language_ids: Tensor | None = None, **kwargs: Any
    ) -> Any:
        ids = kwargs.get("input_ids", args[0] if args else None)
        tokens = kwargs.get("inputs_embeds") if ids is None else ids
        if tokens is None:
            return super().forward(*args, **kwargs)
        self._tokens = PassTokens.of(ids, (tokens.shape[0], tokens.shape[1]), kwargs)
        output = super().forward(*args, language=language, language_ids=language_ids, **kwargs)
        self._tokens.remember(output)
        return output

    forward.__signature__ = MoeDeltaForCausalLM.forward.__signature__  # type: ignore[attr-defined]

    def _groups(self, language: str | None, language_ids: Tensor | None, tokens: Tensor) -> Tensor:
        if language_ids is not None or language not in (None, "auto"):
            return super()._groups(language, language_ids, tokens)
        if tokens.is_floating_point():
            raise ValueError("Languages are read from token ids: pass input_ids, or language beside inputs_embeds.")
        identifier, scores = self.config.moe_delta["identifier"], self.get_buffer("identifier_scores")
        languages = self._tokens.languages(scores, identifier["memory"], identifier["threshold"])
        return torch.tensor(identifier["group_of"], device=languages.device)[languages].reshape(-1)
