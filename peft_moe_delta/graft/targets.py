"""What a graft can be written as: a stock checkpoint, remote code, or an adapter over the post-trained model.

In: `GraftedWeights`. Out: a stream of (on-disk name, tensor) and a config.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ..checkpoint import SINGLE_FILE
from ..errors import GraftError
from ..export import Fit, UpcycledWeights, choose, choose_remote_code, explain_choice
from .adapter import WEIGHTS_FILE
from .report import GraftReport
from .scale import Scale
from .weights import GraftedWeights, exported_share


class Target(ABC):
    """One kind of output."""

    single_file: str
    """Name of the weights' file, where one is enough."""
    name: str | None
    """Of the architecture; None for an adapter."""
    choice: str | None = None
    """Why that architecture; None for an adapter."""
    replicated_bytes = 0
    """What copies of the experts of dense layers add."""

    @abstractmethod
    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) in the order of the files."""

    @abstractmethod
    def write_config(self, folder: Path, report: GraftReport) -> None:
        """Write what says how to load the tensors."""


class StockTarget(Target):
    """A stand-alone checkpoint in a stock architecture, through the layout that the in-memory export uses too."""

    single_file = SINGLE_FILE
    remote_code = False

    def __init__(
        self, graft: GraftedWeights, language: str | None, replicate_dense_layers: bool,
        architecture: str | None = None, serve_with: str | None = None,
    ) -> None:  # fmt: skip
        self.language = language
        self.weights = self.share_of(graft)
        fit = self._fit(replicate_dense_layers, architecture, serve_with)
        self.layout, self.choice = fit.layout, explain_choice(self.weights, fit, serve_with)
        self.config = self.layout.config(self.weights)
        self.name = self.config.model_type
        if self.layout.replicates:
            self.replicated_bytes = self.weights.replicated_bytes

    def share_of(self, graft: GraftedWeights) -> UpcycledWeights:
        """What is written of a graft."""
        return exported_share(graft.upcycled(), graft.adapter.config, self.language, remote_code=self.remote_code)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        return self.layout.tensors(self.weights)

    def write_config(self, folder: Path, report: GraftReport) -> None:
        config = copy.deepcopy(self.config)
        # By name: looking the class up would import its modelling code.
        if config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]]
        config.save_pretrained(folder)

    def _fit(self, replicate_dense_layers: bool, architecture: str | None, serve_with: str | None) -> Fit:
        return choose(
            self.weights,
            replicate_dense_layers=replicate_dense_layers,
            architecture=architecture,
            serve_with=serve_with,
        )


class RemoteCodeTarget(StockTarget):
    """A stand-alone checkpoint with its modelling file, which keeps routers in fp32 also where a stock one would do."""

    remote_code = True

    def write_config(self, folder: Path, report: GraftReport) -> None:
        super().write_config(folder, report)
        for name, text in self.layout.files(self.weights).items():
            (folder / name).write_text(text, encoding="utf-8")

    def _fit(self, replicate_dense_layers: bool, architecture: str | None, serve_with: str | None) -> Fit:
        if replicate_dense_layers or architecture is not None:
            raise GraftError(
                "Remote code keeps the model's own architecture and its dense layers as they are; leave out "
                'replicate_dense_layers=True and architecture=..., or take target="stock".'
            )
        if not self.weights.moe_layers:
            raise GraftError(
                f"What {self.language!r} runs on is a plain {self.weights.config.model_type!r} model, which needs no "
                'modelling file of its own. Use target="stock".'
            )
        return choose_remote_code(self.weights, serve_with=serve_with)


class AdapterTarget(Target):
    """The same experts, grafted, as an adapter whose base is the post-trained model."""

    single_file = WEIGHTS_FILE
    name = None

    def __init__(
        self, graft: GraftedWeights, language: str | None, post_trained: str, serve_with: str | None = None
    ) -> None:
        if serve_with not in (None, "transformers"):
            raise GraftError(
                f'An adapter runs in transformers with this package, not in {serve_with}. Take target="stock", or, for '
                "low-rank experts under routing by language, `peft-moe-delta lora`."
            )
        if graft.scale != Scale(1.0):
            raise GraftError(
                "A grafted adapter takes attention, norms and embeddings whole from the post-trained model, so scale "
                f'must be 1; got {graft.scale.value}. Use target="stock".'
            )
        if language is not None:
            raise GraftError(f'An adapter serves every language; leave out language={language!r}, or target="stock".')
        self.graft, self.post_trained = graft, post_trained

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        return self.graft.adapter_tensors()

    def write_config(self, folder: Path, report: GraftReport) -> None:
        config = copy.deepcopy(self.graft.adapter_config)
        config.base_model_name_or_path, config.revision = self.post_trained, None
        config.change(base_fingerprint=self.graft.fingerprint(self.graft.post_trained), graft=asdict(report))
        config.save_pretrained(str(folder))
