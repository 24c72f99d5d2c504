"""What a graft can be written as: a stock checkpoint, remote code, or an adapter over the post-trained model.

In: `Sources`. Out: a stream of (on-disk name, tensor) and a config.
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
from ..delta import Scale
from ..errors import GraftError
from ..export import Layout, RemoteCodeLayout, ReplicatedLayout, UpcycledWeights, choose_layout
from ..tuner.grafting import GraftReport, exported_share
from ..tuner.grafting.report import new_tokens_of
from .adapter import WEIGHTS_FILE
from .weights import Sources


class Target(ABC):
    """One kind of output."""

    single_file: str
    """Name of the weights' file, where one is enough."""
    name: str | None
    """Of the architecture; None for an adapter."""
    replicated_bytes = 0
    """What copies of the experts of dense layers add."""

    @abstractmethod
    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) in the order of the files."""

    @abstractmethod
    def write_config(self, folder: Path) -> None:
        """Write what says how to load the tensors."""


class StockTarget(Target):
    """A stand-alone checkpoint in a stock architecture, through the layout that the in-memory export uses too."""

    single_file = SINGLE_FILE
    remote_code = False

    def __init__(self, sources: Sources, language: str | None, replicate_dense_layers: bool) -> None:
        self.language = language
        self.weights = self.share_of(sources)
        self.layout = self._layout(replicate_dense_layers)
        self.config = self.layout.config(self.weights)
        self.name = self.config.model_type
        if isinstance(self.layout, ReplicatedLayout):
            self.replicated_bytes = self.weights.replicated_bytes

    def share_of(self, sources: Sources) -> UpcycledWeights:
        """What is written of a graft."""
        return exported_share(sources.upcycled(), sources.adapter.config, self.language, remote_code=self.remote_code)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        return self.layout.tensors(self.weights)

    def write_config(self, folder: Path) -> None:
        config = copy.deepcopy(self.config)
        # By name: looking the class up would import its modelling code.
        if config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]]
        config.save_pretrained(folder)

    def _layout(self, replicate_dense_layers: bool) -> Layout:
        return choose_layout(self.weights, replicate_dense_layers=replicate_dense_layers)


class RemoteCodeTarget(StockTarget):
    """A stand-alone checkpoint with its modelling file, which keeps routers in fp32 also where a stock one would do."""

    remote_code = True

    def write_config(self, folder: Path) -> None:
        super().write_config(folder)
        for name, text in self.layout.files(self.weights).items():
            (folder / name).write_text(text, encoding="utf-8")

    def _layout(self, replicate_dense_layers: bool) -> Layout:
        if replicate_dense_layers:
            raise GraftError("Remote code keeps dense layers as they are; leave out replicate_dense_layers=True.")
        if not self.weights.moe_layers:
            raise GraftError(
                f"What {self.language!r} runs on is a plain {self.weights.config.model_type!r} model, which needs no "
                'modelling file of its own. Use target="stock".'
            )
        return RemoteCodeLayout()


class AdapterTarget(Target):
    """The same experts, grafted, as an adapter whose base is the post-trained model."""

    single_file = WEIGHTS_FILE
    name = None

    def __init__(self, sources: Sources, language: str | None, post_trained: str) -> None:
        if sources.scale != Scale(1.0):
            raise GraftError(
                "A grafted adapter takes attention, norms and embeddings whole from the post-trained model, so scale "
                f'must be 1; got {sources.scale.value}. Use target="stock".'
            )
        if language is not None:
            raise GraftError(f'An adapter serves every language; leave out language={language!r}, or target="stock".')
        self.sources, self.post_trained = sources, post_trained

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        sources, adapter = self.sources, self.sources.adapter
        owner = {
            key: (names[layer].get(inner), layer, expert)
            for blocks, names in ((adapter.mlps, sources.mlp_names), (adapter.attentions, sources.attention_names))
            for layer, block in blocks.items()
            for expert, keys in block.experts.items()
            for inner, key in keys.items()
        }
        saved = {key: name for name, key in adapter.saved.items()}
        for key in adapter.reader:
            if key in owner:
                yield key, sources.grafted(key, *owner[key])
            elif key in saved:
                yield key, sources.saved(key, saved[key])
            else:
                yield key, sources.stored(key)

    def write_config(self, folder: Path) -> None:
        config = copy.deepcopy(self.sources.grafted_config)
        config.base_model_name_or_path, config.revision = self.post_trained, None
        config.base_fingerprint = self.sources.fingerprint_of_post_trained()
        report = GraftReport(
            self.post_trained,
            1.0,
            self.sources.expert_scales,
            warnings=tuple(config.doubts),
            **new_tokens_of(config),
        )
        config.graft = asdict(report)
        config.save_pretrained(str(folder))
