"""Activation checkpointing: a layer is computed again with the languages of the pass that it belongs to.

In: a model that somebody has switched checkpointing on for. Out: the same, where a recomputation finds its pass. What
checkpoints is `torch.utils.checkpoint.checkpoint`: transformers keeps it on each module that calls others through it,
and PyTorch's `checkpoint_wrapper` does, with which accelerate wraps the layers that FSDP shards. `context_fn` is that
function's own hook for what a recomputation needs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from torch import nn

from ..errors import PeftMoeDeltaError
from .passes import ForwardState


class SideChannel(Protocol):
    """What a recomputation needs of `ForwardContext`: the pass under way, and the statistics it must not add to."""

    current: ForwardState | None
    statistics: Any


def keep_through_checkpointing(context: SideChannel, model: nn.Module) -> None:
    """Let every module that checkpoints recompute in its own pass.

    Raises:
        PeftMoeDeltaError: reentrant checkpointing, which has no such hook.
    """
    for module in model.modules():
        if (name := _checkpointing_of(module)) is None:
            continue
        function = module.__dict__[name]
        arguments = getattr(function, "keywords", {})
        given = arguments.get("context_fn")
        if isinstance(given, _CheckpointContexts):
            if given.context is context:
                continue
            given = given.given  # left over from an adapter that was unloaded
        if arguments.get("use_reentrant", True):
            raise PeftMoeDeltaError(
                "Gradient checkpointing with use_reentrant=True loses the languages of tokens when it recomputes a "
                'layer. Use gradient_checkpointing_kwargs={"use_reentrant": False}.'
            )
        module.__dict__[name] = partial(function, context_fn=_CheckpointContexts(context, given))


def _checkpointing_of(module: nn.Module) -> str | None:
    """The attribute with the function by which a module checkpoints what it calls; None where it does not."""
    if isinstance(module.__dict__.get("checkpoint_fn"), partial):
        return "checkpoint_fn"
    switched_on = getattr(module, "gradient_checkpointing", False)
    return "_gradient_checkpointing_func" if switched_on and "_gradient_checkpointing_func" in module.__dict__ else None


@dataclass(frozen=True)
class _CheckpointContexts:
    """`context_fn` of `torch.utils.checkpoint`: contexts for a layer's forward pass and for its recomputation.

    Attributes:
        context: whose forward pass it is.
        given: the `context_fn` of the user.
    """

    context: SideChannel
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
            state.shape, mask_T=state.mask_T, recording=state.recording, grouped=state.grouped, seen=state.seen,
            _found=state._found,
        )  # fmt: skip
        before, context.current = context.current, replay
        statistics, context.statistics = context.statistics, {}
        try:
            with recompute:
                yield
        finally:
            context.current, context.statistics = before, statistics
