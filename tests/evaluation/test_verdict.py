"""A verdict says what the intervals carry, and no more."""

from __future__ import annotations

from dataclasses import replace

import pytest

from evaluation.sample_report import sample_report
from peft_moe_delta.evaluation.frontier import frontier
from peft_moe_delta.evaluation.names import language_name
from peft_moe_delta.evaluation.page import markdown
from peft_moe_delta.evaluation.report import Difference, EvalReport, Model, Score
from peft_moe_delta.evaluation.verdict import RULE, judge, verdict

TEXT, TASKS = ("held-out text", "bits_per_byte", False), ("sorting", "exact_match", True)


def compared(*rows: tuple[str, str, tuple, float, float, float], reference: float = 2.0) -> EvalReport:
    """A report of two models: `(language, status, what, value, low, high)`; the reference scores 2 bits, or tasks."""
    scores, differences = [], []
    for language, status, (task, metric, up), value, low, high in rows:
        row = {"task": task, "metric": metric, "language": language, "status": status, "higher_is_better": up}
        scores += [Score(model="them", value=reference, **row), Score(model="ours", value=reference + value, **row)]
        differences.append(Difference(model="ours", reference="them", value=value, low=low, high=high, **row))
    models = [Model(name="them"), Model(name="ours")]
    return EvalReport(models=models, languages={}, references=["them"], scores=scores, differences=differences)


def test_the_samples_verdict_is_one_sentence():
    told = (
        "'ours' beside 'post-trained': Hungarian −22% bits; English kept; sorting −5.0 points; "
        "99% of English tokens on expert 0."
    )
    report = sample_report()
    assert str(verdict(report)) == told
    assert [s.judgement for s in verdict(report).statements] == ["better", "kept", "worse", None]
    assert markdown(report, "ours").endswith(f"{told}\n({RULE})")


@pytest.mark.parametrize(
    ("what", "low", "high", "expected"),
    [
        (TEXT, -0.5, -0.4, "better"),
        (TEXT, -0.01, 0.01, "kept"),  # within 1% of 2 bits
        (TEXT, -0.015, -0.005, "kept"),  # better, and by nothing
        (TEXT, 0.005, 0.015, "kept"),  # worse, and by nothing
        (TEXT, 0.005, 0.03, "worse"),
        (TEXT, -0.5, 0.015, "kept"),  # who knows how much better, but no worse
        (TEXT, -0.01, 0.03, "undecided"),
        (TASKS, 0.03, 0.05, "better"),
        (TASKS, -0.05, -0.01, "worse"),
        (TASKS, -0.015, 0.06, "kept"),
        (TASKS, -0.03, 0.06, "undecided"),
        (TASKS, None, None, "undecided"),
    ],
)
def test_a_judgement_is_the_intervals(what, low, high, expected):
    value = 0.0 if low is None else (low + high) / 2
    report = compared(("en", "original", what, value, low, high))
    assert judge(report, report.differences[0]) == expected


@pytest.mark.parametrize(
    ("status", "what", "low", "high", "expected"),
    [
        ("expanded", TEXT, -0.5, -0.3, "Hungarian −20% bits"),
        ("expanded", TEXT, 0.05, 0.07, "Hungarian +3.0% bits"),
        ("expanded", TEXT, -0.01, 0.01, "Hungarian unchanged"),
        ("expanded", TEXT, -0.5, 0.01, "Hungarian undecided"),  # kept is not taught
        ("original", TEXT, -0.5, 0.01, "Hungarian kept"),
        ("unseen", TEXT, -0.05, 0.05, "Hungarian undecided"),
        ("original", TASKS, -0.01, 0.01, "sorting kept"),
        ("expanded", TASKS, -0.01, 0.05, "sorting kept within 2 points"),
        ("expanded", TASKS, 0.03, 0.05, "sorting +4.0 points"),
    ],
)
def test_words_are_those_of_what_was_wanted(status, what, low, high, expected):
    told = verdict(compared(("hu", status, what, (low + high) / 2, low, high)))
    assert [statement.text for statement in told.statements] == [expected]


def test_tasks_that_nobody_solves_are_nothing_to_keep():
    report = compared(("en", "original", TASKS, 0.0, 0.0, 0.0), reference=0.0)
    assert judge(report, report.differences[0]) == "undecided"
    assert verdict(report).statements[0].text == "sorting solved by neither"


def test_of_many_languages_those_that_lost_are_named():
    codes = ["hu", "el", "fi", "de", "fr", "it"]
    rows = [(code, "expanded", TEXT, -0.4, -0.5, -0.3) for code in codes[:4]]
    rows += [("fr", "expanded", TEXT, 0.1, 0.05, 0.15), ("it", "expanded", TEXT, 0.0, -0.1, 0.1)]
    assert [(s.text, s.judgement) for s in verdict(compared(*rows)).statements] == [
        ("1 of 6 new languages worse (French +5.0% bits)", "worse"),
        ("4 of 6 new languages better", "better"),
        ("1 of 6 new languages undecided", "undecided"),
    ]


def test_without_a_comparison_there_is_no_verdict():
    report = sample_report()
    assert verdict(report, "post-trained") is None
    assert verdict(replace(report, differences=[], references=[])) is None
    assert "beside" not in markdown(replace(report, differences=[]), "ours")


def test_the_first_choices_of_a_routing_row_count_before_those_of_an_agreement():
    report = sample_report()
    agreement = [replace(report.agreement[0], language="en", off=0.25)]
    assert "99% of English" in str(verdict(replace(report, agreement=agreement)))
    assert "75% of English" in str(verdict(replace(report, agreement=agreement, routing=[])))


def test_a_frontier_counts_from_the_reference_and_leaves_out_what_is_beaten():
    kept_en, kept_sorting = frontier(sample_report())
    assert (kept_en.title, kept_sorting.title) == ("English bits/byte", "sorting")
    ours = next(point for point in kept_sorting.points if point.model == "ours")
    assert (ours.kept, ours.gained) == pytest.approx((-0.05, 0.5))
    assert [point.model for point in kept_sorting.shown()] == ["ours"]
    assert kept_sorting.left_out() == {"base": pytest.approx(-0.8)}
    assert kept_sorting.best("hu") == [(pytest.approx(-0.05), 0.5), (0.0, 0.0)]
    (left, right), (bottom, top) = kept_sorting.limits()
    assert -0.2 < left < -0.08 and right > 0.04 and bottom < 0 and top > 0.55


@pytest.mark.parametrize(
    ("code", "name"),
    [
        ("hu", "Hungarian"),
        ("hun_Latn", "Hungarian"),
        ("pt-BR", "Portuguese (BR)"),
        ("zh-Hant", "Chinese (Hant)"),
        ("cooking", "cooking"),
    ],
)
def test_languages_have_names(code, name):
    assert language_name(code) == name
