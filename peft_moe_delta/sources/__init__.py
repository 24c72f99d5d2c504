"""Text and tasks from wherever people keep them: the one reader of recipes, growth files and commands.

- `source`: what a recipe or a command line says about where text is
- `places`: the files that it means; `formats`: the rows of a file; `hub`: the rows of a data set on the Hub
- `reading`: documents and tasks of these rows
"""

from .places import files_of, is_on_hub
from .reading import POOL_BYTES, Documents, each_text, pool, read_tasks, read_texts
from .source import Source, TaskSource, TextSource, source_of

__all__ = [
    "Source", "TextSource", "TaskSource", "source_of", "files_of", "is_on_hub",
    "each_text", "read_texts", "read_tasks", "Documents", "pool", "POOL_BYTES",
]  # fmt: skip
