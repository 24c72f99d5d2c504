"""Starts the processes of engines, as often as their cases need, and puts together what they found.

A case is `engine/routing/stage`. Its outcome is a dictionary: `outcome` is equal, refused, wrong or broken, with
`difference` from one process, `message` and `trace` where there are any.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from engines.cases import STAGES, WORLD, Case, reference
from engines.engines import Engine
from peft_moe_delta.errors import PeftMoeDeltaError

HERE = Path(__file__).resolve().parent
PATIENCE = 60
"""Seconds for which a process waits for another."""
ORDER = ("equal", "refused", "wrong", "broken")

Outcome = dict[str, Any]


def references(folder: Path, cases: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """What one process finds for a routing and a stage, once for all engines. Returns those it does not refuse."""
    possible = []
    for number, (routing, stage) in enumerate(cases):
        place = folder / f"reference{number}"
        place.mkdir()
        torch.manual_seed(0)
        try:
            found = STAGES[stage](Case(Engine, routing, None, place))
        except PeftMoeDeltaError:
            continue
        torch.save(found, reference(folder, routing, stage))
        possible.append((routing, stage))
    return possible


def outcomes(cases: Sequence[str], folder: Path) -> dict[str, Outcome]:
    """All cases; after a broken one the processes are started anew for the rest."""
    found: dict[str, Outcome] = {}
    while left := [case for case in cases if case not in found]:
        found |= _run(left, folder)
    return found


def _run(cases: Sequence[str], folder: Path) -> dict[str, Outcome]:
    """One start of the processes: the cases that they came to."""
    place = Path(tempfile.mkdtemp(dir=folder))
    log = place / "log"
    with log.open("w") as file:
        processes = [_start(rank, port, place, cases, file) for port in [_free_port()] for rank in range(WORLD)]
        for process in processes:
            process.wait()
    ranks = [_read(place / f"{rank}.jsonl") for rank in range(WORLD)]
    came_to = [case for case in cases if any(case in rank for rank in ranks)]
    if not came_to:
        return {cases[0]: {"outcome": "broken", "message": log.read_text()[-2000:]}}
    return {case: _joint([rank.get(case) for rank in ranks]) for case in came_to}


def _start(rank: int, port: int, place: Path, cases: Sequence[str], log: Any) -> subprocess.Popen[bytes]:
    paths = [str(HERE.parent), str(HERE.parent.parent), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "GLOO_SOCKET_IFNAME": "lo"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(WORLD)}
    environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    environment = {"PATIENCE": str(PATIENCE), "HF_HUB_OFFLINE": "1", **environment}
    command = [sys.executable, "-m", "engines.worker", str(rank), str(WORLD), str(place), *cases]
    return subprocess.Popen(command, env=environment, stdout=log, stderr=log)


def _free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return int(opened.getsockname()[1])


def _read(path: Path) -> dict[str, Outcome]:
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {line.pop("case"): line for line in lines}


def _joint(ranks: Sequence[Outcome | None]) -> Outcome:
    """The worst of what the processes found; broken where one hung or died, or refused what another did."""
    found = [rank for rank in ranks if rank is not None]
    words = {result["outcome"] for result in found}

    def badness(result: Outcome) -> tuple[int, bool, float]:
        # Who lost its peer says so in gloo's words; the peer says why.
        return ORDER.index(result["outcome"]), "gloo" not in result.get("message", ""), result.get("difference", 0)

    apart = len(found) < WORLD or ("refused" in words and len(words) > 1)
    return max(found, key=badness) | ({"outcome": "broken"} if apart else {})
