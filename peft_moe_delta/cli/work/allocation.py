"""`measure`, `group` and `allocate`, carried out."""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import fields, replace
from importlib.metadata import version
from typing import Any

import torch

from ...allocation import (
    LanguageGroups,
    LanguageStatistics,
    Measurement,
    allocate_experts,
    draw_groups,
    draw_statistics,
    group_languages,
    measure_languages,
)
from ...checkpoint import resolve
from ...errors import DataError
from ...files import read_text, write_text
from ...loading import load_causal_lm, load_tokenizer
from ...sources import Documents


def measure(options: dict[str, Any]) -> str:
    given = {f.name: options[f.name] for f in fields(Measurement) if options[f.name] is not None}
    if given.get("vector_layers") == 0:
        given["vector_layers"] = None
    earlier = None if options["merge"] is None else LanguageStatistics.load(options["merge"])
    folder = resolve(options["model"])
    model = load_causal_lm(folder, dtype=torch.float32)
    statistics = measure_languages(
        model,
        load_tokenizer(folder),
        {code: Documents(path, code) for code, path in options["text"].items()},
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


def group(options: dict[str, Any]) -> str:
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


def allocate(options: dict[str, Any]) -> str:
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
