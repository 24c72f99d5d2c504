"""The README that PEFT writes beside an adapter, with the lines that load it: PEFT alone does not know the method."""

from __future__ import annotations

from pathlib import Path

from ..files import read_text, write_text

_UNSAID = "Use the code below to get started with the model.\n\n[More Information Needed]"
_SAID = """\
```python
import peft_moe_delta  # from here on PEFT's own loaders know the adapter, too

model, tokenizer = peft_moe_delta.load("this-folder")
```"""


def say_how_to_load(readme: Path) -> None:
    """Fill in what PEFT's template leaves open; any other README stays as it is."""
    if not readme.is_file():
        return
    text = read_text(readme)
    if _UNSAID in text:
        write_text(readme, text.replace(_UNSAID, _SAID, 1))
