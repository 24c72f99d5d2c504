"""Routers that are tried on held-out text: where they send its tokens, and what that costs beside routing by language.

In: a grafted adapter, sources of text, and weights of all its routers and gates, one list for each candidate. Out: a
`Routed` for each candidate and source. Every batch runs once under routing by language, whatever the number of
candidates, and once under each of them.

Shape legend: B rows, S sequence, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..evaluation.forward import batches_by_length, evaluating
from ..model import MoeDeltaModel
from ..padding import padded
from ..routing import routing_named
from ..tuner.recording import recording
from .report import Routed, Trial

Rows = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Source:
    """Text of one language, or the conversations, as rows of token ids.

    Attributes:
        language: its code; of conversations, the original language that they count as.
        kind: `"text"` or `"chat"`.
        original: whether it belongs on expert 0.
        fitted: rows that routers are fitted to.
        held_out: rows to try them on, and where in each the answer begins.
        begun: tokens that a row begins with and that are none of its own.
    """

    language: str
    kind: str
    original: bool
    fitted: Rows
    held_out: Sequence[tuple[Sequence[int], int]]
    begun: int


@dataclass(frozen=True)
class Routers:
    """Weights of all routers and gates, to be tried.

    Attributes:
        name: how they came about.
        weight: of an error on an original token in the closed form that they began with.
        values: in the order of `router_parameters`.
    """

    name: str
    weight: float
    values: Sequence[Tensor]

    @classmethod
    def of(cls, tuner: MoeDeltaModel, name: str, weight: float) -> Routers:
        """Those that the model has now."""
        return cls(name, weight, [parameter.detach().clone() for parameter in router_parameters(tuner)])

    @torch.no_grad()
    def fill(self, tuner: MoeDeltaModel) -> None:
        """Give the model these."""
        for parameter, value in zip(router_parameters(tuner), self.values, strict=True):
            parameter.copy_(value)


def router_parameters(tuner: MoeDeltaModel) -> Iterator[torch.nn.Parameter]:
    """What is calibrated."""
    for _, _, layer in tuner.expert_layers():
        yield from layer.router(tuner.active_adapters[0]).parameters()
        gate = layer.classifier(tuner.active_adapters[0])
        yield from () if gate is None else gate.parameters()


@dataclass(frozen=True)
class Tried:
    """Routers, and how text fared under them.

    Attributes:
        routers: what was tried.
        rows: one a source.
    """

    routers: Routers
    rows: tuple[Routed, ...]

    @property
    def trial(self) -> Trial:
        """In five numbers; a side without sources costs nothing."""
        sides = [[row for row in self.rows if row.original is original] for original in (True, False)]
        right = [fmean(row.right for row in side) if side else 1.0 for side in sides]
        cost = [fmean(row.cost for row in side) if side else 0.0 for side in sides]
        answers = min(row.answers for row in self.rows)
        return Trial(self.routers.weight, right[0], right[1], cost[0], cost[1], answers)


def try_out(
    tuner: MoeDeltaModel,
    sources: Sequence[Source],
    candidates: Sequence[Routers],
    batch_size: int,
    progress: Callable[[list[Any]], Iterable[Any]] | None = None,
) -> list[Tried]:
    """Run all held-out rows under each of the candidates; the last one's weights stay in the model.

    `progress` wraps the list of batches.
    """
    experts = [_experts_of(tuner, source.language) for source in sources]
    tallies = [[_Tally() for _ in sources] for _ in candidates]
    lengths = [[len(row) for row, _ in source.held_out] for source in sources]
    batches = [(place, batch) for place, rows in enumerate(lengths) for batch in batches_by_length(rows, batch_size)]
    with evaluating(tuner.model):
        for place, batch in progress(batches) if progress else batches:
            source = sources[place]
            rows = [source.held_out[index] for index in batch]
            ids_BS, mask_BS = padded([row for row, _ in rows])
            own_BS = mask_BS.bool()
            own_BS[:, : source.begun] = False
            with tuner.in_routing("language"):
                logits_BSV = _logits(tuner, ids_BS, mask_BS, source.language)
                told = [_Told.of(logits_SV, *row) for logits_SV, row in zip(logits_BSV, rows, strict=True)]
            for routers, of_sources in zip(candidates, tallies, strict=True):
                routers.fill(tuner)
                with recording(tuner.model) as recorded:
                    logits_BSV = _logits(tuner, ids_BS, mask_BS, source.language)
                for layer, passes in recorded.items():
                    first_T = passes[0].indices_TK[:, 0].cpu()[own_BS.view(-1)]
                    of_sources[place].right.append(experts[place][layer][first_T])
                for row, logits_SV in zip(told, logits_BSV, strict=True):
                    of_sources[place].sums += row.compared(logits_SV)
    return [
        Tried(routers, tuple(tally.of(source) for tally, source in zip(of_sources, sources, strict=True)))
        for routers, of_sources in zip(candidates, tallies, strict=True)
    ]


def _experts_of(tuner: MoeDeltaModel, language: str) -> dict[int, Tensor]:
    """Layer -> which of its experts serve a language, (E,) bool."""
    adapter, table, rule = tuner.active_adapters[0], tuner.active_config.language_table, routing_named("language")
    group = table.group_of[table.id_of(language)]
    counts = {name: layer.settings[adapter].counts for name, layer in tuner.layers().items()}
    return {name: torch.tensor(rule.allowed_experts(count)[group]) for name, count in counts.items()}


def _logits(tuner: MoeDeltaModel, ids_BS: Tensor, mask_BS: Tensor, language: str) -> Tensor:
    model: Any = tuner.model
    ids_BS, mask_BS = ids_BS.to(model.device), mask_BS.to(model.device)
    logits: Tensor = model(input_ids=ids_BS, attention_mask=mask_BS, language=language, use_cache=False).logits
    return logits


@dataclass
class _Tally:
    """One candidate on one source, so far.

    Attributes:
        right: for each batch and layer, whether each token's first expert is one of its group's.
        sums: loss, loss under routing by language, divergence, and answers that stay.
    """

    right: list[Tensor] = field(default_factory=list)
    sums: Tensor = field(default_factory=lambda: torch.zeros(4, dtype=torch.float64))

    def of(self, source: Source) -> Routed:
        targets = sum(len(row) - 1 for row, _ in source.held_out)
        loss, told, divergence = (self.sums[:3] / max(targets, 1)).tolist()
        return Routed(
            language=source.language,
            kind=source.kind,
            original=source.original,
            right=torch.cat(self.right).double().mean().item(),
            loss=loss,
            told=told,
            divergence=divergence,
            answers=self.sums[3].item() / len(source.held_out),
        )


@dataclass(frozen=True)
class _Told:
    """One row's predictions under routing by language.

    Attributes:
        targets_S: the tokens that come.
        answer: the first target that is part of the answer.
        probabilities_SV: fp32, and kept while the candidates run: S x V x 4 bytes a row.
        entropy: summed over the row, in nats.
        loss: summed likewise.
        greedy_S: where the target is the likeliest token.
    """

    targets_S: Tensor
    answer: int
    probabilities_SV: Tensor
    entropy: Tensor
    loss: Tensor
    greedy_S: Tensor

    @classmethod
    def of(cls, logits_SV: Tensor, row: Sequence[int], answer: int) -> _Told:
        targets_S = torch.tensor(row[1:], device=logits_SV.device)
        log_SV = logits_SV[: len(targets_S)].float().log_softmax(-1)
        loss = F.nll_loss(log_SV, targets_S, reduction="sum")
        greedy_S, likely_SV = log_SV.argmax(-1) == targets_S, log_SV.exp()
        return cls(targets_S, max(answer - 1, 0), likely_SV, -(likely_SV * log_SV).sum(), loss, greedy_S)

    def compared(self, logits_SV: Tensor) -> Tensor:
        """Summed over the row's tokens: loss, loss under routing by language, and divergence of the former from that;
        and 1 where the answer stays as it is, as far as it was written greedily."""
        log_SV = logits_SV[: len(self.targets_S)].float().log_softmax(-1)
        loss = F.nll_loss(log_SV, self.targets_S, reduction="sum")
        cross = -torch.linalg.vecdot(self.probabilities_SV, log_SV).sum()
        divergence = (cross - self.entropy).clamp(min=0)  # rounding may leave less
        lost_S = self.greedy_S & (log_SV.argmax(-1) != self.targets_S)
        stays = ~lost_S[self.answer :].any()
        return torch.stack([loss, self.loss, divergence, stays.to(loss)]).double().cpu()
