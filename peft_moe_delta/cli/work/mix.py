"""`mix`, carried out."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from ...budget import Job, measure
from ...checkpoint import whole_folder
from ...evaluation.identification import wrong_language_or_script
from ...kinds import size_text
from ...languages import ORIGINAL_GROUP
from ...loading import load_config
from ...mixing import fit_routers, mix, mixture_config
from ...recipe.foresight import LOOKED_AT
from ...recipe.preview import table
from ...sources import read_texts
from ..options import pairs_of


def run(arguments: Namespace) -> str:
    given, branches = pairs_of("--text", arguments.text), pairs_of("--branch", arguments.branch)
    languages, options = pairs_of("--language", arguments.language) or None, _options(arguments)
    if arguments.dry_run:
        return _foreseen(arguments, branches, languages, given, options)
    texts = {code: read_texts(path, language=code) for code, path in given.items()}  # before anything is written
    with whole_folder(arguments.output) as folder:
        model = mix(arguments.seed, branches, languages, **options)
        if texts:
            fit_routers(model, texts).save(folder / "router_statistics.safetensors")
        model.save_pretrained(str(folder))
    return f"adapter: {arguments.output}\nits base: {model.active_peft_config.base_model_name_or_path}"


def _options(arguments: Namespace) -> dict[str, Any]:
    others = arguments.others
    options: dict[str, Any] = {
        "others": pairs_of("--others", others.split(","), float) if "=" in others else others,
        "base_output": arguments.base_output,
        "routing": arguments.routing,
        "top_k": arguments.top_k,
    }
    if arguments.attention_experts is not None:
        options["attention_experts"] = arguments.attention_experts
    return options


def _foreseen(
    arguments: Namespace,
    branches: dict[str, str],
    languages: dict[str, str] | None,
    given: dict[str, str],
    options: dict[str, Any],
) -> str:
    """What would be mixed, and how large it is."""
    config = mixture_config(arguments.seed, branches, languages, **options)
    first = {code: read_texts(path, language=code, documents=LOOKED_AT) for code, path in given.items()}
    measured = measure(Job(load_config(arguments.seed), config, batch_size=1, sequence_length=2, autocast=False))
    rows = [("group", "experts from", "languages")]
    for group, path in {ORIGINAL_GROUP: arguments.seed, **branches}.items():
        rows.append((group, path, ", ".join(code for code, owner in config.languages.items() if owner == group)))
    doubts = [wrong_language_or_script(texts, code, f"--text {code}={given[code]}") for code, texts in first.items()]
    lines = [table(rows), "", f"The adapter: {arguments.output}, about {size_text(measured.experts)}."]
    if arguments.base_output is not None:
        lines.append(f"Its base, with averaged weights: {arguments.base_output}, about {size_text(measured.base)}.")
    lines.append(f"Routers: {'fitted on ' + ', '.join(given) if given else 'random, as no --text is given'}.")
    return "\n".join([*lines, *(f"Doubtful: {doubt}" for doubt in doubts if doubt), "Nothing was run."])
