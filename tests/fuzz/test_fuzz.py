"""A few hundred of the values that `make fuzz` tries by the thousand."""

from __future__ import annotations

import pytest

from fuzz import data, everything


@pytest.mark.parametrize(("subject", "number"), [("config", 150), ("recipes", 60), ("command_line", 40), ("data", 240)])
def test_bad_values_end_in_clear_errors_and_cost_no_file(subject, number):
    lines: list[str] = []
    tally = everything.run([subject], number, report=lines.append)
    assert not tally.tracebacks and not tally.lost, "\n".join(lines)
    assert tally.tried == number and tally.clear > number / 2


@pytest.mark.parametrize("kind", [kind for kind in data.kinds() if kind not in ("report", "delta")])
def test_the_data_files_that_are_damaged_can_be_read_whole(kind, tmp_path):
    """But for two whose beginnings alone are made up."""
    data.read_from(tmp_path, *data.kinds()[kind])
