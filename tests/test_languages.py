"""Codes, ids and groups: ids follow the order given, never the alphabet, and survive the sorting of saved JSON."""

import pytest

from peft_moe_delta.errors import LanguageError
from peft_moe_delta.languages import LanguageTable

LANGUAGES = {"hu": "uralic", "en": "original", "fi": "uralic", "az": "turkic"}


def test_ids_and_groups_follow_the_order_given():
    table = LanguageTable.build(LANGUAGES)
    assert table.codes == ("hu", "en", "fi", "az")
    assert table.groups == ("original", "uralic", "turkic")
    assert table.group_of == (1, 0, 1, 2)
    assert [table.id_of(code) for code in LANGUAGES] == [0, 1, 2, 3]
    assert [table.members(group) for group in table.groups] == [("en",), ("hu", "fi"), ("az",)]


def test_saved_lists_decide_over_the_order_of_a_sorted_mapping():
    table = LanguageTable.build(LANGUAGES)
    assert LanguageTable.build(dict(sorted(LANGUAGES.items())), table.codes, table.groups) == table
    assert LanguageTable.build(dict(sorted(LANGUAGES.items()))) != table, "the control: the mapping alone forgets"


def test_the_original_group_is_there_even_without_a_language():
    assert LanguageTable.build({"hu": "uralic"}).groups == ("original", "uralic")


def test_an_unknown_language_is_told_the_known_ones():
    with pytest.raises(LanguageError, match="Unknown language 'de'.*hu, en, fi, az"):
        LanguageTable.build(LANGUAGES).id_of("de")


@pytest.mark.parametrize(
    "languages",
    [None, {}, ["hu"], {"hu": None}, {"": "uralic"}, {"hu": ""}, {1: "uralic"}, {"hu": ["uralic", "turkic"]}],
    ids=repr,
)
def test_malformed_languages_are_refused(languages):
    with pytest.raises(LanguageError, match="`languages` must map"):
        LanguageTable.build(languages)


@pytest.mark.parametrize(
    ("codes", "groups", "message"),
    [
        (["hu", "en", "fi"], None, "saved order of languages"),
        (["hu", "en", "fi", "az", "de"], None, "saved order of languages"),
        (["hu", "en", "fi", "az", "az"], None, "saved order of languages"),
        (None, ["original", "uralic"], "saved order of groups"),
        (None, ["uralic", "original", "turkic"], 'first group must be "original"'),
    ],
)
def test_saved_lists_that_disagree_with_the_mapping_are_refused(codes, groups, message):
    with pytest.raises(LanguageError, match=message):
        LanguageTable.build(LANGUAGES, codes, groups)
