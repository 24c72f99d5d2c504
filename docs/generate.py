"""What is made from the code: the recipe reference with its JSON Schema, the command line, tables of docs/serving.md.

    python docs/generate.py            # writes them
    python docs/generate.py --check    # only says whether they are what the code says

In: the dataclasses of recipes and growth files, the commands' argparse declarations, `engines`, and what
tests/served_table.py and tests/served_demo.py have found. Out: two Markdown pages, the tables in docs/serving.md and a
schema that lies in the package, committed so that they can be read without building anything. A test fails when they
are stale.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
import re
import statistics
import sys
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union

from peft_moe_delta import engines
from peft_moe_delta.cli import COMMANDS, failure
from peft_moe_delta.kinds import Switch, Within
from peft_moe_delta.recipe.fields import Recipe
from peft_moe_delta.recipe.growth import Growth

ROOT = Path(__file__).parents[1]
TABLE_BEGINS, TABLE_ENDS = "<!-- the table of engines.py -->", "<!-- end of the table -->"
ENGINES_FOUND = "docs/engines.json"
SERVED_BEGINS, SERVED_FOUND = "<!-- the table of served_demo.json -->", "docs/served_demo.json"
SCHEMA = "peft_moe_delta/recipe/recipe.schema.json"
PIPE = "\\|"  # inside a table's cell
WORDS = {str: "text", int: "whole number", float: "number", bool: "true or false", Any: "anything"}
JSON_TYPES = {
    str: {"type": "string", "minLength": 1}, int: {"type": "integer"}, float: {"type": "number"},
    bool: {"type": "boolean"}, types.NoneType: {"type": "null"}, Any: {},
}  # fmt: skip

RECIPE_INTRODUCTION = f"""\
# Recipe reference

A recipe is a YAML file for `peft-moe-delta run`. Paths are relative to the folder you run it in, models may be Hub
ids. `examples/demo.yaml` is a complete one. `python docs/generate.py` makes this page from the code.

The YAML is version 1.2: `no` is the language Norwegian, and `1e-3` is a number. Two ways change a recipe for one run:
a section `quick`, with any of the fields again, is laid over the rest by `--quick`, and `--set expand.steps=200`
changes one field. `peft-moe-delta init` writes a first one, and `run --dry-run` checks it: see the
[quickstart](quickstart.md).

Editors that know JSON Schema complete and check a recipe with `{SCHEMA}`, which
is installed with the package. The recipe's first line names the file:

```yaml
# yaml-language-server: $schema=PATH/TO/recipe.schema.json
```

The last sections are those of a growth file, for `peft-moe-delta grow`.

## Runs that stop and go on

`run` and `train` leave one folder for each step in `output`, and keep what is finished. A step depends on what it
reads: the content of its files (under any name), every file of a model, the fields of the recipe that concern it, and
the steps before it. Where one of these changes, the steps that read it run again, and `peft-moe-delta status` says
which and why. How often a training is saved is not among them.

- **Ctrl-C or SIGTERM** ends a run with one line. A training first finishes the step it is in and saves a checkpoint,
  hidden beside the step's place (`.expanded.checkpoints`). `kill` sends SIGTERM, and so do schedulers such as Slurm,
  which must leave time for a step and a checkpoint before they send SIGKILL. The same command goes on from there, and
  its result is the same, byte for byte, as without the interruption, as far as the machine computes the same twice.
  Only times, speeds and memory are its own: in `step.json`, in the last line of `log.json`, and in the report. A second
  signal ends the run at once, without a checkpoint.
- A checkpoint belongs to one training. When the recipe, a model or text has changed for it, the training begins anew
  and says why. Checkpoints are removed when the training is finished.
- Against crashes, `trainer: {{save_steps: 500}}` saves every 500 steps as well, and keeps the last one.
  A checkpoint takes about three times the room of what is trained. The optimizer's part of it is a file of PyTorch's,
  as Trainer writes it, and is loaded with `weights_only=True`.
- **A finished training is never replaced unasked.** If it would run again, the run stops and says why. `--overwrite`
  replaces it, another `output` keeps both. The same goes for any result that somebody has edited. Scores, grafts and
  whatever else takes no training are made again without asking.
"""
COMMAND_INTRODUCTION = """\
# Command line

`peft-moe-delta COMMAND ...`, in the order of the work; `python -m peft_moe_delta` is the same program. Results go to
standard output, progress and errors to standard error. `python docs/generate.py` makes this page from the code.

`--help` lists what a command takes, `--version` says which version this is. `--quiet` leaves the result, warnings and
errors alone. `--verbose` adds the log of other libraries, and where an error arose. Both may stand anywhere.

Nothing is coloured, and an error is one line, as is the end after Ctrl-C or SIGTERM, which leaves nothing half done.
`run` and `train` then go on where they were when they are started again: see
[runs that stop and go on](recipe.md#runs-that-stop-and-go-on). So does a graft from files, from what it keeps hidden
beside its output.

The exit status is 0, or tells the kind of error:

{statuses}

To complete commands and options with the tab key, install the extra `completion` and put
`eval "$(register-python-argcomplete peft-moe-delta)"` into your shell's start file."""


def parts_of(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    """An annotation and what it is made of: `(dict, (str, int))`, `(Union, (int, NoneType))`, `(int, ())`."""
    origin = typing.get_origin(hint) or hint
    return (Union if origin is types.UnionType else origin), typing.get_args(hint)


def sections_of(kind: Any, seen: dict[str, Any]) -> dict[str, Any]:
    """Every dataclass that a kind is made of, itself first, in the order in which a reader meets them."""
    if dataclasses.is_dataclass(kind) and kind.__name__ not in seen:
        seen[kind.__name__] = kind
        for hint in typing.get_type_hints(kind).values():
            sections_of(hint, seen)
    for part in typing.get_args(kind):
        sections_of(part, seen)
    return seen


def meanings_of(kind: Any) -> dict[str, str]:
    """What the docstrings of a dataclass and of those it derives from say of each field."""
    found: dict[str, str] = {}
    for owner in reversed(kind.__mro__):
        text = inspect.cleandoc(owner.__doc__ or "") if dataclasses.is_dataclass(owner) else ""
        attributes = text.partition("Attributes:\n")[2].partition("\n\n")[0]
        for names, meaning in re.findall(r"^    ([\w, ]+): ((?:.|\n(?!    \w[\w, ]*: ))*)", attributes, re.MULTILINE):
            found |= dict.fromkeys(names.split(", "), as_yaml(meaning))
    if silent := [field.name for field in dataclasses.fields(kind) if field.name not in found]:
        sys.exit(f"{kind.__name__}: its docstring does not say what {', '.join(silent)} means. Say it there.")
    return found


def summary_of(kind: Any) -> str:
    return as_yaml(inspect.cleandoc(kind.__doc__ or "").partition("Attributes:")[0])


def as_yaml(text: str) -> str:
    """A line that calls things as a recipe does."""
    return re.sub(r"\bNone\b", "null", " ".join(text.split()))


def is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is field.default_factory is dataclasses.MISSING


def type_of(hint: Any) -> str:
    """A type as a reader of YAML knows it, with links to the sections."""
    origin, args = parts_of(hint)
    if origin is Annotated:
        bounds = str(args[1]) if isinstance(args[1], Within) else ", or true or false"
        return f"{type_of(args[0])}{bounds}"
    if origin is Union:
        return " or ".join(type_of(part) for part in args if part is not types.NoneType)
    if origin is Literal:
        return " or ".join(f"`{choice}`" for choice in args)
    if origin is dict:
        return "section" if args[1] is Any else f"section of {many(args[1])}"
    if origin is list:
        return f"list of {many(args[0])}"
    return WORDS.get(origin) or f"[{origin.__name__}](#{origin.__name__.lower()})"


def many(hint: Any) -> str:
    return re.sub(r"\bnumber\b", "numbers", type_of(hint))


def default_of(field: dataclasses.Field[Any]) -> str:
    if is_required(field):
        return "**required**"
    if field.default is dataclasses.MISSING or field.default is None:
        return ""
    return f"`{json.dumps(field.default) if isinstance(field.default, bool) else field.default}`"


def recipe_page() -> str:
    recipe, growth = sections_of(Recipe, {}), sections_of(Growth, {})
    own = [kind for name, kind in growth.items() if name not in recipe]
    tables = [line for kind in (*recipe.values(), *own) for line in section_lines(kind)]
    return RECIPE_INTRODUCTION + "\n".join(tables) + "\n"


def section_lines(kind: Any) -> Iterator[str]:
    """A dataclass as a heading and a table of its fields."""
    yield from ["", f"## {kind.__name__}", "", summary_of(kind), ""]
    yield from ["| field | type | default | meaning |", "|---|---|---|---|"]
    hints, meanings = typing.get_type_hints(kind, include_extras=True), meanings_of(kind)
    for field in dataclasses.fields(kind):
        cells = (f"`{field.name}`", type_of(hints[field.name]), default_of(field), meanings[field.name])
        yield "| " + " | ".join(cell.replace("|", PIPE) for cell in cells) + " |"


def recipe_schema() -> str:
    """JSON Schema, draft 7, which is what editors of YAML know best. `quick` has the same fields, none required."""
    kinds = sections_of(Recipe, {})
    whole = {name: schema_of_section(kind, "") for name, kind in kinds.items()}
    quick = {f"{name} in quick": schema_of_section(kind, " in quick") for name, kind in kinds.items()}
    whole["Recipe"]["properties"]["quick"] = {
        "description": "what `--quick` lays over the rest.", "allOf": [{"$ref": "#/definitions/Recipe in quick"}],
    }  # fmt: skip
    schema = {
        "$schema": "http://json-schema.org/draft-07/schema#", "title": "A recipe of peft-moe-delta",
        "allOf": [{"$ref": "#/definitions/Recipe"}], "definitions": whole | quick,
    }  # fmt: skip
    return json.dumps(schema, indent=1, ensure_ascii=False) + "\n"


def schema_of_section(kind: Any, suffix: str) -> dict[str, Any]:
    """A dataclass; with a suffix, its form that requires nothing."""
    hints, meanings = typing.get_type_hints(kind, include_extras=True), meanings_of(kind)
    properties = {}
    for field in dataclasses.fields(kind):
        shown = {"description": meanings[field.name]}
        if isinstance(field.default, str | int | float):
            shown["default"] = field.default
        properties[field.name] = shown | schema_of(hints[field.name], suffix)
    required = [field.name for field in dataclasses.fields(kind) if is_required(field) and not suffix]
    section = {"description": summary_of(kind), "type": "object", "additionalProperties": False}
    return section | {"properties": properties} | ({"required": required} if required else {})


def schema_of(hint: Any, suffix: str) -> dict[str, Any]:
    origin, args = parts_of(hint)
    if origin is Annotated and isinstance(args[1], Switch):
        return {"anyOf": [schema_of(args[0], suffix), JSON_TYPES[bool]]}
    if origin is Annotated:
        bounds = {"minimum": args[1].low, "maximum": args[1].high}
        return schema_of(args[0], suffix) | {name: bound for name, bound in bounds.items() if abs(bound) < float("inf")}
    if origin is Union:
        return {"anyOf": [schema_of(part, suffix) for part in args]}
    if origin is Literal:
        return {"enum": list(args)}
    if origin is dict:
        return {"type": "object", "additionalProperties": schema_of(args[1], suffix)}
    if origin is list:
        return {"type": "array", "items": schema_of(args[0], suffix)}
    if dataclasses.is_dataclass(origin):
        return {"allOf": [{"$ref": f"#/definitions/{origin.__name__}{suffix}"}]}
    return JSON_TYPES[origin]


def command_page() -> str:
    statuses = inspect.cleandoc(failure.__doc__ or "").split("\n\n")[1]
    lines = [COMMAND_INTRODUCTION.format(statuses=statuses)]
    for command in COMMANDS:
        parser = argparse.ArgumentParser(prog=f"peft-moe-delta {command.name}")
        command.add_arguments(parser)
        lines += ["", f"## {command.name}", "", f"{command.summary[0].upper()}{command.summary[1:]}.", ""]
        lines += list(argument_rows(parser))
    return "\n".join(lines) + "\n"


def serving_page() -> str:
    """The page as it is, with the tables of today."""
    page = (ROOT / "docs/serving.md").read_text(encoding="utf-8")
    found = json.loads((ROOT / ENGINES_FOUND).read_text(encoding="utf-8"))
    versions = "\n".join(
        f"- {name}: {found[name]['version'] if name in found else version}" for name, version in engines.ENGINES.items()
    )
    source = f"The versions, of cells with a number; the others were found at {engines.MEASURED}:\n\n{versions}"
    page = with_table(page, TABLE_BEGINS, f"{engines_table(found)}\n\n{source}")
    demo = json.loads((ROOT / SERVED_FOUND).read_text(encoding="utf-8"))
    return with_table(page, SERVED_BEGINS, served_demo_table(demo))


def with_table(page: str, begins: str, table: str) -> str:
    """A page with a table in the place of the one that begins there."""
    before, _, rest = page.partition(begins)
    return f"{before}{begins}\n\n{table}\n\n{TABLE_ENDS}{rest.partition(TABLE_ENDS)[2]}"


def engines_table(found: dict[str, Any]) -> str:
    """Forms by engines: what we know, and what tests/served_table.py has found."""
    names = list(engines.ENGINES)
    lines = [f"| export | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for row in engines.ROWS:
        cells = [engine_cell(row[name], found.get(name, {}).get("forms", {}).get(row.form)) for name in names]
        lines.append(f"| {row.form} | {' | '.join(cells)} |")
    return "\n".join(lines)


def engine_cell(known: str, found: dict[str, Any] | None) -> str:
    """What we do with a form for an engine, with the largest difference that was found."""
    said = known if engines.runs(known) else f"refused: {known}"
    if found is None or found["outcome"] == "fails":
        return said
    number = "NaN" if found["difference"] is None else f"{found['difference']:.1g}"
    if found["outcome"] == "exact" and engines.runs(known):
        return f"exact{known.removeprefix(engines.OK).removeprefix(engines.NOT_RUN)} ({number})"
    return f"{said} ({'exact here, ' if found['outcome'] == 'exact' else ''}{number})"


def served_demo_table(found: dict[str, Any]) -> str:
    """Models by servers, as tests/served_demo.py has found them, and on what machine."""
    many = f"{found['at_once']} at once (llama.cpp takes one after another)"
    heads = ["model", "server", "MB of weights", "tokens/s, one at a time", f"tokens/s, {many}"]
    heads += ["mixture / dense, one at a time, at once", "beside transformers"]
    heads.append(f"answers beside {found['rows'][0]['server']}'s")
    lines = [f"| {' | '.join(heads)} |", "|---|---|---:|---:|---:|---|---|---|"]
    for row in found["rows"]:
        ratio = "" if row["ratio"] is None else ", ".join(f"{row['ratio'][how]:.2f}" for how in ("one", "many"))
        cells = [row["model"], row["server"], str(row["MB"]), rate_cell(row["one"]), rate_cell(row["many"]), ratio]
        lines.append(f"| {' | '.join([*cells, verified_cell(row['verified']), answers_cell(row['parts_at'])])} |")
    rounds = "of one round" if found["rounds"] == 1 else f"the median of {found['rounds']} rounds, with quartiles"
    said = f"Tokens per second are {rounds}, for answers of at most {found['max_tokens']} tokens. {found['machine']}"
    return "\n".join([*lines, "", said])


def rate_cell(rates: list[float]) -> str:
    """The median of the rounds, with their quartiles where there are several."""
    if len(rates) == 1:
        return f"{rates[0]:.1f}"
    low, median, high = statistics.quantiles(rates, n=4, method="inclusive")
    return f"{median:.1f} ({low:.1f} to {high:.1f})"


def verified_cell(verified: dict[str, Any]) -> str:
    """What `verify-served` has found."""
    if "error" in verified:
        return f"not compared: {verified['error'].replace('|', PIPE)}"
    largest = "no number" if verified["largest"] is None else f"largest difference {verified['largest']:.1g}"
    return f"{'agrees' if verified['agrees'] else 'differs'} within {verified['tolerance']:.2g}, {largest}"


def answers_cell(parts_at: dict[str, int | None] | None) -> str:
    """Where answers leave those of the first server; empty where there is nothing to compare."""
    if parts_at is None:
        return ""
    if not any(parts_at.values()):
        return "the same"
    return ", ".join(
        f"{language}: {'the same' if place is None else f'from word {place}'}" for language, place in parts_at.items()
    )


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
    made = {
        "docs/recipe.md": recipe_page(),
        SCHEMA: recipe_schema(),
        "docs/command-line.md": command_page(),
        "docs/serving.md": serving_page(),
    }
    for name, text in made.items():
        path = ROOT / name
        if check and (not path.is_file() or path.read_text(encoding="utf-8") != text):
            sys.exit(f"{name} is not what the code says. Run python docs/generate.py and commit it.")
        if not check:
            path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
