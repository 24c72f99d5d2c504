"""What equals one process on two gloo processes: the short form here, all of `distributed_table.py` marked slow."""

import importlib.util

import pytest

from engines.cases import ROUTINGS, STAGES
from engines.engines import ENGINES
from engines.launch import outcomes, references

SHORT = {
    "DDP": ["classifier/review", "language/two stages"],
    "FSDP2": ["language/two stages", "learned/checkpointing, wrapped layers", "language/graft in memory"],
    "FSDP2 by transformers": ["language/loading"],
}
REFUSED = {"fit_routers", "add_languages", "graft in memory"}
"""What needs a model that one process has whole."""


def found_by(engines, folder, cases):
    """The outcomes of `routing/stage` cases under each engine that they are given for."""
    possible = references(folder, dict.fromkeys(tuple(case.split("/")) for found in cases.values() for case in found))
    known = {"/".join(pair) for pair in possible}
    return outcomes([f"{engine}/{case}" for engine in engines for case in cases[engine] if case in known], folder)


def refuses(engine, routing, stage):
    """Whether a case is refused: what needs a whole model; FSDP1; and buffers that accelerate does not hand out."""
    shards = engine.startswith("FSDP") or engine == "ZeRO-3"
    by_accelerate = engine == "FSDP2 by accelerate" and routing == "context"
    return (shards and stage in REFUSED) or engine.startswith("FSDP1") or by_accelerate


def check(found, subtests):
    for case, result in found.items():
        with subtests.test(case):
            assert result["outcome"] == ("refused" if refuses(*case.split("/")) else "equal"), result


def test_two_processes_equal_one(tmp_path, subtests):
    check(found_by(SHORT, tmp_path, SHORT), subtests)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_every_stage_equals_one_process_or_is_refused(engine, tmp_path, subtests):
    if engine.startswith("ZeRO") and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    cases = [f"{routing}/{stage}" for stage in STAGES for routing in ROUTINGS]
    check(found_by([engine], tmp_path, {engine: cases}), subtests)
