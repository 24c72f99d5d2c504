"""Fixtures of the training tests."""

import pytest
from transformers import PreTrainedTokenizerFast

from training.common import make_tokenizer


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()
