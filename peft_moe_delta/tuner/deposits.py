"""What a layer leaves in a training pass: its auxiliary losses, as sums, and its statistics.

In: where its tokens went, and the logits of its router and gate. Out: deposits in the pass, and sums in the context.

Shape legend: T tokens, K chosen experts a token, E experts, S sets of experts (`allowed_SE`) or growth steps (of gates,
`logits_TS`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import LanguageError
from ..losses import classifier_loss, language_prior_loss, load_balancing_loss, router_z_loss
from ..routing import Routes
from .context import ForwardContext
from .passes import ForwardState, TokenGroups
from .settings import BALANCE_LOSS, GATE_LOSS, PRIOR_LOSS, LayerSettings


@dataclass(frozen=True)
class Deposits:
    """Of one layer in one pass.

    Attributes:
        context: where statistics go.
        settings: the layer's.
        state: the pass.
        groups: of its tokens; None where no language is known.
    """

    context: ForwardContext
    settings: LayerSettings
    state: ForwardState
    groups: TokenGroups | None

    def of_routes(self, routes: Routes, sets_T: Tensor | None, allowed_SE: Tensor) -> None:
        """Load balancing, and the share of tokens on expert 0."""
        context, groups, device = self.context, self.groups, routes.indices_TK.device
        counted_T = self.state.counted(routes.indices_TK)
        group_T = torch.zeros_like(routes.indices_TK[:, 0]) if groups is None else groups.group_T
        balance = load_balancing_loss(
            probabilities_TE=routes.probabilities_TE,
            indices_TK=routes.indices_TK,
            sets_T=torch.zeros_like(group_T) if sets_T is None else sets_T,
            allowed_SE=allowed_SE,
            counted_T=counted_T,
        )
        self.state.deposit(BALANCE_LOSS, self.settings.config.load_balancing, balance)
        on_zero_T = (routes.indices_TK[:, 0] == 0) & counted_T
        if groups is None:
            context.record("expert_0_share", on_zero_T.sum(), counted_T.sum())
            return
        shares = torch.zeros(2, len(self.settings.counts), device=device)
        shares = shares.index_add(1, group_T, torch.stack([on_zero_T, counted_T]).float())
        context.record(self.settings.tables.share_names, *shares)

    def of_logits(self, logits_TE: Tensor) -> None:
        """The losses of any router, soft or top-k: language prior and z-loss, where they are in force."""
        config, counted_T = self.settings.config, self.state.counted(logits_TE)
        for name in self.settings.tables.logit_losses:
            if name == PRIOR_LOSS:
                coefficient, targets_TE = config.language_prior, self._prior_targets(logits_TE.device)
                loss = language_prior_loss(logits_TE=logits_TE, targets_TE=targets_TE, counted_T=counted_T)
            else:
                coefficient = config.router_z_loss_coef
                loss = router_z_loss(logits_TE=logits_TE, counted_T=counted_T)
            self.state.deposit(name, coefficient, loss)

    def _prior_targets(self, device: torch.device) -> Tensor:
        config = self.settings.config
        if self.groups is None:
            raise LanguageError(
                f"The language-prior loss (coefficient {config.language_prior}, stage {config.record.stage!r}) needs "
                "the language of every token, and none was given. Use LanguageCollator, or set language_prior_coef=0."
            )
        return self.settings.tables.tensor("prior_targets", device)[self.groups.group_T]

    def of_gate(self, logits_TS: Tensor) -> None:
        """The loss of this layer's gate, whose newest row learns to tell the original languages from others."""
        config, counted_T = self.settings.config, self.state.counted(logits_TS)
        if self.groups is None:
            raise LanguageError(
                f"The classifiers' loss (coefficient {config.classifier_loss}, stage {config.record.stage!r}) needs "
                "the language of every token, and none was given. Use LanguageCollator, or set classifier_coef=0."
            )
        logits_T = logits_TS.amin(dim=-1) if config.record.train_earlier_rows else logits_TS[:, config.newest_step]
        loss = classifier_loss(logits_T=logits_T, original_T=self.groups.group_T == 0, counted_T=counted_T)
        self.state.deposit(GATE_LOSS, config.classifier_loss, loss)
