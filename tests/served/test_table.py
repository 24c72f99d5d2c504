"""The live table of engines: what counts as exact, what counts as a fault, what the page says of it."""

from __future__ import annotations

import json
import math
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import served_table
from peft_moe_delta.engines import ENGINES, ROWS, cells_of
from peft_moe_delta.export import traits_of_export
from peft_moe_delta.served.reference import Answer
from served.forms import FORMS, make
from served_table import ENVIRONMENTS, is_fault, verdict

ROOT = Path(__file__).parents[2]
ANSWER = Answer((1, 2, 3), (-1.0, -2.0), (4, 5), (-0.5, -0.5), (frozenset({4, 9}), frozenset({5})))


def said(logprobs=(-1.0, -2.0), ids=(4, 5)):
    return {"logprobs": [list(logprobs)], "ids": [list(ids)]}


@pytest.mark.parametrize(
    ("answer", "outcome", "difference"),
    [
        (said(), "exact", 0.0),
        (said((-1.00002, -2.0)), "exact", 2e-5),
        (said((None, -2.0)), "exact", 0.0),
        (said(ids=()), "exact", 0.0),
        (said(ids=(9, 5)), "exact", 0.0),
        (said(ids=(4, 6)), "differs", 0.0),
        (said((-1.0, -2.3)), "differs", 0.3),
        (said((math.nan, -2.0)), "differs", None),
    ],
)
def test_exact_is_the_same_log_probabilities_and_greedy_tokens(answer, outcome, difference):
    assert verdict([ANSWER], answer) == {"outcome": outcome, "difference": difference}


def test_only_what_we_would_take_can_be_a_fault():
    fails = verdict([ANSWER], {"error": "ValueError: no"})
    assert fails == {"outcome": "fails", "message": "ValueError: no"}
    assert is_fault("ok", fails) and is_fault("not run", fails) and not is_fault("load error", fails)
    assert not is_fault("ok, by its Transformers backend", {"outcome": "exact", "difference": 0.0})


def test_every_row_has_an_export_that_it_speaks_of(tmp_path):
    assert [row.form for row in ROWS] == list(FORMS)
    for number, row in enumerate(ROWS):
        traits = traits_of_export(make(row.form, tmp_path / str(number)))
        assert row.applies(traits), row.form
        assert set(cells_of(traits)) == set(ENGINES)


def test_what_the_page_says_of_a_finding():
    generate = runpy.run_path(str(ROOT / "docs" / "generate.py"))["engine_cell"]
    exact, wrong = {"outcome": "exact", "difference": 2e-6}, {"outcome": "differs", "difference": 1.9}
    assert generate("ok", exact) == generate("not run", exact) == "exact (2e-06)"
    assert generate("ok, by its Transformers backend", exact) == "exact, by its Transformers backend (2e-06)"
    assert generate("wrong", wrong) == "refused: wrong (2)" and generate("wrong", None) == "refused: wrong"
    assert generate("not tried", exact) == "refused: not tried (exact here, 2e-06)"
    assert generate("load error", {"outcome": "fails", "message": "x"}) == "refused: load error"


def test_what_was_found_has_no_fault():
    """No engine is wrong, or fails, on a form that we take for it: the page's numbers against the table of today."""
    kept = json.loads(served_table.FOUND.read_text())
    rows = {row.form: row for row in ROWS}
    for engine, one in kept.items():
        for form, finding in one["forms"].items():
            assert not is_fault(rows[form][engine], finding), (engine, form, finding)


@pytest.mark.slow
@pytest.mark.parametrize("engine", list(served_table.ENGINES))
def test_an_installed_engine_is_run_live(engine):
    if not (ENVIRONMENTS / engine / "installed").exists():
        pytest.skip(f"{engine} is not in {ENVIRONMENTS}; make engines-table installs it")
    run = subprocess.run(
        [sys.executable, served_table.__file__, "--engines", engine, "--forms", "Mixtral", "dense, one language"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert {one["outcome"] for one in json.loads(run.stdout)[engine]["forms"].values()} == {"exact"}
