"""The report survives its file, and a file that is none is named as such."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from evaluation.sample_report import sample_report
from peft_moe_delta.errors import DataError
from peft_moe_delta.evaluation.report import FORMAT, EvalReport


def test_saving_and_loading_gives_the_same_report(tmp_path):
    report = sample_report()
    report.save(tmp_path / "new folder")
    assert EvalReport.load(tmp_path / "new folder") == report
    assert EvalReport.load(tmp_path / "new folder/report.json") == report


def test_in_a_notebook_it_is_a_few_lines():
    report = sample_report()
    first, own, *others = repr(report).splitlines()
    assert first == "EvalReport(models=3, scores=9, warnings=1)" and str(report) == repr(report)
    assert own.startswith("  ours: ") and "1.750" in own and own.endswith("0.750")
    assert len(others) == 2
    scores = [replace(score, task=f"set {number}") for score in report.scores for number in range(50)]
    lines = repr(replace(report, models=report.models * 3, scores=scores)).splitlines()
    assert len(lines) == 6 and max(map(len, lines)) < 200


def test_the_file_is_plain_text_that_anyone_can_read(tmp_path):
    text = sample_report().save(tmp_path).read_text(encoding="utf-8")
    assert "küld" in text
    assert json.loads(text)["format"] == FORMAT


def test_columns_are_task_metric_and_language_in_order():
    columns = [(c.task, c.metric, c.language) for c in sample_report().columns()]
    assert columns == [
        ("held-out text", "bits_per_byte", "en"),
        ("held-out text", "bits_per_byte", "hu"),
        ("sorting", "exact_match", "en"),
    ]


def test_what_was_not_measured_is_none():
    report = sample_report()
    column = report.columns()[1]
    assert report.score("ours", column).value == 1.75
    assert report.difference("ours", "post-trained", column).value == -0.5
    assert report.score("nobody", column) is None
    assert report.difference("post-trained", "ours", column) is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (json.dumps({"format": FORMAT + 1}), "format 3; this version.*reads formats up to 2. Update"),
        ("{", "no JSON file"),
        (b"\xff\xfe", "no JSON file"),
        ("[]", "names no format"),
        ('{"a": 1}', "names no format"),
        (json.dumps({"format": 1, "models": [{"nome": "x"}]}), "no whole report"),
        (json.dumps({"format": 1, "models": []}), "no whole report"),
        (None, "No report at"),
    ],
)
def test_a_file_that_is_no_report_is_refused(tmp_path, content, message):
    file = tmp_path / "report.json"
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message):
        EvalReport.load(file)
