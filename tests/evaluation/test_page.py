"""The report on disk: page, JSON and figures."""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("matplotlib", reason="needs the extra `eval`")

from evaluation.sample_report import sample_report
from peft_moe_delta.evaluation import EvalReport
from peft_moe_delta.evaluation.page import render, shown, verdict, write_report
from peft_moe_delta.evaluation.report import Difference

ROW = {"model": "a", "reference": "b", "task": "t", "metric": "m", "language": "hu", "status": "expanded"}


def test_page_json_and_figures_lie_side_by_side(tmp_path):
    report = sample_report()
    page = write_report(report, tmp_path / "report")
    assert EvalReport.load(page.parent) == report
    assert {path.stem for path in (page.parent / "figures").iterdir()} == {
        "scores",
        "retention_against_expansion",
        "routing",
        "transfer",
    }
    assert page.stat().st_size < 1_000_000


def test_the_page_asks_for_nothing_beyond_itself():
    page = render(sample_report())
    for request in ('src="', "url(http", "@import", "fetch(", '<link rel="stylesheet', 'href="http'):
        assert request not in page


def test_what_models_wrote_cannot_become_markup():
    report = sample_report()
    generation = replace(report.generations[0], prompt="</script><script>alert(1)</script>")
    view = replace(report.tokens[0], tokens=["</script>", "<b>"])
    page = render(replace(report, generations=[generation], tokens=[view]))
    assert "<script>alert" not in page
    assert page.count("</script>") == 2


def test_a_report_with_nothing_but_scores_is_drawn_too():
    bare = {"routing": [], "agreement": [], "tokens": [], "generations": [], "transfer": [], "fertility": []}
    page = render(replace(sample_report(), differences=[], references=[], **bare))
    assert "Scores" in page
    assert "Token by token" not in page


@pytest.mark.parametrize(
    ("value", "low", "high", "higher_is_better", "expected"),
    [
        (-0.5, -0.6, -0.4, False, "gain"),
        (-0.5, -0.6, -0.4, True, "loss"),
        (0.5, -0.1, 1.1, True, "unsure"),
        (0.5, None, None, True, "unsure"),
    ],
)
def test_a_difference_is_a_gain_a_loss_or_unsure(value, low, high, higher_is_better, expected):
    difference = Difference(value=value, low=low, high=high, higher_is_better=higher_is_better, **ROW)
    assert verdict(difference) == expected


def test_numbers_are_shown_with_their_interval():
    difference = Difference(value=0.5, low=-0.25, high=1.0, **ROW)
    assert shown(difference, "+") == "+0.500 [-0.250, +1.000]"
    assert shown(replace(difference, low=None)) == "0.500"
