"""A training pass without weights: floating-point tensors have shapes alone, whole numbers and booleans have values.

In: any code that runs a model. Out: the same operations on tensors that hold no memory; and what they would have taken,
in bytes and in operations.

Who goes where depends on whole numbers and booleans (languages, masks, choices), so these are computed as ever and each
expert gets its rows. A router's choice hangs on its logits: `Weightless.draw` gives them random values, which send
tokens to all experts alike, and what follows from them has values as well.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakTensorKeyDictionary

_aten = torch.ops.aten
_DEVICE = torch.ops.prim.device.default
"""Every second question to a tensor without content, and the only one that makes nothing."""
_FLOPS: Mapping[Any, Any] = {
    **flop_registry,
    # As on a GPU, attention's scores are never kept; torch counts the operations of its GPU kernels only.
    _aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[_aten._scaled_dot_product_flash_attention],
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        _aten._scaled_dot_product_flash_attention_backward
    ],
}


class Weightless(TorchDispatchMode):
    """Within, whatever makes a floating-point tensor makes one without content."""

    def __init__(self) -> None:
        super().__init__()
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._known = WeakTensorKeyDictionary()

    def draw(self, tensor: Tensor) -> None:
        """Give a tensor without content random values, for choices to be made by: of one shape always the same, as a
        layer that is computed again must choose again what it chose."""
        with _disable_current_modes():
            self._known[tensor] = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is _DEVICE and isinstance(args[0], FakeTensor):
            return args[0].fake_device
        kwargs = kwargs or {}
        given = _tensors((args, kwargs))
        empty = [tensor for tensor in given if isinstance(tensor, FakeTensor)]
        if given and not empty:
            return func(*args, **kwargs)
        with self._fake:
            made = func(*args, **kwargs)
        if not given:
            return func(*args, **kwargs) if _whole(made) else made
        if any(tensor not in self._known for tensor in empty):
            return tree_map(_unknown, made)
        return tree_map(self._remember, made, func(*tree_map(self._value, args), **tree_map(self._value, kwargs)))

    def _value(self, leaf: Any) -> Any:
        return self._known[leaf] if isinstance(leaf, FakeTensor) else leaf

    def _remember(self, made: Any, value: Any) -> Any:
        if not isinstance(made, FakeTensor) or _whole(value):
            return value
        self._known[made] = value
        return made


class Meter(TorchDispatchMode):
    """What the operations within take, whether their tensors have content or not.

    Attributes:
        alive: bytes of the tensors made within that are still there.
        peak: the most of these at any time.
        flops: operations of matrix products and attention, a multiplication and an addition being two.
    """

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = self.flops = 0
        self._storages: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is _DEVICE:
            return func(*args)
        kwargs = kwargs or {}
        before = {id(tensor.untyped_storage()) for tensor in _tensors((args, kwargs))}
        made = func(*args, **kwargs)
        if (count := _FLOPS.get(getattr(func, "_overloadpacket", None))) is not None:
            self.flops += count(*args, **kwargs, out_val=made)
        for storage in (tensor.untyped_storage() for tensor in _tensors(made)):
            if id(storage) not in before and id(storage) not in self._storages:
                self._add(storage)
        return made

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()

        def remove(_: object) -> None:
            del self._storages[key]
            self.alive -= size

        self._storages[key] = weakref.ref(storage, remove)
        self.alive += size
        self.peak = max(self.peak, self.alive)


def _tensors(tree: Any) -> Iterable[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _whole(value: Any) -> bool:
    """Whether it is a tensor of whole numbers or booleans."""
    return isinstance(value, Tensor) and not value.is_floating_point() and not value.is_complex()


def _unknown(made: Any) -> Any:
    """In the place of whole numbers and booleans that follow from nothing known: zeros."""
    return torch.zeros(made.shape, dtype=made.dtype) if isinstance(made, FakeTensor) and _whole(made) else made
