"""A card never claims a laxer licence than a parent's."""

import pytest

from peft_moe_delta.errors import CardError
from peft_moe_delta.hub import licence_for, licence_of


@pytest.mark.parametrize(
    ("parents", "licence"),
    [
        (["apache-2.0", "apache-2.0"], "apache-2.0"),
        (["mit", "apache-2.0"], "apache-2.0"),
        (["Apache-2.0", "llama3.2"], "llama3.2"),
        (["cc-by-nc-4.0", "llama3.2"], "other"),
        (["mit", None], "unknown"),
        (["mit", "unknown"], "unknown"),
        ([], "unknown"),
    ],
)
def test_the_strictest_parent_decides(parents, licence):
    assert licence_for({f"org/{index}": parent for index, parent in enumerate(parents)}) == licence


@pytest.mark.parametrize(
    ("parent", "claimed"),
    [
        ("mit", "apache-2.0"),
        ("apache-2.0", "Apache-2.0"),
        ("mit", "gpl-3.0"),
        ("llama3.2", "llama3.2"),
        ("mit", "other"),
    ],
)
def test_an_equal_or_stricter_claim_stands(parent, claimed):
    assert licence_for({"org/base": parent}, claimed) == claimed.lower()


@pytest.mark.parametrize(
    ("parent", "claimed", "hint"),
    [
        ("apache-2.0", "mit", "gives 'apache-2.0'"),
        ("cc-by-nc-4.0", "apache-2.0", "gives 'cc-by-nc-4.0'"),
        ("llama3.2", "gpl-3.0", "gives 'llama3.2'"),
        (None, "mit", "Say what it is"),
    ],
)
def test_a_laxer_or_incomparable_claim_is_refused(parent, claimed, hint):
    with pytest.raises(CardError, match=f"claims the licence '{claimed}', but org/base.*{hint}"):
        licence_for({"org/base": parent, "org/chat": "mit"}, claimed)


def test_a_folders_own_card_states_its_licence(tmp_path):
    assert licence_of(tmp_path) is None
    (tmp_path / "README.md").write_text("---\nlicense: MIT\n---\n# a model\n")
    assert licence_of(tmp_path) == "mit"
    (tmp_path / "README.md").write_text("# a model without metadata\n")
    assert licence_of(tmp_path) is None
