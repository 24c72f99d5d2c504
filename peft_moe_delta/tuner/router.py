"""The router of an upcycled layer, one row an expert, and the gate before it, one row a growth step.

In: hidden states. Out: logits, in fp32 whatever the model's dtype.

Shape legend: T tokens, D hidden size, E experts, G language groups.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..routing import classifier_logits, recognised, router_logits


class Router(nn.Module):
    """`logits = W_r x`, without bias. `weight` is (E, D): expert 0 and the experts the adapter began with.

    The rows of a group that was added later are a parameter of their own, `grown_<group index>`: what came before can
    then stay frozen, without gradient, optimizer state or weight decay, and its logits are the same operation as ever.
    """

    def __init__(self, hidden_size: int, num_experts: int, device: torch.device) -> None:
        super().__init__()
        self.weight = self._rows(hidden_size, num_experts, device)

    def add_rows(self, group: int, num_experts: int) -> None:
        """Append the rows of a group's experts."""
        self.register_parameter(_name(group), self._rows(self.weight.shape[1], num_experts, self.weight.device))

    def remove_rows(self, group: int) -> None:
        """Drop the rows of a group that was added later; one without experts here has none."""
        if hasattr(self, _name(group)):
            delattr(self, _name(group))

    def freeze_all_but(self, groups: Sequence[bool]) -> None:
        """Freeze the rows of every group that is not named here; (G,) booleans; the first stands for `weight`."""
        kept = {_name(group) for group, trained in enumerate(groups) if trained} | ({"weight"} if groups[0] else set())
        for name, rows in self.named_parameters():
            if name not in kept:
                rows.requires_grad_(False)

    @property
    def rows(self) -> Tensor:
        """Every expert's row, (E, D)."""
        return torch.cat(list(self.parameters()))

    def forward(self, x_TD: Tensor) -> Tensor:
        parts = [self.logits(x_TD, rows) for rows in self.parameters()]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    logits = staticmethod(router_logits)
    """(T, D) hidden states and rows -> logits of these rows."""

    @staticmethod
    def _rows(hidden_size: int, num_experts: int, device: torch.device) -> nn.Parameter:
        rows = torch.empty(num_experts, hidden_size, dtype=torch.float32, device=device)
        return nn.Parameter(nn.init.xavier_normal_(rows))


class Classifier(Router):
    """Recognises tokens of original languages (LayerMoE): `logits = W x + b`, where `weight` is (1, D + 1), b last.

    Above 0 says "original". A growth step adds a row, which learns to tell its languages from the original ones. Rows
    start at zero, which recognises nobody.
    """

    def __init__(self, hidden_size: int, device: torch.device) -> None:
        super().__init__(hidden_size + 1, 1, device)

    @torch.no_grad()
    def recognise_all(self) -> None:
        """Take every token for an original one, which is what a layer without experts does."""
        for rows in self.parameters():
            rows.zero_()[:, -1] = 1.0

    def recognises(self, x_TD: Tensor, open_steps: int) -> Tensor:
        """(T,) booleans: the rows of all steps up to `open_steps` agree that a token is of an original language."""
        return recognised(self(x_TD)[:, : 1 + open_steps])

    logits = staticmethod(classifier_logits)

    @staticmethod
    def _rows(hidden_size: int, num_experts: int, device: torch.device) -> nn.Parameter:
        return nn.Parameter(torch.zeros(num_experts, hidden_size, dtype=torch.float32, device=device))


def _name(group: int) -> str:
    return f"grown_{group}"
