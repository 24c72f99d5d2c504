"""`measure`, `group` and `allocate`: from text of each language to a plan, by way of two readable files."""

from __future__ import annotations

import json
import shlex
import sys
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import fields, replace
from importlib.metadata import version
from typing import Any

import torch

from ..allocation import (
    SOURCES,
    STRATEGIES,
    LanguageGroups,
    LanguageStatistics,
    Measurement,
    allocate_experts,
    draw_groups,
    draw_statistics,
    group_languages,
    measure_languages,
)
from ..checkpoint import resolve
from ..errors import DataError
from ..files import read_text, read_texts, write_text
from ..loading import load_causal_lm, load_tokenizer
from .options import Command, Options, new_file, new_picture

MEASURE = Options()
MEASURE.add("model", required=True, help="the base model: a Hub id or a folder")
MEASURE.add("text", pairs=True, metavar="CODE=FILE", help="jsonl text of a language; twice or more")
MEASURE.add("sources", default=["similarity", "deviation"], nargs="+", choices=tuple(SOURCES), help="what to measure")
MEASURE.add("tokens", type=int, help="of a language, for all but deviation; default 5000")
MEASURE.add("steps", type=int, help="of tuning a language, for deviation; default 10")
MEASURE.add("step_sequences", type=int, help="sequences a step; default 1")
MEASURE.add("sequence_length", type=int, help="tokens; default 512")
MEASURE.add("learning_rate", type=float, help="of the tuning; default 8e-6")
MEASURE.add("vector_layers", type=int, help="last layers that tell languages apart by their weights; default 3, 0 all")
MEASURE.add("seed", type=int, help="of the choice of documents; default 0")
MEASURE.add("batch_size", type=int, default=4, help="sequences at a time; changes nothing but time and memory")
MEASURE.add("output", type=new_file, required=True, help="the JSON file to write")
MEASURE.add("merge", metavar="FILE", help="statistics of the same model and languages, to keep beside the new ones")
MEASURE.add("picture", type=new_picture, metavar="PNG", help="similarity and deviation by depth; needs matplotlib")

GROUP = Options()
GROUP.add("statistics", required=True, help="what `measure` wrote, or JSON {language: {language: similarity}}")
GROUP.add("source", default="deviation", choices=tuple(SOURCES), help="what to group by; default deviation")
GROUP.add("layers", nargs="+", type=int, help="by which layers; default: deviation the last three, others all")
GROUP.add("original", default=[], nargs="+", metavar="CODE", help="languages the base model speaks: not grouped")
GROUP.add("num_groups", type=int, help="how many groups")
GROUP.add("sizes", nargs=2, type=int, metavar=("FEWEST", "MOST"), help="or: how many languages a group")
GROUP.add("seed", type=int, default=0, help="of the resampling")
GROUP.add("output", type=new_file, required=True, help="the JSON file to write")
GROUP.add("picture", type=new_picture, metavar="PNG", help="dendrogram and heat map; needs matplotlib and scipy")

ALLOCATE = Options()
ALLOCATE.add("statistics", required=True, help="what `measure` wrote, or JSON: a number a layer, or that by language")
ALLOCATE.add("strategy", default="inverse_similarity", choices=tuple(STRATEGIES), help="default inverse_similarity")
ALLOCATE.add("budget", type=int, help="new experts over all layers")
ALLOCATE.add("groups", metavar="FILE", help="what `group` wrote")
ALLOCATE.add("language", pairs=True, metavar="CODE=GROUP", help='instead of --groups; "original" for those known')
ALLOCATE.add("floor", type=int, default=1, help="fewest new experts a layer; default 1")
ALLOCATE.add("ceiling", type=int, help="most new experts a layer")
ALLOCATE.add("threshold", type=float, default=0.6, help="of deviation_threshold; default 0.6")
ALLOCATE.add("top_layers", type=int, help="instead of a threshold: so many layers")
ALLOCATE.add("max_params", type=int, help="instead of a threshold: as many layers as these parameters pay for")
ALLOCATE.add("experts_per_group", type=int, default=1, help="in a chosen layer; default 1")
ALLOCATE.add("output", type=new_file, required=True, help="the JSON file to write")
ALLOCATE.add("picture", type=new_picture, metavar="PNG", help="the plan; needs matplotlib")


class _Texts:
    """The texts of a jsonl file, read anew each time they are gone through."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __iter__(self) -> Iterator[str]:
        return iter(read_texts(self.path))


def _measure(arguments: Namespace) -> str:
    options = MEASURE.read(arguments)
    given = {f.name: options[f.name] for f in fields(Measurement) if options[f.name] is not None}
    if given.get("vector_layers") == 0:
        given["vector_layers"] = None
    earlier = None if options["merge"] is None else LanguageStatistics.load(options["merge"])
    folder = resolve(options["model"])
    model = load_causal_lm(folder, dtype=torch.float32)
    statistics = measure_languages(
        model,
        load_tokenizer(folder),
        {code: _Texts(path) for code, path in options["text"].items()},
        sources=options["sources"],
        measurement=Measurement(**given),
        batch_size=options["batch_size"],
        progress=True,
    )
    settings = {**statistics.settings, "text": options["text"], "made": _made()}
    statistics = replace(statistics, settings=settings, model={**statistics.model, "name": options["model"]})
    if earlier is not None:
        statistics = earlier.merged(statistics)
    statistics.save(options["output"])
    if options["picture"]:
        draw_statistics(statistics, options["picture"])
    return f"{statistics.table()}\n\nstatistics: {options['output']}"


def _group(arguments: Namespace) -> str:
    options = GROUP.read(arguments)
    data = _json(options["statistics"])
    if not isinstance(data, dict):
        raise DataError(
            f"{options['statistics']}: expected {{language: {{language: number}}}}, or what `measure` wrote."
        )
    if "layers" in data and "languages" in data:
        statistics = LanguageStatistics.load(options["statistics"])
        similarity = statistics.between_languages(options["source"], options["layers"])
    else:
        similarity = data
    groups = group_languages(
        similarity,
        [code for code in similarity if code not in options["original"]],
        original=options["original"],
        num_groups=options["num_groups"],
        sizes=None if options["sizes"] is None else (options["sizes"][0], options["sizes"][-1]),
        seed=options["seed"],
    )
    groups.save(options["output"])
    if options["picture"]:
        draw_groups(groups, options["picture"])
    return f"{groups.table()}\n\ngroups: {options['output']}"


def _allocate(arguments: Namespace) -> str:
    options = ALLOCATE.read(arguments)
    languages = options["language"] or None
    if options["groups"]:
        if languages:
            raise DataError("Give --groups or --language, not both: either says which language is in which group.")
        languages = LanguageGroups.load(options["groups"]).as_languages()
    data = _json(options["statistics"])
    measured = isinstance(data, dict) and "layers" in data
    names = ("budget", "floor", "ceiling", "threshold", "top_layers", "max_params", "experts_per_group")
    plan = allocate_experts(
        LanguageStatistics.load(options["statistics"]) if measured else data,
        options["strategy"],
        languages=languages,
        **{name: options[name] for name in names},
    )
    write_text(options["output"], plan.to_json() + "\n")
    if options["picture"]:
        plan.draw(options["picture"])
    sizes = f"{plan.num_params():,} trainable parameters in full experts; " if plan.expert_params else ""
    return f"{plan.table()}\n\n{sizes}plan: {options['output']}"


def _json(path: str) -> Any:
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise DataError(f"{path} is not JSON: {error}") from error


def _made() -> dict[str, Any]:
    """What a file was made by."""
    versions = {package: version(package) for package in ("peft-moe-delta", "torch", "transformers")}
    return {"command": shlex.join(["peft-moe-delta", *sys.argv[1:]]), "versions": versions}


COMMANDS = (
    Command("measure", "how alike languages are to a model, layer by layer", MEASURE.add_arguments, _measure),
    Command("group", "which languages share experts", GROUP.add_arguments, _group),
    Command(
        "allocate", "how many experts each layer gets: a plan for MoeDeltaConfig", ALLOCATE.add_arguments, _allocate
    ),
)
