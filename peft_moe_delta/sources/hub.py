"""The rows of a data set on the Hub, streamed: nothing but what is asked for is downloaded, and nothing is kept.

In: `hf://owner/name`. Out: its rows, as those of a file.
"""

from __future__ import annotations

from collections.abc import Iterator

from ..errors import DataError
from .formats import Row
from .places import HUB
from .source import Source


def name_of(path: str) -> str:
    """`hf://owner/name`, or `hf://datasets/owner/name` as the Hub writes it, as `owner/name`."""
    return path.removeprefix(HUB).removeprefix("datasets/").strip("/")


def hub_rows(path: str, source: Source) -> Iterator[Row]:
    """The rows of a data set.

    Raises:
        DataError: there is none, or no such configuration or split; or the Hub is out of reach.
    """
    import datasets

    try:
        found = datasets.load_dataset(name_of(path), source.config, split=source.split, streaming=True)
        if set(source.required) <= set(found.column_names or ()):
            found = found.select_columns([name for name in found.column_names if name in source.columns])
        for number, row in enumerate(found, start=1):
            yield f"{path}, row {number}", row
    except Exception as error:  # of the Hub, of the network, or of whichever reader the data set needs
        reason = " ".join(str(error).split()) or type(error).__name__
        asked = f"config {source.config!r}, split {source.split!r}"
        raise DataError(
            f"Cannot read the data set {path} ({asked}): {reason}. Check name, `config` and `split`; for a private or "
            "gated one, log in with `hf auth login`."
        ) from error


def revision_of(path: str) -> str:
    """The commit of a data set, which stands for its content.

    Raises:
        DataError: the Hub does not say.
    """
    from huggingface_hub import HfApi

    try:
        return str(HfApi().dataset_info(name_of(path)).sha)
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"Cannot ask the Hub for the data set {path}: {reason}. Check its name.") from error
