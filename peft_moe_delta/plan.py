"""`ExpertPlan`: how many experts each group owns in each layer.

In: groups and counts. Out: a frozen table that every other module reads for expert indices, sizes and names. Within a
layer expert 0 is the base model's MLP (group `"original"`); the experts of the other groups follow, group after group.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .errors import PlanError
from .languages import ORIGINAL_GROUP


@dataclass(frozen=True)
class ExpertPlan:
    """Experts per layer and group.

    Attributes:
        layers: indices of the decoder layers that may hold experts, ascending.
        groups: group names; `groups[0] == "original"`.
        counts: `counts[l][g]`, number of experts that group `g` owns in `layers[l]`. Column 0 is always 1: expert 0.
    """

    layers: tuple[int, ...]
    groups: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...]

    @classmethod
    def build(
        cls, layers: Sequence[int], groups: Sequence[str], experts: Mapping[str, int | Sequence[int]]
    ) -> ExpertPlan:
        """Lay `experts` (`group -> count`, or `group -> one count a layer`) over `layers`.

        Raises:
            PlanError: a group without experts, an unknown or reserved group, a negative count, a wrong number of
                per-layer counts.
        """
        expanded = [g for g in groups if g != ORIGINAL_GROUP]
        if ORIGINAL_GROUP in experts:
            raise PlanError(
                f'`experts` gives a count for "{ORIGINAL_GROUP}", which always owns exactly expert 0, the base MLP. '
                "Remove it."
            )
        if set(experts) != set(expanded):
            raise PlanError(
                f"`experts` names the groups {sorted(experts)}, `languages` uses {sorted(expanded)}. Every group but "
                f'"{ORIGINAL_GROUP}" needs a count, and only those. Example: experts={{"expanded": 3}}.'
            )
        if not expanded:
            raise PlanError(
                'Every language is in the group "original", so there is nothing to train. Put at least one language '
                'in another group, for example {"hu": "expanded"}.'
            )
        columns = [(1,) * len(layers)]
        for group in expanded:
            columns.append(_per_layer(group, experts[group], len(layers)))
        return cls(tuple(layers), tuple(groups), tuple(zip(*columns, strict=True)))

    def num_experts(self, layer: int) -> int:
        """Experts in a decoder layer, expert 0 included; 1 for a layer that stays dense."""
        return sum(self.counts[self.layers.index(layer)]) if layer in self.layers else 1

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """The layers with more than one expert."""
        return tuple(layer for layer in self.layers if self.num_experts(layer) > 1)

    def experts_of(self, layer: int, group: str) -> range:
        """Indices of the experts a group owns in a layer; empty where it owns none."""
        if layer not in self.layers:
            return range(1 if group == ORIGINAL_GROUP else 0)
        row, g = self.counts[self.layers.index(layer)], self.groups.index(group)
        return range(sum(row[:g]), sum(row[: g + 1]))

    def group_of_expert(self, layer: int, expert: int) -> str:
        """The group that owns an expert."""
        return next(group for group in self.groups if expert in self.experts_of(layer, group))

    def num_params(self, expert_params: int, hidden_size: int) -> int:
        """Trainable parameters of the plan: new experts of `expert_params` each, and one router row an expert."""
        return sum(
            (self.num_experts(layer) - 1) * expert_params + self.num_experts(layer) * hidden_size
            for layer in self.moe_layers
        )

    def to_json(self) -> str:
        """The plan as a JSON document that `from_json` reads back."""
        return json.dumps({"layers": self.layers, "groups": self.groups, "counts": self.counts}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> ExpertPlan:
        """Read a plan that `to_json` wrote.

        Raises:
            PlanError: the document is not such a plan.
        """
        try:
            data = json.loads(text)
            layers, groups, counts = data["layers"], data["groups"], data["counts"]
            columns = list(zip(*counts, strict=True))
            if len(columns) != len(groups) or groups[0] != ORIGINAL_GROUP or set(columns[0]) != {1}:
                raise ValueError("counts do not match groups, or column 0 is not all ones")
            return cls.build(layers, groups, dict(zip(groups[1:], columns[1:], strict=True)))
        except (KeyError, TypeError, IndexError, ValueError) as error:
            raise PlanError(
                f"Not an expert plan: {error}. Expected the JSON that ExpertPlan.to_json writes."
            ) from error


def _per_layer(group: str, count: int | Sequence[int], num_layers: int) -> tuple[int, ...]:
    """One count a layer for a group, checked."""
    if isinstance(count, int) and not isinstance(count, bool):
        counts: tuple[int, ...] = (count,) * num_layers
    else:
        counts = tuple(count) if isinstance(count, Sequence) and not isinstance(count, str) else (-1,)
    if any(not isinstance(c, int) or isinstance(c, bool) or c < 0 for c in counts):
        raise PlanError(
            f"`experts[{group!r}]` must be a number of experts or one number a layer, none negative; got {count!r}."
        )
    if len(counts) != num_layers:
        raise PlanError(
            f"`experts[{group!r}]` lists {len(counts)} counts, but the model has {num_layers} transformed layers. "
            "Give one number for all, or one count for each transformed layer, in order."
        )
    if not any(counts):
        raise PlanError(f"Group {group!r} has no expert in any layer, so it could learn nothing. Give it at least one.")
    return counts
