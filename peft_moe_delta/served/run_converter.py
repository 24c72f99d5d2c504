"""llama.cpp's converter, run in a process of its own: `python run_converter.py SCRIPT PRE_TOKENIZER ARGUMENT...`.

llama.cpp knows a pre-tokenizer, which cuts text before anything is merged into tokens, by a hash of the tokens of one
text. New tokens change that hash and not the cutting. So PRE_TOKENIZER is a name that llama.cpp has for one, or the
absolute path of a tokenizer that llama.cpp knows, or empty, which leaves it to the converter.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def main(script: str, pre_tokenizer: str, *arguments: str) -> None:
    """Run the script's `main` as if it had been called with these arguments."""
    sys.path[0] = str(Path(script).parent)  # in place of this file's folder, whose gguf.py is not the package
    converter: Any = importlib.import_module(Path(script).stem)
    if pre_tokenizer:
        # The classes are in the script itself, or since 2026 in a package beside it.
        classes: Any = converter if hasattr(converter, "TextModel") else importlib.import_module("conversion")
        classes.TextModel.get_vocab_base_pre = told(classes.TextModel.get_vocab_base_pre, pre_tokenizer)
    sys.argv = [script, *arguments]
    converter.main()


def told(own: Callable[..., str], pre_tokenizer: str) -> Callable[..., str]:
    """What the converter asks for the pre-tokenizer of a tokenizer: as it is told, whatever the tokenizer."""
    if not Path(pre_tokenizer).is_absolute():
        return lambda model, tokenizer: pre_tokenizer
    other = importlib.import_module("transformers").AutoTokenizer.from_pretrained(pre_tokenizer)
    return lambda model, tokenizer: own(model, other)


if __name__ == "__main__":
    main(*sys.argv[1:])
