"""The report on disk: page, JSON and figures."""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("matplotlib", reason="needs the extra `eval`")

from evaluation.sample_report import sample_report
from peft_moe_delta.evaluation import EvalReport
from peft_moe_delta.evaluation.page import comparisons, facts, render, shown, tokenizers, write_report
from peft_moe_delta.evaluation.report import Difference
from peft_moe_delta.evaluation.verdict import measures

ROW = {"model": "a", "reference": "b", "task": "t", "metric": "m", "language": "hu", "status": "expanded"}


def test_page_json_and_figures_lie_side_by_side(tmp_path):
    report = sample_report()
    page = write_report(report, tmp_path / "report")
    assert EvalReport.load(page.parent) == report
    assert {path.stem for path in (page.parent / "figures").iterdir()} == {
        "scores",
        "frontier",
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


def test_new_languages_come_first_and_then_what_was_to_be_kept():
    assert [(row.task, row.language) for row in measures(sample_report())] == [
        ("held-out text", "hu"),
        ("held-out text", "en"),
        ("sorting", "en"),
    ]


def test_a_table_has_no_empty_rows_and_columns():
    report = sample_report()
    confusion = replace(report.scores[0], task="answers", metric="line_pass_rate")  # its items are not paired
    found = comparisons(replace(report, scores=[*report.scores, confusion]))
    assert [(one.reference, one.models, len(one.rows)) for one in found] == [
        ("post-trained", ["ours", "base"], 3),
        ("base", ["ours"], 3),
    ]
    assert list(facts(report)) == ["measured", "parameters, millions", "from"]
    assert facts(report)["from"] == ["folder/ours", "folder/base", "folder/post-trained"]


def test_models_of_one_tokenizer_stand_together():
    report = sample_report()
    rows = [replace(report.fertility[0], model=name) for name in ("base", "ours")]
    other = replace(report.fertility[0], model="post-trained", tokens_per_word=2.0)
    found = tokenizers(replace(report, fertility=[*rows, other]))
    assert [names for names, _ in found] == [["ours", "base"], ["post-trained"]]


def test_the_verdict_of_the_reports_own_model_comes_first():
    page = render(sample_report())
    verdict, rest = page.split("<h2>Scores</h2>")
    assert "Hungarian −22% bits" in verdict and "Measured 2026-11-30" in verdict
    assert rest.index("Differences</h2>") < rest.index('id="definitions"')
    head = rest[: rest.index("</thead>")]
    assert head.index("ours") < head.index("base") < head.index("post-trained")


def test_numbers_are_shown_with_their_interval():
    difference = Difference(value=0.5, low=-0.25, high=1.0, **ROW)
    assert shown(difference, "+") == "+0.500 [-0.250, +1.000]"
    assert shown(replace(difference, low=None)) == "0.500"
