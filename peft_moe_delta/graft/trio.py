"""Base, post-trained model and adapter as files, opened for one graft.

In: three folders or Hub ids. Out: their tensors, which are read as they are asked for or, while `dry`, stand for
themselves by shape and dtype alone: that is how a job knows every file's layout before it starts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

from torch import Tensor

from ..checkpoint import ADAPTER_FILES, CheckpointReader, resolve
from ..tensors import Tensors
from .adapter import CONFIG_FILE, WEIGHTS_FILE, Adapter
from .dense import Dense, read_config
from .kinship import check_has_delta, check_same_kind, match_vocabularies
from .rows import VocabularyMap
from .scale import Scale
from .side_files import side_files
from .weights import GraftedWeights


@dataclass
class Switch:
    """Whether tensors come without content."""

    dry: bool = False


@dataclass(frozen=True)
class Dryable(Tensors):
    """Another mapping's tensors; without content while the switch says so."""

    tensors: Tensors
    switch: Switch

    def origin(self, name: str) -> tuple[Mapping[str, Tensor], str]:
        return self.tensors.origin(name)

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors.meta(name) if self.switch.dry else self.tensors[name]

    def meta(self, name: str) -> Tensor:
        return self.tensors.meta(name)

    def sample(self, name: str) -> Tensor:
        return self.tensors.sample(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def __contains__(self, name: object) -> bool:
        return name in self.tensors


@dataclass(frozen=True)
class Trio:
    """What a graft from files reads.

    Attributes:
        folders: "base", "post_trained", "adapter" -> folder.
        base, post_trained: the dense models.
        adapter: the adapter.
        scale: share of the delta.
        expert_scale: share of the experts' own change.
        vocabulary: how embedding rows belong together; None where row r is row r.
        switch: whether tensors come without content.
    """

    folders: Mapping[str, Path]
    base: Dense
    post_trained: Dense
    adapter: Adapter
    scale: Scale
    expert_scale: float | Mapping[str, float]
    vocabulary: VocabularyMap | None
    weights_files: Mapping[str, list[Path]]
    switch: Switch = field(default_factory=Switch)

    @classmethod
    def open(
        cls, base: str | Path, post_trained: str | Path, adapter: str | Path, scale: Scale,
        expert_scale: float | Mapping[str, float],
    ) -> Trio:  # fmt: skip
        """Read configs and headers, and check that base and post-trained model can be siblings.

        Raises:
            CheckpointError: a folder cannot be read, or not as what it should be.
            GraftError: the three do not belong together.
        """
        folders = {
            "base": resolve(base),
            "post_trained": resolve(post_trained),
            "adapter": resolve(adapter, files=ADAPTER_FILES),
        }
        before, after = (read_config(folders[role]) for role in ("base", "post_trained"))
        check_same_kind(before.model_type, after.model_type)
        switch = Switch()
        readers = {role: CheckpointReader(folders[role]) for role in ("base", "post_trained")}
        saved = Adapter.of_folder(folders["adapter"])
        check_has_delta(saved.config)
        tensors = Dryable(saved.tensors, switch)
        own = {name: (tensors, key) for name, key in saved.changed.items()}
        start = Dense.of_files(Dryable(readers["base"], switch), before, folders["base"], own)
        end = Dense.of_files(Dryable(readers["post_trained"], switch), after, folders["post_trained"])
        names = (str(folders[role]) for role in ("base", "post_trained"))
        vocabulary = match_vocabularies(next(names), start, next(names), end, saved.config)
        files = {role: list(reader.files) for role, reader in readers.items()}
        files["adapter"] = [folders["adapter"] / WEIGHTS_FILE]
        return cls(
            folders, start, end, Adapter(saved.config, tensors, saved.source), scale, expert_scale, vocabulary, files,
            switch,
        )  # fmt: skip

    def weights(self) -> GraftedWeights:
        """What the three make together; checks that they belong together."""
        return GraftedWeights(
            self.base, self.post_trained, self.adapter, self.scale, self.expert_scale, self.vocabulary
        )

    @property
    def files(self) -> dict[str, list[Path]]:
        """What the output depends on, weights first."""
        beside = {
            "base": [self.folders["base"] / "config.json"],
            "post_trained": [
                self.folders["post_trained"] / "config.json",
                *side_files(self.folders["post_trained"]).values(),
            ],
            "adapter": [self.folders["adapter"] / CONFIG_FILE],
        }
        return {role: [*self.weights_files[role], *files] for role, files in beside.items()}

    def in_reading_order(self) -> list[Path]:
        """All files, those that are read at about the same time beside each other: hashing reads ahead for grafting."""
        rows = zip_longest(*self.files.values())
        return [file for row in rows for file in row if file is not None]

    def state(self) -> list[list[Any]]:
        """What tells cheaply whether a file is still the same."""
        return [
            [role, self._name(role, file), file.stat().st_size, file.stat().st_mtime_ns]
            for role, files in self.files.items()
            for file in files
        ]

    def record(self, hashes: Mapping[Path, str]) -> dict[str, dict[str, str]]:
        """Role -> file name -> sha256."""
        return {role: {self._name(role, file): hashes[file] for file in files} for role, files in self.files.items()}

    def _name(self, role: str, file: Path) -> str:
        return file.relative_to(self.folders[role]).as_posix()
