"""The gate for files: what was written computes what the adapter computes. The one part that builds models.

In: the written folder and the three it came from. Out: the report with the largest difference of fp32 logits and, for
16-bit checkpoints, the routes that agree.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from ..checkpoint import CheckpointReader
from ..export import build_model, check_equal_logits
from ..tuner import MoeDeltaModel
from ..tuner.comparison import compare_export, rounded_routes
from ..tuner.grafting import GraftReport, grafted_adapter
from .adapter import AdapterFile
from .targets import RemoteCodeTarget, StockTarget, Target
from .weights import Sources


def check_output(
    report: GraftReport, folder: Path, sources: Sources, destination: Target, folders: Mapping[str, Path]
) -> GraftReport:
    """Compare logits, and complete the report.

    Rounding to 16 bits would hide a mistake, so a 16-bit checkpoint is written once more in memory, in fp32, by the
    same stream; what lies on the disk is then asked for its routes. An fp32 checkpoint is read from the disk.

    Raises:
        GraftError: the logits differ.
    """
    sources.dry = False
    if not isinstance(destination, StockTarget):
        return dataclasses.replace(report, max_logit_difference=_check_adapter(folder, sources, folders))
    weights, exact = destination.weights, _grafted(sources, folders, torch.float32)
    wide = weights.dtype != torch.float32
    found = _in_fp32(sources, destination) if wide else _written(destination, folder, torch.float32)
    difference = compare_export(weights, exact, found, language=report.language)
    agreement = rounded_routes(weights, exact, _written(destination, folder, "auto")) if wide else None
    return dataclasses.replace(report, max_logit_difference=difference, route_agreement=agreement)


def _check_adapter(folder: Path, sources: Sources, folders: Mapping[str, Path]) -> float:
    """The grafted adapter against the one that is grafted in memory, for every language that routing tells apart."""
    expected = _grafted(sources, folders, "auto").float()
    found = _with_adapter(_load(folders["post_trained"], "auto"), folder, sources.adapter).float().eval()
    config = sources.adapter.config
    differences = []
    for code in config.language_table.codes if config.routing_rule.needs_language else (None,):
        for model in (expected, found):
            cast("MoeDeltaModel", model.base_model).set_language(code)
        differences.append(check_equal_logits(expected, cast("PreTrainedModel", found)))
    return max(differences)


def _grafted(sources: Sources, folders: Mapping[str, Path], dtype: Any) -> PeftModel:
    """The adapter, grafted in memory."""
    base, post_trained = (_load(folders[role], dtype) for role in ("base", "post_trained"))
    adapter = _with_adapter(base, folders["adapter"], sources.adapter)
    tuner = cast("MoeDeltaModel", adapter.base_model)
    return grafted_adapter(tuner, post_trained, sources.scale, sources.expert_scales).eval()


def _with_adapter(model: PreTrainedModel, folder: Path, adapter: AdapterFile) -> PeftModel:
    """A model with an adapter in the dtype of its file: as PEFT keeps it over a 16-bit model, fp32 where that is so."""
    experts = next(iter(adapter.mlps.values())).experts[1]
    in_fp32 = adapter.reader.dtypes[next(iter(experts.values()))] == torch.float32
    return PeftModel.from_pretrained(model, folder, autocast_adapter_dtype=in_fp32)


def _in_fp32(sources: Sources, destination: StockTarget) -> PreTrainedModel:
    """The export before its last rounding."""
    adapter = AdapterFile(sources.adapter.folder)
    adapter.reader = _Wide(adapter.reader.path)
    wide = Sources.open(
        _Wide(sources.base_files.path), _Wide(sources.post_trained.path), adapter, sources.config,
        sources.scale, sources.expert_scales, sources.vocabulary,
    )  # fmt: skip
    wide.dry = False
    return build_model(destination.share_of(wide), destination.layout)


def _written(destination: StockTarget, folder: Path, dtype: Any) -> PreTrainedModel:
    """What lies on the disk; a modelling file's model by our own copy of that file, so that no foreign code can run."""
    if not isinstance(destination, RemoteCodeTarget):
        return _load(folder, dtype)
    model: PreTrainedModel = destination.layout.model_class(destination.weights).from_pretrained(folder, dtype=dtype)
    return model.eval()


def _load(folder: Path, dtype: Any) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=False)
    return model.eval()


class _Wide(CheckpointReader):
    """A checkpoint whose floating-point tensors are given in fp32."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.dtypes = {n: torch.float32 if dtype.is_floating_point else dtype for n, dtype in self.dtypes.items()}

    def __getitem__(self, name: str) -> Tensor:
        return super().__getitem__(name).to(self.dtypes[name])
