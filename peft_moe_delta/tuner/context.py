"""What a forward pass knows beyond hidden states: languages, padding, and the auxiliary losses on their way out.

MLP blocks see hidden states only. `ForwardContext` is the side channel: it hangs on the base model (every PEFT road
keeps that), a forward pre-hook takes `language` / `language_ids` and the padding mask in, the layers read them, and a
forward hook adds the auxiliary loss to `output["loss"]`.

Shape legend: B batch, S sequence, T = B * S tokens.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn

from ..architectures import check_length
from ..errors import LanguageError, PeftMoeDeltaError
from ..languages import PADDING_LANGUAGE_ID
from ..losses import share_of_step
from . import generation
from .checkpointing import keep_through_checkpointing
from .identifier import AUTO, Identifiers
from .passes import ForwardState
from .processes import prepare_for_engine

Sums = dict[str, tuple[float, float]]
"""Name of a statistic -> what was summed, and over how many."""

LOOK_EVERY = 16
"""Training passes between two looks at whether the loss is finite, where a look would wait for an accelerator."""

COLUMNS = ("text",)
"""What `LanguageCollator` reads in a data set beyond the arguments of a model, so that Trainer must not drop it."""


class ForwardContext:
    """The side channel of one base model, shared by all its upcycled layers and adapters.

    Every thread has a pass of its own, so threads may call one model in several languages at once. Code that
    torch.compile makes cannot ask which thread it is in, so there a second pass at the same time is refused.

    Attributes:
        language: default language code, used when a call names none and the active adapter knows it.
        statistics: running sums since they were last read, for logs: name -> (sum, count) on the model's device;
            several names have a vector of each.
        tokens: groups -> how many tokens of each have been trained on; None where nobody counts.
        auxiliary: the last training pass's auxiliary loss where it could not be added to the model's own loss.
        grouped: whether a layer's experts run as one, see `MoeDeltaTuner.set_experts_implementation`.
    """

    def __init__(self) -> None:
        self.language: str | None = None
        self._passes: dict[int, ForwardState] = {}  # by thread
        self._traced: ForwardState | None = None  # of a pass that compiled code began
        self._eager: ForwardState | None = None  # what compiled code sees of the others,
        self._under_way = 0  # if there is but one
        self.statistics: dict[str | tuple[str, ...], tuple[Tensor, Tensor]] = {}
        self.tokens: dict[tuple[str, ...], Tensor] | None = None
        self.auxiliary: Tensor | None = None
        self.grouped = False
        self._collected: list[Tensor] | None = None
        self._share: Tensor | float | None = None
        self._suspect: Tensor | None = None  # whether a training loss since the last look was not finite,
        self._unseen = 0  # and in how many passes that was
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
            generation.attach(model, context)
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
        return ForwardState((1, num_tokens), default=self.language, grouped=self.grouped)

    def record(self, name: str | tuple[str, ...], total: Tensor, count: Tensor) -> None:
        """Add to a running statistic, or to one for each name, without a host sync."""
        total, count = total.detach().double(), count.detach().double()
        if name in self.statistics:
            old_total, old_count = self.statistics[name]
            total, count = old_total + total.to(old_total.device), old_count + count.to(old_count.device)
        self.statistics[name] = total, count

    def read_statistics(self, gather: Callable[[Sums], list[Sums]] = lambda sums: [sums]) -> dict[str, float]:
        """Means of the running statistics since the last call; those without any token are left out.

        Args:
            gather: this process's sums -> those of all whose means these are.
        """
        read, self.statistics = self.statistics, {}
        sums: Sums = {}
        for name, parts in read.items():
            names = (name,) if isinstance(name, str) else name
            totals, counts = (part.reshape(-1).tolist() for part in parts)
            sums |= {name: (t, n) for name, t, n in zip(names, totals, counts, strict=True)}
        joint: Sums = {}
        for each in gather(sums):
            for name, (total, count) in each.items():
                before = joint.get(name, (0.0, 0.0))
                joint[name] = before[0] + total, before[1] + count
        return {name: total / count for name, (total, count) in joint.items() if count}

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
        auto = language == AUTO or (language is None and language_ids is None and self.language == AUTO)
        if language is not None and language_ids is not None:
            raise LanguageError(
                f"Both `language` ({language!r}) and `language_ids` were given, and one of them would be ignored. Pass "
                "one; LanguageCollator's batches hold `language_ids`."
            )
        ids_BS = kwargs.get("input_ids", args[0] if args else None)
        tokens = kwargs.get("inputs_embeds") if ids_BS is None else ids_BS
        if tokens is None:
            return args, kwargs  # the model will say what it misses
        shape = (tokens.shape[0], tokens.shape[1])
        check_length(model, shape[1])
        language_ids = _ids_for(shape, language_ids)
        mask = kwargs.get("attention_mask")
        reads = language_ids is not None or Identifiers.of(model) is not None
        if mask is None and reads and kwargs.get("position_ids") is not None and kwargs.get("past_key_values") is None:
            # Packed documents, for all we know: transformers keeps them apart only where it makes no cache.
            kwargs.setdefault("use_cache", False)
        mask_T = mask[:, -shape[1] :].reshape(-1).bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None
        if language_ids is not None:
            known_T = (language_ids != PADDING_LANGUAGE_ID).reshape(-1)
            mask_T = known_T if mask_T is None else mask_T & known_T.to(mask_T.device)
        self.auxiliary = None
        self.current = ForwardState(
            shape,
            language=None if auto else language,
            default=None if auto else self.language,
            language_ids=language_ids,
            mask_T=mask_T,
            share=share_of_step(kwargs, kwargs.get("num_items_in_batch")) if self._share is None else self._share,
            recording=model.training and torch.is_grad_enabled(),
            grouped=self.grouped,
        )
        if (identifiers := Identifiers.of(model)) is not None:
            identifiers.read(self.current, ids_BS, kwargs, auto=auto)
        if self.current.recording:
            self._refuse_diverged(model)
            prepare_for_engine(model)
            keep_through_checkpointing(self, model)
        return args, kwargs

    def _leave(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        state, self.current = self.current, None
        if output is not None and state is not None and state.remember is not None:
            state.remember(output)
        if state is not None and state.seen is not None:
            self._count(*state.seen)
        auxiliary = state.auxiliary_loss(self.record) if state is not None and output is not None else None
        loss = output.get("loss") if isinstance(output, dict) else None
        shown = auxiliary if loss is None else loss
        if shown is not None and state is not None and state.recording and not torch.compiler.is_compiling():
            suspect = ~shown.detach().isfinite()
            self._suspect = suspect if self._suspect is None else suspect | self._suspect.to(suspect.device)
            self._unseen += 1
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

    def _count(self, groups: tuple[str, ...], seen: Tensor) -> None:
        """What a training pass has read of each group."""
        self.record(tuple(f"tokens_per_pass/{group}" for group in groups), seen, torch.ones_like(seen))
        if self.tokens is not None:
            self.tokens[groups] = seen + self.tokens[groups].to(seen.device) if groups in self.tokens else seen

    def _refuse_diverged(self, model: nn.Module) -> None:
        """Stop a training whose weights have become NaN, which the loss in Trainer's log does not say.

        They are looked at where a loss since the last look was not finite, which by itself may be a step without
        targets. To look at a loss is to wait for its device, with nothing queued behind it: free on a CPU, and dear
        once a step on an accelerator. There it happens once in 16 passes, as weights that are NaN stay NaN, and the
        monitor stops sooner. (A copy that is not waited for would need pinned memory and events of each kind of
        device, to be told a few passes earlier.)

        Raises:
            PeftMoeDeltaError: a weight that trains is not finite.
        """
        if self._suspect is None or torch.compiler.is_compiling():
            return
        if self._suspect.device.type != "cpu" and self._unseen < LOOK_EVERY:
            return
        suspect, self._suspect, self._unseen = self._suspect, None, 0
        if not bool(suspect):
            return
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and not bool(parameter.isfinite().all()):
                raise PeftMoeDeltaError(
                    f"Training has diverged: {name} is not finite. Go back to a checkpoint, lower the learning rate, "
                    "and give the trainer a TrainingMonitor(), which stops before such a step."
                )


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
