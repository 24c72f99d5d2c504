"""What `make served-demo` makes of what it measures, and how it starts and ends servers."""

from __future__ import annotations

import socket
import sys

import pytest

from served_demo import answers_at, compared, first_difference, generate, linked, started

FINE = {"agrees": True, "tolerance": 1e-3, "largest": 4e-5}


def row(model, server, one, many, **answers):
    said = {"answers": answers or None, "one": one, "many": many}
    return {"model": model, "server": server, "MB": 10, "verified": FINE, **said}


@pytest.mark.parametrize(
    ("ours", "theirs", "place"),
    [
        ("a macska alszik", "a  macska\nalszik", None),
        ("a macska alszik", "a kutya alszik", 2),
        ("a macska", "a macska alszik", 3),
        ("", "a", 1),
        ("", "", None),
    ],
)
def test_answers_part_at_a_word(ours, theirs, place):
    assert first_difference(ours, theirs) == first_difference(theirs, ours) == place


def test_a_row_is_compared_with_the_dense_model_and_with_the_first_server():
    rows = [
        row("mixture", "A", [10.0, 30.0, 20.0], [60.0], en="yes it is", hu="igen"),
        row("mixture", "B", [5.0], [8.0], en="yes it was", hu="igen"),
        row("dense", "A", [40.0], [50.0], en="no"),
        row("dense", "B", [10.0], [16.0]),
    ]
    found = compared(rows)
    assert [one["ratio"] for one in found] == [{"one": 0.5, "many": 1.2}, {"one": 0.5, "many": 0.5}, None, None]
    assert [one["parts_at"] for one in found] == [None, {"en": 3, "hu": None}, None, None]
    assert [{name: one[name] for name in rows[0]} for one in found] == rows


def test_the_table_has_a_line_for_each_row_and_says_how_it_was_measured():
    rows = compared([row("mixture", "A", [1.0, 2.0, 3.0], [4.0]), row("dense", "A", [4.0], [2.0])])
    found = {"machine": "One core.", "rounds": 3, "at_once": 8, "max_tokens": 48, "rows": rows}
    heads, line, *body, _, last = generate.served_demo_table(found).splitlines()
    assert "8 at once (llama.cpp takes one after another)" in heads and heads.endswith("answers beside A's |")
    assert body == [
        "| mixture | A | 10 | 2.0 (1.5 to 2.5) | 4.0 | 0.50, 2.00 | agrees within 0.001, largest difference 4e-05 |  |",
        "| dense | A | 10 | 4.0 | 2.0 |  | agrees within 0.001, largest difference 4e-05 |  |",
    ]
    assert heads.count("|") == line.count("|") == body[0].count("|")
    rounds = "Tokens per second are the median of 3 rounds, with quartiles"
    assert last == f"{rounds}, for answers of at most 48 tokens. One core."


def test_cells():
    assert generate.rate_cell([3.0]) == "3.0" and generate.rate_cell([1.0, 2.0, 3.0, 4.0, 5.0]) == "3.0 (2.0 to 4.0)"
    assert generate.answers_cell({"en": None, "hu": 1}) == "en: the same, hu: from word 1"
    assert generate.answers_cell({"en": None}) == "the same" and generate.answers_cell(None) == ""
    assert generate.verified_cell({"error": "a | b"}) == "not compared: a \\| b"
    differs = {"agrees": False, "tolerance": 1.046, "largest": None}
    assert generate.verified_cell(differs) == "differs within 1, no number"


def test_what_is_written_beside_a_linked_model_is_not_written_beside_the_model(tmp_path):
    (tmp_path / "run").mkdir()
    for name in ("config.json", "served.json"):
        (tmp_path / "run" / name).write_text(name)
    folder = linked(tmp_path / "run", tmp_path / "links" / "run")
    assert [file.name for file in folder.iterdir()] == ["config.json"]
    (folder / "served.json").write_text("new")
    assert (tmp_path / "run" / "served.json").read_text() == "served.json"


@pytest.mark.parametrize(
    ("script", "said"),
    [("echo loading; exec sleep 600", "no answer in 2 s:\nloading"), ("echo no such model; exit 3", "no such model")],
)
def test_a_server_that_does_not_answer_ends_with_its_log(script, said, tmp_path):
    with pytest.raises(SystemExit, match=said), started(["sh", "-c", script], 1, tmp_path / "log", starts=2, ends=30):
        pass


def test_a_server_that_does_not_end_is_killed(tmp_path):
    (tmp_path / "v1").mkdir()
    (tmp_path / "v1" / "models").touch()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    deaf = f"trap '' TERM; exec {sys.executable} -m http.server {port} --bind 127.0.0.1 --directory {tmp_path}"
    with started(["sh", "-c", deaf], port, tmp_path / "log", ends=0.1) as url:
        assert answers_at(f"{url}/v1/models")
    assert not answers_at(f"{url}/v1/models")
