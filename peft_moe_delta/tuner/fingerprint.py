"""Which base model an adapter belongs to.

In: the base model's tensors by name, in memory or as files. Out: a record of all their shapes and of a few numbers of
each, which lies in the adapter's config; and the check of another model against it. Numbers are rounded to bf16, so
that a checkpoint loaded in another dtype has the same record, and few enough to read that an 8B model takes no time.

A record maps `"layers.*.mlp.up_proj.weight 1536x576"` to `"0:3c4abd01... 1:be00..."`: the shape behind the name, and
for each layer its numbers as hexadecimal bf16. Names go without what only some files have in front (`model.`). A tensor
that cannot be read, offloaded, spread by ZeRO-3 or quantised, has no numbers, and is not compared: a quantised copy is
known by its names, its shapes and what it keeps as it was, such as norms and embeddings.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import takewhile
from typing import Any, NamedTuple

import numpy as np
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from ..checkpoint import CheckpointReader, first_few
from ..errors import CheckpointError
from ..matrices import is_quantised
from ..tensors import Tensors, is_embedding
from .processes import whole

VERSION = 2
_SAMPLES = 8
"""Numbers of a tensor; an embedding has one for each power of two among its rows."""
_COMPUTED = (".rotary_emb.inv_freq", ".attn.masked_bias", ".attn.bias")
"""Endings of buffers that old files hold and models compute themselves."""
_FP16_MISMATCHES = 1 / 8
"""Share of numbers that may differ by their last bit where fp16 is involved. A number rounded to fp16 and then to bf16
comes out otherwise than rounded at once only if fp16 put it half-way between two bf16 numbers: one in 16."""
_FP16_QUANTUM = 2.0**-24
_BF16_STEP = 2.0**-7
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")

Blocks = Sequence[Mapping[str, str]]
"""Of each MLP that an adapter transforms, in layer order: name inside the MLP -> the tensor's name."""


def base_weights(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a model under the names they have without PEFT's adapters, which are left out."""
    return dict(_walk(model, ""))


def _walk(module: nn.Module, prefix: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
        inner = module.base_layer if isinstance(module, BaseTunerLayer) else module.original_module
        yield from _walk(inner, prefix)
        return
    for name, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is not None and name not in module._non_persistent_buffers_set:
            yield prefix + name, tensor
    for name, child in module._modules.items():
        if child is not None and not name.startswith("moe_delta_"):
            yield from _walk(child, f"{prefix}{name}.")


def fingerprint(weights: Mapping[str, Tensor], blocks: int) -> dict[str, Any]:
    """The record of a model.

    Args:
        weights: its tensors by name: `base_weights`, a `CheckpointReader`, or a view of either.
        blocks: how many MLPs the adapter transforms.
    """
    tensors = _sampled(weights)
    for name in [n for n in tensors if is_embedding(n) and n.startswith(("lm_head.", "embed_out."))]:
        if any(tensors[name] == other for key, other in tensors.items() if key != name):
            del tensors[name]  # tied, or a copy: some files list it, some do not
    entries: dict[str, list[str]] = {}
    for name, (shape, numbers) in tensors.items():
        layer = _NUMBER.search(name)
        kind = f"{_NUMBER.sub('*', name, count=1)} {'x'.join(map(str, shape))}"
        entries.setdefault(kind, []).append(f"{layer[0] if layer else ''}:{numbers}")
    return {
        "version": VERSION,
        "blocks": blocks,
        "dtypes": sorted({str(_dtype(weights, name)).removeprefix("torch.") for name in weights}),
        "tensors": {kind: " ".join(found) for kind, found in entries.items()},
    }


def check_fingerprint(
    saved: Mapping[str, Any], weights: Mapping[str, Tensor], blocks: Blocks, *, verify_weights: bool
) -> None:
    """Refuse a base model that an adapter was not made for. Records of the first version are held to their own rule.

    What only one side has outside of its layers, such as a head or a classifier, is not compared, nor are embedding
    rows beyond the shorter side's.

    Args:
        saved: the adapter's record.
        weights: of the model at hand, as in `fingerprint`.
        blocks: its MLPs that the adapter transforms.
        verify_weights: whether other numbers are refused, too, or only other shapes.

    Raises:
        CheckpointError: other shapes; or other weights; or no record.
    """
    try:
        if "version" not in saved:
            differing = _first_version(saved, weights, blocks)
        elif saved["version"] == VERSION:
            differing = _differing(saved, fingerprint(weights, len(blocks)))
        else:
            raise CheckpointError(
                f"The adapter's record of its base model has version {saved['version']!r}, this package reads up to "
                f"{VERSION}. Update peft-moe-delta."
            )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"The adapter's record of its base model is damaged: {error!r}. Fetch it again."
        ) from error
    if differing and verify_weights:
        raise CheckpointError(
            f"This adapter was trained on other base weights: {differing}. Experts are changes of one particular "
            "model. Load that base model, or pass verify_base=False if you know better (to move an adapter onto a "
            "post-trained model, use model.graft)."
        )


class _Sample(NamedTuple):
    """A tensor's shape and numbers, hexadecimal; no numbers where it cannot be read, no shape where it is packed."""

    shape: tuple[int, ...]
    numbers: str


def _differing(saved: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """What differs between two records; nothing for the same weights.

    Raises:
        CheckpointError: other blocks or shapes.
    """
    _same("blocks", saved["blocks"], found["blocks"])
    ours, theirs = _expanded(saved["tensors"]), _expanded(found["tensors"])
    missing = [name for name in ours if name not in theirs and _NUMBER.search(name)]
    if missing:
        raise _another("tensors", "with " + first_few(missing), "without")
    both = [name for name in ours if name in theirs]
    for name in both:
        one, other = (side[name].shape[is_embedding(name) :] for side in (ours, theirs))
        if not ours[name].numbers or not theirs[name].numbers:
            one, other = (
                tuple(sorted(one)),
                tuple(sorted(other)),
            )  # a quantised copy of GPT-2 keeps its matrices the other way round
        if one and other:
            _same("shapes", list(one), list(other), name)
    in_fp16 = "float16" in (*saved["dtypes"], *found["dtypes"])
    compared = {name: _compared(ours[name].numbers, theirs[name].numbers, in_fp16) for name in both}
    total, rounded = (sum(counts[i] for counts in compared.values()) for i in (0, 1))
    changed = [name for name, counts in compared.items() if counts[2]]
    if not changed and rounded > _FP16_MISMATCHES * total:
        changed = [name for name, counts in compared.items() if counts[1]]
    return f"of {len(both)} tensors {len(changed)} differ, such as {first_few(changed)}" if changed else ""


def _compared(saved: str, found: str, in_fp16: bool) -> tuple[int, int, int]:
    """How many numbers there are, how many differ by what fp16 may have done to them, and how many by more."""
    length = min(len(saved), len(found))
    bits = np.array([np.frombuffer(bytes.fromhex(side[:length]), dtype=">u2") for side in (saved, found)])
    unequal = bits[0] != bits[1]
    if not in_fp16:
        return len(unequal), 0, int(unequal.sum())
    one, other = (bits.astype(np.uint32) << 16).view(np.float32)
    distance = np.abs(one - other)
    unequal &= ~(distance <= _FP16_QUANTUM)
    near = distance <= _BF16_STEP * np.maximum(np.abs(one), np.abs(other))
    return len(unequal), int((unequal & near).sum()), int((unequal & ~near).sum())


def _expanded(entries: Mapping[str, str]) -> dict[str, _Sample]:
    """Name -> sample, from a record's entries."""
    tensors = {}
    for entry, samples in entries.items():
        kind, _, shape = entry.rpartition(" ")
        for sample in samples.split(" "):
            layer, _, numbers = sample.partition(":")
            tensors[kind.replace("*", layer, 1)] = _Sample(tuple(map(int, shape.split("x"))) if shape else (), numbers)
    return tensors


def _sampled(weights: Mapping[str, Tensor]) -> dict[str, _Sample]:
    """Name without prefix -> sample, of every weight."""
    prefix = _prefix(weights)
    shapes = {n: shape for n in weights if not n.endswith(_COMPUTED) and (shape := _shape(weights, n)) is not None}
    places = {name: _places(name, shape) for name, shape in shapes.items() if _is_readable(weights, name)}
    numbers = dict(zip(places, _hexadecimal([_read(weights, n, at) for n, at in places.items()]), strict=True))
    return {name.removeprefix(prefix): _Sample(shape, numbers.get(name, "")) for name, shape in shapes.items()}


def _prefix(names: Iterable[str]) -> str:
    """What stands before the names of all that lies in numbered layers: `model.`, `transformer.` or nothing."""
    stems = [name[: match.start()].split(".")[:-2] for name in names if (match := _NUMBER.search(name))]
    common = takewhile(lambda parts: len(set(parts)) == 1, zip(*stems, strict=False))
    return "".join(f"{parts[0]}." for parts in common)


def _places(name: str, shape: tuple[int, ...]) -> list[tuple[int, int]]:
    """Row and column of a tensor's samples, as a matrix; spread over both. Rows that come later move no embedding's."""
    rows, columns = math.prod(shape[:-1]), (shape or (1,))[-1]
    if len(shape) < 2:
        return [(0, i * columns // _SAMPLES) for i in range(_SAMPLES)]
    chosen = [i * rows // _SAMPLES for i in range(_SAMPLES)]
    if is_embedding(name):
        chosen = [2**i - 1 for i in range(rows.bit_length())]
    return [(row, i * 5 % _SAMPLES * columns // _SAMPLES) for i, row in enumerate(chosen)]


def _source(weights: Mapping[str, Tensor], name: str) -> tuple[Mapping[str, Tensor], str]:
    return weights.origin(name) if isinstance(weights, Tensors) else (weights, name)


def _shape(weights: Mapping[str, Tensor], name: str) -> tuple[int, ...] | None:
    """A weight's shape where it is not packed or sharded; None of what is no weight, such as a mask."""
    weights, name = _source(weights, name)
    if isinstance(weights, CheckpointReader):
        return weights.shapes[name] if weights.dtypes[name].is_floating_point else None
    tensor: Any = weights[name]
    if not tensor.is_floating_point() and not isinstance(tensor, nn.Parameter):
        return None
    whole = getattr(tensor, "ds_shape", None) or getattr(getattr(tensor, "quant_state", None), "shape", None)
    return tuple(whole or tensor.shape)


def _is_readable(weights: Mapping[str, Tensor], name: str) -> bool:
    """Whether a weight's numbers are at hand."""
    weights, name = _source(weights, name)
    if isinstance(weights, CheckpointReader):
        return math.prod(weights.shapes[name]) > 0
    tensor = weights[name]
    empty = tensor.is_meta or isinstance(tensor, FakeTensor) or hasattr(tensor, "ds_shape")
    return not is_quantised(tensor) and not empty and tensor.numel() > 0


def _dtype(weights: Mapping[str, Tensor], name: str) -> torch.dtype:
    weights, name = _source(weights, name)
    return weights.dtypes[name] if isinstance(weights, CheckpointReader) else weights[name].dtype


def _read(weights: Mapping[str, Tensor], name: str, places: Sequence[tuple[int, int]]) -> Tensor:
    """Some numbers of a tensor, by row and column; nothing else of it is read."""
    weights, name = _source(weights, name)
    if isinstance(weights, CheckpointReader):
        columns = (weights.shapes[name] or (1,))[-1]
        return weights.elements(name, [row * columns + column for row, column in places])
    tensor = whole(weights[name].detach())  # every process upcycles, and a forward pass gathers as much
    if tensor.dim() < 2:
        return tensor.reshape(-1)[[column for _, column in places]]
    rows, columns = torch.tensor(places).T
    index: tuple[Tensor, ...] = (*torch.unravel_index(rows, tensor.shape[:-1]), columns)
    return tensor[index]


def _hexadecimal(samples: Sequence[Tensor]) -> list[str]:
    """Each as bf16 in hexadecimal digits, taken from each device at once."""
    on_device: dict[torch.device, Tensor] = {}
    rounded = [sample.to(torch.bfloat16) for sample in samples]
    for device in {sample.device for sample in rounded}:
        on_device[device] = torch.cat([sample for sample in rounded if sample.device == device]).cpu()
    texts, starts = [], dict.fromkeys(on_device, 0)
    for sample in rounded:
        start = starts[sample.device]
        starts[sample.device] = start + len(sample)
        part = on_device[sample.device][start : start + len(sample)]
        texts.append(part.view(torch.int16).numpy().astype(">i2").tobytes().hex())
    return texts


def _same(what: str, saved: Any, found: Any, name: str = "") -> None:
    if saved != found:
        raise _another(what, saved, found, name)


def _another(what: str, saved: Any, found: Any, name: str = "") -> CheckpointError:
    return CheckpointError(
        f"This adapter was made for another base model: its {what} are {saved}{f' ({name})' if name else ''}, the "
        f"model's are {found}. Load the base model named in the adapter's config."
    )


# -- records of the first version: the first matrix of the first, middle and last MLP ---------------------------------

_FIRST_SAMPLES, _FIRST_MISMATCHES = 32, 0.2


def _first_version(saved: Mapping[str, Any], weights: Mapping[str, Tensor], blocks: Blocks) -> str:
    """As `_differing`, of a record that names no matrix: PEFT sorts its JSON, so the first one is found by trying.

    Raises:
        CheckpointError: other blocks or shapes.
    """
    shapes = [{inner: list(_shape(weights, name) or ()) for inner, name in block.items()} for block in blocks]
    _same("MLP blocks", saved["blocks"], len(blocks))
    _same("MLP shapes", saved["shapes"], shapes[0] if all(shape == shapes[0] for shape in shapes) else shapes)
    chosen = [blocks[index] for index in sorted({0, len(blocks) // 2, len(blocks) - 1})]
    fewest = 1.0
    readable = [n for n in shapes[0] if all(_is_readable(weights, block[n]) for block in chosen)]
    matrices = [inner for inner in readable if len(shapes[0][inner]) >= 2]
    for inner in matrices:
        found: list[float] = []
        for name in (block[inner] for block in chosen):
            shape = _shape(weights, name) or ()
            step = max(1, math.prod(shape) // _FIRST_SAMPLES)
            places = [divmod(at, shape[-1]) for at in range(0, math.prod(shape), step)[:_FIRST_SAMPLES]]
            found += _read(weights, name, places).to(torch.bfloat16).float().tolist()
        differing = sum(a != b for a, b in zip(saved["samples"], found, strict=True)) / len(found)
        fewest = min(fewest, differing)
    dtypes = {str(_dtype(weights, name)).removeprefix("torch.") for name in chosen[0].values()}
    tolerated = _FIRST_MISMATCHES if "float16" in {saved["dtype"], *dtypes} else 0.0
    return f"{fewest:.0%} of the sampled MLP weights differ" if matrices and fewest > tolerated else ""
