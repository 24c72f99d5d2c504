"""Codes, ids and groups: ids follow the order given, never the alphabet, and survive the sorting of saved JSON."""

import pytest

from peft_moe_delta.errors import LanguageError
from peft_moe_delta.languages import LanguageTable, closest_code, closest_code_in_name, read_code, script_of

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


def test_another_spelling_of_a_known_language_is_named_in_the_error():
    with pytest.raises(LanguageError, match="'hun_Latn' is called 'hu' here: use that"):
        LanguageTable.build(LANGUAGES).id_of("hun_Latn")


@pytest.mark.parametrize(("code", "written"), [(False, "`no`"), (True, "`yes`"), (None, "`~`")])
def test_what_yaml_makes_of_an_unquoted_code_is_named_in_the_error(code, written):
    with pytest.raises(LanguageError, match=f"In YAML, {written}.* write it in quotes"):
        LanguageTable.build({code: "uralic"})


@pytest.mark.parametrize(
    ("code", "known", "found"),
    [
        ("hun_Latn", ["en", "hu"], "hu"),
        ("hu", ["eng_Latn", "hun_Latn"], "hun_Latn"),
        ("nob", ["nn", "no"], "no"),
        ("no", ["nn", "nb"], "nb"),  # Norwegian without more is Bokmål
        ("nn", ["nb"], None),
        ("iw", ["heb"], "heb"),
        ("pes", ["fa"], "fa"),
        ("arz", ["ar"], "ar"),
        ("arz", ["apc"], None),  # two languages of one macrolanguage
        ("id", ["ms"], None),
        ("zh-TW", ["zh-Hans", "zh-Hant"], "zh-Hant"),
        ("zho_Hant", ["zh-Hans"], None),  # another script is another text
        ("zho_Hant", ["zh"], "zh"),
        ("cmn_Hani", ["zh-Hans"], "zh-Hans"),
        ("kor_Hang", ["ko-KR"], "ko-KR"),
        ("pt-BR", ["pt-PT", "pt"], "pt"),
        ("pt-BR", ["pt-PT"], "pt-PT"),  # nothing else fits
        ("pt", ["pt-PT", "pt-BR"], "pt-BR"),
        ("sr_Latn", ["sr-Cyrl"], None),
        ("ckb", ["ku"], None),  # written in another script
        ("mine", ["mine", "en"], "mine"),  # a name of the user's own
        ("mine", ["min"], None),
    ],
)
def test_codes_of_all_standards_meet(code, known, found):
    assert closest_code(code, known) == found


@pytest.mark.parametrize(
    ("name", "known", "found"),
    [
        ("belebele_zho_Hant", ["zh-Hans", "zh-Hant"], "zh-Hant"),
        ("belebele_zho_Hant", ["zh-Hans"], None),
        ("mmlu_pt-BR", ["pt-PT", "pt-BR"], "pt-BR"),
        ("mmlu_pt_br", ["pt-PT", "pt-BR"], "pt-BR"),
        ("xnli_zh_cn", ["zh-Hant", "zh"], "zh"),
        ("flores_eng_Latn-hun_Latn", ["en", "hu"], "hu"),
        ("flores_hu-en", ["en", "hu"], "en"),
        ("arc_hu_hard", ["hu"], "hu"),  # `hard` is no script
        ("truthful_qa", ["en"], None),
    ],
)
def test_names_give_the_last_language_with_its_script_and_region(name, known, found):
    assert closest_code_in_name(name, known) == found


def test_a_name_of_the_users_own_is_no_code():
    assert [read_code(name) for name in ("legal", "original", "False", "", "und")] == [None] * 5
    assert [script_of(code) for code in ("el", "pbt", "yue", "sr", "sr-Latn", "mine")] == [
        *("Grek", "Arab", "Hant", "Cyrl", "Latn"),
        None,
    ]


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
