"""One forward pass: what is known of its tokens, which experts they may use, and the losses that layers leave.

In: what the call said of languages and padding. Out: `TokenGroups` and `Reach`, found out once for all layers of a
kind, and the pass's auxiliary loss.

Shape legend: B batch, S sequence, T = B * S tokens, G language groups, E experts, and in `allowed_SE` S
sets of experts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import LanguageError
from ..languages import PADDING_LANGUAGE_ID, LanguageTable
from ..losses import SummedLoss
from ..routing import Routes
from .dispatch import Dispatch, constant
from .processes import parallel, summed_over_processes
from .settings import LayerTables


class TokenGroups(NamedTuple):
    """The language groups of a pass.

    Attributes:
        group_T: group index of every token, int64.
        present: the groups that occur.
    """

    group_T: Tensor
    present: frozenset[int]


@dataclass(frozen=True)
class Reach:
    """Which experts the tokens of a pass may use in layers of one kind, before any gate.

    Attributes:
        groups: None where no language is known, and none is needed.
        usable: the experts that some token may use, ascending.
        sets_T: the set of each token, an index into `allowed_SE`; None where all may use all.
        allowed_SE: the sets.
        forced: where each token goes, in a pass in which none has a choice; None in others.
    """

    groups: TokenGroups | None
    usable: tuple[int, ...]
    sets_T: Tensor | None
    allowed_SE: Tensor
    forced: Dispatch | None = None
    _kept: dict[str, Any] = field(default_factory=dict)
    """What layers of one kind share, made when the first of them asks. (`cached_property` holds a lock, which compiled
    code cannot.)"""

    def allowed(self, sets_T: Tensor | None) -> Tensor | None:
        """(T, E) the experts that each token may use, by its set; None where all may use all."""
        if sets_T is None:
            return None
        if sets_T is not self.sets_T:
            return self.allowed_SE[sets_T]
        if "allowed" not in self._kept:
            self._kept["allowed"] = self.allowed_SE[sets_T]
        allowed_TE: Tensor = self._kept["allowed"]
        return allowed_TE

    @property
    def forced_routes(self) -> Routes:
        """What a router would choose in a pass in which no token has a choice."""
        if "routes" not in self._kept:
            allowed_TE = self.allowed(self.sets_T)
            assert self.sets_T is not None and allowed_TE is not None  # some experts are out of reach
            only_T1, probabilities_TE = _only(self.allowed_SE, self.sets_T), allowed_TE.float()
            self._kept["routes"] = Routes(only_T1, probabilities_TE.new_ones(only_T1.shape), probabilities_TE)
        routes: Routes = self._kept["routes"]
        return routes


def _only(allowed_SE: Tensor, sets_T: Tensor) -> Tensor:
    """(T, 1) the one expert of each token's set."""
    return allowed_SE.int().argmax(dim=-1)[sets_T][:, None]


@dataclass
class _Place:
    """Where a layer leaves one of its losses, or nothing where the pass had none for it.

    Attributes:
        name: the loss's.
        counts: how many numbers its weights depend on.
        device: the layer's.
    """

    name: str
    counts: int
    device: torch.device
    coefficient: float = 0.0
    loss: SummedLoss | None = None


@dataclass
class ForwardState:
    """One forward pass.

    Attributes:
        shape: (B, S).
        language: a code for the whole batch, or one a row; None where the call named none.
        default: the code of calls that name none, for an adapter that knows it.
        language_ids: int64, (B, S); -100 for padding; None where nothing is known.
        groups_read: int64, (B, S), the groups that were read from the text; -1 for padding. None where languages are
            named, or nobody reads them.
        mask_T: bool, False for padding; None where no token is known to be padding.
        share: how much of its optimizer step the pass is (`losses.share_of_step`).
        recording: whether the layers must deposit auxiliary losses.
        grouped: whether experts run as one where they can, so that the host need not know how many tokens each has.
        remember: to be told of the pass's output, for a cache that remembers its tokens; None where nobody does.
        seen: the groups and how many tokens there are of each, where something is recorded.
        places: the losses that the layers that have run may leave, in order, whether or not this pass left any: the
            same on every process, whatever is in its batch.
    """

    shape: tuple[int, int]
    language: str | list[str] | None = None
    default: str | None = None
    language_ids: Tensor | None = None
    groups_read: Tensor | None = None
    mask_T: Tensor | None = None
    share: Tensor | float = 1.0
    recording: bool = False
    grouped: bool = False
    remember: Callable[[Any], None] | None = None
    seen: tuple[tuple[str, ...], Tensor] | None = None
    places: list[_Place] = field(default_factory=list)
    _found: dict[tuple[Any, torch.device], Any] = field(default_factory=dict)
    """What was found out for one layer and holds for all of its kind, by that and the device."""

    def groups(self, table: LanguageTable, device: torch.device) -> TokenGroups | None:
        """The language groups of the tokens; None where no language is known.

        Raises:
            LanguageError: a code or an id is not in the table.
        """
        key = table, device  # the layers of one model may lie on several devices
        if key not in self._found:
            self._found[key] = self._find_groups(table, device)
        found: TokenGroups | None = self._found[key]
        if self.recording and self.seen is None and found is not None:
            counted_T = self.counted(found.group_T).long()
            number_G = counted_T.new_zeros(len(table.groups)).index_add_(0, found.group_T, counted_T)
            self.seen = table.groups, number_G
        return found

    def reach(self, tables: LayerTables, tokens: int, device: torch.device) -> Reach:
        """Which experts the tokens may use in the layers of these tables.

        Raises:
            LanguageError: a code or an id is not in the table, or no language is known where the routing needs it.
        """
        key = tables.number, device
        if key not in self._found:
            self._found[key] = self._find_reach(tables, tokens, device)
        found: Reach = self._found[key]
        return found

    @property
    def on_device(self) -> bool:
        """Whether the host must not wait to hear what the device has found: compiled code would stop there."""
        return self.grouped or torch.compiler.is_compiling()

    def counted(self, rows: Tensor) -> Tensor:
        """(T,) booleans for T rows, on their device; False for padding."""
        if self.mask_T is None:
            return torch.ones(len(rows), dtype=torch.bool, device=rows.device)
        return self.mask_T.to(rows.device)

    def _find_reach(self, tables: LayerTables, tokens: int, device: torch.device) -> Reach:
        groups = self.groups(tables.languages, device)
        if groups is None and tables.needs_language:
            raise LanguageError(
                f"Routing {tables.routing!r} needs the language of every token, and none was given. Known "
                f"languages: {', '.join(tables.languages.codes)}. Pass `language_ids` (LanguageCollator adds them) or "
                '`language="..."` with the call; a PeftModel also takes a default, model.set_language("..."). To have '
                "it read from the text, call fit_identifier(model, texts_by_language) once."
            )
        present = (0,) if groups is None else groups.present
        usable, allowed_SE = tables.usable(present), tables.tensor("allowed", device)
        if not tables.restricted and not tables.gated:
            return Reach(groups, usable, None, allowed_SE)
        sets_T = torch.zeros(tokens, dtype=torch.int64, device=device) if groups is None else groups.group_T
        forced = None
        if len(usable) == 1:
            forced = Dispatch.to_one(usable[0], tokens)
        elif not tables.gated and all(sum(tables.allowed[group]) == 1 for group in present):
            forced = Dispatch.of(_only(allowed_SE, sets_T), len(tables.owners), on_device=self.on_device)
        return Reach(groups, usable, sets_T, allowed_SE, forced)

    def _find_groups(self, table: LanguageTable, device: torch.device) -> TokenGroups | None:
        batch, sequence = self.shape
        if self.language_ids is not None:
            ids_T = self.language_ids.reshape(-1).to(device)
            groups = frozenset(table.group_of[i] for i in _present(self.language_ids.reshape(-1), table))
            return _with_padding(constant(table.group_of, device)[ids_T.clamp(min=0)], ids_T < 0, groups)
        if self.groups_read is not None:
            return _present_groups(self.groups_read.reshape(-1).to(device), len(table.groups))
        language = self.language
        if language is None:  # the default was set under another adapter, perhaps
            language = self.default if self.default in table.codes else None
        if language is None:
            return None
        codes = [language] * batch if isinstance(language, str) else list(language)
        if len(codes) != batch:
            raise LanguageError(
                f"`language` lists {len(codes)} codes for a batch of {batch}. Give one code, or one a row; "
                "for several beams or samples a row, give `language_ids`, which `generate` repeats."
            )
        rows = tuple(table.group_of[table.id_of(code)] for code in codes)
        return TokenGroups(constant(rows, device).repeat_interleave(sequence), frozenset(rows))

    def expect(self, losses: Mapping[str, int], device: torch.device) -> None:
        """Count a layer among those that have these losses; name -> how many numbers its weights depend on."""
        self.places += [_Place(name, counts, device) for name, counts in losses.items()]

    def deposit(self, name: str, coefficient: float, loss: SummedLoss) -> None:
        """Leave the loss of the layer that expected it last, summed over some of its tokens."""
        place = next((place for place in reversed(self.places) if place.name == name), None)
        if place is not None:
            place.coefficient, place.loss = coefficient, loss

    def auxiliary_loss(self, note: Callable[[str, Tensor, Tensor], None] | None = None) -> Tensor | None:
        """Each loss's mean over counted tokens and over the layers that have it, times the pass's share of its step.

        None where no layer deposited anything; 0, never NaN, where no token counts or the step has no target. Each
        deposit is a sum over tokens, with or without a target of the model's own loss: a prompt that is masked for
        that loss is routed all the same, so what is masked must not change a router's loss. A layer has a loss, or has
        not, whoever is in the batch, so a loss weighs the same in every pass.

        On several processes the counts, the tokens and the shares are those of all, in one collective a pass. So the
        losses of the processes add up to what one process would find for the joint batch.

        Args:
            note: is told each loss's name, its sum over this process's tokens and their number.
        """
        if not self.recording or not self.places:
            return None
        device = self.places[0].device
        share, tokens, counts = self._joint_counts(device)
        layers = Counter(place.name for place in self.places)
        means = []
        for place, joint in zip(self.places, counts, strict=True):
            if (loss := place.loss) is None:
                continue
            total = loss.total(None if joint is None else joint.to(place.device).view(loss.counts.shape))
            if note is not None:
                note(place.name, total, loss.tokens)
            if place.coefficient:
                means.append((place.coefficient / layers[place.name]) * total.to(device))
        return torch.stack(means).sum() / tokens.clamp(min=1) * share if means else None

    def _joint_counts(self, device: torch.device) -> tuple[Tensor, Tensor, Sequence[Tensor | None]]:
        """Share and counted tokens, and each place's counts, of all processes; None for its own where there is one."""
        tokens = self.shape[0] * self.shape[1] if self.mask_T is None else self.mask_T.sum()
        share, tokens = (torch.as_tensor(n, dtype=torch.float32, device=device) for n in (self.share, tokens))
        if not parallel():
            return share, tokens, [None] * len(self.places)
        own = [
            torch.zeros(place.counts, device=device) if place.loss is None else place.loss.counts.reshape(-1).to(device)
            for place in self.places
        ]
        joint = summed_over_processes(torch.cat([share.view(1), tokens.view(1), *own]))
        share, tokens, *counts = joint.split([1, 1, *(place.counts for place in self.places)])
        return share[0], tokens[0], counts


def _with_padding(group_T: Tensor, padding_T: Tensor, groups: frozenset[int]) -> TokenGroups:
    """What padding computes reaches nobody, so it follows the crowd where there is one, else expert 0."""
    padding_group = next(iter(groups)) if len(groups) == 1 else 0
    return TokenGroups(group_T.masked_fill(padding_T, padding_group), groups or frozenset({0}))


def _present_groups(group_T: Tensor, number: int) -> TokenGroups:
    """Groups with -1 for padding, and which of them occur, for which the host waits once."""
    if torch.compiler.is_compiling():
        return _with_padding(group_T, group_T < 0, frozenset(range(number)))
    seen = torch.zeros(number + 1, dtype=torch.bool, device=group_T.device).index_fill(0, group_T % (number + 1), True)
    found = seen.tolist()
    return _with_padding(group_T, group_T < 0, frozenset(group for group in range(number) if found[group]))


def _present(ids_T: Tensor, table: LanguageTable) -> list[int]:
    """Which language ids occur, padding left out: what has to run, for which the host waits once.

    Compiled code does not wait: any may occur, and an id that is not in the table is an index error of the device.

    Raises:
        LanguageError: an id is not in the table.
    """
    known = len(table.codes)
    if torch.compiler.is_compiling():
        return list(range(known))
    slot_T = ids_T.long().masked_fill((ids_T < 0) | (ids_T >= known), known + 1)
    slot_T = slot_T.masked_fill(ids_T == PADDING_LANGUAGE_ID, known)
    seen = torch.zeros(known + 2, dtype=torch.bool, device=ids_T.device).index_fill(0, slot_T, True).tolist()
    if seen[-1]:
        found = sorted(set(ids_T.tolist()) - {PADDING_LANGUAGE_ID})
        raise LanguageError(
            f"`language_ids` holds {found}; expected 0 to {known - 1} for {', '.join(table.codes)}, "
            f"{PADDING_LANGUAGE_ID} for padding. Build batches with LanguageCollator."
        )
    return [i for i in range(known) if seen[i]]
