"""The pages that are made from the code: recipe reference, command line, and the engines' table of the serving page.

    python docs/generate.py            # writes docs/recipe.md, docs/command-line.md and the table in docs/serving.md
    python docs/generate.py --check    # only says whether they are what the code says

In: the recipe's dataclasses, the commands' argparse declarations and `export.engines`. Out: Markdown pages, committed
so that they can be read without building anything. A test fails when they are stale.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import re
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from peft_moe_delta.cli import COMMANDS
from peft_moe_delta.export import engines
from peft_moe_delta.recipe.fields import Recipe

PAGES = Path(__file__).parent
TABLE_BEGINS, TABLE_ENDS = "<!-- the engines' table, from export/engines.py -->", "<!-- end of the table -->"
PIPE = "\\|"  # inside a table's cell


def sections_of(kind: Any, seen: dict[str, Any]) -> dict[str, Any]:
    """Every dataclass that a recipe is made of, in the order in which a reader meets them."""
    for hint in typing.get_type_hints(kind).values():
        for part in (hint, *typing.get_args(hint), *(p for a in typing.get_args(hint) for p in typing.get_args(a))):
            if dataclasses.is_dataclass(part) and part.__name__ not in seen:
                seen[part.__name__] = part
                sections_of(part, seen)
    return seen


def meanings_of(kind: Any) -> dict[str, str]:
    """What the docstrings of a dataclass and of those it derives from say of each field."""
    found: dict[str, str] = {}
    for owner in reversed(kind.__mro__):
        text = inspect.cleandoc(owner.__doc__ or "") if dataclasses.is_dataclass(owner) else ""
        attributes = text.partition("Attributes:\n")[2].partition("\n\n")[0]
        for names, meaning in re.findall(r"^    ([\w, ]+): ((?:.|\n(?!    \w[\w, ]*: ))*)", attributes, re.MULTILINE):
            found |= {name: " ".join(meaning.split()) for name in names.split(", ")}
    return found


def type_of(hint: Any) -> str:
    """A type as a reader of YAML knows it."""
    text = hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)
    text = re.sub(r"\b(?:\w+\.)+(\w+)", r"\1", text.replace(" | None", "").replace(", NoneType]", "]"))
    text = re.sub(r"^Optional\[(.*)\]$", r"\1", text)
    text = re.sub(r"^Union\[(.*)\]$", lambda found: re.sub(r", (?![^\[]*\])", " | ", found[1]), text)
    for name, word in {"str": "text", "int": "whole number", "float": "number", "bool": "true or false"}.items():
        text = re.sub(rf"\b{name}\b", word, text)
    text = text.replace("dict[text, Any]", "section").replace("Any", "anything")
    return re.sub(r"dict\[text, (.+?)\]", r"section of \1", re.sub(r"list\[(.+?)\]", r"list of \1", text))


def default_of(field: dataclasses.Field[Any]) -> str:
    if field.default is dataclasses.MISSING:
        return "" if field.default_factory is not dataclasses.MISSING else "**required**"
    shown = str(field.default).lower() if isinstance(field.default, bool) else field.default
    return "" if field.default is None else f"`{shown}`"


def recipe_page() -> str:
    lines = [
        "# Recipe reference", "",
        "A recipe is a YAML file for `peft-moe-delta run`. Paths are relative to the folder you run it in, models may",
        "be Hub ids. `examples/demo.yaml` is a complete one. `python docs/generate.py` makes this page from the code.",
    ]  # fmt: skip
    for name, kind in sections_of(Recipe, {"Recipe": Recipe}).items():
        summary = " ".join(inspect.cleandoc(kind.__doc__ or "").partition("Attributes:")[0].split())
        lines += ["", f"## {name}", "", summary, "", "| field | type | default | meaning |", "|---|---|---|---|"]
        hints, meanings = typing.get_type_hints(kind), meanings_of(kind)
        for field in dataclasses.fields(kind):
            cells = (f"`{field.name}`", type_of(hints[field.name]), default_of(field), meanings.get(field.name, ""))
            lines.append("| " + " | ".join(cell.replace("|", PIPE) for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def command_page() -> str:
    lines = [
        "# Command line", "",
        "`peft-moe-delta COMMAND ...`, in the order of the work. Results go to standard output, progress and errors to",
        "standard error. `python docs/generate.py` makes this page from the code.",
    ]  # fmt: skip
    for command in COMMANDS:
        parser = argparse.ArgumentParser(prog=f"peft-moe-delta {command.name}")
        command.add_arguments(parser)
        lines += ["", f"## {command.name}", "", f"{command.summary[0].upper()}{command.summary[1:]}.", ""]
        lines += list(argument_rows(parser))
    return "\n".join(lines) + "\n"


def serving_page() -> str:
    """The page as it is, with the engines' table of today."""
    page = (PAGES / "serving.md").read_text(encoding="utf-8")
    before, _, rest = page.partition(TABLE_BEGINS)
    after = rest.partition(TABLE_ENDS)[2]
    versions = "\n".join(f"- {name}: {version}" for name, version in engines.ENGINES.items())
    source = f"Measured at {engines.MEASURED} with\n\n{versions}"
    return f"{before}{TABLE_BEGINS}\n\n{engines.markdown()}\n\n{source}\n\n{TABLE_ENDS}{after}"


def argument_rows(parser: argparse.ArgumentParser) -> Iterator[str]:
    """A table of a command's arguments, and one for each command that it has itself."""
    rows, inner = [], {}
    for action in parser._actions:
        if isinstance(action, argparse._HelpAction):
            continue
        if isinstance(action, argparse._SubParsersAction):
            inner = dict(action.choices)
            continue
        value = action.metavar if isinstance(action.metavar, str) else action.dest.upper()
        if action.choices:
            value = "{" + ",".join(map(str, action.choices)) + "}"
        words = [value.lower()]
        if action.option_strings:
            words = [action.option_strings[-1]] if action.nargs == 0 else [action.option_strings[-1], value]
        if action.nargs in ("+", "*"):
            words.append("...")
        rows.append(f"| `{' '.join(words)}` | {(action.help or '').replace('|', PIPE)} |")
    if rows:
        yield from ["| argument | meaning |", "|---|---|", *rows]
    for name, sub in inner.items():
        yield from ["", f"### {parser.prog.split()[-1]} {name}", "", *argument_rows(sub)]


def main() -> None:
    check = sys.argv[1:] == ["--check"]
    made = {"recipe.md": recipe_page(), "command-line.md": command_page(), "serving.md": serving_page()}
    for name, page in made.items():
        path = PAGES / name
        if check and (not path.is_file() or path.read_text(encoding="utf-8") != page):
            sys.exit(f"docs/{name} is not what the code says. Run python docs/generate.py and commit the page.")
        if not check:
            path.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
