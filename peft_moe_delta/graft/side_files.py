"""What lies beside the weights of a graft: the post-trained model's tokenizer and generation config, with new tokens.

In: the post-trained model's folder, and what the adapter over it remembers. Out: files; as they are, but for a
tokenizer that learns the adapter's new tokens. Or a generation config that writes them where a model is saved.
"""

from __future__ import annotations

import copy
import os
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedTokenizerBase

from ..checkpoint import MANIFEST_FILE, resolve, within
from ..errors import CheckpointError, DataError
from ..loading import load_tokenizer
from ..tuner.record import AdapterRecord
from ..vocabulary import give_tokens, save_tokenizer

_GENERATION = "generation_config.json"
_TOKENIZER = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.jinja",
    "additional_chat_templates/*.jinja", "chat_template.json", "*.model",
)  # fmt: skip


def side_files(folder: Path) -> dict[str, Path]:
    """Name -> file of what is taken from beside the post-trained model's weights."""
    return _found(folder, (_GENERATION, *_TOKENIZER))


def grown_tokenizer(folder: Path, record: AdapterRecord) -> PreTrainedTokenizerBase | None:
    """The post-trained model's tokenizer with an adapter's new tokens; None where it stays as it is, or is not there.

    Raises:
        DataError: it cannot take them.
    """
    tokens, first = record.new_tokens, record.first_new_token_id
    if not tokens or first is None or not (folder / "tokenizer_config.json").is_file():
        return None
    tokenizer: PreTrainedTokenizerBase = load_tokenizer(folder)
    give_tokens(tokenizer, tokens, first)
    return tokenizer


class StockGenerationConfig(GenerationConfig):
    """A stock model's generation config, which brings the post-trained model's tokenizer along when it is saved.

    `save_pretrained` of a model, and with it `push_to_hub` and Trainer, writes config, generation config and weights,
    and asks nobody else. The tokenizer is read when it is written, so nothing large hangs on the model.
    """

    post_trained: str
    record: AdapterRecord
    __slots__ = ("post_trained", "record")  # beside the fields, which are what is compared and written

    @classmethod
    def of(cls, config: GenerationConfig, post_trained: str, record: AdapterRecord) -> StockGenerationConfig:
        """A model's generation config, which remembers where the tokenizer lies and which tokens it has to learn."""
        made = cls.__new__(cls)
        vars(made).update(copy.deepcopy(vars(config)))
        made.post_trained, made.record = post_trained, record
        return made

    def save_pretrained(self, save_directory: str | os.PathLike[str], *arguments: Any, **options: Any) -> None:
        """As transformers does it; a tokenizer that cannot be had is warned of, since the weights are worth more."""
        super().save_pretrained(save_directory, *arguments, **options)
        try:
            folder = resolve(self.post_trained, files=_TOKENIZER)
            _write_tokenizer(Path(save_directory), folder, grown_tokenizer(folder, self.record))
        except (CheckpointError, DataError) as error:
            warnings.warn(f"Saved without a tokenizer: {error}", stacklevel=3)


def write_side_files(output: Path, folder: Path, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Copy them; `tokenizer` takes the place of the files of a tokenizer that knows less.

    Raises:
        CheckpointError: one has the manifest's name.
    """
    _copy(_found(folder, (_GENERATION,)), output)
    _write_tokenizer(output, folder, tokenizer)
    if (output / MANIFEST_FILE).exists():
        raise CheckpointError(f"The post-trained model brings a file named {MANIFEST_FILE}, which is taken.")


def _write_tokenizer(output: Path, folder: Path, tokenizer: PreTrainedTokenizerBase | None) -> None:
    if tokenizer is None:
        _copy(_found(folder, _TOKENIZER), output)
    else:
        save_tokenizer(tokenizer, output, folder)


def _copy(files: Mapping[str, Path], output: Path) -> None:
    for name, file in files.items():
        target = output / name
        if not (target.exists() and target.samefile(file)):
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, target)


def _found(folder: Path, patterns: tuple[str, ...]) -> dict[str, Path]:
    names = {
        path.relative_to(folder).as_posix() for pattern in patterns for path in folder.glob(pattern) if path.is_file()
    }
    return {name: within(folder, name) for name in sorted(names)}
