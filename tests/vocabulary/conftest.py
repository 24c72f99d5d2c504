import pytest

from greek import make_tokenizer


@pytest.fixture
def tokenizer():
    return make_tokenizer()
