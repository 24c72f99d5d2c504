"""Every family and kind, in memory and from files: the same bytes or the same refusal; and one number on every road."""

from __future__ import annotations

import pytest

from roads_table import compare, covering_cases, every_case

pytestmark = pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings=True. and a tied layer:UserWarning")


def check(case, folder):
    row = compare(case, folder)
    if row.memory or row.files:
        assert row.memory == row.files
        return
    assert row.differing == []
    assert all(difference <= 1e-4 for difference in row.differences.values()), row.differences


@pytest.mark.parametrize("case", covering_cases(), ids=str)
def test_memory_and_files_give_one_result(case, tmp_path):
    check(case, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("case", every_case(), ids=str)
def test_memory_and_files_give_one_result_whatever_the_kind(case, tmp_path):
    check(case, tmp_path)
