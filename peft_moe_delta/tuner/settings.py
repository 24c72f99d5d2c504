"""How one adapter uses one layer: who may use which expert, what trains, where the prior loss points.

In: the adapter's configuration and how many experts each group owns in the layer. Out: tables over groups and experts,
read anew at every pass, so that a change of stage or routing reaches every layer.

Shape legend: G language groups, E experts.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

from ..languages import LanguageTable
from ..routing import ClassifierRouting, within_reach
from .config import MoeDeltaConfig


@dataclass(frozen=True)
class LayerSettings:
    """How one adapter uses one layer.

    Attributes:
        config: the adapter's configuration; shared, so that a change of stage reaches every layer.
        counts: experts each group owns here; `counts[0] == 1`, expert 0.
        table: the adapter's languages and groups.
        own: (G, E) booleans, the experts each group owns.
        has_classifier: whether a gate stands before the router here.
    """

    config: MoeDeltaConfig
    counts: tuple[int, ...]
    table: LanguageTable
    own: tuple[tuple[bool, ...], ...]
    has_classifier: bool = False

    @classmethod
    def build(cls, config: MoeDeltaConfig, counts: tuple[int, ...], layer: int) -> LayerSettings:
        starts = [sum(counts[:g]) for g in range(len(counts))]
        own = tuple(
            tuple(start <= e < start + n for e in range(sum(counts))) for start, n in zip(starts, counts, strict=True)
        )
        return cls(config, counts, config.language_table, own, layer in (config.classifier_layers or ()))

    @property
    def allowed(self) -> tuple[tuple[bool, ...], ...]:
        """(G, E) booleans, the experts each group's tokens may use under the routing in force."""
        allowed, config = self.config.routing_rule.allowed_experts(self.counts), self.config
        return within_reach(allowed, self.counts, config.steps, config.open_steps) if config.growth else allowed

    def usable(self, groups: frozenset[int] | None) -> list[bool]:
        """(E,) booleans, the experts that tokens of these groups may use; None where no language is known."""
        return [any(column) for column in zip(*(self.allowed[g] for g in groups or (0,)), strict=True)]

    @property
    def classifies(self) -> bool:
        """Whether the gate is in use under the routing in force."""
        return self.has_classifier and isinstance(self.config.routing_rule, ClassifierRouting)

    @property
    def needs_logits(self) -> bool:
        """Whether a training pass needs the router's and the gate's logits even where nobody has a choice."""
        return self.config.language_prior > 0 or (self.classifies and self.config.classifier_loss > 0)

    @property
    def owners(self) -> tuple[int, ...]:
        """(E,) the group that owns each expert."""
        return tuple(group for group, count in enumerate(self.counts) for _ in range(count))

    @property
    def trained_groups(self) -> tuple[bool, ...]:
        """(G,) booleans, the groups of the newest growth step, whose experts and rows train: all before any growth."""
        return tuple(step == self.config.newest_step for step in self.config.steps)

    @property
    def restricted(self) -> bool:
        """Whether some group may not use every expert."""
        return not all(all(row) for row in self.allowed)

    @property
    def uses_router(self) -> bool:
        """Whether the rows that train matter: a choice depends on them, or the prior loss teaches them."""
        if self.config.language_prior > 0:
            return True
        trained = [self.trained_groups[group] or self.config.train_earlier_rows for group in self.owners]
        return any(sum(row) > 1 and any(map(operator.and_, row, trained)) for row in self.allowed)

    @property
    def prior_targets(self) -> tuple[tuple[bool, ...], ...]:
        """(G, E) booleans, where the prior loss sends each group; a row without any True is not trained.

        That is to the group's own experts; in review, a group that was there before the newest growth step is only
        kept away from what came later, so expert 0 will do as well.
        """
        config = self.config
        return tuple(
            tuple(
                group in config.prior_groups
                and (own or (e == 0 and config.stage == "review" and step < config.newest_step))
                for e, own in enumerate(row)
            )
            for group, step, row in zip(self.table.groups, config.steps, self.own, strict=True)
        )
