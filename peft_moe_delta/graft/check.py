"""The gate for files: what was written computes what the adapter computes.

In: the written folder and the three it came from. Out: the report with the largest difference of fp32 logits and, for
16-bit checkpoints, the routes that agree.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from ..export import build_model, check_equal_logits
from ..tensors import Tensors
from .adapter import Adapter
from .comparison import compare_export, rounded_routes
from .memory import grafted_adapter, tuner_of
from .report import GraftReport
from .targets import RemoteCodeTarget, StockTarget, Target
from .trio import Trio


def check_output(report: GraftReport, folder: Path, trio: Trio, destination: Target) -> GraftReport:
    """Compare logits, and complete the report.

    Rounding to 16 bits would hide a mistake, so a 16-bit checkpoint is written once more in memory, in fp32, by the
    same stream; what lies on the disk is then asked for its routes. An fp32 checkpoint is read from the disk.

    Raises:
        GraftError: the logits differ.
    """
    if not isinstance(destination, StockTarget):
        return dataclasses.replace(report, max_logit_difference=_check_adapter(folder, trio))
    weights, exact = destination.weights, _grafted(trio, torch.float32)
    wide = weights.dtype != torch.float32
    found = _in_fp32(trio, destination) if wide else _written(destination, folder, torch.float32)
    difference = compare_export(weights, exact, found, language=report.language)
    agreement = rounded_routes(weights, exact, _written(destination, folder, "auto")) if wide else None
    return dataclasses.replace(report, max_logit_difference=difference, route_agreement=agreement)


def _check_adapter(folder: Path, trio: Trio) -> float:
    """The grafted adapter against the one that is grafted in memory, for every language that routing tells apart."""
    expected = _grafted(trio, "auto").float()
    found = _with_adapter(_load(trio.folders["post_trained"], "auto"), folder, trio.adapter).float().eval()
    config = trio.adapter.config
    differences = []
    for code in config.language_table.codes if config.routing_rule.needs_language else (None,):
        for model in (expected, found):
            tuner_of(model).set_language(code)
        exported: Any = found
        differences.append(check_equal_logits(expected, exported))
    return max(differences)


def _grafted(trio: Trio, dtype: Any) -> PeftModel:
    """The adapter, grafted in memory."""
    base, post_trained = (_load(trio.folders[role], dtype) for role in ("base", "post_trained"))
    rows = [len(trio.adapter.tensors.meta(key)) for key in trio.adapter.changed.values()]
    if rows:
        base.resize_token_embeddings(rows[0], mean_resizing=False)
    adapter = _with_adapter(base, trio.folders["adapter"], trio.adapter)
    return grafted_adapter(tuner_of(adapter), post_trained, trio.scale, trio.expert_scale, warn=False).eval()


def _with_adapter(model: PreTrainedModel, folder: Path, adapter: Adapter) -> PeftModel:
    """A model with an adapter in the dtype of its file: as PEFT keeps it over a 16-bit model, fp32 where that is so."""
    experts = next(iter(adapter.mlps.values())).experts[1]
    in_fp32 = adapter.tensors.meta(next(iter(experts.values()))).dtype == torch.float32
    return PeftModel.from_pretrained(model, folder, autocast_adapter_dtype=in_fp32)


def _in_fp32(trio: Trio, destination: StockTarget) -> PreTrainedModel:
    """The export before its last rounding."""
    wide = dataclasses.replace(
        trio,
        base=dataclasses.replace(trio.base, tensors=_Wide(trio.base.tensors)),
        post_trained=dataclasses.replace(trio.post_trained, tensors=_Wide(trio.post_trained.tensors)),
        adapter=Adapter(trio.adapter.config, _Wide(trio.adapter.tensors), trio.adapter.source),
    )
    return build_model(destination.share_of(wide.weights()), destination.layout)


def _written(destination: StockTarget, folder: Path, dtype: Any) -> PreTrainedModel:
    """What lies on the disk; a modelling file's model by our own copy of that file, so that no foreign code can run."""
    if not isinstance(destination, RemoteCodeTarget):
        return _load(folder, dtype)
    model: PreTrainedModel = destination.layout.model_class(destination.weights).from_pretrained(folder, dtype=dtype)
    return model.eval()


def _load(folder: Path, dtype: Any) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=False)
    return model.eval()


@dataclass(frozen=True)
class _Wide(Tensors):
    """Tensors of which those in floating point are given in fp32."""

    tensors: Tensors

    def __getitem__(self, name: str) -> Tensor:
        return _widened(self.tensors[name])

    def meta(self, name: str) -> Tensor:
        return _widened(self.tensors.meta(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def __contains__(self, name: object) -> bool:
        return name in self.tensors


def _widened(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor
