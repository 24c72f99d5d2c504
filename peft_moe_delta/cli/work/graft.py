"""`graft`, `lora`, `verify` and `explain`, carried out."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from ...checkpoint import ADAPTER_FILES, resolve
from ...checkpoint import verify as verified
from ...engines import ENGINES, MEASURED
from ...errors import RecipeError
from ...graft.explain import adapter_config
from ...graft.explain import explain as explained
from ...graft.files import graft_checkpoint
from ...graft.lora import to_lora
from ...kinds import size_text
from ..options import number_of, pairs_of


def _expert_scale(adapter: str, given: list[str]) -> float | dict[str, float]:
    """One number for all groups, numbers of some (the others keep 1), or both: then the one is for the others."""
    named = pairs_of("--expert-scale", [text for text in given if "=" in text], float)
    default = [number_of("--expert-scale", text) for text in given if "=" not in text]
    if len(default) > 1:
        raise RecipeError(f"--expert-scale takes one number for all groups, or GROUP=NUMBER; got {given}.")
    if not named or not default:
        return named or (default or [1.0])[0]
    groups = adapter_config(resolve(adapter, files=ADAPTER_FILES)).language_table.groups[1:]
    return {**dict.fromkeys(groups, default[0]), **named}


def graft(arguments: Namespace) -> str:
    report = graft_checkpoint(
        arguments.base,
        arguments.post_trained,
        arguments.adapter,
        arguments.output,
        scale=arguments.scale,
        expert_scale=_expert_scale(arguments.adapter, arguments.expert_scale),
        target=arguments.target,
        language=arguments.language,
        replicate_dense_layers=arguments.replicate_dense_layers,
        architecture=arguments.architecture,
        serve_with=arguments.serve_with,
        shard_size=arguments.shard_size,
        check=arguments.check,
        overwrite=arguments.overwrite,
    )
    lines = [f"{report.layout or 'adapter'} checkpoint: {arguments.output}"]
    if arguments.serve_with is not None and report.choice is not None:
        lines.append(report.choice)
    if report.max_logit_difference is not None:
        lines.append(f"largest difference of fp32 logits from the adapter: {report.max_logit_difference:.3g}")
    if report.route_agreement is not None:
        lines.append(f"routes that agree with the adapter's in 16 bits: {report.route_agreement:.2%}")
    return "\n".join(lines)


def lora(arguments: Namespace) -> str:
    made = to_lora(arguments.adapter, arguments.output, overwrite=arguments.overwrite)
    return "\n".join(
        f"{code}: {Path(arguments.output) / name if name else 'the model itself, without a LoRA'}"
        for code, name in made.items()
    )


def verify(arguments: Namespace) -> str:
    files = verified(arguments.folder)["files"]
    size = sum(file["bytes"] for file in files.values())
    return f"{arguments.folder}: {len(files)} files, {size_text(size)}, all as they were written"


def explain(arguments: Namespace) -> str:
    fits = explained(arguments.adapter, arguments.post_trained)
    lines = [f"{'no ' if fit.misfits else 'yes'}  {fit}" for fit in fits]
    rows = [("engine", *ENGINES)] + [
        (fit.target, *(fit.engines[engine] for engine in ENGINES)) for fit in fits if fit.engines and not fit.misfits
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    table = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*lines, "", f"What engines do with what fits, as measured at {MEASURED}:", *table])
