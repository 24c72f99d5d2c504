"""What lies beside the weights of a graft: the post-trained model's tokenizer and generation config, with new tokens.

In: the post-trained model's folder, and the adapter's config over it. Out: files; as they are, but for a tokenizer that
learns the adapter's new tokens.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from ..checkpoint import MANIFEST_FILE, within
from ..errors import CheckpointError
from ..loading import load_tokenizer
from ..tuner.config import MoeDeltaConfig
from ..vocabulary import give_tokens

_TOKENIZER = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.jinja",
    "additional_chat_templates/*.jinja", "chat_template.json", "*.model",
)  # fmt: skip


def side_files(folder: Path) -> dict[str, Path]:
    """Name -> file of what is taken from beside the post-trained model's weights."""
    return _found(folder, ("generation_config.json", *_TOKENIZER))


def grown_tokenizer(folder: Path, config: MoeDeltaConfig) -> PreTrainedTokenizerBase | None:
    """The post-trained model's tokenizer with an adapter's new tokens; None where it stays as it is, or is not there.

    Raises:
        DataError: it cannot take them.
    """
    tokens, first = config.record.new_tokens, config.record.first_new_token_id
    if not tokens or first is None or not (folder / "tokenizer_config.json").is_file():
        return None
    tokenizer: PreTrainedTokenizerBase = load_tokenizer(folder)
    give_tokens(tokenizer, tokens, first)
    return tokenizer


def write_side_files(output: Path, folder: Path, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Copy them; `tokenizer` takes the place of the files of a tokenizer that knows less.

    Raises:
        CheckpointError: one has the manifest's name.
    """
    old = {} if tokenizer is None else _found(folder, _TOKENIZER)
    for name, file in side_files(folder).items():
        if name not in old:
            (output / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(file, output / name)
    if tokenizer is not None:
        tokenizer.save_pretrained(output)
    if (output / MANIFEST_FILE).exists():
        raise CheckpointError(f"The post-trained model brings a file named {MANIFEST_FILE}, which is taken.")


def _found(folder: Path, patterns: tuple[str, ...]) -> dict[str, Path]:
    names = {
        path.relative_to(folder).as_posix() for pattern in patterns for path in folder.glob(pattern) if path.is_file()
    }
    return {name: within(folder, name) for name in sorted(names)}
