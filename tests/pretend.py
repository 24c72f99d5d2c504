"""A second device for machines without one: tensors that say they are on it, with values on the CPU beside them.

PyTorch's fake tensors refuse to mix devices as real ones do, and know no values; here each has them, so that code that
looks at values runs to its end. Gradients need a real device: parameters are frozen, and passes go forward only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from peft_moe_delta.tuner.dispatch import _kept_constant

DEVICE = torch.device("lazy", 0)
CPU = torch.device("cpu")


class Pretend(TorchDispatchMode):
    """Within, tensors may be on `DEVICE`."""

    def __init__(self) -> None:
        super().__init__()
        self.values = WeakTensorKeyDictionary()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        there = any(isinstance(leaf, FakeTensor) for leaf in tree_leaves((args, kwargs)))
        if not there and kwargs.get("device") in (None, CPU):
            with _disable_current_modes():
                return func(*args, **kwargs)
        made = None if func is torch.ops.aten._local_scalar_dense.default else func(*args, **kwargs)
        if func is torch.ops.prim.device.default:
            return made
        with _disable_current_modes():
            values = func(*tree_map(self._value, args), **tree_map(self._value, kwargs))
        return values if made is None else tree_map(self._settled, made, values)

    def put(self, tensor: Tensor) -> Tensor:
        """A tensor of the CPU, on the device."""
        return tensor.detach().to(DEVICE)

    def read(self, tensor: Tensor) -> Tensor:
        """A tensor's values, on the CPU."""
        return self.values[tensor] if isinstance(tensor, FakeTensor) else tensor

    def _value(self, leaf: Any) -> Any:
        return CPU if isinstance(leaf, torch.device) else self.values[leaf] if isinstance(leaf, FakeTensor) else leaf

    def _settled(self, made: Any, value: Any) -> Any:
        if not isinstance(made, FakeTensor) or made.fake_device == CPU:
            return value
        if made not in self.values:  # in place, it has them already
            self.values[made] = value
        return made


class _Tensors(TorchFunctionMode):
    """`torch.tensor(..., device=)` passes modes of the dispatcher by: it is made here and goes there."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        device = kwargs.pop("device", None) if func is torch.tensor else None
        made = func(*args, **kwargs)
        return made if device is None else made.to(device)


@contextmanager
def pretending(*modules: nn.Module) -> Iterator[Pretend]:
    """A device, and modules moved to it, frozen."""
    _kept_constant.cache_clear()  # what is there is of this device alone
    with _autocast_known(), FakeTensorMode(allow_non_fake_inputs=True), Pretend() as pretend, _Tensors():
        for module in (part for whole in modules for part in whole.modules()):
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = nn.Parameter(pretend.put(parameter), requires_grad=False)
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = pretend.put(buffer)
        yield pretend
    _kept_constant.cache_clear()


@contextmanager
def _autocast_known() -> Iterator[None]:
    """Autocast refuses a device that it does not know, even to be asked or switched off there."""
    begin, ask = torch.autocast, torch.is_autocast_enabled

    def known(kind: str) -> str:
        return "cpu" if kind == DEVICE.type else kind

    with (
        patch.object(torch, "autocast", lambda kind, *rest, **options: begin(known(kind), *rest, **options)),
        patch.object(torch, "is_autocast_enabled", lambda *kind: ask(*map(known, kind))),
    ):
        yield
