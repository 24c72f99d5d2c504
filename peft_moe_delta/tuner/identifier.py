"""The identifier of an upcycled model: which language each token of a pass belongs to, where nobody names it.

In: the tokens of a pass, and the cache that remembers the ones before. Out: the language group of every token, once for
all layers (`routing/context.py` says how). What it knows is how often each token occurs in the text of each language:
counts, which are saved with the adapter, and to which a language may be added without touching the others'.

Shape legend: B batch, S sequence, V vocabulary, L languages.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..errors import LanguageError
from ..languages import ORIGINAL_GROUP
from ..routing.context import MARGIN, THRESHOLD, ContextRouting, PassTokens, token_scores
from .config import MoeDeltaConfig
from .dispatch import constant
from .passes import ForwardState
from .processes import check_hands_out_buffers
from .record import FittedIdentifier

AUTO = "auto"
"""In the place of a language code: read it from the text."""

IDENTIFIERS = "moe_delta_identifiers"


def fitted_of(config: MoeDeltaConfig) -> FittedIdentifier:
    """How an adapter that has an identifier reads languages."""
    assert config.record.identifier is not None
    return config.record.identifier


def columns_of(config: MoeDeltaConfig) -> tuple[str, ...]:
    """The languages that are told from the original ones, in the order of the scores."""
    return tuple(code for code in fitted_of(config).languages if config.languages[code] != ORIGINAL_GROUP)


def groups_of(config: MoeDeltaConfig, _: None = None) -> tuple[int, ...]:
    """Groups by what `recognise` says: that of the original languages, then one a column of the scores."""
    table = config.language_table
    return (0, *(table.group_of[table.id_of(code)] for code in columns_of(config)))


def scores_of(config: MoeDeltaConfig, counts_LV: Tensor) -> Tensor:
    """`score_l` of every token, (V, C) int8."""
    fitted = fitted_of(config)
    original = [config.languages[code] == ORIGINAL_GROUP for code in fitted.languages]
    if counts_LV.is_meta:  # of counts without content, scores without content
        return counts_LV.new_empty(counts_LV.shape[1], original.count(False), dtype=torch.int8)
    return token_scores(counts_LV.cpu(), original, fitted.margin)


class Identifier(nn.Module):
    """What one adapter knows of its languages' tokens.

    Attributes:
        counts: (L, V) int32, languages as in `fitted_of(config)`. Whole numbers, so no change of dtype touches them.

    Raises:
        PeftMoeDeltaError: it would be on one of several processes alone.
    """

    counts: Tensor

    def __init__(self, config: MoeDeltaConfig, device: torch.device) -> None:
        super().__init__()
        check_hands_out_buffers()
        self.config = config
        shape = (len(fitted_of(config).languages), fitted_of(config).vocabulary)
        self.register_buffer("counts", torch.zeros(shape, dtype=torch.int32, device=device))
        self._scores: dict[torch.device, Tensor] = {}

    def scores(self, device: torch.device) -> Tensor:
        """`score_l` of every token, (V, C) int8: computed when there are new counts, and kept on each device."""
        if device not in self._scores:
            self._scores[device] = scores_of(self.config, self.counts).to(device)
        return self._scores[device]

    def set_counts(self, counts_LV: Tensor) -> None:
        """Take other counts, of the languages that the config names by now."""
        self.counts = counts_LV.to(self.counts.device, torch.int32)
        self._scores = {}

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._scores = {}

    def is_asked(self, state: ForwardState) -> bool:
        """Whether the routing has the language read from the text in a pass that names none."""
        named = state.language is not None or state.language_ids is not None
        known = state.default in self.config.language_table.codes
        return isinstance(self.config.routing_rule, ContextRouting) and not named and not known

    def groups(self, tokens: PassTokens) -> Tensor:
        """The group of every token, (B, S) int64; -1 for padding."""
        scores_VC = self.scores(tokens.ids_BS.device)
        fitted = fitted_of(self.config)
        language_BS = tokens.languages(scores_VC, fitted.memory, fitted.threshold)
        group_BS = constant(self.config.derived(groups_of, None), scores_VC.device)[language_BS]
        return group_BS if tokens.mask_BS is None else group_BS.masked_fill(~tokens.mask_BS, -1)


class Identifiers(nn.ModuleDict, BaseTunerLayer):
    """The identifiers of a base model's adapters, as its `moe_delta_identifiers`."""

    adapter_layer_names = ()
    other_param_names = ()

    def _move_adapter_to_device_of_base_layer(self, *_: Any) -> None:
        """There is no base layer; the counts are made where the embedding is."""

    @classmethod
    def of(cls, model: nn.Module) -> Identifiers | None:
        """A base model's own; None where no adapter has any."""
        found = model._modules.get(IDENTIFIERS)
        return found if isinstance(found, cls) else None

    @classmethod
    def enter(cls, model: nn.Module, adapter_name: str, config: MoeDeltaConfig, active: list[str]) -> Identifier:
        """Give an adapter an identifier, whose counts are zero, in the place of any that it has.

        Args:
            active: the adapters in force.
        """
        found = cls.of(model)
        if found is None:
            found = cls()
            model.add_module(IDENTIFIERS, found)
        embedding = model.get_input_embeddings()  # type: ignore[operator]
        found.set_adapter(active)
        found[adapter_name] = made = Identifier(config, next(embedding.parameters()).device)
        return made

    @classmethod
    def fill(
        cls, model: nn.Module, adapter_name: str, config: MoeDeltaConfig, counts: Mapping[str, Tensor], memory: int
    ) -> None:
        """Give the adapter in force what `fit_identifier` counted: language -> (V,) whole numbers."""
        rows = torch.stack(list(counts.values()))
        config.change(identifier=FittedIdentifier(tuple(counts), rows.shape[1], memory, MARGIN, THRESHOLD))
        cls.enter(model, adapter_name, config, [adapter_name]).set_counts(rows)

    @classmethod
    def forget(cls, model: nn.Module, adapter_name: str, config: MoeDeltaConfig, languages: Collection[str]) -> None:
        """Take languages away again, and leave the others' counts as they are."""
        counts = cls.counts_of(model, adapter_name)
        kept = {code: row for code, row in counts.items() if code not in languages}
        if len(kept) < len(counts):
            cls.fill(model, adapter_name, config, kept, fitted_of(config).memory)

    @classmethod
    def counts_of(cls, model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
        """Language -> (V,) counts of an adapter; empty where it has no identifier."""
        found = cls.of(model)
        identifier = None if found is None else found.own(adapter_name)
        if identifier is None:
            return {}
        return dict(zip(fitted_of(identifier.config).languages, identifier.counts, strict=True))

    @classmethod
    def required(cls, model: nn.Module) -> Identifier:
        """The active adapter's identifier.

        Raises:
            LanguageError: it has none.
        """
        found = cls.of(model)
        identifier = None if found is None else found.in_force()
        if identifier is None:
            raise LanguageError(
                "The adapter in force cannot tell languages apart yet. Call fit_identifier(model, texts_by_language)."
            )
        return identifier

    @classmethod
    def leave(cls, model: nn.Module, adapter_name: str | None = None) -> None:
        """Take an adapter's identifier away, or all of them."""
        found = cls.of(model)
        if found is None:
            return
        if adapter_name is not None and adapter_name in found:
            del found[adapter_name]
        if adapter_name is None or not len(found):
            delattr(model, IDENTIFIERS)

    def own(self, adapter_name: str) -> Identifier | None:
        """An adapter's own; None where it has none."""
        return self._modules.get(adapter_name)  # type: ignore[return-value]

    def in_force(self) -> Identifier | None:
        """The active adapter's own."""
        return None if self.disable_adapters else self.own(self.active_adapters[0])

    def read(self, state: ForwardState, ids_BS: Tensor | None, arguments: Mapping[str, Any], *, auto: bool) -> None:
        """Find the groups of a pass's tokens, if nobody names them, and have its cache remember the tokens.

        Args:
            state: the pass.
            ids_BS: its token ids; None where it was given embeddings.
            arguments: the call's.
            auto: whether the call asks for it, which overrides a default language.

        Raises:
            LanguageError: there are no ids to read.
        """
        tokens = PassTokens.of(ids_BS, state.shape, arguments)
        state.remember = tokens.remember
        identifier = self.in_force()
        if identifier is None or not (auto or identifier.is_asked(state)):
            return
        if ids_BS is None:
            raise LanguageError(
                "Routing by context reads token ids, and this call gave `inputs_embeds` alone. Pass `input_ids`, or "
                'name the language: language="...".'
            )
        state.groups_read = identifier.groups(tokens)
