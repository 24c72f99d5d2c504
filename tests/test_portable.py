"""The check of learning tests: margins by hand, and a test that only just holds is found out."""

import pytest

import chance
from builders import pico, token_batch
from chance import Figure, Holds
from portable import KERNELS, WAYS, margins, table


def figures(*values, test="t", bound=1.0, below=True, name=""):
    return [Figure(test, name, value, bound, below) for value in values]


def test_room_is_counted_in_standard_deviations_towards_the_bound():
    wide = figures(1.1, 1.3, 1.5, test="wide", bound=0.5, below=False)
    tight, wide, still = margins([*figures(0.2, 0.2, test="still"), *wide, *figures(0.1, 0.3, 0.5, test="tight")])
    assert (tight.figure.test, tight.mean, tight.worst) == ("tight", pytest.approx(0.3), 0.5)
    assert tight.room == pytest.approx(0.7 / 0.2)
    assert (wide.worst, wide.room) == (1.1, pytest.approx(0.8 / 0.2))
    assert still.room == float("inf")
    assert margins(figures(2.0, 2.0))[0].room == float("-inf")
    assert "| tight | 0.3 | 0.2 | 0.5 | < 1 | 3.5 |" in table([tight])


def test_bounds_are_exclusive_and_every_figure_is_recorded_also_one_that_fails(tmp_path):
    file = tmp_path / "figures.jsonl"
    holds = Holds("t", str(file))
    holds(0.5, above=0.4, below=0.6, name="share")
    with pytest.raises(AssertionError, match=r"loss is 0\.1, expected below 0\.1"):
        holds(0.1, below=0.1, name="loss")
    with pytest.raises(AssertionError, match="needs"):
        holds(0.1)
    assert [(f.name, f.bound, f.below, f.kept) for f in Figure.read(file)] == [
        ("share", 0.4, False, True), ("share", 0.6, True, True), ("loss", 0.1, True, False),
    ]  # fmt: skip
    assert Figure.read(tmp_path / "none") == []


def test_twelve_runs_cover_every_combination_with_a_seed_each():
    environments = [way.environment for way in WAYS]
    assert len({tuple(sorted(e.items())) for e in environments}) == len(WAYS) == 12
    assert len({e["PEFT_MOE_DELTA_TEST_SEED"] for e in environments}) == 12
    assert environments[0]["ATEN_CPU_CAPABILITY"] == "default" and KERNELS["low"].items() <= environments[0].items()


def test_another_offset_draws_other_weights_and_tokens(monkeypatch):
    draw = lambda: (pico().lm_head.weight, token_batch())  # noqa: E731
    first, again = draw(), draw()
    monkeypatch.setattr(chance, "OFFSET", chance.OFFSET + 1)
    other = draw()
    assert all(one.equal(same) and not one.equal(new) for one, same, new in zip(first, again, other, strict=True))


def test_what_takes_holds_is_a_learning_test_and_nothing_else_is(request, holds):
    assert request.node.get_closest_marker("learning")
    holds(0, below=1)
    for item in request.session.items:
        assert ("holds" in getattr(item, "fixturenames", ())) == (item.get_closest_marker("learning") is not None)
