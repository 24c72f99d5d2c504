"""One of several processes: `python -m engines.worker RANK WORLD FOLDER CASE...`, each case `engine/routing/stage`.

Leaves a line of JSON for each case in `FOLDER/RANK.jsonl`: equal and by how much, refused, or broken. It stops at what
is broken, because the processes are then apart.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
import warnings
from datetime import timedelta
from pathlib import Path

import torch
from torch import Tensor, distributed

from engines.cases import STAGES, Case, reference
from engines.engines import ENGINES, Refusal
from peft_moe_delta.errors import PeftMoeDeltaError

TOLERANCE = 1e-5


def difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[float, str]:
    """The largest, relative to a tensor's own size where that is above 1, and where it is."""
    worst, where = 0.0, ""
    for name, tensor in found.items():
        apart = float((tensor - expected[name]).abs().max() / expected[name].abs().max().clamp(min=1))
        if not apart <= worst:
            worst, where = apart, name
    return worst, where


def outcome(case: Case, stage: str, expected: dict[str, Tensor]) -> dict[str, str | float]:
    """What came of a case, in this process."""
    torch.manual_seed(0)
    case.engine.launch()
    try:
        found = STAGES[stage](case)
    except (PeftMoeDeltaError, Refusal) as error:
        return {"outcome": "refused", "message": str(error)}
    except Exception as error:  # an engine may raise anything
        return {"outcome": "broken", "message": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
    if not found or not found.keys() <= expected.keys():
        return {"outcome": "broken", "message": f"other names: {sorted(found.keys() - expected.keys())[:2]}"}
    apart, where = difference(found, expected)
    if apart <= TOLERANCE:
        return {"outcome": "equal", "difference": apart}
    return {"outcome": "wrong", "message": where, "difference": apart}


def main(rank: int, world: int, folder: Path, cases: list[str]) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    patience = timedelta(seconds=float(os.environ["PATIENCE"]))
    distributed.init_process_group("gloo", rank=rank, world_size=world, timeout=patience)
    for number, each in enumerate(cases):
        engine, routing, stage = each.split("/")
        place = folder / str(number)
        if rank == 0:
            place.mkdir()
        distributed.barrier()
        expected = torch.load(reference(folder.parent, routing, stage), weights_only=True)
        result = outcome(Case(ENGINES[engine], routing, rank, place), stage, expected)
        with (folder / f"{rank}.jsonl").open("a") as file:
            file.write(json.dumps({"case": each, **result}) + "\n")
        if result["outcome"] == "broken":
            break
    sys.stdout.flush()
    os._exit(0)  # a group whose peers are gone would be waited for


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
