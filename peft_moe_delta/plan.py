"""`ExpertPlan`: how many experts each group owns in each layer.

In: groups and counts. Out: a frozen table that every other module reads for expert indices, sizes and names. Within a
layer expert 0 is the base model's MLP (group `"original"`); the experts of the other groups follow, group after group.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .errors import PlanError
from .files import whole_file
from .languages import ORIGINAL_GROUP

MOST_EXPERTS = 10_000
"""Experts of a group in a layer: beyond the largest mixtures by a factor of ten, and before tables fill the memory."""


@dataclass(frozen=True)
class ExpertPlan:
    """Experts per layer and group.

    Attributes:
        layers: indices of the decoder layers that may hold experts, ascending.
        groups: group names; `groups[0] == "original"`.
        counts: `counts[l][g]`, number of experts that group `g` owns in `layers[l]`. Column 0 is always 1: expert 0.
        expert_params: parameters of one expert, where known; not part of what makes two plans equal.
        hidden_size: width of the hidden states, likewise.
    """

    layers: tuple[int, ...]
    groups: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...]
    expert_params: int | None = field(default=None, compare=False)
    hidden_size: int | None = field(default=None, compare=False)

    def __repr__(self) -> str:
        columns = dict(zip(self.groups[1:], list(zip(*self.counts, strict=True))[1:], strict=True))
        each = (
            f"{group} {min(counts)}" + (f" to {max(counts)}" if max(counts) > min(counts) else "")
            for group, counts in columns.items()
        )
        return f"ExpertPlan({len(self.layers)} layers, new experts in each: {', '.join(each) or 'none'})"

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
        if not isinstance(experts, Mapping):
            raise PlanError(
                f"`experts` must be a plan, or map groups to numbers of experts; got {experts!r}. Example: "
                'experts={"expanded": 3}.'
            )
        if ORIGINAL_GROUP in experts:
            raise PlanError(
                f'`experts` gives a count for "{ORIGINAL_GROUP}", which always owns exactly expert 0, the base MLP. '
                "Remove it."
            )
        if set(experts) != set(expanded):
            named = sorted(map(str, experts))
            raise PlanError(
                f"`experts` names the groups {named}, `languages` uses {sorted(expanded)}. Every group but "
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

    def with_sizes(self, expert_params: int | None = None, hidden_size: int | None = None) -> ExpertPlan:
        """The same plan, which knows its sizes."""
        return replace(self, expert_params=expert_params, hidden_size=hidden_size)

    def num_params(self, expert_params: int | None = None, hidden_size: int | None = None) -> int:
        """Trainable parameters: new experts of `expert_params` each, and one router row of `hidden_size` an expert.

        Raises:
            PlanError: a size is neither given nor known to the plan.
        """
        expert_params, hidden_size = self._sizes(expert_params, hidden_size)
        return sum(
            (self.num_experts(layer) - 1) * expert_params + self.num_experts(layer) * hidden_size
            for layer in self.moe_layers
        )

    def num_active_params(
        self, top_k: int = 2, expert_params: int | None = None, hidden_size: int | None = None
    ) -> int:
        """Parameters that one token passes through in the plan's layers: `top_k` experts, or as many as a layer has,
        and the router of every layer that has one.

        Raises:
            PlanError: a size is neither given nor known to the plan.
        """
        expert_params, hidden_size = self._sizes(expert_params, hidden_size)
        routers = sum(self.num_experts(layer) * hidden_size for layer in self.moe_layers)
        return routers + sum(min(top_k, self.num_experts(layer)) * expert_params for layer in self.layers)

    def _sizes(self, expert_params: int | None, hidden_size: int | None) -> tuple[int, int]:
        expert_params = self.expert_params if expert_params is None else expert_params
        hidden_size = self.hidden_size if hidden_size is None else hidden_size
        if expert_params is None or hidden_size is None:
            raise PlanError("This plan does not know the size of an expert. Give expert_params and hidden_size.")
        return expert_params, hidden_size

    def config_fields(self) -> dict[str, Any]:
        """The plan as fields of `MoeDeltaConfig`, which takes `experts=plan` too.

        A plan for layers 0 to L - 1 is a plan for a model of L layers: it names none, so that a model with another
        number of layers refuses it.
        """
        columns = list(zip(*self.counts, strict=True))
        whole = self.layers == tuple(range(len(self.layers)))
        return {
            "experts": {group: list(column) for group, column in zip(self.groups[1:], columns[1:], strict=True)},
            "layers_to_transform": None if whole else list(self.layers),
        }

    def table(self) -> str:
        """Markdown: the experts of each group in each layer, and their sums."""
        rows = [["layer", *self.groups, "experts"], ["---", *["---:"] * (len(self.groups) + 1)]]
        rows += [
            [str(layer), *map(str, row), str(sum(row))] for layer, row in zip(self.layers, self.counts, strict=True)
        ]
        sums = [sum(column) for column in zip(*self.counts, strict=True)]
        rows.append(["all", *map(str, sums), str(sum(sums))])
        return "\n".join(f"| {' | '.join(row)} |" for row in rows)

    def draw(self, path: str | Path) -> None:
        """A picture: a bar a layer, a colour a group. Needs matplotlib.

        Raises:
            PlanError: matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
            from matplotlib.ticker import MaxNLocator
        except ImportError as error:
            raise PlanError("Drawing needs matplotlib: pip install matplotlib.") from error
        drawing = Figure(figsize=(max(5.0, 1.5 + 0.22 * len(self.layers)), 3), layout="constrained")
        axes, below = drawing.subplots(), [0] * len(self.layers)
        for group, column in zip(self.groups, zip(*self.counts, strict=True), strict=True):
            axes.bar(self.layers, column, bottom=below, label=group)
            below = [low + count for low, count in zip(below, column, strict=True)]
        axes.set(xlabel="decoder layer", ylabel="experts")
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(ncols=min(4, len(self.groups)), fontsize=8)
        with whole_file(path) as partial:
            drawing.savefig(partial, dpi=120)

    def to_json(self) -> str:
        """The plan as a JSON document that `from_json` reads back."""
        known = {"expert_params": self.expert_params, "hidden_size": self.hidden_size}
        data = {"layers": self.layers, "groups": self.groups, "counts": self.counts}
        return json.dumps({**data, **{name: size for name, size in known.items() if size is not None}}, indent=1)

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
            plan = cls.build(layers, groups, dict(zip(groups[1:], columns[1:], strict=True)))
            return plan.with_sizes(data.get("expert_params"), data.get("hidden_size"))
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
    if max(counts, default=0) > MOST_EXPERTS:
        raise PlanError(
            f"`experts[{group!r}]`: got {max(counts)} experts in a layer, expected {MOST_EXPERTS:,} at most. Each is "
            "as large as the MLP, or as its low-rank factors."
        )
    if len(counts) != num_layers:
        raise PlanError(
            f"`experts[{group!r}]` lists {len(counts)} counts, but the model has {num_layers} transformed layers. "
            "Give one number for all, or one count for each transformed layer, in order."
        )
    if not any(counts):
        raise PlanError(f"Group {group!r} has no expert in any layer, so it could learn nothing. Give it at least one.")
    return counts
