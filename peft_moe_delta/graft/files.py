"""`graft_checkpoint`: files to files, in bounded memory, complete or not at all.

In: base, post-trained model and adapter, as folders or Hub ids. Out: a folder with a stock checkpoint, remote code, or
the adapter over the post-trained model; config, tokenizer, and a manifest of what it came from. Memory holds a few
tensors.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from ..checkpoint import (
    MANIFEST_FILE,
    check_space,
    file_sha256,
    plan_shards,
    read_manifest,
    resumable_folder,
    write_index,
    write_manifest,
    write_shards,
)
from ..errors import CheckpointError, GraftError
from ..kinds import bytes_of
from .check import check_output
from .doubts import doubts
from .memory import warn_of
from .report import GraftReport
from .scale import Scale
from .side_files import grown_tokenizer, write_side_files
from .targets import AdapterTarget, RemoteCodeTarget, StockTarget, Target
from .trio import Switch, Trio
from .weights import GraftedWeights

_VERSIONS = ("peft-moe-delta", "peft", "safetensors", "torch", "transformers")
_SPARE = 1 << 24
"""Bytes of disk asked for beyond the planned files."""


def graft_checkpoint(
    base: str | Path,
    post_trained: str | Path,
    adapter: str | Path,
    output: str | Path,
    *,
    scale: float | Mapping[str, float] = 1.0,
    expert_scale: float | Mapping[str, float] = 1.0,
    target: str = "stock",
    language: str | None = None,
    replicate_dense_layers: bool = False,
    architecture: str | None = None,
    serve_with: str | None = None,
    shard_size: int | str = "5GB",
    check: bool = False,
    overwrite: bool = False,
) -> GraftReport:
    """Graft an adapter onto the post-trained model, from files to files, without building a model.

    What is known is copied, byte for byte; sums are formed in fp32 or fp64 and rounded once. Memory holds a few
    tensors, whatever the model's size. A run that was killed goes on from its finished files when it is started again.

    Args:
        base: the model that the adapter was trained on: folder or Hub id, as the two below.
        post_trained: its post-trained descendant. Tokenizer (with the adapter's new tokens), chat template and
            generation config come from here.
        adapter: the trained adapter.
        output: the folder to make.
        scale: share of the post-training delta: a number, or `{pattern: number}` over tensor names.
        expert_scale: share of the experts' own change: a number, or `{group: number}`.
        target: `"stock"` for a stand-alone checkpoint in a stock architecture; `"remote_code"` for one with a small
            modelling file of its own, which holds every plan, as `merge_and_graft(..., remote_code=True)` writes it;
            `"adapter"` for an adapter over the post-trained model (scale 1).
        language: for routing by language, what that language runs on.
        replicate_dense_layers: where no architecture keeps dense layers, write copies of their one expert.
        architecture, serve_with: as in `merge_and_graft`.
        shard_size: most bytes of a weights file; a number, or such as `"5GB"`.
        check: build both models in fp32 and compare their logits before the folder appears; needs their memory.
        overwrite: whether to replace an output folder that holds files.

    Returns:
        What was grafted; with `check`, the largest difference of logits, and for a 16-bit checkpoint the share of
        routes on which it and the adapter agree.

    Raises:
        CheckpointError: an input is missing, damaged or not to be trusted; the output exists, is being written by
            another run, or does not fit the disk.
        GraftError: the three do not belong together, or no stock architecture holds the result exactly.
    """
    trio = Trio.open(base, post_trained, adapter, Scale(scale), expert_scale)
    graft = trio.weights()
    graft.check_base(trio.base)
    found = doubts(graft)
    tokenizer = grown_tokenizer(trio.folders["post_trained"], graft.adapter_config.record)
    if target == "adapter":
        graft.check_finite()
    trio.switch.dry = True
    wishes = {"language": language, "serve_with": serve_with}
    of_form = {"replicate_dense_layers": replicate_dense_layers, "architecture": architecture}
    destination = _destination(target, graft, str(post_trained), wishes, of_form)
    shards = plan_shards(destination.tensors(), _bytes_of(shard_size), destination.single_file)
    report = replace(
        graft.report(str(post_trained), found),
        layout=destination.name,
        language=language,
        choice=destination.choice,
        replicated_bytes=destination.replicated_bytes,
    )
    request: dict[str, Any] = {
        "base": str(base), "post_trained": str(post_trained), "adapter": str(adapter), "target": target,
        "scale": report.scale, "expert_scale": report.expert_scale, "language": language,
        **of_form, "serve_with": serve_with, "shard_size": _bytes_of(shard_size), "check": check,
    }  # fmt: skip
    record: dict[str, Any] = {
        "command": "graft_checkpoint", "request": request, "layout": destination.name,
        "versions": {package: version(package) for package in _VERSIONS},
    }  # fmt: skip
    warn_of(found, stacklevel=3)
    output = Path(output).expanduser().resolve()
    if not overwrite and _is_done(output, record, trio):
        measured = read_manifest(output)["report"]
        return replace(report, **{name: measured[name] for name in ("max_logit_difference", "route_agreement")})
    before = trio.state()
    key = json.dumps([record, before, [hashlib.sha256(shard.header).hexdigest() for shard in shards]], sort_keys=True)
    with resumable_folder(output, key, overwrite=overwrite) as job, ThreadPoolExecutor(1) as hasher:
        hashes = {file: hasher.submit(file_sha256, file) for file in trio.in_reading_order()}
        try:
            kept = sum((job.folder / name).stat().st_size for name in job.finished)
            total = sum(shard.size for shard in shards)
            check_space(output.parent, total - kept + _SPARE)
            with tqdm(total=total, unit="B", unit_scale=True, desc="graft", disable=None) as bar:
                write_shards(job, shards, _resuming(trio.switch, destination.tensors), bar.update)
            write_index(job.folder, shards)
            write_side_files(job.folder, trio.folders["post_trained"], tokenizer)
            destination.write_config(job.folder, report)
            if check:
                trio.switch.dry = False
                report = check_output(report, job.folder, trio, destination)
            record["inputs"] = trio.record({file: future.result() for file, future in hashes.items()})
        finally:
            hasher.shutdown(wait=True, cancel_futures=True)
        if trio.state() != before:
            raise CheckpointError("An input file changed while it was read. Start again when nobody writes to it.")
        write_manifest(job.folder, record | {"report": asdict(report)}, job.finished)
    return report


def _destination(
    target: str, graft: GraftedWeights, post_trained: str, wishes: Mapping[str, Any], of_form: Mapping[str, Any]
) -> Target:
    if target == "adapter":
        return AdapterTarget(graft, post_trained=post_trained, **wishes)
    if target == "stock":
        return StockTarget(graft, **wishes, **of_form)
    if target == "remote_code":
        return RemoteCodeTarget(graft, **wishes, **of_form)
    raise GraftError(f"Unknown target {target!r}; expected one of: stock, remote_code, adapter.")


def _resuming(
    switch: Switch, tensors: Callable[[], Iterator[tuple[str, Tensor]]]
) -> Callable[[int], Iterator[tuple[str, Tensor]]]:
    """The stream without its first tensors, which are walked over dry.

    Computing starts at the beginning of a decoder layer, so that what a layout asks for ahead within one is there.
    """

    def stream(skip: int) -> Iterator[tuple[str, Tensor]]:
        switch.dry = True
        layers = [match and match[1] for match in (re.search(r"\.(\d+)\.", name) for name, _ in tensors())]
        first = layers.index(layers[skip]) if skip < len(layers) else len(layers)
        walk = tensors()
        switch.dry = first > 0
        for index, (name, tensor) in enumerate(walk):
            if index >= skip:
                yield name, tensor
            switch.dry = index + 1 < first

    return stream


def _is_done(output: Path, record: Mapping[str, Any], trio: Trio) -> bool:
    """Whether an earlier run has finished just this: it may have been killed after its last step."""
    if not (output / MANIFEST_FILE).is_file():
        return False
    manifest = read_manifest(output)
    if any(manifest.get(field) != value for field, value in json.loads(json.dumps(record)).items()):
        return False
    return manifest["inputs"] == trio.record({file: file_sha256(file) for file in trio.in_reading_order()})


def _bytes_of(size: int | str) -> int:
    """`"5GB"` -> 5,000,000,000."""
    number = bytes_of(size)
    if number < 1:
        raise GraftError(f'shard_size must be a number of bytes or such as "5GB"; got {size!r}.')
    return number
