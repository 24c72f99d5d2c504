"""What a forward pass knows beyond hidden states: languages, padding, and the auxiliary losses on their way out.

MLP blocks see hidden states only. `ForwardContext` is the side channel: it hangs on the base model (every PEFT road
keeps that), a forward pre-hook takes `language` / `language_ids` and the padding mask in, the layers read them, and a
forward hook adds the auxiliary loss to `output["loss"]`.

Shape legend: B batch, S sequence, T = B * S tokens, G language groups, E experts, K chosen experts a token.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, partial
from threading import get_ident
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..architectures import check_length
from ..errors import LanguageError, PeftMoeDeltaError
from ..languages import PADDING_LANGUAGE_ID, LanguageTable
from ..losses import share_of_step
from ..routing import Routes
from . import generation
from .dispatch import Dispatch
from .settings import LayerTables

COLUMNS = ("text",)
"""What `LanguageCollator` reads in a data set beyond the arguments of a model, so that Trainer must not drop it."""


def constant(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """Whole numbers as a tensor: copied to each device once, or part of a compiled graph."""
    return torch.tensor(numbers, device=device) if torch.compiler.is_compiling() else _kept_constant(numbers, device)


@lru_cache(maxsize=256)
def _kept_constant(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(numbers, device=device)


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

    def allowed(self, sets_T: Tensor | None) -> Tensor | None:
        """(T, E) the experts that each token may use, by its set; None where all may use all."""
        if sets_T is None:
            return None
        return self._allowed_TE if sets_T is self.sets_T else self.allowed_SE[sets_T]

    @cached_property
    def _allowed_TE(self) -> Tensor:
        assert self.sets_T is not None
        return self.allowed_SE[self.sets_T]

    @cached_property
    def forced_routes(self) -> Routes:
        """What a router would choose in a pass in which no token has a choice."""
        assert self.sets_T is not None  # some experts are out of reach
        only_T1, probabilities_TE = _only(self.allowed_SE, self.sets_T), self._allowed_TE.float()
        return Routes(only_T1, probabilities_TE.new_ones(only_T1.shape), probabilities_TE)


def _only(allowed_SE: Tensor, sets_T: Tensor) -> Tensor:
    """(T, 1) the one expert of each token's set."""
    return allowed_SE.int().argmax(dim=-1)[sets_T][:, None]


@dataclass
class ForwardState:
    """One forward pass.

    Attributes:
        shape: (B, S).
        language: a code for the whole batch, or one a row; None where the call named none.
        default: the code of calls that name none, for an adapter that knows it.
        language_ids: int64, (B, S); -100 for padding; None where nothing is known.
        mask_T: bool, False for padding; None where no token is known to be padding.
        share: how much of its optimizer step the pass is (`losses.share_of_step`).
        recording: whether the layers must deposit auxiliary losses.
        seen: tokens of each group, where something is recorded.
        layers: by loss, how many of the layers that have run have it, whether or not this pass deposited any.
    """

    shape: tuple[int, int]
    language: str | list[str] | None = None
    default: str | None = None
    language_ids: Tensor | None = None
    mask_T: Tensor | None = None
    share: Tensor | float = 1.0
    recording: bool = False
    seen: Tensor | None = None
    layers: dict[str, int] = field(default_factory=dict)
    losses: list[tuple[str, Tensor, Tensor]] = field(default_factory=list)
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
            self.seen = counted_T.new_zeros(len(table.groups)).index_add_(0, found.group_T, counted_T)
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
                '`language="..."` with the call; a PeftModel also takes a default, model.set_language("...").'
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
            forced = Dispatch.of(_only(allowed_SE, sets_T), len(tables.owners))
        return Reach(groups, usable, sets_T, allowed_SE, forced)

    def _find_groups(self, table: LanguageTable, device: torch.device) -> TokenGroups | None:
        batch, sequence = self.shape
        if self.language_ids is not None:
            ids_T = self.language_ids.reshape(-1).to(device)
            present = _present(self.language_ids.reshape(-1), table)
            groups = frozenset(table.group_of[i] for i in present)
            group_T = constant(table.group_of, device)[ids_T.clamp(min=0)]
            # What padding computes reaches nobody, so it follows the crowd where there is one, else expert 0.
            padding_group = next(iter(groups)) if len(groups) == 1 else 0
            return TokenGroups(group_T.masked_fill(ids_T < 0, padding_group), groups or frozenset({0}))
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

    def expect(self, losses: Iterable[str]) -> None:
        """Count a layer among those that have these losses."""
        for name in losses:
            self.layers[name] = self.layers.get(name, 0) + 1

    def deposit(self, name: str, coefficient: float, total: Tensor, tokens: Tensor) -> None:
        """Leave a layer's loss, summed over some of its `tokens`."""
        if coefficient and name in self.layers:
            self.losses.append((name, coefficient * total, tokens))

    def auxiliary_loss(self) -> Tensor | None:
        """Each loss's mean over counted tokens and over the layers that have it, times the pass's share of its step.

        None where no layer deposited anything; 0, never NaN, where no token counts or the step has no target. Each
        deposit is a sum over tokens, with or without a target of the model's own loss: a prompt that is masked for
        that loss is routed all the same, so what is masked must not change a router's loss. A layer has a loss, or has
        not, whoever is in the batch, so a loss weighs the same in every pass.
        """
        if not self.losses:
            return None
        device = self.losses[0][1].device
        total = torch.stack([total.to(device) / self.layers[name] for name, total, _ in self.losses])
        tokens = torch.stack([tokens.to(device) for _, _, tokens in self.losses])
        mean = (total / tokens.clamp(min=1)).sum()
        return mean * (self.share.to(device) if isinstance(self.share, Tensor) else self.share)


def _present(ids_T: Tensor, table: LanguageTable) -> list[int]:
    """Which language ids occur, padding left out: what has to run, for which the host waits once.

    Raises:
        LanguageError: an id is not in the table.
    """
    known = len(table.codes)
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


class ForwardContext:
    """The side channel of one base model, shared by all its upcycled layers and adapters.

    Every thread has a pass of its own, so threads may call one model in several languages at once. Code that
    torch.compile makes cannot ask which thread it is in, so there a second pass at the same time is refused.

    Attributes:
        language: default language code, used when a call names none and the active adapter knows it.
        statistics: running sums since they were last read, for logs: name -> (sum, count) on the model's device;
            several names have a vector of each.
        tokens: how many tokens of each group have been trained on; None where nobody has begun to count.
        auxiliary: the last training pass's auxiliary loss where it could not be added to the model's own loss.
    """

    def __init__(self) -> None:
        self.language: str | None = None
        self._passes: dict[int, ForwardState] = {}  # by thread
        self._traced: ForwardState | None = None  # of a pass that compiled code began
        self._eager: ForwardState | None = None  # what compiled code sees of the others,
        self._under_way = 0  # if there is but one
        self.statistics: dict[str | tuple[str, ...], tuple[Tensor, Tensor]] = {}
        self.tokens: Tensor | None = None
        self.auxiliary: Tensor | None = None
        self._collected: list[Tensor] | None = None
        self._share: Tensor | float | None = None
        self._suspect: Tensor | None = None
        self._handles: list[Any] = []

    def __getstate__(self) -> dict[str, Any]:
        """For a copy: without passes under way, and without the last pass's loss, whose graph cannot be copied."""
        return {**self.__dict__, "auxiliary": None, "_passes": {}, "_traced": None, "_eager": None, "_under_way": 0}

    @property
    def current(self) -> ForwardState | None:
        """The forward pass under way in this thread; None between passes."""
        if not torch.compiler.is_compiling():
            return self._passes.get(get_ident(), self._traced)
        if self._under_way > 1:
            raise PeftMoeDeltaError(
                "Two threads call one compiled model at the same time, and compiled code cannot tell whose languages "
                "are whose. Let them take turns (a threading.Lock around the call), or do not compile the model."
            )
        return self._eager if self._traced is None else self._traced

    @current.setter
    def current(self, state: ForwardState | None) -> None:
        if torch.compiler.is_compiling():
            self._traced = state
            return
        if state is None:
            self._passes.pop(get_ident(), None)
            self._traced = None
        else:
            self._passes[get_ident()] = state
        self._eager, self._under_way = next(iter(self._passes.values()), None), len(self._passes)

    @classmethod
    def of(cls, model: nn.Module) -> ForwardContext:
        """The context of a base model, attached to it on first use."""
        context = model.__dict__.get("_moe_delta_context")
        if context is None:
            context = cls()
            model.__dict__["_moe_delta_context"] = context
            model.__dict__["forward"] = LanguageForward(model)
            generation.attach(model)
            context._handles = [
                model.register_forward_pre_hook(context._enter, with_kwargs=True),
                model.register_forward_hook(context._leave, always_call=True),
            ]
        return context

    def detach(self, model: nn.Module) -> None:
        """Take the context off its base model again."""
        for handle in self._handles:
            handle.remove()
        del model.__dict__["_moe_delta_context"]
        generation.detach(model)
        forward = model.__dict__["forward"]
        if not isinstance(forward, LanguageForward):
            return  # somebody put theirs over ours, which by itself does nothing
        del model.__dict__["forward"]
        if forward.wrapped is not None:
            model.__dict__["forward"] = forward.wrapped

    def name_arguments(self, model: nn.Module) -> None:
        """Put `LanguageForward` on top again where somebody, such as TRL, replaced the base model's `forward`."""
        if not isinstance(model.__dict__.get("forward"), LanguageForward):
            model.__dict__["forward"] = LanguageForward(model)

    @contextmanager
    def collect(self, share: Tensor | float) -> Iterator[list[Tensor]]:
        """Hand over the auxiliary losses of the training passes within, instead of adding them to the model's loss.

        Args:
            share: how much of its optimizer step each of the passes is.
        """
        collected: list[Tensor] = []
        before = self._collected, self._share
        self._collected, self._share = collected, share
        try:
            yield collected
        finally:
            self._collected, self._share = before

    def state(self, num_tokens: int, training: bool) -> ForwardState:
        """The forward pass under way; for a caller of the bare backbone, one that knows the default language.

        Raises:
            PeftMoeDeltaError: in training there is none, so the auxiliary loss would be lost.
        """
        if self.current is not None:
            return self.current
        if training and torch.is_grad_enabled():
            raise PeftMoeDeltaError(
                "An upcycled layer was trained outside of its model's forward pass, where the languages of its "
                "tokens are unknown and the auxiliary loss has nowhere to go. Call the causal LM, not its backbone."
            )
        return ForwardState((1, num_tokens), default=self.language)

    def record(self, name: str | tuple[str, ...], total: Tensor, count: Tensor) -> None:
        """Add to a running statistic, or to one for each name, without a host sync."""
        total, count = total.detach().double(), count.detach().double()
        if name in self.statistics:
            old_total, old_count = self.statistics[name]
            total, count = old_total + total.to(old_total.device), old_count + count.to(old_count.device)
        self.statistics[name] = total, count

    def read_statistics(self) -> dict[str, float]:
        """Means of the running statistics since the last call; those without any token are left out."""
        read, self.statistics = self.statistics, {}
        means: dict[str, float] = {}
        for name, parts in read.items():
            names = (name,) if isinstance(name, str) else name
            totals, counts = (part.reshape(-1).tolist() for part in parts)
            means |= {name: t / n for name, t, n in zip(names, totals, counts, strict=True) if n}
        return means

    def _enter(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if getattr(model, "_is_replica", False):
            raise PeftMoeDeltaError(
                "torch.nn.DataParallel copies a model for each GPU, and the copies would run the original's modules. "
                "Train with one process a GPU (torchrun or accelerate launch), or show the process one GPU "
                "(CUDA_VISIBLE_DEVICES=0); Trainer uses DataParallel where it sees several GPUs from one process."
            )
        language = kwargs.pop("language", None)
        language_ids = kwargs.pop("language_ids", None)
        if language is not None and language_ids is not None:
            raise LanguageError(
                f"Both `language` ({language!r}) and `language_ids` were given, and one of them would be ignored. Pass "
                "one; LanguageCollator's batches hold `language_ids`."
            )
        tokens = kwargs.get("input_ids", args[0] if args else None)
        tokens = kwargs.get("inputs_embeds") if tokens is None else tokens
        if tokens is None:
            return args, kwargs  # the model will say what it misses
        shape = (tokens.shape[0], tokens.shape[1])
        check_length(model, shape[1])
        language_ids = _ids_for(shape, language_ids)
        mask = kwargs.get("attention_mask")
        if mask is None and language_ids is not None and kwargs.get("position_ids") is not None:
            # Packed documents, for all we know: transformers keeps them apart only where it makes no cache.
            kwargs.setdefault("use_cache", False)
        mask_T = mask[:, -shape[1] :].reshape(-1).bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None
        if language_ids is not None:
            known_T = (language_ids != PADDING_LANGUAGE_ID).reshape(-1)
            mask_T = known_T if mask_T is None else mask_T & known_T
        self.auxiliary = None
        self.current = ForwardState(
            shape,
            language=language,
            default=self.language,
            language_ids=language_ids,
            mask_T=mask_T,
            share=share_of_step(kwargs, kwargs.get("num_items_in_batch")) if self._share is None else self._share,
            recording=model.training and torch.is_grad_enabled(),
        )
        if self.current.recording:
            self._refuse_diverged(model)
            self._keep_through_checkpointing(model)
        return args, kwargs

    def _leave(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        state, self.current = self.current, None
        if state is not None and state.seen is not None:
            self.tokens = state.seen if self.tokens is None else self.tokens + state.seen.to(self.tokens.device)
        auxiliary = state.auxiliary_loss() if state is not None and output is not None else None
        loss = output.get("loss") if isinstance(output, dict) else None
        shown = auxiliary if loss is None else loss
        if shown is not None and state is not None and state.recording:
            self._suspect = ~shown.detach().isfinite()
        if auxiliary is None:
            return None
        if self._collected is not None:
            self._collected.append(auxiliary)
            return None
        if loss is None or "log_probs" in output:
            self.auxiliary = auxiliary
            warnings.warn(
                "This training pass returned no loss, or log-probabilities of which its caller makes the loss (TRL), "
                "so the routers' auxiliary loss could not be added. Pass `labels`, derive your trainer from "
                "AuxiliaryLossMixin, or add `model.auxiliary_loss` to your own loss.",
                stacklevel=2,
            )
            return None
        output["loss"] = loss + auxiliary.to(loss)
        return output

    def _refuse_diverged(self, model: nn.Module) -> None:
        """Stop a training whose weights have become NaN, which the loss in Trainer's log does not say.

        They are looked at where the last pass's loss was not finite, which by itself may be a step without targets.

        Raises:
            PeftMoeDeltaError: a weight that trains is not finite.
        """
        suspect, self._suspect = self._suspect, None
        if suspect is None or torch.compiler.is_compiling() or not bool(suspect):
            return
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and not bool(parameter.isfinite().all()):
                raise PeftMoeDeltaError(
                    f"Training has diverged: {name} is not finite. Go back to a checkpoint, lower the learning rate, "
                    "and give the trainer a TrainingMonitor(), which stops before such a step."
                )

    def _keep_through_checkpointing(self, model: nn.Module) -> None:
        """Let gradient checkpointing recompute a layer with the languages of the pass it belongs to.

        transformers keeps `torch.utils.checkpoint.checkpoint` on each checkpointed module, with the user's arguments;
        `context_fn` is that function's own hook for such state.
        """
        for module in model.modules():
            function = module.__dict__.get("_gradient_checkpointing_func")
            if function is None or not getattr(module, "gradient_checkpointing", False):
                continue
            arguments = getattr(function, "keywords", {})
            given = arguments.get("context_fn")
            if isinstance(given, _CheckpointContexts):
                if given.context is self:
                    continue
                given = given.given  # left over from an adapter that was unloaded
            if arguments.get("use_reentrant", True):
                raise PeftMoeDeltaError(
                    "Gradient checkpointing with use_reentrant=True loses the languages of tokens when it recomputes a "
                    'layer. Use gradient_checkpointing_kwargs={"use_reentrant": False}.'
                )
            contexts = _CheckpointContexts(self, given)
            module.__dict__["_gradient_checkpointing_func"] = partial(function, context_fn=contexts)


class LanguageForward:
    """The base model's own `forward`, with a signature that also names `language` and `language_ids`.

    Trainer keeps only the data columns that this signature names, hence `text`, and `generate` accepts only arguments
    in it. The values themselves are taken by the context's pre-hook.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.wrapped = model.__dict__.get("forward")  # what accelerate or others put over the class's own
        parameters = list(inspect.signature(type(model).forward).parameters.values())[1:]
        names = (*generation.ARGUMENTS, *COLUMNS)
        extra = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in names]
        rest = [p for p in parameters if p.kind is p.VAR_KEYWORD]
        self.__signature__ = inspect.Signature([p for p in parameters if p not in rest] + extra + rest)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.wrapped is not None:
            return self.wrapped(*args, **kwargs)
        return type(self.model).forward(self.model, *args, **kwargs)


@dataclass(frozen=True)
class _CheckpointContexts:
    """`context_fn` of `torch.utils.checkpoint`: contexts for a layer's forward pass and for its recomputation.

    Attributes:
        context: whose forward pass it is.
        given: the `context_fn` of the user.
    """

    context: ForwardContext
    given: Callable[[], tuple[Any, Any]] | None

    def __call__(self) -> tuple[Any, Any]:
        forward, recompute = (nullcontext(), nullcontext()) if self.given is None else self.given()
        state = self.context.current
        return forward, recompute if state is None else self._replayed(state, recompute)

    @contextmanager
    def _replayed(self, state: ForwardState, recompute: Any) -> Iterator[None]:
        # The same operations must run again, but what they deposit was counted the first time.
        context = self.context
        replay = ForwardState(
            state.shape, mask_T=state.mask_T, recording=state.recording, seen=state.seen, _found=state._found
        )
        before, context.current = context.current, replay
        statistics, context.statistics = context.statistics, {}
        try:
            with recompute:
                yield
        finally:
            context.current, context.statistics = before, statistics


def _ids_for(shape: tuple[int, int], language_ids: Tensor | None) -> Tensor | None:
    """Language ids as (B, S).

    During cached generation the prompt's (B, prompt) ids meet one new token a row: it continues the row's last
    language.

    Raises:
        LanguageError: the ids fit neither (B,) nor (B, S).
    """
    if language_ids is None:
        return None
    if not isinstance(language_ids, Tensor) or language_ids.is_floating_point():
        raise LanguageError(
            f"`language_ids` must be a tensor of whole numbers; got {language_ids!r}. Build batches with "
            'LanguageCollator, or name a language by its code: language="...".'
        )
    batch, sequence = shape
    if language_ids.shape == (batch,):
        return language_ids[:, None].expand(batch, sequence)
    if language_ids.dim() == 2 and language_ids.shape[0] == batch:
        if language_ids.shape[1] == sequence:
            return language_ids
        if sequence == 1:
            return language_ids[:, -1:]
    raise LanguageError(
        f"`language_ids` has shape {tuple(language_ids.shape)}; expected ({batch},) or ({batch}, {sequence}). "
        "For generation, pass one id a row."
    )
