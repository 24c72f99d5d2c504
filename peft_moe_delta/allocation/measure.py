"""`measure_languages`: a model's statistics, language by language.

In: a causal language model, its tokenizer, text of each language. Out: `LanguageStatistics`. Every language is measured
on as many tokens, from the same weights; how many rows run at once and how they are padded changes only the time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..documents import check_languages
from ..errors import DataError
from ..export.gate import evaluating
from .blocks import Block, decoder_blocks
from .states import StateMeans
from .statistics import LAST_LAYERS, SOURCES, LanguageStatistics
from .text import batches, token_rows
from .tuning import Vectors, deviations, mean_gradients
from .vectors import VectorStore

DEFAULT_SOURCES = ("similarity", "deviation")
STATE_SOURCES = ("similarity", "representations")


@dataclass(frozen=True)
class Measurement:
    """How much is measured, and how.

    Attributes:
        tokens: of each language, for similarity, representations and gradients. LayerMoE used 100,000.
        steps: of tuning a language, for deviation. DMoE used 10.
        step_sequences: rows a step of tuning. DMoE used 2,048.
        sequence_length: tokens a row, everywhere. DMoE used 512.
        learning_rate: at the first step of tuning, falling linearly to 0. DMoE used 8e-6.
        vector_layers: how many layers, the last ones, keep what tells languages apart by deviation and by gradients;
            the others keep the norms alone. None for all layers: as much disk as the MLPs' weights, a language.
        seed: of the choice of documents.
    """

    tokens: int = 5000
    steps: int = 10
    step_sequences: int = 1
    sequence_length: int = 512
    learning_rate: float = 8e-6
    vector_layers: int | None = LAST_LAYERS
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("tokens", "steps", "step_sequences", "sequence_length", "vector_layers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise DataError(f"{name}: got {value}, expected 1 or more.")


def measure_languages(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Mapping[str, Iterable[str]],
    *,
    sources: Sequence[str] = DEFAULT_SOURCES,
    measurement: Measurement | None = None,
    target_modules: Sequence[str] | None = None,
    batch_size: int = 4,
    progress: bool = False,
) -> LanguageStatistics:
    """Measure a model on text of two or more languages. The model is left as it was found.

    Args:
        model: a causal language model without adapters; in fp32 for `"deviation"` and `"gradients"`.
        texts: language -> documents, read once for each source and only as far as needed: a list, a data set's column.
        sources: what to measure, of `SOURCES`.
        measurement: on how much; the defaults are small.
        target_modules: the name of the MLP inside a layer, for families that are not known.
        batch_size: rows at a time.
        progress: show a bar.

    Raises:
        DataError: fewer than two languages, an unknown source, or too little text.
        ArchitectureError: a model whose MLPs are not found, or whose weights cannot be tuned.
    """
    measurement = measurement or Measurement()
    unknown = sorted(set(sources) - set(SOURCES))
    if unknown or not sources:
        raise DataError(f"sources: got {list(sources)}, expected some of: {', '.join(SOURCES)}.")
    check_languages(texts)
    if len(texts) < 2:
        raise DataError(f"texts: got {list(texts)}, expected two languages or more: statistics compare them.")
    blocks = decoder_blocks(model, target_modules)
    reader = _Reader(model, tokenizer, texts, blocks, measurement, batch_size, progress)
    grams: dict[str, np.ndarray] = {}
    with evaluating(model):
        if set(sources) & set(STATE_SOURCES):
            states = reader.states()
            grams |= {source: states[source] for source in STATE_SOURCES if source in sources}
        if "deviation" in sources:
            grams["deviation"] = reader.deviation()
        if "gradients" in sources:
            grams["gradients"] = reader.gradients()
    return LanguageStatistics(
        languages=tuple(texts),
        layers=tuple(block.index for block in blocks),
        grams=grams,
        model={
            "name": str(getattr(model.config, "_name_or_path", "")),
            "hidden_size": model.config.get_text_config().hidden_size,
            "expert_params": sum(parameter.numel() for parameter in blocks[0].mlp.parameters()),
        },
        settings={source: _settings(source, measurement) for source in grams},
    )


@dataclass
class _Reader:
    """One measurement under way."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    texts: Mapping[str, Iterable[str]]
    blocks: list[Block]
    measurement: Measurement
    batch_size: int
    progress: bool

    def states(self) -> dict[str, np.ndarray]:
        """Similarity and representations, which need one and the same pass."""
        means = []
        for language in self.texts:
            prepared = batches(self._rows(language, self.measurement.tokens), self.batch_size, self._device)
            means.append(StateMeans(self.blocks).read(self.model, self._shown(prepared, f"states {language}")))
        return {
            "similarity": _grams([mean.mean_unit_vectors() for mean in means]),
            "representations": _grams([mean.mean_hidden_states() for mean in means]),
        }

    def deviation(self) -> np.ndarray:
        """Inner products of the changes."""
        measurement, length = self.measurement, self.measurement.step_sequences
        with VectorStore(self.blocks, self._kept) as store:
            for language in self.texts:
                rows = self._rows(language, measurement.steps * length * measurement.sequence_length)
                steps = [
                    batches(rows[start : start + length], self.batch_size, self._device)
                    for start in range(0, len(rows), length)
                ]
                vectors: Vectors = deviations(
                    self.model,
                    self.blocks,
                    self._shown(steps, f"tuning {language}"),
                    num_steps=measurement.steps,
                    learning_rate=measurement.learning_rate,
                )
                store.add(vectors)
            return store.gram()

    def gradients(self) -> np.ndarray:
        """Inner products of the mean gradients."""
        with VectorStore(self.blocks, self._kept) as store:
            for language in self._shown(list(self.texts), "gradients"):
                prepared = batches(self._rows(language, self.measurement.tokens), self.batch_size, self._device)
                store.add(mean_gradients(self.model, self.blocks, prepared))
            return store.gram()

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def _kept(self) -> list[int]:
        """Indices of the layers whose vectors are kept."""
        return [block.index for block in self.blocks[-(self.measurement.vector_layers or len(self.blocks)) :]]

    def _rows(self, language: str, tokens: int) -> list[list[int]]:
        return token_rows(
            self.tokenizer,
            self.texts[language],
            language,
            tokens=tokens,
            sequence_length=self.measurement.sequence_length,
            seed=self.measurement.seed,
        )

    def _shown(self, work: Sequence[Any], what: str) -> Iterable[Any]:
        return tqdm(work, desc=what, disable=not self.progress)


def _grams(vectors: Sequence[Sequence[Tensor]]) -> np.ndarray:
    """Inner products (L, N, N) of N languages' L vectors."""
    by_layer = (torch.stack(layer).cpu() for layer in zip(*vectors, strict=True))
    return np.stack([(layer @ layer.T).numpy() for layer in by_layer])


def _settings(source: str, measurement: Measurement) -> dict[str, Any]:
    """Those of the settings that a source depends on."""
    named = {
        "deviation": ("steps", "step_sequences", "sequence_length", "learning_rate", "vector_layers", "seed"),
        "gradients": ("tokens", "sequence_length", "vector_layers", "seed"),
    }.get(source, ("tokens", "sequence_length", "seed"))
    return {name: asdict(measurement)[name] for name in named}
