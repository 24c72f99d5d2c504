"""`apply_delta`: a delta file over its base, as a model's folder.

In: a delta file, one of `combine_deltas` as well, and the base that it was computed from. Out: a folder that is grafted
from, served and tuned on as the post-trained model itself, which it is where the file is exact. Memory holds a tensor
or two.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from ..checkpoint import (
    check_space,
    file_sha256,
    plan_shards,
    resolve,
    resumable_folder,
    unique_json,
    write_index,
    write_shards,
)
from ..errors import GraftError
from ..kinds import bytes_of
from .delta import PostTrainingDelta
from .rows import num_rows
from .side_files import write_side_files

_CONFIG = "config.json"


def apply_delta(
    file: str | Path,
    base: str | Path,
    output: str | Path,
    *,
    like: str | Path | None = None,
    shard_size: int | str = "5GB",
    overwrite: bool = False,
) -> None:
    """Write `W_0 + Delta` as a checkpoint, each weight rounded once, to the dtype of the post-trained model's.

    Args:
        file: the delta.
        base: the model that it was computed from: folder or Hub id.
        output: the folder to make; it appears whole or not at all.
        like: folder or Hub id that config, tokenizer, chat template and generation config are taken from; its weights
            are not read. None for the base.
        shard_size: most bytes of a weights file; a number, or such as `"5GB"`.
        overwrite: whether to replace an output folder that holds files.

    Raises:
        CheckpointError: an input is missing or damaged; the output exists or does not fit the disk.
        GraftError: the delta is of another base, or its vocabulary is not that of the config.
    """
    base = resolve(base)
    beside = base if like is None else resolve(like)
    weights = PostTrainingDelta.load(file, base).post_trained
    config = unique_json((beside / _CONFIG).read_text(encoding="utf-8"))
    rows = num_rows(weights)
    if rows != (expected := config.get("vocab_size", rows)):
        raise GraftError(
            f"The embeddings of {file} have {rows} rows; the config in {beside} says {expected}. The post-trained "
            "model knows other tokens: pass its folder, or one with its config and tokenizer, as `like` (--like)."
        )
    config.pop("torch_dtype", None)  # an older name
    config["dtype"] = str(next(weights.meta(name).dtype for name in weights)).removeprefix("torch.")

    def stream(skip: int) -> Iterator[tuple[str, Tensor]]:
        return ((name, weights[name]) for name in list(weights)[skip:])

    shards = plan_shards(((name, weights.meta(name)) for name in weights), bytes_of(shard_size))
    key = json.dumps([file_sha256(Path(file)), str(base), str(beside), shard_size])
    with resumable_folder(Path(output).expanduser().resolve(), key, overwrite=overwrite) as job:
        total = sum(shard.size for shard in shards)
        check_space(job.folder, total - sum((job.folder / name).stat().st_size for name in job.finished))
        with tqdm(total=total, unit="B", unit_scale=True, desc="delta", disable=None) as bar:
            write_shards(job, shards, stream, bar.update)
        write_index(job.folder, shards)
        write_side_files(job.folder, beside, None)
        (job.folder / _CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
