"""`delta`: compute what post-training changed, look at it, and combine several; to share without the models."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

import torch

from ..checkpoint import ADAPTER_FILES, resolve
from ..errors import GraftError
from ..graft.adapter import Adapter
from ..graft.delta import PostTrainingDelta, weights_of
from ..graft.doubts import expert_agreement
from ..graft.picture import draw_delta
from ..graft.rows import match_tokenizers, num_rows
from ..graft.stored import DeltaFile, combine_deltas
from .options import Command, new_file, new_picture, pairs_of

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def _add_arguments(parser: ArgumentParser) -> None:
    jobs = parser.add_subparsers(dest="job", required=True, metavar="JOB")
    compute = jobs.add_parser("compute", help="post-trained minus base, into one file")
    compute.add_argument("base", help="a Hub id or a folder")
    compute.add_argument("post_trained", help="a Hub id or a folder")
    compute.add_argument("--rank", type=int, help="keep only this rank of every matrix, by SVD")
    inspect = jobs.add_parser("inspect", help="how large it is, part by part, and whether grafting looks doubtful")
    inspect.add_argument("file")
    inspect.add_argument("--base", help="with --adapter: the base model, a Hub id or a folder")
    inspect.add_argument("--adapter", help="compare with what an adapter's experts learnt: a Hub id or a folder")
    inspect.add_argument(
        "--picture", type=new_picture, help="draw it layer by layer: a .png, .svg or .pdf to write; needs matplotlib"
    )
    combine = jobs.add_parser("combine", help="a weighted sum of deltas over one base")
    combine.add_argument("--delta", action="append", required=True, metavar="FILE=WEIGHT", help="once or more")
    for job, run in ((compute, _compute), (inspect, _inspect), (combine, _combine)):
        if job is not inspect:
            job.add_argument("--dtype", choices=DTYPES, default="float32", help="that it is stored in; default float32")
            job.add_argument("--output", type=new_file, required=True, help="the file to write")
        job.set_defaults(do=run)


def _run(arguments: Namespace) -> str:
    result: str = arguments.do(arguments)
    return result


def _compute(arguments: Namespace) -> str:
    if arguments.rank is not None and arguments.rank < 1:
        raise GraftError(f"--rank must be at least 1; got {arguments.rank}.")
    folders = [resolve(name) for name in (arguments.base, arguments.post_trained)]
    rows = [num_rows(weights_of(folder)[0]) for folder in folders]
    vocabulary = match_tokenizers(*map(str, folders), base_rows=rows[0], post_trained_rows=rows[1])
    delta = PostTrainingDelta.from_checkpoints(folders[0], folders[1], vocabulary)
    delta.save(arguments.output, DTYPES[arguments.dtype], rank=arguments.rank)
    return _describe(DeltaFile.open(arguments.output))


def _inspect(arguments: Namespace) -> str:
    if (arguments.base is None) != (arguments.adapter is None):
        raise GraftError("--base and --adapter go together: an expert's own change is its weight minus the base's.")
    delta = DeltaFile.open(arguments.file)
    text = _describe(delta)
    if arguments.adapter is not None:
        adapter = Adapter.of_folder(resolve(arguments.adapter, files=ADAPTER_FILES))
        found = expert_agreement(delta, weights_of(arguments.base)[0], adapter)
        rows = [f"| {row.expert} | {row.cosine:+.3f} | {row.lowest:+.3f} | {row.tensor} |" for row in found]
        text += "\n\n| expert | cosine of delta and own change | lowest of a tensor | which |\n|---|---:|---:|---|\n"
        text += "\n".join(rows)
        text += "".join(f"\n\nDoubtful: {row.doubt}. Score the graft before you ship it." for row in found if row.doubt)
    if arguments.picture is not None:
        draw_delta(delta, arguments.picture)
        text += f"\n\npicture: {arguments.picture}"
    return text


def _combine(arguments: Namespace) -> str:
    parts = pairs_of("--delta", arguments.delta, float)
    combine_deltas(list(parts.items()), arguments.output, DTYPES[arguments.dtype])
    return _describe(DeltaFile.open(arguments.output))


def _describe(delta: DeltaFile) -> str:
    """A table of the parts, how exact the file is, and doubts."""
    report = delta.report()
    lines = [
        "| part | norm of delta | over norm of weights | error of what is stored |",
        "|---|---:|---:|---:|",
        *(f"| {row.family} | {row.delta_norm:.4g} | {row.ratio:.2%} | {row.error:.2e} |" for row in report.families),
        "",
    ]
    stored = delta.tensors.values()
    total = sum(torch.Size(tensor.shape).numel() for tensor in stored)
    corrected = sum(tensor.corrected for tensor in stored)
    differing = [tensor.differing for tensor in stored]
    low_rank = sum(tensor.rank is not None for tensor in stored)
    size = Path(delta.path).stat().st_size
    lines.append(f"{delta.path}: {len(delta.tensors)} tensors, {low_rank} in low rank, {size:,} bytes.")
    if None in differing:
        lines.append("A combination: there is no post-trained model to come back to.")
    elif any(differing):
        lines.append(f"{sum(filter(None, differing)) / total:.2%} of the post-trained weights come back otherwise.")
    else:
        lines.append(f"The post-trained weights come back bit for bit ({corrected / total:.4%} are stored themselves).")
    lines += [f"\nDoubtful: {reason}. Score the graft before you ship it." for reason in report.doubtful]
    return "\n".join(lines)


COMMANDS = (Command("delta", "what post-training changed: compute, inspect, combine", _add_arguments, _run),)
