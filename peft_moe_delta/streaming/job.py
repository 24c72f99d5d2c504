"""`graft_checkpoint`: files to files, in bounded memory, complete or not at all.

In: base, post-trained model and adapter, as folders or Hub ids. Out: a folder with a stock checkpoint, remote code, or
the adapter over the post-trained model; config, tokenizer, and a manifest of what it came from. No model is built.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from itertools import zip_longest
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm
from transformers import PretrainedConfig

from ..checkpoint import (
    ADAPTER_FILES,
    MANIFEST_FILE,
    CheckpointReader,
    check_space,
    file_sha256,
    inside,
    plan_shards,
    read_manifest,
    resolve,
    resumable_folder,
    write_index,
    write_manifest,
    write_shards,
)
from ..delta import Scale
from ..errors import CheckpointError, GraftError
from ..loading import load_config
from ..tuner.grafting import GraftReport, check_has_delta, check_same_kind
from ..tuner.grafting.report import new_tokens_of
from ..tuner.vocabulary import match_tokenizers, num_rows
from .adapter import CONFIG_FILE, AdapterFile
from .side_files import grown_tokenizer, side_files, write_side_files
from .targets import AdapterTarget, RemoteCodeTarget, StockTarget, Target
from .weights import Sources

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
    inputs = _Inputs.open(base, post_trained, adapter)
    sources = inputs.sources(Scale(scale), expert_scale)
    tokenizer = grown_tokenizer(inputs.folders["post_trained"], sources.grafted_config)
    destination = _destination(target, sources, language, replicate_dense_layers, str(post_trained))
    shards = plan_shards(destination.tensors(), _bytes_of(shard_size), destination.single_file)
    request: dict[str, Any] = {
        "base": str(base), "post_trained": str(post_trained), "adapter": str(adapter), "target": target,
        "scale": dict(scale) if isinstance(scale, Mapping) else scale, "expert_scale": sources.expert_scales,
        "language": language,
        "replicate_dense_layers": replicate_dense_layers, "shard_size": _bytes_of(shard_size), "check": check,
    }  # fmt: skip
    record: dict[str, Any] = {
        "command": "graft_checkpoint", "request": request, "layout": destination.name,
        "versions": {package: version(package) for package in _VERSIONS},
    }  # fmt: skip
    report = GraftReport(
        str(post_trained),
        request["scale"],
        sources.expert_scales,
        layout=destination.name,
        language=language,
        replicated_bytes=destination.replicated_bytes,
        **new_tokens_of(sources.grafted_config),
    )
    output = Path(output).expanduser().resolve()
    if not overwrite and _is_done(output, record, inputs):
        measured = read_manifest(output)["report"]
        return replace(report, **{name: measured[name] for name in ("max_logit_difference", "route_agreement")})
    before = inputs.state()
    key = json.dumps([record, before, [hashlib.sha256(shard.header).hexdigest() for shard in shards]], sort_keys=True)
    with resumable_folder(output, key, overwrite=overwrite) as job, ThreadPoolExecutor(1) as hasher:
        hashes = {file: hasher.submit(file_sha256, file) for file in inputs.in_reading_order()}
        try:
            kept = sum((job.folder / name).stat().st_size for name in job.finished)
            total = sum(shard.size for shard in shards)
            check_space(output.parent, total - kept + _SPARE)
            with tqdm(total=total, unit="B", unit_scale=True, desc="graft", disable=None) as bar:
                write_shards(job, shards, _resuming(sources, destination.tensors), bar.update)
            write_index(job.folder, shards)
            write_side_files(job.folder, inputs.folders["post_trained"], tokenizer)
            destination.write_config(job.folder)
            if check:
                from .check import check_output

                report = check_output(report, job.folder, sources, destination, inputs.folders)
            record["inputs"] = inputs.record({file: future.result() for file, future in hashes.items()})
        finally:
            hasher.shutdown(wait=True, cancel_futures=True)
        if inputs.state() != before:
            raise CheckpointError("An input file changed while it was read. Start again when nobody writes to it.")
        write_manifest(job.folder, record | {"report": asdict(report)}, job.finished)
    return report


@dataclass(frozen=True)
class _Inputs:
    """The three folders and what is in them."""

    folders: Mapping[str, Path]
    base: CheckpointReader
    post_trained: CheckpointReader
    adapter: AdapterFile
    config: PretrainedConfig

    @classmethod
    def open(cls, base: str | Path, post_trained: str | Path, adapter: str | Path) -> _Inputs:
        """Read configs and headers, and check that base and post-trained model can be siblings."""
        folders = {
            "base": resolve(base),
            "post_trained": resolve(post_trained),
            "adapter": resolve(adapter, files=ADAPTER_FILES),
        }
        before, config = (_config(folders[role]) for role in ("base", "post_trained"))
        check_same_kind(before.model_type, config.model_type)
        readers = {role: CheckpointReader(folders[role]) for role in ("base", "post_trained")}
        return cls(folders, **readers, adapter=AdapterFile(folders["adapter"]), config=config)

    def sources(self, scale: Scale, expert_scale: float | Mapping[str, float]) -> Sources:
        check_has_delta(self.adapter.config)
        vocabulary = match_tokenizers(
            str(self.folders["base"]),
            str(self.folders["post_trained"]),
            base_rows=num_rows(self.base.shapes),
            post_trained_rows=num_rows(self.post_trained.shapes),
            new_tokens=self.adapter.config.new_tokens or (),
        )
        return Sources.open(self.base, self.post_trained, self.adapter, self.config, scale, expert_scale, vocabulary)

    @property
    def files(self) -> dict[str, list[Path]]:
        """What the output depends on, weights first."""
        folders = self.folders
        return {
            "base": [*self.base.files, folders["base"] / "config.json"],
            "post_trained": [
                *self.post_trained.files,
                folders["post_trained"] / "config.json",
                *side_files(folders["post_trained"]),
            ],
            "adapter": [*self.adapter.reader.files, folders["adapter"] / CONFIG_FILE],
        }

    def in_reading_order(self) -> list[Path]:
        """All files, those that are read at about the same time beside each other: hashing reads ahead for grafting."""
        rows = zip_longest(*self.files.values())
        return [file for row in rows for file in row if file is not None]

    def state(self) -> list[list[Any]]:
        """What tells cheaply whether a file is still the same."""
        return [
            [role, file.name, file.stat().st_size, file.stat().st_mtime_ns]
            for role, files in self.files.items()
            for file in files
        ]

    def record(self, hashes: Mapping[Path, str]) -> dict[str, dict[str, str]]:
        """Role -> file name -> sha256."""
        return {role: {file.name: hashes[file] for file in files} for role, files in self.files.items()}


def _destination(
    target: str, sources: Sources, language: str | None, replicate_dense_layers: bool, post_trained: str
) -> Target:
    if target == "adapter":
        return AdapterTarget(sources, language, post_trained)
    if target == "stock":
        return StockTarget(sources, language, replicate_dense_layers)
    if target == "remote_code":
        return RemoteCodeTarget(sources, language, replicate_dense_layers)
    raise GraftError(f"Unknown target {target!r}; expected one of: stock, remote_code, adapter.")


def _resuming(
    sources: Sources, tensors: Callable[[], Iterator[tuple[str, Tensor]]]
) -> Callable[[int], Iterator[tuple[str, Tensor]]]:
    """The stream without its first tensors, which are walked over dry.

    Computing starts at the beginning of a decoder layer, so that what a layout asks for ahead within one is there.
    """

    def stream(skip: int) -> Iterator[tuple[str, Tensor]]:
        sources.dry = True
        layers = [match and match[1] for match in (re.search(r"\.(\d+)\.", name) for name, _ in tensors())]
        first = layers.index(layers[skip]) if skip < len(layers) else len(layers)
        walk = tensors()
        sources.dry = first > 0
        for index, (name, tensor) in enumerate(walk):
            if index >= skip:
                yield name, tensor
            sources.dry = index + 1 < first

    return stream


def _is_done(output: Path, record: Mapping[str, Any], inputs: _Inputs) -> bool:
    """Whether an earlier run has finished just this: it may have been killed after its last step."""
    if not (output / MANIFEST_FILE).is_file():
        return False
    manifest = read_manifest(output)
    if any(manifest.get(field) != value for field, value in json.loads(json.dumps(record)).items()):
        return False
    return manifest["inputs"] == inputs.record({file: file_sha256(file) for file in inputs.in_reading_order()})


def _config(folder: Path) -> PretrainedConfig:
    inside(folder, "config.json")
    return load_config(folder, trust_remote_code=False)


def _bytes_of(size: int | str) -> int:
    """`"5GB"` -> 5,000,000,000."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", str(size).strip().upper())
    number = int(float(match[1]) * 1000 ** " KMGT".index(match[2] or " ")) if match else 0
    if number < 1:
        raise GraftError(f'shard_size must be a number of bytes or such as "5GB"; got {size!r}.')
    return number
