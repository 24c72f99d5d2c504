"""Where tokens go: what every routed layer of a model chooses in its forward passes, written down.

In: an adapter, or an export of one, stock or remote code. Out: layer -> the `Routes` of each pass. A model without
routers gives none.

Shape legend: T tokens, E experts, K chosen experts a token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..architectures import layer_index
from ..routing import Routes, choose_experts
from .layer import MoeDeltaLayer

Recorded = dict[int, list[Routes]]
"""Layer -> one entry a pass, in order."""


@contextmanager
def recording(model: nn.Module, *, forced: bool = True) -> Iterator[Recorded]:
    """Note what every routed layer chooses.

    Args:
        forced: whether to note passes of an adapter's layer in which no token has a choice, too.
    """
    recorded: Recorded = {}
    handles = []
    for index, module in routed_layers(model).items():

        def note(routes: Routes, index: int = index) -> None:
            recorded.setdefault(index, []).append(routes)

        handles.append(_listen(module, note, forced))
    try:
        yield recorded
    finally:
        for handle in handles:
            handle.remove()


def routed_layers(model: nn.Module) -> dict[int, nn.Module]:
    """Decoder layer index -> what routes there: an adapter's layer, remote code's mixture, a stock model's router."""
    return {layer_index(name): module for name, module in model.named_modules() if _routes(module)}


def _routes(module: nn.Module) -> bool:
    if isinstance(module, MoeDeltaLayer):
        return not module.is_attention
    return _is_remote_code(module) or type(module).__name__.endswith("TopKRouter")


def _is_remote_code(module: nn.Module) -> bool:
    return hasattr(module, "groups_T") and hasattr(module, "routes")


def _listen(module: nn.Module, note: Callable[[Routes], None], forced: bool) -> RemovableHandle:
    if isinstance(module, MoeDeltaLayer):

        def before(layer: MoeDeltaLayer, inputs: tuple[Tensor, ...]) -> None:
            name, x_TD = layer.in_force, inputs[0].reshape(-1, inputs[0].shape[-1])
            if name is not None and (forced or layer.has_choice(name, x_TD)):
                note(layer.routes(name, x_TD))

        return module.register_forward_pre_hook(before)
    if _is_remote_code(module):
        mixture: Any = module
        return module.register_forward_pre_hook(
            lambda _, inputs: note(mixture.routes(inputs[0].reshape(-1, inputs[0].shape[-1])))
        )

    def chosen(router: nn.Module, inputs: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
        logits_TE, _, indices_TK = output
        note(replace(choose_experts(logits_TE.float(), indices_TK.shape[-1]), indices_TK=indices_TK))

    return module.register_forward_hook(chosen)
