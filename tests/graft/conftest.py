"""Pico checkpoints on disk, for tests that graft them; see `trios`."""

from functools import partial

import pytest

from graft.trios import trio_in, trio_with_tokens_in


@pytest.fixture
def make_trio(tmp_path):
    """make_trio(family, dtypes=(base, post, experts), tied=..., **adapter options) -> Trio."""
    return partial(trio_in, tmp_path)


@pytest.fixture
def make_trio_with_tokens(tmp_path):
    """The same with tokenizers, and with new tokens unless `new_tokens=False`."""
    return partial(trio_with_tokens_in, tmp_path)
