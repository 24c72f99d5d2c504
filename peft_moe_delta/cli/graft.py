"""`graft`, `lora`, `verify`, `explain`: files from files, whether they are still what was written, what would fit."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from ..checkpoint import ADAPTER_FILES, resolve, verify
from ..errors import RecipeError
from ..export import ENGINES, MOE_LAYOUTS
from ..export.engines import MEASURED
from ..graft.explain import adapter_config, explain
from ..graft.files import graft_checkpoint
from ..graft.lora import to_lora
from .options import Command, new_folder, number_of, pairs_of


def _add_graft_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("base", help="the model that the adapter was trained on: folder or Hub id, as the next two")
    parser.add_argument("post_trained", help="its post-trained descendant")
    parser.add_argument("adapter", help="the trained adapter")
    parser.add_argument("output", type=new_folder, help="the folder to make")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the post-training delta (1)")
    parser.add_argument(
        "--expert-scale", action="append", default=[], metavar="A | GROUP=A",
        help="share of the experts' own change (1): of all, or of a group; both together: of a group and of the others",
    )  # fmt: skip
    parser.add_argument(
        "--target", choices=("stock", "remote_code", "adapter"), default="stock",
        help="a stand-alone checkpoint (stock), one with a modelling file of its own, which holds what no stock "
        "architecture does, or an adapter over the post-trained model",
    )  # fmt: skip
    parser.add_argument("--language", help="for routing by language: what this language runs on")
    parser.add_argument(
        "--replicate-dense-layers", action="store_true",
        help="where no architecture keeps dense layers, write copies of their one expert",
    )  # fmt: skip
    parser.add_argument(
        "--for", dest="serve_with", choices=tuple(ENGINES),
        help="the engine that is to run it: takes a form that it runs exactly, or says what fits",
    )  # fmt: skip
    parser.add_argument(
        "--architecture", choices=tuple(dict.fromkeys(layout.name for layout in MOE_LAYOUTS)),
        help="the stock architecture to take (default: the first that is exact)",
    )  # fmt: skip
    parser.add_argument("--shard-size", default="5GB", help="most bytes of a weights file (5GB)")
    parser.add_argument("--check", action="store_true", help="compare logits with the adapter's; builds both models")
    parser.add_argument("--overwrite", action="store_true", help="replace an output folder that holds files")


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


def _graft(arguments: Namespace) -> str:
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


def _add_verify_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("folder", help="a folder that `graft` has written")


def _verify(arguments: Namespace) -> str:
    files = verify(arguments.folder)["files"]
    size = sum(file["bytes"] for file in files.values())
    return f"{arguments.folder}: {len(files)} files, {size / 1e9:,.3f} GB, all as they were written"


def _add_explain_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("adapter", help="folder or Hub id of the adapter; only its config is read")
    parser.add_argument("--post-trained", help="the model it is to be grafted onto; default: the adapter's base model")


def _explain(arguments: Namespace) -> str:
    fits = explain(arguments.adapter, arguments.post_trained)
    lines = [f"{'no ' if fit.misfits else 'yes'}  {fit}" for fit in fits]
    rows = [("engine", *ENGINES)] + [
        (fit.target, *(fit.engines[engine] for engine in ENGINES)) for fit in fits if fit.engines and not fit.misfits
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    table = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*lines, "", f"What engines do with what fits, as measured at {MEASURED}:", *table])


def _add_lora_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("adapter", help="a grafted adapter (`graft --target adapter`): folder or Hub id")
    parser.add_argument("output", type=new_folder, help="the folder to make, with a LoRA for each new language")
    parser.add_argument("--overwrite", action="store_true", help="replace an output folder that holds files")


def _lora(arguments: Namespace) -> str:
    made = to_lora(arguments.adapter, arguments.output, overwrite=arguments.overwrite)
    return "\n".join(
        f"{code}: {Path(arguments.output) / name if name else 'the model itself, without a LoRA'}"
        for code, name in made.items()
    )


COMMANDS = (
    Command("graft", "graft an adapter onto the post-trained model, from files to files", _add_graft_arguments, _graft),
    Command("lora", "an adapter's languages as LoRA folders, for servers that load many", _add_lora_arguments, _lora),
    Command("verify", "check a grafted folder against its manifest", _add_verify_arguments, _verify),
    Command("explain", "what an adapter can be shipped as, and why", _add_explain_arguments, _explain),
)
