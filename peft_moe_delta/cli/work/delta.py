"""`delta`, carried out."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import torch

from ...checkpoint import ADAPTER_FILES, resolve
from ...errors import GraftError
from ...graft.adapter import Adapter
from ...graft.apply import apply_delta
from ...graft.delta import PostTrainingDelta, weights_of
from ...graft.doubts import expert_agreement
from ...graft.picture import draw_delta
from ...graft.rows import match_tokenizers, num_rows
from ...graft.stored import DeltaFile, combine_deltas
from ..options import pairs_of


def run(arguments: Namespace) -> str:
    jobs = {"compute": _compute, "inspect": _inspect, "combine": _combine, "apply": _apply}
    return jobs[arguments.job](arguments)


def _compute(arguments: Namespace) -> str:
    if arguments.rank is not None and arguments.rank < 1:
        raise GraftError(f"--rank must be at least 1; got {arguments.rank}.")
    folders = [resolve(name) for name in (arguments.base, arguments.post_trained)]
    rows = [num_rows(weights_of(folder)[0]) for folder in folders]
    vocabulary = match_tokenizers(*map(str, folders), base_rows=rows[0], post_trained_rows=rows[1])
    delta = PostTrainingDelta.from_checkpoints(folders[0], folders[1], vocabulary)
    delta.save(arguments.output, getattr(torch, arguments.dtype), rank=arguments.rank)
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
    combine_deltas(list(parts.items()), arguments.output, getattr(torch, arguments.dtype))
    return _describe(DeltaFile.open(arguments.output))


def _apply(arguments: Namespace) -> str:
    apply_delta(arguments.file, arguments.base, arguments.output, like=arguments.like, overwrite=arguments.overwrite)
    return f"{arguments.output}: {arguments.base} with {arguments.file}. Graft from it as from a post-trained model."


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
