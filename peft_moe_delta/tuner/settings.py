"""How one adapter uses one layer: who may use which expert, what trains, where the prior loss points.

In: the adapter's configuration and how many experts each group owns in the layer. Out: tables over groups and experts.
They are compiled once and frozen; `MoeDeltaConfig.change` compiles them again, so a change of stage, routing or growth
reaches every layer at once, and a forward pass only reads them. Layers of equal counts share one.

Shape legend: G language groups, E experts, L languages, S sets of experts a token may use: one a group, and in a layer
with a gate one more, expert 0 alone, for what the gate takes for an original language.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..languages import LanguageTable
from ..routing import ClassifierRouting, routing_named, within_reach
from .config import MoeDeltaConfig

BALANCE_LOSS, PRIOR_LOSS, Z_LOSS, GATE_LOSS = (
    "load_balancing_loss",
    "language_prior_loss",
    "router_z_loss",
    "classifier_loss",
)

Rows = tuple[tuple[bool, ...], ...]

_numbers = itertools.count()


@dataclass(frozen=True, eq=False)
class LayerTables:
    """What follows from a configuration for a layer in which group g owns `counts[g]` experts.

    Attributes:
        languages: the adapter's languages and groups.
        owners: (E,) the group that owns each expert.
        allowed: (G, E) booleans, the experts each group's tokens may use under the routing in force.
        trained_groups: (G,) booleans, the groups of the newest growth step, whose experts and rows train: all before
            any growth.
        prior_targets: (G, E) booleans, where the prior loss sends each group; a row without any True is not trained.
            That is to the group's own experts; in review, a group that was there before the newest growth step is only
            kept away from what came later, so expert 0 will do as well; and it does for a group without experts here,
            as under routing by language.
        logit_losses: the losses that are made of a router's logits, soft or top-k, by name.
        closed: (G,) booleans, the groups whose growth step no review has opened yet.
        routing: the routing's name.
        needs_language: whether it needs the language of every token.
        gated: whether it uses gates.
        restricted: whether some group may not use every expert.
        offers_choice: whether some group may use more than one.
        share_names: (G,) what each group's share of expert 0 is called in the statistics.
        uses_router: whether the rows that train matter: a choice depends on them, or the prior loss teaches them.
        number: another for each table of a process, by which a pass remembers what it found out.
    """

    languages: LanguageTable
    owners: tuple[int, ...]
    allowed: Rows
    trained_groups: tuple[bool, ...]
    prior_targets: Rows
    logit_losses: tuple[str, ...]
    closed: tuple[bool, ...]
    routing: str
    needs_language: bool
    gated: bool
    restricted: bool
    offers_choice: bool
    share_names: tuple[str, ...]
    uses_router: bool
    number: int = field(default_factory=_numbers.__next__)
    _tensors: dict[tuple[str, torch.device], Tensor] = field(default_factory=dict, repr=False)

    def __deepcopy__(self, memo: dict[int, Any]) -> LayerTables:
        return self  # never changed

    def __getstate__(self) -> dict[str, Any]:
        """For a file, whose reader may have other devices."""
        return {**self.__dict__, "_tensors": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, number=next(_numbers))

    def usable(self, groups: Iterable[int]) -> tuple[int, ...]:
        """The experts that tokens of these groups may use, ascending."""
        columns = zip(*(self.allowed[group] for group in groups), strict=True)
        return tuple(expert for expert, column in enumerate(columns) if any(column))

    def tensor(self, name: str, device: torch.device) -> Tensor:
        """`allowed` (S, E), `prior_targets` (G, E) or `closed` (G,), booleans; or `group_of` (L,), on a device.

        Copied to each device once. They are no buffers of the layer: those would be broadcast by DDP in every pass,
        lost where a model is made on the meta device, and as many as there are layers.
        """
        if (kept := self._tensors.get((name, device))) is not None:
            return kept
        rows: Any = self.languages.group_of if name == "group_of" else getattr(self, name)
        if name == "allowed" and self.gated:
            rows = (*rows, tuple(expert == 0 for expert in range(len(self.owners))))
        with torch.inference_mode(False):
            made = torch.tensor(rows, device=device)
        if type(made) is Tensor and not torch.compiler.is_compiling():  # not what a tracer would have us keep
            self._tensors[name, device] = made
        return made


def compile_tables(config: MoeDeltaConfig, counts: tuple[int, ...]) -> LayerTables:
    """The tables of a layer in which group g owns `counts[g]` experts; `counts[0] == 1`, expert 0."""
    languages, steps, newest = config.language_table, config.steps, config.newest_step
    owners = tuple(group for group, count in enumerate(counts) for _ in range(count))
    allowed = config.routing_rule.allowed_experts(counts)
    if config.record.growth:
        allowed = within_reach(allowed, counts, steps, config.record.open_steps)
    trained_groups = tuple(step == newest for step in steps)
    trained = [trained_groups[owner] or config.record.train_earlier_rows for owner in owners]
    chosen = any(sum(row) > 1 and any(may and t for may, t in zip(row, trained, strict=True)) for row in allowed)
    spoken_for, review = set(config.prior_groups), config.record.stage == "review"
    own = routing_named("language").allowed_experts(counts)
    targets = tuple(
        tuple(name in spoken_for and (may or (e == 0 and review and step < newest)) for e, may in enumerate(row))
        for name, step, row in zip(languages.groups, steps, own, strict=True)
    )
    offers_choice, prior = any(sum(row) > 1 for row in allowed), config.language_prior > 0
    z = config.router_z_loss_coef > 0 and (offers_choice or prior)
    return LayerTables(
        languages=languages,
        owners=owners,
        allowed=allowed,
        trained_groups=trained_groups,
        prior_targets=targets,
        logit_losses=(PRIOR_LOSS,) * prior + (Z_LOSS,) * z,
        closed=tuple(step > config.record.open_steps for step in steps),
        routing=config.routing,
        needs_language=config.routing_rule.needs_language,
        gated=isinstance(config.routing_rule, ClassifierRouting),
        restricted=not all(all(row) for row in allowed),
        offers_choice=offers_choice,
        share_names=tuple(f"expert_0_share/{group}" for group in languages.groups),
        uses_router=prior or chosen,
    )


@dataclass(frozen=True)
class LayerSettings:
    """How one adapter uses one layer.

    Attributes:
        config: the adapter's configuration, which all its layers share.
        counts: experts each group owns here; `counts[0] == 1`, expert 0.
        has_classifier: whether a gate stands before the router here.
    """

    config: MoeDeltaConfig
    counts: tuple[int, ...]
    has_classifier: bool = False

    @classmethod
    def build(cls, config: MoeDeltaConfig, counts: tuple[int, ...], layer: int) -> LayerSettings:
        return cls(config, counts, layer in (config.classifier_layers or ()))

    @property
    def tables(self) -> LayerTables:
        """What follows from the two, under the stage and routing in force."""
        return self.config.derived(compile_tables, self.counts)

    @property
    def classifies(self) -> bool:
        """Whether the gate is in use under the routing in force."""
        return self.has_classifier and self.tables.gated

    @property
    def losses(self) -> dict[str, int]:
        """The auxiliary losses that an MLP's layer has, whatever its coefficients are.

        By name, with how many numbers the weights of its parts depend on (`SummedLoss.counts`): the choices of each
        set's tokens for each expert, and the tokens on either side of the gate.
        """
        tables = self.tables
        sets = (len(tables.allowed) if tables.restricted or self.classifies else 1) + self.classifies
        balance = {BALANCE_LOSS: sets * len(tables.owners)} if tables.offers_choice else {}
        return balance | dict.fromkeys(tables.logit_losses, 0) | ({GATE_LOSS: 2} if self.classifies else {})

    @property
    def needs_logits(self) -> bool:
        """Whether a training pass needs the router's and the gate's logits even where nobody has a choice."""
        return bool(self.tables.logit_losses) or (self.classifies and self.config.classifier_loss > 0)

    @property
    def calls_router(self) -> bool:
        """Whether a pass calls the router: a matter of the adapter, not of the batch, so that all ranks agree."""
        return self.tables.offers_choice or bool(self.tables.logit_losses)
